//! Rows in a total order, as a vector of short vectors: inserting and removing moves a few hundred
//! pointers at most, reading in order is reading arrays. Few rows are one plain vector.

use std::cmp::Ordering;

use super::partition::Order;
use crate::row::{Row, RowRef};
use crate::zql::order::compare_rows;

/// Most rows of a chunk. Tests have small tables, and shall have many chunks all the same.
const CHUNK: usize = if cfg!(test) { 4 } else { 256 };

/// See the module.
#[derive(Debug)]
pub(super) enum Rows {
    /// At most [`CHUNK`] rows.
    Few(Vec<RowRef>),
    Many(Box<Many>),
}

/// More rows: no chunk is empty, and there is at least one.
#[derive(Debug)]
pub(super) struct Many {
    chunks: Vec<Vec<RowRef>>,
    len: usize,
}

/// A place among rows; only good until they change.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place {
    chunk: usize,
    index: usize,
}

/// Inserts with room for a quarter more at most: a vector left alone takes as much again.
fn insert(rows: &mut Vec<RowRef>, at: usize, row: RowRef) {
    if rows.len() == rows.capacity() {
        rows.reserve_exact(rows.len() / 4 + 1);
    }
    rows.insert(at, row);
}

/// Gives room back when more than half of it is empty.
fn trim(rows: &mut Vec<RowRef>) {
    if rows.capacity() > rows.len() * 2 + 2 {
        rows.shrink_to(rows.len() + rows.len() / 4);
    }
}

impl Default for Rows {
    fn default() -> Self {
        Rows::Few(Vec::new())
    }
}

impl Rows {
    /// Rows in this order already.
    pub(super) fn from_sorted(mut rows: Vec<RowRef>) -> Rows {
        let len = rows.len();
        if len <= CHUNK {
            if rows.capacity() > len + len / 4 {
                rows.shrink_to_fit();
            }
            return Rows::Few(rows);
        }
        // Not full: room for rows between.
        let fill = CHUNK - CHUNK / 4;
        let mut chunks = Vec::with_capacity(len.div_ceil(fill));
        let mut rows = rows.into_iter();
        while rows.len() > 0 {
            chunks.push(rows.by_ref().take(fill).collect());
        }
        Rows::Many(Box::new(Many { chunks, len }))
    }

    fn chunks(&self) -> &[Vec<RowRef>] {
        match self {
            Rows::Few(rows) => std::slice::from_ref(rows),
            Rows::Many(many) => &many.chunks,
        }
    }

    pub(super) fn len(&self) -> usize {
        match self {
            Rows::Few(rows) => rows.len(),
            Rows::Many(many) => many.len,
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub(super) fn last(&self) -> Option<&RowRef> {
        self.chunks().last().and_then(|c| c.last())
    }

    /// All rows, in order.
    pub(super) fn iter(&self) -> impl Iterator<Item = &RowRef> {
        self.chunks().iter().flatten()
    }

    /// Rows from a rank on.
    pub(super) fn iter_from(&self, rank: usize) -> impl Iterator<Item = &RowRef> {
        let (mut chunk, mut index) = (0, rank);
        let chunks = self.chunks();
        while chunks.get(chunk).is_some_and(|c| index >= c.len()) {
            index -= chunks[chunk].len();
            chunk += 1;
        }
        self.iter_at(Place { chunk, index })
    }

    fn iter_at(&self, at: Place) -> impl Iterator<Item = &RowRef> {
        let chunks = self.chunks().get(at.chunk..).unwrap_or_default();
        let first = chunks.first().and_then(|c| c.get(at.index..)).unwrap_or_default();
        first.iter().chain(chunks.get(1..).unwrap_or_default().iter().flatten())
    }

    /// Rows from the first one on that is not before what `place` compares them with.
    pub(super) fn iter_since(
        &self,
        place: impl Fn(&Row) -> Ordering,
    ) -> impl Iterator<Item = &RowRef> {
        let (Ok(at) | Err(at)) = self.search(|row| match place(row) {
            Ordering::Equal => Ordering::Greater,
            other => other,
        });
        self.iter_at(at)
    }

    fn search(&self, place: impl Fn(&Row) -> Ordering) -> Result<Place, Place> {
        let chunks = self.chunks();
        let before = |c: &Vec<RowRef>| c.last().is_some_and(|r| place(r) == Ordering::Less);
        let chunk = match chunks.len() {
            1 => 0,
            // Behind all of them is the end of the last chunk.
            n => chunks.partition_point(before).min(n.saturating_sub(1)),
        };
        let found = chunks.get(chunk).map_or(Err(0), |c| c.binary_search_by(|r| place(r)));
        found.map(|index| Place { chunk, index }).map_err(|index| Place { chunk, index })
    }

    /// Where a row is, or would be.
    pub(super) fn find(&self, order: &Order, row: &Row) -> Result<Place, Place> {
        self.search(|r| compare_rows(order, r, row))
    }

    /// The row that [`Rows::find`] found.
    pub(super) fn at(&self, at: Place) -> &RowRef {
        &self.chunks()[at.chunk][at.index]
    }

    /// How many rows are before a place.
    pub(super) fn rank(&self, at: Place) -> usize {
        self.chunks().iter().take(at.chunk).map(Vec::len).sum::<usize>() + at.index
    }

    /// Puts a row where [`Rows::find`] said that it would be.
    pub(super) fn insert(&mut self, at: Place, row: RowRef) {
        match self {
            Rows::Few(rows) => {
                insert(rows, at.index, row);
                if rows.len() > CHUNK {
                    *self = Rows::from_sorted(std::mem::take(rows));
                }
            }
            Rows::Many(many) => {
                many.len += 1;
                let chunk = &mut many.chunks[at.chunk];
                insert(chunk, at.index, row);
                if chunk.len() > CHUNK {
                    let upper = chunk.split_off(CHUNK / 2);
                    chunk.shrink_to(CHUNK / 2 + CHUNK / 8);
                    many.chunks.insert(at.chunk + 1, upper);
                }
            }
        }
    }

    /// Takes out the row that [`Rows::find`] found.
    pub(super) fn remove(&mut self, at: Place) -> RowRef {
        match self {
            Rows::Few(rows) => {
                let row = rows.remove(at.index);
                trim(rows);
                row
            }
            Rows::Many(many) => {
                many.len -= 1;
                let row = many.chunks[at.chunk].remove(at.index);
                trim(&mut many.chunks[at.chunk]);
                many.shrink(at.chunk);
                if many.chunks.len() == 1 {
                    *self = Rows::Few(many.chunks.pop().unwrap_or_default());
                }
                row
            }
        }
    }

    /// Puts rows behind the last one.
    pub(super) fn extend(&mut self, more: Vec<RowRef>) {
        if self.is_empty() {
            *self = Rows::from_sorted(more);
            return;
        }
        match self {
            Rows::Few(rows) if rows.len() + more.len() <= CHUNK => {
                rows.reserve_exact(more.len());
                rows.extend(more);
            }
            Rows::Few(rows) => {
                let mut all = std::mem::take(rows);
                all.extend(more);
                *self = Rows::from_sorted(all);
            }
            Rows::Many(many) => {
                many.len += more.len();
                let mut more = more.into_iter();
                if let Some(last) = many.chunks.last_mut() {
                    let room = CHUNK.saturating_sub(last.len()).min(more.len());
                    last.reserve_exact(room);
                    last.extend(more.by_ref().take(room));
                }
                while more.len() > 0 {
                    many.chunks.push(more.by_ref().take(CHUNK).collect());
                }
            }
        }
    }

    /// Takes out all rows from a rank on.
    pub(super) fn split_off(&mut self, rank: usize) -> Vec<RowRef> {
        match self {
            Rows::Few(rows) if rank >= rows.len() => Vec::new(),
            Rows::Few(rows) => rows.split_off(rank),
            Rows::Many(_) => {
                let mut all: Vec<RowRef> = std::mem::take(self).into_iter().collect();
                let cut = all.split_off(rank.min(all.len()));
                *self = Rows::from_sorted(all);
                cut
            }
        }
    }
}

/// Takes all rows out, in order; what they were in is freed on the way.
pub(super) type IntoIter = std::iter::Flatten<std::vec::IntoIter<Vec<RowRef>>>;

impl IntoIterator for Rows {
    type Item = RowRef;
    type IntoIter = IntoIter;

    fn into_iter(self) -> IntoIter {
        let chunks = match self {
            Rows::Few(rows) => vec![rows],
            Rows::Many(many) => many.chunks,
        };
        chunks.into_iter().flatten()
    }
}

impl Many {
    /// Joins a chunk that became small with a neighbour.
    fn shrink(&mut self, chunk: usize) {
        let len = self.chunks[chunk].len();
        if len >= CHUNK / 4 {
            return;
        }
        // With the one behind it, or, for the last, the one before.
        let first = if chunk + 1 < self.chunks.len() { chunk } else { chunk.saturating_sub(1) };
        let Some(second) = self.chunks.get(first + 1) else { return };
        if self.chunks[first].len() + second.len() <= CHUNK / 2 {
            let second = self.chunks.remove(first + 1);
            self.chunks[first].reserve_exact(second.len());
            self.chunks[first].extend(second);
        } else if len == 0 {
            self.chunks.remove(chunk);
        }
    }
}

#[cfg(test)]
mod tests {
    use rand::rngs::SmallRng;
    use rand::{Rng as _, SeedableRng as _};

    use super::*;
    use crate::ivm::plan::Direction;
    use crate::value::Value;
    use crate::version::StateVersion;

    const ORDER: &Order = &[(0, Direction::Asc)];

    fn row(n: u32) -> RowRef {
        Row::new(StateVersion::zero(), [Value::Number(f64::from(n))])
    }

    fn numbers<'a>(rows: impl Iterator<Item = &'a RowRef>) -> Vec<u32> {
        let number = |r: &RowRef| match r.values[0] {
            Value::Number(n) => n as u32,
            _ => u32::MAX,
        };
        rows.map(number).collect()
    }

    /// Some random step on both.
    fn step(rng: &mut SmallRng, rows: &mut Rows, model: &mut Vec<u32>) {
        let n = rng.random_range(0..100);
        match (rows.find(ORDER, &row(n)), model.binary_search(&n)) {
            (Ok(at), Ok(i)) => {
                assert_eq!(rows.rank(at), i);
                if rng.random_ratio(2, 3) {
                    assert_eq!(numbers([rows.remove(at)].iter()), [model.remove(i)]);
                }
            }
            (Err(at), Err(i)) => {
                assert_eq!(rows.rank(at), i);
                rows.insert(at, row(n));
                model.insert(i, n);
            }
            (found, expected) => panic!("{found:?}, but {expected:?}"),
        }
        match rng.random_range(0..40) {
            0 => {
                let at = rng.random_range(0..=model.len());
                assert_eq!(numbers(rows.split_off(at).iter()), model.split_off(at));
            }
            1 => {
                let first = model.last().map_or(0, |n| n + 1);
                let more: Vec<u32> = (first..first + rng.random_range(0..20)).collect();
                rows.extend(more.iter().map(|&n| row(n)).collect());
                model.extend(more);
            }
            _ => {}
        }
    }

    #[test]
    fn rows_are_a_sorted_vector() {
        for seed in 0..200 {
            let mut rng = SmallRng::seed_from_u64(seed);
            let (mut rows, mut model) = (Rows::default(), Vec::new());
            for _ in 0..200 {
                step(&mut rng, &mut rows, &mut model);
                assert_eq!(numbers(rows.iter()), model, "seed {seed}");
                assert_eq!((rows.len(), rows.is_empty()), (model.len(), model.is_empty()));
                assert_eq!(numbers(rows.last().into_iter()), model[model.len().max(1) - 1..]);
                let from = rng.random_range(0..=model.len() + 1);
                assert_eq!(numbers(rows.iter_from(from)), model.get(from..).unwrap_or_default());
                let n = rng.random_range(0..100);
                let since = rows.iter_since(|r| compare_rows(ORDER, r, &row(n)));
                assert_eq!(numbers(since), model[model.partition_point(|&m| m < n)..]);
            }
        }
    }
}
