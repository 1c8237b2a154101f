//! Random transactions against a plain model: after each, the replica's rows equal the model's,
//! the published commit equals the difference of the tables before and after it, and the change
//! log names exactly the rows that changed.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod kit;

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::sync::Arc;

use kit::*;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use zeroring_core::change::Commit;
use zeroring_core::change::message::{
    ChangeMessage, LiteValue, Relation, ReplicaIdentity, TupleValue,
};
use zeroring_core::change::published::PublishedSchema;
use zeroring_core::row::{Row, RowRef};
use zeroring_core::schema::TableSpec;
use zeroring_core::value::Value;
use zeroring_storage::changelog::{Changes, LogOp, changes_since};
use zeroring_storage::replica::reader::{ReaderOptions, ReplicaReader};
use zeroring_storage::replica::schema::TableIds;
use zeroring_storage::replica::writer::Applied;

/// A row of the model: unique (nullable) slug, a number, a JSON text that is TOASTed at times, and
/// a column that clients cannot see.
#[derive(Debug, Clone, PartialEq)]
struct Model {
    slug: Option<u8>,
    n: i64,
    body: String,
    hidden: Vec<u8>,
}

struct World {
    rng: StdRng,
    rows: BTreeMap<i64, Model>,
    relation: Arc<Relation>,
    next_slug: u8,
}

impl World {
    fn tuple(id: i64, m: &Model) -> Vec<TupleValue> {
        let slug = m.slug.map_or(LiteValue::Null, |s| text(&format!("s{s}")));
        let hidden = LiteValue::Blob(m.hidden.clone().into());
        tuple([int(id), slug, int(m.n), text(&m.body), hidden])
    }

    fn key(id: i64) -> Vec<TupleValue> {
        let absent = || TupleValue::Absent;
        vec![some(int(id)), absent(), absent(), absent(), absent()]
    }

    fn old(&self, id: i64, m: &Model) -> Option<Vec<TupleValue>> {
        (self.relation.identity == ReplicaIdentity::Full).then(|| World::tuple(id, m))
    }

    fn old_or_key(&self, id: i64, m: &Model) -> Vec<TupleValue> {
        self.old(id, m).unwrap_or_else(|| World::key(id))
    }

    fn fresh_slug(&mut self) -> Option<u8> {
        self.next_slug = self.next_slug.wrapping_add(1);
        let slug = self.next_slug;
        (self.rng.random_bool(0.8) && !self.rows.values().any(|m| m.slug == Some(slug)))
            .then_some(slug)
    }

    fn fresh(&mut self) -> Model {
        let slug = self.fresh_slug();
        let body =
            ["1.50", "{\"a\":1}", "[]", "null", "\"7e3\"", "7e3"][self.rng.random_range(0..6)];
        Model { slug, n: self.rng.random_range(0..5), body: body.into(), hidden: vec![1, 2] }
    }

    fn some_id(&mut self) -> Option<i64> {
        let ids: Vec<i64> = self.rows.keys().copied().collect();
        (!ids.is_empty()).then(|| ids[self.rng.random_range(0..ids.len())])
    }

    fn update(&self, id: i64, before: &Model, after: &Model, toast: bool) -> ChangeMessage {
        let mut new = World::tuple(id, after);
        if toast && before.body == after.body && before.hidden == after.hidden {
            new[3] = TupleValue::Absent;
            new[4] = TupleValue::Absent;
        }
        ChangeMessage::Update { relation: self.relation.clone(), old: self.old(id, before), new }
    }

    /// One or more messages that Postgres could send next.
    fn step(&mut self) -> Vec<ChangeMessage> {
        let relation = self.relation.clone();
        let toast = self.rng.random_bool(0.5);
        match (self.rng.random_range(0..100), self.some_id()) {
            (0..=1, _) => {
                self.rows.clear();
                vec![ChangeMessage::Truncate { relations: vec![relation] }]
            }
            (2..=30, _) | (_, None) => {
                let id = self.rng.random_range(0..24);
                if self.rows.contains_key(&id) {
                    return vec![];
                }
                let m = self.fresh();
                let new = World::tuple(id, &m);
                self.rows.insert(id, m);
                vec![ChangeMessage::Insert { relation, new }]
            }
            (31..=55, Some(id)) => {
                let before = self.rows[&id].clone();
                let mut after = before.clone();
                match self.rng.random_range(0..4) {
                    0 => after.n += 1,
                    1 => after.slug = self.fresh_slug(),
                    2 => after.hidden.push(9),
                    _ => after.body = self.fresh().body,
                }
                self.rows.insert(id, after.clone());
                vec![self.update(id, &before, &after, toast)]
            }
            (56..=70, Some(id)) => {
                let m = self.rows.remove(&id).unwrap();
                vec![ChangeMessage::Delete { relation, old: self.old_or_key(id, &m) }]
            }
            (71..=85, Some(id)) => {
                // A key change.
                let to = self.rng.random_range(0..24);
                if self.rows.contains_key(&to) {
                    return vec![];
                }
                let m = self.rows.remove(&id).unwrap();
                let mut new = World::tuple(to, &m);
                if toast {
                    new[3] = TupleValue::Absent;
                    new[4] = TupleValue::Absent;
                }
                let old = Some(self.old_or_key(id, &m));
                self.rows.insert(to, m);
                vec![ChangeMessage::Update { relation, old, new }]
            }
            (_, Some(a)) => {
                // A deferred constraint: rows rotate their slugs, or their keys.
                let Some(b) = self.some_id().filter(|b| *b != a) else { return vec![] };
                let (ma, mb) = (self.rows[&a].clone(), self.rows[&b].clone());
                // Postgres takes no deferrable key as identity, except as part of the whole row.
                let full = self.relation.identity == ReplicaIdentity::Full;
                if !full || self.rng.random_bool(0.5) {
                    let na = Model { slug: mb.slug, ..ma.clone() };
                    let nb = Model { slug: ma.slug, ..mb.clone() };
                    self.rows.insert(a, na.clone());
                    self.rows.insert(b, nb.clone());
                    vec![self.update(a, &ma, &na, toast), self.update(b, &mb, &nb, toast)]
                } else {
                    self.rows.insert(a, mb.clone());
                    self.rows.insert(b, ma.clone());
                    let change = |from: i64, to: i64, m: &Model| ChangeMessage::Update {
                        relation: relation.clone(),
                        old: Some(self.old_or_key(from, m)),
                        new: World::tuple(to, m),
                    };
                    vec![change(a, b, &ma), change(b, a, &mb)]
                }
            }
        }
    }
}

type Contents = BTreeMap<Value, RowRef>;

fn contents(reader: &mut ReplicaReader, spec: &TableSpec) -> Contents {
    reader.refresh().unwrap();
    let mut out = Contents::new();
    reader
        .scan(spec, &mut |row| {
            out.insert(row.values[0].clone(), row);
            ControlFlow::Continue(())
        })
        .unwrap();
    out
}

fn same(a: &Row, b: &Row) -> bool {
    a.version == b.version && a.values == b.values
}

/// Applies the commit to `before`; its entries must fit exactly.
fn check_commit(before: &Contents, after: &Contents, commit: &Commit, seed: u64) {
    let Some(change) = commit.tables.iter().find(|t| &*t.table.name == "t") else {
        assert!(before.len() == after.len() && before.iter().all(|(k, r)| same(r, &after[k])));
        return;
    };
    if change.truncated {
        return;
    }
    let mut now = before.clone();
    for row in &change.rows {
        if let Some(old) = &row.old {
            let removed = before.get(&old.values[0]);
            assert!(
                removed.is_some_and(|r| same(r, old)),
                "seed {seed}: old {old:?} was not there"
            );
        }
        if let (Some(old), None) = (&row.old, &row.new) {
            now.remove(&old.values[0]);
        }
    }
    let mut keys = std::collections::BTreeSet::new();
    for row in &change.rows {
        let key = row.old.as_ref().or(row.new.as_ref()).unwrap().values[0].clone();
        assert!(keys.insert(key), "seed {seed}: a key twice");
        if let Some(new) = &row.new {
            if row.old.is_none() {
                assert!(!before.contains_key(&new.values[0]), "seed {seed}: {new:?} was there");
            }
            now.insert(new.values[0].clone(), new.clone());
        }
    }
    assert_eq!(now.len(), after.len(), "seed {seed}");
    for (key, row) in after {
        assert!(same(&now[key], row), "seed {seed}: {:?} is {row:?}", now[key]);
    }
}

fn check_log(
    reader: &ReplicaReader,
    from: &zeroring_core::version::StateVersion,
    before: &Contents,
    after: &Contents,
    seed: u64,
) {
    let rows = match changes_since(reader.connection(), from, 10_000).unwrap() {
        Changes::Rows(rows) => rows,
        Changes::Everything { table, .. } => return assert_eq!(table, "t"),
        Changes::TooMany => panic!("too many"),
    };
    let mut logged = BTreeMap::new();
    for row in rows {
        assert_eq!(row.version, *reader.version().unwrap(), "seed {seed}");
        let id = Value::Number(row.key["id"].as_f64().unwrap());
        assert!(logged.insert(id, row.op).is_none(), "seed {seed}: one entry per key");
    }
    for (key, op) in &logged {
        assert_eq!(*op == LogOp::Set, after.contains_key(key), "seed {seed}: {key:?} {op:?}");
    }
    for key in before.keys().chain(after.keys()) {
        let unchanged = match (before.get(key), after.get(key)) {
            (Some(a), Some(b)) => same(a, b),
            _ => false,
        };
        assert!(unchanged || logged.contains_key(key), "seed {seed}: {key:?} is not logged");
    }
}

fn run(seed: u64, identity: ReplicaIdentity) {
    let (_dir, path) = place();
    let columns =
        [("id", "int4!"), ("slug", "text"), ("n", "int8!"), ("body", "jsonb"), ("hidden", "bytea")];
    let t = table("public", "t", &columns);
    let schema = PublishedSchema {
        tables: vec![t.clone()],
        indexes: vec![
            index("public", "t", "t_pkey", true, &["id"]),
            index("public", "t", "t_slug", true, &["slug"]),
            index("public", "t", "t_n", false, &["n"]),
        ],
    };
    create(&path, &schema, &[]);
    let mut w = writer(&path);
    let mut reader = ReplicaReader::open(&path, &ReaderOptions::default()).unwrap();
    let spec = reader.schema(&TableIds::default()).unwrap().visible.table("t").unwrap().clone();
    let relation = relation(&t, identity, &["id"]);
    let mut world =
        World { rng: StdRng::seed_from_u64(seed), rows: BTreeMap::new(), relation, next_slug: 0 };
    let mut before = contents(&mut reader, &spec);
    for n in 1..40 {
        let from = w.version().clone();
        let saved = world.rows.clone();
        let steps = world.rng.random_range(0..12);
        let messages: Vec<_> = (0..steps).flat_map(|_| world.step()).collect();
        if world.rng.random_bool(0.1) {
            // Lost in the middle: nothing happened.
            let begin = ChangeMessage::Begin { watermark: version(n), commit_time_ms: 0.0 };
            w.apply(&begin).unwrap();
            messages.iter().for_each(|m| drop(w.apply(m).unwrap()));
            assert!(matches!(w.apply(&ChangeMessage::Rollback).unwrap(), Applied::RolledBack));
            world.rows = saved;
            let now = contents(&mut reader, &spec);
            assert!(now.len() == before.len() && now.iter().all(|(k, r)| same(r, &before[k])));
            continue;
        }
        let commit = transact(&mut w, n, messages);
        assert_eq!((&commit.previous, &commit.version), (&from, &version(n)));
        let after = contents(&mut reader, &spec);
        assert_eq!(reader.version(), Some(&commit.version));
        check_model(&path, &world.rows, seed);
        check_commit(&before, &after, &commit, seed);
        check_log(&reader, &from, &before, &after, seed);
        before = after;
    }
}

fn check_model(path: &std::path::Path, rows: &BTreeMap<i64, Model>, seed: u64) {
    let found = dump(path, "SELECT id, slug, n, body, hidden FROM t ORDER BY id");
    let expected: Vec<String> = rows
        .iter()
        .map(|(id, m)| {
            let slug = m.slug.map_or("null".into(), |s| format!("s{s}"));
            let body = match m.body.as_str() {
                "1.50" => "1.5r",
                "7e3" => "7000",
                other => other,
            };
            format!("{id}|{slug}|{}|{body}|x{:?}", m.n, m.hidden)
        })
        .collect();
    assert_eq!(found, expected, "seed {seed}");
}

#[test]
fn commits_equal_the_difference_of_the_tables() {
    let seeds =
        std::env::var("SEED").ok().and_then(|s| s.parse().ok()).map_or(0..40, |s: u64| s..s + 1);
    for seed in seeds {
        println!("seed {seed}");
        run(seed, ReplicaIdentity::Default);
        run(seed, ReplicaIdentity::Full);
    }
}

/// Commits as text, rows in a fixed order.
fn printed(commit: &Commit) -> String {
    let tables = commit.tables.iter().map(|t| {
        let mut rows: Vec<String> = t.rows.iter().map(|r| format!("{r:?}")).collect();
        rows.sort();
        format!("{} {} {rows:?}", t.table.name, t.truncated)
    });
    format!("{:?}→{:?} {:?}", commit.previous, commit.version, tables.collect::<Vec<_>>())
}

#[test]
fn held_commits_are_the_commits_that_they_would_have_been() {
    for seed in 0..20 {
        let columns = [("id", "int4!"), ("slug", "text"), ("n", "int8!"), ("body", "jsonb")];
        let t = table("public", "t", &[&columns[..], &[("hidden", "bytea")]].concat());
        let schema = PublishedSchema {
            tables: vec![t.clone()],
            indexes: vec![
                index("public", "t", "t_pkey", true, &["id"]),
                index("public", "t", "t_slug", true, &["slug"]),
            ],
        };
        let relation = relation(&t, ReplicaIdentity::Default, &["id"]);
        let mut world = World {
            rng: StdRng::seed_from_u64(seed),
            rows: BTreeMap::new(),
            relation,
            next_slug: 0,
        };
        let history: Vec<Vec<ChangeMessage>> = (0..40)
            .map(|_| {
                let steps = world.rng.random_range(0..6);
                (0..steps).flat_map(|_| world.step()).collect()
            })
            .collect();
        let (_dir, path) = place();
        create(&path, &schema, &[]);
        let mut w = writer(&path);
        let mut plain = Vec::new();
        for (n, messages) in history.iter().enumerate() {
            plain.push(printed(&transact(&mut w, n as u64 + 1, messages.clone())));
        }
        let (_other_dir, other) = place();
        create(&other, &schema, &[]);
        let mut w = writer(&other);
        let mut commits: Vec<String> = Vec::new();
        while commits.len() < history.len() {
            let done = w.version().clone();
            let next = commits.len() + w.held();
            let watermark = version(next as u64 + 1);
            let begin = ChangeMessage::Begin { watermark: watermark.clone(), commit_time_ms: 1.5 };
            w.apply(&begin).unwrap();
            history[next].iter().for_each(|m| drop(w.apply(m).unwrap()));
            if next + 1 < history.len() && world.rng.random_bool(0.6) {
                w.hold(&watermark).unwrap();
                assert!(w.in_transaction() && w.take_earlier().is_empty());
                assert_eq!(w.version(), &done, "seed {seed}");
                assert_eq!(w.sync().unwrap(), done, "what is held is not acknowledged");
                let mut reader = ReplicaReader::open(&other, &ReaderOptions::default()).unwrap();
                assert_eq!(reader.refresh().unwrap(), w.version(), "seed {seed}");
            } else if world.rng.random_bool(0.2) {
                // The stream is lost: the upstream sends again what was held.
                w.apply(&ChangeMessage::Rollback).unwrap();
                assert!(!w.in_transaction());
            } else {
                let applied = w.apply(&ChangeMessage::Commit { watermark }).unwrap();
                let Applied::Committed(last) = applied else { panic!("{applied:?}") };
                commits.extend(w.take_earlier().iter().map(|commit| printed(commit)));
                commits.push(printed(&last));
                assert_eq!(w.version(), &last.version);
            }
        }
        assert_eq!(commits, plain, "seed {seed}");
        for sql in ["SELECT * FROM t ORDER BY id", "SELECT * FROM \"_zero.changeLog2\""] {
            assert_eq!(dump(&other, sql), dump(&path, sql), "seed {seed}");
        }
    }
}
