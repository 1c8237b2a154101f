//! What nobody needs any more and is too much to drop at once: rows, patches, records of one group
//! or one poke. Freeing a million of them takes a tenth of a second; whoever has such a list hands
//! it over here, and the executor drops a little of it at a time.

use std::collections::VecDeque;
use std::fmt;

/// Shorter lists are dropped at once. Tests have few rows, and shall get here all the same.
const AT_ONCE: usize = if cfg!(test) { 2 } else { 256 };

/// See the [module](self).
#[derive(Default)]
pub struct Waste(VecDeque<Box<dyn Iterator<Item = usize>>>);

impl fmt::Debug for Waste {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Waste").field(&self.0.len()).finish()
    }
}

impl Waste {
    /// Takes a list of rows over, or of what is about as large.
    pub fn rows<L>(&mut self, list: L)
    where
        L: IntoIterator,
        L::Item: 'static,
        L::IntoIter: 'static,
    {
        self.pieces(list, |_| 1);
    }

    /// Takes a list over whose elements have several rows each.
    pub fn pieces<L>(&mut self, list: L, rows: fn(&L::Item) -> usize)
    where
        L: IntoIterator,
        L::Item: 'static,
        L::IntoIter: 'static,
    {
        let mut list = list.into_iter();
        let mut left = AT_ONCE;
        // Most lists are short: not worth a box.
        while left > 0 {
            let Some(piece) = list.next() else { return };
            left = left.saturating_sub(rows(&piece).max(1));
        }
        self.0.push_back(Box::new(list.map(move |piece| rows(&piece))));
    }

    /// Takes all of another one over.
    pub fn append(&mut self, mut other: Waste) {
        self.0.append(&mut other.0);
    }

    /// Nothing is left.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Drops about so many rows.
    pub fn shed(&mut self, rows: usize) {
        let mut left = rows;
        while left > 0
            && let Some(list) = self.0.front_mut()
        {
            match list.next() {
                Some(dropped) => left = left.saturating_sub(dropped.max(1)),
                None => drop(self.0.pop_front()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::rc::Rc;

    use super::*;

    #[test]
    fn a_step_drops_about_as_much_as_it_is_told() {
        let row = Rc::new(());
        let mut waste = Waste::default();
        waste.rows(vec![row.clone(); AT_ONCE - 1]);
        assert_eq!((Rc::strong_count(&row), waste.0.len()), (1, 0), "what is short goes at once");
        waste.rows(vec![row.clone(); 1_000]);
        waste.pieces(vec![vec![row.clone(); 50]; 20], Vec::len);
        let mut steps = 0;
        while !waste.is_empty() {
            let before = Rc::strong_count(&row);
            waste.shed(100);
            let dropped = before - Rc::strong_count(&row);
            assert!(dropped <= 100 + 50, "{dropped} in one step");
            steps += 1;
        }
        assert_eq!(Rc::strong_count(&row), 1);
        assert!(steps >= 15, "{steps} steps for two thousand");
    }
}
