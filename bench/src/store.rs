//! A source of rows in memory with indexes: what it answers costs next to nothing, so that a bench
//! over it is one of the engine.

use std::cmp::Ordering;
use std::collections::{BTreeMap, HashMap};
use std::ops::ControlFlow;
use std::sync::Arc;

use zeroring_core::change::Commit;
use zeroring_core::ivm::plan::{Condition, Direction, Node, NodeId, Op, Param};
use zeroring_core::ivm::source::{Fetch, Filter, Source, SourceError};
use zeroring_core::row::{Key, Row, RowRef};
use zeroring_core::schema::{TableId, TableSpec};
use zeroring_core::value::Value;
use zeroring_core::version::StateVersion;
use zeroring_core::zql::order::{compare_rows, compare_to_position, in_start};
use zeroring_core::zql::predicate;

/// A row at its place in an order.
#[derive(Debug, Clone)]
struct Placed(Arc<[(usize, Direction)]>, RowRef);

impl PartialEq for Placed {
    fn eq(&self, o: &Self) -> bool {
        self.cmp(o).is_eq()
    }
}
impl Eq for Placed {}
impl PartialOrd for Placed {
    fn partial_cmp(&self, o: &Self) -> Option<Ordering> {
        Some(self.cmp(o))
    }
}
impl Ord for Placed {
    fn cmp(&self, o: &Self) -> Ordering {
        compare_rows(&self.0, &self.1, &o.1)
    }
}

type Sorted = BTreeMap<Placed, ()>;

/// Columns that rows are ordered by.
type Order = Arc<[(usize, Direction)]>;

#[derive(Debug, Default)]
struct Table {
    by_key: HashMap<Key, RowRef>,
    /// Per indexed column: rows by value.
    by_column: HashMap<usize, HashMap<Value, Vec<Key>>>,
    /// Per indexed order.
    sorted: Vec<(Order, Sorted)>,
}

/// See the module. The first column of each table is its key.
#[derive(Debug, Default)]
pub(crate) struct Store {
    tables: HashMap<TableId, Table>,
    version: StateVersion,
}

impl Store {
    pub(crate) fn new(version: StateVersion) -> Store {
        Store { tables: HashMap::new(), version }
    }

    /// Indexes a column of a table that has no rows yet.
    pub(crate) fn index(&mut self, table: &TableSpec, column: usize) {
        self.tables.entry(table.id).or_default().by_column.entry(column).or_default();
    }

    /// Keeps a table that has no rows yet in an order.
    pub(crate) fn sort(&mut self, table: &TableSpec, order: &[(usize, Direction)]) {
        self.tables.entry(table.id).or_default().sorted.push((order.into(), Sorted::new()));
    }

    pub(crate) fn get(&self, table: TableId, key: &Key) -> Option<&RowRef> {
        self.tables.get(&table)?.by_key.get(key)
    }

    pub(crate) fn put(&mut self, table: TableId, row: RowRef) {
        let key = row.project(&[0]);
        self.remove(table, &key);
        let table = self.tables.entry(table).or_default();
        for (&column, index) in &mut table.by_column {
            index.entry(row.values[column].clone()).or_default().push(key.clone());
        }
        for (order, sorted) in &mut table.sorted {
            sorted.insert(Placed(Arc::clone(order), row.clone()), ());
        }
        table.by_key.insert(key, row);
    }

    pub(crate) fn remove(&mut self, table: TableId, key: &Key) {
        let Some(table) = self.tables.get_mut(&table) else { return };
        let Some(row) = table.by_key.remove(key) else { return };
        for (&column, index) in &mut table.by_column {
            if let Some(keys) = index.get_mut(&row.values[column]) {
                keys.retain(|k| k != key);
            }
        }
        for (order, sorted) in &mut table.sorted {
            sorted.remove(&Placed(Arc::clone(order), row.clone()));
        }
    }

    pub(crate) fn apply(&mut self, commit: &Commit) {
        for change in &commit.tables {
            for old in change.rows.iter().filter_map(|r| r.old.as_ref()) {
                self.remove(change.table.id, &old.project(&[0]));
            }
            for new in change.rows.iter().filter_map(|r| r.new.as_ref()) {
                self.put(change.table.id, new.clone());
            }
        }
        self.skip(commit);
    }

    /// Moves to the version of a commit without its rows: for queries that read none of them.
    pub(crate) fn skip(&mut self, commit: &Commit) {
        self.version = commit.version.clone();
    }

    /// Rows that may qualify, by the best index.
    fn candidates<'a>(
        &'a self,
        f: &'a Fetch<'_>,
        node: &Node,
    ) -> Box<dyn Iterator<Item = &'a RowRef> + 'a> {
        let Some(table) = self.tables.get(&node.table.id) else {
            return Box::new(std::iter::empty());
        };
        let of = move |column: usize, value: &Value| {
            let keys = table.by_column.get(&column)?.get(value);
            let keys = keys.map_or(&[][..], |k| &**k);
            Some(keys.iter().filter_map(|k| table.by_key.get(k)))
        };
        if let Some(keys) = f.keys {
            if keys.columns == [0] {
                return Box::new(keys.keys.iter().filter_map(|k| table.by_key.get(k)));
            }
            let column = keys.columns[0];
            return Box::new(keys.keys.iter().filter_map(move |k| of(column, &k[0])).flatten());
        }
        if let Some((column, value)) = equality(&node.condition, f.params)
            && let Some(rows) = of(column, value)
        {
            return Box::new(rows);
        }
        Box::new(table.by_key.values())
    }

    fn qualifies(&self, f: &Fetch<'_>, id: NodeId, row: &Row) -> bool {
        let node = f.plan.node(id);
        in_start(node, row, f.params)
            && predicate::evaluate(&node.condition, row, f.params, &mut |edge| {
                let child = f.plan.node(edge.child);
                let keys = [row.project(&edge.parent_columns)];
                let columns = &edge.child_columns;
                let keys = zeroring_core::ivm::source::Keys { columns, keys: &keys };
                let body = Fetch { node: edge.child, keys: Some(keys), ..f.clone() };
                let any =
                    self.candidates(&body, child).any(|r| self.qualifies(&body, edge.child, r));
                any != edge.negated
            })
    }
}

/// The first `column = literal` that must hold.
fn equality<'a>(condition: &Condition, params: &'a [Param]) -> Option<(usize, &'a Value)> {
    match condition {
        Condition::And(all) => all.iter().find_map(|c| equality(c, params)),
        Condition::Simple(s) if s.op == Op::Eq => match &params[usize::from(s.param.0)] {
            Param::Value(v) => Some((s.column, v)),
            _ => None,
        },
        _ => None,
    }
}

impl Source for Store {
    fn version(&self) -> &StateVersion {
        &self.version
    }

    fn fetch(
        &mut self,
        f: &Fetch<'_>,
        visit: &mut dyn FnMut(RowRef) -> ControlFlow<()>,
    ) -> Result<(), SourceError> {
        let node = f.plan.node(f.node);
        let wanted = |row: &RowRef| {
            (match f.filter {
                Filter::Whole => self.qualifies(f, f.node, row),
                Filter::Weak => predicate::weak(node, row, f.params),
                Filter::Any => true,
            }) && f.from.is_none_or(|b| {
                let at = compare_to_position(&node.order, row, b.position);
                at.is_gt() || (b.inclusive && at.is_eq())
            }) && f.before.is_none_or(|p| compare_to_position(&node.order, row, p).is_lt())
        };
        let limit = f.limit.unwrap_or(usize::MAX);
        let sorted = self.tables.get(&node.table.id).and_then(|t| {
            let sorted = t.sorted.iter().find(|(order, _)| **order == *node.order)?;
            (f.keys.is_none() && f.limit.is_some()).then_some(&sorted.1)
        });
        if let Some(sorted) = sorted {
            // `from` has no row to start at, hence a placed row of its values.
            let start = f.from.map(|b| {
                let mut values = vec![Value::Null; node.table.columns.len()];
                for (&(column, _), value) in node.order.iter().zip(b.position) {
                    values[column] = value.clone();
                }
                Placed(node.order.clone().into(), Row::new(StateVersion::zero(), values))
            });
            let rows: Box<dyn Iterator<Item = &Placed>> = match start {
                Some(start) => Box::new(sorted.range(start..).map(|(p, ())| p)),
                None => Box::new(sorted.keys()),
            };
            for placed in rows.filter(|p| wanted(&p.1)).take(limit) {
                if visit(placed.1.clone()).is_break() {
                    break;
                }
            }
            return Ok(());
        }
        let mut rows: Vec<&RowRef> = self.candidates(f, node).filter(|row| wanted(row)).collect();
        if f.ordered || f.limit.is_some() {
            rows.sort_by(|a, b| compare_rows(&node.order, a, b));
        }
        for row in rows.into_iter().take(limit) {
            if visit(row.clone()).is_break() {
                break;
            }
        }
        Ok(())
    }
}
