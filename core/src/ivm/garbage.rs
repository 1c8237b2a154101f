//! What nobody needs any more and is too much to drop at once: lists of keys, of rows, of deltas.

use std::fmt;
use std::hash::Hash;

use super::engine::Budget;
use super::shards::ShardMap;

/// Fewer elements are dropped at once. Tests have few, and shall give them back all the same.
const AT_ONCE: usize = if cfg!(test) { 2 } else { 64 };

/// Elements that are given back at a time, for a unit.
const GIVEN_BACK: usize = 8;

/// See the module.
#[derive(Default)]
pub(super) struct Garbage(Vec<Box<dyn Iterator<Item = ()> + Send>>);

impl fmt::Debug for Garbage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Garbage").field(&self.0.len()).finish()
    }
}

impl Garbage {
    /// Takes a list over.
    pub(super) fn add<I>(&mut self, list: I)
    where
        I: IntoIterator,
        I::Item: 'static,
        I::IntoIter: Send + 'static,
    {
        let elements = list.into_iter();
        // Most lists are short: not worth a box.
        if elements.size_hint().1.is_none_or(|most| most > AT_ONCE) {
            self.0.push(Box::new(elements.map(drop)));
        }
    }

    /// The same for a map, of which only the keys are worth the trouble.
    pub(super) fn add_keys<K, V>(&mut self, map: ShardMap<K, V>)
    where
        K: Hash + Eq + Send + 'static,
        V: Send + 'static,
    {
        if map.len() > AT_ONCE {
            self.add(map);
        }
    }

    /// Takes all of another one over.
    pub(super) fn append(&mut self, mut other: Garbage) {
        self.0.append(&mut other.0);
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Gives elements back, until none is left (true) or the budget is spent.
    pub(super) fn give_back(&mut self, budget: &mut Budget) -> bool {
        while let Some(list) = self.0.last_mut() {
            if list.by_ref().take(GIVEN_BACK).count() == 0 {
                self.0.pop();
            }
            budget.spend(1);
            if budget.is_spent() {
                return self.0.is_empty();
            }
        }
        true
    }
}
