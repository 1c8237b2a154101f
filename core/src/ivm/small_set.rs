//! Sorted sets: most have one element or a few, some a hundred thousand, of which any is taken out
//! in logarithmic time.

use std::collections::{BTreeSet, btree_set};

use smallvec::SmallVec;

/// Elements at which a sorted vector becomes a tree. Tests have few, and shall have trees too.
const FEW: usize = if cfg!(test) { 3 } else { 64 };

/// See the module.
#[derive(Debug)]
pub(super) enum SmallSet<T> {
    Few(SmallVec<[T; 1]>),
    Many(BTreeSet<T>),
}

impl<T> Default for SmallSet<T> {
    fn default() -> Self {
        SmallSet::Few(SmallVec::new())
    }
}

impl<T: Ord + Copy> SmallSet<T> {
    pub(super) fn len(&self) -> usize {
        match self {
            SmallSet::Few(all) => all.len(),
            SmallSet::Many(all) => all.len(),
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub(super) fn first(&self) -> Option<T> {
        match self {
            SmallSet::Few(all) => all.first().copied(),
            SmallSet::Many(all) => all.first().copied(),
        }
    }

    pub(super) fn contains(&self, element: T) -> bool {
        match self {
            SmallSet::Few(all) => all.binary_search(&element).is_ok(),
            SmallSet::Many(all) => all.contains(&element),
        }
    }

    pub(super) fn insert(&mut self, element: T) {
        match self {
            SmallSet::Few(all) => {
                if let Err(at) = all.binary_search(&element) {
                    all.insert(at, element);
                }
                if all.len() > FEW {
                    *self = SmallSet::Many(all.iter().copied().collect());
                }
            }
            SmallSet::Many(all) => {
                all.insert(element);
            }
        }
    }

    pub(super) fn remove(&mut self, element: T) {
        match self {
            SmallSet::Few(all) => {
                if let Ok(at) = all.binary_search(&element) {
                    all.remove(at);
                }
            }
            SmallSet::Many(all) => {
                all.remove(&element);
                if all.len() <= FEW / 2 {
                    *self = SmallSet::Few(all.iter().copied().collect());
                }
            }
        }
    }

    /// All elements, ascending.
    pub(super) fn iter(&self) -> Iter<'_, T> {
        match self {
            SmallSet::Few(all) => Iter::Few(all.iter()),
            SmallSet::Many(all) => Iter::Many(all.iter()),
        }
    }
}

/// The elements of a set.
#[derive(Debug)]
pub(super) enum Iter<'a, T> {
    Few(std::slice::Iter<'a, T>),
    Many(btree_set::Iter<'a, T>),
}

impl<T: Copy> Iterator for Iter<'_, T> {
    type Item = T;

    fn next(&mut self) -> Option<T> {
        match self {
            Iter::Few(all) => all.next().copied(),
            Iter::Many(all) => all.next().copied(),
        }
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        match self {
            Iter::Few(all) => all.size_hint(),
            Iter::Many(all) => all.size_hint(),
        }
    }
}

#[cfg(test)]
mod tests {
    use rand::rngs::SmallRng;
    use rand::{Rng as _, SeedableRng as _};

    use super::*;

    /// Whatever order they are taken out in: none moves all others.
    #[test]
    fn many_elements_are_a_tree() {
        let mut set = SmallSet::default();
        for n in 0..1_000_u32 {
            set.insert(n * 7 % 1_000);
            assert_eq!(matches!(set, SmallSet::Many(_)), n as usize >= FEW);
        }
        for n in 0..1_000_u32 {
            set.remove(n * 11 % 1_000);
            assert!(matches!(set, SmallSet::Many(_)) || set.len() <= FEW);
        }
        assert!(set.is_empty());
    }

    #[test]
    fn a_small_set_is_a_set() {
        for seed in 0..100 {
            let mut rng = SmallRng::seed_from_u64(seed);
            let (mut set, mut model) = (SmallSet::default(), BTreeSet::new());
            for _ in 0..200 {
                let n = rng.random_range(0..12_u32);
                if rng.random_ratio(1, 2) {
                    set.insert(n);
                    model.insert(n);
                } else {
                    set.remove(n);
                    model.remove(&n);
                }
                assert!(set.iter().eq(model.iter().copied()), "seed {seed}");
                assert_eq!((set.len(), set.contains(n)), (model.len(), model.contains(&n)));
                assert_eq!(set.first(), model.first().copied());
            }
        }
    }
}
