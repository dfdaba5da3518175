//! Rows of ids as Python gives them: lists and arrays of integers, to one flat array.

use numpy::{PyArray1, PyReadonlyArray1};
use potstill_core::xtok::pages;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyList;

fn wide(row: &[i64], out: &mut Vec<i32>) -> Result<(), (usize, String)> {
    let fits = row.iter().fold(true, |fits, id| fits & (i64::from(*id as i32) == *id));
    out.extend(row.iter().map(|id| *id as i32));
    match row.iter().enumerate().find(|(_, id)| !fits && i32::try_from(**id).is_err()) {
        Some((at, id)) => Err((at, id.to_string())),
        None => Ok(()),
    }
}

/// None where the row is no array of int32 or int64 [T].
fn array(row: &Bound<'_, PyAny>, out: &mut Vec<i32>) -> Option<Result<(), (usize, String)>> {
    if let Ok(row) = row.extract::<PyReadonlyArray1<'_, i32>>() {
        match row.as_slice() {
            Ok(row) => out.extend_from_slice(row),
            Err(_) => out.extend(row.as_array()),
        }
        return Some(Ok(()));
    }
    let row = row.extract::<PyReadonlyArray1<'_, i64>>().ok()?;
    Some(match row.as_slice() {
        Ok(row) => wide(row, out),
        Err(_) => wide(&row.as_array().to_vec(), out),
    })
}

fn list(row: &Bound<'_, PyList>, out: &mut Vec<i32>) -> Result<(), (usize, String)> {
    for (at, id) in row.iter().enumerate() {
        match id.extract::<i32>() {
            Ok(id) => out.push(id),
            Err(_) => return Err((at, id.repr().map_or_else(|_| "unprintable".to_string(), |text| text.to_string()))),
        }
    }
    Ok(())
}

type Flat<'py> = (Bound<'py, PyArray1<i32>>, Bound<'py, PyArray1<i64>>);

/// Rows, lists or arrays [T] of int32 or int64, one after another: ids int32 [n] and where each row begins int64 [R+1].
/// `side` names them in errors.
#[pyfunction]
pub fn flat_ids<'py>(py: Python<'py>, rows: &Bound<'py, PyList>, side: &str) -> PyResult<Flat<'py>> {
    let total = rows.iter().map(|row| row.len().unwrap_or(0)).sum();
    let (mut flat, mut ptr) = (pages::with_capacity(total), Vec::with_capacity(rows.len() + 1));
    ptr.push(0i64);
    for (number, row) in rows.iter().enumerate() {
        let done = match row.cast::<PyList>() {
            Ok(row) => Some(list(row, &mut flat)),
            Err(_) => array(&row, &mut flat),
        };
        match done {
            None => {
                let what = format!("row {number} of the {side}'s ids is no list or array of integers");
                return Err(PyValueError::new_err(what));
            }
            Some(Ok(())) => ptr.push(flat.len() as i64),
            Some(Err((at, id))) => {
                let what = format!("row {number}: {side} token {at} is {id}; ids are integers below 2^31");
                return Err(PyValueError::new_err(what));
            }
        }
    }
    Ok((PyArray1::from_vec(py, flat), PyArray1::from_vec(py, ptr)))
}
