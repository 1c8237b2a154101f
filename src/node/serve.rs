//! The executors and what runs on them.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::{Duration, Instant};

use zeroring_net::http::client::{ApiClient, ApiClientConfig, ApiStartError};
use zeroring_net::pg::{PgConfig, PgError};
use zeroring_net::rt::{
    BackendChoice, BoundListener, ExecutorCtx, Executors, RtConfig, RtError, bind_group,
};

use super::purge::Purger;
use crate::ops::{self, OpsState};
use crate::options::Options;
use crate::options::config::{CvrLocation, IoBackend};
use crate::replication::ReplicaInfo;
use crate::replication::commit_bus::BusReceiver;
use crate::sync::{PrepareError, SyncConfig, SyncPart, SyncService};
use zeroring_storage::cvr_store::CvrStore;
use zeroring_storage::cvr_store::embedded::{EmbeddedCvrStore, OpenError};
use zeroring_storage::cvr_store::postgres::{ConnectError, PostgresCvrConfig, PostgresCvrStore};
use zeroring_storage::replica::schema::TableIds;

/// Why clients cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The executors.
    #[error(transparent)]
    Runtime(#[from] RtError),
    /// The query endpoint.
    #[error(transparent)]
    Prepare(#[from] PrepareError),
    /// The client of the app's endpoints.
    #[error(transparent)]
    Api(#[from] ApiStartError),
    /// The file of client view records.
    #[error(transparent)]
    Cvr(#[from] OpenError),
    /// The URI of the database of client view records.
    #[error("ZERO_CVR_DB: {0}")]
    CvrUri(#[from] PgError),
    /// The database of client view records.
    #[error(transparent)]
    CvrDatabase(#[from] ConnectError),
    /// The port.
    #[error("{0}. Is another server running? ZERO_PORT chooses another port")]
    Listen(std::io::Error),
}

/// Running executors.
pub struct Serving {
    purger: Option<Purger>,
    executors: Executors,
    address: SocketAddr,
}

/// What an executor gets from the main thread.
struct Input {
    listener: BoundListener,
    sync: SyncPart,
}

impl Serving {
    /// Binds the port and starts the executors. There is a replica.
    ///
    /// # Errors
    /// [`ServeError`]; nothing is left running.
    pub fn start(
        options: &Options,
        ops: &Arc<OpsState>,
        replica: ReplicaInfo,
        table_ids: TableIds,
        receivers: Vec<BusReceiver>,
    ) -> Result<Serving, ServeError> {
        let store = cvr_store(options)?;
        let purger = Purger::new(Arc::clone(&store), options.purge);
        let service = SyncService {
            config: SyncConfig::from_options(options),
            store,
            api: if options.query.urls.is_empty() && options.mutate.urls.is_empty() {
                None
            } else {
                Some(ApiClient::start(ApiClientConfig::default())?)
            },
            replica_version: replica.replica_version,
            table_ids,
        };
        let config = RtConfig {
            executors: NonZeroUsize::new(options.num_sync_workers),
            backend: match options.io_backend {
                IoBackend::Auto => BackendChoice::Auto,
                IoBackend::IoUring => BackendChoice::Uring,
                IoBackend::Epoll => BackendChoice::Epoll,
            },
            pin: true,
        };
        let listeners = bind(options.port, receivers.len())?;
        let address = listeners.first().map_or(
            SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), options.port),
            BoundListener::local_addr,
        );
        let parts = service.prepare(receivers, &ops.statz.registry)?;
        let inputs = listeners.into_iter().zip(parts);
        let inputs = inputs.map(|(listener, sync)| Input { listener, sync }).collect();
        let for_executors = Arc::clone(ops);
        let executors = Executors::spawn_with(&config, inputs, move |ctx, input: Input| {
            executor(ctx, input, Arc::clone(&for_executors))
        })?;
        for (backend, stats) in executors.backends().iter().zip(ops.statz.registry.executors()) {
            stats.set_backend(backend.name());
        }
        Ok(Serving { purger, executors, address })
    }

    /// The address that clients connect to, with its real port.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// An executor that has ended although nobody asked for it: why.
    pub fn ended(&mut self) -> Option<String> {
        let (index, result) = self.executors.next_exit(Duration::ZERO)?;
        Some(match result {
            Ok(()) => format!("executor {index} ended without being asked to"),
            Err(failure) => failure.to_string(),
        })
    }

    /// What is done now and then beside serving.
    pub fn tick(&mut self) {
        if let Some(purger) = &mut self.purger {
            purger.tick(Instant::now());
        }
    }

    /// Asks the executors to close their client groups one by one, and then to end.
    pub fn drain(&self) {
        self.executors.stop_handle().stop();
    }

    /// All have ended.
    pub fn all_ended(&mut self) -> bool {
        while let Some((_, result)) = self.executors.next_exit(Duration::ZERO) {
            if let Err(failure) = result {
                tracing::error!("{failure}");
            }
        }
        self.executors.running() == 0
    }

    /// Ends them at once. One that does not within `limit` ends with the process.
    pub fn stop_now(self, limit: Duration) {
        self.executors.stop_handle().stop();
        let (failures, all) = self.executors.join(limit);
        for failure in failures {
            tracing::error!("{failure}");
        }
        if !all {
            tracing::warn!("not all executors ended within {limit:?}");
        }
    }
}

/// Listeners on all addresses, IPv6 and IPv4; IPv4 alone where the kernel has no IPv6.
fn bind(port: u16, count: usize) -> Result<Vec<BoundListener>, ServeError> {
    // The executors' listeners share the port, and would share it with another server of the
    // same user without a word. A plain socket does not: it tells whether the port is free.
    for address in
        [SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), port), (Ipv4Addr::UNSPECIFIED, port).into()]
    {
        match std::net::TcpListener::bind(address) {
            Err(error) if port != 0 && error.kind() == std::io::ErrorKind::AddrInUse => {
                let text = format!("port {port} is in use");
                return Err(ServeError::Listen(std::io::Error::new(error.kind(), text)));
            }
            // No IPv6, say: the real attempt will tell.
            _ => {}
        }
    }
    match bind_group((Ipv6Addr::UNSPECIFIED, port).into(), count) {
        Err(error) if error.kind() != std::io::ErrorKind::AddrInUse => {
            tracing::debug!(%error, "no IPv6; listening on IPv4 only");
            bind_group((Ipv4Addr::UNSPECIFIED, port).into(), count).map_err(ServeError::Listen)
        }
        other => other.map_err(ServeError::Listen),
    }
}

/// Where client view records are kept.
fn cvr_store(options: &Options) -> Result<Arc<dyn CvrStore>, ServeError> {
    match &options.cvr {
        CvrLocation::File(path) => Ok(Arc::new(EmbeddedCvrStore::open(path, &options.task_id)?)),
        CvrLocation::Postgres(uri) => {
            let config = PostgresCvrConfig {
                app: options.app_id.clone(),
                shard: options.shard_num,
                max_connections: options.cvr_max_conns,
                socket_inactivity: options.socket_inactivity,
                ..PostgresCvrConfig::new(PgConfig::parse(uri.expose())?)
            };
            Ok(Arc::new(PostgresCvrStore::connect(&config, &options.task_id)?))
        }
    }
}

/// The life of an executor.
async fn executor(ctx: ExecutorCtx, input: Input, ops: Arc<OpsState>) {
    let listener = match input.listener.into_local() {
        Ok(listener) => listener,
        Err(error) => {
            tracing::error!(%error, "an executor cannot listen");
            return;
        }
    };
    let sync = match input.sync.start(&ctx) {
        Ok(sync) => sync,
        Err(error) => {
            tracing::error!("an executor cannot serve clients: {error}");
            return;
        }
    };
    let service = sync.clone();
    let upgrade = move |incoming| {
        let service = service.clone();
        async move { service.upgrade(incoming).await }
    };
    let accepting = zeroring_net::rt::spawn(async move {
        let error = ops::server::accept(listener, ops, upgrade).await;
        tracing::error!(%error, "an executor accepts no more connections");
    });
    if let Err(error) = sync.run().await {
        tracing::error!("an executor ends: {error}");
    }
    drop(accepting);
}
