//! Hash tables that grow a little at a time. One table of a million entries hashes all of them
//! again when it doubles, which takes a tenth of a second and cannot be interrupted; here a table
//! that is full becomes sixteen.

use std::hash::{BuildHasher, Hash};

use hashbrown::{Equivalent, HashTable, hash_table};
use rustc_hash::FxBuildHasher;

/// Entries at which a table is split. Tests have few, and shall have many tables all the same.
const LEAF: usize = if cfg!(test) { 6 } else { 2_048 };

/// Tables that a full one becomes, as a power of two.
const FAN_BITS: u32 = 4;

/// Splits above a table, at most: entries that agree in all these bits of their hash (equal keys
/// of a broken hash) stay together.
const DEPTH: u32 = 8;

/// See the module. The caller hashes.
#[derive(Debug)]
pub(super) struct Shards<T> {
    root: Node<T>,
    len: usize,
}

#[derive(Debug)]
enum Node<T> {
    Leaf(HashTable<T>),
    Split(Box<[Node<T>; 1 << FAN_BITS]>),
}

impl<T> Default for Shards<T> {
    fn default() -> Self {
        Shards { root: Node::Leaf(HashTable::new()), len: 0 }
    }
}

/// Which of the tables below a split at `depth`. Tables use the lowest and highest bits of a hash
/// themselves, hence the multiplication.
fn branch(hash: u64, depth: u32) -> usize {
    mixed_branch(hash.wrapping_mul(0x9e37_79b9_7f4a_7c15), depth)
}

fn mixed_branch(mixed: u64, depth: u32) -> usize {
    (mixed >> (64 - FAN_BITS * (depth + 1))) as usize & ((1 << FAN_BITS) - 1)
}

/// Where the table begins that is behind the one at `at`, below so many splits.
fn behind(at: u64, depth: u32) -> Option<u64> {
    let shift = 64 - FAN_BITS * depth;
    let next = (at.checked_shr(shift)? + 1).checked_shl(shift)?;
    (next != 0).then_some(next)
}

impl<T> Shards<T> {
    pub(super) fn len(&self) -> usize {
        self.len
    }

    fn leaf(&self, hash: u64) -> &HashTable<T> {
        let (mut node, mut depth) = (&self.root, 0);
        loop {
            match node {
                Node::Leaf(table) => return table,
                Node::Split(nodes) => node = &nodes[branch(hash, depth)],
            }
            depth += 1;
        }
    }

    fn leaf_mut(&mut self, hash: u64) -> &mut HashTable<T> {
        let (mut node, mut depth) = (&mut self.root, 0);
        loop {
            match node {
                Node::Leaf(table) => return table,
                Node::Split(nodes) => node = &mut nodes[branch(hash, depth)],
            }
            depth += 1;
        }
    }

    pub(super) fn find(&self, hash: u64, eq: impl FnMut(&T) -> bool) -> Option<&T> {
        self.leaf(hash).find(hash, eq)
    }

    pub(super) fn find_mut(&mut self, hash: u64, eq: impl FnMut(&T) -> bool) -> Option<&mut T> {
        self.leaf_mut(hash).find_mut(hash, eq)
    }

    /// Inserts an entry that is not there yet. A table that is full first loses the entries that
    /// are not worth keeping.
    pub(super) fn insert_keeping(
        &mut self,
        hash: u64,
        entry: T,
        hasher: impl Fn(&T) -> u64,
        keep: impl Fn(&T) -> bool,
    ) {
        let (table, len) = self.room(hash, &hasher, keep);
        table.insert_unique(hash, entry, hasher);
        *len += 1;
    }

    /// The table of a hash, with room for one more entry, and the number of entries.
    fn room(
        &mut self,
        hash: u64,
        hasher: &impl Fn(&T) -> u64,
        keep: impl Fn(&T) -> bool,
    ) -> (&mut HashTable<T>, &mut usize) {
        let (mut node, mut depth) = (&mut self.root, 0);
        loop {
            let mut splits = false;
            if let Node::Leaf(table) = node
                && table.len() >= LEAF
                && depth < DEPTH
            {
                let before = table.len();
                table.retain(|e| keep(e));
                self.len -= before - table.len();
                splits = table.len() > LEAF / 2;
            }
            if let Node::Leaf(table) = node
                && splits
            {
                let mut tables: [HashTable<T>; 1 << FAN_BITS] =
                    std::array::from_fn(|_| HashTable::with_capacity(LEAF >> FAN_BITS));
                for entry in std::mem::take(table) {
                    let hash = hasher(&entry);
                    tables[branch(hash, depth)].insert_unique(hash, entry, hasher);
                }
                *node = Node::Split(Box::new(tables.map(Node::Leaf)));
            }
            match node {
                Node::Leaf(table) => return (table, &mut self.len),
                Node::Split(nodes) => node = &mut nodes[branch(hash, depth)],
            }
            depth += 1;
        }
    }

    /// Takes an entry out. Tables that become empty give their memory back.
    pub(super) fn remove(
        &mut self,
        hash: u64,
        eq: impl FnMut(&T) -> bool,
        hasher: impl Fn(&T) -> u64,
    ) -> Option<T> {
        let table = self.leaf_mut(hash);
        let (entry, _) = table.find_entry(hash, eq).ok()?.remove();
        if table.is_empty() {
            *table = HashTable::new();
        } else if table.capacity() > 16 && table.capacity() > table.len() * 4 {
            table.shrink_to(table.len() * 2, hasher);
        }
        self.len -= 1;
        if self.len == 0 {
            *self = Shards::default();
        }
        Some(entry)
    }

    fn table(&self, at: u64) -> (&HashTable<T>, Option<u64>) {
        let (mut node, mut depth) = (&self.root, 0);
        loop {
            match node {
                Node::Leaf(table) => return (table, behind(at, depth)),
                Node::Split(nodes) => node = &nodes[mixed_branch(at, depth)],
            }
            depth += 1;
        }
    }

    /// Drops the entries of one table that are not worth keeping: the table at `at`, which is 0 or
    /// what the last call returned. How many entries were looked at, and where the next one is.
    pub(super) fn sweep(
        &mut self,
        at: u64,
        mut keep: impl FnMut(&T) -> bool,
        hasher: impl Fn(&T) -> u64,
    ) -> (usize, Option<u64>) {
        let (mut node, mut depth) = (&mut self.root, 0);
        let table = loop {
            match node {
                Node::Leaf(table) => break table,
                Node::Split(nodes) => node = &mut nodes[mixed_branch(at, depth)],
            }
            depth += 1;
        };
        let before = table.len();
        table.retain(|e| keep(e));
        if table.capacity() > 16 && table.capacity() > table.len() * 4 {
            table.shrink_to(table.len() * 2, hasher);
        }
        self.len -= before - table.len();
        if self.len == 0 {
            *self = Shards::default();
            return (before, None);
        }
        (before, behind(at, depth))
    }

    /// All entries, in no particular order.
    pub(super) fn iter(&self) -> impl Iterator<Item = &T> {
        Leaves { open: vec![std::slice::from_ref(&self.root).iter()] }.flatten()
    }
}

/// The tables of a tree of nodes.
struct Leaves<'a, T> {
    open: Vec<std::slice::Iter<'a, Node<T>>>,
}

impl<'a, T> Iterator for Leaves<'a, T> {
    type Item = &'a HashTable<T>;

    fn next(&mut self) -> Option<Self::Item> {
        while let Some(nodes) = self.open.last_mut() {
            match nodes.next() {
                None => drop(self.open.pop()),
                Some(Node::Leaf(table)) => return Some(table),
                Some(Node::Split(nodes)) => self.open.push(nodes.iter()),
            }
        }
        None
    }
}

/// Takes all entries out, table by table: each is freed once it is through.
#[derive(Debug)]
pub(crate) struct IntoIter<T> {
    open: Vec<Node<T>>,
    table: Option<hash_table::IntoIter<T>>,
    len: usize,
}

impl<T> Iterator for IntoIter<T> {
    type Item = T;

    fn next(&mut self) -> Option<T> {
        loop {
            if let Some(entry) = self.table.as_mut().and_then(Iterator::next) {
                self.len -= 1;
                return Some(entry);
            }
            match self.open.pop()? {
                Node::Leaf(table) => self.table = Some(table.into_iter()),
                Node::Split(nodes) => self.open.extend(*nodes),
            }
        }
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (self.len, Some(self.len))
    }
}

impl<T> ExactSizeIterator for IntoIter<T> {}

impl<T> IntoIterator for Shards<T> {
    type Item = T;
    type IntoIter = IntoIter<T>;

    fn into_iter(self) -> IntoIter<T> {
        IntoIter { open: vec![self.root], table: None, len: self.len }
    }
}

/// A map in [`Shards`].
#[derive(Debug)]
pub(crate) struct ShardMap<K, V>(Shards<(K, V)>);

impl<K, V> Default for ShardMap<K, V> {
    fn default() -> Self {
        ShardMap(Shards::default())
    }
}

fn hash_of<Q: Hash + ?Sized>(key: &Q) -> u64 {
    FxBuildHasher.hash_one(key)
}

impl<K: Hash + Eq, V> ShardMap<K, V> {
    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.len() == 0
    }

    pub(crate) fn get<Q: Hash + Equivalent<K> + ?Sized>(&self, key: &Q) -> Option<&V> {
        self.0.find(hash_of(key), |e| key.equivalent(&e.0)).map(|e| &e.1)
    }

    pub(super) fn get_mut<Q: Hash + Equivalent<K> + ?Sized>(&mut self, key: &Q) -> Option<&mut V> {
        self.0.find_mut(hash_of(key), |e| key.equivalent(&e.0)).map(|e| &mut e.1)
    }

    pub(crate) fn contains_key(&self, key: &K) -> bool {
        self.get(key).is_some()
    }

    /// The value of a key; a new one if it has none.
    pub(crate) fn get_or_insert_with(&mut self, key: K, make: impl FnOnce() -> V) -> &mut V {
        let hash = hash_of(&key);
        let (table, len) = self.0.room(hash, &|e| hash_of(&e.0), |_| true);
        let entry = table.entry(hash, |e| e.0 == key, |e| hash_of(&e.0));
        let entry = match entry {
            hash_table::Entry::Occupied(known) => known.into_mut(),
            hash_table::Entry::Vacant(free) => {
                *len += 1;
                free.insert((key, make())).into_mut()
            }
        };
        &mut entry.1
    }

    /// Sets the value of a key.
    pub(crate) fn insert(&mut self, key: K, value: V) {
        match self.get_mut(&key) {
            Some(known) => *known = value,
            None => {
                let hash = hash_of(&key);
                self.0.insert_keeping(hash, (key, value), |e| hash_of(&e.0), |_| true);
            }
        }
    }

    pub(super) fn remove(&mut self, key: &K) -> Option<V> {
        self.0.remove(hash_of(key), |e| e.0 == *key, |e| hash_of(&e.0)).map(|e| e.1)
    }

    /// The values of one table: the one at `at`, which is 0 or what the last call returned; and
    /// where the next table is. In the same order, as long as the map does not change.
    pub(super) fn table(&self, at: u64) -> (impl Iterator<Item = &V>, Option<u64>) {
        let (table, next) = self.0.table(at);
        (table.iter().map(|e| &e.1), next)
    }

    /// The keys of the same table. The tables are in the order of their keys' hashes: one that is
    /// split meanwhile goes on where it ended.
    pub(super) fn keys_at(&self, at: u64) -> (impl Iterator<Item = &K>, Option<u64>) {
        let (table, next) = self.0.table(at);
        (table.iter().map(|e| &e.0), next)
    }

    pub(super) fn values(&self) -> impl Iterator<Item = &V> {
        self.0.iter().map(|e| &e.1)
    }
}

impl<K, V> IntoIterator for ShardMap<K, V> {
    type Item = (K, V);
    type IntoIter = IntoIter<(K, V)>;

    fn into_iter(self) -> IntoIter<(K, V)> {
        self.0.into_iter()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use rand::rngs::SmallRng;
    use rand::{Rng as _, SeedableRng as _};

    use super::*;

    #[test]
    fn a_map_in_shards_is_a_map() {
        for seed in 0..50 {
            let mut rng = SmallRng::seed_from_u64(seed);
            let (mut map, mut model) = (ShardMap::default(), BTreeMap::new());
            for _ in 0..600 {
                let key = rng.random_range(0..200_u32);
                match rng.random_range(0..5) {
                    0 | 1 => {
                        map.insert(key, seed);
                        model.insert(key, seed);
                    }
                    2 => {
                        *map.get_or_insert_with(key, || 7) += 1;
                        *model.entry(key).or_insert(7) += 1;
                    }
                    _ => assert_eq!(map.remove(&key), model.remove(&key)),
                }
                assert_eq!((map.len(), map.get(&key)), (model.len(), model.get(&key)));
            }
            let mut all: Vec<_> = map.0.iter().copied().collect();
            all.sort_unstable();
            let expected: Vec<_> = model.into_iter().collect();
            assert_eq!(all, expected);
            let (mut values, mut at) = (0, Some(0));
            while let Some(table) = at.map(|at| map.table(at)) {
                values += table.0.count();
                at = table.1;
            }
            assert_eq!(values, map.len());
            let mut taken: Vec<_> = map.into_iter().collect();
            taken.sort_unstable();
            assert_eq!(taken, expected);
        }
    }

    #[test]
    fn one_hash_for_all_is_slow_but_right() {
        let mut shards = Shards::default();
        (0..100_u32).for_each(|n| shards.insert_keeping(3, n, |_| 3, |_| true));
        assert!((0..100).all(|n| shards.find(3, |e| *e == n).is_some()));
        assert!((0..100).all(|n| shards.remove(3, |e| *e == n, |_| 3) == Some(n)));
        assert_eq!(shards.len(), 0);
    }

    #[test]
    fn an_insertion_hashes_no_more_than_one_table() {
        let hashed = std::cell::Cell::new(0);
        let hasher = |n: &u64| {
            hashed.set(hashed.get() + 1);
            hash_of(n)
        };
        let mut shards = Shards::default();
        for n in 0..10_000_u64 {
            hashed.set(0);
            shards.insert_keeping(hash_of(&n), n, hasher, |_| true);
            // Each entry of the table that is split, perhaps once more where it goes.
            assert!(hashed.get() <= 3 * LEAF, "{} hashes", hashed.get());
        }
    }
}
