//! A client group as a state machine: events in, effects out.
//!
//! A group is the unit of everything clients can see: one CVR, one sequence of versions, one set
//! of subscriptions to shared query instances, any number of live connections (tabs). The executor
//! that owns it feeds [`Event`]s and carries out [`Effect`]s; what the group has to look at
//! meanwhile (the engine's version, schema, instance rows) it sees through [`World`].
//! Nothing here does I/O, reads a clock or blocks.
//!
//! ```text
//!  sockets ── Connected, Message, Disconnected ─┐         ┌─ Send, Fail, Close, MessageDone ─▶ sockets
//!  engine ─── Deltas, Advanced, Early, Hydrated ┤  Group  ├─ Hydrate, Release ──────────────▶ engine
//!  CVR store ─ Loaded, Rows, CaughtUp, Flushed, │         ├─ Load, ReadRows, CatchUp, Flush,
//!              RowsWritten ─────────────────────┤         │  AwaitRows ─────────────────────▶ CVR store
//!  endpoint ── Transformed ─────────────────────┤         ├─ Transform ─────────────────────▶ query endpoint
//!  endpoint ── Pushed ──────────────────────────┤         ├─ Push, CleanUp ─────────────────▶ mutate endpoint
//!  clock ───── Timer, Drain ────────────────────┘         └─ SetTimer, Stop ────────────────▶ executor
//! ```
//!
//! Invariants (spec: sync-protocol §4.4, §5; view-syncer-cvr §4, §5):
//! - **At most one operation is in flight** ([`op`]): bringing the group up, a client's message, an
//!   advance, an eviction, maintenance. It may wait for the store, the endpoint or the engine in
//!   turn; everything else waits in the queue, which holds at most one message per connection.
//! - **Durable before visible**: the end of a poke, with its cookie, goes out after the store's
//!   verdict about the flush that it belongs to. Nearly all go out as a whole then; only rows of a
//!   large new result go ahead ([`early`]), in a poke that is cancelled if anything fails.
//! - **Rows may follow** a flush ([`Flushed::rows_follow`](crate::cvr::store::Flushed)): the store
//!   keeps reads waiting for them, and the group stays until they are written, so that nobody else
//!   finds it half written. If they cannot be written, the group fails.
//! - **An update is made of what was there at one version of the engine**: rows of new instances and
//!   the deltas of the old ones belong to one version, so last mutation ids, mutation results and
//!   rows of a transaction are never apart. Whatever else is needed (row records, catch-up patches)
//!   is fetched before; the work itself is sliced ([`compute`]).
//! - **Per client**: `baseCookie` of a poke is the cookie of the poke before; only clients that are
//!   exactly at the CVR's version get advances; a client gets nothing before its `initConnection`
//!   was validated, then at least one poke.
//! - **Scope of an error**: what a client's message asks for fails that client; shared work fails
//!   the group. After a failed flush nothing in memory is trusted: the CVR is loaded and the
//!   queries are compared anew.

mod bring_up;
mod by_conn;
mod compute;
mod config;
mod context;
mod deliver;
mod discard;
mod early;
mod encode;
mod held;
mod interface;
mod machine;
mod maintenance;
mod op;
mod pending;
mod poke;
mod push;
mod shared;
mod sync;
mod transform_cache;
mod unread;

use std::sync::Arc;

pub use context::{Connection, Credentials, ServerUser, Target};
pub use early::EarlyRows;
pub use interface::{
    Effect, Event, Hydrate, Note, ResetReason, Timer, Transformed, VisitRow, World,
};
pub use machine::{Group, KEEP_ALIVE_MS};
pub use pending::{SharedDelta, SharedRow};
pub use poke::{Frame, Growth, LargePoke, NextFrames};
pub use push::{OutgoingPush, Pushed};
pub use shared::{Shared, SharedFrames, SharedRows};

use crate::cvr::internal::ShardTables;

/// Number of a socket: unique on its executor for the life of the process, rising.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ConnId(pub u64);

/// Settings that all groups of a server share.
#[derive(Debug, Clone)]
pub struct Settings {
    /// `ZERO_APP_ID`.
    pub app_id: Arc<str>,
    /// `ZERO_SHARD_NUM`.
    pub shard_num: u32,
    /// The shard's internal tables.
    pub tables: ShardTables,
    /// A query endpoint is configured.
    pub has_query_endpoint: bool,
    /// A mutate endpoint is configured.
    pub has_mutate_endpoint: bool,
    /// `ZERO_ENABLE_CRUD_MUTATIONS`.
    pub crud_mutations: bool,
    /// Why clients cannot send auth tokens; `None`: they can, the endpoints judge them.
    pub refuses_tokens: Option<Arc<str>>,
    /// `ZERO_AUTH_REVALIDATE_INTERVAL_SECONDS`, as milliseconds.
    pub revalidate_ms: f64,
    /// `ZERO_AUTH_RETRANSFORM_INTERVAL_SECONDS`, as milliseconds.
    pub retransform_ms: f64,
}

#[cfg(test)]
mod tests;
