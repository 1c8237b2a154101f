//! Where rows come from: a snapshot of all tables at one version. Two implementations: memory
//! (`memory_source`, for tests and simulation) and SQLite (`zeroring-storage`).

use std::ops::ControlFlow;

use super::plan::{NodeId, Params, Plan};
use crate::row::{Key, Row, RowRef};
use crate::schema::TableSpec;
use crate::value::Value;
use crate::version::StateVersion;

/// A failed read. Fails the query (spec: zql-ivm §6.3.13), never the executor.
#[derive(Debug, Clone, thiserror::Error)]
pub enum SourceError {
    /// A value cannot be delivered, e.g. an integer outside ±(2^53−1).
    #[error("{0}")]
    UnsupportedValue(String),
    /// The table is gone or was never there.
    #[error("table \"{0}\" does not exist in the replica")]
    NoTable(String),
    /// The store cannot run the query: it nests too deep, or has too many values.
    #[error(
        "the query is too complex for SQLite ({0}). Nest fewer conditions and subqueries in each \
         other, or order a query with a start by fewer columns."
    )]
    TooComplex(String),
    /// The store failed.
    #[error("reading the replica failed: {0}")]
    Store(String),
    /// A read took more work than it was given. Only within a source: the engine never sees it.
    #[error("the read was interrupted")]
    Interrupted,
}

/// How a read with a limit on its work ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// All rows were visited, or `visit` broke.
    Whole,
    /// It took too much work. The rows visited before are valid, and the first ones.
    Interrupted,
}

/// Where a walk through a table in a node's order gets to.
#[derive(Debug, Clone, PartialEq)]
pub enum Reach {
    /// The position of the row there.
    At(Box<[Value]>),
    /// Behind the last row.
    End,
    /// That is too much work: there is no index in this order.
    Unknown,
}

/// How far a read that goes part by part is: see [`Source::fetch_part`]. The parts are the
/// source's (ranges of its own row numbers).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Part {
    /// The first row number that was not read.
    pub next: i64,
    /// Row numbers to read at a time; all that there are, if it is not known yet that these are
    /// too many.
    pub width: Option<i64>,
    /// All is read.
    pub done: bool,
}

impl SourceError {
    /// Fails for a row that cannot be delivered.
    ///
    /// # Errors
    /// [`SourceError::UnsupportedValue`], naming value, table and column.
    pub fn check_deliverable(table: &TableSpec, row: &Row) -> Result<(), SourceError> {
        for (value, column) in row.values.iter().zip(&table.columns) {
            if let Value::UnsafeInt(n) = value {
                return Err(SourceError::UnsupportedValue(format!(
                    "value {n} (in {}.{}) is outside of supported bounds",
                    table.name, column.name
                )));
            }
        }
        Ok(())
    }
}

impl Fetch<'_> {
    /// Whether the rows go to clients: then a value that cannot be delivered fails the fetch.
    /// Rows of silent nodes are only tested, and those of a weak fetch are candidates that the
    /// engine judges first (and checks with [`SourceError::check_deliverable`] if it keeps them).
    pub fn delivers(&self) -> bool {
        self.filter == Filter::Whole && !self.plan.node(self.node).silent
    }
}

/// Which of a node's rows are wanted: the body of a node visit.
#[derive(Debug, Clone)]
pub struct Fetch<'a> {
    /// The plan.
    pub plan: &'a Plan,
    /// The node to read.
    pub node: NodeId,
    /// Parameters of the instance.
    pub params: &'a Params,
    /// Only rows whose `columns` equal one of these keys (no key has a null).
    pub keys: Option<Keys<'a>>,
    /// What must hold for a row.
    pub filter: Filter,
    /// Only rows at or after (see [`Bound::inclusive`]) this position in the node's order.
    pub from: Option<Bound<'a>>,
    /// Only rows strictly before this position.
    pub before: Option<&'a [Value]>,
    /// Stop after this many rows. A limited fetch is always ordered.
    pub limit: Option<usize>,
    /// Return rows in the node's order; otherwise any order.
    pub ordered: bool,
}

/// A set of keys over some columns of the node's table.
#[derive(Debug, Clone, Copy)]
pub struct Keys<'a> {
    /// The columns.
    pub columns: &'a [usize],
    /// The wanted keys, distinct.
    pub keys: &'a [Key],
}

/// Which predicate a fetch applies. The start cursor applies, except with [`Filter::Any`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Filter {
    /// The whole `where`, nested EXISTS included.
    Whole,
    /// Every EXISTS / NOT EXISTS leaf taken as TRUE.
    Weak,
    /// No condition at all, not even the start cursor: `keys` alone decides. Does not look at the
    /// parameters, so one read serves all instances of a plan.
    Any,
}

/// A position in a node's order.
#[derive(Debug, Clone, Copy)]
pub struct Bound<'a> {
    /// One value per element of the node's order.
    pub position: &'a [Value],
    /// The position itself is included.
    pub inclusive: bool,
}

/// Reads one snapshot. All calls between two moves of the snapshot see the same version.
pub trait Source {
    /// The version of the snapshot.
    fn version(&self) -> &StateVersion;

    /// Visits the rows that `fetch` asks for, until `visit` breaks.
    ///
    /// # Errors
    /// [`SourceError`]; rows visited before it are valid.
    fn fetch(
        &mut self,
        fetch: &Fetch<'_>,
        visit: &mut dyn FnMut(RowRef) -> ControlFlow<()>,
    ) -> Result<(), SourceError>;

    /// As [`Source::fetch`], but gives up when that took about so much work of the source's own,
    /// in units of a [`super::engine::Budget`]: it may look at a million rows to find one.
    ///
    /// # Errors
    /// As [`Source::fetch`].
    fn fetch_within(
        &mut self,
        fetch: &Fetch<'_>,
        _units: u64,
        visit: &mut dyn FnMut(RowRef) -> ControlFlow<()>,
    ) -> Result<Ended, SourceError> {
        self.fetch(fetch, visit).map(|()| Ended::Whole)
    }

    /// Where one gets from the start of `fetch` by so many rows of its table in the node's order,
    /// whatever the node's conditions and keys; with about so much work at most.
    ///
    /// # Errors
    /// As [`Source::fetch`].
    fn reach(
        &mut self,
        _fetch: &Fetch<'_>,
        _rows: usize,
        _units: u64,
    ) -> Result<Reach, SourceError> {
        Ok(Reach::Unknown)
    }

    /// As [`Source::fetch`] without an order or a limit, with about so much work at a time: visits
    /// all rows of some further parts. Call it until [`Part::done`], in one snapshot.
    ///
    /// # Errors
    /// As [`Source::fetch`].
    fn fetch_part(
        &mut self,
        fetch: &Fetch<'_>,
        part: &mut Part,
        _units: u64,
        visit: &mut dyn FnMut(RowRef),
    ) -> Result<(), SourceError> {
        part.done = true;
        self.fetch(fetch, &mut |row| {
            visit(row);
            ControlFlow::Continue(())
        })
    }

    /// Whether all rows of several keys over `columns` are read faster by one fetch than `most`
    /// rows of each key by one fetch per key. It decides how partitions are read, not what is in
    /// them.
    fn few_per_key(&mut self, _table: &TableSpec, _columns: &[usize], _most: usize) -> bool {
        false
    }

    /// Whether any row of the body `fetch.node` satisfies `fetch` (a point query).
    ///
    /// # Errors
    /// As [`Source::fetch`].
    fn exists(&mut self, fetch: &Fetch<'_>) -> Result<bool, SourceError> {
        let mut found = false;
        self.fetch(fetch, &mut |_| {
            found = true;
            ControlFlow::Break(())
        })?;
        Ok(found)
    }
}
