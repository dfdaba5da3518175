//! Properties of the whole cache: what is written is read, and damage is never data.

use potstill_core::reader::Wanted;
use potstill_core::verify::verify;
use potstill_core::{Reader, Rows, RowsMut, Writer};
use proptest::prelude::*;

#[derive(Debug, Clone)]
struct Sequence {
    tokens: Vec<i32>,
    ids: Vec<i32>,
    log_probs: Vec<f32>,
    log_rest: Vec<f32>,
}

const VOCAB: i32 = 777;
const K: usize = 5;
const SPEC: &str = r#"{"vocab_size":777,"k":5}"#;

// a row of distinct ids, sorted by probability, with missing entries at its end
fn row() -> impl Strategy<Value = (Vec<i32>, Vec<f32>, f32)> {
    let ids = proptest::sample::subsequence((0..VOCAB).collect::<Vec<_>>(), 0..=K).prop_shuffle();
    (ids, proptest::collection::vec(2.0f32..40.0, K), 2.0f32..30.0, any::<bool>()).prop_map(
        |(mut ids, mut surprisals, rest, infinite)| {
            surprisals.sort_by(f32::total_cmp);
            let mut log_probs: Vec<f32> = surprisals.iter().take(ids.len()).map(|s| -s).collect();
            if let Some(last) = log_probs.last_mut().filter(|_| infinite) {
                *last = f32::NEG_INFINITY;
            }
            ids.resize(K, -1);
            log_probs.resize(K, f32::NEG_INFINITY);
            (ids, log_probs, -rest)
        },
    )
}

fn sequence() -> impl Strategy<Value = Sequence> {
    proptest::collection::vec((row(), 0..i32::MAX), 1..30).prop_map(|rows| {
        let mut s = Sequence { tokens: vec![], ids: vec![], log_probs: vec![], log_rest: vec![] };
        for ((ids, log_probs, rest), token) in rows {
            s.tokens.push(token);
            s.ids.extend(ids);
            s.log_probs.extend(log_probs);
            s.log_rest.push(rest);
        }
        s
    })
}

impl Sequence {
    fn rows(&self) -> Rows<'_> {
        Rows {
            k: K,
            tokens: &self.tokens,
            ids: &self.ids,
            log_probs: &self.log_probs,
            log_rest: &self.log_rest,
            ..Rows::default()
        }
    }

    fn empty(rows: usize) -> Sequence {
        Sequence {
            tokens: vec![-9; rows],
            ids: vec![-9; rows * K],
            log_probs: vec![f32::NAN; rows * K],
            log_rest: vec![f32::NAN; rows],
        }
    }

    fn out(&mut self) -> RowsMut<'_> {
        RowsMut {
            ids: &mut self.ids,
            log_probs: &mut self.log_probs,
            log_rest: &mut self.log_rest,
            ..RowsMut::default()
        }
    }

    fn same(&self, other: &Sequence) -> bool {
        let near = |(a, b): (&f32, &f32)| a == b || (a - b).abs() <= b.abs() / 2048.0;
        self.ids == other.ids
            && self.log_rest == other.log_rest
            && self.log_probs.iter().zip(&other.log_probs).all(near)
    }
}

fn write(root: &std::path::Path, sequences: &[Sequence], shard_bytes: u64) {
    let mut writer = Writer::open(root, SPEC, true, shard_bytes).expect("a writer");
    for (i, s) in sequences.iter().enumerate() {
        assert!(writer.add(&format!("s{i}"), &s.rows()).expect("added"));
    }
    writer.close().expect("closed");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn what_is_written_is_read(sequences in proptest::collection::vec(sequence(), 1..6), small in any::<bool>()) {
        let dir = tempfile::tempdir().expect("a folder");
        let root = dir.path().join("c");
        write(&root, &sequences, if small { 200 } else { 1 << 20 });
        let reader = Reader::open(&root).expect("a cache");
        prop_assert_eq!(reader.len(), sequences.len());
        for (i, s) in sequences.iter().enumerate() {
            let n = reader.require(&format!("s{i}")).expect("the key");
            let mut got = Sequence::empty(s.tokens.len());
            let mut tokens = got.tokens.clone();
            reader.read_sequence(n, &mut tokens, got.out()).expect("the rows");
            prop_assert_eq!(&tokens, &s.tokens);
            prop_assert!(got.same(s));
        }
        prop_assert!(verify(&root, true).ok);
    }

    #[test]
    fn a_prefix_reads_the_same_rows(s in sequence(), cut in 0usize..30) {
        let dir = tempfile::tempdir().expect("a folder");
        let root = dir.path().join("c");
        write(&root, std::slice::from_ref(&s), 1 << 20);
        let reader = Reader::open(&root).expect("a cache");
        let rows = cut.min(s.tokens.len());
        let mut got = Sequence::empty(s.tokens.len());
        let wanted = [Wanted { sequence: 0, rows, tokens: Some(&s.tokens[..rows]) }];
        reader.read_batch(&wanted, s.tokens.len(), got.out(), 1).expect("the rows");
        prop_assert_eq!(&got.ids[..rows * K], &s.ids[..rows * K]);
        prop_assert!(got.ids[rows * K..].iter().all(|id| *id == -1));
        prop_assert!(got.log_rest[rows..].iter().all(|r| *r == 0.0));
    }

    #[test]
    fn damage_is_never_data(s in sequence(), place in any::<prop::sample::Index>(), bits in 1u8..=255) {
        let dir = tempfile::tempdir().expect("a folder");
        let root = dir.path().join("c");
        write(&root, std::slice::from_ref(&s), 1 << 20);
        let shard = std::fs::read_dir(root.join("shards")).expect("shards").next().expect("one").expect("readable").path();
        let mut bytes = std::fs::read(&shard).expect("bytes");
        let at = place.index(bytes.len());
        bytes[at] ^= bits;
        std::fs::write(&shard, &bytes).expect("written");
        let report = verify(&root, true);
        prop_assert!(!report.ok && !report.problems.is_empty());
        if let Ok(reader) = Reader::open(&root) {
            let mut got = Sequence::empty(s.tokens.len());
            let mut tokens = got.tokens.clone();
            prop_assert!(reader.read_sequence(0, &mut tokens, got.out()).is_err());
        }
    }
}
