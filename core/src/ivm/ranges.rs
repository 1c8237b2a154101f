//! Which targets want a value of a column that has an order: each has a lower and an upper bound
//! (over-approximated: both inclusive). Sorted by lower bound in short chunks that know their
//! highest upper bound: a look-up passes over the chunks that cannot match.

use std::cmp::Ordering;

use super::mutant::{self, Mutant};
use super::route::Target;
use crate::value::Value;

/// Most entries of a chunk. Tests have few queries, and shall have many chunks all the same.
const CHUNK: usize = if cfg!(test) { 3 } else { 128 };

/// From and to, inclusive; `None` is without a bound.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Range {
    pub(super) from: Option<Value>,
    pub(super) to: Option<Value>,
}

impl Range {
    fn begins_behind(&self, value: &Value) -> bool {
        let exclusive = mutant::is(Mutant::RangeWithoutBounds);
        self.from.as_ref().is_some_and(|from| from > value || (exclusive && from == value))
    }

    fn ends_before(&self, value: &Value) -> bool {
        self.to.as_ref().is_some_and(|to| to < value)
    }

    /// By lower bound, then by upper bound: none is the lowest of the one, the highest of the
    /// other.
    fn place(&self, o: &Range) -> Ordering {
        self.from.cmp(&o.from).then_with(|| highest(&self.to, &o.to))
    }
}

fn highest(a: &Option<Value>, b: &Option<Value>) -> Ordering {
    match (a, b) {
        (Some(a), Some(b)) => a.cmp(b),
        _ => b.is_some().cmp(&a.is_some()),
    }
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Ranges {
    chunks: Vec<Chunk>,
}

#[derive(Debug)]
struct Chunk {
    entries: Vec<(Range, Target)>,
    /// The highest upper bound.
    to: Option<Value>,
}

impl Chunk {
    fn new(entries: Vec<(Range, Target)>) -> Chunk {
        let to = entries.iter().map(|e| &e.0.to).max_by(|a, b| highest(a, b));
        Chunk { to: to.cloned().flatten(), entries }
    }
}

fn place(a: &(Range, Target), b: &(Range, Target)) -> Ordering {
    a.0.place(&b.0).then_with(|| a.1.cmp(&b.1))
}

impl Ranges {
    pub(super) fn is_empty(&self) -> bool {
        self.chunks.is_empty()
    }

    pub(super) fn len(&self) -> usize {
        self.chunks.iter().map(|c| c.entries.len()).sum()
    }

    fn chunk_of(&self, entry: &(Range, Target)) -> usize {
        let before = |c: &Chunk| c.entries.last().is_some_and(|e| place(e, entry).is_lt());
        self.chunks.partition_point(before)
    }

    pub(super) fn add(&mut self, range: Range, target: Target) {
        let entry = (range, target);
        let at = self.chunk_of(&entry).min(self.chunks.len().saturating_sub(1));
        let Some(chunk) = self.chunks.get_mut(at) else {
            self.chunks.push(Chunk::new(vec![entry]));
            return;
        };
        let Err(index) = chunk.entries.binary_search_by(|e| place(e, &entry)) else { return };
        if highest(&chunk.to, &entry.0.to).is_lt() {
            chunk.to.clone_from(&entry.0.to);
        }
        chunk.entries.insert(index, entry);
        if chunk.entries.len() > CHUNK {
            let upper = chunk.entries.split_off(CHUNK / 2);
            let lower = std::mem::take(&mut chunk.entries);
            *chunk = Chunk::new(lower);
            self.chunks.insert(at + 1, Chunk::new(upper));
        }
    }

    /// Takes back [`Ranges::add`].
    pub(super) fn remove(&mut self, range: &Range, target: Target) {
        let entry = (range.clone(), target);
        let at = self.chunk_of(&entry);
        let Some(chunk) = self.chunks.get_mut(at) else { return };
        let Ok(index) = chunk.entries.binary_search_by(|e| place(e, &entry)) else { return };
        chunk.entries.remove(index);
        if chunk.entries.is_empty() {
            self.chunks.remove(at);
        } else if chunk.to == range.to {
            *chunk = Chunk::new(std::mem::take(&mut chunk.entries));
        }
    }

    /// Appends the targets whose range has the value.
    pub(super) fn find(&self, value: &Value, out: &mut Vec<Target>) {
        for chunk in &self.chunks {
            if chunk.entries.first().is_none_or(|e| e.0.begins_behind(value)) {
                return;
            }
            if chunk.to.as_ref().is_some_and(|to| to < value) {
                continue;
            }
            let begun = chunk.entries.iter().take_while(|e| !e.0.begins_behind(value));
            out.extend(begun.filter(|e| !e.0.ends_before(value)).map(|e| e.1));
        }
    }
}

#[cfg(test)]
mod tests {
    use rand::rngs::SmallRng;
    use rand::{Rng as _, SeedableRng as _};

    use super::*;
    use crate::ivm::plan::NodeId;
    use crate::ivm::route::Who;

    fn bound(rng: &mut SmallRng) -> Option<Value> {
        match rng.random_range(0..8) {
            0 => None,
            1 => Some(Value::Null),
            n => Some(Value::Number(f64::from(n))),
        }
    }

    #[test]
    fn a_look_up_finds_the_ranges_that_a_scan_finds() {
        for seed in 0..100 {
            let mut rng = SmallRng::seed_from_u64(seed);
            let (mut ranges, mut model) = (Ranges::default(), Vec::new());
            for n in 0..100 {
                if rng.random_ratio(2, 3) || model.is_empty() {
                    let range = Range { from: bound(&mut rng), to: bound(&mut rng) };
                    let target = Target { plan: n, node: NodeId(0), who: Who::Group(0) };
                    ranges.add(range.clone(), target);
                    model.push((range, target));
                } else {
                    let (range, target) = model.swap_remove(rng.random_range(0..model.len()));
                    ranges.remove(&range, target);
                }
                assert_eq!(ranges.len(), model.len());
                let value = bound(&mut rng).unwrap_or(Value::Bool(true));
                let mut found = Vec::new();
                ranges.find(&value, &mut found);
                found.sort_unstable();
                let wants = |r: &Range| {
                    r.from.as_ref().is_none_or(|from| *from <= value)
                        && r.to.as_ref().is_none_or(|to| value <= *to)
                };
                let mut expected: Vec<Target> =
                    model.iter().filter(|e| wants(&e.0)).map(|e| e.1).collect();
                expected.sort_unstable();
                assert_eq!(found, expected, "seed {seed}");
            }
            model.iter().for_each(|(range, target)| ranges.remove(range, *target));
            assert!(ranges.is_empty());
        }
    }
}
