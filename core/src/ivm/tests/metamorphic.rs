//! Ways to write a query that mean the same: hints, other orders of AND and OR, a condition that
//! always holds, a limit that is never reached, a cursor before the first row. All variants are
//! kept up by one engine and must sync the same rows, equally often, at each version.

use std::sync::Arc;

use crate::ivm::brute::Multiset;
use crate::ivm::engine::{Budget, Engine, EngineConfig, InstanceId, Progress};
use crate::ivm::memory_source::MemorySource;
use crate::row::RowId;
use crate::schema::{Schema, ValueType};
use crate::version::StateVersion;
use crate::zql::ast::{Ast, Condition, Direction, Literal, Op, Operand, Simple, Start};
use crate::zql::compile::{IdentityKeys, compile};
use crate::zql::gen_world::{self, Choices, Shape};

type Rewrite = fn(&mut Choices, &Schema, &mut Ast);

const REWRITES: [(&str, Rewrite); 6] = [
    ("hints", |c, _, q| {
        each_exists(q, &mut |e| {
            e.flip = c.pick(&[None, Some(false), Some(true)]);
            e.scalar = c.pick(&[None, Some(false), Some(true)]);
        });
    }),
    ("other orders of AND and OR", |c, _, q| each_query(q, &mut |q| reorder(c, q))),
    ("a condition that always holds", |_, s, q| each_query(q, &mut |q| always(s, q))),
    ("a limit that is never reached", |_, _, q| {
        each_query(q, &mut |q| q.limit = q.limit.or(Some(1e9)));
    }),
    ("a cursor before the first row", |_, _, q| each_query(q, &mut before_all)),
    ("a body's order and limit", |c, _, q| {
        each_exists(q, &mut |e| {
            let body = &mut e.related.subquery;
            body.limit = body.limit.or(Some(1.0 + c.below(3) as f64));
            // A cursor is a position in the order.
            if body.start.is_none() {
                body.order_by =
                    Some(vec![("u".into(), c.pick(&[Direction::Asc, Direction::Desc]))]);
            }
        });
    }),
];

fn each_query(ast: &mut Ast, change: &mut dyn FnMut(&mut Ast)) {
    change(ast);
    if let Some(c) = &mut ast.condition {
        each_leaf(c, &mut |e| each_query(&mut e.related.subquery, change));
    }
    for edge in ast.related.iter_mut().flatten() {
        each_query(&mut edge.subquery, change);
    }
}

fn each_exists(ast: &mut Ast, change: &mut dyn FnMut(&mut crate::zql::ast::Exists)) {
    each_query(ast, &mut |q| {
        if let Some(c) = &mut q.condition {
            each_leaf(c, change);
        }
    });
}

fn each_leaf(c: &mut Condition, visit: &mut dyn FnMut(&mut crate::zql::ast::Exists)) {
    match c {
        Condition::And { conditions } | Condition::Or { conditions } => {
            conditions.iter_mut().for_each(|c| each_leaf(c, visit));
        }
        Condition::CorrelatedSubquery(e) => visit(e),
        Condition::Simple(_) => {}
    }
}

fn reorder(c: &mut Choices, ast: &mut Ast) {
    fn turn(c: &mut Choices, condition: &mut Condition) {
        if let Condition::And { conditions } | Condition::Or { conditions } = condition {
            conditions.iter_mut().for_each(|k| turn(c, k));
            let by = c.below(conditions.len().max(1));
            conditions.rotate_left(by);
            if c.chance(50) {
                conditions.reverse();
            }
        }
    }
    if let Some(condition) = &mut ast.condition {
        turn(c, condition);
    }
}

fn always(schema: &Schema, ast: &mut Ast) {
    let table = schema.table(&ast.table).unwrap();
    let column = &table.columns[table.primary_key[0]];
    let holds = Condition::Simple(Simple {
        op: Op::IsNot,
        left: Operand::Column { name: column.name.to_string() },
        right: Operand::Literal { value: Literal::Null },
    });
    let conditions = ast.condition.take().into_iter().chain([holds]).collect();
    ast.condition = Some(Condition::And { conditions });
}

/// Missing columns of a cursor are null, and nulls come first in an ascending order.
fn before_all(ast: &mut Ast) {
    let ascending = ast.order_by.iter().flatten().all(|(_, d)| *d == Direction::Asc);
    if ast.start.is_none() && ascending {
        ast.start = Some(Start { row: serde_json::Map::new(), exclusive: true });
    }
}

fn rows(engine: &Engine, id: InstanceId) -> Vec<(RowId, u64)> {
    let mut all: Vec<(RowId, u64)> =
        engine.rows(id).unwrap().map(|h| (RowId::of(h.table, h.row), h.count)).collect();
    all.sort();
    all
}

/// A world whose numbers are whole: `-0` may not be told from `0`, but is sent as it was read.
fn history(seed: u64) -> usize {
    let mut c = Choices::new(seed);
    let shape = Shape { json: false, ..Shape::default() };
    let schema = Arc::new(gen_world::schema(&mut c, &shape));
    let mut at = StateVersion::from_lsn(1);
    let db = gen_world::database(&mut c, &schema, &shape, &at);
    let mut engine = Engine::new(EngineConfig::default(), at.clone(), schema.clone());
    let mut source = MemorySource::new(db, at.clone());
    let base = gen_world::ast(&mut c, &schema, &shape);
    let mut variants = vec![("as it is", base.clone())];
    for (what, rewrite) in REWRITES {
        let mut ast = base.clone();
        rewrite(&mut c, &schema, &mut ast);
        variants.push((what, ast));
    }
    let mut ids = Vec::new();
    for (what, ast) in &variants {
        let (plan, params) = compile(ast, &schema, &IdentityKeys::default())
            .unwrap_or_else(|e| panic!("seed {seed}, {what}: {e}"));
        let id = engine.subscribe(&Arc::new(plan), params.into()).unwrap();
        let mut budget = Budget::unlimited();
        let done = engine.hydrate_step(id, &mut source, &mut budget).unwrap();
        assert_eq!(done, Progress::Done);
        ids.push(id);
    }
    let mut seen = 0;
    for n in 2..8 {
        let want = rows(&engine, ids[0]);
        seen += want.len();
        for (id, (what, ast)) in ids.iter().zip(&variants) {
            let text = || serde_json::to_string(ast).unwrap();
            assert_eq!(rows(&engine, *id), want, "seed {seed}, version {n}, {what}: {}", text());
        }
        let next = StateVersion::from_lsn(n);
        let mut db = source.db.clone();
        let commit = gen_world::commit(&mut c, &schema, &shape, &mut db, &at, &next);
        at = next;
        source.advance(&commit);
        engine.begin_advance(&[Arc::new(commit)]).unwrap();
        let mut budget = Budget::unlimited();
        let advanced = engine.advance_step(&mut source, &mut budget).unwrap().unwrap();
        assert!(advanced.failed.is_empty(), "seed {seed}: {:?}", advanced.failed);
    }
    seen
}

#[test]
fn rewritten_queries_sync_the_same_rows() {
    let env = |name| std::env::var(name).ok().and_then(|v| v.parse().ok());
    let first = env("ZERORING_SEED").unwrap_or(0);
    let count = env("ZERORING_REWRITES").unwrap_or(1_500);
    let mut nonempty = 0;
    for seed in first..first + count {
        nonempty += u64::from(history(seed) > 0);
    }
    println!("rewrites: histories {first}..{}, {nonempty} with rows agree", first + count);
    assert!(nonempty * 4 > count, "{nonempty} of {count} histories had rows");
}

/// All assignments of hints to a query with three EXISTS, one of them scalar by a unique key.
#[test]
fn every_assignment_of_hints_is_the_same_plan() {
    let schema = {
        let mut c = Choices::new(0);
        gen_world::schema(&mut c, &Shape { tables: 1, ..Shape::default() })
    };
    let (name, table) = schema.tables.iter().next().unwrap();
    assert_eq!(table.columns[2].value_type, ValueType::Number);
    let exists = |op: &str, body: serde_json::Value| {
        serde_json::json!({"type": "correlatedSubquery", "op": op, "related": {
            "correlation": {"parentField": ["a"], "childField": ["b"]}, "subquery": body}})
    };
    let q = |condition: serde_json::Value| serde_json::json!({"table": &**name, "alias": "x", "where": condition});
    let unique = serde_json::json!({"type": "simple", "op": "=",
        "left": {"type": "column", "name": "u"}, "right": {"type": "literal", "value": 3}});
    let nested = exists("EXISTS", q(exists("NOT EXISTS", q(unique.clone()))));
    let all =
        serde_json::json!({"type": "or", "conditions": [nested, exists("EXISTS", q(unique))]});
    let base: Ast = serde_json::from_value(q(all)).unwrap();
    let choices = [None, Some(false), Some(true)];
    let plan = compile(&base, &schema, &IdentityKeys::default()).unwrap();
    for n in 0..3usize.pow(6) {
        let mut ast = base.clone();
        let mut digits = n;
        let mut next = || {
            let digit = choices[digits % 3];
            digits /= 3;
            digit
        };
        each_exists(&mut ast, &mut |e| (e.flip, e.scalar) = (next(), next()));
        assert_eq!(compile(&ast, &schema, &IdentityKeys::default()).unwrap(), plan, "{n}");
    }
}

#[test]
fn a_rewrite_that_changes_the_meaning_is_noticed() {
    // The check itself must be able to fail: without the filter, more rows are synced.
    let told_apart = (0..200).filter(|&seed| {
        let mut c = Choices::new(seed);
        let shape = Shape { json: false, ..Shape::default() };
        let schema = Arc::new(gen_world::schema(&mut c, &shape));
        let at = StateVersion::from_lsn(1);
        let db = gen_world::database(&mut c, &schema, &shape, &at);
        let base = gen_world::ast(&mut c, &schema, &shape);
        let other = Ast { condition: None, ..base.clone() };
        let sync = |ast: &Ast| -> Multiset {
            let (plan, params) = compile(ast, &schema, &IdentityKeys::default()).unwrap();
            crate::ivm::brute::sync(&plan, &params, &db)
        };
        let (a, b) = (sync(&base), sync(&other));
        a.len() != b.len() || a.iter().zip(&b).any(|(a, b)| a.0 != b.0 || a.1.0 != b.1.0)
    });
    assert!(told_apart.count() > 50);
}
