//! Statements that read or sort many rows of a table for want of an index.
//!
//! SQLite counts what a statement steps over in a full scan, what it puts into an index made
//! for one run, and how often it sorts. A statement that did little of that costs nothing here but
//! reading three numbers; of one that did much, the plan is read once, and the index that would
//! have served it is named.
//!
//! A statement with a limit that sorts finds its rows by an index, but all of them, to return a
//! few: the first comments of an issue, the newest issues of a project. It does little each time;
//! its instructions are summed up over all runs.

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
/// Instructions of SQLite's machine (of the order of 10 ns) that the runs of a sorting statement may
/// take together before a missing index is worth a report.
pub const LARGE_SORT_INSTRUCTIONS: i32 = 1_000_000;
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
    /// What was done for want of it.
    pub effort: Effort,
    /// EXPLAIN QUERY PLAN, one line per step.
    pub plan: String,
}

/// Work that an index spares.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effort {
    /// One statement stepped over so many rows.
    Read(u64),
    /// So many runs of a statement sorted rows to return the first ones.
    Sorted(u64),
}

impl fmt::Display for Effort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Effort::Read(rows) => write!(f, "a statement read {rows} rows"),
            Effort::Sorted(1) => write!(f, "a statement sorted many rows to return a few"),
            Effort::Sorted(runs) => {
                write!(f, "a statement sorted rows {runs} times to return a few")
            }
        }
    }
}

impl fmt::Display for MissingIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let columns: Vec<String> = self.columns.iter().map(|c| format!("\"{c}\"")).collect();
        write!(
            f,
            "{} for want of an index on \"{}\" ({}). Create it upstream.",
            self.effort,
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
        let is_large = rows >= if ended { LARGE_SCAN_ROWS } else { INTERRUPTED_SCAN_ROWS };
        let sorts = fetch.limit.is_some()
            && if ended {
                statement.get_status(StatementStatus::Sort) > 0
                    && statement.get_status(StatementStatus::VmStep) >= LARGE_SORT_INSTRUCTIONS
            } else {
                // It was interrupted before it came to that: the plan tells.
                true
            };
        if !is_large && !sorts {
            return;
        }
        // The next report of this statement is as far away.
        statement.reset_status(StatementStatus::VmStep);
        let runs = count(StatementStatus::Sort).max(1);
        self.counters.large_scans += u64::from(is_large);
        if self.reported.contains(text) {
            return;
        }
        if self.reported.len() >= MAX_REPORTED {
            self.reported.clear();
        }
        self.reported.insert(text.into());
        // A plan that cannot be read is none of the query's concern.
        let Ok(plan) = explain(connection, text) else { return };
        let scanned = missing(&plan, fetch).filter(|_| is_large);
        let scanned = scanned.map(|(table, columns)| (table, columns, Effort::Read(rows)));
        let sorted = || {
            let (table, columns) = missing_order(&plan, fetch).filter(|_| sorts)?;
            Some((table, columns, Effort::Sorted(runs)))
        };
        let Some((table, columns, effort)) = scanned.or_else(sorted) else { return };
        self.counters.missing_indexes += 1;
        if self.waiting.len() < MAX_WAITING {
            let plan = plan.join("\n");
            self.waiting.push(MissingIndex { table, columns, effort, plan });
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
        if columns.is_empty() || is_indexed(table, &columns, &[]) {
            return None;
        }
        // A limited read that finds its rows by equality stops early if they are in order, too.
        let ordered = if alias == 0 && fetch.limit.is_some() && found_by_equality(fetch) {
            order_columns(fetch)
        } else {
            Vec::new()
        };
        Some(named(table, &columns, &ordered))
    })
}

fn named(table: &TableSpec, found: &[usize], ordered: &[usize]) -> (Arc<str>, Vec<Arc<str>>) {
    let ordered = ordered.iter().filter(|c| !found.contains(c));
    let names = found.iter().chain(ordered).map(|&c| table.columns[c].name.clone());
    (table.name.clone(), names.collect())
}

/// The index by which a limited read would find its rows in order: its equalities, then its order.
fn missing_order(plan: &[String], fetch: &Fetch<'_>) -> Option<(Arc<str>, Vec<Arc<str>>)> {
    // Not the last terms only: then equal values are sorted, which is little.
    if fetch.limit.is_none() || !plan.iter().any(|l| l == "USE TEMP B-TREE FOR ORDER BY") {
        return None;
    }
    let (found, ordered) = (equalities(fetch), order_columns(fetch));
    let table = &fetch.plan.node(fetch.node).table;
    (!is_indexed(table, &found, &ordered)).then(|| named(table, &found, &ordered))
}

/// Columns of the outermost table that have one value: join columns and equalities.
fn equalities(fetch: &Fetch<'_>) -> Vec<usize> {
    let mut columns = fetch.keys.map_or(Vec::new(), |k| k.columns.to_vec());
    conjuncts(&fetch.plan.node(fetch.node).condition, &mut columns, &mut Vec::new());
    distinct(&mut columns);
    columns
}

fn found_by_equality(fetch: &Fetch<'_>) -> bool {
    !equalities(fetch).is_empty()
}

/// The order of a read, as far as an index can have it (one direction) and somebody asked for it
/// (the identity key at its end only makes it total).
fn order_columns(fetch: &Fetch<'_>) -> Vec<usize> {
    let node = fetch.plan.node(fetch.node);
    let is_key = |c: &usize| node.table.primary_key.contains(c);
    let asked = node.order.iter().rposition(|(c, _)| !is_key(c)).map_or(1, |last| last + 1);
    let Some(&(_, direction)) = node.order.first() else { return Vec::new() };
    let same = node.order.iter().take(asked).take_while(|(_, d)| *d == direction);
    same.map(|&(c, _)| c).collect()
}

fn distinct(columns: &mut Vec<usize>) {
    let mut seen = Vec::new();
    columns.retain(|c| {
        let fresh = !seen.contains(c);
        seen.push(*c);
        fresh
    });
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
    distinct(&mut columns);
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

/// Whether an index begins with exactly these columns, the found ones in any order, then those of
/// the order (as far as they are not among the found ones): then it is not for want of one.
fn is_indexed(table: &TableSpec, found: &[usize], ordered: &[usize]) -> bool {
    let unique = table.unique_keys.iter().map(|k| &k.columns);
    let ordered: Vec<usize> = ordered.iter().copied().filter(|c| !found.contains(c)).collect();
    table.indexes.iter().chain(unique).any(|index| {
        let head = index.get(..found.len());
        let rest = index.get(found.len()..).unwrap_or_default();
        head.is_some_and(|head| found.iter().all(|c| head.contains(c)))
            && rest.starts_with(&ordered)
    })
}
