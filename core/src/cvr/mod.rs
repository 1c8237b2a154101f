//! The client view record (CVR): what the server knows that the clients of a group have.
//!
//! A CVR is a versioned account of one client group: its clients, the queries they desire, the
//! queries that are *got* (executed and delivered), and one record per row that any got query
//! references. A cookie names a version of it; a client that comes back with a cookie is brought
//! up to date by the patches since then.
//!
//! Everything here is pure. Data comes in as a [`Cvr`] snapshot (assembled by [`load`] from what a
//! store read), as client messages (the [`ConfigUpdater`]) and as rows of queries (the
//! [`QueryUpdater`]); it leaves as [`VersionedPatch`]es for the clients and as one [`GroupFlush`]
//! for the store. A store answers a flush with a verdict; only then may `pokeEnd` name the new
//! version.
//!
//! Invariants (spec: view-syncer-cvr §2.11):
//! - an updater bumps the version at most once, and every patch version it writes is ≤ the new
//!   version;
//! - a flush that would change nothing is no flush: the group keeps its old snapshot and version;
//! - row records are **not** part of a snapshot. A plain advancement writes them from engine deltas
//!   alone ([`advance`]); only adding or removing queries, and catching up late clients, read them.
//!
//! Snapshots are cheap to clone (copy on write), so an updater works on its own copy and a failed
//! flush needs no undo.

pub mod advance;
pub mod catchup;
mod config_update;
mod ids;
pub mod internal;
pub mod load;
mod model;
mod patch;
mod query_update;
mod row_id;
pub mod store;
mod ttl;

pub use crate::client_schema::ClientSchema;
pub use config_update::{ConfigUpdater, DesiredPut};
pub use ids::{ClientGroupId, ClientId, QueryHash};
pub use model::{
    Ast, Client, ClientState, Cvr, Query, QueryBody, RefCounts, RowRecord, merge_ref_counts,
};
pub use patch::{Patch, VersionedPatch};
pub(crate) use query_update::MAX_SORTED_ROWS;
pub use query_update::{Executed, QueryUpdater, ReceivedRow, RecordSlices, RowChanges, RowRecords};
pub use row_id::{RowIdentity, format_signature, parse_signature};
pub use store::{FlushTimes, GroupFlush, PreparedFlush};
pub use ttl::{
    DEFAULT_TTL_MS, FOREVER, MAX_TTL_MS, TtlClock, TtlTimer, clamp_ttl, compare_ttl,
    inactive_queries, is_expired, next_eviction, parse_ttl,
};

/// What an updater refuses. Each is a bug of the caller or a state that ends the group's service.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UpdateError {
    /// A query-driven update at a replica older than the CVR's (wire: `ClientNotFound`).
    #[error("Cannot sync from older replica: CVR={cvr}, DB={replica}")]
    OlderReplica {
        /// Replica version of the CVR.
        cvr: String,
        /// Replica version at hand.
        replica: String,
    },
    /// The engine's version is behind the CVR's: wait for the replica to catch up.
    #[error("replica at {state} is behind the CVR at {cvr}: wait for it to catch up")]
    ReplicaBehind {
        /// Version of the CVR.
        cvr: String,
        /// Version of the engine.
        state: String,
    },
    /// A row changed although nothing bumped the version before the poke started.
    #[error("Expected CVR version to have been bumped above original {orig} but it is {current}")]
    VersionNotBumped {
        /// Version of the snapshot.
        orig: String,
        /// Version of the update.
        current: String,
    },
    /// A client id was used for one of the server's own queries.
    #[error("Query ID {0} is reserved for internal use")]
    ReservedQuery(QueryHash),
    /// A query that the CVR does not hold.
    #[error("query {0} is not part of the CVR")]
    UnknownQuery(QueryHash),
    /// Desired queries of a client that has not joined.
    #[error("client {0} is not part of the CVR")]
    UnknownClient(ClientId),
    /// The engine says that a row entered the group's results, but gives no contents.
    #[error("row {0} is new to the group but comes without contents")]
    RowWithoutContents(String),
    /// The client schema contradicts the group's.
    #[error("{0}")]
    ClientSchema(#[from] crate::client_schema::ClientSchemaConflict),
}
