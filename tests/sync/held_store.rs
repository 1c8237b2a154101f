//! A store of client view records that does what it is asked when the test says so.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex};

use zeroring_core::cvr::store::{CatchupPage, InspectedQuery, Loaded, Purged, RowPage};
use zeroring_core::cvr::{ClientGroupId, ClientId, GroupFlush, TtlClock};
use zeroring_storage::cvr_store::embedded::EmbeddedCvrStore;
use zeroring_storage::cvr_store::{
    Answer, CatchupScan, CvrStore, PurgeLimits, Reply, RowLookup, Verdicts,
};

use crate::support::PATIENCE;

type Load = (ClientGroupId, f64, Reply<Answer<Loaded>>);
type Flush = (Vec<GroupFlush>, Verdicts);

/// What was asked for and waits for the test, if it is to wait.
#[derive(Default)]
struct Held {
    holds_loads: bool,
    loads: VecDeque<Load>,
    holds_flushes: bool,
    flushes: VecDeque<Flush>,
    overtaking: Vec<ClientGroupId>,
}

/// The embedded store, behind a door.
pub struct HeldStore {
    store: EmbeddedCvrStore,
    held: Mutex<Held>,
    asked: Condvar,
    _dir: tempfile::TempDir,
}

impl HeldStore {
    pub fn new() -> Arc<HeldStore> {
        let dir = tempfile::tempdir().unwrap();
        let store = EmbeddedCvrStore::open(&dir.path().join("cvr.db"), "task-1").unwrap();
        Arc::new(HeldStore { store, held: Mutex::default(), asked: Condvar::new(), _dir: dir })
    }

    /// From now on loads wait.
    pub fn hold_loads(&self) {
        self.held.lock().unwrap().holds_loads = true;
    }

    pub fn loads_held(&self) -> usize {
        self.held.lock().unwrap().loads.len()
    }

    /// Lets the load that was asked for first go on; its group.
    pub fn let_a_load_go(&self) -> String {
        let (group, connect_ms, reply) = self.first(|held| &mut held.loads);
        let name = group.to_string();
        self.store.load(group, connect_ms, reply);
        name
    }

    /// From now on flushes wait.
    pub fn hold_flushes(&self) {
        self.held.lock().unwrap().holds_flushes = true;
    }

    /// Waits for a flush, and lets it and all that follow go on when `meanwhile` is over.
    pub fn let_flushes_go_after(&self, meanwhile: impl FnOnce()) {
        let (batch, reply) = self.first(|held| &mut held.flushes);
        // Seen by loads until it is handed on.
        self.held.lock().unwrap().flushes.push_front((batch, reply));
        meanwhile();
        let held = &mut *self.held.lock().unwrap();
        held.holds_flushes = false;
        held.flushes.drain(..).for_each(|(batch, reply)| self.store.flush(batch, reply));
    }

    /// Groups that were loaded while something of theirs was waiting to be written.
    pub fn overtaking(&self) -> Vec<ClientGroupId> {
        self.held.lock().unwrap().overtaking.clone()
    }

    fn first<T>(&self, of: impl Fn(&mut Held) -> &mut VecDeque<T>) -> T {
        let held = self.held.lock().unwrap();
        let none = |held: &mut Held| of(held).is_empty();
        let mut held = self.asked.wait_timeout_while(held, PATIENCE, none).unwrap().0;
        of(&mut held).pop_front().expect("somebody asks in time")
    }
}

impl CvrStore for HeldStore {
    fn load(&self, group: ClientGroupId, connect_ms: f64, reply: Reply<Answer<Loaded>>) {
        let mut held = self.held.lock().unwrap();
        if held.flushes.iter().any(|(batch, _)| batch.iter().any(|flush| flush.group == group)) {
            held.overtaking.push(group.clone());
        }
        if held.holds_loads {
            held.loads.push_back((group, connect_ms, reply));
            self.asked.notify_all();
        } else {
            self.store.load(group, connect_ms, reply);
        }
    }

    fn flush(&self, batch: Vec<GroupFlush>, reply: Verdicts) {
        let mut held = self.held.lock().unwrap();
        if held.holds_flushes {
            held.flushes.push_back((batch, reply));
            self.asked.notify_all();
        } else {
            self.store.flush(batch, reply);
        }
    }

    fn rows(&self, lookup: RowLookup, reply: Reply<Answer<RowPage>>) {
        self.store.rows(lookup, reply);
    }

    fn catch_up(&self, scan: CatchupScan, reply: Reply<Answer<CatchupPage>>) {
        self.store.catch_up(scan, reply);
    }

    fn await_rows(&self, group: ClientGroupId, reply: Reply<Answer<()>>) {
        self.store.await_rows(group, reply);
    }

    fn write_ttl_clock(&self, group: ClientGroupId, clock: TtlClock, now_ms: f64) {
        self.store.write_ttl_clock(group, clock, now_ms);
    }

    fn inspect(
        &self,
        group: ClientGroupId,
        client: Option<ClientId>,
        clock: TtlClock,
        reply: Reply<Answer<Vec<InspectedQuery>>>,
    ) {
        self.store.inspect(group, client, clock, reply);
    }

    fn purge(&self, limits: PurgeLimits, reply: Reply<Answer<Purged>>) {
        self.store.purge(limits, reply);
    }
}
