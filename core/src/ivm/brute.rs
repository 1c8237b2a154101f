//! `Sync(Q, D)` by its definition (spec: zql-ivm §6.2), over plain vectors: the oracle of the
//! engine and of every source. No index, no cleverness.
//!
//! Evidence of an EXISTS leaf is the (at most) [`EVIDENCE`] smallest qualifying rows of its body
//! by identity key, per join key, whether or not the leaf decided; a NOT EXISTS leaf and anything
//! at or below a permissions edge contribute none.

use std::collections::BTreeMap;

use super::memory_source::Database;
use super::plan::{Condition, ExistsEdge, NodeId, Params, Plan};
use crate::row::{Key, Row, RowId, RowRef};
use crate::zql::{order, predicate};

/// Rows of evidence per join key.
pub const EVIDENCE: usize = 3;

/// The rows that a query syncs: how often each is counted, and its contents.
pub type Multiset = BTreeMap<RowId, (u64, RowRef)>;

/// Everything that a query syncs from a database.
pub fn sync(plan: &Plan, params: &Params, db: &Database) -> Multiset {
    let mut out = Multiset::new();
    for row in rows(plan, Plan::ROOT, params, db, None) {
        add_node(plan, Plan::ROOT, params, db, &row, &mut out);
    }
    out
}

/// The rows of a node for one join key (`None`: all of the table), in order, limit applied.
pub fn rows(
    plan: &Plan,
    node: NodeId,
    params: &Params,
    db: &Database,
    key: Option<(&[usize], &Key)>,
) -> Vec<RowRef> {
    let n = plan.node(node);
    let mut found: Vec<RowRef> = db
        .rows(n.table.id)
        .filter(|r| key.is_none_or(|(columns, k)| joins(r, columns, k)))
        .filter(|r| qualifies(plan, node, params, db, r))
        .cloned()
        .collect();
    found.sort_by(|a, b| order::compare_rows(&n.order, a, b));
    if let Some(limit) = n.limit {
        found.truncate(usize::try_from(limit).unwrap_or(usize::MAX));
    }
    found
}

/// Whether a row satisfies the whole `where` and the start cursor of a node.
pub fn qualifies(plan: &Plan, node: NodeId, params: &Params, db: &Database, row: &Row) -> bool {
    let n = plan.node(node);
    order::in_start(n, row, params)
        && predicate::evaluate(&n.condition, row, params, &mut |e| {
            body(plan, e, params, db, row).is_empty() == e.negated
        })
}

/// The qualifying rows of a leaf's body for a parent row, in identity-key order.
fn body(plan: &Plan, e: &ExistsEdge, params: &Params, db: &Database, row: &Row) -> Vec<RowRef> {
    rows(plan, e.child, params, db, Some((&e.child_columns, &row.project(&e.parent_columns))))
}

fn joins(row: &Row, columns: &[usize], key: &Key) -> bool {
    columns.iter().zip(key).all(|(&c, v)| !v.is_null() && row.values[c] == *v)
}

fn add_node(
    plan: &Plan,
    node: NodeId,
    params: &Params,
    db: &Database,
    row: &RowRef,
    out: &mut Multiset,
) {
    let n = plan.node(node);
    if n.silent {
        return;
    }
    out.entry(RowId::of(&n.table, row)).or_insert_with(|| (0, row.clone())).0 += 1;
    for_each_leaf(&n.condition, &mut |e| {
        if !e.negated && !e.permissions {
            for child in body(plan, e, params, db, row).iter().take(EVIDENCE) {
                add_node(plan, e.child, params, db, child, out);
            }
        }
    });
    for edge in &n.related {
        let key = row.project(&edge.parent_columns);
        for child in rows(plan, edge.child, params, db, Some((&edge.child_columns, &key))) {
            add_node(plan, edge.child, params, db, &child, out);
        }
    }
}

/// Every EXISTS and NOT EXISTS leaf of a condition, in order.
pub fn for_each_leaf<'a>(condition: &'a Condition, visit: &mut dyn FnMut(&'a ExistsEdge)) {
    match condition {
        Condition::Const(_) | Condition::Simple(_) => {}
        Condition::And(all) | Condition::Or(all) => {
            all.iter().for_each(|c| for_each_leaf(c, visit));
        }
        Condition::Exists(e) => visit(e),
    }
}
