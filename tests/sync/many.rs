//! Many client groups come at once: they come up in the order in which they came, a bounded number
//! of them at a time, and those that are up are served meanwhile.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex};

use zeroring_core::cvr::store::{CatchupPage, InspectedQuery, Loaded, Purged, RowPage};
use zeroring_core::cvr::{ClientGroupId, ClientId, GroupFlush, TtlClock};
use zeroring_storage::cvr_store::embedded::EmbeddedCvrStore;
use zeroring_storage::cvr_store::{
    Answer, CatchupScan, CvrStore, PurgeLimits, Reply, RowLookup, Verdicts,
};

use crate::support::*;

/// Groups that may come up at once (`src/sync/admission.rs`).
const PLACES: usize = 256;
const CLIENTS: usize = 400;

/// Loads that were asked for and wait for the test.
type Held = VecDeque<(ClientGroupId, f64, Reply<Answer<Loaded>>)>;

/// A store that lets no group be loaded before it is told to.
struct HeldStore {
    store: EmbeddedCvrStore,
    held: Mutex<(bool, Held)>,
    asked: Condvar,
    _dir: tempfile::TempDir,
}

impl HeldStore {
    fn new() -> Arc<HeldStore> {
        let dir = tempfile::tempdir().unwrap();
        let store = EmbeddedCvrStore::open(&dir.path().join("cvr.db"), "task-1").unwrap();
        Arc::new(HeldStore { store, held: Mutex::default(), asked: Condvar::new(), _dir: dir })
    }

    fn hold(&self) {
        self.held.lock().unwrap().0 = true;
    }

    fn holds(&self) -> usize {
        self.held.lock().unwrap().1.len()
    }

    /// Lets the load that was asked for first go on; its group.
    fn let_one_go(&self) -> String {
        let held = self.held.lock().unwrap();
        let mut held =
            self.asked.wait_timeout_while(held, PATIENCE, |(_, held)| held.is_empty()).unwrap().0;
        let (group, connect_ms, reply) = held.1.pop_front().expect("somebody asks in time");
        let name = group.to_string();
        self.store.load(group, connect_ms, reply);
        name
    }
}

impl CvrStore for HeldStore {
    fn load(&self, group: ClientGroupId, connect_ms: f64, reply: Reply<Answer<Loaded>>) {
        let mut held = self.held.lock().unwrap();
        if held.0 {
            held.1.push_back((group, connect_ms, reply));
            self.asked.notify_all();
        } else {
            self.store.load(group, connect_ms, reply);
        }
    }

    fn flush(&self, batch: Vec<GroupFlush>, reply: Verdicts) {
        self.store.flush(batch, reply);
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

#[test]
fn groups_come_up_in_order_a_bounded_number_at_a_time_while_others_are_served() {
    let store = HeldStore::new();
    let mut server = Server::start(&Setup { store: Some(store.clone()), ..Setup::default() });
    let mut served = Client::joined(&server, &dial("served", "c"), &put("q"));
    served.pokes_until(is_got);

    store.hold();
    let mut clients: Vec<Client> = (0..CLIENTS)
        .map(|n| Client::joined(&server, &dial(&format!("g{n:03}"), "c"), &put("q")))
        .collect();
    let waiting = (CLIENTS - PLACES) as u64;
    eventually("all have asked", || server.number("groupsWaiting") == waiting);
    assert_eq!((store.holds(), server.number("groupsComingUp")), (PLACES, PLACES as u64));

    for n in 0..3 {
        let new = server.issue(&format!("i{n}"), n);
        let version = server.commit(vec![new]);
        served.poke();
        assert_eq!(served.cookie.as_deref(), Some(version.as_str()), "it is not kept from its own");
    }

    for (n, client) in clients.iter_mut().enumerate() {
        assert!(store.holds() <= PLACES);
        assert_eq!(store.let_one_go(), format!("g{n:03}"));
        // Its place is the next one's: so it is not before it is up.
        if n % 40 == 0 {
            let parts = client.pokes_until(is_got);
            assert_eq!(parts.iter().filter_map(|p| p["rowsPatch"].as_array()).flatten().count(), 3);
        }
    }
    for (n, client) in clients.iter_mut().enumerate().filter(|(n, _)| n % 40 != 0) {
        let rows = client.pokes_until(is_got);
        assert!(!rows.is_empty(), "g{n:03}");
    }
    let up = CLIENTS as u64 + 1;
    eventually("all are up", || server.number("groupsUp") == up);
    assert_eq!(server.number("mostGroupsComingUp"), PLACES as u64);
    assert_eq!(server.number("groupsAdmitted"), up);
    assert_eq!((server.number("groupsWaiting"), server.number("groupsComingUp")), (0, 0));
}
