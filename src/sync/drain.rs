//! The drain of an executor: one group after the other, at a pace at which other servers can take
//! them over (spec: view-syncer-cvr §7.5).

use std::collections::VecDeque;
use std::time::Duration;

use zeroring_net::rt::Instant;

use super::groups::GroupKey;

/// Which part of its time a server that takes groups over may spend on hydrating them.
const UTILISATION: f64 = 0.6;
/// Between two groups at least.
const MIN_PAUSE: Duration = Duration::from_millis(2);

/// Groups that are still to be closed.
pub(super) struct Draining {
    waiting: VecDeque<GroupKey>,
    next: Instant,
}

impl Draining {
    /// Starts with the first group at once.
    pub(super) fn new(groups: impl IntoIterator<Item = GroupKey>, now: Instant) -> Draining {
        Draining { waiting: groups.into_iter().collect(), next: now }
    }

    /// A group that came meanwhile: it is the last one.
    pub(super) fn add(&mut self, group: GroupKey) {
        self.waiting.push_back(group);
    }

    /// When the next group is to be closed; `None` if all were.
    pub(super) fn next(&self) -> Option<Instant> {
        (!self.waiting.is_empty()).then_some(self.next)
    }

    /// The next group whose time has come. `cost`: how long its queries were hydrated here, as
    /// whoever takes it over will have to; `None` for one that is gone.
    pub(super) fn due(
        &mut self,
        now: Instant,
        cost: impl Fn(GroupKey) -> Option<Duration>,
    ) -> Option<GroupKey> {
        while self.next <= now {
            let group = self.waiting.pop_front()?;
            if let Some(cost) = cost(group) {
                self.next = now + cost.div_f64(UTILISATION) + MIN_PAUSE;
                return Some(group);
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_are_closed_one_after_the_other_as_fast_as_others_can_take_them() {
        // spec: view-syncer-cvr, checklist 53
        let start = zeroring_net::rt::now();
        let ms = |n| Duration::from_millis(n);
        let mut draining = Draining::new([1, 2, 3, 4].map(GroupKey), start);
        let cost = |group: GroupKey| match group {
            GroupKey(1) => Some(ms(60)),
            GroupKey(2) => None,
            _ => Some(ms(0)),
        };
        assert_eq!(draining.due(start, cost), Some(GroupKey(1)));
        assert_eq!(draining.next(), Some(start + ms(102)));
        assert_eq!(draining.due(start + ms(101), cost), None);
        draining.add(GroupKey(5));
        let at = start + ms(102);
        assert_eq!(draining.due(at, cost), Some(GroupKey(3)), "the second one is gone");
        assert_eq!(draining.due(at, cost), None);
        assert_eq!(draining.due(at + ms(2), cost), Some(GroupKey(4)));
        assert_eq!(draining.due(at + ms(4), cost), Some(GroupKey(5)));
        assert_eq!((draining.next(), draining.due(at + ms(9), cost)), (None, None));
    }
}
