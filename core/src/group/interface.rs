//! What goes into a group and what comes out of it.

use std::sync::Arc;

use super::ConnId;
use super::context::{Connection, Credentials};
use super::early::EarlyRows;
use super::pending::SharedDelta;
use super::poke::{Frame, Growth, LargePoke};
use super::push::{OutgoingPush, Pushed};
use super::shared::Shared;
use crate::cvr::store::{
    CatchupPage, CatchupRange, CvrStoreError, Flushed, GroupFlush, Loaded, RowCursor, RowPage,
};
use crate::cvr::{ClientSchema, QueryHash, RowIdentity, TtlClock};
use crate::ivm::engine::{Budget, InstanceId};
use crate::ivm::plan::Occurrence;
use crate::ivm::reading::{ReadProgress, ReadRow, Reading};
use crate::json::RawJson;
use crate::protocol::custom_query::{TransformRequest, TransformResponse};
use crate::protocol::error::{ApiFailure, ErrorBody};
use crate::protocol::mutate::CleanUp;
use crate::protocol::up::Upstream;
use crate::row::{Row, RowRef};
use crate::schema::Schema;
use crate::version::{CvrVersion, StateVersion};
use crate::waste::Waste;

/// Something happened. The answers (`Admitted` … `Hydrated`) must come once per request, in any
/// order with the rest.
#[derive(Debug)]
pub enum Event {
    /// A socket passed its handshake and [`super::Group::admit`], and was told `connected`.
    Connected(Box<Connection>),
    /// Its next message (not `ping`, which never waits). The next one is read after
    /// [`Effect::MessageDone`].
    Message(ConnId, Box<Upstream>),
    /// The socket is gone, whoever closed it.
    Disconnected(ConnId),
    /// Answer to [`Effect::Enter`]: the group's turn to come up.
    Admitted,
    /// Answer to [`Effect::Load`].
    Loaded(Result<Box<Loaded>, CvrStoreError>),
    /// Answer to [`Effect::ReadRows`]: a page of the group's row records that are no tombstones.
    Rows(Result<RowPage, CvrStoreError>),
    /// Answer to [`Effect::CatchUp`].
    CaughtUp(Result<CatchupPage, CvrStoreError>),
    /// Answer to [`Effect::Flush`].
    Flushed(Result<Flushed, CvrStoreError>),
    /// Answer to [`Effect::AwaitRows`]: they are durable, or never will be.
    RowsWritten(Result<(), CvrStoreError>),
    /// Answer to [`Effect::Transform`].
    Transformed(Result<TransformResponse, ApiFailure>),
    /// Answer to [`Effect::Hydrate`]: one entry per query, delivered between two advances, when
    /// every instance is at [`World::version`] and all its deltas before were delivered.
    Hydrated(Vec<(QueryHash, Result<InstanceId, String>)>),
    /// Rows of a query of [`Effect::Hydrate`] that wanted them ([`Hydrate::early`]), before it is
    /// hydrated: some of them, perhaps twice, delivered between two advances.
    Early(QueryHash, EarlyRows),
    /// An advance changed an instance that the group is subscribed to. Followed by
    /// [`Event::Advanced`] when all of the advance were delivered.
    Delta(Arc<SharedDelta>),
    /// An instance failed for good (a value that cannot be delivered, say).
    InstanceFailed(InstanceId, String),
    /// The engine is at a new version. Only needed by groups with deltas or failures, and by those
    /// that [`super::Group::waits_for_version`].
    Advanced,
    /// Plans or permissions are void: rebuild and compare (spec: view-syncer-cvr §5.7).
    Reset(ResetReason),
    /// What became of a request to the mutate endpoint; for whoever is here now.
    Pushed(Box<Pushed>),
    /// Answer to [`Effect::Continue`], when others had a turn.
    Continue,
    /// Answer to [`Effect::Merge`], when others had a turn.
    Merge,
    /// A timer of [`Effect::SetTimer`] is due.
    Timer(Timer),
    /// Close the clients (without error) and stop, after the operation in flight.
    Drain,
}

/// Why queries are made anew.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ResetReason {
    /// A table's schema changed.
    SchemaChange,
    /// The deployed permissions changed.
    PermissionsChange,
    /// The replica was replaced by another one.
    ReplicaReplaced,
    /// The CVR references a row that the replica does not have (its table is gone, say): all
    /// queries are executed anew, and the records follow.
    LostRow,
}

impl ResetReason {
    /// The `reason` of logs and metrics.
    pub fn name(self) -> &'static str {
        match self {
            ResetReason::SchemaChange => "schema-change",
            ResetReason::PermissionsChange => "permissions-change",
            ResetReason::ReplicaReplaced => "replica-replaced",
            ResetReason::LostRow => "lost-row",
        }
    }
}

/// One-shot timers; setting one again replaces it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Timer {
    /// A query's TTL ends.
    Expiry,
    /// The TTL clock is to be stored.
    TtlClock,
    /// Credentials are to be validated again, or queries transformed again.
    Maintenance,
    /// Nobody is connected: stop?
    Idle,
}

/// Something to be done.
#[derive(Debug)]
pub enum Effect {
    /// Send these frames, in order. A socket that is gone or too slow is the executor's business.
    Send(ConnId, Arc<[Frame]>),
    /// Send this poke as the socket takes it, before everything that is sent later.
    SendLarge(ConnId, Box<LargePoke>),
    /// Go on with the large poke that was open when it was sent.
    GrowLarge(ConnId, Growth),
    /// Nobody needs this any more: drop a little of it at a time.
    LetGo(Waste),
    /// Send the error, ahead of everything that still waits for this socket, then close it.
    Fail(ConnId, Box<ErrorBody>),
    /// Close the socket without an error; the reason is for the log.
    Close(ConnId, &'static str),
    /// The connection's message was handled: its next one may come.
    MessageDone(ConnId),
    /// The group has to come up (its CVR to be loaded, its queries to be executed): send
    /// [`Event::Admitted`] when there is a place for it, in the order of asking.
    Enter,
    /// The group gives its place to the next one.
    Leave {
        /// It serves its clients. Otherwise it waits for the app or a newer replica, or nobody is
        /// there: it asks for another place when it goes on, as the one that it was.
        up: bool,
    },
    /// Load the group's CVR; `connect_ms` is the time of its latest connection.
    Load {
        /// See [`crate::cvr::store::FlushTimes::connect_ms`].
        connect_ms: f64,
    },
    /// Read a page of all live row records of the group: those that mention one of `queries`.
    ReadRows {
        /// The group's version; anything else in the store is a concurrent modification.
        current: CvrVersion,
        /// Every query of the group that was executed.
        queries: Vec<QueryHash>,
        /// The page before ended here.
        from: Option<RowCursor>,
    },
    /// Read a page of what late clients missed, without the rows that mention one of `except`.
    CatchUp {
        /// The range.
        range: CatchupRange,
        /// Queries whose rows come with the same poke anyway.
        except: Vec<QueryHash>,
        /// The page before ended here.
        from: Option<RowCursor>,
    },
    /// Answer when all rows of the group that follow their metadata are written.
    AwaitRows,
    /// Make an update durable.
    Flush(Box<GroupFlush>),
    /// Store the TTL clock; failures are logged only, nothing answers.
    StoreTtlClock {
        /// The clock.
        clock: TtlClock,
        /// Wall time.
        now_ms: f64,
    },
    /// Ask the query endpoint with these credentials. Without queries: validate them.
    Transform {
        /// Whose.
        credentials: Arc<Credentials>,
        /// What.
        queries: Vec<TransformRequest>,
    },
    /// Send this to the mutate endpoint, after what the group pushed before. The connection's
    /// message is done (as by [`Effect::MessageDone`]) when there is room for its next push.
    Push(Box<OutgoingPush>),
    /// Ask the mutate endpoint to forget results; failures are logged only, nothing answers.
    CleanUp {
        /// Whose.
        credentials: Arc<Credentials>,
        /// Which.
        clean_up: CleanUp,
    },
    /// Subscribe to the instances of these queries and hydrate them.
    Hydrate(Vec<Hydrate>),
    /// Take a subscription back.
    Release(InstanceId),
    /// There is more to compute: send [`Event::Continue`] after everybody else had a turn.
    Continue,
    /// There is more to merge: send [`Event::Merge`] after everybody else had a turn.
    Merge,
    /// Send [`Event::Timer`] after this many milliseconds; `None` cancels.
    SetTimer(Timer, Option<f64>),
    /// The group is finished: forget it.
    Stop,
    /// Worth a line in the log.
    Note(Note),
}

/// A query to be executed.
#[derive(Debug, Clone)]
pub struct Hydrate {
    /// The group's id for it.
    pub query: QueryHash,
    /// What to run.
    pub transformed: Transformed,
    /// Names the identity keys of rows.
    pub client_schema: Option<Arc<ClientSchema>>,
    /// If it turns out to have many rows, their group takes them ([`Event::Early`]) before the
    /// last one is there.
    pub early: bool,
}

/// An executable query.
#[derive(Debug, Clone)]
pub struct Transformed {
    /// The query with permissions and parameters.
    pub ast: Arc<crate::zql::ast::Ast>,
    /// Its hash.
    pub hash: Arc<str>,
}

/// Log lines of a group, by level.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Note {
    /// Ordinary events.
    Info(String),
    /// Somebody should look.
    Warn(String),
    /// A bug or a broken store.
    Error(String),
}

/// Takes what is told of a row of an instance.
pub type VisitRow<'a> = dyn FnMut(ReadRow<'_>) + 'a;

/// What a group sees of its executor, at one version of the engine.
pub trait World {
    /// The version that every hydrated instance is at.
    fn version(&self) -> &StateVersion;

    /// The initial sync that the replica comes from.
    fn replica_version(&self) -> &StateVersion;

    /// The replica's tables at [`World::version`].
    fn schema(&self) -> &Arc<Schema>;

    /// Makes a client's or internal query executable: read permissions and claims for the one,
    /// nothing for the other.
    ///
    /// # Errors
    /// What is wrong with the query, for its `transformError`.
    fn transform(
        &self,
        ast: &crate::cvr::Ast,
        internal: bool,
        credentials: Option<&Credentials>,
    ) -> Result<Transformed, String>;

    /// Makes the endpoint's answer for a custom query executable: no permissions are added.
    ///
    /// # Errors
    /// What is wrong with the AST, for the query's `transformError`.
    fn custom(&self, ast: &RawJson) -> Result<Transformed, String>;

    /// Goes on reading the rows of an instance, until the budget is spent (a unit per row) or all
    /// are told as of [`World::version`].
    ///
    /// # Errors
    /// The instance failed or is unknown.
    fn read(
        &mut self,
        reading: &Reading,
        budget: &mut Budget,
        visit: &mut VisitRow<'_>,
    ) -> Result<ReadProgress, String>;

    /// Occurrences of a row (as it is at [`World::version`]) in an instance.
    ///
    /// # Errors
    /// As [`World::read`].
    fn count(&self, instance: InstanceId, id: &RowIdentity, row: &Row) -> Result<u64, String>;

    /// Whether rows of this table can be in an instance's result; saves [`World::count`].
    fn reads(&self, instance: InstanceId, table: &str) -> bool;

    /// What the groups of this executor share: one, for as long as it lives.
    fn shared(&mut self) -> &mut Shared;

    /// The row-set signature of an instance.
    ///
    /// # Errors
    /// As [`World::read`].
    fn signature(&self, instance: InstanceId) -> Result<u64, String>;

    /// How often a row can be in an instance's result; [`Occurrence::Many`] if nothing is known.
    fn occurrence(&self, instance: InstanceId) -> Occurrence;

    /// A row as it is at [`World::version`], by its identity. Groups ask through [`Shared`].
    ///
    /// # Errors
    /// The table or a key column is gone, or the replica cannot be read.
    fn read_row(&mut self, id: &RowIdentity) -> Result<Option<RowRef>, String>;
}
