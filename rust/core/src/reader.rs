//! The reader: an index in memory, positioned reads, decoding into caller memory. It holds no thread and no lock that a
//! forked child could find taken.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::codec::{Codec, Declared};
use crate::columns;
use crate::error::{Error, Part, Result};
use crate::files::{self, FileSource, Source};
use crate::format::block::{Block, KIND_ROWS};
use crate::format::name::shard_file;
use crate::handles::{with_scratch, Handles};
use crate::log::{shards_dir, State};
use crate::rows::RowsMut;
use crate::shard::{open_shard, Shard};
use crate::spec::Spec;

/// Where a sequence is: shard, position in it, first block.
#[derive(Debug, Clone, Copy)]
pub struct Place {
    pub shard: usize,
    pub sequence: usize,
    pub first_block: usize,
}

pub struct Reader {
    root: PathBuf,
    spec: Spec,
    pub shards: Vec<Arc<Shard>>,
    /// In commit order.
    pub places: Vec<Place>,
    index: HashMap<String, usize>,
    tokens: u64,
    mapped: bool,
    handles: Handles,
}

/// A sequence to decode and the tokens it must start with.
pub struct Wanted<'a> {
    pub sequence: usize,
    pub rows: usize,
    pub tokens: Option<&'a [i32]>,
}

impl Reader {
    pub fn open(root: &Path) -> Result<Reader> {
        Self::with(root, &[], false)
    }

    /// A reader that maps shards into memory instead of reading them: blocks are decoded where they lie.
    pub fn open_mapped(root: &Path) -> Result<Reader> {
        Self::with(root, &[], true)
    }

    /// The cache as it is now. Shards that this reader has open are not opened again.
    pub fn refreshed(&self) -> Result<Reader> {
        Self::with(&self.root, &self.shards, self.mapped)
    }

    fn with(root: &Path, known: &[Arc<Shard>], mapped: bool) -> Result<Reader> {
        let state = State::load(root)?.ok_or_else(|| Error::Folder {
            path: root.to_path_buf(),
            what: "there is no cache here (no manifest.json and no log)".into(),
        })?;
        if let Some(number) = state.gap(root)? {
            let what = format!("log record {number} is missing; run `potstill recover` on the folder");
            return Err(Error::Folder { path: root.to_path_buf(), what });
        }
        files::check_dir(&shards_dir(root))?;
        let mut reader = Reader {
            root: root.to_path_buf(),
            handles: Handles::new(state.spec.vocab_size, mapped),
            spec: state.spec,
            shards: Vec::with_capacity(state.shards.len()),
            places: Vec::new(),
            index: HashMap::new(),
            tokens: 0,
            mapped,
        };
        // a shard says which spec it was written for
        let known = known.iter().filter(|s| s.header.spec_hash == reader.spec.hash);
        let known: HashMap<&str, &Arc<Shard>> = known.map(|s| (s.name.as_str(), s)).collect();
        for entry in &state.shards {
            let shard = match known.get(entry.name.as_str()) {
                Some(shard) => Arc::clone(shard),
                None => Arc::new(open_shard(root, &entry.name, &reader.spec)?),
            };
            let said = (shard.bytes, shard.footer.sequences.len() as u64, shard.footer.tokens());
            if said != (entry.bytes, entry.sequences, entry.tokens) {
                let what = format!("bytes, sequences and tokens are {said:?}, the log says {entry:?}");
                return Err(Error::damaged(&shard_file(&entry.name), Part::Index, what));
            }
            reader.add_shard(shard)?;
        }
        Ok(reader)
    }

    fn add_shard(&mut self, shard: Arc<Shard>) -> Result<()> {
        let number = self.shards.len();
        let mut first_block = 0;
        for (sequence, s) in shard.footer.sequences.iter().enumerate() {
            let place = Place { shard: number, sequence, first_block };
            first_block += s.blocks as usize;
            if let Some(old) = self.index.get(&s.key) {
                let there = self.places[*old];
                let first = self.shards.get(there.shard).unwrap_or(&shard);
                if first.footer.sequences[there.sequence].content_hash != s.content_hash {
                    return Err(Error::Duplicate {
                        key: s.key.clone(),
                        here: format!("shard {}", shard.name),
                        there: format!("shard {}", first.name),
                    });
                }
                continue;
            }
            self.index.insert(s.key.clone(), self.places.len());
            self.places.push(place);
            self.tokens += u64::from(s.tokens);
        }
        self.shards.push(shard);
        Ok(())
    }

    pub fn root(&self) -> &Path {
        &self.root
    }

    pub fn spec(&self) -> &Spec {
        &self.spec
    }

    pub fn len(&self) -> usize {
        self.places.len()
    }

    pub fn is_empty(&self) -> bool {
        self.places.is_empty()
    }

    pub fn num_tokens(&self) -> u64 {
        self.tokens
    }

    pub fn num_bytes(&self) -> u64 {
        self.shards.iter().map(|s| s.bytes).sum()
    }

    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.places.iter().map(|p| self.shards[p.shard].footer.sequences[p.sequence].key.as_str())
    }

    pub fn find(&self, key: &str) -> Option<usize> {
        self.index.get(key).copied()
    }

    pub fn require(&self, key: &str) -> Result<usize> {
        self.find(key).ok_or_else(|| {
            let what = format!("no sequence {key:?} among the {} of {}", self.len(), self.root.display());
            Error::MissingKey(what)
        })
    }

    pub fn tokens_of(&self, sequence: usize) -> usize {
        self.entry(sequence).tokens as usize
    }

    pub fn token_hash(&self, sequence: usize) -> u128 {
        self.entry(sequence).token_hash
    }

    /// The shard that holds a sequence, and the bytes of it that reading the sequence needs: tables, and its blocks.
    pub fn ranges(&self, sequence: usize) -> (&str, [(u64, u64); 2]) {
        let place = self.places[sequence];
        let shard = &self.shards[place.shard];
        let blocks = shard.footer.sequences[place.sequence].blocks as usize;
        let tables = (shard.header.len as u64, shard.offsets[0]);
        (&shard.name, [tables, (shard.offsets[place.first_block], shard.offsets[place.first_block + blocks])])
    }

    pub fn content_hash(&self, sequence: usize) -> u128 {
        self.entry(sequence).content_hash
    }

    fn entry(&self, sequence: usize) -> &crate::format::footer::SequenceEntry {
        let place = self.places[sequence];
        &self.shards[place.shard].footer.sequences[place.sequence]
    }

    pub fn key(&self, sequence: usize) -> &str {
        &self.entry(sequence).key
    }

    fn source(&self, shard: usize) -> Result<Arc<FileSource>> {
        self.handles.files.get(shard, || {
            let path = shards_dir(&self.root).join(shard_file(&self.shards[shard].name));
            let source = files::open_regular(&path);
            let source = if self.mapped { source.and_then(FileSource::mapped) } else { source };
            source.map(Arc::new).map_err(Error::io("open", &path))
        })
    }

    fn codec(&self, shard: &Shard, source: &dyn Source) -> Result<Codec> {
        match &shard.header.codec {
            Declared::Plain(c) => Ok(Codec::Plain(c.clone())),
            Declared::Dense(params) => self.handles.codecs.get(params.tables_sum, || shard.codec(source)),
        }
    }

    // visits the row blocks that hold the first `rows` rows: f(block, first row, rows wanted of it)
    fn visit<F>(&self, sequence: usize, rows: usize, scratch: &mut Vec<u8>, mut f: F) -> Result<()>
    where
        F: FnMut(&Codec, &Block<'_>, usize, usize) -> std::result::Result<(), String>,
    {
        let place = self.places[sequence];
        let shard = &self.shards[place.shard];
        let entry = &shard.footer.sequences[place.sequence];
        if rows > entry.tokens as usize {
            let what = format!("{rows} rows of sequence {:?} are wanted, it has {}", entry.key, entry.tokens);
            return Err(Error::Refused(what));
        }
        let source = self.source(place.shard)?;
        let codec = self.codec(shard, source.as_ref())?;
        self.blocks(KIND_ROWS, place, source.as_ref(), rows, scratch, |block, first, n| f(&codec, block, first, n))
    }

    // visits the blocks of one kind that hold its first `rows` rows
    fn blocks<F>(
        &self,
        kind: u16,
        place: Place,
        source: &dyn Source,
        rows: usize,
        scratch: &mut Vec<u8>,
        mut f: F,
    ) -> Result<()>
    where
        F: FnMut(&Block<'_>, usize, usize) -> std::result::Result<(), String>,
    {
        let shard = &self.shards[place.shard];
        let entry = &shard.footer.sequences[place.sequence];
        let mut first = 0;
        for n in place.first_block..place.first_block + entry.blocks as usize {
            if first >= rows {
                break;
            }
            if shard.footer.blocks[n].kind != kind {
                continue;
            }
            let block = shard.block(source, n, scratch)?;
            let damaged = |what: String| Error::damaged(&shard_file(&shard.name), Part::Block(n as u32), what);
            if block.head.key != entry.key || block.head.first_row as usize != first {
                let (key, row) = (block.head.key, block.head.first_row);
                return Err(damaged(format!(
                    "it holds row {row} of {key:?} where row {first} of {:?} belongs",
                    entry.key
                )));
            }
            let wanted = (block.head.rows as usize).min(rows - first);
            f(&block, first, wanted).map_err(damaged)?;
            first += block.head.rows as usize;
        }
        Ok(())
    }

    /// The first `out.len()` tokens of a sequence, without decoding rows.
    pub fn read_tokens(&self, sequence: usize, out: &mut [i32]) -> Result<()> {
        let rows = out.len();
        with_scratch(|scratch| {
            self.visit(sequence, rows, scratch, |codec, block, first, n| {
                codec.decode_tokens(block.payload, block.head.shape(), &mut out[first..first + n])
            })
        })
    }

    /// Decodes tokens and rows of a whole sequence.
    pub fn read_sequence(&self, sequence: usize, tokens: &mut [i32], mut out: RowsMut<'_>) -> Result<()> {
        let rows = tokens.len();
        self.check_size(rows, &out)?;
        let k = self.spec.k as usize;
        with_scratch(|scratch| {
            self.visit(sequence, rows, scratch, |codec, block, first, n| {
                let tokens = &mut tokens[first..first + n];
                codec.decode(block.payload, block.head.shape(), out.part(k, first, first + n), Some(tokens))
            })
        })
    }

    /// Values of further column `number`: the first rows of each (sequence, rows) into `out`, row after row. With a length
    /// each takes the memory of so many rows, of which the rest is zero. A column of whole sequences has one row.
    pub fn read_column(
        &self,
        number: usize,
        wanted: &[(usize, usize)],
        length: Option<usize>,
        out: &mut [u8],
    ) -> Result<()> {
        let column = self.spec.columns.get(number);
        let column = column.ok_or_else(|| Error::Refused(format!("the spec has no column {number}")))?;
        let room = |rows: usize| length.map_or(rows, |n| column.rows(n));
        let (stride, total) = (column.stride(), wanted.iter().map(|w| room(w.1)).sum::<usize>());
        if out.len() != total * stride {
            let what = format!("{} bytes for {total} rows of {stride} bytes of column {:?}", out.len(), column.name);
            return Err(Error::Refused(what));
        }
        with_scratch(|scratch| {
            let mut rest = out;
            for (sequence, rows) in wanted {
                let (here, behind) = rest.split_at_mut(room(*rows) * stride);
                rest = behind;
                let most = column.rows(self.tokens_of(*sequence));
                if *rows > most || rows * stride > here.len() {
                    let key = self.key(*sequence);
                    let what = format!("{rows} rows of column {:?} of {key:?} are wanted, it has {most}", column.name);
                    return Err(Error::Refused(what));
                }
                let place = self.places[*sequence];
                let source = self.source(place.shard)?;
                here[rows * stride..].fill(0);
                self.blocks(columns::kind(number), place, source.as_ref(), *rows, scratch, |block, first, n| {
                    column.check(block.payload, block.head.rows as usize)?;
                    here[first * stride..(first + n) * stride].copy_from_slice(&block.payload[..n * stride]);
                    Ok(())
                })?;
            }
            Ok(())
        })
    }

    fn check_size(&self, rows: usize, out: &RowsMut<'_>) -> Result<()> {
        let k = self.spec.k as usize;
        let extra = self.spec.layout.map_or(0, |l| l.extra);
        let given = [out.ids.len(), out.log_probs.len(), out.log_rest.len()];
        let columns = [(out.extra.len(), extra), (out.lse.len(), 1), (out.draws.len(), k)];
        if given == [rows * k, rows * k, rows] && columns.iter().all(|(len, width)| [0, rows * width].contains(len)) {
            return Ok(());
        }
        Err(Error::Refused(format!(
            "the output holds {given:?} ids, log_probs and log_rest; {rows} rows of {k} entries are to be decoded",
        )))
    }

    /// Decodes the first `wanted.rows` rows into `out`, comparing `wanted.tokens` with the cached ones on the way.
    fn read(&self, wanted: &Wanted<'_>, mut out: RowsMut<'_>, scratch: &mut Vec<u8>) -> Result<()> {
        let (rows, k) = (wanted.rows, self.spec.k as usize);
        let mut cached = Vec::new();
        let mut differs = None;
        if let Some(given) = wanted.tokens {
            let (have, want) = (self.tokens_of(wanted.sequence), given.len());
            if want != rows && want <= have {
                return Err(Error::Refused(format!("{want} tokens are given for {rows} rows")));
            }
        }
        self.visit(wanted.sequence, rows, scratch, |codec, block, first, n| {
            let out = out.part(k, first, first + n);
            let Some(given) = wanted.tokens else {
                return codec.decode(block.payload, block.head.shape(), out, None);
            };
            cached.resize(n, 0);
            codec.decode(block.payload, block.head.shape(), out, Some(&mut cached))?;
            let at = cached.iter().zip(&given[first..]).position(|(a, b)| a != b);
            if let (None, Some(i)) = (differs, at) {
                differs = Some((first + i, cached[i]));
            }
            Ok(())
        })?;
        let Some(given) = wanted.tokens else { return Ok(()) };
        let mismatch = |position: usize, given: String, cached: String| {
            Err(Error::TokenMismatch { key: self.key(wanted.sequence).to_string(), position, given, cached })
        };
        if let Some((i, cached)) = differs {
            return mismatch(i, given[i].to_string(), cached.to_string());
        }
        match given.get(rows) {
            Some(extra) => mismatch(rows, extra.to_string(), format!("absent (it has {rows} tokens)")),
            None => Ok(()),
        }
    }

    /// Decodes B sequences into [B, length, k] buffers and fills the rest of each with missing rows.
    pub fn read_batch(&self, wanted: &[Wanted<'_>], length: usize, out: RowsMut<'_>, threads: usize) -> Result<()> {
        if let Some((b, w)) = wanted.iter().enumerate().find(|(_, w)| w.rows > length) {
            return Err(Error::Refused(format!("sequence {b} has {} rows, the output holds {length}", w.rows)));
        }
        self.check_size(wanted.len() * length, &out)?;
        self.spread(wanted, &vec![length; wanted.len()], out, threads)
    }

    /// Decodes sequences one behind the other into [rows of all, k] buffers.
    pub fn read_packed(&self, wanted: &[Wanted<'_>], out: RowsMut<'_>, threads: usize) -> Result<()> {
        let lengths: Vec<usize> = wanted.iter().map(|w| w.rows).collect();
        self.check_size(lengths.iter().sum(), &out)?;
        self.spread(wanted, &lengths, out, threads)
    }

    // halves the work until each thread has its share; threads end with the call, so a fork never meets one
    fn spread(&self, wanted: &[Wanted<'_>], lengths: &[usize], out: RowsMut<'_>, threads: usize) -> Result<()> {
        if threads < 2 || wanted.len() < 2 {
            return self.read_each(wanted, lengths, out);
        }
        let total: usize = lengths.iter().sum();
        let (mut at, mut rows) = (0, 0);
        while at + 1 < wanted.len() && (at == 0 || rows + lengths[at] / 2 < total / 2) {
            rows += lengths[at];
            at += 1;
        }
        let (first, second) = out.split(self.spec.k as usize, rows);
        std::thread::scope(|scope| {
            let other = scope.spawn(|| self.spread(&wanted[at..], &lengths[at..], second, threads / 2));
            let here = self.spread(&wanted[..at], &lengths[..at], first, threads - threads / 2);
            let there = other.join().unwrap_or_else(|_| Err(Error::Stopped("a decoding thread died".into())));
            here.and(there)
        })
    }

    fn read_each(&self, wanted: &[Wanted<'_>], lengths: &[usize], mut out: RowsMut<'_>) -> Result<()> {
        let k = self.spec.k as usize;
        with_scratch(|scratch| {
            let mut start = 0;
            for (w, length) in wanted.iter().zip(lengths) {
                let (split, end) = (start + w.rows, start + length);
                self.read(w, out.part(k, start, split), scratch)?;
                let padding = out.part(k, split, end);
                start = end;
                padding.ids.fill(-1);
                padding.log_probs.fill(f32::NEG_INFINITY);
                padding.log_rest.fill(0.0);
                padding.extra.fill(0.0);
                padding.lse.fill(0.0);
                padding.draws.fill(0);
            }
            Ok(())
        })
    }
}
