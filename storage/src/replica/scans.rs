//! Statements that read many rows of a table for want of an index.
//!
//! SQLite counts what a statement steps over in a full scan, and what it puts into an index made
//! for one run. A statement that did little of both costs nothing here but reading two numbers; of
//! one that did much, the plan is read once, and the index that would have served it is named.

use std::fmt;
use std::sync::Arc;

use hashbrown::HashSet;
use rusqlite::{Connection, StatementStatus};
use zeroring_core::ivm::plan::{Condition, NodeId, Op, Role};
use zeroring_core::ivm::source::Fetch;
use zeroring_core::schema::TableSpec;

use super::sql;

/// Rows stepped over by one statement from which on a missing index is worth a report: below, a
/// scan costs about what a hydration may cost anyway (some milliseconds).
pub const LARGE_SCAN_ROWS: u64 = 10_000;
/// The same, of a statement that was interrupted because it took too much work.
pub const INTERRUPTED_SCAN_ROWS: u64 = 1_000;
/// Statements that are remembered as reported; beyond, all are forgotten and may be reported again.
const MAX_REPORTED: usize = 4_096;
/// Reports that wait to be taken; more are counted only.
const MAX_WAITING: usize = 32;

/// An index that would have spared a statement a scan.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MissingIndex {
    /// The table, as the replica names it.
    pub table: Arc<str>,
    /// The columns of the index, the most useful first.
    pub columns: Vec<Arc<str>>,
    /// Rows that one statement stepped over.
    pub rows: u64,
    /// EXPLAIN QUERY PLAN, one line per step.
    pub plan: String,
}

impl fmt::Display for MissingIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let columns: Vec<String> = self.columns.iter().map(|c| format!("\"{c}\"")).collect();
        write!(
            f,
            "a statement read {} rows for want of an index on \"{}\" ({}). Create it upstream.",
            self.rows,
            self.table,
            columns.join(", ")
        )
    }
}

/// Counters for `/statz`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ScanCounters {
    /// Runs of statements that stepped over [`LARGE_SCAN_ROWS`] or more rows without an index.
    pub large_scans: u64,
    /// Reports of missing indexes.
    pub missing_indexes: u64,
}

/// What was scanned by the statements of one reader.
#[derive(Debug, Default)]
pub(super) struct ScanWatch {
    reported: HashSet<Box<str>>,
    waiting: Vec<MissingIndex>,
    pub(super) counters: ScanCounters,
}

impl ScanWatch {
    /// Looks at a statement that was run; one that was interrupted would have scanned more.
    pub(super) fn ran(
        &mut self,
        connection: &Connection,
        statement: &rusqlite::Statement<'_>,
        text: &str,
        fetch: &Fetch<'_>,
        ended: bool,
    ) {
        let count = |status| u64::try_from(statement.reset_status(status)).unwrap_or(0);
        let rows = count(StatementStatus::FullscanStep) + count(StatementStatus::AutoIndex);
        if rows < if ended { LARGE_SCAN_ROWS } else { INTERRUPTED_SCAN_ROWS } {
            return;
        }
        self.counters.large_scans += 1;
        if self.reported.contains(text) {
            return;
        }
        if self.reported.len() >= MAX_REPORTED {
            self.reported.clear();
        }
        self.reported.insert(text.into());
        // A plan that cannot be read is none of the query's concern.
        let Ok(plan) = explain(connection, text) else { return };
        let Some((table, columns)) = missing(&plan, fetch) else { return };
        self.counters.missing_indexes += 1;
        if self.waiting.len() < MAX_WAITING {
            let plan = plan.join("\n");
            self.waiting.push(MissingIndex { table, columns, rows, plan });
        }
    }

    pub(super) fn take(&mut self) -> Vec<MissingIndex> {
        std::mem::take(&mut self.waiting)
    }
}

fn explain(connection: &Connection, text: &str) -> rusqlite::Result<Vec<String>> {
    let mut explain = connection.prepare(&format!("EXPLAIN QUERY PLAN {text}"))?;
    let lines = explain.raw_query();
    lines.mapped(|row| row.get(3)).collect()
}

/// The first scanned table for which an index would help.
fn missing(plan: &[String], fetch: &Fetch<'_>) -> Option<(Arc<str>, Vec<Arc<str>>)> {
    let bodies = sql::bodies(fetch.plan, fetch.node, fetch.filter);
    plan.iter().find_map(|line| {
        let mut words = line.split(' ');
        let scanned = words.next() == Some("SCAN") || line.contains("AUTOMATIC");
        let alias: usize = words.next()?.strip_prefix('t')?.parse().ok().filter(|_| scanned)?;
        let id = match alias.checked_sub(1) {
            None => fetch.node,
            Some(body) => *bodies.get(body)?,
        };
        let columns = wanted(fetch, id, alias == 0);
        let table = &fetch.plan.node(id).table;
        if columns.is_empty() || is_indexed(table, &columns) {
            return None;
        }
        let names = columns.iter().map(|&c| table.columns[c].name.clone()).collect();
        Some((table.name.clone(), names))
    })
}

/// Columns by which a node's rows could be found: join columns and equalities, else a range, else
/// the order of a limited read.
fn wanted(fetch: &Fetch<'_>, id: NodeId, outermost: bool) -> Vec<usize> {
    let node = fetch.plan.node(id);
    let mut columns = Vec::new();
    let mut ranges = Vec::new();
    match &fetch.keys {
        Some(keys) if outermost => columns.extend_from_slice(keys.columns),
        _ if outermost => {}
        _ => {
            if let Role::Exists { parent, .. } = node.role {
                columns.extend(join_columns(&fetch.plan.node(parent).condition, id));
            }
        }
    }
    conjuncts(&node.condition, &mut columns, &mut ranges);
    if columns.is_empty() {
        columns.extend(ranges.first());
    }
    if columns.is_empty() && outermost && fetch.limit.is_some() {
        columns.extend(node.order.iter().map(|o| o.0));
    }
    let mut seen = Vec::new();
    columns.retain(|c| {
        let fresh = !seen.contains(c);
        seen.push(*c);
        fresh
    });
    columns
}

fn join_columns(condition: &Condition, body: NodeId) -> Vec<usize> {
    match condition {
        Condition::And(all) | Condition::Or(all) => {
            all.iter().flat_map(|c| join_columns(c, body)).collect()
        }
        Condition::Exists(e) if e.child == body => e.child_columns.clone(),
        Condition::Exists(_) | Condition::Simple(_) | Condition::Const(_) => Vec::new(),
    }
}

fn conjuncts(condition: &Condition, equal: &mut Vec<usize>, ranges: &mut Vec<usize>) {
    match condition {
        Condition::And(all) => all.iter().for_each(|c| conjuncts(c, equal, ranges)),
        Condition::Simple(s) => match s.op {
            Op::Eq | Op::Is | Op::IsNull | Op::In => equal.push(s.column),
            Op::Lt | Op::Le | Op::Gt | Op::Ge => ranges.push(s.column),
            Op::Ne | Op::IsNot | Op::IsNotNull | Op::NotIn | Op::Like | Op::NotLike => {}
        },
        Condition::Or(_) | Condition::Exists(_) | Condition::Const(_) => {}
    }
}

/// Whether an index begins with exactly these columns, in any order: then it is not for want of
/// one that the table was scanned.
fn is_indexed(table: &TableSpec, columns: &[usize]) -> bool {
    let unique = table.unique_keys.iter().map(|k| &k.columns);
    table.indexes.iter().chain(unique).any(|index| {
        index.get(..columns.len()).is_some_and(|head| columns.iter().all(|c| head.contains(c)))
    })
}
