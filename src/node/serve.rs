//! The executors and what runs on them.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::Duration;

use zeroring_net::http::{Incoming, Response};
use zeroring_net::rt::{
    BackendChoice, BoundListener, ExecutorCtx, Executors, RtConfig, RtError, bind_group,
};

use crate::ops::{self, OpsState};
use crate::options::Options;
use crate::options::config::IoBackend;
use crate::replication::ReplicationHandle;
use crate::replication::commit_bus::BusReceiver;

/// Why clients cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The executors.
    #[error(transparent)]
    Runtime(#[from] RtError),
    /// The port.
    #[error("{0}. Is another server running? ZERO_PORT chooses another port")]
    Listen(std::io::Error),
}

/// Running executors.
pub struct Serving {
    executors: Executors,
    address: SocketAddr,
}

/// What an executor gets from the main thread.
struct Input {
    listener: BoundListener,
    #[allow(dead_code, reason = "taken by the sync service, which lands next")]
    commits: BusReceiver,
}

impl Serving {
    /// Binds the port and starts the executors. There is a replica.
    ///
    /// # Errors
    /// [`ServeError`]; nothing is left running.
    pub fn start(
        options: &Options,
        ops: &Arc<OpsState>,
        _replication: &ReplicationHandle,
        receivers: Vec<BusReceiver>,
    ) -> Result<Serving, ServeError> {
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
        let inputs = listeners.into_iter().zip(receivers);
        let inputs = inputs.map(|(listener, commits)| Input { listener, commits }).collect();
        let for_executors = Arc::clone(ops);
        let executors = Executors::spawn_with(&config, inputs, move |ctx, input: Input| {
            executor(ctx, input, Arc::clone(&for_executors))
        })?;
        for (backend, stats) in executors.backends().iter().zip(ops.statz.registry.executors()) {
            stats.set_backend(backend.name());
        }
        Ok(Serving { executors, address })
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

/// The life of an executor.
async fn executor(ctx: ExecutorCtx, input: Input, ops: Arc<OpsState>) {
    let listener = match input.listener.into_local() {
        Ok(listener) => listener,
        Err(error) => {
            tracing::error!(%error, "an executor cannot listen");
            return;
        }
    };
    let accepting = zeroring_net::rt::spawn(async move {
        let error = ops::server::accept(listener, ops, refuse).await;
        tracing::error!(%error, "an executor accepts no more connections");
    });
    ctx.stopped().await;
    drop(accepting);
}

/// Until the sync service is here: says so.
async fn refuse(incoming: Incoming) {
    let response = Response::text(503, "this version of zeroring does not sync yet\n");
    if let Err(error) = incoming.respond(response).await {
        tracing::debug!(%error, "a response could not be sent");
    }
}
