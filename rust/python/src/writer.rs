//! The writer as a Python class.

use std::path::PathBuf;

use numpy::{PyReadonlyArray1, PyReadonlyArray2, PyUntypedArrayMethods};
use potstill_core::{self as core, Rows};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::errors::to_python;

#[pyclass(module = "potstill._rust")]
pub struct Writer {
    inner: core::Writer,
}

#[pymethods]
impl Writer {
    #[new]
    fn new(py: Python<'_>, path: PathBuf, spec: &str, resume: bool, shard_bytes: u64) -> PyResult<Self> {
        let opened = py.detach(|| core::Writer::open(&path, spec, resume, shard_bytes));
        Ok(Writer { inner: opened.map_err(|e| to_python(py, e))? })
    }

    fn __contains__(&self, key: &str) -> bool {
        self.inner.contains(key)
    }

    /// Adds a sequence of contiguous arrays, and the bytes of each of the spec's further columns; False when it is there already with equal content.
    #[allow(clippy::too_many_arguments)]
    #[pyo3(signature = (key, tokens, ids, log_probs, log_rest, extra=None, lse=None, counts=None, columns=None))]
    fn add(
        &mut self,
        py: Python<'_>,
        key: &str,
        tokens: PyReadonlyArray1<'_, i32>,
        ids: PyReadonlyArray2<'_, i32>,
        log_probs: PyReadonlyArray2<'_, f32>,
        log_rest: PyReadonlyArray1<'_, f32>,
        extra: Option<PyReadonlyArray2<'_, f32>>,
        lse: Option<PyReadonlyArray1<'_, f32>>,
        counts: Option<PyReadonlyArray2<'_, i32>>,
        columns: Option<Vec<PyReadonlyArray1<'_, u8>>>,
    ) -> PyResult<bool> {
        if ids.shape() != log_probs.shape() {
            let what = format!("sequence {key:?}: ids has shape {:?}, log_probs {:?}", ids.shape(), log_probs.shape());
            return Err(PyValueError::new_err(what));
        }
        let rows = Rows {
            k: ids.shape()[1],
            tokens: tokens.as_slice()?,
            ids: ids.as_slice()?,
            log_probs: log_probs.as_slice()?,
            log_rest: log_rest.as_slice()?,
            extra: extra.as_ref().map_or(Ok(&[] as &[f32]), |a| a.as_slice())?,
            lse: lse.as_ref().map_or(Ok(&[] as &[f32]), |a| a.as_slice())?,
            draws: counts.as_ref().map_or(Ok(&[] as &[i32]), |a| a.as_slice())?,
        };
        let columns = columns.as_deref().unwrap_or_default();
        let columns = columns.iter().map(|c| c.as_slice()).collect::<Result<Vec<&[u8]>, _>>()?;
        let inner = &mut self.inner;
        py.detach(|| inner.add_with(key, &rows, &columns)).map_err(|e| to_python(py, e))
    }

    /// From here on the mass of a row may be above 1 by what a cache's rounding adds.
    fn accept_rounded(&mut self) {
        self.inner.accept_rounded();
    }

    /// Commits what was added; the shard's name, or None when nothing was new.
    fn flush(&mut self, py: Python<'_>) -> PyResult<Option<String>> {
        let inner = &mut self.inner;
        py.detach(|| inner.commit()).map_err(|e| to_python(py, e))
    }

    fn close(&mut self, py: Python<'_>) -> PyResult<()> {
        let inner = &mut self.inner;
        py.detach(|| inner.close()).map_err(|e| to_python(py, e))
    }

    #[getter]
    fn committed(&self) -> usize {
        self.inner.committed()
    }

    /// (sequences, bytes) of the open shard.
    #[getter]
    fn pending(&self) -> (usize, u64) {
        self.inner.pending()
    }

    /// (sequences, tokens) taken over from dead writers.
    #[getter]
    fn salvaged(&self) -> (u64, u64) {
        (self.inner.salvaged.sequences, self.inner.salvaged.tokens)
    }
}
