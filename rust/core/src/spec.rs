//! The spec of a cache: a JSON object, the same for every shard, bound to each by its SHA-256.

use std::fmt;

use serde::de::{Error as _, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

use crate::codec::dense::{Layout, Values, MAX_EXTRA, MAX_VOCAB as MAX_DENSE_VOCAB, NO_ENTRIES, NUMBER, NUMBER_2};
use crate::columns::{self, Column};

/// A row holds at most this many entries (its count is a u16).
pub const MAX_K: u64 = 65_535;
/// Ids are non-negative i32.
pub const MAX_VOCAB: u64 = i32::MAX as u64;
const MAX_TEXT: usize = 1 << 20;

#[derive(Debug, Clone)]
pub struct Spec {
    pub vocab_size: u32,
    pub k: u32,
    /// The exact bytes that are stored and hashed.
    pub text: String,
    pub hash: [u8; 32],
    /// How the dense codec stores rows; None for the plain one.
    pub layout: Option<Layout>,
    /// What sequences have besides rows.
    pub columns: Vec<Column>,
    fields: Map<String, Value>,
}

pub fn sha256(parts: &[&[u8]]) -> [u8; 32] {
    let mut hasher = Sha256::new();
    for part in parts {
        hasher.update(part);
    }
    hasher.finalize().into()
}

pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// Members of an object, each of another name: of two that are called alike readers may choose either.
struct Members(Map<String, Value>);

impl<'de> Deserialize<'de> for Members {
    fn deserialize<D: Deserializer<'de>>(text: D) -> Result<Members, D::Error> {
        text.deserialize_map(Each)
    }
}

struct Each;

impl<'de> Visitor<'de> for Each {
    type Value = Members;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a JSON object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Members, A::Error> {
        let mut members = Map::new();
        while let Some(name) = map.next_key::<String>()? {
            if members.contains_key(&name) {
                return Err(A::Error::custom(format!("{name:?} stands there twice")));
            }
            members.insert(name, map.next_value()?);
        }
        Ok(Members(members))
    }
}

fn fields(text: &str) -> Result<Map<String, Value>, String> {
    let members: Members = serde_json::from_str(text).map_err(|e| format!("the spec cannot be read: {e}"))?;
    Ok(members.0)
}

fn number(fields: &Map<String, Value>, name: &str, least: u64, max: u64) -> Result<u32, String> {
    let value = fields.get(name).ok_or_else(|| format!("the spec has no {name}"))?;
    match value.as_u64() {
        Some(n) if (least..=max).contains(&n) => Ok(n as u32),
        _ => Err(format!("the spec's {name} is {value}, an integer from {least} to {max} is accepted")),
    }
}

// values: a name, plain where it is missing; temperatures: numbers, of which 1 is log_rest itself; sampled and
// token_log_probs: true or false
fn layout(fields: &Map<String, Value>, vocab_size: u32, k: u32) -> Result<Option<Layout>, String> {
    let flag = |name: &str| match fields.get(name) {
        None => Ok(false),
        Some(Value::Bool(b)) => Ok(*b),
        Some(other) => Err(format!("the spec's {name} is {other}, true or false is accepted")),
    };
    let none = Vec::new();
    let temperatures = match fields.get("temperatures") {
        None => &none,
        Some(Value::Array(list)) => list,
        Some(other) => return Err(format!("the spec's temperatures are {other}, a list is accepted")),
    };
    let mut others: Vec<f64> = temperatures.iter().filter_map(Value::as_f64).collect();
    if others.len() != temperatures.len() || others.iter().any(|t| !(t.is_finite() && *t > 0.0)) {
        return Err(format!("the spec's temperatures are {temperatures:?}, positive numbers are accepted"));
    }
    others.sort_by(f64::total_cmp);
    if others.windows(2).any(|w| w[0] == w[1]) {
        return Err(format!("the spec's temperatures are {temperatures:?}, each may stand there once"));
    }
    others.retain(|t| *t != 1.0);
    let (sampled, token) = (flag("sampled")?, flag("token_log_probs")?);
    let extra = others.len() + usize::from(token);
    let name = match fields.get("values") {
        None => "plain",
        Some(Value::String(name)) => name.as_str(),
        Some(other) => return Err(format!("the spec's values are {other}, a string is accepted")),
    };
    let Some(values) = Values::from_name(name)? else {
        return match extra > 0 || sampled {
            false if k == 0 => Err(NO_ENTRIES.to_string()),
            true => Err("plain values have no further columns; give values = \"1/16\" or others".to_string()),
            false => Ok(None),
        };
    };
    let codec = match fields.get("codec") {
        None => NUMBER,
        Some(value) if value.as_u64() == Some(u64::from(NUMBER_2)) => NUMBER_2,
        Some(other) => return Err(format!("the spec's codec is {other}; 2, or none for codec 1, is accepted")),
    };
    let values = if codec == NUMBER { values } else { values.of_codec_2() };
    if vocab_size > MAX_DENSE_VOCAB {
        let what =
            format!("a vocabulary of {vocab_size}; at most {MAX_DENSE_VOCAB} is accepted unless values are plain");
        return Err(what);
    }
    if extra > MAX_EXTRA {
        return Err(format!("{extra} further columns, at most {MAX_EXTRA} are accepted"));
    }
    let layout = Layout { codec, values, vocab_size, k, extra, sampled };
    layout.check()?;
    if k == 0 && !token {
        return Err(NO_ENTRIES.to_string());
    }
    Ok(Some(layout))
}

impl Spec {
    /// A stored spec: its text is kept as it is.
    pub fn from_stored(text: &str) -> Result<Spec, String> {
        if text.len() > MAX_TEXT {
            return Err(format!("the spec has {} bytes, at most {MAX_TEXT} are accepted", text.len()));
        }
        let fields = fields(text)?;
        let vocab_size = number(&fields, "vocab_size", 1, MAX_VOCAB)?;
        let k = number(&fields, "k", 0, MAX_K)?;
        if k > vocab_size {
            return Err(format!("the spec's k = {k} is above its vocab_size = {vocab_size}"));
        }
        let layout = layout(&fields, vocab_size, k)?;
        let columns = columns::from_spec(fields.get("columns"))?;
        Ok(Spec { vocab_size, k, text: text.to_string(), hash: sha256(&[text.as_bytes()]), layout, columns, fields })
    }

    /// A spec given by a caller: stored with sorted names and no spaces.
    pub fn from_caller(text: &str) -> Result<Spec, String> {
        let fields = fields(text)?;
        let text = serde_json::to_string(&fields).map_err(|e| format!("the spec cannot be written as JSON: {e}"))?;
        Spec::from_stored(&text)
    }

    /// The first field that differs: its name, the value here, the value there.
    pub fn difference(&self, other: &Spec) -> Option<(String, String, String)> {
        let show = |v: Option<&Value>| v.map_or("nothing".to_string(), Value::to_string);
        let names = self.fields.keys().chain(other.fields.keys());
        for name in names {
            let (a, b) = (self.fields.get(name), other.fields.get(name));
            if a == b {
                continue;
            }
            if let (Some(Value::Object(x)), Some(Value::Object(y))) = (a, b) {
                if let Some(inner) = x.keys().chain(y.keys()).find(|n| x.get(*n) != y.get(*n)) {
                    return Some((format!("{name}.{inner}"), show(x.get(inner)), show(y.get(inner))));
                }
            }
            return Some((name.clone(), show(a), show(b)));
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_the_differing_field() {
        let a = Spec::from_caller(r#"{"vocab_size":100,"k":4,"extra":{"x":1}}"#).expect("a spec");
        let b = Spec::from_caller(r#"{"k":4,"vocab_size":100,"extra":{"x":2}}"#).expect("a spec");
        assert_eq!(a.difference(&b), Some(("extra.x".into(), "1".into(), "2".into())));
        assert_eq!(a.difference(&a.clone()), None);
        assert!(a.text.starts_with(r#"{"extra""#));
    }

    #[test]
    fn refuses_impossible_sizes() {
        for text in [
            "[]",
            "{}",
            r#"{"vocab_size":8,"k":1,"k":2}"#,
            r#"{"vocab_size":0,"k":1}"#,
            r#"{"vocab_size":8,"k":9}"#,
            r#"{"vocab_size":1e9,"k":1}"#,
        ] {
            assert!(Spec::from_stored(text).is_err(), "{text}");
        }
        let without_entries = |more: &str| Spec::from_stored(&format!(r#"{{"vocab_size":8,"k":0{more}}}"#));
        for more in ["", r#","values":"fp16""#, r#","values":"fp16","temperatures":[2.0]"#] {
            assert!(without_entries(more).is_err(), "{more}");
        }
        let token = r#","token_log_probs":true,"values":"#;
        assert!(without_entries(&format!(r#"{token}"bf16_logits""#)).is_err());
        assert!(without_entries(&format!(r#"{token}"1/16","sampled":true"#)).is_err());
        assert!(without_entries(&format!(r#"{token}"1/16","codec":2"#)).is_ok_and(|spec| spec.k == 0));
        assert!(Spec::from_stored(r#"{"vocab_size":4294967296,"k":1}"#).is_err());
    }
}
