//! The reader as a Python class, and the tools.

use std::path::PathBuf;

use numpy::{PyReadonlyArray1, PyReadwriteArray1, PyReadwriteArray2};
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
    fn new(py: Python<'_>, path: PathBuf) -> PyResult<Self> {
        Ok(Cache { inner: py.detach(|| Reader::open(&path)).map_err(|e| to_python(py, e))? })
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

    /// Decodes the first len(out) tokens.
    fn read_tokens(&self, py: Python<'_>, key: &str, mut out: PyReadwriteArray1<'_, i32>) -> PyResult<()> {
        let out = out.as_slice_mut()?;
        let read = || self.inner.read_tokens(self.inner.require(key)?, out);
        py.detach(read).map_err(|e| to_python(py, e))
    }

    /// Decodes a whole sequence into tokens [L], ids [L, k], log_probs [L, k] and log_rest [L].
    fn read(
        &self,
        py: Python<'_>,
        key: &str,
        mut tokens: PyReadwriteArray1<'_, i32>,
        mut ids: PyReadwriteArray2<'_, i32>,
        mut log_probs: PyReadwriteArray2<'_, f32>,
        mut log_rest: PyReadwriteArray1<'_, f32>,
    ) -> PyResult<()> {
        let tokens = tokens.as_slice_mut()?;
        let out = RowsMut {
            ids: ids.as_slice_mut()?,
            log_probs: log_probs.as_slice_mut()?,
            log_rest: log_rest.as_slice_mut()?,
        };
        py.detach(|| self.inner.read_sequence(self.inner.require(key)?, tokens, out)).map_err(|e| to_python(py, e))
    }

    /// Decodes B sequences into flat [B * length * k] and [B * length] memory; rows[b] of sequence b, the rest is filled
    /// with missing rows. tokens, when given, holds an int32 array for each sequence.
    #[allow(clippy::too_many_arguments)]
    fn read_batch(
        &self,
        py: Python<'_>,
        keys: Vec<String>,
        rows: Vec<usize>,
        length: usize,
        mut ids: PyReadwriteArray1<'_, i32>,
        mut log_probs: PyReadwriteArray1<'_, f32>,
        mut log_rest: PyReadwriteArray1<'_, f32>,
        tokens: Option<Vec<PyReadonlyArray1<'_, i32>>>,
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
        };
        py.detach(|| self.inner.read_batch(&wanted, length, out)).map_err(|e| to_python(py, e))
    }
}

fn as_json(value: &impl serde::Serialize) -> String {
    serde_json::to_string(value).unwrap_or_else(|e| format!("{{\"error\": \"{e}\"}}"))
}

/// A report on the whole cache, as JSON; raises nothing for damage.
#[pyfunction]
pub fn verify(py: Python<'_>, path: PathBuf) -> String {
    py.detach(|| as_json(&tools::verify(&path)))
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
