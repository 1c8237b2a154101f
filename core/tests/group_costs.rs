//! What a client group costs, counted by an allocator, in a binary of its own: bytes while nothing
//! happens, and the work of one go, as allocations.
//!
//! Not counted: sockets and their tasks, the executor's tables (`src/sync/tests.rs`).

#![allow(clippy::unwrap_used, clippy::panic)]

mod counting;

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use counting::{allocations, frees, live};
use zeroring_core::cvr::internal::ShardTables;
use zeroring_core::cvr::store::{CvrStoreError, Flushed, Loaded};
use zeroring_core::cvr::{Ast, ClientGroupId, Cvr, RowIdentity};
use zeroring_core::group::{
    ConnId, Connection, Credentials, Effect, Event, Frame, Group, Hydrate, LargePoke, NextFrames,
    Settings, Shared, SharedDelta, Transformed, VisitRow, World,
};
use zeroring_core::ivm::delta::{InstanceDelta, RowDelta};
use zeroring_core::ivm::engine::{Budget, Engine, EngineConfig, InstanceId, Progress};
use zeroring_core::ivm::memory_source::{Database, MemorySource};
use zeroring_core::ivm::plan::Occurrence;
use zeroring_core::ivm::reading::{ReadProgress, Reading};
use zeroring_core::json::RawJson;
use zeroring_core::protocol::up;
use zeroring_core::row::{Row, RowId, RowRef};
use zeroring_core::schema::{ColumnSpec, Schema, TableId, TableSpec, UniqueKey, ValueType};
use zeroring_core::value::Value;
use zeroring_core::version::StateVersion;
use zeroring_core::waste::Waste;
use zeroring_core::zql::compile::{IdentityKeys, compile};
use zeroring_core::zql::hash;

/// The counts are of the whole process: one test at a time.
static ALONE: Mutex<()> = Mutex::new(());

/// The bound of the bytes, of which a socket and the executor's tables take the rest of 16 KB.
const MOST_BYTES: usize = 8 << 10;
const ROWS: usize = 100;
const GROUPS: usize = 200;

const QUERY: &str = r#"{"table":"issue","orderBy":[["id","asc"]]}"#;
const SCHEMA: &str = r#"{"tables":{"issue":{"columns":{"id":{"type":"string"},"n":{"type":"number"}},"primaryKey":["id"]}}}"#;

/// Processor time of this thread, as far as the system says.
fn cpu_us() -> u64 {
    let stat = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    stat.split(' ').next().and_then(|ns| ns.parse::<u64>().ok()).unwrap_or_default() / 1_000
}

fn table(id: u32, name: &str, key: usize, columns: &[(&str, ValueType)]) -> Arc<TableSpec> {
    let column = |(name, value_type): &(&str, ValueType)| ColumnSpec {
        name: (*name).into(),
        value_type: *value_type,
        nullable: false,
        upstream_type: "text".into(),
    };
    let key: Vec<usize> = (0..key).collect();
    Arc::new(TableSpec {
        id: TableId(id),
        name: name.into(),
        columns: columns.iter().map(column).collect(),
        primary_key: key.clone(),
        replica_key: key.clone(),
        unique_keys: vec![UniqueKey { columns: key.clone(), not_null: true }],
        min_row_version: StateVersion::zero(),
        indexes: vec![key],
    })
}

/// Engine and replica of an executor.
struct Executor {
    engine: Engine,
    source: MemorySource,
    version: StateVersion,
    shared: Shared,
    /// Queries are hydrated slice by slice.
    in_slices: bool,
    /// Their rows go ahead.
    early: bool,
    /// Clients read what is sent to them.
    clients_read: bool,
}

impl Executor {
    /// What an executor does when there is nothing else to do.
    fn rest(&mut self) {
        self.shared.sweep();
        while !self.engine.release(&mut Budget::units(1_000)) {}
    }

    fn new(rows: usize) -> Executor {
        Executor::with(rows, EngineConfig::default())
    }

    fn with(rows: usize, config: EngineConfig) -> Executor {
        use ValueType::{Json, Number, String};
        let version = StateVersion::from_lsn(1_000);
        let issue = table(1, "issue", 1, &[("id", String), ("n", Number)]);
        let clients = [("clientGroupID", String), ("clientID", String), ("lastMutationID", Number)];
        let mutations = [
            ("clientGroupID", String),
            ("clientID", String),
            ("mutationID", Number),
            ("result", Json),
        ];
        let mut db = Database::default();
        for i in 0..rows {
            let values = [Value::string(format!("i{i:03}")), Value::Number(i as f64)];
            db.put(&issue, Row::new(version.clone(), values));
        }
        let tables = [
            issue,
            table(2, "zero_0.clients", 2, &clients),
            table(3, "zero_0.mutations", 3, &mutations),
        ];
        let mut schema = Schema::default();
        schema.tables.extend(tables.into_iter().map(|t| (t.name.clone(), t)));
        let schema = Arc::new(schema);
        let engine = Engine::new(config, version.clone(), schema);
        let source = MemorySource::new(db, version.clone());
        let shared = Shared::default();
        Executor {
            engine,
            source,
            version,
            shared,
            in_slices: false,
            early: true,
            clients_read: true,
        }
    }

    fn subscribe(&mut self, wanted: &Hydrate) -> Result<InstanceId, String> {
        let keys = IdentityKeys::default();
        let (plan, params) = compile(&wanted.transformed.ast, self.engine.schema(), &keys)
            .map_err(|error| error.to_string())?;
        Ok(self.engine.subscribe(&Arc::new(plan), params.into()).unwrap())
    }

    fn hydrate(&mut self, wanted: &Hydrate) -> Result<InstanceId, String> {
        let id = self.subscribe(wanted)?;
        let mut all = Budget::unlimited();
        self.engine.hydrate_step(id, &mut self.source, &mut all).unwrap();
        Ok(id)
    }
}

impl World for Executor {
    fn version(&self) -> &StateVersion {
        &self.version
    }

    fn replica_version(&self) -> &StateVersion {
        &self.version
    }

    fn schema(&self) -> &Arc<Schema> {
        self.engine.schema()
    }

    fn transform(
        &self,
        ast: &Ast,
        _internal: bool,
        _credentials: Option<&Credentials>,
    ) -> Result<Transformed, String> {
        Ok(Transformed { ast: ast.clone(), hash: hash::stored(ast).into() })
    }

    fn custom(&self, _ast: &RawJson) -> Result<Transformed, String> {
        Err("no custom queries here".to_owned())
    }

    fn read(
        &mut self,
        reading: &Reading,
        budget: &mut Budget,
        visit: &mut VisitRow<'_>,
    ) -> Result<ReadProgress, String> {
        let progress = self.engine.read(reading, &mut self.source, budget, visit);
        progress.map_err(|error| error.to_string())
    }

    fn count(&self, instance: InstanceId, id: &RowIdentity, row: &Row) -> Result<u64, String> {
        let table = self.engine.schema().table(id.table()).unwrap().id;
        self.engine.count(instance, table, row).map_err(|error| error.to_string())
    }

    fn reads(&self, instance: InstanceId, table: &str) -> bool {
        self.engine.reads(instance, self.engine.schema().table(table).unwrap().id)
    }

    fn shared(&mut self) -> &mut Shared {
        &mut self.shared
    }

    fn signature(&self, instance: InstanceId) -> Result<u64, String> {
        self.engine.signature(instance).map_err(|error| error.to_string())
    }

    fn occurrence(&self, instance: InstanceId) -> Occurrence {
        self.engine.occurrence(instance)
    }

    fn read_row(&mut self, _id: &RowIdentity) -> Result<Option<RowRef>, String> {
        Err("nobody is late here".to_owned())
    }
}

/// What happened in a group's slices.
#[derive(Debug, Default)]
struct Seen {
    rows_flushed: usize,
    rows_sent: usize,
    /// Allocations of the slice with the most, and slices.
    most: usize,
    slices: usize,
    /// The same of what was given back.
    most_freed: usize,
    /// The longest slices, in microseconds of this thread's processor time, with their number.
    longest: Vec<(u64, usize)>,
    /// Of the client's query.
    instance: Option<InstanceId>,
    /// A poke that the client has not read to its end.
    poke: Option<Box<LargePoke>>,
    /// Rows that were sent before their query was hydrated, and bytes in use when it was.
    sent_early: usize,
    live_when_hydrated: usize,
    /// What the client was told at its end.
    failed: Option<String>,
}

impl Seen {
    fn slice<R>(&mut self, work: impl FnOnce() -> R) -> R {
        let freed = frees();
        let before = (allocations(), cpu_us());
        let result = work();
        self.most = self.most.max(allocations() - before.0);
        self.most_freed = self.most_freed.max(frees() - freed);
        self.slices += 1;
        self.longest.push((cpu_us() - before.1, self.slices));
        self.longest.sort_unstable_by(|a, b| b.cmp(a));
        self.longest.truncate(8);
        result
    }

    /// Lets go of it as the executor does.
    fn shed(&mut self, mut waste: Waste) {
        while !waste.is_empty() {
            self.slice(|| waste.shed(2_000));
        }
    }

    /// No step did the work of many rows.
    fn assert_sliced(&self) {
        assert!(self.most < MOST_ALLOCATIONS, "{self:?}");
        assert!(self.most_freed < MOST_FREES, "{self:?}");
    }
}

impl Seen {
    /// The client reads what there is of its large poke.
    fn read(&mut self, executor: &Executor) {
        let Some(mut poke) = self.poke.take_if(|_| executor.clients_read) else { return };
        loop {
            match self.slice(|| poke.next_frames()) {
                NextFrames::Some(frames) => self.rows_sent += rows_in(&frames),
                NextFrames::Waits => return self.poke = Some(poke),
                NextFrames::Done => return,
            }
        }
    }

    /// Hydrates a query slice by slice; its rows go ahead as they are read.
    fn hydrate(
        &mut self,
        executor: &mut Executor,
        group: &mut Group,
        wanted: &Hydrate,
    ) -> Result<InstanceId, String> {
        let id = executor.subscribe(wanted)?;
        let mut least = if executor.early && wanted.early && executor.engine.watch(id) {
            10_000
        } else {
            usize::MAX
        };
        loop {
            let mut budget = Budget::units(1_000);
            let step = executor.engine.hydrate_step(id, &mut executor.source, &mut budget).unwrap();
            let mut rows = executor.engine.take_watched(id, least).into_iter();
            while rows.len() > 0 {
                least = 1;
                let rows = rows.by_ref().take(1_000).collect();
                let event = Event::Early(wanted.query.clone(), rows);
                let mut effects = Vec::new();
                self.slice(|| group.handle(event, 1_000.0, executor, &mut effects));
                self.take_in(executor, effects);
                if step == Progress::More {
                    self.sent_early = self.rows_sent;
                }
            }
            if step == Progress::Done {
                self.live_when_hydrated = live();
                executor.engine.unwatch(id);
                return Ok(id);
            }
        }
    }

    fn take_in(&mut self, executor: &Executor, effects: Vec<Effect>) {
        for effect in effects {
            match effect {
                Effect::SendLarge(_, poke) => self.poke = Some(poke),
                Effect::GrowLarge(_, growth) => {
                    let Some(poke) = &mut self.poke else { panic!("nothing is open") };
                    poke.grow(&growth, &mut Waste::default());
                }
                Effect::LetGo(waste) => self.shed(waste),
                other => panic!("{other:?}"),
            }
            self.read(executor);
        }
    }
}

/// Feeds events, and carries out what they lead to.
fn drive(executor: &mut Executor, group: &mut Group, events: Vec<Event>) -> Seen {
    let mut seen = Seen::default();
    drive_on(executor, group, &mut seen, &mut events.into(), usize::MAX);
    executor.clients_read = true;
    seen.read(executor);
    seen
}

/// The same for so many events; true if there are more. The last ones are what is answered next.
fn drive_on(
    executor: &mut Executor,
    group: &mut Group,
    seen: &mut Seen,
    inbox: &mut VecDeque<Event>,
    most: usize,
) -> bool {
    let mut effects = Vec::new();
    for _ in 0..most {
        let Some(event) = inbox.pop_front() else { return false };
        seen.slice(|| group.handle(event, 1_000.0, executor, &mut effects));
        for effect in std::mem::take(&mut effects) {
            match effect {
                Effect::Enter => inbox.push_back(Event::Admitted),
                Effect::Load { .. } => {
                    let cvr = Cvr::empty(group.id().clone());
                    let loaded = Box::new(Loaded::new(cvr));
                    inbox.push_back(Event::Loaded(Ok(loaded)));
                }
                Effect::Flush(flush) => {
                    seen.rows_flushed += flush.rows.len();
                    inbox.push_back(Event::Flushed(Ok(Flushed::default())));
                }
                Effect::Hydrate(wanted) => {
                    let hydrated = wanted.iter().map(|w| {
                        let id = match executor.in_slices {
                            true => seen.hydrate(executor, group, w),
                            false => executor.hydrate(w),
                        };
                        (w.query.clone(), id)
                    });
                    let hydrated: Vec<_> = hydrated.collect();
                    let of = hydrated.iter().find(|(query, _)| query.as_str() == "q");
                    seen.instance = of.and_then(|(_, id)| id.clone().ok()).or(seen.instance);
                    inbox.push_back(Event::Hydrated(hydrated));
                }
                Effect::Continue => inbox.push_back(Event::Continue),
                Effect::Merge => inbox.push_back(Event::Merge),
                Effect::LetGo(waste) => seen.shed(waste),
                Effect::Release(instance) => executor.engine.unsubscribe(instance),
                effect @ (Effect::SendLarge(..) | Effect::GrowLarge(..)) => {
                    seen.take_in(executor, vec![effect]);
                }
                Effect::Send(_, frames) => seen.rows_sent += rows_in(&frames),
                Effect::Fail(_, error) => seen.failed = Some(error.to_string()),
                _ => {}
            }
        }
    }
    !inbox.is_empty()
}

fn rows_in(frames: &[Frame]) -> usize {
    let text = |frame: &Frame| String::from_utf8_lossy(&frame.payload).into_owned();
    frames.iter().map(|frame| text(frame).matches(r#""tableName":"issue""#).count()).sum()
}

/// A new group with one client, up and idle.
fn group(executor: &mut Executor, settings: &Arc<Settings>, number: usize) -> (Group, Seen) {
    let id = ClientGroupId::from(format!("client-group-{number:08}"));
    let mut group = Group::new(id, settings.clone(), 0.0);
    let connection = Connection {
        conn: ConnId(number as u64),
        client_id: format!("client-{number:08}").into(),
        ws_id: format!("socket-{number:08}").into(),
        protocol: 51,
        profile_id: None,
        base_cookie: None,
        credentials: Arc::default(),
    };
    let init = format!(
        r#"["initConnection",{{"desiredQueriesPatch":[{{"op":"put","hash":"q","ast":{QUERY},"ttl":1000}}],"clientSchema":{SCHEMA}}}]"#
    );
    let message = Box::new(up::parse(&init).unwrap());
    let conn = ConnId(number as u64);
    let events = vec![Event::Connected(Box::new(connection)), Event::Message(conn, message)];
    let seen = drive(executor, &mut group, events);
    assert_eq!((group.queries(), &seen.failed), (3, &None));
    (group, seen)
}

fn settings() -> Arc<Settings> {
    Arc::new(Settings {
        app_id: "zero".into(),
        shard_num: 0,
        tables: ShardTables::new("zero", 0),
        has_query_endpoint: false,
        has_mutate_endpoint: false,
        crud_mutations: true,
        refuses_tokens: None,
        revalidate_ms: 300_000.0,
        retransform_ms: 300_000.0,
    })
}

#[test]
fn an_idle_group_on_a_shared_query_is_small() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let settings = settings();
    let mut executor = Executor::new(ROWS);
    let mut groups = Vec::with_capacity(4 * GROUPS);
    groups.extend((0..GROUPS).map(|n| group(&mut executor, &settings, n).0));
    executor.rest();
    let before = live();
    groups.extend((GROUPS..3 * GROUPS).map(|n| group(&mut executor, &settings, n).0));
    executor.rest();
    let each = (live() - before) / (2 * GROUPS);
    let with = live();
    drop(groups);
    let own = (with - live()) / (3 * GROUPS);
    println!("{each} bytes per group, of which {own} are not the engine's");
    assert!(
        executor.engine.stats().instances == 6 * GROUPS + 1,
        "two of its own, and a shared one"
    );
    assert!(each + size_of::<Group>() <= MOST_BYTES, "{each} bytes per group");
}

/// Rows of a result and of a change that would take an executor for a long time if they were
/// handled in one go; a slice is a thousand.
const MANY: usize = 30_000;

/// `ZERORING_GROUP_ROWS` sets another number, for measuring.
fn many() -> usize {
    let rows = std::env::var("ZERORING_GROUP_ROWS").ok();
    rows.and_then(|rows| rows.parse().ok()).unwrap_or(MANY)
}
/// A row takes a handful of allocations in the slice that takes it furthest.
const MOST_ALLOCATIONS: usize = 8_000;
/// And as much is given back with it, of the two thousand that are dropped at a time.
const MOST_FREES: usize = 16_000;

/// Rows of a result that goes ahead, from 10,000 on.
const EARLY: usize = 15_000;

#[test]
fn rows_of_a_large_result_are_on_their_way_while_it_is_read() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let settings = settings();
    let mut executor = Executor::new(EARLY);
    executor.in_slices = true;
    let (_group, seen) = group(&mut executor, &settings, 1);
    println!("early: {seen:?}");
    assert_eq!((seen.rows_flushed, seen.rows_sent), (EARLY, EARLY), "each once");
    assert!(seen.sent_early > EARLY / 2, "{} rows went ahead", seen.sent_early);
    seen.assert_sliced();
}

/// What a row costs while it waits for a client that does not read: its JSON, which it keeps, and
/// its places in the poke and among those that were sent.
const MOST_BYTES_WAITING: usize = 128;

#[test]
fn rows_that_wait_for_a_slow_client_are_not_encoded_for_it() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let settings = settings();
    let hydrated = |early: bool| {
        let mut executor = Executor::new(EARLY);
        (executor.in_slices, executor.early, executor.clients_read) = (true, early, !early);
        let before = live();
        let (_group, seen) = group(&mut executor, &settings, 1);
        assert_eq!(seen.rows_sent, EARLY);
        seen.live_when_hydrated - before
    };
    let (whole, early) = (hydrated(false), hydrated(true));
    let each = early.saturating_sub(whole) / EARLY;
    println!("{each} bytes per row that waits");
    assert!(each > 0 && each <= MOST_BYTES_WAITING, "{each} bytes per row");
}

#[test]
fn nothing_that_a_group_does_with_many_rows_is_done_in_one_go() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let settings = settings();
    let mut executor = Executor::new(many());
    let (mut group, seen) = group(&mut executor, &settings, 1);
    println!("cold: {seen:?}");
    assert_eq!((seen.rows_flushed, seen.rows_sent), (many(), many()));
    assert!(seen.slices > 3 * many() / 1_000, "{seen:?}");
    seen.assert_sliced();

    // All of them change in one transaction.
    let made = all_change(&mut executor, &settings, seen.instance.unwrap(), 2_000);
    let seen = drive(&mut executor, &mut group, vec![Event::Delta(made), Event::Advanced]);
    println!("advance: {seen:?}");
    assert_eq!((seen.rows_flushed, seen.rows_sent), (many(), many()));
    assert!(seen.slices > 3 * many() / 1_000, "{seen:?}");
    seen.assert_sliced();
}

/// A transaction that changes all rows of an instance.
fn all_change(
    executor: &mut Executor,
    settings: &Settings,
    instance: InstanceId,
    lsn: u64,
) -> Arc<SharedDelta> {
    let version = StateVersion::from_lsn(lsn);
    let rows: Vec<RowDelta> = executor
        .engine
        .rows(instance)
        .unwrap()
        .map(|held| RowDelta {
            table: held.table.clone(),
            id: RowId::of(held.table, held.row),
            count_before: 1,
            count_after: 1,
            row: Some(Row::new(version.clone(), held.row.values.to_vec())),
            content_changed: true,
        })
        .collect();
    let delta = InstanceDelta { instance, rows: rows.into() };
    let mut made = SharedDelta::begin(&delta);
    let mut prepared = Seen::default();
    for rows in delta.rows.chunks(1_000) {
        prepared.slice(|| made.extend(rows, &settings.tables)).unwrap();
    }
    let made = prepared.slice(|| made.end());
    prepared.assert_sliced();
    executor.version = version;
    Arc::new(made)
}

#[test]
fn what_gathers_while_a_group_waits_is_merged_in_slices() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let settings = settings();
    let mut executor = Executor::new(many());
    let (mut group, seen) = group(&mut executor, &settings, 1);
    let instance = seen.instance.unwrap();
    // The store takes its time for the first one.
    let delta = all_change(&mut executor, &settings, instance, 2_000);
    let mut seen = Seen::default();
    let mut inbox = VecDeque::from([Event::Delta(delta), Event::Advanced]);
    while !matches!(inbox.back(), Some(Event::Flushed(_))) {
        assert!(drive_on(&mut executor, &mut group, &mut seen, &mut inbox, 1));
    }
    let flushed = inbox.pop_back();
    for n in 1..=10 {
        let delta = all_change(&mut executor, &settings, instance, 2_000 + n);
        inbox.extend([Event::Delta(delta), Event::Advanced]);
        drive_on(&mut executor, &mut group, &mut seen, &mut inbox, usize::MAX);
    }
    inbox.extend(flushed);
    drive_on(&mut executor, &mut group, &mut seen, &mut inbox, usize::MAX);
    println!("gathered: {seen:?}");
    assert_eq!((seen.rows_flushed, seen.rows_sent), (2 * many(), 2 * many()), "ten are one");
    seen.assert_sliced();
}

#[test]
fn rows_that_had_to_make_room_come_back_in_slices_when_their_query_goes() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let settings = settings();
    let config = EngineConfig { max_rows: 100, ..EngineConfig::default() };
    let mut executor = Executor::with(many(), config);
    let (mut group, seen) = group(&mut executor, &settings, 1);
    let instance = seen.instance.unwrap();
    while !executor.engine.release(&mut Budget::units(1_000)) {}
    if !executor.engine.is_parked(instance) {
        // It was about to be read. Another one is.
        let keys = QUERY.replace("asc", "desc");
        let ast: Ast = Arc::new(serde_json::from_str(&keys).unwrap());
        let transformed = executor.transform(&ast, false, None).unwrap();
        let query = "other".into();
        let other = Hydrate { query, transformed, client_schema: None, early: false };
        let other = executor.hydrate(&other).unwrap();
        while !executor.engine.release(&mut Budget::units(1_000)) {}
        executor.engine.unsubscribe(other);
    }
    assert!(executor.engine.is_parked(instance), "{:?}", executor.engine.stats());
    let gone = r#"["changeDesiredQueries",{"desiredQueriesPatch":[{"op":"clear"}]}]"#;
    let message = Box::new(up::parse(gone).unwrap());
    let seen = drive(&mut executor, &mut group, vec![Event::Message(ConnId(1), message)]);
    println!("gone: {seen:?}");
    assert_eq!((seen.rows_flushed, group.queries()), (many(), 2));
    assert!(seen.slices > 4 * many() / 1_000, "{seen:?}");
    seen.assert_sliced();
}

/// A store that fails for good, at any moment of a large update, and a client that leaves a large
/// poke unread.
#[test]
fn what_comes_to_nothing_is_dropped_in_slices() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let settings = settings();
    let mut steps = (0, 0);
    for part in 1..8 {
        let mut executor = Executor::new(many());
        let (mut group, seen) = group(&mut executor, &settings, 1);
        let delta = all_change(&mut executor, &settings, seen.instance.unwrap(), 2_000);
        let mut seen = Seen::default();
        let mut inbox = VecDeque::from([Event::Delta(delta), Event::Advanced]);
        // A large update takes some slices per thousand rows.
        let events = part * many() / 3_000;
        executor.clients_read = false;
        drive_on(&mut executor, &mut group, &mut seen, &mut inbox, events);
        if seen.poke.is_none() {
            steps.0 += 1;
            let lost = CvrStoreError::Storage("disk full".to_owned());
            inbox = VecDeque::from([Event::RowsWritten(Err(lost))]);
            drive_on(&mut executor, &mut group, &mut seen, &mut inbox, 1);
            assert!(group.is_stopped() && seen.failed.is_some());
        } else if let Some(poke) = seen.poke.take() {
            steps.1 += 1;
            let mut waste = Waste::default();
            seen.slice(|| poke.discard(&mut waste));
            seen.shed(waste);
        }
        seen.slice(|| drop(group));
        println!("after {events} events: {seen:?}");
        seen.assert_sliced();
    }
    assert!(steps.0 > 2 && steps.1 > 0, "{steps:?}");
}
