//! Custom mutators: pushes on their way to the app's mutate endpoint (spec: sync-protocol §7.4–7.6).
//!
//! ```text
//!  group ── Effect::Push ──▶ queue of the group ── one request at a time ──▶ endpoint
//!    ▲                          (merged by sender)                               │
//!    └───────────── Event::Pushed (errors, who the user is) ◀────────────────────┘
//! ```
//!
//! Results are not taken from here: the app writes them to its database, and they come back with
//! the rows, by replication. What is here is order and delivery:
//!
//! - A group has at most one request under way. Meanwhile its pushes gather; the next request has
//!   all of one sender. A push that was taken is sent, also when its sender has left.
//! - A queue belongs to a client group id and outlives the group's instances, so that there is
//!   never a second request of a group under way.
//! - Nothing is sent again after the attempts of one call: clients push again what was not
//!   confirmed, and the app drops what it has seen.
//! - Bounds: [`queue`] bytes per group, [`MAX_TOTAL_BYTES`] per executor. At the bound a push is
//!   still taken, but its connection's next message is not read until there is room.
//!
//! Clean-ups of stored results go beside the queue, one at a time per group; a later one covers an
//! earlier one. They are only logged: what is left over is covered by the next.

mod queue;

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::sync::Arc;

use rustc_hash::FxHashMap;
use zeroring_core::cvr::ClientGroupId;
use zeroring_core::group::{ConnId, Credentials, OutgoingPush, Pushed};
use zeroring_core::protocol::error::{ApiFailure, MutationId};
use zeroring_core::protocol::mutate::{self, CleanUp, MutateResponse};

use crate::api::{Caller, parse_failure};
pub use queue::Room;
use queue::{PushQueue, cost};

/// Bytes that may wait on an executor before senders have to.
const MAX_TOTAL_BYTES: usize = 256 << 20;
/// Clean-ups of a group that may wait. Beyond it they are dropped: the app keeps some rows longer.
const MAX_CLEAN_UPS: usize = 100;

/// Counters for `/statz`.
#[derive(Debug, Default, Clone, Copy)]
pub struct Counters {
    /// Custom mutations that were sent.
    pub mutations: u64,
    /// Requests with mutations.
    pub pushes: u64,
    /// Of those, failed ones.
    pub failed: u64,
    /// Bytes that wait or are under way.
    pub queued_bytes: u64,
}

/// The mutations of an executor's groups.
pub struct Mutations {
    endpoint: Caller,
    groups: RefCell<FxHashMap<ClientGroupId, Lanes>>,
    counters: Cell<Counters>,
}

#[derive(Default)]
struct Lanes {
    pushes: PushQueue,
    pushing: bool,
    clean_ups: VecDeque<(Arc<Credentials>, CleanUp)>,
    cleaning: bool,
}

impl Lanes {
    fn is_idle(&self) -> bool {
        !self.pushing && !self.cleaning && self.pushes.is_empty() && self.clean_ups.is_empty()
    }
}

impl Mutations {
    /// For the groups of one executor.
    pub fn new(endpoint: Caller) -> Mutations {
        Mutations { endpoint, groups: RefCell::default(), counters: Cell::default() }
    }

    /// The counters.
    pub fn counters(&self) -> Counters {
        self.counters.get()
    }

    /// Nothing waits and nothing is under way.
    pub fn is_idle(&self) -> bool {
        self.groups.borrow().is_empty()
    }

    fn count(&self, change: impl FnOnce(&mut Counters)) {
        let mut counters = self.counters.get();
        change(&mut counters);
        self.counters.set(counters);
    }

    /// Queues a push. If the second is true, somebody has to [`Mutations::run`] the group.
    pub fn put(&self, group: &ClientGroupId, push: OutgoingPush) -> (Room, bool) {
        let crowded = self.counters.get().queued_bytes >= MAX_TOTAL_BYTES as u64;
        self.count(|c| c.queued_bytes += cost(&push) as u64);
        let mut groups = self.groups.borrow_mut();
        let lanes = groups.entry(group.clone()).or_default();
        let room = lanes.pushes.put(push, crowded);
        (room, !std::mem::replace(&mut lanes.pushing, true))
    }

    /// Sends what a group has, until nothing is left. `done` gets what became of each request, and
    /// the connections whose next message may come.
    pub async fn run(&self, group: &ClientGroupId, mut done: impl FnMut(Pushed, Vec<ConnId>)) {
        loop {
            let batch = match self.groups.borrow_mut().get_mut(group) {
                Some(lanes) => lanes.pushes.take(),
                None => return,
            };
            if batch.is_empty() {
                return self.leave(group, |lanes| lanes.pushing = false);
            }
            for push in batch {
                let cost = cost(&push);
                let pushed = self.send(push).await;
                let freed = match self.groups.borrow_mut().get_mut(group) {
                    Some(lanes) => lanes.pushes.sent(cost),
                    None => Vec::new(),
                };
                self.count(|c| c.queued_bytes = c.queued_bytes.saturating_sub(cost as u64));
                done(pushed, freed);
            }
        }
    }

    fn leave(&self, group: &ClientGroupId, change: impl FnOnce(&mut Lanes)) {
        let mut groups = self.groups.borrow_mut();
        if let Some(lanes) = groups.get_mut(group) {
            change(lanes);
            if lanes.is_idle() {
                groups.remove(group);
            }
        }
    }

    async fn send(&self, push: OutgoingPush) -> Pushed {
        let OutgoingPush { conn, revision, credentials, push } = push;
        let mutation_ids: Vec<MutationId> = push.mutations.iter().map(|m| m.id.clone()).collect();
        let body = mutate::request_body(&push);
        drop(push);
        let answer = self.call(&credentials, body).await;
        let ok = matches!(&answer, Ok(MutateResponse::Done { errors, .. }) if errors.is_empty());
        self.count(|c| {
            c.pushes += 1;
            c.mutations += mutation_ids.len() as u64;
            c.failed += u64::from(!ok);
        });
        Pushed { conn, revision, mutation_ids, answer }
    }

    async fn call(
        &self,
        credentials: &Credentials,
        body: Vec<u8>,
    ) -> Result<MutateResponse, ApiFailure> {
        let answer = self.endpoint.call(credentials, body, "push").await?;
        mutate::parse_response(&answer).map_err(|why| parse_failure(&why))
    }

    /// Queues a clean-up; if true, somebody has to [`Mutations::run_clean_ups`] of the group.
    pub fn put_clean_up(
        &self,
        group: &ClientGroupId,
        credentials: Arc<Credentials>,
        clean_up: CleanUp,
    ) -> bool {
        let mut groups = self.groups.borrow_mut();
        let lanes = groups.entry(group.clone()).or_default();
        queue_clean_up(&mut lanes.clean_ups, group, credentials, clean_up);
        !std::mem::replace(&mut lanes.cleaning, true)
    }

    /// Sends a group's clean-ups, until nothing is left. `now_ms` is wall time.
    pub async fn run_clean_ups(&self, group: &ClientGroupId, now_ms: impl Fn() -> f64) {
        loop {
            let next = match self.groups.borrow_mut().get_mut(group) {
                Some(lanes) => lanes.clean_ups.pop_front(),
                None => return,
            };
            let Some((credentials, clean_up)) = next else {
                return self.leave(group, |lanes| lanes.cleaning = false);
            };
            let body = clean_up.request_body(group.as_str(), now_ms());
            let failure = match self.call(&credentials, body).await {
                Ok(MutateResponse::Done { .. }) => continue,
                Ok(MutateResponse::Failed { failure, .. }) | Err(failure) => failure,
            };
            tracing::warn!(
                group = group.as_str(),
                "failed to send cleanup mutation: {}",
                failure.message
            );
        }
    }
}

fn queue_clean_up(
    waiting: &mut VecDeque<(Arc<Credentials>, CleanUp)>,
    group: &ClientGroupId,
    credentials: Arc<Credentials>,
    clean_up: CleanUp,
) {
    if let CleanUp::Single(new) = &clean_up {
        for (with, known) in waiting.iter_mut() {
            if let CleanUp::Single(known) = known
                && known.client_id == new.client_id
            {
                if new.id > known.id {
                    known.id = new.id;
                    *with = credentials;
                }
                return;
            }
        }
    }
    if waiting.len() >= MAX_CLEAN_UPS {
        let group = group.as_str();
        tracing::warn!(group, "more than {MAX_CLEAN_UPS} clean-ups wait: one is dropped");
        return;
    }
    waiting.push_back((credentials, clean_up));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn single(client: &str, id: i64) -> CleanUp {
        CleanUp::Single(MutationId { id, client_id: client.to_owned() })
    }

    #[test]
    fn a_later_clean_up_covers_an_earlier_one_and_their_number_is_bounded() {
        let group = ClientGroupId::from("g");
        let mut waiting = VecDeque::new();
        let mut put = |clean_up| {
            queue_clean_up(&mut waiting, &group, Arc::default(), clean_up);
            waiting.len()
        };
        assert_eq!(put(single("a", 4)), 1);
        assert_eq!(put(single("b", 1)), 2);
        assert_eq!(put(CleanUp::Bulk(vec!["a".into()])), 3);
        assert_eq!(put(single("a", 7)), 3);
        assert_eq!(put(single("a", 5)), 3);
        for n in 0..2 * MAX_CLEAN_UPS {
            assert!(put(single(&format!("c{n}"), 1)) <= MAX_CLEAN_UPS);
        }
        assert_eq!(waiting[0].1, single("a", 7));
        assert_eq!(waiting[1].1, single("b", 1));
    }
}
