//! Which special tokens of two vocabularies belong together.

use std::collections::HashMap;

use crate::xtok::vocab::{flag, Vocab};

/// A number for each class of special tokens that pair: the same role, the same name, or named by the caller. Padding
/// has none.
pub fn pair_roles(student: &Vocab, teacher: &Vocab, pairs: &[(u32, u32)]) -> (Vec<u16>, Vec<u16>) {
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
