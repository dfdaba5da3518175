//! The decoders over whole, cut and damaged bytes in memory: small enough for `cargo miri test --test decoder`, which
//! tells of every read outside its bounds (`make miri`; no file is opened).

mod common;

use std::sync::Arc;

use potstill_core::codec::dense::{train, Coded, Dense, Layout, Tables, Values};
use potstill_core::codec::plain::Plain;
use potstill_core::codec::{Codec, Shape};
use potstill_core::format::{block, footer, header};
use potstill_core::RowsMut;

use common::{long, sorted, Given};

const VOCAB: u32 = 300;
/// Entries of a row, above the 32 that are decoded at once.
const K: usize = 37;
const ROWS: usize = 3;

fn decode(codec: &Codec, payload: &[u8], shape: Shape, rows: usize) -> Option<(Vec<i32>, Vec<i32>)> {
    let (mut tokens, mut ids) = (vec![-9; rows], vec![-9; rows * K]);
    let (mut log_probs, mut log_rest) = (vec![f32::NAN; rows * K], vec![f32::NAN; rows]);
    let out = RowsMut { ids: &mut ids, log_probs: &mut log_probs, log_rest: &mut log_rest, ..RowsMut::default() };
    codec.decode(payload, shape, out, Some(&mut tokens)).ok()?;
    assert!(ids.iter().all(|id| (-1..VOCAB as i32).contains(id)) && tokens.iter().all(|t| *t >= 0));
    assert!(log_probs.iter().all(|lp| *lp <= 0.0));
    Some((tokens, ids))
}

// whole, in part, cut and with flipped bits
fn exercise(codec: &Codec, payload: &[u8], given: &Given) {
    let shape = Shape { rows: ROWS, entries: given.counts.iter().map(|c| usize::from(*c)).sum() };
    for rows in [ROWS, 1] {
        let (tokens, ids) = decode(codec, payload, shape, rows).expect("the rows");
        assert_eq!(tokens, given.tokens[..rows]);
        for (row, want) in ids.chunks(K).zip(given.ids.chunks(K)) {
            assert_eq!(sorted(row), sorted(want));
        }
    }
    let (cuts, flips) = if cfg!(miri) { (29, 23) } else { (1, 1) };
    for end in (0..payload.len()).step_by(cuts) {
        assert!(decode(codec, &payload[..end], shape, ROWS).is_none(), "{end} bytes");
    }
    for at in (0..payload.len()).step_by(flips) {
        let mut changed = payload.to_vec();
        changed[at] ^= 1 << (at % 8);
        decode(codec, &changed, shape, ROWS);
        let _ = codec.decode_tokens(&changed, shape, &mut [0; ROWS]);
    }
}

fn dense(values: Values) {
    for ragged in [false, true] {
        let codec = if let Values::Shifted { .. } = values { 2 } else { 1 };
        let layout = Layout { codec, values, vocab_size: VOCAB, k: K as u32, extra: 0, sampled: false };
        let given = long(VOCAB as usize, K, ROWS, ragged);
        let coded = Coded::new(&layout, &given.rows(K), &given.counts).expect("codes");
        let mut codecs = vec![Dense::new(layout)];
        if !cfg!(miri) && !ragged {
            let tables = train(layout, &vec![coded.clone(); 4096 / coded.ids.len() + 1]).expect("tables");
            codecs.push(Dense { layout, tables: Arc::new(tables) });
        }
        for dense in codecs {
            let stored = &dense.tables.bytes;
            let tables = Tables::decode(stored, layout).expect("tables");
            assert!(Tables::decode(&stored[..stored.len() / 2], layout).is_err());
            let dense = Dense { layout, tables: Arc::new(tables) };
            let mut payload = Vec::new();
            dense.encode(&coded, 0, ROWS, 0, &mut payload);
            exercise(&Codec::Dense(dense), &payload, &given);
        }
    }
}

#[test]
fn shifted_payloads() {
    dense(Values::Shifted { per_nat: 16 });
}

#[test]
fn grid_payloads() {
    dense(Values::Grid { per_nat: 8 });
}

#[test]
fn half_and_whole_payloads() {
    dense(Values::Fp16);
    dense(Values::Fp32);
}

#[test]
fn plain_payloads() {
    for ragged in [false, true] {
        let (given, plain) = (long(VOCAB as usize, K, ROWS, ragged), Plain::new(VOCAB, K as u32));
        let mut payload = Vec::new();
        plain.encode(&given.rows(K), &given.counts, &mut payload);
        exercise(&Codec::Plain(plain), &payload, &given);
    }
}

/// Header, index and block of lengths and counts that nobody wrote.
#[test]
fn structures_of_any_bytes() {
    let mut seed = 1u32;
    for len in [0usize, 7, 8, 31, 32, 40, 88, 160] {
        for round in 0..if cfg!(miri) { 3 } else { 300 } {
            let mut bytes: Vec<u8> = (0..len)
                .map(|_| {
                    seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    if round % 2 == 0 {
                        (seed >> 24) as u8 & 3
                    } else {
                        (seed >> 24) as u8
                    }
                })
                .collect();
            let magics: [&[u8]; 3] = [&block::MAGIC, &footer::MAGIC, &header::MAGIC];
            for magic in magics {
                if len >= 40 {
                    bytes[..magic.len()].copy_from_slice(magic);
                    let sum = potstill_core::bytes::checksum(&bytes[..len - 8]).to_le_bytes();
                    bytes[len - 8..].copy_from_slice(&sum);
                }
                let _ = block::decode(&bytes);
                let _ = footer::Footer::decode(&bytes, 64);
                if header::length(&bytes).is_ok_and(|n| n == len) {
                    let _ = header::decode(&bytes);
                }
                let _ = footer::decode_trailer(&bytes, 4096, 88);
            }
        }
    }
}
