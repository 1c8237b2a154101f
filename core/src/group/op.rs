//! The operation in flight: what asked for it, and what it waits for.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::ConnId;
use super::compute::Computing;
use super::config::ConfigChange;
use super::context::Credentials;
use super::deliver::Missed;
use super::encode::Encoding;
use super::held::Taking;
use super::interface::{Effect, Note, Transformed};
use super::poke::Poke;
use crate::cvr::store::CvrStoreError;
use crate::cvr::{ClientId, Cvr, QueryHash, RowRecords, UpdateError};
use crate::ivm::engine::InstanceId;
use crate::protocol::custom_query::ErroredQuery;
use crate::protocol::error::{ErrorBody, ErrorKind};
use crate::protocol::up::{InitConnection, QueryOp};

/// Whose error a failure is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Trigger {
    /// A client's message: that client's.
    Message(ConnId),
    /// Periodic check of a connection's credentials.
    Revalidate(ConnId),
    /// Periodic transform of all queries with this connection's credentials.
    Retransform(ConnId),
    /// Shared work: the group's.
    Shared,
}

impl Trigger {
    /// The connection whose credentials count, if one in particular.
    pub(super) fn conn(self) -> Option<ConnId> {
        match self {
            Trigger::Message(c) | Trigger::Revalidate(c) | Trigger::Retransform(c) => Some(c),
            Trigger::Shared => None,
        }
    }
}

/// What is to be done.
#[derive(Debug)]
pub(super) enum Task {
    Init {
        conn: ConnId,
        init: Box<InitConnection>,
    },
    Change {
        conn: ConnId,
        ops: Vec<QueryOp>,
    },
    Delete {
        conn: ConnId,
        clients: Vec<String>,
    },
    /// A change of configuration that met a CVR that another server had written to.
    ChangeAgain(Box<ConfigChange>),
    UpdateAuth {
        conn: ConnId,
        token: String,
    },
    BringUp,
    Advance,
    Evict,
    Revalidate {
        conn: ConnId,
    },
    Retransform,
}

/// An operation that waits.
#[derive(Debug)]
pub(super) struct Op {
    pub(super) trigger: Trigger,
    pub(super) stage: Stage,
}

/// What for.
#[derive(Debug)]
pub(super) enum Stage {
    /// A place among the groups that come up; then the task begins.
    Entering(Task),
    /// The CVR; then the task begins.
    Loading(Task),
    /// The endpoint's opinion about credentials.
    Validating { revision: u32, then: AfterValidation },
    /// The store, for a change of configuration.
    FlushingConfig(Box<FlushingConfig>),
    /// The endpoint, for queries that might be attached without any work.
    TransformingUnchanged { asked: Asked },
    /// The engine, for these.
    HydratingUnchanged { wanted: Vec<(QueryHash, Transformed)> },
    /// The endpoint, for custom queries.
    Transforming { sync: Box<Sync>, asked: Asked },
    /// The store: the next live row records.
    ReadingRows(Box<Sync>),
    /// The store: the next of what late clients missed.
    CatchingUp(Box<Sync>),
    /// Its next turn, to read on what the rows that were missed are now.
    ReadingMissed(Box<Sync>),
    /// The engine: the rows of added queries.
    Hydrating(Box<Sync>),
    /// Its next turn, to take the rows of added queries on.
    Taking { sync: Box<Sync>, instances: BTreeMap<QueryHash, InstanceId>, taking: Box<Taking> },
    /// Its next turn, to compute on.
    Computing(Box<Computing>),
    /// Its next turn, to encode on.
    Encoding(Box<Encoding>),
    /// The store, for results.
    Flushing(Box<Flushing>),
}

impl Stage {
    /// The app's endpoint takes as long as it likes.
    pub(super) fn waits_for_app(&self) -> bool {
        matches!(
            self,
            Stage::Validating { .. }
                | Stage::TransformingUnchanged { .. }
                | Stage::Transforming { .. }
        )
    }
}

/// What comes after credentials were found good.
#[derive(Debug)]
pub(super) enum AfterValidation {
    Init(Box<InitConnection>),
    /// Transform everything anew with the credentials.
    Sync,
    Nothing,
}

/// A request to the endpoint under way.
#[derive(Debug)]
pub(super) struct Asked {
    /// Whose credentials, and their revision then.
    pub(super) conn: ConnId,
    pub(super) revision: u32,
    pub(super) credentials: Arc<Credentials>,
    pub(super) queries: Vec<QueryHash>,
}

#[derive(Debug)]
pub(super) struct FlushingConfig {
    pub(super) cvr: Cvr,
    pub(super) poke: Poke,
    pub(super) then: AfterConfig,
    pub(super) change: ConfigChange,
}

/// What a configuration change is followed by.
#[derive(Debug)]
pub(super) struct AfterConfig {
    pub(super) mode: Mode,
    /// Clients to acknowledge as deleted.
    pub(super) ack: Option<Vec<String>>,
}

/// Which custom queries are transformed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mode {
    /// All of them: the credentials are new, or may have changed meaning.
    All,
    /// Those that do not run.
    Missing,
}

/// Bringing what runs in line with what the CVR wants (spec: view-syncer-cvr §5.6).
#[derive(Debug)]
pub(super) struct Sync {
    pub(super) mode: Mode,
    pub(super) ack: Option<Vec<String>>,
    /// Queries that failed, for their clients; they are removed.
    pub(super) errored: Vec<ErroredQuery>,
    /// Executable queries, in the order in which they are executed.
    pub(super) transformed: Vec<(QueryHash, Transformed)>,
    pub(super) additions: Vec<(QueryHash, Transformed)>,
    pub(super) removals: Vec<QueryHash>,
    pub(super) missed: Missed,
    pub(super) records: RowRecords,
    pub(super) records_read: bool,
    /// Rows that are being hydrated may go out ([`super::early`]).
    pub(super) early: bool,
    /// Ends the bring-up of the group.
    pub(super) bring_up: bool,
    pub(super) recipients: Recipients,
}

#[derive(Debug)]
pub(super) struct Flushing {
    /// The snapshot after; `None` if nothing changed.
    pub(super) cvr: Option<Cvr>,
    pub(super) poke: Poke,
    /// The end of the poke that is open, if one is.
    pub(super) end: Poke,
    pub(super) recipients: Recipients,
    pub(super) ack: Option<Vec<String>>,
    pub(super) bring_up: bool,
}

/// Who gets a poke.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Recipients {
    /// Every active client, late ones included; a first poke is forced.
    All,
    /// Active clients exactly at the CVR's version before.
    AtHead,
}

/// What a step led to.
#[derive(Debug)]
pub(super) enum Step {
    Wait(Stage),
    Done,
}

/// Why an operation ended early.
#[derive(Debug)]
pub(super) struct Failure {
    pub(super) error: Box<ErrorBody>,
    /// Memory and store may disagree: load and compare anew.
    pub(super) distrust: bool,
    /// Another server wrote to the CVR since it was loaded here.
    pub(super) overtaken: bool,
    /// Who should hear of it (spec: view-syncer-cvr §2.12, §8.1).
    pub(super) level: Level,
}

/// How a failure is logged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Level {
    Info,
    Warn,
    Error,
}

impl Level {
    /// A line of this level.
    pub(super) fn note(self, text: String) -> Effect {
        Effect::Note(match self {
            Level::Info => Note::Info(text),
            Level::Warn => Note::Warn(text),
            Level::Error => Note::Error(text),
        })
    }
}

pub(super) type StepResult = Result<Step, Failure>;

impl From<Box<ErrorBody>> for Failure {
    fn from(error: Box<ErrorBody>) -> Failure {
        let is_internal = matches!(&*error, ErrorBody::Basic { kind: ErrorKind::Internal, .. });
        let level = if is_internal { Level::Error } else { Level::Warn };
        Failure { error, distrust: false, overtaken: false, level }
    }
}

impl From<CvrStoreError> for Failure {
    fn from(error: CvrStoreError) -> Failure {
        let text = error.to_string();
        let overtaken = matches!(error, CvrStoreError::ConcurrentModification { .. });
        let level = match error {
            CvrStoreError::Ownership { .. } | CvrStoreError::Closed => Level::Info,
            CvrStoreError::ClientNotFound(_)
            | CvrStoreError::InvalidClientSchema(_)
            | CvrStoreError::ConcurrentModification { .. }
            | CvrStoreError::Overloaded(_) => Level::Warn,
            CvrStoreError::Damaged { .. } | CvrStoreError::Storage(_) => Level::Error,
        };
        let error = match error {
            CvrStoreError::ClientNotFound(_) => ErrorBody::basic(ErrorKind::ClientNotFound, text),
            CvrStoreError::Ownership { .. } => ErrorBody::rehome_now(text),
            CvrStoreError::InvalidClientSchema(_) => {
                ErrorBody::basic(ErrorKind::SchemaVersionNotSupported, text)
            }
            CvrStoreError::Damaged { .. } => ErrorBody::internal(text),
            // `Internal` would stop clients for good; a store comes back.
            CvrStoreError::ConcurrentModification { .. }
            | CvrStoreError::Storage(_)
            | CvrStoreError::Overloaded(_)
            | CvrStoreError::Closed => ErrorBody::rehome(text),
        };
        Failure { error: Box::new(error), distrust: true, overtaken, level }
    }
}

impl From<UpdateError> for Failure {
    fn from(error: UpdateError) -> Failure {
        let text = error.to_string();
        let kind = match error {
            UpdateError::OlderReplica { .. } => ErrorKind::ClientNotFound,
            UpdateError::ClientSchema(_) => ErrorKind::InvalidConnectionRequest,
            _ => ErrorKind::Internal,
        };
        // Queries that were just made the running ones may be none that the CVR knows of.
        let distrust = matches!(
            error,
            UpdateError::VersionNotBumped { .. }
                | UpdateError::UnknownQuery(_)
                | UpdateError::RowWithoutContents(_)
        );
        Failure { distrust, ..Box::new(ErrorBody::basic(kind, text)).into() }
    }
}

/// Client ids as the CVR names them.
pub(super) fn client_ids(ids: &[String]) -> Vec<ClientId> {
    ids.iter().map(|id| ClientId::from(id.as_str())).collect()
}
