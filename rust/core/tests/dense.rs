//! The dense codec: every kind of values reads back within its bound, whatever the rows and the tables.

mod common;

use potstill_core::codec::dense::{train, Coded, Dense, Layout, Values};
use potstill_core::codec::Shape;
use potstill_core::RowsMut;
use proptest::prelude::*;

use common::{long, sorted, Given};

const VOCAB: u32 = 500;
const K: usize = 7;

fn layout(values: Values, extra: usize, sampled: bool) -> Layout {
    let codec = if let Values::Shifted { .. } = values { 2 } else { 1 };
    Layout { codec, values, vocab_size: VOCAB, k: K as u32, extra, sampled }
}

impl Given {
    fn poisoned(layout: &Layout, n: usize) -> Given {
        let lse = if layout.values == Values::Bf16Logits { n } else { 0 };
        Given {
            tokens: vec![-9; n],
            counts: vec![],
            ids: vec![-9; n * K],
            log_probs: vec![f32::NAN; n * K],
            log_rest: vec![f32::NAN; n],
            extra: vec![f32::NAN; n * layout.extra],
            lse: vec![f32::NAN; lse],
            draws: vec![-9; if layout.sampled { n * K } else { 0 }],
        }
    }

    fn out(&mut self) -> RowsMut<'_> {
        RowsMut {
            ids: &mut self.ids,
            log_probs: &mut self.log_probs,
            log_rest: &mut self.log_rest,
            extra: &mut self.extra,
            lse: &mut self.lse,
            draws: &mut self.draws,
        }
    }
}

fn bf16(x: f32) -> f32 {
    f32::from_bits(x.to_bits() & 0xffff_0000)
}

// rows of at most K entries with near and equal log-probabilities, some far ones and some -inf
fn rows(values: Values, extra: usize, sampled: bool, full: bool) -> impl Strategy<Value = Given> {
    let ids = proptest::sample::subsequence((0..VOCAB as i32).collect::<Vec<_>>(), if full { K } else { 0 }..=K);
    let gap = prop_oneof![Just(0f32), 0f32..0.3, 0f32..9.0, Just(80.0), Just(2000.0), Just(f32::INFINITY)];
    let row = (ids.prop_shuffle(), proptest::collection::vec(gap, K), 0f32..30.0, any::<bool>(), any::<u32>());
    proptest::collection::vec(row, 1..40).prop_map(move |rows| {
        let mut given = Given::default();
        for (ids, gaps, rest, none, noise) in rows {
            let n = ids.len();
            let lse = 12.0 + (noise % 1000) as f32 * 0.01;
            let mut top = -0.01 - (noise % 64) as f32 * 0.07;
            let hit = noise % 3 > 0 && n > 0;
            given.tokens.push(if hit { ids[noise as usize % n] } else { (noise % 600) as i32 });
            given.counts.push(n as u16);
            for (id, gap) in ids.iter().zip(gaps) {
                top -= gap;
                given.ids.push(*id);
                let exact = values == Values::Bf16Logits;
                given.log_probs.push(if exact { bf16(top + lse) - lse } else { top });
                if sampled {
                    given.draws.push(1 + (noise % 7) as i32 * (noise % 211) as i32);
                }
            }
            given.ids.resize(given.counts.len() * K, -1);
            given.log_probs.resize(given.counts.len() * K, f32::NEG_INFINITY);
            given.log_rest.push(if none { f32::NEG_INFINITY } else { -rest });
            given.extra.extend((0..extra).map(|e| -rest * e as f32));
            if values == Values::Bf16Logits {
                given.lse.push(lse);
            }
            if sampled {
                given.draws.resize(given.counts.len() * K, 0);
            }
        }
        given
    })
}

fn any_case() -> impl Strategy<Value = (Layout, Given)> {
    let values = prop_oneof![
        Just(Values::Grid { per_nat: 8 }),
        Just(Values::Grid { per_nat: 16 }),
        Just(Values::Grid { per_nat: 64 }),
        Just(Values::Shifted { per_nat: 8 }),
        Just(Values::Shifted { per_nat: 16 }),
        Just(Values::Shifted { per_nat: 64 }),
        Just(Values::Bf16Logits),
        Just(Values::Fp16),
        Just(Values::Fp32)
    ];
    (values, 0usize..3, any::<bool>(), any::<bool>()).prop_flat_map(|(values, extra, sampled, full)| {
        rows(values, extra, sampled, full).prop_map(move |given| (layout(values, extra, sampled), given))
    })
}

fn near(layout: &Layout, given: f32, got: f32) -> bool {
    let (nat, part) = layout.values.error_bound();
    given == got || (given - got).abs() <= nat - part * given || (given < -1000.0 && got <= -1000.0)
}

fn check(dense: &Dense, given: &Given) -> Result<(), TestCaseError> {
    let (layout, n) = (&dense.layout, given.tokens.len());
    let coded = Coded::new(layout, &given.rows(K), &given.counts).expect("codes");
    let mut payload = Vec::new();
    dense.encode(&coded, 0, n, 0, &mut payload);
    let shape = Shape { rows: n, entries: coded.ids.len() };
    prop_assert_eq!(&dense.decode_coded(&payload, shape).expect("the codes"), &coded);
    for rows in [n, n / 2, 1] {
        let mut got = Given::poisoned(layout, rows);
        let mut tokens = std::mem::take(&mut got.tokens);
        dense.decode(&payload, shape, got.out(), Some(&mut tokens)).expect("the rows");
        prop_assert_eq!(&tokens, &given.tokens[..rows]);
        for i in 0..rows {
            let (mut want, mut have) = (Vec::new(), Vec::new());
            for j in 0..K {
                let at = i * K + j;
                prop_assert!(
                    near(layout, given.log_probs[at], got.log_probs[at]),
                    "{} {}",
                    given.log_probs[at],
                    got.log_probs[at]
                );
                let draws = |g: &Given| if layout.sampled { g.draws[at] } else { 0 };
                // entries of equal stored log-probabilities may change places
                want.push((given.ids[at], draws(given)));
                have.push((got.ids[at], draws(&got)));
                let ends = j + 1 == K || got.log_probs[at + 1] != got.log_probs[at];
                if ends {
                    want.sort_unstable();
                    have.sort_unstable();
                    prop_assert_eq!(&want, &have);
                }
            }
            if layout.values != Values::Bf16Logits {
                prop_assert!(near(layout, given.log_rest[i], got.log_rest[i]));
            }
            for e in 0..layout.extra {
                prop_assert!(near(layout, given.extra[i * layout.extra + e], got.extra[i * layout.extra + e]));
            }
        }
        prop_assert_eq!(&got.lse, &given.lse[..got.lse.len()]);
    }
    // rows that were read are written as the same codes
    let mut got = Given::poisoned(layout, n);
    dense.decode(&payload, shape, got.out(), None).expect("the rows");
    got.tokens = given.tokens.clone();
    prop_assert_eq!(&Coded::new(layout, &got.rows(K), &given.counts).expect("codes again"), &coded);
    let mut tokens = vec![0; n];
    dense.decode_tokens(&payload, shape, &mut tokens).expect("tokens");
    prop_assert_eq!(&tokens, &given.tokens);
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn every_kind_of_values_reads_back((layout, given) in any_case()) {
        check(&Dense::new(layout), &given)?;
    }

    #[test]
    fn trained_tables_read_back((layout, given) in any_case()) {
        let coded = Coded::new(&layout, &given.rows(K), &given.counts).expect("codes");
        let many: Vec<Coded> = std::iter::repeat_n(coded.clone(), 4096usize.div_ceil(coded.ids.len().max(1)).min(5000)).collect();
        let Some(tables) = train(layout, &many) else { return Ok(()) };
        let again = potstill_core::codec::dense::Tables::decode(&tables.bytes, layout).expect("tables");
        prop_assert_eq!(&again.bytes, &tables.bytes);
        prop_assert_eq!(&again.dictionary.id_of, &tables.dictionary.id_of);
        check(&Dense { layout, tables: std::sync::Arc::new(again) }, &given)?;
    }

    #[test]
    fn any_payload_is_rows_or_an_error((layout, given) in any_case(), changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6), cut in 0usize..30) {
        let dense = Dense::new(layout);
        let coded = Coded::new(&layout, &given.rows(K), &given.counts).expect("codes");
        let (mut payload, n) = (Vec::new(), given.tokens.len());
        dense.encode(&coded, 0, n, 0, &mut payload);
        for (at, value) in changes {
            let at = at.index(payload.len());
            payload[at] = value;
        }
        payload.truncate(payload.len().saturating_sub(if cut < 20 { 0 } else { cut - 19 }));
        let mut got = Given::poisoned(&layout, n);
        let mut tokens = got.tokens.clone();
        let shape = Shape { rows: n, entries: coded.ids.len() };
        let whole = dense.decode_coded(&payload, shape).is_ok();
        if dense.decode(&payload, shape, got.out(), Some(&mut tokens)).is_ok() {
            prop_assert!(whole);
            prop_assert!(got.ids.iter().all(|id| (-1..VOCAB as i32).contains(id)));
            prop_assert!(got.log_probs.iter().chain(&got.log_rest).chain(&got.extra).all(|x| *x <= f32::MAX) );
            prop_assert!(got.ids.chunks(K).zip(got.log_probs.chunks(K)).all(|(_, lp)| lp.windows(2).all(|w| w[1] <= w[0])));
            prop_assert!(tokens.iter().all(|t| *t >= 0));
        }
    }
}

#[test]
fn long_rows_read_back() {
    for k in [1usize, 31, 32, 33, 64, 65, 100, 1500] {
        for (values, ragged) in
            [Values::Shifted { per_nat: 16 }, Values::Fp16].into_iter().flat_map(|v| [(v, false), (v, true)])
        {
            let (n, codec) = (if k > 100 { 5 } else { 90 }, if values == Values::Fp16 { 1 } else { 2 });
            let layout = Layout { codec, values, vocab_size: 3000, k: k as u32, extra: 0, sampled: false };
            let given = long(3000, k, n, ragged);
            let rows = given.rows(k);
            let coded = Coded::new(&layout, &rows, &given.counts).expect("codes");
            let trained = train(layout, &vec![coded.clone(); 1 + 5000 / coded.ids.len().max(1)]).expect("tables");
            let trained = Dense { layout, tables: std::sync::Arc::new(trained) };
            for dense in [Dense::new(layout), trained] {
                let (mut payload, entries) = (Vec::new(), coded.ids.len());
                dense.encode(&coded, 0, n, 0, &mut payload);
                let shape = Shape { rows: n, entries };
                assert_eq!(dense.decode_coded(&payload, shape).expect("the codes"), coded, "k = {k}");
                for read in [n, n - 1, n / 3, 1] {
                    let (mut ids, mut log_probs) = (vec![-9; read * k], vec![f32::NAN; read * k]);
                    let (mut log_rest, mut tokens) = (vec![0f32; read], vec![-9; read]);
                    let out = RowsMut {
                        ids: &mut ids,
                        log_probs: &mut log_probs,
                        log_rest: &mut log_rest,
                        ..RowsMut::default()
                    };
                    dense.decode(&payload, shape, out, Some(&mut tokens)).expect("the rows");
                    assert_eq!(tokens, given.tokens[..read]);
                    for (row, want) in ids.chunks(k).zip(given.ids.chunks(k)) {
                        assert_eq!(sorted(row), sorted(want), "k = {k}");
                    }
                    assert!(log_probs.iter().zip(&given.log_probs).all(|(a, b)| near(&layout, *b, *a)), "k = {k}");
                }
                for end in 0..payload.len().min(400) {
                    let cut = &payload[..end];
                    assert!(dense.decode_coded(cut, shape).is_err(), "a payload of {end} bytes");
                }
            }
        }
    }
}
