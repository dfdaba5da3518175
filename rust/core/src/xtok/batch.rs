//! `Aligner`: rows of ids of two vocabularies to chunks, over threads.

use std::sync::Arc;

use crate::error::{Error, Result};
use crate::xtok::lossy::{Groups, Normalised};
use crate::xtok::record::{check_ids, Aligned};
use crate::xtok::resync::Scratch;
use crate::xtok::roles::pair_roles;
use crate::xtok::stream::Ids;
use crate::xtok::vocab::{flag, Vocab};
use crate::xtok::walk::{Granularity, Options};

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
    /// The original text of each segment.
    pub texts: Option<&'a [String]>,
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
    pub(super) scratch: Scratch,
    pub(super) normal: Normalised,
    pub(super) groups: (Groups, Groups),
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

    /// Aligns rows; the chunk of every token goes to the maps (as long as all rows' ids together).
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
        let counted = |part: &Result<Aligned>| part.as_ref().map_or(0, |part| part.spans.len());
        let mut all = Aligned::with_capacity(done.iter().map(counted).sum());
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
        let expected = rows.iter().map(|r| r.student.len().min(r.teacher.len())).sum::<usize>();
        let mut out = Aligned::with_capacity(expected);
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
        maps.0.fill(-1);
        maps.1.fill(-1);
        let chunks_before = out.spans.len();
        let (mut flags, mut mismatches) = (0, 0);
        for (n, segment) in row.segments.iter().enumerate() {
            let text = row.texts.and_then(|texts| texts.get(n)).map(String::as_str);
            let [s0, s1, t0, t1] = segment.map(|at| at as usize);
            let (student, teacher) = (&row.student[s0..s1], &row.teacher[t0..t1]);
            check_ids(student, self.student.len(), "student", number, s0)?;
            check_ids(teacher, self.teacher.len(), "teacher", number, t0)?;
            let maps = (&mut maps.0[s0..s1], &mut maps.1[t0..t1]);
            let done = self.align_segment(student, teacher, text, (s0, t0), maps, buffers, out)?;
            mismatches += done.mismatches;
            flags |= u8::from(done.mismatches > 0) * row::MISMATCHED;
            flags |= u8::from(done.truncated.0) * row::STUDENT_TRUNCATED;
            flags |= u8::from(done.truncated.1) * row::TEACHER_TRUNCATED;
            if let (OnMismatch::Error, Some((s, t))) = (self.on_mismatch, done.first_mismatch) {
                return Err(self.mismatch(number, (student, s, s0), (teacher, t, t0)));
            }
        }
        if self.on_mismatch == OnMismatch::Drop && mismatches > 0 {
            out.truncate(chunks_before);
            maps.0.fill(-1);
            maps.1.fill(-1);
            flags |= row::DROPPED;
        }
        out.counts.push(out.spans.len() - chunks_before);
        out.row_flags.push(flags);
        out.mismatches.push(mismatches as i32);
        Ok(())
    }
}
