//! Columns in SQL, as stored and as the predicate reads them: SQLite decides by the name of a
//! declared type whether a text that looks like a number is kept as text.

use std::fmt::{self, Write as _};

use zeroring_core::schema::{TableSpec, ValueType};

/// Whether a string column's values are certainly stored as text. Columns with TEXT affinity are;
/// uuid and the network types have numeric affinity, but none of their texts is a number. Names
/// that no Postgres type has are enums, declared with the attribute `|TEXT_ENUM`, which gives
/// TEXT affinity unless the name contains `INT`.
pub(super) fn text_is_kept(upstream_type: &str) -> bool {
    let never_numbers = ["uuid", "inet", "cidr", "macaddr", "macaddr8", "pg_lsn"];
    never_numbers.iter().any(|t| t.eq_ignore_ascii_case(upstream_type))
        || has_text_affinity(upstream_type)
}

fn has_text_affinity(upstream_type: &str) -> bool {
    let numeric = [
        "uuid", "inet", "cidr", "macaddr", "macaddr8", "pg_lsn", "ean13", "isbn", "isbn13", "ismn",
        "ismn13", "issn", "issn13", "upc",
    ];
    let integer = |name: &str| name.as_bytes().windows(3).any(|w| w.eq_ignore_ascii_case(b"INT"));
    !numeric.iter().any(|t| t.eq_ignore_ascii_case(upstream_type)) && !integer(upstream_type)
}

/// A column of a table under an alias.
#[derive(Clone, Copy)]
pub(super) struct Column<'t> {
    pub(super) alias: usize,
    pub(super) table: &'t TableSpec,
    pub(super) column: usize,
}

impl<'t> Column<'t> {
    /// The column as stored.
    pub(super) fn stored(self) -> Expression<'t> {
        Expression { column: self, read: Read::Stored }
    }

    /// The column as read: text columns that may hold numbers as text.
    pub(super) fn read(self) -> Expression<'t> {
        let read = if self.is_kept() { Read::Stored } else { Read::NumbersAsText };
        Expression { column: self, read }
    }

    pub(super) fn is_kept(self) -> bool {
        let c = &self.table.columns[self.column];
        c.value_type != ValueType::String || text_is_kept(&c.upstream_type)
    }

    /// The column as read, in a form that lets an index on `indexed` serve `indexed = self`: an
    /// index on a text column is of no use for a comparison with numeric affinity.
    pub(super) fn read_for(self, indexed: Column<'_>) -> Expression<'t> {
        let text = |c: Column<'_>| has_text_affinity(&c.table.columns[c.column].upstream_type);
        let string = self.table.columns[self.column].value_type == ValueType::String;
        if string && self.is_kept() && text(indexed) && !text(self) {
            Expression { column: self, read: Read::AsText }
        } else {
            self.read()
        }
    }

    pub(super) fn nullable(self) -> bool {
        self.table.columns[self.column].nullable
    }
}

/// A column in an expression; written without an allocation.
#[derive(Clone, Copy)]
pub(super) struct Expression<'t> {
    column: Column<'t>,
    read: Read,
}

#[derive(Clone, Copy)]
enum Read {
    Stored,
    NumbersAsText,
    AsText,
}

impl fmt::Display for Expression<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (before, after) = match self.read {
            Read::Stored => ("", ""),
            Read::NumbersAsText => ("zr_text(", ")"),
            Read::AsText => ("CAST(", " AS TEXT)"),
        };
        let Column { alias, table, column } = self.column;
        write!(f, "{before}t{alias}.{}{after}", Ident(&table.columns[column].name))
    }
}

/// A name as an SQL identifier.
pub(super) struct Ident<'a>(pub(super) &'a str);

impl fmt::Display for Ident<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_char('"')?;
        for (i, part) in self.0.split('"').enumerate() {
            if i > 0 {
                f.write_str("\"\"")?;
            }
            f.write_str(part)?;
        }
        f.write_char('"')
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_that_may_hold_numbers_are_known() {
        for kept in ["text", "varchar", "bpchar", "character varying", "uuid", "inet", "mood"] {
            assert!(text_is_kept(kept), "{kept}");
        }
        for converted in ["upc", "isbn13", "point_kind", "PRINTER"] {
            assert!(!text_is_kept(converted), "{converted}");
        }
    }
}
