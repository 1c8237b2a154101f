//! The sync service: clients' WebSockets, their groups, and the engine that serves them, on each
//! executor (spec: sync-protocol, view-syncer-cvr).
//!
//! ```text
//!  commit bus ─▶ executor ─▶ World (engine + snapshot) ─▶ groups ─▶ fanout ─▶ sockets
//!                   ▲                                       │ ▲
//!     connection ───┘ (any executor; handed to the owner)   ▼ │
//!                                             CVR store (one flush of many groups)
//! ```
//!
//! - [`connection`]: a socket's handshake and messages.
//! - [`executor`]: the loop: follow the replica, handle events, hydrate, flush.
//! - [`groups`]: the table of client groups; carries out what the pure state machine
//!   (`zeroring_core::group`) wants done; routes deltas to subscribers only.
//! - [`sockets`]: messages that wait for their turn, frames that wait for a socket.
//! - [`admission`], [`hydrations`]: who comes up when, and whose queries are executed when.
//! - [`records`]: requests to the CVR store.
//! - [`world`]: engine, snapshot, permissions.
//! - [`answers`]: from the store's threads.
//! - [`fanout`]: frames made once.
//! - [`farewell`]: errors that end a connection.
//! - [`pushes`]: mutations to the app's endpoint.
//! - [`slow`]: slow hydrations and missing indexes, numbers of the engine.
//! - [`drain`]: the pace of an orderly end.
//!
//! Invariants: nothing here blocks but SQLite, in slices of about a millisecond; a group lives on
//! one executor; an executor's state never leaves its thread; a group that a commit does not touch
//! is not woken.
//!
//! How a node uses it: [`SyncService::prepare`] on the main thread makes one [`SyncPart`] per
//! executor (it is `Send`); on each executor [`SyncPart::start`], then every upgrade request goes
//! to [`SyncExecutor::upgrade`], and [`SyncExecutor::run`] is awaited: it ends after the process
//! was asked to stop and all groups have been drained.

mod admission;
mod answers;
mod connection;
mod counters;
mod drain;
mod executor;
mod fanout;
mod farewell;
mod groups;
mod hydrations;
mod pushes;
mod records;
mod slow;
mod sockets;
mod world;

use std::cell::RefCell;
use std::io;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use zeroring_core::version::StateVersion;
use zeroring_net::http::client::{ApiClient, ApiPort};
use zeroring_net::http::{Incoming, RawIncoming};
use zeroring_net::rt::{Doorbell, ExecutorCtx, Mesh, spawn};
use zeroring_net::ws::WsConfig;
use zeroring_storage::cvr_store::CvrStore;
use zeroring_storage::replica::schema::TableIds;

pub use executor::SyncError;

use crate::api::{AppEndpoint, Caller, DEFAULT_TIMEOUT, EndpointError, EndpointKind};
use crate::mutations::Mutations;
use crate::ops::registry::Registry;
use crate::options::Options;
use crate::options::config::Endpoint;
use crate::replication::commit_bus::BusReceiver;

use answers::Mailbox;
use executor::{App, Executor, Inputs};
use groups::State;

/// Connections on their way from one executor to another.
const MESH_CAPACITY: usize = 4_096;

/// What the service needs to know.
#[derive(Debug, Clone)]
pub struct SyncConfig {
    /// `ZERO_APP_ID`.
    pub app_id: String,
    /// `ZERO_SHARD_NUM`.
    pub shard_num: u32,
    /// Name of this server: owns CVRs, spreads groups.
    pub task_id: String,
    /// The replica.
    pub replica_file: PathBuf,
    /// The app's query endpoint; without URLs there is none.
    pub query: Endpoint,
    /// The app's mutate endpoint; without URLs there is none.
    pub mutate: Endpoint,
    /// `ZERO_ENABLE_CRUD_MUTATIONS`.
    pub crud_mutations: bool,
    /// Longest wait for an answer of an endpoint.
    pub api_timeout: Duration,
    /// Why clients cannot send auth tokens; `None`: they can, the app's endpoints judge them.
    pub refuses_tokens: Option<String>,
    /// `ZERO_AUTH_REVALIDATE_INTERVAL_SECONDS`.
    pub auth_revalidate: Duration,
    /// `ZERO_AUTH_RETRANSFORM_INTERVAL_SECONDS`.
    pub auth_retransform: Duration,
    /// `ZERO_LOG_SLOW_HYDRATE_THRESHOLD`: hydrations that take longer are logged.
    pub slow_hydrate: Duration,
    /// Limits and compression of sockets.
    pub websocket: WsConfig,
    /// A client that reads nothing for so long while a large poke waits for it is closed.
    pub stalled: Duration,
}

impl SyncConfig {
    /// From the server's options.
    pub fn from_options(options: &Options) -> SyncConfig {
        SyncConfig {
            app_id: options.app_id.clone(),
            shard_num: options.shard_num,
            task_id: options.task_id.clone(),
            replica_file: options.replica_file.clone(),
            query: options.query.clone(),
            mutate: options.mutate.clone(),
            crud_mutations: options.enable_crud_mutations,
            api_timeout: options.api_timeout.unwrap_or(DEFAULT_TIMEOUT),
            refuses_tokens: refuses_tokens(options),
            auth_revalidate: options.auth_revalidate,
            auth_retransform: options.auth_retransform,
            slow_hydrate: options.slow_hydrate,
            websocket: WsConfig {
                max_payload_bytes: options.max_payload_bytes,
                deflate: options.compression.clone(),
                ..websocket_config()
            },
            stalled: sockets::STALLED,
        }
    }

    /// An endpoint of the app may be called on behalf of a connection.
    fn has_endpoint(&self) -> bool {
        !(self.query.urls.is_empty() && self.mutate.urls.is_empty())
    }
}

/// Sockets' limits. How much may wait for a socket is judged per poke, not per frame
/// ([`sockets::MAX_QUEUED_BYTES`]): a poke that is larger than the limit must get through.
pub fn websocket_config() -> WsConfig {
    WsConfig {
        max_queued_bytes: usize::MAX / 2,
        max_queued_frames: usize::MAX / 2,
        ..WsConfig::default()
    }
}

/// Whether somebody is there to judge tokens (spec: sync-protocol §1.6).
fn refuses_tokens(options: &Options) -> Option<String> {
    if options.jwt {
        return Some(
            "This version of zeroring does not verify JWTs yet (ZERO_AUTH_JWK, ZERO_AUTH_SECRET, \
             ZERO_AUTH_JWKS_URL): no auth token is taken."
                .to_owned(),
        );
    }
    (options.mutate.urls.is_empty() || options.query.urls.is_empty()).then(|| {
        "Exactly one of jwk, secret, or jwksUrl must be set, or both ZERO_MUTATE_URL and \
         ZERO_QUERY_URL, for clients that send an auth token."
            .to_owned()
    })
}

/// Why the service cannot be prepared.
#[derive(Debug, thiserror::Error)]
pub enum PrepareError {
    /// A setting.
    #[error(transparent)]
    Endpoint(#[from] EndpointError),
    /// A doorbell or ring.
    #[error("the sync service cannot be set up: {0}")]
    Io(#[from] io::Error),
}

/// What all executors of a server share at their start.
pub struct SyncService {
    /// Settings.
    pub config: SyncConfig,
    /// Client view records.
    pub store: Arc<dyn CvrStore>,
    /// For the app's endpoints; needed if there is one.
    pub api: Option<ApiClient>,
    /// Names the lineage of the replica.
    pub replica_version: StateVersion,
    /// The numbering of tables that the replica's writer uses: commits name tables by it.
    pub table_ids: TableIds,
}

impl SyncService {
    /// Makes the parts of the executors, one per receiver of the commit bus and in its order.
    ///
    /// # Errors
    /// [`PrepareError`].
    pub fn prepare(
        self,
        receivers: Vec<BusReceiver>,
        registry: &Registry,
    ) -> Result<Vec<SyncPart>, PrepareError> {
        let config = Arc::new(self.config);
        let endpoint = |kind, settings| {
            let made = AppEndpoint::new(kind, settings, &config.app_id, config.shard_num);
            made.map(|made| made.map(Arc::new))
        };
        let query = endpoint(EndpointKind::Query, &config.query)?;
        let mutate = endpoint(EndpointKind::Mutate, &config.mutate)?;
        let mesh = Mesh::new(receivers.len(), MESH_CAPACITY)?;
        let mut parts = Vec::with_capacity(receivers.len());
        for (index, (bus, mesh)) in receivers.into_iter().zip(mesh).enumerate() {
            let needed = query.is_some() || mutate.is_some();
            let port = self.api.as_ref().filter(|_| needed).map(ApiClient::port).transpose()?;
            parts.push(SyncPart {
                config: config.clone(),
                store: self.store.clone(),
                port,
                query: query.clone(),
                mutate: mutate.clone(),
                replica_version: self.replica_version.clone(),
                table_ids: self.table_ids.clone(),
                bus,
                mesh,
                answers: Doorbell::new()?,
                stats: registry.executor(index).cloned().unwrap_or_default(),
            });
        }
        Ok(parts)
    }
}

/// An executor's part, on its way to its thread.
pub struct SyncPart {
    config: Arc<SyncConfig>,
    store: Arc<dyn CvrStore>,
    port: Option<ApiPort>,
    query: Option<Arc<AppEndpoint>>,
    mutate: Option<Arc<AppEndpoint>>,
    replica_version: StateVersion,
    table_ids: TableIds,
    bus: BusReceiver,
    mesh: Mesh<RawIncoming>,
    answers: Doorbell,
    stats: Arc<crate::ops::registry::ExecutorStats>,
}

impl SyncPart {
    /// Opens the replica and takes up the executor's part of the service.
    ///
    /// # Errors
    /// [`SyncError`]: the replica cannot be read.
    pub fn start(self, ctx: &ExecutorCtx) -> Result<SyncExecutor, SyncError> {
        let mailbox = Mailbox::new(self.answers.ringer());
        let world = executor::open_world(
            &self.config,
            &self.config.replica_file,
            self.replica_version,
            self.table_ids.clone(),
        )?;
        let (sender, receiver) = self.mesh.into_local()?;
        let mut app = App::default();
        if let Some(port) = self.port {
            let client = port.into_local()?;
            let timeout = self.config.api_timeout;
            let caller = |endpoint| Caller::new(endpoint, client.clone(), timeout);
            app.queries = self.query.map(&caller).map(Rc::new);
            app.mutations = self.mutate.map(caller).map(Mutations::new).map(Rc::new);
        }
        let settings = executor::group_settings(&self.config);
        let compress = self.config.websocket.deflate.is_some();
        let state = State::new(world, settings, self.store, mailbox.clone(), compress);
        let inputs = Inputs {
            bus: self.bus.into_local()?,
            mailbox,
            answers: self.answers.into_local()?,
            table_ids: self.table_ids,
        };
        let executor = Executor::new(self.config, ctx.clone(), state, sender, app, self.stats);
        spawn(connection::receive(executor.clone(), receiver));
        Ok(SyncExecutor { executor, inputs: Rc::new(RefCell::new(Some(inputs))) })
    }
}

/// The service on an executor; cheap to clone.
#[derive(Clone)]
pub struct SyncExecutor {
    executor: Rc<Executor>,
    inputs: Rc<RefCell<Option<Inputs>>>,
}

impl SyncExecutor {
    /// Serves an upgrade request, to the end of its socket.
    pub async fn upgrade(&self, incoming: Incoming) {
        self.executor.clone().upgrade(incoming).await;
    }

    /// The loop. Ends when the process was asked to stop and all groups were drained; a second call
    /// ends at once.
    ///
    /// # Errors
    /// [`SyncError`]: the executor cannot go on.
    pub async fn run(&self) -> Result<(), SyncError> {
        let inputs = self.inputs.borrow_mut().take();
        match inputs {
            Some(inputs) => self.executor.clone().run(inputs).await,
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests;
