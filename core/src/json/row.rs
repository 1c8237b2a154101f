//! Rows on the wire (spec: sync-protocol §4.2, §4.7).
//!
//! A put carries every visible column under its server name, `null` for SQL NULL. The object is
//! made at most once per row and kept in [`Row::wire_json`]; a row that holds an integer beyond
//! ±(2^53−1) is never delivered.

use super::write;
use crate::row::Row;
use crate::schema::TableSpec;
use crate::value::Value;

/// Why a row cannot be delivered.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RowJsonError {
    /// An integer that no double holds exactly.
    #[error(
        "value {value} (in {table}.{column}) is outside of supported bounds \
         (±9007199254740991): store it as text to sync it"
    )]
    OutOfBounds {
        /// The integer.
        value: i64,
        /// Table by server name.
        table: String,
        /// Column by server name.
        column: String,
    },
    /// The row was made for another version of its table.
    #[error("a row of table {table} has {got} values, but the table has {want} columns")]
    WrongShape {
        /// Table by server name.
        table: String,
        /// Values in the row.
        got: usize,
        /// Visible columns of the table.
        want: usize,
    },
}

/// The JSON object of a row: all visible columns by server name. Cached in the row.
///
/// # Errors
/// [`RowJsonError`] if a value cannot be delivered. The message names value, table and column.
pub fn wire_json<'r>(table: &TableSpec, row: &'r Row) -> Result<&'r [u8], RowJsonError> {
    if let Some(made) = row.wire_json.get() {
        return Ok(made);
    }
    let want = table.columns.len();
    if row.values.len() != want {
        return Err(RowJsonError::WrongShape {
            table: table.name.to_string(),
            got: row.values.len(),
            want,
        });
    }
    let mut out = Vec::with_capacity(want * 48);
    object(&mut out, table, 0..want, |column| &row.values[column])?;
    Ok(row.wire_json.get_or_set(&out))
}

/// Appends a row key as JSON object: the given columns of the table and their values, in that
/// order. Used for the `id` of a `del` and for the row keys of the CVR.
///
/// # Errors
/// [`RowJsonError::OutOfBounds`] if a key value cannot be delivered.
pub fn key_json(
    out: &mut Vec<u8>,
    table: &TableSpec,
    columns: &[usize],
    key: &[Value],
) -> Result<(), RowJsonError> {
    if columns.len() != key.len() || columns.iter().any(|&c| c >= table.columns.len()) {
        return Err(RowJsonError::WrongShape {
            table: table.name.to_string(),
            got: key.len(),
            want: columns.len(),
        });
    }
    let mut values = key.iter();
    object(out, table, columns.iter().copied(), |_| values.next().unwrap_or(&Value::Null))
}

fn object<'v>(
    out: &mut Vec<u8>,
    table: &TableSpec,
    columns: impl Iterator<Item = usize>,
    mut value_of: impl FnMut(usize) -> &'v Value,
) -> Result<(), RowJsonError> {
    out.push(b'{');
    for (i, column) in columns.enumerate() {
        if i > 0 {
            out.push(b',');
        }
        let name = &table.columns[column].name;
        write::string(out, name);
        out.push(b':');
        write::value(out, value_of(column)).map_err(|value| RowJsonError::OutOfBounds {
            value,
            table: table.name.to_string(),
            column: name.to_string(),
        })?;
    }
    out.push(b'}');
    Ok(())
}
