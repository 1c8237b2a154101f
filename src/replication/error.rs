//! Why replication stops or starts over.

use zeroring_core::version::VersionError;
use zeroring_net::pg::pgoutput::PgOutputError;
use zeroring_net::pg::{PgError, SqlState};
use zeroring_storage::replica::ReplicaError;

use super::types::BadValue;
use super::upstream::UpstreamError;

/// Why the core gave up, or what it recovers from.
#[derive(Debug, thiserror::Error)]
pub enum ReplicationError {
    /// The thread could not be started.
    #[error("the replication thread could not be started: {0}")]
    Thread(std::io::Error),
    /// Upstream cannot be used.
    #[error(transparent)]
    Upstream(#[from] UpstreamError),
    /// The replica file cannot be used.
    #[error(transparent)]
    Replica(#[from] ReplicaError),
    /// A message of the stream cannot be read.
    #[error("the replication stream cannot be read: {0}")]
    Stream(#[from] PgOutputError),
    /// A value of the stream or a copy cannot be read.
    #[error("column {table}.{column}: {cause}")]
    Value {
        /// Upstream name of the table.
        table: String,
        /// Column.
        column: String,
        /// Why.
        cause: BadValue,
    },
    /// The stream cannot be continued; a new initial sync is the answer (if it is allowed:
    /// `ZERO_AUTO_RESET`).
    #[error("replication cannot continue from LSN {lsn}: {reason}")]
    ResetRequired {
        /// Where.
        lsn: String,
        /// Why.
        reason: String,
    },
    /// Another server made a newer replica during the initial sync: not a failure.
    #[error("another server made a newer replica during this one's initial sync")]
    Superseded,
    /// Stopped while working: not a failure.
    #[error("stopped")]
    Stopped,
    /// The core panicked: a bug.
    #[error("the replication thread panicked; this is a bug")]
    Panicked,
}

impl From<PgError> for ReplicationError {
    fn from(error: PgError) -> Self {
        ReplicationError::Upstream(error.into())
    }
}

impl From<VersionError> for ReplicationError {
    fn from(error: VersionError) -> Self {
        ReplicationError::Upstream(UpstreamError::Malformed {
            what: "a version",
            cause: error.to_string(),
        })
    }
}

/// What an error calls for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Remedy {
    /// Connect again after a while.
    Retry,
    /// Sync anew.
    Resync,
    /// Nothing that we can do.
    GiveUp,
}

impl ReplicationError {
    /// What the error calls for.
    pub fn remedy(&self) -> Remedy {
        match self {
            ReplicationError::Upstream(e) => upstream_remedy(e),
            ReplicationError::Replica(e) if e.needs_resync() => Remedy::Resync,
            ReplicationError::Stream(_)
            | ReplicationError::Value { .. }
            | ReplicationError::ResetRequired { .. } => Remedy::Resync,
            ReplicationError::Replica(_)
            | ReplicationError::Thread(_)
            | ReplicationError::Superseded
            | ReplicationError::Stopped
            | ReplicationError::Panicked => Remedy::GiveUp,
        }
    }
}

fn upstream_remedy(error: &UpstreamError) -> Remedy {
    match error {
        UpstreamError::AutoReset(_) => Remedy::Resync,
        UpstreamError::SlotWaits { .. } => Remedy::Retry,
        UpstreamError::Pg(e) => match e {
            PgError::Config(_) | PgError::Auth { .. } | PgError::Tls { .. } => Remedy::GiveUp,
            PgError::Server(e) => server_remedy(e.code),
            PgError::Decode { .. } => Remedy::GiveUp,
            PgError::Connect { .. }
            | PgError::Io(_)
            | PgError::Closed
            | PgError::Timeout(_)
            | PgError::Protocol(_)
            | PgError::Broken => Remedy::Retry,
        },
        UpstreamError::Unsupported(_)
        | UpstreamError::Invalid(_)
        | UpstreamError::Malformed { .. } => Remedy::GiveUp,
    }
}

fn server_remedy(code: SqlState) -> Remedy {
    // 28: authentication; 3D: no such database; 42: privileges, missing objects, syntax.
    match code.as_str().get(..2) {
        Some("28" | "3D" | "42") => Remedy::GiveUp,
        _ => Remedy::Retry,
    }
}
