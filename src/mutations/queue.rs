//! The pushes of one client group that wait for its request under way.

use std::collections::{HashMap, VecDeque};

use zeroring_core::group::{ConnId, OutgoingPush};

/// Bytes that may wait in a group before its senders have to. Real clients have a few KiB under
/// way; a client that comes back after a long time offline may have megabytes.
pub(super) const MAX_GROUP_BYTES: usize = 16 << 20;
/// What a mutation costs beside its text.
const MUTATION_OVERHEAD_BYTES: usize = 256;

/// Whether the sender may go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Room {
    /// Its next message is welcome.
    Free,
    /// Its next message has to wait: the connection is named when there is room again.
    Full,
}

/// A group's pushes, in order of arrival.
#[derive(Debug, Default)]
pub(super) struct PushQueue {
    waiting: VecDeque<OutgoingPush>,
    /// Waiting or under way.
    bytes: usize,
    parked: Vec<ConnId>,
}

/// What a push costs.
pub(super) fn cost(push: &OutgoingPush) -> usize {
    let mutations = push.push.mutations.iter();
    mutations.map(|m| m.json.as_str().len() + MUTATION_OVERHEAD_BYTES).sum()
}

impl PushQueue {
    /// Takes a push: always, so that a message of any size gets through.
    pub(super) fn put(&mut self, push: OutgoingPush, crowded: bool) -> Room {
        self.bytes += cost(&push);
        let room = if self.bytes < MAX_GROUP_BYTES && !crowded { Room::Free } else { Room::Full };
        if room == Room::Full {
            self.parked.push(push.conn);
        }
        self.waiting.push_back(push);
        room
    }

    /// Everything that waits, as few requests as possible: those of one sender with the same
    /// credentials are one, in order of first appearance (spec: sync-protocol §7.4).
    pub(super) fn take(&mut self) -> Vec<OutgoingPush> {
        let mut merged: Vec<OutgoingPush> = Vec::new();
        let mut index: HashMap<(ConnId, u32), usize> = HashMap::new();
        for push in self.waiting.drain(..) {
            let at = *index.entry((push.conn, push.revision)).or_insert(merged.len());
            match merged.get_mut(at) {
                Some(first) => first.push.mutations.extend(push.push.mutations),
                None => merged.push(push),
            }
        }
        merged
    }

    /// A request is over. Returns the connections that may go on.
    pub(super) fn sent(&mut self, cost: usize) -> Vec<ConnId> {
        self.bytes = self.bytes.saturating_sub(cost);
        if self.bytes < MAX_GROUP_BYTES { std::mem::take(&mut self.parked) } else { Vec::new() }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use zeroring_core::protocol::up::{Upstream, parse};

    use super::*;

    fn push(conn: u64, revision: u32, request: &str, ids: &[i64], size: usize) -> OutgoingPush {
        let mutations: Vec<_> = ids
            .iter()
            .map(|id| {
                serde_json::json!({"type": "custom", "id": id, "clientID": "c", "name": "m",
                    "args": ["x".repeat(size)], "timestamp": 1})
            })
            .collect();
        let body = serde_json::json!(["push", {"clientGroupID": "g", "mutations": mutations,
            "pushVersion": 1, "timestamp": 1, "requestID": request}]);
        let Ok(Upstream::Push(push)) = parse(&body.to_string()) else { panic!() };
        OutgoingPush { conn: ConnId(conn), revision, credentials: Arc::default(), push }
    }

    fn shape(batch: &[OutgoingPush]) -> Vec<(u64, u32, String, Vec<i64>)> {
        let one = |p: &OutgoingPush| {
            let ids = p.push.mutations.iter().map(|m| m.id.id).collect();
            (p.conn.0, p.revision, p.push.request_id.clone(), ids)
        };
        batch.iter().map(one).collect()
    }

    #[test]
    fn pushes_of_one_sender_and_revision_are_one_request_in_order() {
        let mut queue = PushQueue::default();
        for (conn, revision, request, ids) in [
            (1, 0, "a", &[1, 2][..]),
            (2, 0, "b", &[1]),
            (1, 0, "c", &[3]),
            (1, 1, "d", &[4]),
            (2, 0, "e", &[2]),
            (1, 0, "f", &[5]),
        ] {
            assert_eq!(queue.put(push(conn, revision, request, ids, 1), false), Room::Free);
        }
        let want = [
            (1, 0, "a".to_owned(), vec![1, 2, 3, 5]),
            (2, 0, "b".to_owned(), vec![1, 2]),
            (1, 1, "d".to_owned(), vec![4]),
        ];
        assert_eq!(shape(&queue.take()), want);
        assert!(queue.is_empty() && queue.take().is_empty());
    }

    #[test]
    fn a_full_queue_takes_the_push_and_stops_its_sender_until_there_is_room() {
        let mut queue = PushQueue::default();
        let half = MAX_GROUP_BYTES / 2;
        assert_eq!(queue.put(push(1, 0, "a", &[1], half), false), Room::Free);
        assert_eq!(queue.put(push(2, 0, "b", &[1], half), false), Room::Full);
        assert_eq!(queue.put(push(3, 0, "c", &[1], 1), false), Room::Full);
        let batch = queue.take();
        assert_eq!(batch.len(), 3, "nothing is lost at the bound");
        // Under way counts too.
        assert_eq!(queue.put(push(4, 0, "d", &[1], 1), false), Room::Full);
        let free = queue.sent(cost(&batch[0]));
        assert_eq!(free, [2, 3, 4].map(ConnId));
        assert_eq!(queue.put(push(2, 0, "e", &[2], 1), false), Room::Free);
        let rest = batch[1..].iter().map(cost).sum::<usize>();
        assert!(queue.sent(rest).is_empty(), "each is told once");
        let rest: usize = queue.take().iter().map(cost).sum();
        queue.sent(rest);
        assert_eq!(queue.bytes, 0);
        assert_eq!(queue.put(push(1, 0, "f", &[1], 1), true), Room::Full, "others are many");
    }
}
