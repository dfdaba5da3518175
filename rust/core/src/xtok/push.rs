//! A row that grows: tokens come in on both sides, chunks go out as soon as nothing that follows can change them.

use crate::error::{Error, Result};
use crate::xtok::batch::{Aligner, OnMismatch};
use crate::xtok::record::{check_ids, Aligned, Recorder};
use crate::xtok::resync::Scratch;
use crate::xtok::walk::{State, Walk};

pub struct Push {
    walk: Walk,
    scratch: Scratch,
    student: Vec<i32>,
    teacher: Vec<i32>,
    maps: (Vec<i32>, Vec<i32>),
    out: Aligned,
    done: bool,
}

impl Push {
    pub fn new(aligner: &Aligner) -> Result<Push> {
        if aligner.student.rules.drops_space || aligner.teacher.rules.drops_space {
            return Err(Error::Refused(
                "a tokenizer that drops whitespace cannot be aligned token by token; collect the row and align it whole".into(),
            ));
        }
        if aligner.on_mismatch == OnMismatch::Drop {
            return Err(Error::Refused(
                "on_mismatch=\"drop\" needs whole rows; use \"resync\" or \"error\" here".into(),
            ));
        }
        Ok(Push {
            walk: Walk::new(aligner.options()),
            scratch: Scratch::default(),
            student: Vec::new(),
            teacher: Vec::new(),
            maps: (Vec::new(), Vec::new()),
            out: Aligned::default(),
            done: false,
        })
    }

    /// Takes more tokens, `ended`: the last ones; the number of the first new chunk.
    pub fn push(&mut self, aligner: &Aligner, student: &[i32], teacher: &[i32], ended: bool) -> Result<usize> {
        if self.done {
            return Err(Error::Stopped("the row was finished; begin a new one".into()));
        }
        check_ids(student, aligner.student.len(), "student", 0, self.student.len())?;
        check_ids(teacher, aligner.teacher.len(), "teacher", 0, self.teacher.len())?;
        self.student.extend_from_slice(student);
        self.teacher.extend_from_slice(teacher);
        self.maps.0.resize(self.student.len(), -1);
        self.maps.1.resize(self.teacher.len(), -1);
        let before = self.out.spans.len();
        let (s, t) = aligner.ids(&self.student, &self.teacher);
        let maps = (&mut self.maps.0[..], &mut self.maps.1[..]);
        let mut sink = Recorder { ids: (&s, &t), offsets: (0, 0), maps, out: &mut self.out };
        self.done = self.walk.run(&s, &t, ended, &mut self.scratch, &mut sink) == State::Done || ended;
        if let (OnMismatch::Error, Some((s, t))) = (aligner.on_mismatch, self.walk.first_mismatch) {
            return Err(Error::Refused(format!(
                "the sides' bytes differ from student token {s} and teacher token {t} on"
            )));
        }
        Ok(before)
    }

    pub fn out(&self) -> &Aligned {
        &self.out
    }

    pub fn maps(&self) -> (&[i32], &[i32]) {
        (&self.maps.0, &self.maps.1)
    }

    pub fn mismatches(&self) -> u32 {
        self.walk.mismatches
    }

    pub fn truncated(&self) -> (bool, bool) {
        self.walk.truncated
    }
}
