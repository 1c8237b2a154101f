//! Updaters and store against a plain model, under random operations: whatever happens, a client
//! that applied the patches it was sent has exactly the rows of its group's queries, and the right
//! desired and got sets.
//!
//! What happens: clients come, go, and change their minds; commits, also several at once and
//! backfills; queries change their meaning; groups move to another server; servers die before a
//! flush, after it (nobody was told), and in the middle of telling; another server takes the group
//! over while a flush is prepared; flushes come from snapshots that are long outdated.
//!
//! Several groups run at once, each on a thread of its own, so that flushes meet in batches. Each
//! has its own seed. One of the two servers writes rows of all but the smallest flushes after their
//! metadata, some milliseconds later, so that they coalesce, and that take-overs and reads meet rows
//! that follow.
//!
//! Set `CVR_SEED` to repeat a run; for longer ones `CVR_STEPS` (of all groups), `CVR_GROUPS`, and
//! `CVR_SECONDS`, after which no more steps are begun. A temporary directory in memory (`TMPDIR`)
//! makes Postgres faster.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use zeroring_core::cvr::advance::{CountChange, RowDeltas};
use zeroring_core::cvr::catchup::{config_patches, row_patch};
use zeroring_core::cvr::store::{CatchupRange, CvrStoreError, PreparedFlush};
use zeroring_core::cvr::{
    ClientId, ConfigUpdater, Cvr, DesiredPut, Executed, FlushTimes, Patch, QueryBody, QueryHash,
    QueryUpdater, ReceivedRow, RefCounts, RowIdentity, RowRecords, TtlClock, VersionedPatch,
    is_expired,
};
use zeroring_core::row::RowRef;
use zeroring_core::value::Value;
use zeroring_core::version::{CvrVersion, StateVersion};
use zeroring_storage::cvr_store::{CatchupScan, RowOptions, RowPace};

use crate::lab::*;

const ROWS: i64 = 10;
const QUERIES: [&str; 5] = ["a", "b", "c", "d", "e"];
const CLIENTS: [&str; 3] = ["x", "y", "z"];

/// The replica, and what each query selects from it.
#[derive(Clone, Default)]
struct World {
    at: u64,
    rows: BTreeMap<i64, RowRef>,
    /// Occurrences by query and row; only rows that exist, never 0.
    results: BTreeMap<QueryHash, BTreeMap<i64, i64>>,
    /// How often the query's transformation changed.
    generations: BTreeMap<QueryHash, u64>,
}

impl World {
    fn state(&self) -> StateVersion {
        // Every fifth commit is a backfill: a minor version.
        let major = StateVersion::from_lsn(1 + self.at / 5);
        match self.at % 5 {
            0 => major,
            n => StateVersion::parse(&format!("{major}.{}", StateVersion::from_lsn(n))).unwrap(),
        }
    }

    fn count(&self, query: &QueryHash, row: i64) -> i64 {
        self.results.get(query).and_then(|r| r.get(&row)).copied().unwrap_or(0)
    }

    fn hash(&self, query: &QueryHash) -> Arc<str> {
        format!("{query}#{}", self.generations.get(query).unwrap_or(&0)).into()
    }

    fn signature(&self, query: &QueryHash) -> u64 {
        let rows = self.results.get(query).into_iter().flatten();
        rows.filter(|(_, n)| *n % 2 != 0).fold(0, |s, (row, _)| s ^ id_of(*row).signature_unit())
    }

    fn commit(&mut self, rng: &mut StdRng) {
        self.at += 1;
        let state = self.state();
        for _ in 0..rng.random_range(1..4) {
            let id = rng.random_range(0..ROWS);
            if rng.random_bool(0.25) {
                self.rows.remove(&id);
            } else {
                self.rows.insert(id, row(&state, rng.random_range(0..1_000)));
            }
        }
        for _ in 0..rng.random_range(0..5) {
            let query = any_query(rng);
            let count = [0, 1, 1, 2, 3][rng.random_range(0..5)];
            self.results.entry(query).or_default().insert(rng.random_range(0..ROWS), count);
        }
        for result in self.results.values_mut() {
            result.retain(|id, n| *n > 0 && self.rows.contains_key(id));
        }
    }
}

fn any_query(rng: &mut StdRng) -> QueryHash {
    let internal = ["lmids", "mutationResults"];
    match rng.random_range(0..QUERIES.len() + 1) {
        n if n < QUERIES.len() => QUERIES[n].into(),
        _ => internal[rng.random_range(0..2)].into(),
    }
}

fn id_of(row: i64) -> Arc<RowIdentity> {
    row_id(if row % 2 == 0 { "even" } else { "odd.ones" }, row)
}

fn number_of(id: &RowIdentity) -> i64 {
    match id.key()[0].1 {
        Value::Number(n) => n as i64,
        _ => panic!("{id}"),
    }
}

/// What a client has.
#[derive(Default)]
struct Client {
    base: Option<CvrVersion>,
    connected: bool,
    rows: BTreeMap<i64, Value>,
    got: BTreeSet<QueryHash>,
    desired: BTreeMap<ClientId, BTreeSet<QueryHash>>,
}

impl Client {
    fn apply(&mut self, patches: &[VersionedPatch], end: &CvrVersion) {
        for p in patches {
            if self.base.as_ref().is_some_and(|base| p.to_version <= *base) {
                continue;
            }
            match p.patch.clone() {
                Patch::DesiredPut(c, q) => {
                    self.desired.entry(c).or_default().insert(q);
                }
                Patch::DesiredDel(c, q) => {
                    self.desired.entry(c).or_default().remove(&q);
                }
                Patch::GotPut(q) => {
                    self.got.insert(q);
                }
                Patch::GotDel(q) => {
                    self.got.remove(&q);
                }
                Patch::RowPut(id, row) => {
                    self.rows.insert(number_of(&id), row.values[0].clone());
                }
                Patch::RowDel(id) => {
                    self.rows.remove(&number_of(&id));
                }
            }
        }
        assert!(self.base.as_ref().is_none_or(|base| base <= end));
        self.base = Some(end.clone());
    }
}

/// The server of the group is gone, or has lost the group: somebody loads it anew.
#[derive(Debug)]
struct Crashed;

/// How often what happened.
#[derive(Debug, Default, Clone, Copy, PartialEq)]
struct Events {
    died_before_flush: u64,
    answer_lost: u64,
    died_while_telling: u64,
    taken_over: u64,
    outdated: u64,
    restarts: u64,
    rows_followed: u64,
}

/// A group, its server and its clients.
struct Group<'a> {
    servers: &'a [Server],
    server: usize,
    rng: StdRng,
    clock: f64,
    world: World,
    /// Commits that the engine has not seen.
    commits: Vec<World>,
    /// The world as the engine has it: what is delivered comes from here.
    engine: World,
    /// Queries that run, and the hash with which they do.
    running: BTreeMap<QueryHash, Arc<str>>,
    cvr: Cvr,
    clients: BTreeMap<ClientId, Client>,
    /// For attempts with an old snapshot.
    stale: Option<Cvr>,
    steps: u64,
    events: Events,
}

impl Group<'_> {
    fn times(&self) -> FlushTimes {
        FlushTimes { connect_ms: self.clock, now_ms: self.clock, ttl_clock: TtlClock(self.clock) }
    }

    fn server(&self) -> &Server {
        &self.servers[self.server]
    }

    /// Flushes; the snapshot moves only if there was something to flush.
    fn flush(&mut self, prepared: Option<PreparedFlush>) -> Result<(), Crashed> {
        let Some(prepared) = prepared else { return Ok(()) };
        match self.rng.random_range(0..100) {
            0 => {
                self.events.died_before_flush += 1;
                return Err(Crashed);
            }
            1 | 2 => return self.lose_to_another(&prepared),
            _ => {}
        }
        let written = self.server().flush(&prepared.flush).unwrap();
        assert_eq!(written.anomalies, 0, "engine and CVR agree on what is live");
        self.events.rows_followed += u64::from(written.rows_follow);
        if self.rng.random_bool(0.05) {
            self.stale = Some(self.cvr.clone());
        }
        assert!(prepared.cvr.version >= self.cvr.version);
        self.cvr = prepared.cvr;
        if self.rng.random_bool(0.01) {
            self.events.answer_lost += 1;
            return Err(Crashed);
        }
        Ok(())
    }

    /// While the flush was prepared, another server has loaded the group and changed it.
    fn lose_to_another(&mut self, prepared: &PreparedFlush) -> Result<(), Crashed> {
        let other = (self.server + 1) % self.servers.len();
        let later = self.clock + 1.0;
        let loaded = self.servers[other].try_load(self.cvr.id.as_str(), later).unwrap();
        assert_eq!(loaded.cvr.version, self.cvr.version);
        let mut updater = ConfigUpdater::new(&loaded.cvr);
        let rivals = ["rival", "other rival"];
        let (comes, goes) = (self.events.taken_over % 2, (self.events.taken_over + 1) % 2);
        updater.ensure_client(&rivals[comes as usize].into(), &shard());
        updater.delete_client(&rivals[goes as usize].into(), TtlClock(self.clock));
        let times = FlushTimes { connect_ms: later, ..self.times() };
        let change = updater.finish(times).unwrap();
        self.servers[other].flush(&change.flush).unwrap();
        self.cvr = change.cvr;
        let refused = self.server().flush(&prepared.flush).unwrap_err();
        assert!(matches!(refused, CvrStoreError::Ownership { .. }), "{refused}");
        let refused = self.server().try_load(self.cvr.id.as_str(), self.clock).unwrap_err();
        assert!(matches!(refused, CvrStoreError::Ownership { .. }), "{refused}");
        self.clock = later;
        self.events.taken_over += 1;
        Err(Crashed)
    }

    fn poke(
        &mut self,
        patches: &[VersionedPatch],
        only_at: Option<&CvrVersion>,
    ) -> Result<(), Crashed> {
        let dies = self.rng.random_bool(0.01);
        for client in self.clients.values_mut().filter(|c| c.connected) {
            let base = client.base.clone().unwrap_or_default();
            let unheard = dies && self.rng.random_bool(0.5);
            if only_at.is_none_or(|at| base == *at) && !unheard {
                client.apply(patches, &self.cvr.version);
            }
        }
        if dies {
            self.events.died_while_telling += 1;
            return Err(Crashed);
        }
        Ok(())
    }

    fn config(&mut self) -> Result<(), Crashed> {
        let client = ClientId::from(CLIENTS[self.rng.random_range(0..CLIENTS.len())]);
        if !self.clients.get(&client).is_some_and(|c| c.connected) {
            return self.connect(&client);
        }
        let clock = TtlClock(self.clock);
        let mut queries: Vec<QueryHash> = Vec::new();
        for _ in 0..self.rng.random_range(1..3) {
            queries.push(QUERIES[self.rng.random_range(0..QUERIES.len())].into());
        }
        let mut updater = ConfigUpdater::new(&self.cvr);
        let mut left = None;
        let patches = match self.rng.random_range(0..12) {
            0..=5 => {
                let puts: Vec<_> = queries.into_iter().map(|q| self.put(q)).collect();
                updater.put_desired(&client, &puts).unwrap()
            }
            6..=8 => updater.inactivate_desired(&client, &queries, clock),
            9 => updater.delete_desired(&client, &queries),
            10 => updater.clear_desired(&client),
            _ => {
                left = self.clients.keys().find(|c| **c != client).cloned();
                left.as_ref().map_or(Vec::new(), |c| updater.delete_client(c, clock))
            }
        };
        let before = self.cvr.version.clone();
        let prepared = updater.finish(self.times());
        self.flush(prepared)?;
        if let Some(left) = left {
            self.clients.remove(&left);
        }
        if self.cvr.version > before {
            self.poke(&patches, Some(&before))?;
        }
        self.sync()
    }

    fn put(&mut self, query: QueryHash) -> DesiredPut {
        let ttl_ms = [0.0, 5.0, 50.0, 500.0, -1.0][self.rng.random_range(0..5)];
        let body = QueryBody::Custom { name: "n".into(), args: format!("[\"{query}\"]").into() };
        DesiredPut { query, body, ttl_ms }
    }

    fn connect(&mut self, id: &ClientId) -> Result<(), Crashed> {
        let known = self.clients.entry(id.clone()).or_default();
        known.connected = true;
        let before = self.cvr.version.clone();
        let mut updater = ConfigUpdater::new(&self.cvr);
        updater.ensure_client(id, &shard());
        let prepared = updater.finish(self.times());
        self.flush(prepared)?;
        if self.cvr.version > before {
            self.poke(&[], Some(&before))?;
        }
        self.sync()
    }

    /// Brings the running queries in line with the CVR, and late clients up to date.
    fn sync(&mut self) -> Result<(), Crashed> {
        let clock = TtlClock(self.clock);
        let expired = |q: &zeroring_core::cvr::Query| is_expired(q, clock);
        let removed: Vec<_> =
            self.cvr.queries.values().filter(|q| expired(q)).map(|q| q.id.clone()).collect();
        let added: Vec<_> = self
            .cvr
            .queries
            .values()
            .filter(|q| !expired(q))
            .map(|q| Executed { id: q.id.clone(), transformation_hash: self.engine.hash(&q.id) })
            .filter(|e| self.running.get(&e.id) != Some(&e.transformation_hash))
            .collect();
        let old = self.cvr.version.clone();
        let mut patches = Vec::new();
        if !removed.is_empty() || !added.is_empty() {
            patches = self.execute(&added, &removed)?;
        }
        let without = added.into_iter().map(|e| e.id).collect();
        patches.extend(self.catch_up(&old, without));
        self.poke(&patches, None)
    }

    fn execute(
        &mut self,
        added: &[Executed],
        removed: &[QueryHash],
    ) -> Result<Vec<VersionedPatch>, Crashed> {
        let mut updater =
            QueryUpdater::new(&self.cvr, &self.engine.state(), &StateVersion::zero()).unwrap();
        let stored = |e: &Executed| self.cvr.query(&e.id).unwrap().transformation_hash.clone();
        if added.iter().any(|e| stored(e).as_ref() == Some(&e.transformation_hash)) {
            updater.ensure_new_version();
        }
        let mut patches = updater.track_queries(added, removed).unwrap();
        for id in removed {
            self.running.remove(id);
        }
        let mut received: BTreeMap<i64, RefCounts> = BTreeMap::new();
        for e in added {
            self.running.insert(e.id.clone(), e.transformation_hash.clone());
            for (row, n) in self.engine.results.get(&e.id).into_iter().flatten() {
                received.entry(*row).or_default().add(&e.id, *n);
            }
        }
        let records = self.records(&updater, &received);
        for (row, counts) in received {
            // Now and then a row comes in two batches.
            let mut parts = vec![counts];
            if parts[0].len() > 1 && self.rng.random_bool(0.3) {
                let counts = parts.remove(0);
                parts.extend(counts.iter().map(|(q, n)| RefCounts::of(q.clone(), n)));
            }
            for counts in parts {
                let contents = Some(self.engine.rows[&row].clone());
                let row = ReceivedRow { id: id_of(row), row: contents, counts };
                patches.extend(updater.received([row], &records).unwrap());
            }
        }
        patches.extend(updater.delete_unreferenced_rows(&records).unwrap());
        self.finish(updater)?;
        Ok(patches)
    }

    fn records(&self, updater: &QueryUpdater, received: &BTreeMap<i64, RefCounts>) -> RowRecords {
        if !self.cvr.may_have_rows() {
            return RowRecords::default();
        }
        let touched: Vec<_> = updater.touched().iter().map(QueryHash::as_str).collect();
        let ids: Vec<_> = received.keys().map(|row| id_of(*row)).collect();
        RowRecords::new(self.server().rows(&self.cvr, &touched, &ids).unwrap())
    }

    fn finish(&mut self, updater: QueryUpdater) -> Result<(), Crashed> {
        let prepared = updater.finish(self.times(), |q| {
            self.running.contains_key(q).then(|| self.engine.signature(q))
        });
        self.flush(prepared)
    }

    fn catch_up(&mut self, old: &CvrVersion, without: Vec<QueryHash>) -> Vec<VersionedPatch> {
        let after = self.clients.values().filter(|c| c.connected).map(|c| c.base.clone()).min();
        let range = CatchupRange {
            group: self.cvr.id.clone(),
            after: after.unwrap_or(Some(old.clone())),
            up_to: old.clone(),
            current: self.cvr.version.clone(),
        };
        let mut patches = Vec::new();
        let mut from = None;
        loop {
            let limit = self.rng.random_range(1..6);
            let scan = CatchupScan { range: range.clone(), without: without.clone(), from, limit };
            let page = self.server().page(scan).unwrap();
            for record in page.rows {
                let row = row_patch(&record, |id| self.engine.rows.get(&number_of(id)).cloned());
                patches.push(row.unwrap());
            }
            from = page.next;
            if from.is_none() {
                break;
            }
        }
        patches.extend(config_patches(self.server().config_changes(range).unwrap()));
        patches
    }

    /// The engine goes to the head; the group gets the net deltas.
    fn advance(&mut self) -> Result<(), Crashed> {
        let since = self.engine.state();
        if since == self.world.state() {
            return Ok(());
        }
        let mut deltas = RowDeltas::default();
        // Several commits since the last time: several engine advances, one update.
        for end in std::mem::take(&mut self.commits) {
            self.collect(&end, &mut deltas);
            self.engine = end;
        }
        self.engine.generations = self.world.generations.clone();
        let at_head = self.cvr.version.clone();
        let by_record = self.rng.random_bool(0.2);
        let ids: Vec<_> = deltas.rows_mut().map(|r| r.id.clone()).collect();
        let records = match by_record {
            true => RowRecords::new(self.server().rows(&self.cvr, &[], &ids).unwrap()),
            false => RowRecords::default(),
        };
        for row in deltas.rows_mut() {
            if by_record {
                row.others = row.others_of_record(records.get(&row.id));
            } else if row.needs_others() {
                let id = number_of(&row.id);
                row.others = self.running.keys().any(|q| {
                    !row.counts.iter().any(|c| c.query == *q) && self.engine.count(q, id) > 0
                });
            }
        }
        let mut updater =
            QueryUpdater::new(&self.cvr, &self.engine.state(), &StateVersion::zero()).unwrap();
        let patches = updater.advanced(deltas.into_rows(), &since).unwrap();
        self.finish(updater)?;
        if self.cvr.version > at_head {
            self.poke(&patches, Some(&at_head))?;
        }
        Ok(())
    }

    /// Deltas of the running queries from the engine's world to `end`.
    fn collect(&mut self, end: &World, deltas: &mut RowDeltas) {
        for query in self.running.keys() {
            for row in 0..ROWS {
                let (before, after) = (self.engine.count(query, row), end.count(query, row));
                let written = end.rows.get(&row).map(|r| &r.version)
                    != self.engine.rows.get(&row).map(|r| &r.version);
                if before == after && (after == 0 || !written) {
                    continue;
                }
                let entered = after > before || (after > 0 && written);
                let contents = end.rows.get(&row).filter(|_| entered || self.rng.random_bool(0.3));
                let change = CountChange { query: query.clone(), before, after };
                deltas.add(&id_of(row), change, contents);
            }
        }
    }

    /// The server forgets the group; the same or another one loads it again.
    fn restart(&mut self) -> Result<(), Crashed> {
        self.events.restarts += 1;
        self.server = self.rng.random_range(0..self.servers.len());
        let loaded = self.server().try_load(self.cvr.id.as_str(), self.clock).unwrap();
        let same =
            self.without_spent_interest(&loaded.cvr) == self.without_spent_interest(&self.cvr);
        assert!(same, "what was flushed is what is loaded: {}", self.cvr.id);
        self.cvr = loaded.cvr;
        self.running.clear();
        self.engine = self.world.clone();
        self.commits.clear();
        if self.cvr.version.state == self.engine.state() {
            // Nothing changed: queries are attached without a word, if their signatures agree.
            for q in self.cvr.queries.values().filter(|q| q.is_internal() || q.is_active()) {
                let hash = self.engine.hash(&q.id);
                let signature = self.engine.signature(&q.id);
                if q.transformation_hash.as_ref() == Some(&hash) && q.signature == Some(signature) {
                    self.running.insert(q.id.clone(), hash);
                }
            }
        }
        self.sync()
    }

    /// The server died: some clients are back at once, the others another time.
    fn recover(&mut self) {
        let known = self.cvr.clients.clone();
        self.clients.retain(|id, _| known.contains_key(id));
        for client in self.clients.values_mut() {
            client.connected &= self.rng.random_bool(0.7);
        }
        while self.restart().is_err() {}
    }

    /// Interests whose TTL is over say nothing. The store keeps those of a removed query, and they
    /// come back with the query when it is put again.
    fn without_spent_interest(&self, cvr: &Cvr) -> Cvr {
        let mut cvr = cvr.clone();
        for query in Arc::make_mut(&mut cvr.queries).values_mut() {
            Arc::make_mut(query).client_state.retain(|_, state| {
                state.inactivated_at.is_none_or(|at| at.plus(state.ttl_ms) > TtlClock(self.clock))
            });
        }
        cvr
    }

    fn step(&mut self) {
        self.steps += 1;
        self.clock += self.rng.random_range(1..20) as f64;
        if self.act().is_err() {
            self.recover();
        }
        self.check();
    }

    fn act(&mut self) -> Result<(), Crashed> {
        match self.rng.random_range(0..100) {
            0..=29 => self.config()?,
            30..=74 => {
                self.world.commit(&mut self.rng);
                self.commits.push(self.world.clone());
                if self.rng.random_bool(0.8) {
                    self.advance()?;
                }
            }
            75..=79 => {
                let query = any_query(&mut self.rng);
                *self.world.generations.entry(query).or_default() += 1;
                self.engine.generations = self.world.generations.clone();
                self.sync()?;
            }
            80..=91 => {
                let id = ClientId::from(CLIENTS[self.rng.random_range(0..CLIENTS.len())]);
                match self.clients.get_mut(&id).filter(|c| c.connected) {
                    Some(client) => client.connected = false,
                    None => self.connect(&id)?,
                }
            }
            92..=95 => self.restart()?,
            96..=97 => self.sync()?,
            _ => self.race(),
        }
        Ok(())
    }

    /// A flush from an old snapshot is refused and changes nothing.
    fn race(&mut self) {
        let Some(stale) = self.stale.take().filter(|s| s.version < self.cvr.version) else {
            return;
        };
        let mut updater = ConfigUpdater::new(&stale);
        updater.ensure_client(&"intruder".into(), &shard());
        let flush = updater.finish(self.times()).unwrap().flush;
        let error = self.server().flush(&flush).unwrap_err();
        assert!(matches!(error, CvrStoreError::ConcurrentModification { .. }), "{error}");
        self.events.outdated += 1;
    }

    fn check(&self) {
        let got: BTreeSet<_> =
            self.cvr.queries.values().filter(|q| q.is_got()).map(|q| q.id.clone()).collect();
        let mut rows = BTreeMap::new();
        for query in self.running.keys() {
            for row in self.engine.results.get(query).into_iter().flatten() {
                rows.insert(*row.0, self.engine.rows[row.0].values[0].clone());
            }
        }
        for (id, client) in self.clients.iter().filter(|(_, c)| c.connected) {
            let context =
                format!("client {id} of {} at {}", self.cvr.id, self.cvr.version.cookie());
            assert_eq!(client.base.as_ref(), Some(&self.cvr.version), "{context}");
            assert_eq!(client.rows, rows, "{context}");
            assert_eq!(client.got, got, "{context}");
            for (id, known) in self.cvr.clients.iter() {
                let desired = client.desired.get(id).cloned().unwrap_or_default();
                assert_eq!(desired, known.desired, "desires of {id}: {context}");
            }
        }
    }
}

fn run(servers: &[Server], seed: u64, steps: u64, until: Option<Instant>) -> (u64, Events) {
    let mut group = Group {
        servers,
        server: 0,
        rng: StdRng::seed_from_u64(seed),
        clock: 1.0,
        world: World::default(),
        commits: Vec::new(),
        engine: World::default(),
        running: BTreeMap::new(),
        cvr: servers[0].load(&format!("group-{seed}")),
        clients: BTreeMap::new(),
        stale: None,
        steps: 0,
        events: Events::default(),
    };
    while group.steps < steps && until.is_none_or(|until| Instant::now() < until) {
        group.step();
    }
    (group.steps, group.events)
}

pub fn clients_converge_on_the_model(lab: &dyn Lab) {
    let number = |name| std::env::var(name).ok().and_then(|v| v.parse::<u64>().ok());
    let seed = number("CVR_SEED").unwrap_or_else(rand::random);
    let steps = number("CVR_STEPS").unwrap_or_else(|| lab.steps());
    let groups = number("CVR_GROUPS").unwrap_or(4);
    let until = number("CVR_SECONDS").map(|s| Instant::now() + Duration::from_secs(s));
    eprintln!("CVR_SEED={seed} CVR_STEPS={steps} CVR_GROUPS={groups}");
    // Whoever loads a group whose rows follow waits for them, however slow the machine.
    let patient = RowOptions {
        load_attempts: 60_000,
        load_delay: Duration::from_millis(1),
        ..RowOptions::default()
    };
    let ms = Duration::from_millis;
    let hasty = RowPace { quiet: ms(2), delay: ms(10), limit: ms(20) };
    let servers = [
        lab.open_with("one", RowOptions { sync_rows: 1, pace: hasty, ..patient }),
        lab.open_with("two", patient),
    ];
    let done: Vec<_> = std::thread::scope(|scope| {
        let groups: Vec<_> = (0..groups)
            .map(|n| {
                let servers = &servers;
                scope.spawn(move || run(servers, seed.wrapping_add(n), steps / groups, until))
            })
            .collect();
        groups.into_iter().map(|g| g.join().unwrap()).collect()
    });
    let made: u64 = done.iter().map(|(made, _)| made).sum();
    assert!(until.is_some() || made == steps / groups * groups);
    let events = done.iter().fold(Events::default(), |sum, (_, e)| Events {
        died_before_flush: sum.died_before_flush + e.died_before_flush,
        answer_lost: sum.answer_lost + e.answer_lost,
        died_while_telling: sum.died_while_telling + e.died_while_telling,
        taken_over: sum.taken_over + e.taken_over,
        outdated: sum.outdated + e.outdated,
        restarts: sum.restarts + e.restarts,
        rows_followed: sum.rows_followed + e.rows_followed,
    });
    eprintln!("{made} steps: {events:?}");
    // So many steps do not pass without any trouble.
    let troubles = [events.died_before_flush, events.answer_lost, events.died_while_telling];
    let rare = troubles.into_iter().chain([events.taken_over, events.outdated]).min();
    assert!(made < 500 || events.rows_followed > 0);
    assert!(made < 5_000 || rare > Some(0));
}
