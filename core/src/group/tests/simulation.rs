//! Random clients, lost connections, duplicate connects, old cookies, commits, query changes, pushes,
//! evictions, store and endpoint trouble, lost acknowledgements, takeovers by servers that write, crashes between any two
//! steps, in random order, with answers under way for as long as chance likes. Clients check every
//! rule of the protocol; whenever everything has settled, what they hold equals brute force, and so
//! do the records in the store.
//!
//! A failure prints its seed; `ZERORING_SIM_SEED` runs only that one, `ZERORING_SIM_SEEDS` more,
//! from `ZERORING_SEED` on.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};

use super::super::{ConnId, Event, Pushed, ResetReason};
use super::client::Persisted;
use super::harness::{Answer, CLIENT_SCHEMA, Harness, Socket};
use super::world::Change;
use crate::cvr::store::CvrStoreError;
use crate::cvr::{ClientGroupId, ClientId, QueryHash, RefCounts};
use crate::protocol::custom_query::ValidatedUser;
use crate::protocol::error::{ApiFailure, CallReason};
use crate::protocol::mutate::MutateResponse;
use crate::row::Key;
use crate::value::Value;
use crate::zql::ast::Ast;

const STEPS: usize = 700;
const SEEDS: u64 = 24;
const GROUPS: [&str; 2] = ["g1", "g2"];
const CLIENTS: [&str; 3] = ["a", "b", "c"];

/// Queries by hash; those of upper case are custom ones.
const QUERIES: [(&str, &str); 9] = [
    ("all", r#"{"table":"issue","orderBy":[["id","asc"]]}"#),
    ("all2", r#"{"table":"issue","orderBy":[["id","asc"]]}"#),
    (
        "mine",
        r#"{"table":"issue","where":{"type":"simple","op":"=","left":{"type":"column","name":"owner"},"right":{"type":"literal","value":"o1"}},"orderBy":[["id","asc"]]}"#,
    ),
    ("top", r#"{"table":"issue","orderBy":[["n","desc"],["id","asc"]],"limit":2}"#),
    (
        "tree",
        r#"{"table":"issue","orderBy":[["id","asc"]],"limit":3,"related":[{"correlation":{"parentField":["id"],"childField":["issue"]},"subquery":{"table":"comment","alias":"comments","orderBy":[["id","asc"]]}}]}"#,
    ),
    ("COMMENTS", r#"{"table":"comment","orderBy":[["text","asc"],["id","asc"]],"limit":4}"#),
    (
        "EXISTS",
        r#"{"table":"issue","where":{"type":"correlatedSubquery","op":"EXISTS","related":{"correlation":{"parentField":["id"],"childField":["issue"]},"subquery":{"table":"comment","alias":"x","orderBy":[["id","asc"]]}}},"orderBy":[["id","asc"]]}"#,
    ),
    ("ALL", r#"{"table":"issue","orderBy":[["id","asc"]]}"#),
    ("BAD", "{}"),
];

struct Tab {
    group: &'static str,
    name: &'static str,
    protocol: u32,
    state: Persisted,
    wants: BTreeSet<&'static str>,
    conn: Option<ConnId>,
    /// Deleted by another tab: its storage is gone. It may begin anew once all has settled.
    dead: bool,
}

struct Sim {
    h: Harness,
    rng: StdRng,
    tabs: Vec<Tab>,
    lmids: BTreeMap<(String, String), f64>,
    /// Groups that another server has written, which ours may not have noticed.
    moved: BTreeSet<&'static str>,
    /// Groups that are lost, some of whose clients were told.
    lost: BTreeSet<&'static str>,
    checks: usize,
    /// Clients that were sent away because of that, came back, and were answered.
    came_back: usize,
    /// Pokes that were taken back.
    cancelled: usize,
}

fn ast_of(hash: &str) -> Ast {
    let text = QUERIES.iter().find(|(h, _)| *h == hash).expect("known").1;
    serde_json::from_str(text).expect("an AST")
}

fn is_custom(hash: &str) -> bool {
    hash.bytes().all(|b| b.is_ascii_uppercase())
}

fn put_op(hash: &str, ttl: i32) -> String {
    if is_custom(hash) {
        format!(r#"{{"op":"put","hash":"{hash}","name":"{hash}","args":[1],"ttl":{ttl}}}"#)
    } else {
        let ast = QUERIES.iter().find(|(h, _)| *h == hash).expect("known").1;
        format!(r#"{{"op":"put","hash":"{hash}","ast":{ast},"ttl":{ttl}}}"#)
    }
}

impl Sim {
    fn new(seed: u64) -> Sim {
        let mut rng = StdRng::seed_from_u64(seed);
        let mut h = Harness::new(true);
        Arc::make_mut(&mut h.settings).has_mutate_endpoint = true;
        h.store.defer_above = rng.random_range(0..5);
        h.lazy_sockets = rng.random();
        h.ahead = Some(StdRng::seed_from_u64(rng.random()));
        h.endpoint = Box::new(|_, q| match q.name.as_str() {
            "BAD" => Answer::App("bad"),
            name => {
                Answer::Ast(QUERIES.iter().find(|(h, _)| *h == name).expect("known").1.to_owned())
            }
        });
        let mut tabs = Vec::new();
        for group in GROUPS {
            let protocol = if rng.random_bool(0.5) { 51 } else { 52 };
            for name in CLIENTS {
                tabs.push(Tab {
                    group,
                    name,
                    protocol,
                    state: Persisted::default(),
                    wants: BTreeSet::new(),
                    conn: None,
                    dead: false,
                });
            }
        }
        Sim {
            h,
            rng,
            tabs,
            lmids: BTreeMap::new(),
            moved: BTreeSet::new(),
            lost: BTreeSet::new(),
            checks: 0,
            came_back: 0,
            cancelled: 0,
        }
    }

    fn run(&mut self) {
        for step in 0..STEPS {
            self.step();
            if step % 70 == 69 {
                self.check();
            }
        }
    }

    fn step(&mut self) {
        match self.rng.random_range(0..100) {
            0..35 => self.answer_one(),
            35..57 => self.receive_one(),
            57..59 => self.push_one(),
            59 => self.answer_push(),
            60 => self.write_rows(),
            61..65 => self.upstream_one(),
            65..80 => self.commit(),
            80..85 => self.connect_one(),
            85..88 => self.disconnect_one(),
            88..94 => self.change_one(),
            94..97 => {
                let ms = self.rng.random_range(0.0..800.0);
                self.pass(ms);
            }
            97 => self.trouble(),
            98 => self.delete_one(),
            _ => self.disturb(),
        }
        self.collect_errors();
    }

    fn group(&mut self) -> ClientGroupId {
        GROUPS.choose(&mut self.rng).copied().expect("some").into()
    }

    fn answer_one(&mut self) {
        let group = self.group();
        if self.rng.random_bool(0.5) && self.h.merge(&group) {
            return;
        }
        let of_group = |socket: &&Socket| socket.group == group && socket.has_open_poke();
        if self.h.sockets.values().any(|s| of_group(&s)) && self.rng.random_bool(0.5) {
            // What is half out is taken back.
            self.h.feed(&group, Event::Reset(ResetReason::SchemaChange));
        }
        self.h.answer(&group);
    }

    /// Rows that follow are written while nobody waits for them.
    fn write_rows(&mut self) {
        let group = self.group();
        self.h.write_rows(&group, Ok(()));
    }

    fn open(&mut self) -> Option<(usize, ConnId)> {
        let open: Vec<(usize, ConnId)> =
            self.tabs.iter().enumerate().filter_map(|(i, t)| Some((i, t.conn?))).collect();
        open.choose(&mut self.rng).copied()
    }

    fn receive_one(&mut self) {
        if let Some((_, conn)) = self.open() {
            self.h.receive(conn);
        }
    }

    fn upstream_one(&mut self) {
        if let Some((_, conn)) = self.open() {
            self.h.pump_upstream(conn);
        }
    }

    /// Pushes a mutation of its own, or of another tab.
    fn push_one(&mut self) {
        let Some((tab, conn)) = self.open() else { return };
        let client = CLIENTS.choose(&mut self.rng).expect("some");
        let text = format!(
            r#"["push",{{"clientGroupID":"{}","mutations":[{{"type":"custom","id":1,"clientID":"{client}","name":"m","args":[null],"timestamp":1}}],"pushVersion":1,"timestamp":1,"requestID":"r"}}]"#,
            self.tabs[tab].group
        );
        self.h.say(conn, &text);
    }

    /// The mutate endpoint answers some push, whoever is still there.
    fn answer_push(&mut self) {
        if self.h.pushes.is_empty() {
            return;
        }
        let at = self.rng.random_range(0..self.h.pushes.len());
        let (group, sent) = self.h.pushes.swap_remove(at);
        let answer = match self.rng.random_range(0..8) {
            0 => Err(ApiFailure::call(CallReason::Internal, "down")),
            1 => Err(ApiFailure::http(401, None, "who?")),
            _ => Ok(MutateResponse::Done { user: ValidatedUser::Unsaid, errors: Vec::new() }),
        };
        let mutation_ids = sent.push.mutations.into_iter().map(|m| m.id).collect();
        let pushed = Pushed { conn: sent.conn, revision: sent.revision, mutation_ids, answer };
        self.h.feed(&group, Event::Pushed(Box::new(pushed)));
    }

    fn connect_one(&mut self) {
        let tab = self.rng.random_range(0..self.tabs.len());
        let (dead, closed) = (self.tabs[tab].dead, self.tabs[tab].conn.is_none());
        if !dead && (closed || self.rng.random_bool(0.1)) {
            self.connect(tab);
        }
    }

    /// Connects a tab (again): it says what it wants beyond what it knows to be desired.
    fn connect(&mut self, tab: usize) {
        if let Some(old) = self.tabs[tab].conn.take() {
            // The old socket has not noticed yet: the new one replaces it.
            self.tabs[tab].state = self.h.state(old).clone();
        }
        let ttl = self.ttl();
        let t = &self.tabs[tab];
        let desired = t.state.desired.get(t.name).cloned().unwrap_or_default();
        let mut ops: Vec<String> =
            t.wants.iter().filter(|q| !desired.contains(**q)).map(|q| put_op(q, ttl)).collect();
        let gone = desired.iter().filter(|q| !t.wants.contains(q.as_str()));
        ops.extend(gone.map(|q| format!(r#"{{"op":"del","hash":"{q}"}}"#)));
        let schema = if t.state.cookie.is_none() {
            format!(r#","clientSchema":{CLIENT_SCHEMA}"#)
        } else {
            String::new()
        };
        let (group, name, protocol) = (t.group, t.name, t.protocol);
        let state = t.state.clone();
        let conn = self.h.connect(group, name, None, state, protocol).expect("one user only");
        let patch = ops.join(",");
        self.h.say(
            conn,
            &format!(r#"["initConnection",{{"desiredQueriesPatch":[{patch}]{schema}}}]"#),
        );
        self.tabs[tab].conn = Some(conn);
    }

    fn disconnect_one(&mut self) {
        if let Some((tab, conn)) = self.open() {
            self.tabs[tab].state = self.h.disconnect(conn);
            self.tabs[tab].conn = None;
        }
    }

    fn ttl(&mut self) -> i32 {
        *[0, 300, 1_000, 3_000, -1].choose(&mut self.rng).expect("some")
    }

    fn change_one(&mut self) {
        let tab = self.rng.random_range(0..self.tabs.len());
        let hash = QUERIES.choose(&mut self.rng).expect("some").0;
        let op = if self.tabs[tab].wants.contains(hash) {
            if self.rng.random_bool(0.15) {
                self.tabs[tab].wants.clear();
                r#"{"op":"clear"}"#.to_owned()
            } else {
                self.tabs[tab].wants.remove(hash);
                format!(r#"{{"op":"del","hash":"{hash}"}}"#)
            }
        } else {
            self.tabs[tab].wants.insert(hash);
            put_op(hash, self.ttl())
        };
        if let Some(conn) = self.tabs[tab].conn {
            let text = format!(r#"["changeDesiredQueries",{{"desiredQueriesPatch":[{op}]}}]"#);
            self.h.say(conn, &text);
        }
    }

    fn delete_one(&mut self) {
        let Some((tab, conn)) = self.open() else { return };
        let group = self.tabs[tab].group;
        let gone = self.tabs.iter().position(|t| t.group == group && t.conn.is_none());
        if let Some(gone) = gone {
            let text = format!(r#"["deleteClients",{{"clientIDs":["{}"]}}]"#, self.tabs[gone].name);
            self.h.say(conn, &text);
            self.tabs[gone].dead = true;
            self.tabs[gone].state = Persisted::default();
        }
    }

    fn pass(&mut self, ms: f64) {
        self.h.pass(ms);
    }

    fn trouble(&mut self) {
        let lost = || CvrStoreError::Storage("connection lost".into());
        match self.rng.random_range(0..13) {
            12 => {
                let group = self.group();
                // Whoever is there has heard that they follow, and asks what became of them: a
                // store keeps that answer until somebody asks.
                let asks = self.h.groups.get(&group).is_none_or(|slot| slot.awaits_rows);
                if self.h.store.owes(&group) && asks {
                    let why = CvrStoreError::Storage("disk full".into());
                    self.h.write_rows(&group, Err(why));
                }
            }
            0 => self.h.flush_faults.push_back(CvrStoreError::Storage("disk full".into())),
            1 => self.h.unknown_outcomes += 1,
            // Another server takes the group over, or writes first, and loses it again.
            2 => self.h.flush_faults.push_back(CvrStoreError::Ownership {
                owner: "another".into(),
                granted_ms: self.h.now_ms + 1.0,
                connect_ms: self.h.now_ms,
            }),
            3 => self.h.flush_faults.push_back(CvrStoreError::ConcurrentModification {
                expected: "00".into(),
                actual: "01".into(),
            }),
            4 => self.h.load_faults.push_back(lost()),
            5 => self.h.read_faults.push_back(lost()),
            6..9 => self.move_group(),
            9 => self.h.endpoint_down = Some(ApiFailure::call(CallReason::Internal, "down")),
            _ => self.h.endpoint_down = None,
        }
    }

    /// Another server has the group for a while and writes it; a client that was there comes back
    /// with the cookie that it got, others as they were.
    fn move_group(&mut self) {
        let group = *GROUPS.choose(&mut self.rng).expect("some");
        let id = ClientGroupId::from(group);
        if !self.h.store.knows(&id) || self.h.store.is_lost(&id) {
            return;
        }
        let before = self.h.store.version(&id).cookie();
        let after = self.h.store.moved_on(&id).cookie();
        self.moved.insert(group);
        let was_there = self.tabs.iter_mut().filter(|t| t.group == group && t.conn.is_none());
        for tab in was_there {
            if tab.state.cookie.as_ref() == Some(&before) && self.rng.random_bool(0.5) {
                tab.state.cookie = Some(after.clone());
            }
        }
    }

    /// A server notices when it writes; its clients are sent away, come back, and are answered.
    fn notice_moves(&mut self) {
        for group in std::mem::take(&mut self.moved) {
            let open: Vec<usize> = (0..self.tabs.len())
                .filter(|tab| self.tabs[*tab].group == group && self.tabs[*tab].conn.is_some())
                .collect();
            let change = self.mutation(group, CLIENTS[0]);
            self.h.commit(vec![change]);
            self.h.settle();
            self.collect_errors();
            for tab in open {
                if self.tabs[tab].conn.is_none() && !self.tabs[tab].dead {
                    self.connect(tab);
                    self.h.settle();
                    self.came_back += 1;
                    assert!(self.tabs[tab].conn.is_some(), "{group}: it was not taken back");
                }
            }
        }
    }

    fn mutation(&mut self, group: &str, client: &str) -> Change {
        let lmid = self.lmids.entry((group.into(), client.into())).or_default();
        *lmid += 1.0;
        let values =
            vec![Value::string(group), Value::string(client), Value::Number(*lmid), Value::Null];
        let key = values[..2].iter().cloned().collect();
        (self.h.world.table("zero_0.clients"), key, Some(values))
    }

    fn disturb(&mut self) {
        let group = self.group();
        let reason = [ResetReason::SchemaChange, ResetReason::PermissionsChange];
        match self.rng.random_range(0..5) {
            0 => self.h.feed(&group, Event::Drain),
            1 => self.h.crash(),
            _ => {
                let reason = *reason.choose(&mut self.rng).expect("some");
                self.h.feed(&group, Event::Reset(reason));
            }
        }
    }

    /// What goes wrong for clients is only what was made to go wrong; they come back later.
    fn collect_errors(&mut self) {
        for tab in &mut self.tabs {
            let Some(conn) = tab.conn else { continue };
            let socket = self.h.socket(conn);
            if !socket.closed {
                continue;
            }
            let failed = socket.error.clone();
            self.cancelled += socket.model.cancelled;
            tab.state = socket.model.state.clone();
            if let Some(error) = failed {
                let kind = error.kind_name();
                let group = ClientGroupId::from(tab.group);
                if kind == "ClientNotFound" {
                    // Rows that its CVR owed were lost: all of its clients begin anew.
                    assert!(self.h.store.is_lost(&group), "{error}");
                    self.lost.insert(tab.group);
                } else {
                    assert!(matches!(kind, "Rehome" | "TransformFailed" | "PushFailed"), "{error}");
                }
            }
            tab.conn = None;
            self.h.disconnect(conn);
        }
        self.begin_anew();
    }

    /// Clients of a lost group come back with another one: here it has the same name, so all of
    /// them must have been told.
    fn begin_anew(&mut self) {
        for name in std::mem::take(&mut self.lost) {
            if self.tabs.iter().any(|tab| tab.group == name && tab.conn.is_some()) {
                self.lost.insert(name);
                continue;
            }
            self.h.store.forget(&name.into());
            for tab in self.tabs.iter_mut().filter(|tab| tab.group == name) {
                tab.state = Persisted::default();
            }
        }
    }

    fn commit(&mut self) {
        let mut changes: BTreeMap<(u32, Key), Change> = BTreeMap::new();
        for _ in 0..self.rng.random_range(1..5) {
            let change = self.random_change();
            changes.insert((change.0.id.0, change.1.clone()), change);
        }
        self.h.commit(changes.into_values().collect());
    }

    fn random_change(&mut self) -> Change {
        let key = |s: String| -> Key { [Value::string(s)].into_iter().collect() };
        let (id, issue) = (self.rng.random_range(0..7), self.rng.random_range(0..7));
        let delete = self.rng.random_bool(0.3);
        match self.rng.random_range(0..10) {
            0..5 => {
                let owner = format!("o{}", self.rng.random_range(0..3));
                let n = f64::from(self.rng.random_range(0..5));
                let values =
                    vec![Value::string(format!("i{id}")), Value::string(owner), Value::Number(n)];
                (self.h.world.table("issue"), key(format!("i{id}")), (!delete).then_some(values))
            }
            5..9 => {
                let values = vec![
                    Value::string(format!("c{id}")),
                    Value::string(format!("i{issue}")),
                    Value::string(format!("t{issue}")),
                ];
                let values = (!delete).then_some(values);
                (self.h.world.table("comment"), key(format!("c{id}")), values)
            }
            _ => {
                let group = *GROUPS.choose(&mut self.rng).expect("some");
                let client = *CLIENTS.choose(&mut self.rng).expect("some");
                self.mutation(group, client)
            }
        }
    }

    /// Lets everything come to rest, with all troubles gone, and compares.
    fn check(&mut self) {
        self.h.flush_faults.clear();
        self.h.load_faults.clear();
        self.h.read_faults.clear();
        self.h.unknown_outcomes = 0;
        self.h.endpoint_down = None;
        self.come_to_rest();
        if self.rng.random_bool(0.3) {
            self.move_group();
        }
        self.notice_moves();
        self.come_to_rest();
        for tab in 0..self.tabs.len() {
            if let Some(conn) = self.tabs[tab].conn {
                self.compare(tab, conn);
            }
        }
        for tab in &mut self.tabs {
            tab.dead = false;
        }
        for group in GROUPS {
            if self.tabs.iter().any(|t| t.group == group && t.conn.is_some()) {
                self.compare_store(group);
            }
        }
        assert_eq!(self.h.store.anomalies, 0, "records and engine agree");
        let queries: usize = self.h.groups.values().map(|slot| slot.group.queries()).sum();
        assert_eq!(self.h.world.subscriptions(), queries, "every subscription is of a query");
        assert!(self.h.groups.values().all(|slot| !slot.admitted), "places were given back");
    }

    fn come_to_rest(&mut self) {
        for _ in 0..20 {
            self.h.settle();
            self.pass(60.0);
            self.collect_errors();
            if self.h.is_quiet() {
                break;
            }
        }
    }

    fn compare(&mut self, tab: usize, conn: ConnId) {
        self.checks += 1;
        let t = &self.tabs[tab];
        let group = ClientGroupId::from(t.group);
        let state = self.h.state(conn);
        assert!(!self.h.socket(conn).has_open_poke(), "a poke is open that nobody ends");
        let who = format!("{}/{} at {:?}", t.group, t.name, state.cookie);
        assert!(!self.h.socket(conn).busy, "{who}: a message was not answered");
        assert_eq!(state.cookie, Some(self.h.store.version(&group).cookie()), "{who}: cookie");
        let got: BTreeSet<String> =
            self.h.store.got(&group).iter().map(ToString::to_string).collect();
        assert_eq!(state.got, got, "{who}: got queries");
        // A `del` that was applied but whose poke was lost is undone at the next connect only:
        // the protocol's clients send differences to what they know to be desired.
        let mine = state.desired.get(t.name).cloned().unwrap_or_default();
        for want in t.wants.iter().filter(|w| **w != "BAD" && mine.contains(**w)) {
            assert!(got.contains(*want), "{who}: {want} is not got: {got:?}");
        }
        for client in CLIENTS {
            let desired: BTreeSet<String> = self
                .h
                .store
                .desired(&group, &ClientId::from(client))
                .iter()
                .map(ToString::to_string)
                .collect();
            let known = state.desired.get(client).cloned().unwrap_or_default();
            assert_eq!(known, desired, "{who}: desires of {client}");
        }
        let mut rows = BTreeMap::new();
        for hash in &got {
            for (id, (_, table, row)) in self.h.world.expected(&ast_of(hash)) {
                let json = crate::json::row::wire_json(&table, &row).expect("deliverable");
                let json: serde_json::Value = serde_json::from_slice(json).expect("JSON");
                rows.insert((table.name.to_string(), id), json.to_string());
            }
        }
        assert_eq!(state.rows, rows, "{who}: rows");
        let lmids: BTreeMap<String, i64> = self
            .lmids
            .iter()
            .filter(|((g, _), _)| g == t.group)
            .map(|((_, c), n)| (c.clone(), *n as i64))
            .collect();
        assert_eq!(state.lmids, lmids, "{who}: last mutation ids");
    }

    /// Every live record is what the queries reference, no more and no less.
    fn compare_store(&mut self, group: &'static str) {
        let id = ClientGroupId::from(group);
        let cvr = self.h.store.load(&id).cvr;
        let mut expected: BTreeMap<String, (String, RefCounts)> = BTreeMap::new();
        for query in cvr.queries.values().filter(|q| q.transformation_hash.is_some()) {
            let ast = match &query.body {
                crate::cvr::QueryBody::Client { ast } | crate::cvr::QueryBody::Internal { ast } => {
                    (**ast).clone()
                }
                crate::cvr::QueryBody::Custom { name, .. } => ast_of(name),
            };
            for (row_id, (count, _, row)) in self.h.world.expected(&ast) {
                let entry = expected
                    .entry(row_id)
                    .or_insert_with(|| (row.version.to_string(), RefCounts::new()));
                entry.1.add(&QueryHash::from(query.id.as_str()), count as i64);
            }
        }
        let stored: BTreeMap<String, (String, RefCounts)> = self
            .h
            .store
            .rows(&id)
            .into_iter()
            .map(|r| {
                let counts = r.ref_counts.clone().unwrap_or_default();
                (r.id.text().to_owned(), (r.row_version.to_string(), counts))
            })
            .collect();
        assert_eq!(stored, expected, "{group}: row records");
    }
}

#[test]
fn clients_hold_what_brute_force_says_whatever_happens() {
    let one = std::env::var("ZERORING_SIM_SEED").ok().and_then(|s| s.parse().ok());
    let seeds: u64 =
        std::env::var("ZERORING_SIM_SEEDS").ok().and_then(|s| s.parse().ok()).unwrap_or(SEEDS);
    let first = std::env::var("ZERORING_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(0u64);
    let range = one.map_or(first..first + seeds, |seed: u64| seed..seed + 1);
    let (mut checks, mut came_back, mut early, mut cancelled, mut merged) = (0, 0, 0, 0, 0);
    for seed in range {
        let sim = std::panic::catch_unwind(|| {
            let mut sim = Sim::new(seed);
            sim.run();
            let open = sim.tabs.iter().filter_map(|tab| Some(sim.h.socket(tab.conn?)));
            let cancelled = open.map(|socket| socket.model.cancelled).sum::<usize>();
            let counts = [sim.checks, sim.came_back, sim.h.went_ahead, sim.h.slices_merged];
            (counts, sim.cancelled + cancelled)
        });
        match sim {
            Ok(([n, back, rows, slices], pokes)) => {
                (checks, came_back) = (checks + n, came_back + back);
                (early, cancelled, merged) = (early + rows, cancelled + pokes, merged + slices);
            }
            Err(panic) => {
                eprintln!("failed with ZERORING_SIM_SEED={seed}");
                std::panic::resume_unwind(panic);
            }
        }
    }
    println!(
        "simulated groups: {checks} comparisons agree, {came_back} clients came back, {early} rows \
         went ahead, {cancelled} pokes were cancelled, {merged} slices were merged"
    );
    // About one in twenty histories takes a poke back: some of those that are always run do.
    let takes_back = cancelled > 0 || (first > 0 && seeds < 500);
    assert!(
        one.is_some()
            || (checks > 100 && came_back > 10 && early > 300 && takes_back && merged > 10),
        "{checks} comparisons, {early} early rows, {cancelled} cancelled, {merged} merged: too \
         little"
    );
}
