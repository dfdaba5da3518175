//! Log-probabilities as codes: whole numbers that grow as the probability falls, so that a row's codes never descend.

use super::super::half;
use crate::rows::fast_exp;

/// The code of a probability of zero on a grid.
pub const NOTHING: u32 = 65_535;
/// The largest code of a finite log-probability on a grid.
pub const LARGEST: f32 = 65_534.0;
/// Places that a row's grid may be moved to, less than a step apart in all.
pub const SHIFTS: u32 = 8;
/// Steps of log_rest and the like in a step of a shifted grid.
const REST_STEPS: u16 = 4;

/// How log-probabilities are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Values {
    /// A grid of 1/per_nat nat, of codec 1.
    Grid {
        per_nat: u16,
    },
    /// The same, moved in each row by some eighths of a step, of codec 2.
    Shifted {
        per_nat: u16,
    },
    /// Logits in bf16 and the log-sum-exp in fp32: bit exact.
    Bf16Logits,
    Fp16,
    Fp32,
}

impl Values {
    /// The values that a spec names, None for the plain codec.
    pub fn from_name(name: &str) -> Result<Option<Values>, String> {
        Ok(Some(match name {
            "plain" => return Ok(None),
            "1/8" => Values::Grid { per_nat: 8 },
            "1/16" => Values::Grid { per_nat: 16 },
            "1/32" => Values::Grid { per_nat: 32 },
            "1/64" => Values::Grid { per_nat: 64 },
            "bf16_logits" => Values::Bf16Logits,
            "fp16" => Values::Fp16,
            "fp32" => Values::Fp32,
            other => {
                return Err(format!(
                "the spec's values are {other:?}; 1/8, 1/16, 1/32, 1/64, bf16_logits, fp16, fp32 or plain is accepted"
            ))
            }
        }))
    }

    /// The same values as codec 2 stores them.
    pub fn of_codec_2(self) -> Values {
        match self {
            Values::Grid { per_nat } => Values::Shifted { per_nat },
            other => other,
        }
    }

    /// Steps a nat of log_rest and the like; None where they are fp32.
    pub fn rest_grid(self) -> Option<f32> {
        match self {
            Values::Grid { per_nat } => Some(f32::from(per_nat)),
            Values::Shifted { per_nat } => Some(f32::from(per_nat * REST_STEPS)),
            _ => None,
        }
    }

    /// One more than the largest number that the class code of first codes must hold.
    pub fn first_bound(self) -> u64 {
        match self {
            Values::Shifted { .. } => 1 << 19,
            _ => 1 << 16,
        }
    }

    /// (kind, per_nat) in the header.
    pub fn numbers(self) -> (u8, u16) {
        match self {
            Values::Grid { per_nat } | Values::Shifted { per_nat } => (0, per_nat),
            Values::Bf16Logits => (1, 0),
            Values::Fp16 => (2, 0),
            Values::Fp32 => (3, 0),
        }
    }

    pub fn from_numbers(kind: u8, per_nat: u16) -> Result<Values, String> {
        match (kind, per_nat) {
            (0, 8 | 16 | 32 | 64) => Ok(Values::Grid { per_nat }),
            (1, 0) => Ok(Values::Bf16Logits),
            (2, 0) => Ok(Values::Fp16),
            (3, 0) => Ok(Values::Fp32),
            _ => Err(format!("values of kind {kind} with {per_nat} steps a nat are not known")),
        }
    }

    /// Codes are below 2^16 and stored as differences; otherwise as fp16 or fp32.
    pub fn by_difference(self) -> bool {
        matches!(self, Values::Grid { .. } | Values::Shifted { .. } | Values::Bf16Logits)
    }

    /// A row's log-probabilities may be off by this much (nat), and by this part of themselves.
    pub fn error_bound(self) -> (f32, f32) {
        match self {
            // half a step, and what fp32 itself loses
            Values::Grid { per_nat } | Values::Shifted { per_nat } => (0.5 / f32::from(per_nat), 1.0e-6),
            Values::Bf16Logits | Values::Fp32 => (0.0, 0.0),
            Values::Fp16 => (3.1e-8, 1.0 / 2048.0),
        }
    }

    /// The mass of a stored row is at most the writer's bound times this.
    pub fn mass_slack(self) -> f32 {
        let (nat, part) = self.error_bound();
        (nat + 16.0 * part).exp()
    }

    /// Code of a log-probability that the writer's rules accept. `by` is the row's: its lse with logits, its shift in
    /// eighths of a step with a shifted grid.
    #[inline(always)]
    pub fn code(self, log_prob: f32, by: f32) -> u32 {
        match self {
            Values::Grid { per_nat } => grid_code(log_prob, f32::from(per_nat), 0.0),
            Values::Shifted { per_nat } => grid_code(log_prob, f32::from(per_nat), by / SHIFTS as f32),
            Values::Bf16Logits => u32::from(descending(bf16(log_prob + by))),
            Values::Fp16 => u32::from(half::encode(-log_prob)),
            Values::Fp32 => (0.0 - log_prob).max(0.0).to_bits(),
        }
    }

    /// The log-probability of a code.
    #[inline(always)]
    pub fn value(self, code: u32, by: f32) -> f32 {
        match self {
            Values::Grid { per_nat } => grid_value(code, 1.0 / f32::from(per_nat)),
            Values::Shifted { per_nat } => shifted_value(code, by, 1.0 / f32::from(per_nat)),
            Values::Bf16Logits => f32::from_bits(u32::from(ascending(code as u16)) << 16) - by,
            Values::Fp16 => half::decode(code as u16),
            Values::Fp32 => 0.0 - f32::from_bits(code),
        }
    }

    /// The largest code that stands for a log-probability.
    pub fn largest(self) -> u32 {
        match self {
            Values::Grid { .. } | Values::Shifted { .. } => NOTHING,
            Values::Bf16Logits => u32::from(descending(0xff80)),
            Values::Fp16 => u32::from(half::INFINITE),
            Values::Fp32 => f32::INFINITY.to_bits(),
        }
    }
}

#[inline(always)]
pub fn grid_code(log_prob: f32, per_nat: f32, shift: f32) -> u32 {
    let steps = (0.0 - log_prob * per_nat - shift).clamp(0.0, LARGEST);
    // round to nearest even: below 2^23 the sum keeps no fraction
    let code = (steps + 8_388_608.0).to_bits() & 0x7f_ffff;
    if log_prob == f32::NEG_INFINITY {
        NOTHING
    } else {
        code
    }
}

#[inline(always)]
pub fn grid_value(code: u32, step: f32) -> f32 {
    shifted_value(code, 0.0, step)
}

/// Exact: code and eighths are less than 2^19 together.
#[inline(always)]
pub fn shifted_value(code: u32, eighths: f32, step: f32) -> f32 {
    let value = 0.0 - (code as i32 as f32 * SHIFTS as f32 + eighths) * (step / SHIFTS as f32);
    if code == NOTHING {
        f32::NEG_INFINITY
    } else {
        value
    }
}

/// Entries that the shift of a row is chosen by.
const LEADING: usize = 8;

/// The shift, in eighths of a step, that brings a row's leading entries nearest to what they are: the least sum of p times the
/// squared error, which is twice the divergence. The first entry stays within half a step of its code.
#[inline(always)]
pub fn best_shift(log_probs: &[f32], per_nat: f32) -> u32 {
    let Some(first) = log_probs.first().map(|lp| lp.min(0.0)) else { return 0 };
    if first * per_nat <= -LARGEST {
        return 0;
    }
    let (mut steps, mut weights) = ([0f32; LEADING], [0f32; LEADING]);
    for ((step, weight), lp) in steps.iter_mut().zip(&mut weights).zip(log_probs) {
        *step = (0.0 - lp * per_nat).clamp(0.0, LARGEST);
        *weight = fast_exp(lp.min(0.0) - first);
    }
    let mut costs = [0f32; SHIFTS as usize];
    for (step, weight) in steps.into_iter().zip(weights) {
        for (eighths, cost) in costs.iter_mut().enumerate() {
            let moved = step - eighths as f32 / SHIFTS as f32;
            let error = moved - ((moved + 12_582_912.0) - 12_582_912.0);
            *cost += weight * (error * error);
        }
    }
    // no cost is negative, so their bits are in their order; the shift below them decides between equal ones
    let key = |eighths: u32| match eighths == 0 || steps[0] - eighths as f32 / SHIFTS as f32 >= -0.5 {
        true => u64::from(costs[eighths as usize].to_bits()) << 32 | u64::from(eighths),
        false => u64::MAX,
    };
    (1..SHIFTS).fold(key(0), |least, eighths| least.min(key(eighths))) as u32
}

/// The nearest bf16, ties to even; the value is no NaN.
#[inline(always)]
fn bf16(value: f32) -> u16 {
    let bits = value.to_bits();
    ((bits + 0x7fff + (bits >> 16 & 1)) >> 16) as u16
}

// bf16 bits in descending order of their numbers, and back
fn descending(bits: u16) -> u16 {
    let ascending = if bits & 0x8000 == 0 { bits | 0x8000 } else { !bits };
    !ascending
}

fn ascending(code: u16) -> u16 {
    let order = !code;
    if order & 0x8000 == 0 {
        !order
    } else {
        order & 0x7fff
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [Values; 8] = [
        Values::Shifted { per_nat: 16 },
        Values::Grid { per_nat: 8 },
        Values::Grid { per_nat: 16 },
        Values::Grid { per_nat: 32 },
        Values::Grid { per_nat: 64 },
        Values::Bf16Logits,
        Values::Fp16,
        Values::Fp32,
    ];

    #[test]
    fn the_error_is_within_its_bound_and_codes_never_descend() {
        let shifts = |v: Values| if matches!(v, Values::Shifted { .. }) { SHIFTS } else { 1 };
        let cases = ALL.into_iter().filter(|v| *v != Values::Bf16Logits);
        for (values, by) in cases.flat_map(|v| (0..shifts(v)).map(move |by| (v, by as f32))) {
            let (nat, part) = values.error_bound();
            let mut last = 0;
            let begin = by * nat / 4.0;
            for i in 0..600_000u32 {
                let log_prob = -(i as f32) * 1.61e-3 - begin;
                let code = values.code(log_prob, by);
                assert!(code >= last && code <= values.largest());
                last = code;
                let back = values.value(code, by);
                assert!((back - log_prob).abs() <= nat - part * log_prob, "{values:?} {log_prob} {back}");
                assert_eq!(values.code(back, by), code, "{values:?} {log_prob}");
            }
            assert_eq!(values.value(values.code(f32::NEG_INFINITY, by), by), f32::NEG_INFINITY);
            assert_eq!(values.code(f32::NEG_INFINITY, by), values.largest());
            assert!(values.value(values.code(5e-4, by), by) <= 0.0);
            assert!(
                by > 0.0 || values.value(values.code(5e-4, 0.0), 0.0).to_bits() == 0,
                "noise above 0 is stored as 0"
            );
            assert!(values.value(values.code(-1e9, by), by) <= -1000.0);
        }
    }

    #[test]
    fn the_shift_follows_the_leading_entries_and_is_found_again() {
        let (per_nat, values) = (16.0, Values::Shifted { per_nat: 16 });
        assert_eq!(best_shift(&[-3.0 / 128.0, -4.0], per_nat), 3);
        assert_eq!(best_shift(&[-1e-4, -9.5], per_nat), 0, "the first entry stays within half a step");
        assert_eq!(
            [best_shift(&[], per_nat), best_shift(&[f32::NEG_INFINITY], per_nat), best_shift(&[-5e3], per_nat)],
            [0; 3]
        );
        let mut seed = 7u32;
        for _ in 0..20_000 {
            let mut at = 0.0;
            let row: Vec<f32> = (0..6)
                .map(|_| {
                    seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    at -= (seed >> 8) as f32 / (1 << 24) as f32 * if seed & 64 == 0 { 0.2 } else { 6.0 };
                    at
                })
                .collect();
            let by = best_shift(&row, per_nat) as f32;
            let back: Vec<f32> = row.iter().map(|lp| values.value(values.code(*lp, by), by)).collect();
            assert!(row.iter().zip(&back).all(|(a, b)| (a - b).abs() <= 1.0 / 32.0 + 1e-5), "{row:?} {by}");
            assert_eq!(best_shift(&back, per_nat) as f32, by, "{row:?}");
        }
    }

    #[test]
    fn bf16_logits_are_exact_and_ordered() {
        for raw in (0..=0xffffu16).filter(|b| b & 0x7fff <= 0x7f80 && *b != 0x7f80) {
            let logit = f32::from_bits(u32::from(raw) << 16);
            assert_eq!(ascending(descending(raw)), raw);
            let (lse, code) = (17.31f32, descending(raw));
            assert_eq!(Values::Bf16Logits.value(u32::from(code), lse), logit - lse);
        }
        assert!(descending(0x4120) < descending(0x4110) && descending(0x3f80) < descending(0xbf80));
        assert_eq!(Values::Bf16Logits.value(Values::Bf16Logits.largest(), 3.0), f32::NEG_INFINITY);
    }
}
