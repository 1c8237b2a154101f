//! Between the groups of an executor and the CVR store: loads, scans, and one flush for many.

use zeroring_core::cvr::QueryHash;
use zeroring_core::cvr::store::{CatchupRange, GroupFlush, RowCursor};
use zeroring_core::group::{Effect, Event, Missed};
use zeroring_storage::cvr_store::{RowLookup, RowScan};

use super::answers::{FlushLane, StoreAnswer};
use super::groups::{GroupKey, State};

/// Rows of a catch-up scan per page.
const SCAN_PAGE: usize = 10_000;
/// Groups in one flush: bounds the time to the first verdict.
const FLUSH_BATCH: usize = 1_024;
/// An update of more rows than this is a batch of its own.
pub(super) const LARGE_FLUSH_ROWS: usize = 1_000;

/// A catch-up scan under way: configuration first, then rows, page by page.
pub(super) struct Scan {
    range: CatchupRange,
    except: Vec<QueryHash>,
    missed: Missed,
}

impl State {
    /// Nothing of a stopped group is left to be written.
    pub(super) fn is_flushed(&self) -> bool {
        self.flushes.is_empty()
            && self.large_flushes.is_empty()
            && !self.flushing
            && !self.flushing_large
    }

    pub(super) fn ask_store(&mut self, key: GroupKey, effect: Effect) {
        let Some(slot) = self.slots.get_mut(&key) else { return };
        let group = slot.group.id().clone();
        let mailbox = self.mailbox.clone();
        match effect {
            Effect::Load { connect_ms } => {
                let reply = move |answer: Result<_, _>| {
                    mailbox.put(StoreAnswer::Loaded(key, answer.map(Box::new)));
                };
                self.store.load(group, connect_ms, Box::new(reply));
            }
            Effect::ReadRows { current, queries } => {
                let lookup = RowLookup { group, current, queries, ids: Vec::new() };
                let reply = move |answer| mailbox.put(StoreAnswer::Rows(key, answer));
                self.store.rows(lookup, Box::new(reply));
            }
            Effect::CatchUp { range, except } => {
                let missed = Missed::default();
                slot.scan = Some(Box::new(Scan { range: range.clone(), except, missed }));
                let reply = move |answer| mailbox.put(StoreAnswer::MissedConfig(key, answer));
                self.store.catchup_config(range, Box::new(reply));
            }
            Effect::StoreTtlClock { clock, now_ms } => {
                self.store.write_ttl_clock(group, clock, now_ms);
            }
            _ => {}
        }
    }

    fn scan_rows(&mut self, key: GroupKey, from: Option<RowCursor>) {
        let Some(scan) = self.slots.get(&key).and_then(|slot| slot.scan.as_ref()) else { return };
        let request = RowScan {
            range: scan.range.clone(),
            without: scan.except.clone(),
            from,
            limit: SCAN_PAGE,
        };
        let mailbox = self.mailbox.clone();
        let reply = move |answer| mailbox.put(StoreAnswer::MissedRows(key, answer));
        self.store.catchup_rows(request, Box::new(reply));
    }

    /// Takes an answer of the store.
    pub(super) fn store_answer(&mut self, answer: StoreAnswer) {
        match answer {
            StoreAnswer::Loaded(key, loaded) => {
                self.inbox.push_back((key, Event::Loaded(loaded)));
            }
            StoreAnswer::Rows(key, rows) => self.inbox.push_back((key, Event::Rows(rows))),
            StoreAnswer::MissedConfig(key, Ok(config)) => {
                if let Some(scan) = self.slots.get_mut(&key).and_then(|s| s.scan.as_mut()) {
                    scan.missed.config = config;
                    self.scan_rows(key, None);
                }
            }
            StoreAnswer::MissedRows(key, Ok(page)) => {
                let Some(slot) = self.slots.get_mut(&key) else { return };
                let Some(scan) = slot.scan.as_mut() else { return };
                scan.missed.rows.extend(page.rows);
                if page.next.is_some() {
                    self.scan_rows(key, page.next);
                } else if let Some(scan) = slot.scan.take() {
                    self.inbox.push_back((key, Event::CaughtUp(Ok(scan.missed))));
                }
            }
            StoreAnswer::MissedConfig(key, Err(error))
            | StoreAnswer::MissedRows(key, Err(error)) => {
                if let Some(slot) = self.slots.get_mut(&key) {
                    slot.scan = None;
                }
                self.inbox.push_back((key, Event::CaughtUp(Err(error))));
            }
            StoreAnswer::Flushed(lane, verdicts) => {
                match lane {
                    FlushLane::Small => self.flushing = false,
                    FlushLane::Large => self.flushing_large = false,
                }
                for (key, verdict) in verdicts {
                    self.inbox.push_back((key, Event::Flushed(verdict)));
                }
            }
        }
    }

    /// Sends everything that groups have to write as one batch, unless one is under way: while it
    /// is, the next one gathers. Large updates go one by one beside them.
    pub(super) fn flush(&mut self) {
        if !self.flushing && !self.flushes.is_empty() {
            let count = self.flushes.len().min(FLUSH_BATCH);
            let batch = self.flushes.drain(..count).collect();
            self.flushing = true;
            self.send_flushes(FlushLane::Small, batch);
        }
        if !self.flushing_large
            && let Some(large) = self.large_flushes.pop_front()
        {
            self.flushing_large = true;
            self.send_flushes(FlushLane::Large, vec![large]);
        }
    }

    fn send_flushes(&mut self, lane: FlushLane, batch: Vec<(GroupKey, GroupFlush)>) {
        self.counters.flush_batches += 1;
        self.counters.flushes += batch.len() as u64;
        let (keys, batch): (Vec<GroupKey>, Vec<GroupFlush>) = batch.into_iter().unzip();
        let mailbox = self.mailbox.clone();
        self.store.flush(
            batch,
            Box::new(move |verdicts| {
                let verdicts = keys.into_iter().zip(verdicts.into_iter().map(|v| v.result));
                mailbox.put(StoreAnswer::Flushed(lane, verdicts.collect()));
            }),
        );
    }
}
