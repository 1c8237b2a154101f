//! Numbers of an executor's groups.

/// Counters for `/statz`.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Counters {
    pub(super) connections_total: u64,
    pub(super) messages: u64,
    pub(super) frames: u64,
    pub(super) slow_clients: u64,
    pub(super) large_pokes: u64,
    /// Rows that went out while their query was being hydrated.
    pub(super) early_rows: u64,
    /// The most bytes that waited for one socket.
    pub(super) most_queued_bytes: u64,
    pub(super) flushes: u64,
    pub(super) flush_batches: u64,
    pub(super) advances: u64,
    pub(super) resets: u64,
    pub(super) group_failures: u64,
}
