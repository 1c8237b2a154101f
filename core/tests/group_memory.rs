//! What a client group costs in memory while nothing happens: a hundred rows that all groups
//! share, one client each. Counted by an allocator, in a binary of its own.
//!
//! Not counted: sockets and their tasks, the executor's tables (`docs/benchmarks`).

#![allow(clippy::unwrap_used, clippy::panic)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use zeroring_core::cvr::internal::ShardTables;
use zeroring_core::cvr::store::{Flushed, Loaded};
use zeroring_core::cvr::{Ast, ClientGroupId, Cvr, RowIdentity};
use zeroring_core::group::{
    ConnId, Connection, Credentials, Effect, Event, Group, Hydrate, Settings, Shared, Transformed,
    VisitRow, World,
};
use zeroring_core::ivm::engine::{Budget, Engine, EngineConfig, InstanceId};
use zeroring_core::ivm::memory_source::{Database, MemorySource};
use zeroring_core::json::RawJson;
use zeroring_core::protocol::up;
use zeroring_core::row::{Row, RowRef};
use zeroring_core::schema::{ColumnSpec, Schema, TableId, TableSpec, UniqueKey, ValueType};
use zeroring_core::value::Value;
use zeroring_core::version::StateVersion;
use zeroring_core::zql::compile::{IdentityKeys, compile};
use zeroring_core::zql::hash;

/// The system's allocator, with a count of the bytes that are in use.
struct Counting;

static LIVE: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call goes to the system's allocator with the arguments it came with.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LIVE.fetch_add(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// The bound, of which a socket and the executor's tables take the rest of 16 KB.
const MOST_BYTES: usize = 8 << 10;
const ROWS: usize = 100;
const GROUPS: usize = 200;

const QUERY: &str = r#"{"table":"issue","orderBy":[["id","asc"]]}"#;
const SCHEMA: &str = r#"{"tables":{"issue":{"columns":{"id":{"type":"string"},"n":{"type":"number"}},"primaryKey":["id"]}}}"#;

fn live() -> usize {
    LIVE.load(Ordering::Relaxed)
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
}

impl Executor {
    fn new() -> Executor {
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
        for i in 0..ROWS {
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
        let engine = Engine::new(EngineConfig::default(), version.clone(), schema);
        let source = MemorySource::new(db, version.clone());
        Executor { engine, source, version, shared: Shared::default() }
    }

    fn hydrate(&mut self, wanted: &Hydrate) -> Result<InstanceId, String> {
        let keys = IdentityKeys::default();
        let (plan, params) = compile(&wanted.transformed.ast, self.engine.schema(), &keys)
            .map_err(|error| error.to_string())?;
        let id = self.engine.subscribe(&Arc::new(plan), params.into()).unwrap();
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

    fn rows(&mut self, instance: InstanceId, visit: &mut VisitRow<'_>) -> Result<(), String> {
        for held in self.engine.rows(instance).map_err(|error| error.to_string())? {
            visit(held.table, held.row, held.count);
        }
        Ok(())
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

    fn read_row(&mut self, _id: &RowIdentity) -> Result<Option<RowRef>, String> {
        Err("nobody is late here".to_owned())
    }
}

/// A new group with one client, up and idle.
fn group(executor: &mut Executor, settings: &Arc<Settings>, number: usize) -> Group {
    let id = ClientGroupId::from(format!("client-group-{number:08}"));
    let mut group = Group::new(id.clone(), settings.clone(), 0.0);
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
    let mut inbox = VecDeque::from([
        Event::Connected(Box::new(connection)),
        Event::Message(ConnId(number as u64), message),
    ]);
    let (mut rows, mut effects) = (0, Vec::new());
    while let Some(event) = inbox.pop_front() {
        group.handle(event, 1_000.0, executor, &mut effects);
        for effect in effects.drain(..) {
            match effect {
                Effect::Enter => inbox.push_back(Event::Admitted),
                Effect::Load { .. } => {
                    let cvr = Cvr::empty(id.clone());
                    inbox.push_back(Event::Loaded(Ok(Box::new(Loaded {
                        cvr,
                        taken_over_from: None,
                    }))));
                }
                Effect::Flush(flush) => {
                    rows += flush.rows.len();
                    inbox.push_back(Event::Flushed(Ok(Flushed { rows: 0, anomalies: 0 })));
                }
                Effect::Hydrate(wanted) => inbox.push_back(Event::Hydrated(
                    wanted.iter().map(|w| (w.query.clone(), executor.hydrate(w))).collect(),
                )),
                Effect::Continue => inbox.push_back(Event::Continue),
                Effect::Release(instance) => executor.engine.unsubscribe(instance),
                Effect::Fail(_, error) => panic!("{error}"),
                _ => {}
            }
        }
    }
    assert_eq!((rows, group.queries()), (ROWS, 3));
    group
}

// One test: the count is of the whole process.
#[test]
fn an_idle_group_on_a_shared_query_is_small() {
    let settings = Arc::new(Settings {
        app_id: "zero".into(),
        shard_num: 0,
        tables: ShardTables::new("zero", 0),
        has_query_endpoint: false,
        has_mutate_endpoint: false,
        crud_mutations: true,
        refuses_tokens: None,
        revalidate_ms: 300_000.0,
        retransform_ms: 300_000.0,
    });
    let mut executor = Executor::new();
    let mut groups = Vec::with_capacity(4 * GROUPS);
    groups.extend((0..GROUPS).map(|n| group(&mut executor, &settings, n)));
    executor.shared.sweep();
    let before = live();
    groups.extend((GROUPS..3 * GROUPS).map(|n| group(&mut executor, &settings, n)));
    executor.shared.sweep();
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
