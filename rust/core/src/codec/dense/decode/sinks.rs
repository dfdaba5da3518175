//! Where decoded rows go: caller memory, tokens alone, or codes.

use super::super::coded::{rest_value, sort_ties, Coded};
use super::super::values::{shifted_value, Values};
use super::super::{widest, Dense, Layout};
use super::all;
use crate::codec::Shape;
use crate::rows::RowsMut;

/// Takes the rows of a block one after the other.
pub trait Sink {
    /// Memory for the ids of row i, which has n.
    fn ids(&mut self, i: usize, n: usize) -> &mut [i32];
    /// An id of the row before row i.
    fn id_before(&self, i: usize, place: usize) -> i32;
    /// The rest of row i.
    fn row(&mut self, i: usize, row: &Row<'_>);
}

/// Codes of a row, each as a sum and what they all are above it, without regard to overflow.
pub struct Codes<'a> {
    pub sums: &'a [u32],
    pub from: u32,
}

impl Codes<'_> {
    #[inline(always)]
    pub fn all(&self) -> impl ExactSizeIterator<Item = u32> + '_ {
        self.sums.iter().map(|sum| sum.wrapping_add(self.from))
    }
}

pub struct Row<'a> {
    pub token: u32,
    pub codes: Codes<'a>,
    pub draws: &'a [u32],
    pub rests: &'a [u32],
    pub lse: u32,
    /// Eighths of a step.
    pub shift: u32,
}

struct ToRows<'a> {
    layout: Layout,
    out: RowsMut<'a>,
    tokens: Option<&'a mut [i32]>,
}

impl Sink for ToRows<'_> {
    #[inline(always)]
    fn ids(&mut self, i: usize, n: usize) -> &mut [i32] {
        &mut self.out.ids[i * self.layout.k as usize..][..n]
    }

    #[inline(always)]
    fn id_before(&self, i: usize, place: usize) -> i32 {
        self.out.ids[(i - 1) * self.layout.k as usize + place]
    }

    #[inline(always)]
    fn row(&mut self, i: usize, row: &Row<'_>) {
        let (k, n, values) = (self.layout.k as usize, row.codes.sums.len(), self.layout.values);
        let log_probs = &mut self.out.log_probs[i * k..(i + 1) * k];
        let lse = f32::from_bits(row.lse);
        match values {
            Values::Grid { per_nat } | Values::Shifted { per_nat } => {
                let (step, by) = (1.0 / f32::from(per_nat), row.shift as f32);
                for (slot, code) in log_probs.iter_mut().zip(row.codes.all()) {
                    *slot = shifted_value(code, by, step);
                }
            }
            _ => {
                for (slot, code) in log_probs.iter_mut().zip(row.codes.all()) {
                    *slot = values.value(code, lse);
                }
            }
        }
        if n < k {
            self.out.ids[i * k + n..(i + 1) * k].fill(-1);
            log_probs[n..].fill(f32::NEG_INFINITY);
        }
        self.out.log_rest[i] = rest_value(values, row.rests[0]);
        let extra = self.layout.extra;
        if extra > 0 && !self.out.extra.is_empty() {
            for (slot, code) in self.out.extra[i * extra..(i + 1) * extra].iter_mut().zip(&row.rests[1..]) {
                *slot = rest_value(values, *code);
            }
        }
        if let Some(slot) = self.out.lse.get_mut(i) {
            *slot = lse;
        }
        if !self.out.draws.is_empty() {
            let draws = &mut self.out.draws[i * k..(i + 1) * k];
            draws.fill(0);
            for (slot, d) in draws.iter_mut().zip(row.draws) {
                *slot = *d as i32 + 1;
            }
        }
        if let Some(tokens) = &mut self.tokens {
            tokens[i] = row.token as i32;
        }
    }
}

pub fn into_rows(
    dense: &Dense,
    payload: &[u8],
    shape: Shape,
    out: RowsMut<'_>,
    tokens: Option<&mut [i32]>,
) -> Result<(), String> {
    let (rows, k, layout) = (out.log_rest.len(), dense.layout.k as usize, dense.layout);
    let fits = |len: usize, wanted: usize| len == 0 || len == wanted;
    if out.ids.len() != rows * k
        || out.log_probs.len() != rows * k
        || tokens.as_ref().is_some_and(|t| t.len() != rows)
        || !fits(out.extra.len(), rows * layout.extra)
        || !fits(out.lse.len(), rows)
        || !fits(out.draws.len(), rows * k)
    {
        return Err(format!("memory for other than {rows} rows of {k} entries"));
    }
    all(dense, payload, shape, rows, &mut ToRows { layout, out, tokens })
}

struct ToTokens<'a> {
    tokens: &'a mut [i32],
    ids: Vec<i32>,
}

impl Sink for ToTokens<'_> {
    #[inline(always)]
    fn ids(&mut self, _: usize, n: usize) -> &mut [i32] {
        &mut self.ids[..n]
    }

    #[inline(always)]
    fn id_before(&self, _: usize, place: usize) -> i32 {
        self.ids[place]
    }

    #[inline(always)]
    fn row(&mut self, i: usize, row: &Row<'_>) {
        self.tokens[i] = row.token as i32;
    }
}

pub fn into_tokens(dense: &Dense, payload: &[u8], shape: Shape, out: &mut [i32]) -> Result<(), String> {
    let (rows, ids) = (out.len(), vec![0; dense.layout.k as usize]);
    all(dense, payload, shape, rows, &mut ToTokens { tokens: out, ids })
}

struct ToCoded {
    coded: Coded,
    values: Values,
    ids: Vec<i32>,
}

impl Sink for ToCoded {
    #[inline(always)]
    fn ids(&mut self, _: usize, n: usize) -> &mut [i32] {
        &mut self.ids[..n]
    }

    #[inline(always)]
    fn id_before(&self, _: usize, place: usize) -> i32 {
        self.ids[place]
    }

    #[inline(always)]
    fn row(&mut self, _: usize, row: &Row<'_>) {
        let c = &mut self.coded;
        let start = c.ids.len();
        c.tokens.push(row.token);
        let n = row.codes.sums.len();
        c.counts.push(n as u16);
        c.ids.extend(self.ids[..n].iter().map(|id| *id as u32));
        c.codes.extend(row.codes.all());
        c.draws.extend_from_slice(row.draws);
        c.rests.extend_from_slice(row.rests);
        match self.values {
            Values::Bf16Logits => c.lse.push(row.lse),
            Values::Shifted { .. } => c.shifts.push(row.shift),
            _ => {}
        }
        // back from the order of ranks to that of ids
        if row.draws.is_empty() {
            widest::sort_ties(&c.codes[start..], &mut c.ids[start..]);
        } else {
            let draws = &mut c.draws[start..];
            sort_ties(&c.codes[start..], &mut c.ids[start..], |a, b| draws.swap(a, b));
        }
    }
}

pub fn into_coded(dense: &Dense, payload: &[u8], shape: Shape) -> Result<Coded, String> {
    let mut sink =
        ToCoded { coded: Coded::default(), values: dense.layout.values, ids: vec![0; dense.layout.k as usize] };
    all(dense, payload, shape, shape.rows, &mut sink)?;
    Ok(sink.coded)
}
