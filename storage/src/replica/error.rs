//! What can go wrong with a replica file, and whether a new initial sync cures it.

use std::path::{Path, PathBuf};

use zeroring_core::version::{StateVersion, VersionError};

/// A failure of the replica.
#[derive(Debug, thiserror::Error)]
pub enum ReplicaError {
    /// SQLite refused something.
    #[error("replica {path}: {doing}: {source}")]
    Sqlite {
        /// The file.
        path: PathBuf,
        /// What was being done.
        doing: String,
        /// The cause.
        #[source]
        source: rusqlite::Error,
    },
    /// The file system refused something.
    #[error("replica {path}: {doing}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What was being done.
        doing: &'static str,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// The file is there but cannot be used; it must be deleted and synced anew.
    #[error("replica {path} cannot be used: {reason}. It must be deleted and synced anew.")]
    Unusable {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: ResetReason,
    },
    /// The stream speaks of a table or column that the replica does not have, or the reverse.
    #[error(
        "table \"{table}\": {problem}. The published schema changed: the replica must be synced anew."
    )]
    SchemaMismatch {
        /// Replica name of the table.
        table: String,
        /// What differs.
        problem: String,
    },
    /// An update or delete cannot be matched to a row.
    #[error(
        "table \"{table}\" is without a PRIMARY KEY or UNIQUE INDEX over NOT NULL columns and \
         Postgres did not send the whole old row: an {op} cannot be replicated. Add a key, or set \
         REPLICA IDENTITY FULL."
    )]
    NoKey {
        /// Replica name of the table.
        table: String,
        /// `update` or `delete`.
        op: &'static str,
    },
    /// A commit does not continue the replica's version.
    #[error("the change stream is out of order: {0}")]
    OutOfOrder(String),
    /// A stored version is no version.
    #[error("replica {path}: {source}")]
    BadVersion {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: VersionError,
    },
    /// A value cannot be read as its column's type.
    #[error("{0}")]
    UnsupportedValue(String),
    /// SQLite was built without what the server needs.
    #[error("SQLite was built without {0}: set LIBSQLITE3_FLAGS as in .cargo/config.toml")]
    MissingFeature(&'static str),
}

/// Why an existing file must be replaced by a new initial sync (spec: replication §1.8 #11, §2.1,
/// §6.3).
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ResetReason {
    /// Left behind by an initial sync that did not finish.
    #[error("its initial sync did not finish")]
    Unfinished,
    /// The header is not that of an SQLite database.
    #[error("it is not an SQLite database")]
    NotADatabase,
    /// Journal mode wal2, which only the original's SQLite can read.
    #[error("it is in journal mode wal2, which stock SQLite cannot read")]
    Wal2,
    /// SQLite found it corrupt.
    #[error("it is corrupt ({0})")]
    Corrupt(String),
    /// Written by a version that is too old to be migrated.
    #[error("its schema version {0} is too old (the oldest that can be migrated is {min})", min = super::OLDEST_MIGRATED_VERSION)]
    TooOld(i64),
    /// Written by a newer server that does not allow this one to use it.
    #[error("its schema demands version {0} of the server's schema, this server has {own}", own = super::REPLICA_SCHEMA_VERSION)]
    TooNew(i64),
    /// An internal table or row is missing or malformed.
    #[error("{0}")]
    Malformed(String),
}

impl ReplicaError {
    /// Whether deleting the file and syncing anew is the cure.
    pub fn needs_resync(&self) -> bool {
        match self {
            ReplicaError::Unusable { .. }
            | ReplicaError::SchemaMismatch { .. }
            | ReplicaError::BadVersion { .. } => true,
            ReplicaError::Sqlite { source, .. } => is_corruption(source),
            _ => false,
        }
    }

    /// Wraps an SQLite error with what was being done.
    pub(crate) fn sqlite(
        path: &Path,
        doing: impl Into<String>,
    ) -> impl FnOnce(rusqlite::Error) -> ReplicaError {
        let path = path.to_owned();
        let doing = doing.into();
        move |source| ReplicaError::Sqlite { path, doing, source }
    }

    /// Wraps an I/O error with what was being done.
    pub(crate) fn io(
        path: &Path,
        doing: &'static str,
    ) -> impl FnOnce(std::io::Error) -> ReplicaError {
        let path = path.to_owned();
        move |source| ReplicaError::Io { path, doing, source }
    }

    /// The version text of a file is wrong.
    pub(crate) fn version(path: &Path, text: &str) -> Result<StateVersion, ReplicaError> {
        StateVersion::parse(text)
            .map_err(|source| ReplicaError::BadVersion { path: path.to_owned(), source })
    }
}

/// True if SQLite says that the file itself is broken.
pub(crate) fn is_corruption(error: &rusqlite::Error) -> bool {
    matches!(
        error.sqlite_error_code(),
        Some(rusqlite::ErrorCode::DatabaseCorrupt | rusqlite::ErrorCode::NotADatabase)
    )
}
