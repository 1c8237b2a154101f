//! Reading what a fetch asks for part by part, by ranges of SQLite's row numbers: whatever index
//! a statement uses, a range of row numbers bounds what it looks at, because they are the last
//! column of every index.
//!
//! The first try reads everything. If it takes too much work, the ranges begin with a sixteenth of
//! the table, grow while they are through quickly, and shrink when they are not.

use rusqlite::Connection;
use zeroring_core::ivm::source::{Part, SourceError};
use zeroring_core::schema::TableSpec;

use super::mutant::{self, Mutant};
use super::reader::store_error;
use super::schema::quote_ident;

/// Parts that a table has to begin with.
const FIRST_PARTS: i64 = 16;
/// A part that took too much work becomes so many.
const SHRINK: i64 = 4;

/// A range of row numbers: from the first one on, before the second one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RowNumbers<'t> {
    /// What the row number is called: no column of the table has this name.
    pub name: &'t str,
    /// From this on.
    pub from: i64,
    /// Before this.
    pub to: i64,
}

impl RowNumbers<'_> {
    /// One row at most.
    pub(super) fn is_one(&self) -> bool {
        self.to.saturating_sub(self.from) <= 1
    }
}

/// The row numbers of a table.
#[derive(Debug)]
pub(super) struct Numbered {
    /// What they are called.
    pub(super) name: &'static str,
    /// The largest one.
    last: i64,
}

impl Numbered {
    /// Asks SQLite. `None` if nobody can name the row numbers of the table, because columns have
    /// all their names.
    pub(super) fn read(
        connection: &Connection,
        table: &TableSpec,
    ) -> Result<Option<Numbered>, SourceError> {
        let mut columns = connection
            .prepare_cached("SELECT name FROM pragma_table_xinfo(?)")
            .map_err(store_error)?;
        let columns = columns
            .query_map([&*table.name], |row| row.get(0))
            .and_then(Iterator::collect::<rusqlite::Result<Vec<String>>>)
            .map_err(store_error)?;
        let is_free = |name: &&str| !columns.iter().any(|c| c.eq_ignore_ascii_case(name));
        let Some(name) = ["rowid", "_rowid_", "oid"].into_iter().find(is_free) else {
            return Ok(None);
        };
        let sql = format!("SELECT ifnull(max({name}),0) FROM {}", quote_ident(&table.name));
        let last = connection
            .prepare_cached(&sql)
            .and_then(|mut s| s.query_row([], |row| row.get(0)))
            .map_err(store_error)?;
        Ok(Some(Numbered { name, last }))
    }

    /// The next range; `None` behind the last row.
    pub(super) fn range(&self, part: &Part) -> Option<RowNumbers<'static>> {
        let width = part.width.unwrap_or(i64::MAX);
        let to = part.next.saturating_add(width);
        (part.next <= self.last).then_some(RowNumbers { name: self.name, from: part.next, to })
    }

    /// The range was read.
    pub(super) fn was_read(&self, part: &mut Part, range: RowNumbers<'_>) {
        part.next = range.to.saturating_add(i64::from(mutant::is(Mutant::RowBetweenParts)));
        part.width = part.width.map(|w| w.saturating_mul(2));
        part.done = part.next > self.last || mutant::is(Mutant::OnePartRead);
    }

    /// The range was too much; without a width, the whole table.
    pub(super) fn was_too_much(&self, part: &mut Part) {
        let width = match part.width {
            None => (self.last - part.next) / FIRST_PARTS,
            Some(width) => width / SHRINK,
        };
        part.width = Some(width.max(1));
    }
}
