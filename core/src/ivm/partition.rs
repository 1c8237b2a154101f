//! One partition of a node: the ordered window of its rows for one join key.
//!
//! Invariant: `rows` is exactly the qualifying rows before `bound`, in order, at most
//! limit + overshoot. The bound is a *position*, not a row: it moves down when a row is cut and up
//! when rows are read. A partition that is being read for the first time is a window too: its
//! bound is how far reading got.
//!
//! What changed since the partition was last settled is a log of rows that left and entered;
//! [`Partition::settle`] nets it and says what that did to the visible rows.

use std::cmp::Ordering;

use super::mutant::{self, Mutant};
use super::plan::Direction;
use super::rows::{self, Place, Rows};
use crate::row::{Row, RowRef};
use crate::value::Value;
use crate::zql::order::{compare_rows, compare_to_position, position};

/// Order columns with their directions.
pub(super) type Order = [(usize, Direction)];

/// Where the known part of a partition ends (exclusive).
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Bound {
    /// Before every row: nothing was read yet.
    Start,
    /// Before this position.
    At(Box<[Value]>),
    /// After every row: all that qualifies is resident.
    End,
}

/// Changes since the partition was last settled.
#[derive(Debug, Default)]
pub(super) struct Log {
    /// The multiplicity then.
    pub(super) mult: i64,
    pub(super) removed: Vec<RowRef>,
    pub(super) added: Vec<RowRef>,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Partition {
    rows: Rows,
    pub(super) bound: Bound,
    /// Sum of the multiplicities of the visible parent rows with this key. Below zero only while
    /// the parents' changes are being summed.
    pub(super) mult: i64,
    /// Parent rows that want the partition: visible ones of a related edge, resident ones of an
    /// EXISTS edge.
    pub(super) wanted: i64,
    log: Option<Box<Log>>,
}

/// Size of a window.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Window {
    /// Rows that are visible; `None` is all.
    pub(super) limit: Option<usize>,
    /// Rows kept beyond.
    pub(super) overshoot: usize,
}

impl Window {
    /// Most resident rows.
    pub(super) fn capacity(self) -> Option<usize> {
        self.limit.map(|l| if l == 0 { 0 } else { l.saturating_add(self.overshoot) })
    }

    /// How many of `resident` rows are visible.
    pub(super) fn visible(self, resident: usize) -> usize {
        self.limit.map_or(resident, |l| l.min(resident))
    }
}

/// The net effect of a log.
#[derive(Debug, Default)]
pub(super) struct Settled {
    /// Multiplicity before.
    pub(super) mult_before: i64,
    /// Rows no longer resident (at the version they were held).
    pub(super) left: Vec<RowRef>,
    /// Rows resident now and not before, or in another version.
    pub(super) entered: Vec<RowRef>,
    /// As `left`, of the visible rows.
    pub(super) hidden: Vec<RowRef>,
    /// As `entered`, of the visible rows.
    pub(super) shown: Vec<RowRef>,
}

impl Partition {
    /// An unread partition, marked as changed.
    pub(super) fn new() -> Partition {
        Partition {
            rows: Rows::default(),
            bound: Bound::Start,
            mult: 0,
            wanted: 0,
            log: Some(Box::default()),
        }
    }

    /// Resident rows, in order.
    pub(super) fn rows(&self) -> &Rows {
        &self.rows
    }

    /// Visible rows, in order.
    pub(super) fn visible(&self, window: Window) -> impl Iterator<Item = &RowRef> {
        self.rows.iter().take(window.visible(self.rows.len()))
    }

    /// Whether a row is resident and in view.
    pub(super) fn shows(&self, order: &Order, row: &Row, window: Window) -> bool {
        self.rows
            .find(order, row)
            .is_ok_and(|at| window.limit.is_none_or(|limit| self.rows.rank(at) < limit))
    }

    /// Whether rows are missing that can be read.
    pub(super) fn is_short(&self, window: Window) -> bool {
        self.bound != Bound::End && window.limit.is_none_or(|l| self.rows.len() < l)
    }

    /// Whether it had rows when it was last settled, and has some now.
    pub(super) fn stayed_occupied(&self) -> bool {
        let (removed, added) =
            self.log.as_ref().map_or((0, 0), |l| (l.removed.len(), l.added.len()));
        !self.rows.is_empty() && self.rows.len() + removed > added
    }

    /// Starts the log. True if there was none: the caller must note the partition as touched.
    pub(super) fn touch(&mut self) -> bool {
        let fresh = self.log.is_none();
        if fresh {
            self.log = Some(Box::new(Log { mult: self.mult, ..Log::default() }));
        }
        fresh
    }

    /// Whether a row at this place would be before the bound.
    pub(super) fn covers(&self, order: &Order, row: &Row) -> bool {
        match &self.bound {
            Bound::Start => false,
            Bound::At(p) => compare_to_position(order, row, p) == Ordering::Less,
            Bound::End => true,
        }
    }

    /// Where a row is, if it is resident.
    pub(super) fn find(&self, order: &Order, row: &Row) -> Option<Place> {
        self.rows.find(order, row).ok()
    }

    /// Takes out the row that [`Partition::find`] found. The partition must have been touched.
    pub(super) fn remove(&mut self, at: Place) {
        let row = self.rows.remove(at);
        if let Some(log) = &mut self.log {
            log.removed.push(row);
        }
    }

    /// Puts a row in that is before the bound. False if its position is taken (an invariant is
    /// broken). The partition must have been touched.
    pub(super) fn insert(&mut self, order: &Order, row: RowRef) -> bool {
        let Err(at) = self.rows.find(order, &row) else { return false };
        if let Some(log) = &mut self.log {
            log.added.push(row.clone());
        }
        self.rows.insert(at, row);
        true
    }

    /// Puts rows behind the last one that were read from the bound on, in order. False if they
    /// are not behind it.
    pub(super) fn append(&mut self, order: &Order, rows: Vec<RowRef>, bound: Bound) -> bool {
        if let (Some(last), Some(first)) = (self.rows.last(), rows.first())
            && compare_rows(order, last, first) != Ordering::Less
        {
            return false;
        }
        if let Some(log) = &mut self.log {
            log.added.extend(rows.iter().cloned());
        }
        self.rows.extend(rows);
        self.bound = bound;
        true
    }

    /// Cuts what is beyond the window; the bound moves to the first row cut.
    pub(super) fn cut(&mut self, order: &Order, window: Window) {
        let Some(capacity) = window.capacity() else { return };
        if self.rows.len() <= capacity {
            return;
        }
        if mutant::is(Mutant::CutKeepsBound) {
            self.rows.split_off(capacity);
            return;
        }
        let cut = self.rows.split_off(capacity);
        if let Some(first) = cut.first() {
            self.bound = Bound::At(position(order, first).into_iter().collect());
        }
        if let Some(log) = &mut self.log {
            log.removed.extend(cut);
        }
    }

    /// Empties a partition that nobody wants any more, so that settling reports all of it.
    pub(super) fn clear(&mut self) {
        let rows = std::mem::take(&mut self.rows);
        if let Some(log) = &mut self.log {
            log.removed.extend(rows);
        }
        self.bound = Bound::Start;
    }

    /// The resident rows, and those that the log still holds.
    pub(super) fn into_rows(self) -> (rows::IntoIter, std::vec::IntoIter<RowRef>) {
        let mut log = self.log.map(|l| *l).unwrap_or_default();
        log.removed.append(&mut log.added);
        (self.rows.into_iter(), log.removed.into_iter())
    }

    /// Whether there is a log.
    pub(super) fn is_touched(&self) -> bool {
        self.log.is_some()
    }

    /// How many rows are concerned by what the log says, without netting it.
    pub(super) fn changed_rows(&self) -> usize {
        let of = |log: &Log| {
            let kept = if log.mult == self.mult { 0 } else { self.rows.len() };
            log.added.len() + log.removed.len() + kept
        };
        self.log.as_deref().map_or(0, of)
    }

    /// The log, which is forgotten.
    pub(super) fn take_log(&mut self) -> Option<Box<Log>> {
        self.log.take()
    }

    /// Nets the log and forgets it.
    pub(super) fn settle(&mut self, order: &Order, window: Window) -> Option<Settled> {
        let log = *self.log.take()?;
        let (left, entered) = net(order, log.removed, log.added);
        let mut settled = Settled { mult_before: log.mult, left, entered, ..Settled::default() };
        match window.limit {
            None => {
                settled.hidden.clone_from(&settled.left);
                settled.shown.clone_from(&settled.entered);
            }
            Some(limit) => self.visible_change(order, limit, &mut settled),
        }
        Some(settled)
    }

    /// What the net change of the resident rows did to the first `limit` ones: rows that left or
    /// entered in view, and unchanged rows that slid over the line.
    fn visible_change(&self, order: &Order, limit: usize, settled: &mut Settled) {
        let (left, entered) = (&settled.left, &settled.entered);
        // Everything before the first change kept its rank.
        let start = [left.first(), entered.first()]
            .into_iter()
            .flatten()
            .map(|row| {
                let (Ok(at) | Err(at)) = self.rows.find(order, row);
                self.rows.rank(at)
            })
            .min();
        let Some(mut at) = start else { return };
        let mut rows = self.rows.iter_from(at).peekable();
        let (mut before, mut l, mut e) = (at, 0, 0);
        // `at` is the rank now, `before` the rank then.
        while (at < limit || before < limit) && (l < left.len() || e < entered.len()) {
            let current = rows.peek().copied();
            let leaves_first = match (left.get(l), current) {
                (Some(gone), Some(row)) => compare_rows(order, gone, row) != Ordering::Greater,
                (Some(_), None) => true,
                (None, Some(_)) => false,
                (None, None) => break,
            };
            if leaves_first {
                if before < limit {
                    settled.hidden.push(left[l].clone());
                }
                (before, l) = (before + 1, l + 1);
                continue;
            }
            let Some(row) = current else { break };
            if entered.get(e).is_some_and(|r| compare_rows(order, r, row) == Ordering::Equal) {
                if at < limit {
                    settled.shown.push(row.clone());
                }
                (at, e) = (at + 1, e + 1);
                rows.next();
                continue;
            }
            match (before < limit, at < limit) {
                (true, false) => settled.hidden.push(row.clone()),
                (false, true) => settled.shown.push(row.clone()),
                _ => {}
            }
            (before, at) = (before + 1, at + 1);
            rows.next();
        }
        // Behind the last change the two ranks differ by a constant.
        if mutant::is(Mutant::SlideForgotten) {
            return;
        }
        let range = |from: usize, to: usize| {
            self.rows.iter_from(from).take(to.saturating_sub(from)).cloned()
        };
        if at > before {
            let end = limit.saturating_add(at - before);
            settled.hidden.extend(range(at.max(limit), end));
        } else if before > at {
            let from = at.max(limit.saturating_sub(before - at));
            settled.shown.extend(range(from, limit));
        }
    }
}

/// Rows that left and did not return, rows that entered and did not leave again; both in order.
/// The same position in the same version is the same row.
fn net(
    order: &Order,
    mut removed: Vec<RowRef>,
    mut added: Vec<RowRef>,
) -> (Vec<RowRef>, Vec<RowRef>) {
    if removed.is_empty() || added.is_empty() {
        added.sort_by(|a, b| compare_rows(order, a, b));
        removed.sort_by(|a, b| compare_rows(order, a, b));
        return (removed, added);
    }
    let by_place =
        |a: &RowRef, b: &RowRef| compare_rows(order, a, b).then_with(|| a.version.cmp(&b.version));
    removed.sort_by(by_place);
    added.sort_by(by_place);
    let (mut left, mut entered) = (Vec::new(), Vec::new());
    let (mut r, mut a) = (removed.into_iter().peekable(), added.into_iter().peekable());
    loop {
        let order = match (r.peek(), a.peek()) {
            (Some(x), Some(y)) => by_place(x, y),
            (Some(_), None) => Ordering::Less,
            (None, Some(_)) => Ordering::Greater,
            (None, None) => break,
        };
        match order {
            Ordering::Less => left.extend(r.next()),
            Ordering::Greater => entered.extend(a.next()),
            Ordering::Equal => {
                r.next();
                a.next();
            }
        }
    }
    (left, entered)
}
