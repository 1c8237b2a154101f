//! Groups that come up: their view records are loaded, their queries executed, their clients caught
//! up. After a restart or a loss of the network all of them want to at once; they are let in one
//! after the other, in the order in which they asked, so that the first are served while the last
//! wait, and what is under way for them is bounded. Groups that are up never wait here.

use std::collections::BTreeMap;
use std::time::Duration;

use rustc_hash::FxHashMap;
use zeroring_net::rt::Instant;

use super::groups::GroupKey;

/// Groups that come up at once. Enough to keep the CVR store's batches large and an executor busy
/// while each of them waits for a few round trips; few enough that the rows and records in hand
/// are a matter of megabytes.
pub(super) const PLACES: usize = 256;

/// A group's number in the queue; rising.
type Ticket = u64;

/// The queue. See the [module](self).
pub(super) struct Admission {
    places: usize,
    waiting: BTreeMap<Ticket, (GroupKey, Instant)>,
    /// Of every group that waits, has a place, or gave it back before it was up: it goes on as
    /// the one that it was.
    tickets: FxHashMap<GroupKey, Standing>,
    next: Ticket,
    inside: usize,
    pub(super) counters: Counters,
}

/// Where a group stands.
#[derive(Clone, Copy)]
struct Standing {
    ticket: Ticket,
    place: Place,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    Waits,
    Inside,
    Away,
}

/// What happened so far.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(super) struct Counters {
    /// Groups that got a place.
    pub(super) admitted: u64,
    /// Groups that were up when they gave it back.
    pub(super) up: u64,
    /// The most places that were taken at once.
    pub(super) most: u64,
}

impl Admission {
    /// With so many places.
    pub(super) fn new(places: usize) -> Admission {
        Admission {
            places,
            waiting: BTreeMap::new(),
            tickets: FxHashMap::default(),
            next: 0,
            inside: 0,
            counters: Counters::default(),
        }
    }

    /// A group asks for a place.
    pub(super) fn enter(&mut self, group: GroupKey, now: Instant) {
        let standing = self.tickets.entry(group).or_insert_with(|| {
            self.next += 1;
            Standing { ticket: self.next, place: Place::Away }
        });
        debug_assert!(standing.place == Place::Away, "a group asks once");
        standing.place = Place::Waits;
        self.waiting.insert(standing.ticket, (group, now));
    }

    /// The next group that there is a place for.
    pub(super) fn admit(&mut self) -> Option<GroupKey> {
        if self.inside >= self.places {
            return None;
        }
        let (_, (group, _)) = self.waiting.pop_first()?;
        if let Some(standing) = self.tickets.get_mut(&group) {
            standing.place = Place::Inside;
        }
        self.inside += 1;
        self.counters.admitted += 1;
        self.counters.most = self.counters.most.max(self.inside as u64);
        Some(group)
    }

    /// A group gives its place back.
    pub(super) fn leave(&mut self, group: GroupKey, up: bool) {
        let Some(standing) = self.tickets.get_mut(&group) else { return };
        if std::mem::replace(&mut standing.place, Place::Away) == Place::Inside {
            self.inside -= 1;
        }
        if up {
            self.counters.up += 1;
            self.tickets.remove(&group);
        }
    }

    /// A group is gone.
    pub(super) fn forget(&mut self, group: GroupKey) {
        let Some(standing) = self.tickets.remove(&group) else { return };
        match standing.place {
            Place::Waits => drop(self.waiting.remove(&standing.ticket)),
            Place::Inside => self.inside -= 1,
            Place::Away => {}
        }
    }

    /// Groups that wait for a place.
    pub(super) fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Groups that have one.
    pub(super) fn inside(&self) -> usize {
        self.inside
    }

    /// How long the first one has waited.
    pub(super) fn longest(&self, now: Instant) -> Duration {
        self.waiting.values().next().map_or(Duration::ZERO, |(_, at)| now.duration_since(*at))
    }
}

#[cfg(test)]
mod tests {
    use zeroring_net::rt::now;

    use super::*;

    fn admit_all(admission: &mut Admission) -> Vec<u64> {
        std::iter::from_fn(|| admission.admit()).map(|key| key.0).collect()
    }

    #[test]
    fn groups_come_up_in_the_order_of_asking_and_never_more_than_there_are_places() {
        let mut admission = Admission::new(3);
        let mut order = Vec::new();
        for key in 0..2_000 {
            admission.enter(GroupKey(key), now());
        }
        let mut inside = admit_all(&mut admission);
        while !inside.is_empty() {
            assert!(inside.len() <= 3 && admission.inside() == inside.len());
            // The second one is the first to be done.
            let done = inside.remove(1.min(inside.len() - 1));
            order.push(done);
            admission.leave(GroupKey(done), true);
            let next = admit_all(&mut admission);
            assert!(next.len() <= 1);
            inside.extend(next);
        }
        assert_eq!((order.len(), order[1_999]), (2_000, 0), "one stays to the end");
        assert!(order[..1_999].is_sorted(), "the others pass it in order");
        let counters = Counters { admitted: 2_000, up: 2_000, most: 3 };
        assert_eq!((admission.counters, admission.waiting()), (counters, 0));
    }

    #[test]
    fn one_that_waits_for_the_app_lets_others_pass_and_then_is_the_next() {
        let mut admission = Admission::new(1);
        for key in 0..4 {
            admission.enter(GroupKey(key), now());
        }
        assert_eq!(admit_all(&mut admission), [0]);
        admission.leave(GroupKey(0), false);
        assert_eq!(admit_all(&mut admission), [1]);
        admission.enter(GroupKey(0), now());
        assert_eq!(admit_all(&mut admission), [0; 0]);
        admission.leave(GroupKey(1), true);
        assert_eq!(admit_all(&mut admission), [0], "it was there first");
        admission.leave(GroupKey(0), true);
        assert_eq!(admit_all(&mut admission), [2]);
    }

    #[test]
    fn groups_that_end_leave_no_gap() {
        let mut admission = Admission::new(2);
        for key in 0..6 {
            admission.enter(GroupKey(key), now());
        }
        assert_eq!(admit_all(&mut admission), [0, 1]);
        for gone in [2, 0, 4, 77] {
            admission.forget(GroupKey(gone));
        }
        assert_eq!((admission.inside(), admission.waiting()), (1, 2));
        assert_eq!(admit_all(&mut admission), [3]);
        for gone in [1, 3, 5] {
            admission.forget(GroupKey(gone));
        }
        assert_eq!((admission.inside(), admission.waiting()), (0, 0));
        assert!(admission.tickets.is_empty());
    }
}
