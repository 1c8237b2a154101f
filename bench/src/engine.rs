//! The engine: what a commit costs, by what the queries are; what hydrating a row costs. The
//! targets are those of `docs/engine.md`.

use std::collections::HashMap;
use std::sync::Arc;

use serde_json::{Value as Json, json};
use zeroring_core::change::{Commit, RowChange, TableChange};
use zeroring_core::ivm::engine::{Budget, Engine, EngineConfig, HeldRow, InstanceId, Progress};
use zeroring_core::ivm::plan::Direction;
use zeroring_core::ivm::reading::{ReadProgress, ReadRow, Reading};
use zeroring_core::ivm::source::Source;
use zeroring_core::row::{Row, RowRef};
use zeroring_core::schema::{ColumnSpec, Schema, TableId, TableSpec, UniqueKey, ValueType};
use zeroring_core::value::Value;
use zeroring_core::version::StateVersion;
use zeroring_core::zql::compile::{IdentityKeys, compile};

use crate::fixture::{self, ITEMS};
use crate::store::Store;
use crate::{Batch, Failure};

pub(crate) fn of_project(project: usize) -> Json {
    json!({"table": "item", "orderBy": [["id", "asc"]],
        "where": simple("project_id", "=", json!(format!("p{project}")))})
}

fn simple(column: &str, op: &str, value: Json) -> Json {
    json!({"type": "simple", "op": op, "left": {"type": "column", "name": column},
        "right": {"type": "literal", "value": value}})
}

fn and(conditions: &[Json]) -> Json {
    json!({"type": "and", "conditions": conditions})
}

pub(crate) fn subscribe(
    engine: &mut Engine,
    source: &mut dyn Source,
    schema: &Schema,
    query: &Json,
) -> Result<InstanceId, Failure> {
    let ast = serde_json::from_value(query.clone())?;
    let (plan, params) = compile(&ast, schema, &IdentityKeys::default())?;
    let id = engine.subscribe(&Arc::new(plan), params.into())?;
    while engine.hydrate_step(id, source, &mut Budget::unlimited())? == Progress::More {}
    Ok(id)
}

/// A table of labels: id, item_id.
fn labels() -> Arc<TableSpec> {
    let column = |name: &str| ColumnSpec {
        name: name.into(),
        value_type: ValueType::String,
        nullable: false,
        upstream_type: "text".into(),
    };
    Arc::new(TableSpec {
        id: TableId(1),
        name: "label".into(),
        columns: vec![column("id"), column("item_id")],
        primary_key: vec![0],
        replica_key: vec![0],
        unique_keys: vec![UniqueKey { columns: vec![0], not_null: true }],
        min_row_version: StateVersion::zero(),
        indexes: vec![],
    })
}

fn label(n: usize, item: usize, version: &StateVersion) -> RowRef {
    let values = [Value::string(format!("label-{n}")), Value::string(format!("item-{item}"))];
    Row::new(version.clone(), values)
}

/// An engine over rows in memory, with commits made one after the other.
struct World {
    engine: Engine,
    source: Store,
    schema: Arc<Schema>,
    items: Arc<TableSpec>,
    labels: Arc<TableSpec>,
    lsn: u64,
}

/// What a source must do at each commit.
#[derive(Clone, Copy, PartialEq)]
enum Reads {
    /// Nothing: the queries never read again.
    Nothing,
    /// Know the rows.
    Rows,
}

impl World {
    /// A world of `rows` items, ranked by their number.
    fn new(rows: usize) -> World {
        World::sorted(rows, &[])
    }

    /// The same, which can be read in an order.
    fn sorted(rows: usize, order: &[(usize, Direction)]) -> World {
        let (items, labels) = (fixture::table(), labels());
        let tables = [&items, &labels].map(|t| (t.name.clone(), t.clone()));
        let schema = Arc::new(Schema { tables: tables.into_iter().collect(), ..Schema::default() });
        let version = StateVersion::from_lsn(1);
        let mut source = Store::new(version.clone());
        source.index(&items, 1);
        source.index(&labels, 1);
        if !order.is_empty() {
            source.sort(&items, order);
        }
        for n in 0..rows {
            source.put(items.id, fixture::row(n, n as i32, &version));
        }
        let engine = Engine::new(EngineConfig::default(), version, schema.clone());
        World { engine, source, schema, items, labels, lsn: 1 }
    }

    fn with(mut self, queries: &[Json]) -> Result<World, Failure> {
        for query in queries {
            self.subscribe(query)?;
        }
        Ok(self)
    }

    fn subscribe(&mut self, query: &Json) -> Result<InstanceId, Failure> {
        subscribe(&mut self.engine, &mut self.source, &self.schema, query)
    }

    /// Commits and advances; the number of row deltas.
    fn commit(
        &mut self,
        table: &Arc<TableSpec>,
        rows: Vec<RowChange>,
        reads: Reads,
    ) -> Result<u64, Failure> {
        self.lsn += 1;
        let change = TableChange { table: table.clone(), rows, truncated: false };
        let commit = Arc::new(Commit {
            previous: self.source.version().clone(),
            version: StateVersion::from_lsn(self.lsn),
            tables: vec![change],
            schema: None,
            upstream_commit_ms: 0.0,
            permissions_changed: false,
        });
        match reads {
            Reads::Nothing => self.source.skip(&commit),
            Reads::Rows => self.source.apply(&commit),
        }
        self.engine.begin_advance(&[commit])?;
        loop {
            let mut budget = Budget::unlimited();
            if let Some(advanced) = self.engine.advance_step(&mut self.source, &mut budget)? {
                if let Some((_, error)) = advanced.failed.into_iter().next() {
                    return Err(error.into());
                }
                return Ok(advanced.deltas.iter().map(|d| d.rows.len() as u64).sum());
            }
        }
    }

    /// Commits that give items other ranks, and then take it all back, to be made over and over;
    /// each writes as many rows as its item says. They are made beforehand: a bench of commits
    /// is one of the engine, and of the source as far as it is read.
    fn writes(&self, writes: &[Vec<(usize, i32)>]) -> Vec<Vec<RowChange>> {
        let version = StateVersion::from_lsn(self.lsn);
        let mut now: HashMap<usize, RowRef> = HashMap::new();
        let mut cycle: Vec<Vec<RowChange>> = Vec::new();
        for (at, commit) in writes.iter().enumerate() {
            let version_of_row = StateVersion::from_lsn(at as u64 + 2);
            let change = |&(n, rank): &(usize, i32)| {
                let new = fixture::row(n, rank, &version_of_row);
                let key = new.project(&[0]);
                let first = || match self.source.get(self.items.id, &key) {
                    Some(row) => row.clone(),
                    None => fixture::row(n, n as i32, &version),
                };
                let old = now.insert(n, new.clone()).unwrap_or_else(first);
                RowChange { old: Some(old), new: Some(new) }
            };
            cycle.push(commit.iter().map(change).collect());
        }
        let back = |c: &RowChange| RowChange { old: c.new.clone(), new: c.old.clone() };
        let undo: Vec<Vec<RowChange>> =
            cycle.iter().rev().map(|c| c.iter().map(back).collect()).collect();
        cycle.extend(undo);
        cycle
    }
}

/// Makes commits of one table over and over, `batch` at a time. They must reach queries (or, with
/// `reach` false, none).
fn replay(
    mut world: World,
    table: Arc<TableSpec>,
    cycle: Vec<Vec<RowChange>>,
    batch: u64,
    reads: Reads,
    reach: bool,
) -> Batch {
    let mut at = 0_usize;
    let mut reached = false;
    Box::new(move || {
        for _ in 0..batch {
            let rows = cycle[at % cycle.len()].clone();
            at += 1;
            reached |= world.commit(&table, rows, reads)? > 0;
        }
        if at > cycle.len() && reached != reach {
            return Err("commits that reach queries, or not, and should not, or should".into());
        }
        Ok(batch)
    })
}

/// Commits of one row each, in turn over items spread by `stride`.
fn commits(world: World, rows: usize, ranks: usize, reach: bool) -> Batch {
    let (cycle, table) = (world.writes(&single_writes(rows, ranks)), world.items.clone());
    replay(world, table, cycle, 100, Reads::Nothing, reach)
}

/// Item and new rank of each commit.
pub(crate) fn single_writes(rows: usize, ranks: usize) -> Vec<Vec<(usize, i32)>> {
    (1..2000).map(|n| vec![(n * 61 % rows, (n * 7919 % ranks) as i32)]).collect()
}

/// What the other benches of commits cost without an engine's work: no query.
pub(crate) fn idle() -> Result<Batch, Failure> {
    Ok(commits(World::new(0), 20_000, 100_000, false))
}

/// 10,000 queries that differ in one literal; a commit concerns one of them.
pub(crate) fn route() -> Result<Batch, Failure> {
    let queries: Vec<Json> = (0..10_000).map(of_project).collect();
    Ok(commits(World::new(20_000).with(&queries)?, 20_000, 100_000, true))
}

/// The same with 1,000 queries.
pub(crate) fn route_1k() -> Result<Batch, Failure> {
    let queries: Vec<Json> = (0..1000).map(of_project).collect();
    Ok(commits(World::new(20_000).with(&queries)?, 20_000, 100_000, true))
}

/// 10,000 queries of one shape with a range each; a commit concerns two at most.
pub(crate) fn ranges() -> Result<Batch, Failure> {
    let query = |i: i32| {
        let bounds = [simple("rank", ">=", json!(i * 10)), simple("rank", "<", json!(i * 10 + 10))];
        json!({"table": "item", "orderBy": [["id", "asc"]], "where": and(&bounds)})
    };
    let mut world = World::new(0);
    for i in 0..10_000 {
        world.subscribe(&query(i))?;
    }
    Ok(commits(world, 20_000, 100_000, true))
}

/// Conditions of 1,000 plans on one table, half of them without an equality; `rank` decides.
fn plans(of: impl Fn(usize) -> Json) -> Vec<Json> {
    (0..1000)
        .map(|i| {
            json!({"table": "item", "orderBy": [["id", "asc"]], "limit": 1000 + i,
                "where": of(i)})
        })
        .collect()
}

/// A commit under 1,000 plans, each of which has ten instances: one plan is concerned.
pub(crate) fn route_plans() -> Result<Batch, Failure> {
    Ok(commits(World::new(0).with(&of_shapes())?, 20_000, 100_000, true))
}

pub(crate) fn of_shapes() -> Vec<Json> {
    let of = |k: usize| {
        plans(move |i| match i % 2 {
            0 => simple("project_id", "=", json!(format!("p{}", (i + k * 1000) / 2))),
            _ => simple("rank", ">", json!(10_000_000 + i + k)),
        })
    };
    (0..10).flat_map(of).collect()
}

/// A commit that touches nothing, under 1,000 plans; per plan.
pub(crate) fn untouched() -> Result<Batch, Failure> {
    let queries = plans(|i| match i % 2 {
        0 => and(&[
            simple("project_id", "=", json!("p1")),
            simple("rank", ">", json!(10_000_000 + i)),
        ]),
        _ => simple("title", "LIKE", json!(format!("no such {i}%"))),
    });
    let mut batch = commits(World::new(100).with(&queries)?, 100, 100_000, false);
    Ok(Box::new(move || Ok(batch()? * 1000)))
}

/// One query, which every commit concerns.
pub(crate) fn shared() -> Result<Batch, Failure> {
    Ok(commits(World::new(ITEMS).with(&[of_project(0)])?, ITEMS, 100_000, true))
}

/// The first 100 of 100,000 rows by what changes: half of the commits move rows of the window,
/// which leave it and come back.
fn churn(queries: &[Json], reach: bool) -> Result<Batch, Failure> {
    let world = World::sorted(WINDOW_ROWS, &[(2, Direction::Desc), (0, Direction::Asc)]);
    let world = world.with(queries)?;
    let (cycle, table) = (world.writes(&window_writes()), world.items.clone());
    Ok(replay(world, table, cycle, 100, Reads::Rows, reach))
}

/// Rows of the table with a window.
pub(crate) const WINDOW_ROWS: usize = 100_000;

/// The highest 200 change places among themselves; others far below.
pub(crate) fn window_writes() -> Vec<Vec<(usize, i32)>> {
    let write = |n: usize| match n % 2 {
        0 => (WINDOW_ROWS - 1 - n * 31 % 200, (WINDOW_ROWS - n * 7919 % 400) as i32),
        _ => (n * 61 % (WINDOW_ROWS - 200), (n * 7919 % (WINDOW_ROWS - 400)) as i32),
    };
    (1..2000).map(|n| vec![write(n)]).collect()
}

pub(crate) fn window() -> Result<Batch, Failure> {
    let order = json!([["rank", "desc"], ["id", "asc"]]);
    churn(&[json!({"table": "item", "orderBy": order, "limit": 100})], true)
}

/// The same commits without the query: what the bench itself costs.
pub(crate) fn window_idle() -> Result<Batch, Failure> {
    churn(&[], false)
}

/// All of 100,000 rows by a condition that each commit changes for one.
pub(crate) fn unlimited() -> Result<Batch, Failure> {
    const ROWS: usize = 100_000;
    let query = json!({"table": "item", "orderBy": [["id", "asc"]],
        "where": simple("rank", ">=", json!(0))});
    let world = World::new(ROWS).with(&[query])?;
    let writes: Vec<_> = (1..2000).map(|n| vec![(n * 61 % ROWS, -1)]).collect();
    let (cycle, table) = (world.writes(&writes), world.items.clone());
    Ok(replay(world, table, cycle, 100, Reads::Nothing, true))
}

/// 10,000 resident parents with an EXISTS; a commit takes the evidence of one, or gives it back.
pub(crate) fn exists() -> Result<Batch, Failure> {
    const ROWS: usize = 10_000;
    let body = json!({"type": "correlatedSubquery", "op": "EXISTS", "related": {
        "correlation": {"parentField": ["id"], "childField": ["item_id"]},
        "subquery": {"table": "label", "alias": "zsubq_label"}}});
    let mut world = World::new(ROWS);
    let (table, version) = (world.labels.clone(), StateVersion::from_lsn(1));
    let label = |n| label(n, n, &version);
    for n in 0..ROWS {
        world.source.put(table.id, label(n));
    }
    let query = json!({"table": "item", "orderBy": [["id", "asc"]], "where": body});
    world.subscribe(&query)?;
    let taken = |n: usize| vec![RowChange { old: Some(label(n * 61 % ROWS)), new: None }];
    let given = |n: usize| vec![RowChange { old: None, new: Some(label(n * 61 % ROWS)) }];
    let cycle = (0..1000).flat_map(|n| [taken(n), given(n)]).collect();
    Ok(replay(world, table, cycle, 100, Reads::Rows, true))
}

/// A transaction of 10,000 rows under 1,000 queries of 50 rows each.
pub(crate) fn transaction() -> Result<Batch, Failure> {
    const QUERIES: usize = 1000;
    let queries: Vec<Json> = (0..QUERIES).map(of_project).collect();
    let world = World::new(QUERIES * ITEMS).with(&queries)?;
    let (cycle, table) = (world.writes(&transaction_writes()), world.items.clone());
    Ok(replay(world, table, cycle, 1, Reads::Nothing, true))
}

pub(crate) fn transaction_writes() -> Vec<Vec<(usize, i32)>> {
    (1..3).map(|n| (0..10_000).map(|i| (i * 5, n)).collect()).collect()
}

/// Reads all rows of an instance, as its subscribers do; how many.
pub(crate) fn read(
    engine: &mut Engine,
    source: &mut dyn Source,
    id: InstanceId,
) -> Result<u64, Failure> {
    let (reading, mut rows) = (Reading::of(id), 0);
    let mut all = Budget::unlimited();
    let progress = engine.read(&reading, source, &mut all, &mut |row| {
        rows += match row {
            ReadRow::Held(HeldRow { count, .. }) => count,
            ReadRow::Changed { .. } => 0,
        };
    })?;
    match progress {
        ReadProgress::Done => Ok(rows),
        other => Err(format!("not all rows were told: {other:?}").into()),
    }
}

/// A second subscriber of a query of 10,000 rows, which reads all of them.
pub(crate) fn attach() -> Result<Batch, Failure> {
    let query = json!({"table": "item", "orderBy": [["id", "asc"]]});
    let mut world = World::new(10_000);
    world.subscribe(&query)?;
    Ok(Box::new(move || {
        let id = world.subscribe(&query)?;
        let rows = read(&mut world.engine, &mut world.source, id)?;
        world.engine.unsubscribe(id);
        Ok(rows)
    }))
}
