//! The reader as a Python class, and the tools.

use std::path::PathBuf;

use numpy::{Element, PyReadonlyArray1, PyReadwriteArray1};
use potstill_core::reader::{Reader, Wanted};
use potstill_core::{verify as tools, RowsMut};
use pyo3::prelude::*;

use crate::errors::to_python;

#[pyclass(frozen, module = "potstill._rust")]
pub struct Cache {
    inner: Reader,
}

#[pymethods]
impl Cache {
    #[new]
    #[pyo3(signature = (path, mapped=false))]
    fn new(py: Python<'_>, path: PathBuf, mapped: bool) -> PyResult<Self> {
        let open = || if mapped { Reader::open_mapped(&path) } else { Reader::open(&path) };
        Ok(Cache { inner: py.detach(open).map_err(|e| to_python(py, e))? })
    }

    /// The cache as it is now; only shards that are new are opened.
    fn refreshed(&self, py: Python<'_>) -> PyResult<Self> {
        Ok(Cache { inner: py.detach(|| self.inner.refreshed()).map_err(|e| to_python(py, e))? })
    }

    fn __len__(&self) -> usize {
        self.inner.len()
    }

    fn __contains__(&self, key: &str) -> bool {
        self.inner.find(key).is_some()
    }

    fn keys(&self) -> Vec<String> {
        self.inner.keys().map(str::to_string).collect()
    }

    #[getter]
    fn spec(&self) -> &str {
        &self.inner.spec().text
    }

    #[getter]
    fn k(&self) -> u32 {
        self.inner.spec().k
    }

    #[getter]
    fn num_tokens(&self) -> u64 {
        self.inner.num_tokens()
    }

    #[getter]
    fn num_bytes(&self) -> u64 {
        self.inner.num_bytes()
    }

    /// Tokens of a sequence.
    fn length(&self, py: Python<'_>, key: &str) -> PyResult<usize> {
        self.inner.require(key).map(|s| self.inner.tokens_of(s)).map_err(|e| to_python(py, e))
    }

    /// xxh3-128 of the sequence's tokens as little-endian int32.
    fn token_hash(&self, py: Python<'_>, key: &str) -> PyResult<u128> {
        self.inner.require(key).map(|s| self.inner.token_hash(s)).map_err(|e| to_python(py, e))
    }

    /// (name of its shard, [(start, end)]): the bytes that reading a sequence needs, header and index apart.
    fn ranges(&self, py: Python<'_>, key: &str) -> PyResult<(&str, Vec<(u64, u64)>)> {
        let sequence = self.inner.require(key).map_err(|e| to_python(py, e))?;
        let (name, ranges) = self.inner.ranges(sequence);
        Ok((name, ranges.into_iter().filter(|(start, end)| start < end).collect()))
    }

    /// Decodes the first len(out) tokens.
    fn read_tokens(&self, py: Python<'_>, key: &str, mut out: PyReadwriteArray1<'_, i32>) -> PyResult<()> {
        let out = out.as_slice_mut()?;
        let read = || self.inner.read_tokens(self.inner.require(key)?, out);
        py.detach(read).map_err(|e| to_python(py, e))
    }

    /// Decodes a whole sequence into flat memory: tokens [L], then as in read_many.
    #[allow(clippy::too_many_arguments)]
    #[pyo3(signature = (key, tokens, ids, log_probs, log_rest, extra=None, lse=None, counts=None))]
    fn read(
        &self,
        py: Python<'_>,
        key: &str,
        mut tokens: PyReadwriteArray1<'_, i32>,
        mut ids: PyReadwriteArray1<'_, i32>,
        mut log_probs: PyReadwriteArray1<'_, f32>,
        mut log_rest: PyReadwriteArray1<'_, f32>,
        mut extra: Option<PyReadwriteArray1<'_, f32>>,
        mut lse: Option<PyReadwriteArray1<'_, f32>>,
        mut counts: Option<PyReadwriteArray1<'_, i32>>,
    ) -> PyResult<()> {
        let tokens = tokens.as_slice_mut()?;
        let out = RowsMut {
            ids: ids.as_slice_mut()?,
            log_probs: log_probs.as_slice_mut()?,
            log_rest: log_rest.as_slice_mut()?,
            extra: optional(&mut extra)?,
            lse: optional(&mut lse)?,
            draws: optional(&mut counts)?,
        };
        py.detach(|| self.inner.read_sequence(self.inner.require(key)?, tokens, out)).map_err(|e| to_python(py, e))
    }

    /// Bytes of further column `column`: the first rows[b] rows of each sequence; with a length each takes the memory of so
    /// many rows, the rest zero.
    fn read_column(
        &self,
        py: Python<'_>,
        column: usize,
        keys: Vec<String>,
        rows: Vec<usize>,
        length: Option<usize>,
        mut out: PyReadwriteArray1<'_, u8>,
    ) -> PyResult<()> {
        let sequences = keys.iter().map(|key| self.inner.require(key)).collect::<Result<Vec<_>, _>>();
        let sequences = sequences.map_err(|e| to_python(py, e))?;
        let wanted: Vec<(usize, usize)> = sequences.into_iter().zip(rows).collect();
        let out = out.as_slice_mut()?;
        py.detach(|| self.inner.read_column(column, &wanted, length, out)).map_err(|e| to_python(py, e))
    }

    /// Decodes sequences, rows[b] of sequence b, into flat memory: ids and log_probs [N * k], log_rest [N], extra [N * E],
    /// lse [N], counts [N * k]. With a length N is B * length and the rest of each sequence is filled with missing rows;
    /// without one N is sum(rows). tokens, when given, holds an int32 array for each sequence.
    #[allow(clippy::too_many_arguments)]
    #[pyo3(signature = (keys, rows, length, ids, log_probs, log_rest, tokens=None, extra=None, lse=None, counts=None, threads=1))]
    fn read_many(
        &self,
        py: Python<'_>,
        keys: Vec<String>,
        rows: Vec<usize>,
        length: Option<usize>,
        mut ids: PyReadwriteArray1<'_, i32>,
        mut log_probs: PyReadwriteArray1<'_, f32>,
        mut log_rest: PyReadwriteArray1<'_, f32>,
        tokens: Option<Vec<PyReadonlyArray1<'_, i32>>>,
        mut extra: Option<PyReadwriteArray1<'_, f32>>,
        mut lse: Option<PyReadwriteArray1<'_, f32>>,
        mut counts: Option<PyReadwriteArray1<'_, i32>>,
        threads: usize,
    ) -> PyResult<()> {
        let mut wanted = Vec::with_capacity(keys.len());
        for (b, (key, rows)) in keys.iter().zip(&rows).enumerate() {
            let sequence = self.inner.require(key).map_err(|e| to_python(py, e))?;
            let tokens = match tokens.as_ref().and_then(|t| t.get(b)) {
                Some(array) => Some(array.as_slice()?),
                None => None,
            };
            wanted.push(Wanted { sequence, rows: *rows, tokens });
        }
        let out = RowsMut {
            ids: ids.as_slice_mut()?,
            log_probs: log_probs.as_slice_mut()?,
            log_rest: log_rest.as_slice_mut()?,
            extra: optional(&mut extra)?,
            lse: optional(&mut lse)?,
            draws: optional(&mut counts)?,
        };
        let read = || match length {
            Some(length) => self.inner.read_batch(&wanted, length, out, threads),
            None => self.inner.read_packed(&wanted, out, threads),
        };
        py.detach(read).map_err(|e| to_python(py, e))
    }
}

fn optional<'a, T: Element>(array: &'a mut Option<PyReadwriteArray1<'_, T>>) -> PyResult<&'a mut [T]> {
    match array {
        Some(array) => Ok(array.as_slice_mut()?),
        None => Ok(&mut []),
    }
}

fn as_json(value: &impl serde::Serialize) -> String {
    serde_json::to_string(value).unwrap_or_else(|e| format!("{{\"error\": \"{e}\"}}"))
}

/// xxh3-128 of tokens as little-endian int32, as in the index.
#[pyfunction]
pub fn token_hash(tokens: PyReadonlyArray1<'_, i32>) -> PyResult<u128> {
    Ok(potstill_core::bytes::token_hash(tokens.as_slice()?))
}

/// A report on the whole cache, as JSON; raises nothing for damage.
#[pyfunction]
#[pyo3(signature = (path, deep=true))]
pub fn verify(py: Python<'_>, path: PathBuf, deep: bool) -> String {
    py.detach(|| as_json(&tools::verify(&path, deep)))
}

/// Writes a new cache of the shards of others; what it holds, as JSON.
#[pyfunction]
pub fn merge(py: Python<'_>, sources: Vec<PathBuf>, path: PathBuf) -> PyResult<String> {
    let merged = py.detach(|| potstill_core::merge::merge(&sources, &path));
    merged.map(|m| as_json(&m)).map_err(|e| to_python(py, e))
}

/// A summary of the cache, as JSON.
#[pyfunction]
pub fn inspect(py: Python<'_>, path: PathBuf) -> PyResult<String> {
    py.detach(|| tools::inspect(&path)).map(|v| v.to_string()).map_err(|e| to_python(py, e))
}

/// Repairs a cache; what was salvaged and what is lost, as JSON.
#[pyfunction]
pub fn recover(py: Python<'_>, path: PathBuf) -> PyResult<String> {
    py.detach(|| potstill_core::recover::recover(&path)).map(|s| as_json(&s)).map_err(|e| to_python(py, e))
}
