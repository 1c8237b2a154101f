//! Which side of an EXISTS to begin with, by SQLite's own statistics.
//!
//! SQLite always looks at the parent rows first and asks for each whether a child exists. Where
//! few child rows qualify and an index leads from them to their parents, the other way round is
//! cheaper by orders of magnitude: `issue where exists (label where name = 'bug')`. Only the text
//! differs (`column IN (SELECT …)`), never the answer.
//!
//! `ANALYZE` runs when a replica is made, and again for a table that has changed much
//! ([`super::analyze`]). A table that was empty then has no statistics: defaults stand in, under
//! which a child is begun with only if an equality finds it by an index.

use hashbrown::HashMap;
use rusqlite::Connection;
use zeroring_core::ivm::plan::{Condition, ExistsEdge, Node, Op, Param, Params, Plan};
use zeroring_core::schema::{TableSpec, ValueType};

use super::column::text_is_kept;
use super::mutant::{self, Mutant};

/// Rows of a table without statistics (as SQLite assumes).
const DEFAULT_ROWS: f64 = 1_048_576.0;
/// Rows per value of an index without statistics (as SQLite assumes).
const DEFAULT_ROWS_PER_VALUE: f64 = 10.0;
/// Child-first must be cheaper by this factor: an estimate may be wrong, and parent-first stops
/// early.
const ADVANTAGE: f64 = 4.0;
/// Child-first reads all qualifying children in one piece, whatever the slice: about 50 ms.
const MAX_CHILDREN: f64 = 50_000.0;

/// Rows that are read in the time that a statement takes without reading any.
const STATEMENT_ROWS: f64 = 6.0;

/// Who decides with which side of an EXISTS a statement begins. It never changes the answer.
#[derive(Debug, Clone, Copy)]
pub enum ExistsSide<'a> {
    /// Always the parent.
    Parent,
    /// The child wherever it is possible.
    Child,
    /// What seems to be cheaper.
    Cheaper(&'a Statistics),
}

/// Sizes of tables and their indexes.
#[derive(Debug, Default)]
pub struct Statistics {
    rows: HashMap<Box<str>, f64>,
    /// Average rows per value of an index's first column.
    per_value: HashMap<(Box<str>, Box<str>), f64>,
}

impl Statistics {
    /// Reads what ANALYZE left. A file without statistics has none.
    pub fn read(connection: &Connection) -> Statistics {
        let mut statistics = Statistics::default();
        // Whatever goes wrong here, queries work without.
        if let Err(error) = statistics.read_from(connection) {
            tracing::debug!(%error, "no statistics in the replica");
        }
        statistics
    }

    fn read_from(&mut self, connection: &Connection) -> rusqlite::Result<()> {
        let mut statement = connection.prepare(
            "SELECT s.tbl, s.stat, i.name FROM sqlite_stat1 AS s \
             LEFT JOIN pragma_index_info(s.idx) AS i ON i.seqno = 0",
        )?;
        let mut found = statement.raw_query();
        while let Some(row) = found.next()? {
            let table: String = row.get(0)?;
            let text: String = row.get(1)?;
            let column: Option<String> = row.get(2)?;
            let mut numbers = text.split(' ').map_while(|n| n.parse::<f64>().ok());
            let Some(rows) = numbers.next() else { continue };
            if let (Some(column), Some(per_value)) = (column, numbers.next()) {
                let known = self.per_value.entry((table.as_str().into(), column.into()));
                let least = known.or_insert(per_value);
                *least = least.min(per_value);
            }
            self.rows.insert(table.into(), rows);
        }
        Ok(())
    }

    /// Whether it is faster to read all rows of several keys in one statement than the first
    /// `most` of each key in one of its own.
    pub(super) fn few_per_key(&self, table: &TableSpec, columns: &[usize], most: usize) -> bool {
        let best = columns.iter().filter_map(|&c| self.per_value(table, c)).min_by(f64::total_cmp);
        // Without an index each statement reads the whole table.
        best.is_none_or(|rows| rows <= most as f64 + STATEMENT_ROWS)
    }

    fn rows(&self, table: &TableSpec) -> f64 {
        self.rows.get(&*table.name).copied().unwrap_or(DEFAULT_ROWS)
    }

    /// Rows per value of a column; `None` without an index that begins with it.
    fn per_value(&self, table: &TableSpec, column: usize) -> Option<f64> {
        if table.unique_keys.iter().any(|k| k.not_null && k.columns == [column]) {
            return Some(1.0);
        }
        let unique = table.unique_keys.iter().map(|k| &k.columns);
        let indexed = table.indexes.iter().chain(unique).any(|i| i.first() == Some(&column));
        let name = (table.name.as_ref().into(), table.columns[column].name.as_ref().into());
        let known = || self.per_value.get(&name).copied();
        indexed.then(|| known().unwrap_or(DEFAULT_ROWS_PER_VALUE).min(self.rows(table)))
    }
}

impl ExistsSide<'_> {
    /// Whether to begin a statement for rows of `node` with the body of one of its conjuncts.
    pub(super) fn is_child(
        self,
        plan: &Plan,
        params: &Params,
        node: &Node,
        edge: &ExistsEdge,
        limit: Option<usize>,
    ) -> bool {
        match self {
            ExistsSide::Parent => false,
            ExistsSide::Child => can_begin(plan, node, edge),
            ExistsSide::Cheaper(statistics) => {
                let estimate = Estimate { plan, params, statistics };
                estimate.is_cheaper(node, edge, limit)
            }
        }
    }
}

/// Whether `parent IN (SELECT child …)` says the same as the EXISTS: one column, compared in the
/// same way whatever is on the other side.
fn can_begin(plan: &Plan, node: &Node, edge: &ExistsEdge) -> bool {
    let ([p], [c]) = (&*edge.parent_columns, &*edge.child_columns) else { return false };
    let (p, c) = (&node.table.columns[*p], &plan.node(edge.child).table.columns[*c]);
    let strings = p.value_type == ValueType::String;
    let same_form = match p.upstream_type == c.upstream_type {
        true => text_is_kept(&p.upstream_type),
        false => is_plain_text(&p.upstream_type) && is_plain_text(&c.upstream_type),
    };
    let negated = edge.negated && !mutant::is(Mutant::NotExistsByChild);
    !negated && p.value_type == c.value_type && (!strings || same_form)
}

fn is_plain_text(upstream_type: &str) -> bool {
    ["text", "varchar", "character varying", "bpchar", "character"]
        .iter()
        .any(|t| t.eq_ignore_ascii_case(upstream_type))
}

struct Estimate<'a> {
    plan: &'a Plan,
    params: &'a Params,
    statistics: &'a Statistics,
}

impl Estimate<'_> {
    fn is_cheaper(&self, node: &Node, edge: &ExistsEdge, limit: Option<usize>) -> bool {
        let Some((children, through)) = self.through(node, edge) else { return false };
        let others = self.least(node, Some(edge));
        let mut parents = others;
        if let Some(limit) = limit {
            // It may stop when it has found enough.
            let matching = through.min(others).max(1.0);
            parents = parents.min(others * limit as f64 / matching);
        }
        children <= MAX_CHILDREN && (children + through) * ADVANTAGE < parents
    }

    /// Children to read, and parents that they lead to.
    fn through(&self, node: &Node, edge: &ExistsEdge) -> Option<(f64, f64)> {
        if !can_begin(self.plan, node, edge) {
            return None;
        }
        let per_value = self.statistics.per_value(&node.table, *edge.parent_columns.first()?)?;
        let children = self.least(self.plan.node(edge.child), None);
        Some((children, children * per_value))
    }

    /// Rows of a node that must be looked at, by its best conjunct but one.
    fn least(&self, node: &Node, except: Option<&ExistsEdge>) -> f64 {
        let mut least = self.statistics.rows(&node.table);
        self.conjuncts(node, &node.condition, except, &mut least);
        least
    }

    fn conjuncts(
        &self,
        node: &Node,
        condition: &Condition,
        except: Option<&ExistsEdge>,
        least: &mut f64,
    ) {
        match condition {
            Condition::And(all) => {
                all.iter().for_each(|c| self.conjuncts(node, c, except, least));
            }
            Condition::Simple(s) => {
                let values = match (s.op, self.params.get(usize::from(s.param.0))) {
                    (Op::Eq | Op::Is | Op::IsNull, _) => 1.0,
                    (Op::In, Some(Param::List(list))) => list.len() as f64,
                    _ => return,
                };
                if let Some(rows) = self.statistics.per_value(&node.table, s.column) {
                    *least = least.min(rows * values);
                }
            }
            Condition::Exists(e) if except.is_none_or(|except| except.child != e.child) => {
                if let Some((children, through)) = self.through(node, e) {
                    *least = least.min(children.max(through));
                }
            }
            Condition::Exists(_) | Condition::Const(_) | Condition::Or(_) => {}
        }
    }
}
