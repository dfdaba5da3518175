//! Core errors as Python exceptions.

use potstill_core::Error;
use pyo3::create_exception;
use pyo3::exceptions::{PyKeyError, PyOSError, PyRuntimeError, PyValueError};
use pyo3::prelude::*;

create_exception!(
    potstill._rust,
    CacheError,
    PyValueError,
    "A cache folder is damaged, hostile, of another spec or of a newer version."
);
create_exception!(
    potstill._rust,
    TokenMismatch,
    PyValueError,
    "Tokens differ from the cached ones: attributes key and position."
);

pub fn to_python(py: Python<'_>, error: Error) -> PyErr {
    let text = error.to_string();
    match error {
        Error::Io { source, path, .. } => match source.raw_os_error() {
            Some(code) => PyOSError::new_err((code, text, path.display().to_string())),
            None => PyOSError::new_err(text),
        },
        Error::Damaged { .. } | Error::Unsupported { .. } | Error::Folder { .. } | Error::SpecMismatch { .. } => {
            CacheError::new_err(text)
        }
        Error::MissingKey(_) => PyKeyError::new_err(text),
        Error::TokenMismatch { key, position, .. } => {
            let mismatch = TokenMismatch::new_err(text);
            let value = mismatch.value(py);
            let set = value.setattr("key", key).and_then(|()| value.setattr("position", position));
            set.err().unwrap_or(mismatch)
        }
        Error::Stopped(_) => PyRuntimeError::new_err(text),
        Error::Refused(_) | Error::BadRow { .. } | Error::Duplicate { .. } => PyValueError::new_err(text),
    }
}
