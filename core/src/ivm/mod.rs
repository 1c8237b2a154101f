//! Incremental view maintenance: plan → shared instance → subscription (design §4).
//!
//! Data enters as [`crate::change::Commit`]s and through a [`source::Source`] (a snapshot of the
//! replica), and leaves as [`delta::InstanceDelta`]s: the net change of each query between two
//! versions. Nothing but the state *after* a commit is visible, so the engine never replays
//! single changes: it finds every row whose membership may differ, evaluates those at the new
//! version, and emits the difference to what it holds.
//!
//! Invariants: a partition's resident rows are exactly the qualifying rows before its bound;
//! only its visible ones (the first `limit`) are emitted and counted; after an advance every
//! hydrated instance equals `Sync(Q, D)` of spec zql-ivm §6.2.

mod advance;
pub mod brute;
mod change_set;
pub mod delta;
pub mod describe;
mod dirty;
mod emit;
pub mod engine;
pub mod error;
mod garbage;
mod instance;
mod intern;
mod lead;
pub mod memory_source;
mod mutant;
mod parking;
mod partition;
pub mod plan;
#[cfg(any(test, feature = "testing"))]
pub mod proof;
mod propagate;
mod ranges;
pub mod reading;
mod registry;
mod remains;
mod route;
mod rows;
mod settle;
mod shape;
pub(crate) mod shards;
mod signature;
mod small_set;
pub mod source;
mod stack;
pub mod stats;
#[cfg(test)]
mod tests;
mod update;
mod watch;

#[cfg(test)]
impl engine::InstanceId {
    /// An id of no engine, for tests that stand in for one.
    pub(crate) fn for_tests(n: u64) -> Self {
        engine::InstanceId(n)
    }
}
