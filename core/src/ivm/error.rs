//! What can go wrong in the engine, by who suffers: one instance, or the whole advance.

use super::source::SourceError;
use crate::version::StateVersion;

/// An instance failed or cannot answer. Only its subscribers are concerned.
#[derive(Debug, Clone, thiserror::Error)]
pub enum EngineError {
    /// Reading the replica failed.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// The instance is not (or no longer) in this engine.
    #[error("the query instance is gone: it was unsubscribed by its last subscriber")]
    UnknownInstance,
    /// Rows were asked for before hydration or in the middle of an advance.
    #[error("the query is not at the head yet: finish its hydration and the running advance first")]
    NotReady,
    /// The replica's schema changed under the plan and nobody gave the instance a new plan.
    #[error("table \"{0}\" changed its schema: the query must be compiled anew")]
    SchemaChanged(String),
    /// The plan could not be made anew after a schema change.
    #[error("{0}")]
    Rebind(String),
    /// The engine holds as many instances as it may.
    #[error("this executor already serves {0} different queries, which is its limit")]
    TooManyInstances(usize),
    /// A reader's snapshot is not at the version that the engine is at.
    #[error("the replica snapshot is at version {snapshot}, the engine at {engine}")]
    SnapshotMismatch {
        /// Version of the snapshot.
        snapshot: StateVersion,
        /// Version of the engine.
        engine: StateVersion,
    },
    /// An internal invariant does not hold; the instance is re-hydrated.
    #[error("internal invariant violated: {0}")]
    Invariant(&'static str),
}

/// An advance cannot start or go on; the engine stays at its version.
#[derive(Debug, Clone, thiserror::Error)]
pub enum AdvanceError {
    /// The commits do not follow the engine's version: reset instead.
    #[error("commit {commit} follows version {previous}, but the engine is at {engine}: reset it")]
    ChainBroken {
        /// Version of the commit that does not fit.
        commit: StateVersion,
        /// The version before it.
        previous: StateVersion,
        /// Version of the engine (or of the commit before).
        engine: StateVersion,
    },
    /// `begin_advance` or `begin_reset` during an advance.
    #[error("an advance is already running: step it to its end first")]
    Busy,
    /// `advance_step` or `rebind` without an advance.
    #[error("no advance is running")]
    Idle,
    /// The snapshot is not at the version that the advance leads to.
    #[error("the replica snapshot is at version {snapshot}, the advance leads to {target}")]
    SnapshotMismatch {
        /// Version of the snapshot.
        snapshot: StateVersion,
        /// Version that the advance leads to.
        target: StateVersion,
    },
}
