//! Between the groups of an executor and the CVR store: loads, pages, and one flush for many.

use zeroring_core::cvr::ClientGroupId;
use zeroring_core::cvr::store::GroupFlush;
use zeroring_core::group::{Effect, Event};
use zeroring_storage::cvr_store::{CatchupScan, PAGE_ROWS, RowLookup, Verdict};

use super::answers::StoreAnswer;
use super::groups::{GroupKey, State};

/// Groups in one flush: bounds the time to the first verdict.
const FLUSH_BATCH: usize = 1_024;

impl State {
    /// Nothing of a stopped group is left to be written.
    pub(super) fn is_flushed(&self) -> bool {
        self.unsettled.is_empty()
    }

    pub(super) fn ask_store(&mut self, key: GroupKey, effect: Effect) {
        let Some(slot) = self.slots.get(&key) else { return };
        let group = slot.group.id().clone();
        let limit = PAGE_ROWS;
        let mailbox = self.mailbox.clone();
        match effect {
            Effect::Load { connect_ms } => self.load(key, group, connect_ms),
            Effect::ReadRows { current, queries, from } => {
                let lookup = RowLookup { group, current, queries, ids: Vec::new(), from, limit };
                let reply = move |answer| mailbox.put(StoreAnswer::Rows(key, answer));
                self.store.rows(lookup, Box::new(reply));
            }
            Effect::CatchUp { range, except, from } => {
                let scan = CatchupScan { range, without: except, from, limit };
                let reply = move |answer| mailbox.put(StoreAnswer::CaughtUp(key, answer));
                self.store.catch_up(scan, Box::new(reply));
            }
            Effect::AwaitRows => {
                let reply = move |answer| mailbox.put(StoreAnswer::RowsWritten(key, answer));
                self.store.await_rows(group, Box::new(reply));
            }
            Effect::StoreTtlClock { clock, now_ms } => {
                self.store.write_ttl_clock(group, clock, now_ms);
            }
            _ => {}
        }
    }

    /// Loads a group, once nothing of its predecessor is still to be written.
    fn load(&mut self, key: GroupKey, group: ClientGroupId, connect_ms: f64) {
        if let Some(waiting) = self.orphaned.get_mut(&group) {
            return waiting.push((key, connect_ms));
        }
        let mailbox = self.mailbox.clone();
        let reply = move |answer: Result<_, _>| {
            mailbox.put(StoreAnswer::Loaded(key, answer.map(Box::new)));
        };
        self.store.load(group, connect_ms, Box::new(reply));
    }

    /// Takes an answer of the store.
    pub(super) fn store_answer(&mut self, answer: StoreAnswer) {
        match answer {
            StoreAnswer::Loaded(key, loaded) => {
                self.inbox.push_back((key, Event::Loaded(loaded)));
            }
            StoreAnswer::Rows(key, page) => self.inbox.push_back((key, Event::Rows(page))),
            StoreAnswer::CaughtUp(key, page) => self.inbox.push_back((key, Event::CaughtUp(page))),
            StoreAnswer::RowsWritten(key, written) => {
                self.inbox.push_back((key, Event::RowsWritten(written)));
            }
            StoreAnswer::Flushed { first, verdicts } => {
                self.flushing &= !first;
                for (key, verdict) in verdicts {
                    self.settle(key);
                    self.inbox.push_back((key, Event::Flushed(verdict)));
                }
            }
        }
    }

    /// Something is to be written with the next batch.
    pub(super) fn gather(&mut self, key: GroupKey, flush: GroupFlush) {
        self.unsettled.insert(key, flush.group.clone());
        self.flushes.push_back((key, flush));
    }

    /// A group ends. If something of it is still to be written, who has its id next waits for that:
    /// it would load what is about to be overwritten, and be told that another server was here.
    pub(super) fn orphan(&mut self, key: GroupKey) {
        if let Some(group) = self.unsettled.get(&key) {
            self.orphaned.entry(group.clone()).or_default();
        }
    }

    /// The verdict on what a group wrote is here.
    fn settle(&mut self, key: GroupKey) {
        let Some(group) = self.unsettled.remove(&key) else { return };
        for (key, connect_ms) in self.orphaned.remove(&group).into_iter().flatten() {
            // Its clients may have left meanwhile.
            if self.slots.contains_key(&key) {
                self.load(key, group.clone(), connect_ms);
            }
        }
    }

    /// Sends everything that groups have to write as one batch, unless one is under way: while it
    /// is, the next one gathers. A group that has to wait for somebody else holds nobody up.
    pub(super) fn flush(&mut self) {
        if self.flushing || self.flushes.is_empty() {
            return;
        }
        let count = self.flushes.len().min(FLUSH_BATCH);
        let (keys, batch): (Vec<GroupKey>, Vec<GroupFlush>) = self.flushes.drain(..count).unzip();
        self.flushing = true;
        self.counters.flush_batches += 1;
        self.counters.flushes += count as u64;
        let mailbox = self.mailbox.clone();
        let mut first = true;
        self.store.flush(
            batch,
            Box::new(move |verdicts: Vec<Verdict>| {
                let verdicts = verdicts.into_iter().map(|v| (keys[v.at], v.result)).collect();
                let first = std::mem::take(&mut first);
                mailbox.put(StoreAnswer::Flushed { first, verdicts });
            }),
        );
    }
}
