//! `Aligner`: rows of ids of two vocabularies to chunks, over threads.

use std::collections::HashMap;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::xtok::lossy::{Groups, Normalised};
use crate::xtok::resync::Scratch;
use crate::xtok::stream::{Ids, Stream};
use crate::xtok::vocab::{flag, kind, word_kind, Prefix, Vocab};
pub use crate::xtok::walk::Granularity;
use crate::xtok::walk::{chunk, Chunk, Options, Walk};

/// Flags of a row.
pub mod row {
    pub const MISMATCHED: u8 = 1;
    pub const STUDENT_TRUNCATED: u8 = 2;
    pub const TEACHER_TRUNCATED: u8 = 4;
    pub const DROPPED: u8 = 8;
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnMismatch {
    /// Mark the chunk invalid and go on where the sides agree again.
    Resync,
    Error,
    /// The row has no chunks.
    Drop,
}

/// A row: its ids on both sides and the stretches [s0, s1, t0, t1] of them that belong together.
pub struct Row<'a> {
    pub student: &'a [i32],
    pub teacher: &'a [i32],
    pub segments: &'a [[i64; 4]],
    pub text: Option<&'a str>,
}

/// Chunks of rows, one after another.
#[derive(Debug, Default, Clone, PartialEq)]
pub struct Aligned {
    /// Student tokens and teacher tokens of a chunk, half open, counted from the row's beginning.
    pub spans: Vec<[i32; 4]>,
    pub flags: Vec<u8>,
    /// Bytes of text.
    pub bytes: Vec<i32>,
    /// Chunks of each row.
    pub counts: Vec<usize>,
    pub row_flags: Vec<u8>,
    pub mismatches: Vec<i32>,
}

impl Aligned {
    fn append(&mut self, mut other: Aligned) {
        self.spans.append(&mut other.spans);
        self.flags.append(&mut other.flags);
        self.bytes.append(&mut other.bytes);
        self.counts.append(&mut other.counts);
        self.row_flags.append(&mut other.row_flags);
        self.mismatches.append(&mut other.mismatches);
    }
}

pub struct Aligner {
    pub student: Arc<Vocab>,
    pub teacher: Arc<Vocab>,
    roles: (Vec<u16>, Vec<u16>),
    pub granularity: Granularity,
    pub on_mismatch: OnMismatch,
}

/// Buffers of one thread.
#[derive(Default)]
pub struct Buffers {
    scratch: Scratch,
    normal: Normalised,
    groups: (Groups, Groups),
}

impl Aligner {
    /// `pairs`: special tokens (student id, teacher id) that belong together beyond those of the same role or name.
    pub fn new(
        student: Arc<Vocab>,
        teacher: Arc<Vocab>,
        pairs: &[(u32, u32)],
        granularity: Granularity,
        on_mismatch: OnMismatch,
    ) -> Result<Aligner> {
        for (what, vocab, ids) in [
            ("student", &student, pairs.iter().map(|p| p.0).collect::<Vec<_>>()),
            ("teacher", &teacher, pairs.iter().map(|p| p.1).collect()),
        ] {
            if let Some(id) =
                ids.iter().find(|id| vocab.flags.get(**id as usize).is_none_or(|f| f & flag::SPECIAL == 0))
            {
                return Err(Error::Refused(format!("pairs name {what} token {id}, which is not a special token")));
            }
        }
        let roles = pair_roles(&student, &teacher, pairs);
        Ok(Aligner { student, teacher, roles, granularity, on_mismatch })
    }

    /// The streams of ids that are checked to be inside their vocabularies.
    pub fn ids<'a>(&'a self, student: &'a [i32], teacher: &'a [i32]) -> (Ids<'a>, Ids<'a>) {
        fn of<'a>(ids: &'a [i32], vocab: &'a Vocab, roles: &'a [u16]) -> Ids<'a> {
            Ids { ids, words: &vocab.words, long: &vocab.long, roles }
        }
        (of(student, &self.student, &self.roles.0), of(teacher, &self.teacher, &self.roles.1))
    }

    pub fn options(&self) -> Options {
        Options { granularity: self.granularity, prefix: (self.student.rules.prefix, self.teacher.rules.prefix) }
    }

    /// Whether ids alone do: some side keeps all bytes, or both change them in the same way.
    pub fn needs_text(&self) -> bool {
        let loss = |v: &Vocab| {
            let steps = v.rules.normal.iter().map(|s| s.loss()).max().unwrap_or(0);
            if v.rules.drops_space {
                5
            } else {
                steps
            }
        };
        let (s, t) = (loss(&self.student), loss(&self.teacher));
        s.min(t) >= 3 && !self.same_rules()
    }

    fn same_rules(&self) -> bool {
        let (s, t) = (&self.student.rules, &self.teacher.rules);
        s.normal == t.normal && s.drops_space == t.drops_space
    }

    fn student_stands_for_text(&self) -> bool {
        let loss = |v: &Vocab| (v.rules.drops_space, v.rules.normal.iter().map(|s| s.loss()).max().unwrap_or(0));
        loss(&self.student) <= loss(&self.teacher)
    }

    /// Aligns rows; the chunk of every token goes to the maps (as long as all rows' ids together, -1 beforehand).
    pub fn align(&self, rows: &[Row<'_>], maps: (&mut [i32], &mut [i32]), threads: usize) -> Result<Aligned> {
        let tokens = |row: &Row<'_>| row.student.len() + row.teacher.len();
        let total: usize = rows.iter().map(tokens).sum();
        let threads = threads.min(rows.len()).min(total / 16_384 + 1).max(1);
        if threads == 1 {
            return self.align_block(rows, 0, maps);
        }
        let mut blocks = Vec::new();
        let (mut rest, mut maps_rest, mut first) = (rows, maps, 0);
        let mut left = total;
        for n in 0..threads {
            let mut take = 0;
            let mut have = 0;
            while take < rest.len() && (n + 1 == threads || have < left / (threads - n)) {
                have += tokens(&rest[take]);
                take += 1;
            }
            left -= have;
            let (block, others) = rest.split_at(take);
            let lens = block.iter().fold((0, 0), |sum, r| (sum.0 + r.student.len(), sum.1 + r.teacher.len()));
            let (a, a_rest) = maps_rest.0.split_at_mut(lens.0);
            let (b, b_rest) = maps_rest.1.split_at_mut(lens.1);
            blocks.push((block, first, (a, b)));
            first += take;
            (rest, maps_rest) = (others, (a_rest, b_rest));
        }
        let done: Vec<Result<Aligned>> = std::thread::scope(|scope| {
            let work: Vec<_> = blocks
                .iter_mut()
                .map(|(block, first, maps)| {
                    let (block, first) = (*block, *first);
                    let maps = (&mut *maps.0, &mut *maps.1);
                    scope.spawn(move || self.align_block(block, first, maps))
                })
                .collect();
            let stopped = || Err(Error::Stopped("an alignment thread stopped".into()));
            work.into_iter().map(|thread| thread.join().unwrap_or_else(|_| stopped())).collect()
        });
        let mut all = Aligned::default();
        for (part, (_, _, maps)) in done.into_iter().zip(blocks) {
            let base = all.spans.len() as i32;
            if base > 0 {
                maps.0.iter_mut().chain(maps.1.iter_mut()).filter(|c| **c >= 0).for_each(|c| *c += base);
            }
            all.append(part?);
        }
        Ok(all)
    }

    fn align_block(&self, rows: &[Row<'_>], first: usize, maps: (&mut [i32], &mut [i32])) -> Result<Aligned> {
        let mut out = Aligned::default();
        let expected = rows.iter().map(|r| r.student.len().min(r.teacher.len())).sum::<usize>();
        out.spans.reserve(expected);
        out.flags.reserve(expected);
        out.bytes.reserve(expected);
        let mut buffers = Buffers::default();
        let (mut a_rest, mut b_rest) = maps;
        for (n, row) in rows.iter().enumerate() {
            let (a, b);
            (a, a_rest) = a_rest.split_at_mut(row.student.len());
            (b, b_rest) = b_rest.split_at_mut(row.teacher.len());
            self.align_row(row, first + n, (a, b), &mut buffers, &mut out)?;
        }
        Ok(out)
    }

    fn align_row(
        &self,
        row: &Row<'_>,
        number: usize,
        maps: (&mut [i32], &mut [i32]),
        buffers: &mut Buffers,
        out: &mut Aligned,
    ) -> Result<()> {
        let chunks_before = out.spans.len();
        let (mut flags, mut mismatches) = (0, 0);
        for segment in row.segments {
            let [s0, s1, t0, t1] = segment.map(|at| at as usize);
            let (student, teacher) = (&row.student[s0..s1], &row.teacher[t0..t1]);
            check_ids(student, self.student.len(), "student", number, s0)?;
            check_ids(teacher, self.teacher.len(), "teacher", number, t0)?;
            let maps = (&mut maps.0[s0..s1], &mut maps.1[t0..t1]);
            let done = self.align_segment(student, teacher, row.text, (s0, t0), maps, buffers, out)?;
            mismatches += done.mismatches;
            flags |= u8::from(done.mismatches > 0) * row::MISMATCHED;
            flags |= u8::from(done.truncated.0) * row::STUDENT_TRUNCATED;
            flags |= u8::from(done.truncated.1) * row::TEACHER_TRUNCATED;
            if let (OnMismatch::Error, Some((s, t))) = (self.on_mismatch, done.first_mismatch) {
                return Err(self.mismatch(number, (student, s, s0), (teacher, t, t0)));
            }
        }
        if self.on_mismatch == OnMismatch::Drop && mismatches > 0 {
            out.spans.truncate(chunks_before);
            out.flags.truncate(chunks_before);
            out.bytes.truncate(chunks_before);
            maps.0.fill(-1);
            maps.1.fill(-1);
            flags |= row::DROPPED;
        }
        out.counts.push(out.spans.len() - chunks_before);
        out.row_flags.push(flags);
        out.mismatches.push(mismatches as i32);
        Ok(())
    }

    #[allow(clippy::too_many_arguments)]
    fn align_segment(
        &self,
        student: &[i32],
        teacher: &[i32],
        text: Option<&str>,
        offsets: (usize, usize),
        maps: (&mut [i32], &mut [i32]),
        buffers: &mut Buffers,
        out: &mut Aligned,
    ) -> Result<Done> {
        let (s, t) = self.ids(student, teacher);
        let (lossy_s, lossy_t) = (self.student.is_lossy(), self.teacher.is_lossy());
        let drops = self.student.rules.drops_space || self.teacher.rules.drops_space;
        let before = out.spans.len();
        if !drops || (self.same_rules() && text.is_none()) {
            let done = {
                let mut sink = |c: Chunk| record(c, (&s, &t), offsets, (maps.0, maps.1), out);
                run(&s, &t, self.options(), &mut buffers.scratch, &mut sink)
            };
            if done.mismatches == 0 || !(lossy_s || lossy_t) || (self.same_rules() && text.is_none()) {
                return Ok(done);
            }
            out.spans.truncate(before);
            out.flags.truncate(before);
            out.bytes.truncate(before);
            maps.0.fill(-1);
            maps.1.fill(-1);
        }
        let by_student = self.student_stands_for_text();
        if text.is_none() && self.needs_text() {
            return Err(Error::Refused(
                "both tokenizers change the text (lower-casing, whitespace), each in its own way, so that ids alone do not say \
                 what it was; pass text=, the original of every row"
                    .into(),
            ));
        }
        let Buffers { scratch, normal, groups } = buffers;
        let mut done = Done::default();
        let mut prefix = (self.student.rules.prefix, self.teacher.rules.prefix);
        let group_s = lossy_s && (text.is_some() || !by_student);
        let group_t = lossy_t && (text.is_some() || by_student);
        if group_s {
            let (own, texts) = (prefix.0, if text.is_some() { Prefix::Never } else { prefix.1 });
            match text {
                Some(text) => normal.from_text(text, &self.student.rules),
                None => normal.from_ids(t, &self.student.rules),
            }
            groups.0.make(s, own, normal, texts, scratch);
            done.add(&groups.0, false, text.is_none());
            prefix = (Prefix::Never, if text.is_some() { prefix.1 } else { Prefix::Never });
        }
        if group_t {
            let (own, texts) = (prefix.1, if text.is_some() { Prefix::Never } else { prefix.0 });
            match text {
                Some(text) => normal.from_text(text, &self.teacher.rules),
                None => normal.from_ids(s, &self.teacher.rules),
            }
            groups.1.make(t, own, normal, texts, scratch);
            done.add(&groups.1, true, text.is_none());
            prefix = (if text.is_some() { prefix.0 } else { Prefix::Never }, Prefix::Never);
        }
        let options = Options { granularity: self.granularity, prefix };
        let (g, h) = (&groups.0, &groups.1);
        let mut last = (0, 0);
        let mut sink = |mut c: Chunk| {
            if group_s {
                c.a = g.tokens(c.a, last.0);
            }
            if group_t {
                c.b = h.tokens(c.b, last.1);
            }
            last = (c.a.1, c.b.1);
            record(c, (&s, &t), offsets, (maps.0, maps.1), out);
        };
        let main = match (group_s, group_t) {
            (true, true) => run(&g.made, &h.made, options, scratch, &mut sink),
            (true, false) => run(&g.made, &t, options, scratch, &mut sink),
            (false, true) => run(&s, &h.made, options, scratch, &mut sink),
            (false, false) => run(&s, &t, options, scratch, &mut sink),
        };
        done.mismatches += main.mismatches;
        done.truncated = (done.truncated.0 | main.truncated.0, done.truncated.1 | main.truncated.1);
        done.first_mismatch = done.first_mismatch.or(main.first_mismatch.map(|at| {
            let token = |grouped: bool, of: &Groups, at: usize| match of.ranges.get(at) {
                Some(range) if grouped => range.0,
                _ => at,
            };
            (token(group_s, g, at.0), token(group_t, h, at.1))
        }));
        Ok(done)
    }

    fn mismatch(&self, row: usize, student: (&[i32], usize, usize), teacher: (&[i32], usize, usize)) -> Error {
        let show = |vocab: &Vocab, (ids, at, offset): (&[i32], usize, usize)| {
            let mut bytes = Vec::new();
            ids.iter().skip(at).take(4).for_each(|id| vocab.bytes(*id as usize, &mut bytes));
            bytes.truncate(24);
            format!("token {} ({})", at + offset, bytes.escape_ascii())
        };
        Error::Refused(format!(
            "row {row}: the sides' bytes differ from student {} and teacher {} on; pass the same text to both tokenizers, \
             or on_mismatch=\"resync\"",
            show(&self.student, student),
            show(&self.teacher, teacher)
        ))
    }
}

#[derive(Default)]
struct Done {
    mismatches: u32,
    truncated: (bool, bool),
    first_mismatch: Option<(usize, usize)>,
}

impl Done {
    /// What a lossy side's walk against the text found; `other_is_text`: the text is the other side's.
    fn add(&mut self, groups: &Groups, is_teacher: bool, other_is_text: bool) {
        self.mismatches += groups.mismatches;
        let (own, other) = (groups.truncated.0, groups.truncated.1 && other_is_text);
        let (s, t) = if is_teacher { (other, own) } else { (own, other) };
        self.truncated = (self.truncated.0 | s, self.truncated.1 | t);
        if let (None, Some(at)) = (self.first_mismatch, groups.first_mismatch) {
            self.first_mismatch = Some(if is_teacher { (0, at) } else { (at, 0) });
        }
    }
}

fn run(
    a: &impl Stream,
    b: &impl Stream,
    options: Options,
    scratch: &mut Scratch,
    sink: &mut impl FnMut(Chunk),
) -> Done {
    let mut walk = Walk::new(options);
    walk.run(a, b, true, scratch, sink);
    Done { mismatches: walk.mismatches, truncated: walk.truncated, first_mismatch: walk.first_mismatch }
}

/// Writes a chunk down and its number beside its tokens; special tokens inside a chunk of text stay out.
#[inline]
pub fn record(
    c: Chunk,
    ids: (&Ids<'_>, &Ids<'_>),
    offsets: (usize, usize),
    maps: (&mut [i32], &mut [i32]),
    out: &mut Aligned,
) {
    let number = out.spans.len() as i32;
    let (s, t) = offsets;
    out.spans.push([(c.a.0 + s) as i32, (c.a.1 + s) as i32, (c.b.0 + t) as i32, (c.b.1 + t) as i32]);
    out.flags.push(c.flags);
    out.bytes.push(c.bytes as i32);
    if c.flags & !(chunk::SPECIAL | chunk::NORMALISED) == 0 {
        maps.0[c.a.0..c.a.1].fill(number);
        maps.1[c.b.0..c.b.1].fill(number);
    } else {
        for (map, ids, range) in [(maps.0, ids.0, c.a), (maps.1, ids.1, c.b)] {
            for (slot, at) in map[range.0..range.1].iter_mut().zip(range.0..) {
                if word_kind(ids.word(at)) != kind::SPECIAL {
                    *slot = number;
                }
            }
        }
    }
}

pub fn check_ids(ids: &[i32], size: usize, side: &str, row: usize, offset: usize) -> Result<()> {
    // as u32 negative ids are larger than any size
    let worst = ids.iter().fold(0u32, |worst, id| worst.max(*id as u32));
    if ids.is_empty() || (worst as usize) < size {
        return Ok(());
    }
    let at = ids.iter().position(|id| *id as u32 == worst).unwrap_or(0);
    Err(Error::Refused(format!(
        "row {row}: {side} token {} has id {}, outside the vocabulary's 0..{size}; pass the ids of that tokenizer, \
         and padding by mask",
        at + offset,
        worst as i32
    )))
}

/// A number for each class of special tokens that pair: the same role, the same name, or named by the caller. Padding
/// has none.
fn pair_roles(student: &Vocab, teacher: &Vocab, pairs: &[(u32, u32)]) -> (Vec<u16>, Vec<u16>) {
    let mut links: Vec<(u32, u32)> = pairs.to_vec();
    let alike = |role: &str| !matches!(role, "pad" | "unk");
    for (role, id) in student.rules.roles.iter().filter(|(role, _)| alike(role)) {
        links.extend(teacher.rules.roles.iter().filter(|(other, _)| other == role).map(|(_, other)| (*id, *other)));
    }
    let is_padding = |vocab: &Vocab, id: u32| {
        vocab.role("pad") == Some(id) && !vocab.rules.roles.iter().any(|(role, other)| *other == id && alike(role))
    };
    let named = |vocab: &Vocab| -> Vec<(Vec<u8>, u32)> {
        let special = (0..vocab.len()).filter(|id| vocab.flags[*id] & flag::SPECIAL != 0);
        special
            .filter(|id| !is_padding(vocab, *id as u32))
            .map(|id| {
                let mut name = Vec::new();
                vocab.bytes(id, &mut name);
                (name, id as u32)
            })
            .collect()
    };
    let teachers: HashMap<Vec<u8>, u32> = named(teacher).into_iter().collect();
    links.extend(named(student).into_iter().filter_map(|(name, id)| Some((id, *teachers.get(&name)?))));
    let (mut s, mut t) = (vec![0u16; student.len()], vec![0u16; teacher.len()]);
    let mut classes = 0u16;
    for (a, b) in links {
        let (Some(x), Some(y)) = (s.get(a as usize).copied(), t.get(b as usize).copied()) else { continue };
        match (x, y) {
            (0, 0) => {
                classes = classes.saturating_add(1);
                s[a as usize] = classes;
                t[b as usize] = classes;
            }
            (x, 0) => t[b as usize] = x,
            (0, y) => s[a as usize] = y,
            (x, y) if x != y => s.iter_mut().chain(&mut t).filter(|class| **class == y).for_each(|class| *class = x),
            _ => {}
        }
    }
    (s, t)
}
