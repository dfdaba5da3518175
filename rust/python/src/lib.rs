//! PyO3 bindings of potstill-core: argument conversion, errors, and the GIL released around all work.

mod cache;
mod errors;
mod ids;
mod writer;
mod xtok;

use pyo3::prelude::*;

#[pymodule]
mod _rust {
    #[pymodule_export]
    use super::cache::{inspect, merge, recover, token_hash, verify, Cache};
    #[pymodule_export]
    use super::errors::{CacheError, TokenMismatch};
    #[pymodule_export]
    use super::ids::flat_ids;
    #[pymodule_export]
    use super::writer::Writer;
    #[pymodule_export]
    use super::xtok::{Aligner, Push, Vocab};
    use super::*;

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        module.add("__version__", env!("CARGO_PKG_VERSION"))?;
        module.add("FORMAT_VERSION", (potstill_core::format::MAJOR, potstill_core::format::MINOR))
    }
}
