//! No step does much, however large a query or a transaction is: counted as rows that the engine
//! looked at, took or gave back between two looks at the clock, and as texts that it gave back,
//! which are those of keys. What the source does is not.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::sync::Arc;

use serde_json::{Value as Json, json};

use super::kit::table;
use crate::change::{Commit, RowChange, TableChange};
use crate::ivm::brute;
use crate::ivm::delta::Advanced;
use crate::ivm::engine::{Budget, Engine, EngineConfig, InstanceId, Progress, Reset};
use crate::ivm::memory_source::Database;
use crate::ivm::reading::{ReadProgress, Reading};
use crate::ivm::source::{Fetch, Filter, Source, SourceError};
use crate::owners::tally::{ROWS_TOUCHED, TEXTS_GIVEN_BACK};
use crate::row::{Row, RowId, RowRef};
use crate::schema::ValueType::{Number, String as Text};
use crate::schema::{Schema, TableId};
use crate::value::Value;
use crate::version::StateVersion;
use crate::zql::compile::{IdentityKeys, compile};
use crate::zql::{order, predicate};

/// Parents, and children: each parent has one.
const ROWS: usize = 4_000;
/// Units of a step.
const STEP: u64 = 50;
/// Statements that a step may run: each costs as much as some rows.
const MOST_STATEMENTS: u64 = STEP / Budget::STATEMENT + 2;
/// Touches of rows that a step may come to. One look at each row would be as many as there are.
const MOST: u64 = 2_500;

/// Texts that a step may give back.
const MOST_TEXTS: u64 = 1_000;

/// Rows by key and by their second column, so that look-ups are not scans.
#[derive(Default)]
struct Indexed {
    db: Database,
    by_second: BTreeMap<(TableId, Value), BTreeMap<Value, RowRef>>,
    version: StateVersion,
    /// Touches and texts that are the source's.
    touches: u64,
    texts: u64,
    statements: u64,
}

impl Indexed {
    fn apply(&mut self, commit: &Commit) {
        for change in &commit.tables {
            let at = |row: &Row| (change.table.id, row.values[1].clone());
            for old in change.rows.iter().filter_map(|r| r.old.as_ref()) {
                self.by_second.entry(at(old)).or_default().remove(&old.values[0]);
            }
            for new in change.rows.iter().filter_map(|r| r.new.as_ref()) {
                let rows = self.by_second.entry(at(new)).or_default();
                rows.insert(new.values[0].clone(), new.clone());
            }
        }
        self.db.apply(commit);
        self.version = commit.version.clone();
    }

    fn candidates(&self, f: &Fetch<'_>) -> Vec<RowRef> {
        let table = f.plan.node(f.node).table.id;
        let of = |v: &Value| self.by_second.get(&(table, v.clone())).into_iter();
        match f.keys {
            Some(k) if k.columns == [1] => k
                .keys
                .iter()
                .flat_map(|key| of(&key[0]))
                .flat_map(|r| r.values())
                .cloned()
                .collect(),
            Some(k) if k.columns == [0] => {
                k.keys.iter().filter_map(|key| self.db.get(table, key)).cloned().collect()
            }
            _ => self.db.rows(table).cloned().collect(),
        }
    }

    fn holds(&self, f: &Fetch<'_>, row: &Row) -> bool {
        let node = f.plan.node(f.node);
        let at = |p: &[Value]| order::compare_to_position(&node.order, row, p);
        (match f.filter {
            Filter::Whole => {
                predicate::weak(node, row, f.params)
                    && predicate::evaluate(&node.condition, row, f.params, &mut |e| {
                        let of = (
                            f.plan.node(e.child).table.id,
                            row.values[e.parent_columns[0]].clone(),
                        );
                        let has = match e.child_columns[0] {
                            1 => self.by_second.get(&of).is_some_and(|rows| !rows.is_empty()),
                            _ => self.db.get(of.0, &[of.1].into_iter().collect()).is_some(),
                        };
                        has != e.negated
                    })
            }
            Filter::Weak => predicate::weak(node, row, f.params),
            Filter::Any => true,
        }) && f
            .from
            .is_none_or(|b| at(b.position).is_gt() || (b.inclusive && at(b.position).is_eq()))
            && f.before.is_none_or(|p| at(p).is_lt())
    }
}

impl Source for Indexed {
    fn version(&self) -> &StateVersion {
        &self.version
    }

    fn fetch(
        &mut self,
        f: &Fetch<'_>,
        visit: &mut dyn FnMut(RowRef) -> ControlFlow<()>,
    ) -> Result<(), SourceError> {
        self.statements += 1;
        let (before, texts) = (ROWS_TOUCHED.get(), TEXTS_GIVEN_BACK.get());
        let mut found = self.candidates(f);
        found.retain(|row| self.holds(f, row));
        if f.ordered || f.limit.is_some() {
            let by = &f.plan.node(f.node).order;
            found.sort_by(|a, b| order::compare_rows(by, a, b));
        }
        found.truncate(f.limit.unwrap_or(usize::MAX));
        self.touches += ROWS_TOUCHED.get() - before;
        self.texts += TEXTS_GIVEN_BACK.get() - texts;
        let mut rows = found.into_iter();
        for row in rows.by_ref() {
            if visit(row).is_break() {
                break;
            }
        }
        // A statement does not fetch what nobody wants.
        let (before, texts) = (ROWS_TOUCHED.get(), TEXTS_GIVEN_BACK.get());
        drop(rows);
        self.touches += ROWS_TOUCHED.get() - before;
        self.texts += TEXTS_GIVEN_BACK.get() - texts;
        Ok(())
    }
}

struct World {
    engine: Engine,
    source: Indexed,
    schema: Arc<Schema>,
    lsn: u64,
    /// The most that a step touched, and in which.
    worst: (u64, &'static str),
    most_texts: (u64, &'static str),
    steps: u64,
}

fn row(version: &StateVersion, values: [usize; 3]) -> RowRef {
    let [id, second, n] = values;
    Row::new(version.clone(), [text(id), text(second), Value::Number(n as f64)])
}

fn text(n: usize) -> Value {
    Value::string(name(n))
}

/// In the order of the numbers.
fn name(n: usize) -> String {
    format!("{n:05}")
}

impl World {
    fn new() -> World {
        World::with(3, EngineConfig::default())
    }

    /// With so many rows of `p` per value of `k` as there are values.
    fn with(keys: usize, config: EngineConfig) -> World {
        let tables = [
            table(0, "p", &[("id", Text), ("k", Text), ("n", Number)]),
            table(1, "c", &[("id", Text), ("p", Text), ("n", Number)]),
        ];
        let tables = tables.map(|t| (t.name.clone(), t));
        let schema = Arc::new(Schema { tables: tables.into(), ..Schema::default() });
        let version = StateVersion::from_lsn(1);
        let mut source = Indexed { version: version.clone(), ..Indexed::default() };
        let mut first =
            World::commit_of(&schema, &version, &version, |n| (None, Some([n, n % keys, 0])));
        let children = World::commit_of(&schema, &version, &version, |n| (None, Some([n, n, 0])));
        first.tables.remove(1);
        first.tables.push(children.tables[1].clone());
        source.apply(&first);
        let config = EngineConfig { rehydrate_above: usize::MAX, ..config };
        let engine = Engine::new(config, version, schema.clone());
        World {
            engine,
            source,
            schema,
            lsn: 1,
            worst: (0, "nothing"),
            most_texts: (0, "nothing"),
            steps: 0,
        }
    }

    fn commit_of(
        schema: &Schema,
        previous: &StateVersion,
        version: &StateVersion,
        change: impl Fn(usize) -> (Option<RowRef>, Option<[usize; 3]>),
    ) -> Commit {
        let rows = (0..ROWS).map(|n| {
            let (old, new) = change(n);
            RowChange { old, new: new.map(|values| row(version, values)) }
        });
        let rows: Vec<RowChange> = rows.collect();
        let tables = ["p", "c"].map(|name| TableChange {
            table: schema.tables[name].clone(),
            rows: rows.clone(),
            truncated: false,
        });
        Commit {
            previous: previous.clone(),
            version: version.clone(),
            tables: tables.into(),
            schema: None,
            upstream_commit_ms: 0.0,
            permissions_changed: false,
        }
    }

    /// A transaction that writes every row of a table.
    fn write(&mut self, name: &str, new: impl Fn(usize) -> [usize; 3]) -> Arc<Commit> {
        self.lsn += 1;
        let version = StateVersion::from_lsn(self.lsn);
        let previous = self.source.version.clone();
        let id = self.schema.tables[name].id;
        let db = &self.source.db;
        let old = |n: usize| db.get(id, &[text(n)].into_iter().collect()).cloned();
        let mut commit =
            World::commit_of(&self.schema, &previous, &version, |n| (old(n), Some(new(n))));
        commit.tables.retain(|t| &*t.table.name == name);
        self.source.apply(&commit);
        Arc::new(commit)
    }

    fn step<T>(
        &mut self,
        what: &'static str,
        step: impl FnOnce(&mut Engine, &mut Indexed, &mut Budget) -> T,
    ) -> T {
        let (before, of_source) = (ROWS_TOUCHED.get(), self.source.touches);
        let (statements, texts) = (self.source.statements, self.source.texts);
        let texts = TEXTS_GIVEN_BACK.get() - texts;
        let result = step(&mut self.engine, &mut self.source, &mut Budget::units(STEP));
        let touches = ROWS_TOUCHED.get() - before - (self.source.touches - of_source);
        self.worst = self.worst.max((touches, what));
        self.steps += 1;
        assert!(touches <= MOST, "{touches} rows touched in one step: {what}");
        let texts = TEXTS_GIVEN_BACK.get() - self.source.texts - texts;
        self.most_texts = self.most_texts.max((texts, what));
        assert!(texts <= MOST_TEXTS, "{texts} texts given back in one step: {what}");
        let statements = self.source.statements - statements;
        assert!(statements <= MOST_STATEMENTS, "{statements} statements in one step: {what}");
        result
    }

    fn subscribe(&mut self, query: &Json) -> InstanceId {
        let ast = serde_json::from_value(query.clone()).unwrap();
        let (plan, params) = compile(&ast, &self.schema, &IdentityKeys::default()).unwrap();
        let id = self.engine.subscribe(&Arc::new(plan), params.into()).unwrap();
        while self.step("hydration", |e, s, b| e.hydrate_step(id, s, b)).unwrap() != Progress::Done
        {
        }
        id
    }

    /// Reads an instance piece by piece; how many rows it was told of.
    fn read(&mut self, id: InstanceId) -> usize {
        let reading = Reading::of(id);
        let mut told = 0;
        let mut step = |w: &mut World| {
            w.step("reading", |e, s, b| e.read(&reading, s, b, &mut |_| told += 1)).unwrap()
        };
        while step(self) != ReadProgress::Done {}
        told
    }

    fn advance(&mut self, what: &'static str, commits: &[Arc<Commit>]) -> Advanced {
        self.step(what, |e, _, _| e.begin_advance(commits)).unwrap();
        self.finish(what)
    }

    fn finish(&mut self, what: &'static str) -> Advanced {
        loop {
            if let Some(advanced) = self.step(what, |e, s, b| e.advance_step(s, b)).unwrap() {
                assert!(advanced.failed.is_empty());
                return advanced;
            }
        }
    }

    fn check(&self, id: InstanceId, query: &Json) {
        let ast = serde_json::from_value(query.clone()).unwrap();
        let (plan, params) = compile(&ast, &self.schema, &IdentityKeys::default()).unwrap();
        let mut have: Vec<(RowId, u64)> =
            (self.engine.rows(id).unwrap()).map(|h| (RowId::of(h.table, h.row), h.count)).collect();
        have.sort();
        let want = brute::sync(&plan, &params, &self.source.db);
        assert!(have.iter().map(|(id, n)| (id, *n)).eq(want.iter().map(|(id, r)| (id, r.0))));
    }
}

fn exists(n: usize) -> Json {
    json!({"type": "correlatedSubquery", "op": "EXISTS", "related": {
        "correlation": {"parentField": ["id"], "childField": ["p"]},
        "subquery": {"table": "c", "alias": "e", "where": {"type": "simple", "op": ">=",
            "left": {"type": "column", "name": "n"}, "right": {"type": "literal", "value": n}}}}})
}

#[test]
fn no_step_touches_many_rows() {
    let mut world = World::new();
    let nested = json!({"table": "p", "where": exists(0), "related": [{
        "correlation": {"parentField": ["id"], "childField": ["p"]},
        "subquery": {"table": "c", "alias": "r"}}]});
    let id = world.subscribe(&nested);
    assert_eq!(world.read(id), 2 * ROWS);
    let commits = [1, 2].map(|n| world.write("p", |id| [id, (id + n) % 3, n]));
    let advanced = world.advance("transactions on parents", &commits);
    assert_eq!(advanced.deltas[0].rows.len(), ROWS);
    // Every child moves to the next parent, the last one's to nobody.
    let moved = world.write("c", |id| [id, id + 1, 1]);
    let advanced = world.advance("a transaction on children", &[moved]);
    assert!(advanced.deltas[0].rows.len() > ROWS);
    world.write("c", |id| [id, id, 2]);
    let (version, schema) = (world.source.version.clone(), world.schema.clone());
    let reset = Reset::All;
    world.step("reset", |e, _, _| e.begin_reset(version, schema, &reset)).unwrap();
    assert!(world.finish("re-hydration").deltas[0].rows.len() > ROWS);
    world.step("unsubscribing", |e, _, _| e.unsubscribe(id));
    while !world.step("release", |e, _, b| e.release(b)) {}
    assert_eq!(world.engine.stats().routes, 0);
    println!("{} steps, at most {:?}, texts {:?}", world.steps, world.worst, world.most_texts);
}

#[test]
fn no_step_for_many_instances_touches_many_rows() {
    let mut world = World::new();
    let mine = |k: usize| {
        let own = json!({"type": "simple", "op": "=", "left": {"type": "column", "name": "k"},
            "right": {"type": "literal", "value": name(k)}});
        json!({"table": "p", "where": {"type": "and", "conditions": [own, exists(0)]}})
    };
    // More than search on their own.
    let ids: Vec<InstanceId> = (0..6).map(|k| world.subscribe(&mine(k))).collect();
    for (what, child) in [("led", 1), ("led back", 0)] {
        let commit = world.write("c", |id| [id, id + child, child]);
        assert!(!world.advance(what, &[commit]).deltas.is_empty());
    }
    for (k, &id) in ids.iter().enumerate().take(3) {
        if k == 0 {
            world.check(id, &mine(k));
        }
    }
    assert!(world.engine.stats().counters.shared_searches > 0);
    println!("{} steps, at most {:?}, texts {:?}", world.steps, world.worst, world.most_texts);
}

#[test]
fn no_step_of_parking_or_reading_anew_touches_many_rows() {
    let mut world = World::with(3, EngineConfig { max_rows: ROWS + 10, ..EngineConfig::default() });
    let (first, second) = (json!({"table": "p"}), json!({"table": "c"}));
    let ids = [world.subscribe(&first), world.subscribe(&second)];
    while !world.step("parking", |e, _, b| e.release(b)) {}
    assert!(world.engine.is_parked(ids[0]) && !world.engine.is_parked(ids[1]));
    // A commit reads the parked one anew; then the other one makes room.
    let commit = world.write("p", |id| [id, 0, 1]);
    let advanced = world.advance("a commit for a parked query", &[commit]);
    assert_eq!(advanced.deltas[0].rows.len(), ROWS);
    world.step("giving deltas back", |e, _, _| e.discard(advanced.deltas));
    while !world.step("release", |e, _, b| e.release(b)) {}
    assert_eq!(world.engine.stats().parked, 1);
    for id in ids {
        while world.step("reading anew", |e, s, b| e.hydrate_step(id, s, b)).unwrap()
            != Progress::Done
        {}
    }
    world.check(ids[1], &second);
    // Who reads a parked one has it read anew, and the other one makes room.
    while !world.step("parking", |e, _, b| e.release(b)) {}
    let parked = ids.iter().position(|&id| world.engine.is_parked(id)).unwrap();
    assert_eq!(world.read(ids[parked]), ROWS);
    world.check(ids[parked], [&first, &second][parked]);
    println!("{} steps, at most {:?}, texts {:?}", world.steps, world.worst, world.most_texts);
}

#[test]
fn no_step_reads_many_partitions_one_by_one() {
    const KEYS: usize = 25;
    let mut world = World::with(KEYS, EngineConfig::default());
    // Together they are too many rows for a batch.
    let query = json!({"table": "c", "where": {"type": "simple", "op": "<",
        "left": {"type": "column", "name": "id"}, "right": {"type": "literal", "value": name(KEYS)}},
        "related": [{"correlation": {"parentField": ["p"], "childField": ["k"]},
            "subquery": {"table": "p", "alias": "p"}}]});
    let id = world.subscribe(&query);
    world.check(id, &query);
    assert_eq!(world.engine.rows(id).unwrap().count(), KEYS + ROWS);
    println!("{} steps, at most {:?}, texts {:?}", world.steps, world.worst, world.most_texts);
}
