//! One stretch of a row, of tokenizers that keep the text and of those that change it.

use crate::error::{Error, Result};
use crate::xtok::batch::{Aligner, Buffers};
use crate::xtok::lossy::Groups;
use crate::xtok::record::{Aligned, Recorder};
use crate::xtok::resync::Scratch;
use crate::xtok::stream::Stream;
use crate::xtok::vocab::{Prefix, Vocab};
use crate::xtok::walk::{Chunk, Options, Sink, Walk};

impl Aligner {
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

    #[allow(clippy::too_many_arguments)]
    pub(super) fn align_segment(
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
            let mut sink = Recorder { ids: (&s, &t), offsets, maps: (maps.0, maps.1), out };
            let done = run(&s, &t, self.options(), &mut buffers.scratch, &mut sink);
            if done.mismatches == 0 || !(lossy_s || lossy_t) || (self.same_rules() && text.is_none()) {
                return Ok(done);
            }
            out.truncate(before);
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
        let mut recorder = Recorder { ids: (&s, &t), offsets, maps: (maps.0, maps.1), out };
        let mut sink = |mut c: Chunk| {
            if group_s {
                c.a = g.tokens(c.a, last.0);
            }
            if group_t {
                c.b = h.tokens(c.b, last.1);
            }
            last = (c.a.1, c.b.1);
            // a piece of the text of which both sides lack all tokens is no chunk
            if c.a.0 < c.a.1 || c.b.0 < c.b.1 {
                recorder.chunk(c);
            }
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

    pub(super) fn mismatch(
        &self,
        row: usize,
        student: (&[i32], usize, usize),
        teacher: (&[i32], usize, usize),
    ) -> Error {
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
pub(super) struct Done {
    pub mismatches: u32,
    pub truncated: (bool, bool),
    pub first_mismatch: Option<(usize, usize)>,
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

fn run(a: &impl Stream, b: &impl Stream, options: Options, scratch: &mut Scratch, sink: &mut impl Sink) -> Done {
    let mut walk = Walk::new(options);
    walk.run(a, b, true, scratch, sink);
    Done { mismatches: walk.mismatches, truncated: walk.truncated, first_mismatch: walk.first_mismatch }
}
