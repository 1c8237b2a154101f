//! Every query shape within bounds, and every change of one row through each of them.
//!
//! A *skeleton* is a tree of query nodes: up to two EXISTS / NOT EXISTS leaves per node (in an AND
//! or an OR) and up to two related edges per node that is not an EXISTS body, to a depth, with at
//! most a number of edges. A *case* is a skeleton with one choice on each axis: which tables its
//! nodes read, which columns join them, and one node (each in turn) with each filter, order,
//! limit and cursor. All of them are enumerated; a run of a part takes every n-th case. The hints
//! `flip` and `scalar` must not make another plan of any of them, hence no other behaviour.

use std::sync::Arc;

use serde_json::{Value as Json, json};

use super::script::{Edit, Operation, Script};
use crate::ivm::engine::{EngineConfig, Overshoot};
use crate::schema::{ColumnSpec, Schema, TableId, TableSpec, UniqueKey, ValueType};
use crate::value::Value;
use crate::version::StateVersion;
use crate::zql::ast::{Ast, Condition};
use crate::zql::compile::{IdentityKeys, compile};

/// How large the enumeration is.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// Deepest nesting.
    pub depth: usize,
    /// Most edges of a skeleton.
    pub edges: usize,
}

/// A query node with its subtree.
#[derive(Debug, Clone)]
struct Tree {
    /// The leaves are in an OR.
    any: bool,
    /// Per leaf: NOT EXISTS, body.
    leaves: Vec<(bool, Tree)>,
    related: Vec<Tree>,
    edges: usize,
}

const LEAF: Tree = Tree { any: false, leaves: Vec::new(), related: Vec::new(), edges: 0 };

/// All trees within bounds; those with related edges only where rows are delivered.
fn trees(bounds: Bounds, rows: bool) -> Vec<Tree> {
    let mut out = vec![LEAF];
    if bounds.depth == 0 || bounds.edges == 0 {
        return out;
    }
    let below = Bounds { depth: bounds.depth - 1, edges: bounds.edges - 1 };
    let bodies = trees(below, false);
    let leaves: Vec<(bool, Tree)> = [false, true]
        .into_iter()
        .flat_map(|n| bodies.iter().map(move |b| (n, b.clone())))
        .collect();
    let related = if rows { trees(below, true) } else { Vec::new() };
    let fits = |edges: usize| edges <= bounds.edges;
    // Sets of up to two, without regard to order.
    let leaf_sets = sets(&leaves, &|l| l.1.edges + 1);
    let related_sets = sets(&related, &|r| r.edges + 1);
    for (leaves, a) in &leaf_sets {
        for (related, b) in &related_sets {
            if a + b == 0 || !fits(a + b) {
                continue;
            }
            for any in [false, true] {
                if any && leaves.len() < 2 {
                    continue;
                }
                out.push(Tree {
                    any,
                    leaves: leaves.clone(),
                    related: related.clone(),
                    edges: a + b,
                });
            }
        }
    }
    out
}

/// All sets of up to two items, with their number of edges.
fn sets<T: Clone>(items: &[T], edges: &dyn Fn(&T) -> usize) -> Vec<(Vec<T>, usize)> {
    let mut out = vec![(Vec::new(), 0)];
    for (i, a) in items.iter().enumerate() {
        out.push((vec![a.clone()], edges(a)));
        for b in &items[i..] {
            out.push((vec![a.clone(), b.clone()], edges(a) + edges(b)));
        }
    }
    out
}

/// The axes of one node: filter, order, limit, cursor.
#[derive(Debug, Clone, Copy, Default)]
struct Twist {
    filter: usize,
    order: usize,
    limit: usize,
    start: usize,
}

/// A query of the enumeration.
#[derive(Debug, Clone)]
pub struct Case {
    tree: Arc<Tree>,
    /// All nodes read one table.
    one_table: bool,
    /// Which columns join: 0 the parent's id, 1 the child's id, 2 neither.
    join: usize,
    /// The node, counted from the root, that is twisted.
    focus: usize,
    twist: Twist,
}

/// Calls `visit` with every case within bounds, in a fixed order; returns how many there are.
pub fn for_each_case(bounds: Bounds, visit: &mut dyn FnMut(u64, &Case)) -> u64 {
    let mut number = 0;
    for tree in trees(bounds, true) {
        let mut windows = Vec::new();
        list_nodes(&tree, true, &mut windows);
        let tree = Arc::new(tree);
        let (tables, joins): (&[bool], _) =
            if tree.edges == 0 { (&[false], 1) } else { (&[false, true], 3) };
        for &one_table in tables {
            for join in 0..joins {
                for (focus, &rows) in windows.iter().enumerate() {
                    for_each_twist(rows, &mut |twist| {
                        let tree = Arc::clone(&tree);
                        visit(number, &Case { tree, one_table, join, focus, twist });
                        number += 1;
                    });
                }
            }
        }
    }
    number
}

fn for_each_twist(rows: bool, visit: &mut dyn FnMut(Twist)) {
    // Order and limit of an EXISTS body mean nothing, except a limit of 0.
    let (orders, limits) = if rows { (3, 4) } else { (1, 2) };
    for filter in 0..3 {
        for order in 0..orders {
            for limit in 0..limits {
                for start in 0..3 {
                    visit(Twist { filter, order, limit, start });
                }
            }
        }
    }
}

/// Whether each node delivers rows, in the order in which [`Writer`] writes them.
fn list_nodes(tree: &Tree, rows: bool, out: &mut Vec<bool>) {
    out.push(rows);
    tree.leaves.iter().for_each(|(_, t)| list_nodes(t, false, out));
    tree.related.iter().for_each(|t| list_nodes(t, rows, out));
}

struct Writer<'a> {
    case: &'a Case,
    next: usize,
}

impl Writer<'_> {
    fn query(&mut self, tree: &Tree, depth: usize, alias: &str) -> Json {
        let twist = if self.next == self.case.focus { self.case.twist } else { Twist::default() };
        self.next += 1;
        let table = ["a", "b", "c"][if self.case.one_table { 0 } else { depth % 3 }];
        let mut query = json!({"table": table, "alias": alias});
        let leaves: Vec<Json> = tree
            .leaves
            .iter()
            .map(|(not, body)| {
                let op = if *not { "NOT EXISTS" } else { "EXISTS" };
                let related = self.edge(body, depth, "zsubq");
                json!({"type": "correlatedSubquery", "op": op, "related": related})
            })
            .collect();
        let mut condition = match leaves.len() {
            0 => None,
            1 => leaves.into_iter().next(),
            _ if tree.any => Some(json!({"type": "or", "conditions": leaves})),
            _ => Some(json!({"type": "and", "conditions": leaves})),
        };
        let simple = |op: &str| {
            json!({"type": "simple", "op": op, "left": {"type": "column", "name": "n"},
                "right": {"type": "literal", "value": 1}})
        };
        condition = match (twist.filter, condition) {
            (0, c) => c,
            (1, None) => Some(simple("=")),
            (1, Some(c)) => Some(json!({"type": "and", "conditions": [simple("="), c]})),
            (_, None) => Some(simple(">")),
            (_, Some(c)) => Some(json!({"type": "or", "conditions": [simple(">"), c]})),
        };
        if let Some(condition) = condition {
            query["where"] = condition;
        }
        match twist.order {
            0 => {}
            1 => query["orderBy"] = json!([["n", "asc"]]),
            _ => query["orderBy"] = json!([["n", "desc"]]),
        }
        match twist.limit {
            0 => {}
            1 => query["limit"] = json!(0),
            n => query["limit"] = json!(n - 1),
        }
        match twist.start {
            0 => {}
            n => query["start"] = json!({"row": {"n": 1, "id": 1}, "exclusive": n == 1}),
        }
        let related: Vec<Json> = tree
            .related
            .iter()
            .enumerate()
            .map(|(i, child)| self.edge(child, depth, ["r0", "r1"][i]))
            .collect();
        if !related.is_empty() {
            query["related"] = json!(related);
        }
        query
    }

    fn edge(&mut self, tree: &Tree, depth: usize, alias: &str) -> Json {
        let (parent, child) = [("id", "k"), ("k", "id"), ("k", "k")][self.case.join];
        json!({"correlation": {"parentField": [parent], "childField": [child]},
            "subquery": self.query(tree, depth + 1, alias)})
    }
}

const ROWS: usize = 4;
const ID: usize = 0;
const K: usize = 1;
const N: usize = 2;

fn value(n: Option<u8>) -> Value {
    n.map_or(Value::Null, |n| Value::Number(f64::from(n)))
}

/// The rows of each table; the join column hits some ids, twice, none, and is null.
fn rows() -> Vec<(TableId, Box<[Value]>)> {
    let k = [
        [Some(0), Some(1), Some(1), None],
        [Some(1), Some(1), Some(2), Some(9)],
        [Some(2), Some(1), None, Some(1)],
    ];
    let n = [
        [Some(1), Some(2), None, Some(1)],
        [Some(2), Some(1), Some(1), None],
        [None, Some(1), Some(2), Some(0)],
    ];
    let row = |t: usize, i: usize| {
        let values = [value(Some(i as u8)), value(k[t][i]), value(n[t][i])];
        (TableId(t as u32), Box::from(values))
    };
    (0..3).flat_map(|t| (0..ROWS).map(move |i| row(t, i))).collect()
}

/// Tables `a`, `b`, `c` with a key, a join column and a column to filter and order by.
fn schema() -> Arc<Schema> {
    let mut schema = Schema::default();
    for (number, name) in ["a", "b", "c"].into_iter().enumerate() {
        let column = |name: &str| ColumnSpec {
            name: name.into(),
            value_type: ValueType::Number,
            nullable: name != "id",
            upstream_type: "int4".into(),
        };
        let table = TableSpec {
            id: TableId(number as u32),
            name: name.into(),
            columns: ["id", "k", "n"].map(column).into(),
            primary_key: vec![ID],
            replica_key: vec![ID],
            unique_keys: vec![UniqueKey { columns: vec![ID], not_null: true }],
            min_row_version: StateVersion::zero(),
            indexes: vec![vec![ID], vec![K]],
        };
        schema.tables.insert(name.into(), Arc::new(table));
    }
    Arc::new(schema)
}

/// Every change of one row of the tables that a query reads, each taken back before the next:
/// remove, insert, another key, every other join value, every other filter value.
fn pushes(tables: &[TableId]) -> Vec<Operation> {
    let mut out = Vec::new();
    let mut push = |there: Vec<Edit>, back: Vec<Edit>| {
        for edits in [there, back] {
            out.extend([Operation::Commit(edits), Operation::Advance, Operation::Step(None)]);
        }
    };
    let key = |i: u8| [value(Some(i))].into_iter().collect();
    for (table, row) in rows().into_iter().filter(|(t, _)| tables.contains(t)) {
        let with = |column: usize, v: Value| {
            let mut row = row.clone();
            row[column] = v;
            Edit::Put(table, row)
        };
        let back = || Edit::Put(table, row.clone());
        let remove = || Edit::Remove(table, [row[ID].clone()].into_iter().collect());
        push(vec![remove()], vec![back()]);
        let moved = with(ID, value(Some(ROWS as u8)));
        push(vec![remove(), moved], vec![Edit::Remove(table, key(ROWS as u8)), back()]);
        for (column, all) in [(K, [Some(0), Some(1), None]), (N, [Some(0), Some(2), None])] {
            for v in all.map(value).into_iter().filter(|v| *v != row[column]) {
                push(vec![with(column, v)], vec![back()]);
            }
        }
    }
    for &table in tables {
        for k in [Some(0), Some(1), None] {
            let row = [value(Some(ROWS as u8)), value(k), value(Some(1))];
            let there = vec![Edit::Put(table, Box::from(row))];
            push(there, vec![Edit::Remove(table, key(ROWS as u8))]);
        }
    }
    out
}

/// Gives every EXISTS of a query, and of what is below it, the hints `flip` and `scalar`.
fn hint(ast: &mut Ast, hints: (Option<bool>, Option<bool>)) {
    fn conditions(condition: &mut Condition, hints: (Option<bool>, Option<bool>)) {
        match condition {
            Condition::And { conditions: all } | Condition::Or { conditions: all } => {
                all.iter_mut().for_each(|c| conditions(c, hints));
            }
            Condition::CorrelatedSubquery(e) => {
                (e.flip, e.scalar) = hints;
                hint(&mut e.related.subquery, hints);
            }
            Condition::Simple(_) => {}
        }
    }
    ast.condition.iter_mut().for_each(|c| conditions(c, hints));
    ast.related.iter_mut().flatten().for_each(|r| hint(&mut r.subquery, hints));
}

impl Case {
    /// The query.
    pub fn query(&self) -> Json {
        Writer { case: self, next: 0 }.query(&self.tree, 0, "root")
    }

    /// The query hydrated, and all pushes.
    ///
    /// # Errors
    /// The query does not compile.
    pub fn script(&self, number: u64) -> Result<Script, String> {
        let schema = schema();
        let ast: Ast = serde_json::from_value(self.query()).map_err(|e| e.to_string())?;
        let compiled = compile(&ast, &schema, &IdentityKeys::default());
        let (plan, params) = compiled.map_err(|e| e.to_string())?;
        for hints in [(Some(true), None), (Some(false), Some(true)), (Some(true), Some(true))] {
            let mut hinted = ast.clone();
            hint(&mut hinted, hints);
            let compiled = compile(&hinted, &schema, &IdentityKeys::default());
            let (same, values) = compiled.map_err(|e| e.to_string())?;
            if same != plan || values != params {
                return Err(format!("flip and scalar {hints:?} make another plan"));
            }
        }
        let mut tables: Vec<TableId> = plan.nodes.iter().map(|n| n.table.id).collect();
        tables.sort();
        tables.dedup();
        let mut operations = vec![Operation::Subscribe(0), Operation::Hydrate(0, None)];
        operations.extend(pushes(&tables));
        let config = EngineConfig {
            overshoot: Overshoot::Fixed(number % 3),
            lead_above: (number % 2) as usize,
            ..EngineConfig::default()
        };
        let queries = vec![(Arc::new(plan), params.into())];
        Ok(Script { config, schema, rows: rows(), queries, operations })
    }
}
