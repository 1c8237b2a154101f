//! Errors of the Postgres client.

use std::fmt;
use std::io;
use std::time::Duration;

/// A five-character SQLSTATE.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct SqlState([u8; 5]);

impl SqlState {
    /// `42501`: the role lacks a privilege.
    pub const INSUFFICIENT_PRIVILEGE: SqlState = SqlState(*b"42501");
    /// `42P01`: no such table.
    pub const UNDEFINED_TABLE: SqlState = SqlState(*b"42P01");
    /// `42703`: no such column.
    pub const UNDEFINED_COLUMN: SqlState = SqlState(*b"42703");
    /// `42704`: no such object (slot, publication, …).
    pub const UNDEFINED_OBJECT: SqlState = SqlState(*b"42704");
    /// `42710`: an object of this name exists (slot, publication, …).
    pub const DUPLICATE_OBJECT: SqlState = SqlState(*b"42710");
    /// `53400`: a configuration limit, e.g. all replication slots are in use.
    pub const CONFIGURATION_LIMIT_EXCEEDED: SqlState = SqlState(*b"53400");
    /// `55000`: e.g. the slot was invalidated.
    pub const OBJECT_NOT_IN_PREREQUISITE_STATE: SqlState = SqlState(*b"55000");
    /// `55006`: e.g. another process streams from the slot.
    pub const OBJECT_IN_USE: SqlState = SqlState(*b"55006");
    /// `55P03`: a lock was not to be had in time.
    pub const LOCK_NOT_AVAILABLE: SqlState = SqlState(*b"55P03");
    /// `57P01`: an administrator (or another replication manager) terminated the session.
    pub const ADMIN_SHUTDOWN: SqlState = SqlState(*b"57P01");
    /// `40001`: the transaction could not be serialised; try it again.
    pub const SERIALIZATION_FAILURE: SqlState = SqlState(*b"40001");
    /// `40P01`: deadlock; try again.
    pub const DEADLOCK_DETECTED: SqlState = SqlState(*b"40P01");
    /// `23505`: a unique index refused the row.
    pub const UNIQUE_VIOLATION: SqlState = SqlState(*b"23505");

    /// The state of this text, `?????` if it is not five ASCII characters.
    pub fn new(text: &str) -> SqlState {
        match <[u8; 5]>::try_from(text.as_bytes()) {
            Ok(code) if code.is_ascii() => SqlState(code),
            _ => SqlState(*b"?????"),
        }
    }

    /// The five characters.
    pub fn as_str(&self) -> &str {
        std::str::from_utf8(&self.0).unwrap_or("?????")
    }
}

impl fmt::Display for SqlState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}
impl fmt::Debug for SqlState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// An `ErrorResponse` of the server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerError {
    /// `ERROR`, `FATAL` or `PANIC`.
    pub severity: String,
    /// SQLSTATE.
    pub code: SqlState,
    /// Primary message.
    pub message: String,
    /// DETAIL.
    pub detail: Option<String>,
    /// HINT.
    pub hint: Option<String>,
    /// CONTEXT (`where`).
    pub context: Option<String>,
}

impl fmt::Display for ServerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {} (SQLSTATE {})", self.severity, self.message, self.code)?;
        if let Some(detail) = &self.detail {
            write!(f, "; {detail}")?;
        }
        if let Some(hint) = &self.hint {
            write!(f, "; hint: {hint}")?;
        }
        if let Some(context) = &self.context {
            write!(f, "; in {context}")?;
        }
        Ok(())
    }
}

impl std::error::Error for ServerError {}

/// What can go wrong between us and a Postgres server.
#[derive(Debug, thiserror::Error)]
pub enum PgError {
    /// The connection string cannot be used. It is not shown: it may hold a password.
    #[error("the Postgres connection string is invalid: {0}")]
    Config(String),
    /// No TCP connection.
    #[error("could not connect to Postgres at {address}: {cause}")]
    Connect {
        /// Host and port.
        address: String,
        /// The last attempt's error.
        cause: io::Error,
    },
    /// TLS could not be set up.
    #[error("TLS to Postgres at {address} failed: {cause}")]
    Tls {
        /// Host and port.
        address: String,
        /// Why.
        cause: String,
    },
    /// The server wants a way of authentication that we do not have, or a secret is missing.
    #[error("could not authenticate to Postgres as {user:?}: {cause}")]
    Auth {
        /// Role.
        user: String,
        /// Why.
        cause: String,
    },
    /// The server answered with an error. The session is usable unless it is FATAL.
    #[error("Postgres: {0}")]
    Server(Box<ServerError>),
    /// The connection broke.
    #[error("the connection to Postgres broke: {0}")]
    Io(#[from] io::Error),
    /// The server closed the connection.
    #[error("Postgres closed the connection")]
    Closed,
    /// Nothing arrived for too long. The session cannot be used any more.
    #[error("Postgres did not answer within {0:?}")]
    Timeout(Duration),
    /// The server said something that the protocol does not allow here.
    #[error("unexpected data from Postgres: {0}")]
    Protocol(String),
    /// A value is not of the type asked for.
    #[error("column {column} of a Postgres result: {cause}")]
    Decode {
        /// Column name, or its number.
        column: String,
        /// Why.
        cause: String,
    },
    /// An earlier failure, or a result not read to its end, left the session unusable.
    #[error("this Postgres session is unusable after an earlier error; connect again")]
    Broken,
}

impl PgError {
    /// SQLSTATE if the server reported the error.
    pub fn code(&self) -> Option<SqlState> {
        match self {
            PgError::Server(e) => Some(e.code),
            _ => None,
        }
    }

    /// The server's error has this SQLSTATE.
    pub fn is(&self, code: SqlState) -> bool {
        self.code() == Some(code)
    }

    pub(crate) fn protocol(what: impl Into<String>) -> PgError {
        PgError::Protocol(what.into())
    }
}
