//! The replica's change log, `_zero.changeLog2`: which rows changed since a version.
//!
//! The replica's writer writes it, in the same transaction as the rows; an executor that fell
//! behind (or another server that opens the file) reads it. It holds at most one entry per row
//! key, the latest, and at most one table-wide entry per version; it is never trimmed.
//!
//! Spec: replication §6.4, traps 10–12; zql-ivm §5.4.

use std::sync::Arc;

use rusqlite::{Connection, params};
use zeroring_core::change::message::LiteValue;
use zeroring_core::version::{StateVersion, VersionError};

/// What happened to a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogOp {
    /// Inserted or updated.
    Set,
    /// Deleted.
    Delete,
}

impl LogOp {
    fn code(self) -> &'static str {
        match self {
            LogOp::Set => "s",
            LogOp::Delete => "d",
        }
    }
}

/// Writes the entries of one transaction.
#[derive(Debug)]
pub(crate) struct LogWriter {
    version: StateVersion,
    /// Position of the next row entry.
    next: i64,
}

impl LogWriter {
    pub(crate) fn new(version: StateVersion) -> LogWriter {
        LogWriter { version, next: 0 }
    }

    /// Takes a position without writing an entry.
    pub(crate) fn skip(&mut self) {
        self.next += 1;
    }

    /// A row changed. `key` is the JSON object of its key, names sorted.
    pub(crate) fn row(
        &mut self,
        connection: &Connection,
        table: &str,
        key: &[u8],
        op: LogOp,
    ) -> rusqlite::Result<()> {
        let mut statement = connection.prepare_cached(
            r#"INSERT INTO "_zero.changeLog2" (stateVersion, pos, "table", rowKey, op)
               VALUES (?,?,?,?,?)
               ON CONFLICT ("table", rowKey) DO UPDATE SET stateVersion = excluded.stateVersion,
               pos = excluded.pos, op = excluded.op,
               backfillingColumnVersions = excluded.backfillingColumnVersions"#,
        )?;
        statement.raw_bind_parameter(1, self.version.as_str())?;
        statement.raw_bind_parameter(2, self.next)?;
        statement.raw_bind_parameter(3, table)?;
        let key = rusqlite::types::ValueRef::Text(key);
        statement.raw_bind_parameter(4, rusqlite::types::ToSqlOutput::Borrowed(key))?;
        statement.raw_bind_parameter(5, op.code())?;
        statement.raw_execute()?;
        self.next += 1;
        Ok(())
    }

    /// A table was truncated. One table-wide entry per version: the last one stays.
    pub(crate) fn truncate(&self, connection: &Connection, table: &str) -> rusqlite::Result<()> {
        let version = self.version.as_str();
        connection
            .prepare_cached(
                r#"INSERT OR REPLACE INTO "_zero.changeLog2"
                   (stateVersion, pos, "table", rowKey, op) VALUES (?,-1,?,?,'t')"#,
            )?
            .execute(params![version, table, version])
            .map(drop)
    }
}

/// A value inside a key, as the original writes it: JavaScript's JSON of the lite value.
pub(crate) fn write_key_value(out: &mut Vec<u8>, value: &LiteValue) {
    match value {
        LiteValue::Null => out.extend_from_slice(b"null"),
        LiteValue::Integer(n) => {
            out.extend_from_slice(itoa::Buffer::new().format(*n).as_bytes());
        }
        LiteValue::Real(n) if n.is_finite() => {
            out.extend_from_slice(ryu_js::Buffer::new().format_finite(*n).as_bytes());
        }
        LiteValue::Real(_) => out.extend_from_slice(b"null"),
        LiteValue::Text(s) => {
            out.extend_from_slice(serde_json::Value::from(&**s).to_string().as_bytes());
        }
        LiteValue::Blob(bytes) => {
            // The original keeps a bytea of the stream as this text.
            let data: Vec<String> = bytes.iter().map(u8::to_string).collect();
            let text = format!(r#"{{"type":"Buffer","data":[{}]}}"#, data.join(","));
            out.extend_from_slice(serde_json::Value::from(text).to_string().as_bytes());
        }
    }
}

/// What the log says of the versions after `from`, up to the connection's snapshot.
#[derive(Debug, Clone, PartialEq)]
pub enum Changes {
    /// These rows, in the order of their last change.
    Rows(Vec<LoggedRow>),
    /// A table was truncated or its schema changed: everything may have.
    Everything {
        /// The table.
        table: String,
        /// The version that did it.
        version: StateVersion,
    },
    /// More rows than asked for: cheaper to start over.
    TooMany,
}

/// The latest entry of a row.
#[derive(Debug, Clone, PartialEq)]
pub struct LoggedRow {
    /// Version of the change.
    pub version: StateVersion,
    /// Replica name of the table.
    pub table: Arc<str>,
    /// Key columns and their lite values.
    pub key: serde_json::Map<String, serde_json::Value>,
    /// What happened.
    pub op: LogOp,
}

/// The log cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum ChangeLogError {
    /// SQLite failed.
    #[error("reading the change log: {0}")]
    Sqlite(#[from] rusqlite::Error),
    /// An entry's version is no version.
    #[error("an entry of the change log: {0}")]
    Version(#[from] VersionError),
    /// An entry's key is no JSON object.
    #[error("an entry of the change log has a malformed key {0}")]
    Key(String),
    /// An entry's operation is unknown.
    #[error("an entry of the change log has the unknown operation {0}")]
    Op(String),
}

/// Reads what changed after `from`, at most `limit` rows.
///
/// # Errors
/// [`ChangeLogError`].
pub fn changes_since(
    connection: &Connection,
    from: &StateVersion,
    limit: usize,
) -> Result<Changes, ChangeLogError> {
    let mut statement = connection.prepare_cached(
        r#"SELECT stateVersion, "table", rowKey, op FROM "_zero.changeLog2"
           WHERE stateVersion > ? ORDER BY stateVersion, pos"#,
    )?;
    let mut rows = statement.query([from.as_str()])?;
    let mut out: Vec<LoggedRow> = Vec::new();
    while let Some(row) = rows.next()? {
        let version =
            StateVersion::parse(row.get_ref(0)?.as_str().map_err(rusqlite::Error::from)?)?;
        let table = row.get_ref(1)?.as_str().map_err(rusqlite::Error::from)?;
        let op = match row.get_ref(3)?.as_str().map_err(rusqlite::Error::from)? {
            "s" => LogOp::Set,
            "d" => LogOp::Delete,
            "t" | "r" => return Ok(Changes::Everything { table: table.to_owned(), version }),
            other => return Err(ChangeLogError::Op(other.to_owned())),
        };
        if out.len() == limit {
            return Ok(Changes::TooMany);
        }
        let key = row.get_ref(2)?.as_str().map_err(rusqlite::Error::from)?;
        let key = serde_json::from_str(key).map_err(|_| ChangeLogError::Key(key.to_owned()))?;
        let table = match out.last() {
            Some(last) if &*last.table == table => last.table.clone(),
            _ => table.into(),
        };
        out.push(LoggedRow { version, table, key, op });
    }
    Ok(Changes::Rows(out))
}
