//! Vocabularies and the aligner as Python classes.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock, Weak};

use numpy::{PyArray1, PyReadonlyArray1, PyReadwriteArray1};
use potstill_core::xtok::push::Push as CorePush;
use potstill_core::xtok::vocab::{flag, load, Builder, Kind, Prefix, Rules};
use potstill_core::xtok::{json, matching, ranks, spm, Vocab as CoreVocab};
use potstill_core::xtok::{Aligned, Aligner as Core, Granularity, OnMismatch, Row};
use potstill_core::{Error, Result};
use pyo3::exceptions::{PyIndexError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::errors::to_python;

/// Vocabularies that are alive, by the hash of what they were built from.
type Known = Mutex<HashMap<(u128, u8), Weak<CoreVocab>>>;

fn known() -> &'static Known {
    static KNOWN: OnceLock<Known> = OnceLock::new();
    KNOWN.get_or_init(Mutex::default)
}

fn cached(content: &[u8], form: u8, build: impl FnOnce() -> Result<CoreVocab>) -> Result<Arc<CoreVocab>> {
    let key = (potstill_core::bytes::content_hash(content), form);
    if let Ok(known) = known().lock() {
        if let Some(vocab) = known.get(&key).and_then(Weak::upgrade) {
            return Ok(vocab);
        }
    }
    let vocab = Arc::new(build()?);
    if let Ok(mut known) = known().lock() {
        known.retain(|_, vocab| vocab.strong_count() > 0);
        known.insert(key, Arc::downgrade(&vocab));
    }
    Ok(vocab)
}

/// The bytes of a tokenizer's ids.
#[pyclass(frozen, module = "potstill._rust")]
pub struct Vocab {
    inner: Arc<CoreVocab>,
}

type Specials = Vec<(String, u32)>;

#[pymethods]
impl Vocab {
    /// form: "json", "spm", "tekken", "tiktoken", or "vocab" for `to_bytes`.
    #[staticmethod]
    #[pyo3(signature = (content, form, specials=Vec::new()))]
    fn parse(py: Python<'_>, content: &[u8], form: &str, specials: Specials) -> PyResult<Vocab> {
        let build = || match form {
            "json" => cached(content, 0, || json::from_json(content)),
            "spm" => cached(content, 1, || spm::from_model(content)),
            "tekken" => cached(content, 2, || ranks::from_tekken(content)),
            "vocab" => cached(content, 3, || CoreVocab::from_bytes(content)),
            "tiktoken" => ranks::from_tiktoken(content, &specials).map(Arc::new),
            other => Err(Error::Refused(format!("unknown form {other:?}"))),
        };
        Ok(Vocab { inner: py.detach(build).map_err(|e| to_python(py, e))? })
    }

    /// Mergeable ranks: {bytes: id}.
    #[staticmethod]
    fn from_ranks(py: Python<'_>, ranks: HashMap<Vec<u8>, u32>, specials: Specials) -> PyResult<Vocab> {
        let pairs = ranks.iter().map(|(bytes, id)| (bytes.as_slice(), *id));
        let built = ranks::from_pairs(pairs, &specials);
        Ok(Vocab { inner: Arc::new(built.map_err(|e| to_python(py, e))?) })
    }

    /// Bytes of ids 0, 1, ...; None for ids whose bytes are not known. prefix: "never", "first" or "every".
    #[staticmethod]
    fn from_given(
        py: Python<'_>,
        tokens: Vec<Option<Vec<u8>>>,
        specials: Vec<u32>,
        unknown: Option<u32>,
        prefix: &str,
    ) -> PyResult<Vocab> {
        let mut rules = Rules::new(Kind::Given);
        rules.prefix = prefix_of(prefix)?;
        let build = move || -> Result<CoreVocab> {
            let mut builder = Builder::with_capacity(tokens.len());
            for (id, token) in tokens.iter().enumerate() {
                if let Some(token) = token {
                    builder.set(id as u64, 0, |out| out.extend_from_slice(token))?;
                }
            }
            specials.iter().for_each(|id| builder.add_flags(u64::from(*id), flag::SPECIAL));
            unknown.iter().for_each(|id| builder.add_flags(u64::from(*id), flag::UNKNOWN));
            Ok(builder.finish(rules, tokens.len()))
        };
        Ok(Vocab { inner: Arc::new(build().map_err(|e| to_python(py, e))?) })
    }

    /// The same vocabulary with other roles, more special tokens (id, name), another prefix or at least `size` ids.
    #[pyo3(signature = (roles=None, specials=Vec::new(), prefix=None, size=0))]
    fn with_rules(
        &self,
        py: Python<'_>,
        roles: Option<Specials>,
        specials: Vec<(u32, String)>,
        prefix: Option<&str>,
        size: usize,
    ) -> PyResult<Vocab> {
        let mut rules = self.inner.rules.clone();
        for (role, id) in roles.unwrap_or_default() {
            rules.roles.retain(|(known, _)| *known != role);
            rules.roles.push((role, id));
        }
        if let Some(prefix) = prefix {
            rules.prefix = prefix_of(prefix)?;
        }
        let rebuild = || -> Result<CoreVocab> {
            let mut builder = Builder::with_capacity(self.inner.len());
            for (id, flags) in self.inner.flags.iter().enumerate() {
                builder.set(id as u64, *flags, |out| self.inner.bytes(id, out))?;
            }
            for (id, name) in &specials {
                builder.set(u64::from(*id), flag::SPECIAL, |out| out.extend(name.bytes()))?;
            }
            Ok(builder.finish(rules, size))
        };
        Ok(Vocab { inner: Arc::new(py.detach(rebuild).map_err(|e| to_python(py, e))?) })
    }

    fn __len__(&self) -> usize {
        self.inner.len()
    }

    /// The bytes of an id; of a special token those of its name.
    fn token<'py>(&self, py: Python<'py>, id: usize) -> PyResult<Bound<'py, PyBytes>> {
        if id >= self.inner.len() {
            return Err(PyIndexError::new_err(format!("token id {id} is outside 0..{}", self.inner.len())));
        }
        let mut out = Vec::new();
        self.inner.bytes(id, &mut out);
        Ok(PyBytes::new(py, &out))
    }

    /// Flags of every id, uint8.
    fn flags<'py>(&self, py: Python<'py>) -> Bound<'py, PyArray1<u8>> {
        PyArray1::from_slice(py, &self.inner.flags)
    }

    /// Bytes of every id, int32: their number.
    fn lengths<'py>(&self, py: Python<'py>) -> Bound<'py, PyArray1<i32>> {
        let lengths: Vec<i32> = self.inner.words.iter().map(|w| i32::from(*w as u16)).collect();
        PyArray1::from_vec(py, lengths)
    }

    /// The first byte of every id, uint8; 0 where there is none.
    fn first_bytes<'py>(&self, py: Python<'py>) -> Bound<'py, PyArray1<u8>> {
        let vocab = &self.inner;
        PyArray1::from_vec(py, vocab.words.iter().map(|w| load(*w, &vocab.long, 0) as u8).collect())
    }

    /// Kind, prefix, steps of normalisation and roles, as JSON.
    fn rules(&self) -> String {
        serde_json::to_string(&self.inner.rules).unwrap_or_default()
    }

    fn is_lossy(&self) -> bool {
        self.inner.is_lossy()
    }

    fn hash(&self) -> u128 {
        self.inner.hash()
    }

    fn to_bytes<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &self.inner.to_bytes())
    }

    /// Ids of both sides with the same bytes.
    fn matched<'py>(&self, py: Python<'py>, other: &Vocab) -> (Bound<'py, PyArray1<i32>>, Bound<'py, PyArray1<i32>>) {
        let pairs = py.detach(|| matching::matched(&self.inner, &other.inner));
        let column = |of: &dyn Fn(&(u32, u32)) -> u32| {
            PyArray1::from_vec(py, pairs.iter().map(|pair| of(pair) as i32).collect())
        };
        (column(&|pair| pair.0), column(&|pair| pair.1))
    }

    /// CSR of the other's tokens for each own one: row_ptr int64, columns int32, weights float32.
    #[allow(clippy::type_complexity)]
    fn projection<'py>(
        &self,
        py: Python<'py>,
        other: &Vocab,
        k: usize,
        decay: f32,
    ) -> (Bound<'py, PyArray1<i64>>, Bound<'py, PyArray1<i32>>, Bound<'py, PyArray1<f32>>) {
        let made = py.detach(|| matching::projection(&self.inner, &other.inner, k, decay));
        let (row_ptr, columns) = (PyArray1::from_vec(py, made.row_ptr), PyArray1::from_vec(py, made.columns));
        (row_ptr, columns, PyArray1::from_vec(py, made.weights))
    }
}

fn prefix_of(name: &str) -> PyResult<Prefix> {
    match name {
        "never" => Ok(Prefix::Never),
        "first" => Ok(Prefix::First),
        "every" => Ok(Prefix::Every),
        other => Err(PyValueError::new_err(format!("prefix={other:?} is none of 'never', 'first', 'every'"))),
    }
}

#[pyclass(frozen, module = "potstill._rust")]
pub struct Aligner {
    inner: Arc<Core>,
}

type Arrays<'py> = (
    Bound<'py, PyArray1<i32>>,
    Bound<'py, PyArray1<u8>>,
    Bound<'py, PyArray1<i32>>,
    Bound<'py, PyArray1<i64>>,
    Bound<'py, PyArray1<u8>>,
    Bound<'py, PyArray1<i32>>,
);

#[pymethods]
impl Aligner {
    /// granularity: "byte", "char", "word" or "min_bytes", the last with `min_bytes`.
    #[new]
    fn new(
        py: Python<'_>,
        student: &Vocab,
        teacher: &Vocab,
        pairs: Vec<(u32, u32)>,
        granularity: &str,
        min_bytes: usize,
        on_mismatch: &str,
    ) -> PyResult<Aligner> {
        let granularity = match granularity {
            "byte" => Granularity::Byte,
            "char" => Granularity::Char,
            "word" => Granularity::Word,
            "min_bytes" => Granularity::MinBytes(min_bytes),
            other => {
                let what = format!("granularity={other:?} is none of 'byte', 'char', 'word' or a number of bytes");
                return Err(PyValueError::new_err(what));
            }
        };
        let on_mismatch = match on_mismatch {
            "resync" => OnMismatch::Resync,
            "error" => OnMismatch::Error,
            "drop" => OnMismatch::Drop,
            other => {
                let what = format!("on_mismatch={other:?} is none of 'resync', 'error', 'drop'");
                return Err(PyValueError::new_err(what));
            }
        };
        let (student, teacher) = (Arc::clone(&student.inner), Arc::clone(&teacher.inner));
        let made = Core::new(student, teacher, &pairs, granularity, on_mismatch);
        Ok(Aligner { inner: Arc::new(made.map_err(|e| to_python(py, e))?) })
    }

    fn needs_text(&self) -> bool {
        self.inner.needs_text()
    }

    /// Rows of ids, flat and cut by ptr [R+1] or each an array; segments [S*4] of the rows, cut by segment_ptr [R+1], and the text of each, if
    /// given. Fills the maps and returns spans [C*4], flags [C], bytes [C], row_ptr [R+1], row flags [R], mismatches [R].
    #[allow(clippy::too_many_arguments)]
    fn align<'py>(
        &self,
        py: Python<'py>,
        student: Side<'_>,
        student_ptr: PyReadonlyArray1<'_, i64>,
        teacher: Side<'_>,
        teacher_ptr: PyReadonlyArray1<'_, i64>,
        segments: PyReadonlyArray1<'_, i64>,
        segment_ptr: PyReadonlyArray1<'_, i64>,
        texts: Option<Vec<String>>,
        mut student_chunk: PyReadwriteArray1<'_, i32>,
        mut teacher_chunk: PyReadwriteArray1<'_, i32>,
        threads: usize,
    ) -> PyResult<Arrays<'py>> {
        let (s_ptr, t_ptr) = (student_ptr.as_slice()?, teacher_ptr.as_slice()?);
        let sides = student.rows(s_ptr)?.zip(teacher.rows(t_ptr)?);
        let (segments, ptr) = (segments.as_slice()?.as_chunks::<4>().0, segment_ptr.as_slice()?);
        let maps = (student_chunk.as_slice_mut()?, teacher_chunk.as_slice_mut()?);
        let rows = sides.and_then(|(student, teacher)| rows(&student, &teacher, segments, ptr, texts.as_deref()));
        let tokens = |side: fn(&Row<'_>) -> usize| rows.iter().flatten().map(side).sum::<usize>();
        let fits = maps.0.len() == tokens(|r| r.student.len()) && maps.1.len() == tokens(|r| r.teacher.len());
        let rows = rows.filter(|_| fits);
        let rows = rows.ok_or_else(|| PyValueError::new_err("rows, segments and maps do not fit together"))?;
        let inner = &self.inner;
        let found = py.detach(|| inner.align(&rows, maps, threads)).map_err(|e| to_python(py, e))?;
        let row_ptr = row_ptr(&found);
        Ok((
            PyArray1::from_vec(py, found.spans.into_flattened()),
            PyArray1::from_vec(py, found.flags),
            PyArray1::from_vec(py, found.bytes),
            PyArray1::from_vec(py, row_ptr),
            PyArray1::from_vec(py, found.row_flags),
            PyArray1::from_vec(py, found.mismatches),
        ))
    }

    /// A row that grows.
    fn push(&self, py: Python<'_>) -> PyResult<Push> {
        let inner = CorePush::new(&self.inner).map_err(|e| to_python(py, e))?;
        Ok(Push { aligner: Arc::clone(&self.inner), inner: Mutex::new(inner) })
    }
}

/// Ids of one side's rows.
#[derive(FromPyObject)]
enum Side<'py> {
    Flat(PyReadonlyArray1<'py, i32>),
    Rows(Vec<PyReadonlyArray1<'py, i32>>),
}

impl Side<'_> {
    /// The ids of each row; None where ptr does not cut them so.
    fn rows(&self, ptr: &[i64]) -> PyResult<Option<Vec<&[i32]>>> {
        let lengths = || ptr.windows(2).map(|w| usize::try_from(w[1].checked_sub(w[0])?).ok());
        Ok(match self {
            Side::Flat(ids) => {
                let mut rest = ids.as_slice()?;
                let mut cut = || {
                    lengths()
                        .map(|length| {
                            let (row, behind) = rest.split_at_checked(length?)?;
                            rest = behind;
                            Some(row)
                        })
                        .collect()
                };
                let rows: Option<Vec<&[i32]>> = cut();
                rows.filter(|_| rest.is_empty() && ptr.first() == Some(&0))
            }
            Side::Rows(rows) => {
                let rows = rows.iter().map(|row| Ok(row.as_slice()?)).collect::<PyResult<Vec<_>>>()?;
                let fits = lengths().eq(rows.iter().map(|row| Some(row.len())));
                Some(rows).filter(|_| fits)
            }
        })
    }
}

fn rows<'a>(
    student: &[&'a [i32]],
    teacher: &[&'a [i32]],
    segments: &'a [[i64; 4]],
    ptr: &[i64],
    texts: Option<&'a [String]>,
) -> Option<Vec<Row<'a>>> {
    if teacher.len() != student.len()
        || ptr.len() != student.len() + 1
        || texts.is_some_and(|t| t.len() != segments.len())
    {
        return None;
    }
    let cut = |from: i64, to: i64| Some(usize::try_from(from).ok()?..usize::try_from(to).ok()?);
    let sides = student.iter().zip(teacher);
    sides
        .zip(ptr.windows(2))
        .map(|((student, teacher), own)| {
            let own = cut(own[0], own[1])?;
            let segments = segments.get(own.clone())?;
            let texts = texts.and_then(|t| t.get(own));
            let (mut s, mut t) = (0, 0);
            for [s0, s1, t0, t1] in segments {
                if *s0 < s || s1 < s0 || *t0 < t || t1 < t0 {
                    return None;
                }
                (s, t) = (*s1, *t1);
            }
            let fits = s <= student.len() as i64 && t <= teacher.len() as i64;
            fits.then_some(Row { student, teacher, segments, texts })
        })
        .collect()
}

/// First chunk of each row, and their number.
fn row_ptr(found: &Aligned) -> Vec<i64> {
    let mut out = vec![0i64];
    for count in &found.counts {
        out.push(out.last().copied().unwrap_or(0) + *count as i64);
    }
    out
}

fn arrays<'py>(py: Python<'py>, found: &Aligned, from: usize) -> Arrays<'py> {
    (
        PyArray1::from_slice(py, found.spans[from..].as_flattened()),
        PyArray1::from_slice(py, &found.flags[from..]),
        PyArray1::from_slice(py, &found.bytes[from..]),
        PyArray1::from_vec(py, row_ptr(found)),
        PyArray1::from_slice(py, &found.row_flags),
        PyArray1::from_slice(py, &found.mismatches),
    )
}

#[pyclass(frozen, module = "potstill._rust")]
pub struct Push {
    aligner: Arc<Core>,
    inner: Mutex<CorePush>,
}

type Maps<'py> = (Bound<'py, PyArray1<i32>>, Bound<'py, PyArray1<i32>>);

#[pymethods]
impl Push {
    /// Takes more ids; the new chunks as of `Aligner.align`.
    fn push<'py>(
        &self,
        py: Python<'py>,
        student: PyReadonlyArray1<'_, i32>,
        teacher: PyReadonlyArray1<'_, i32>,
        ended: bool,
    ) -> PyResult<Arrays<'py>> {
        let mut inner = self.inner.lock().map_err(|_| PyValueError::new_err("an earlier push failed"))?;
        let new = inner.push(&self.aligner, student.as_slice()?, teacher.as_slice()?, ended);
        let from = new.map_err(|e| to_python(py, e))?;
        Ok(arrays(py, inner.out(), from))
    }

    /// Chunk of every token so far; mismatches; truncated sides.
    fn state<'py>(&self, py: Python<'py>) -> PyResult<(Maps<'py>, u32, (bool, bool))> {
        let inner = self.inner.lock().map_err(|_| PyValueError::new_err("an earlier push failed"))?;
        let (s, t) = inner.maps();
        Ok(((PyArray1::from_slice(py, s), PyArray1::from_slice(py, t)), inner.mismatches(), inner.truncated()))
    }
}
