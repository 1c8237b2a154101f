//! A node's life: start in order, wait, end in the reverse order (spec: operations §5.2, §5.8).

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use zeroring_net::pg::{Client, PgConfig, PgError};
use zeroring_net::rt::signal::{Signal, Signals};

use super::serve::{ServeError, Serving};
use super::{Exit, context, logging};
use crate::demo::{Demo, DemoError};
use crate::ops::admin::AdminRule;
use crate::ops::statz::StatzSources;
use crate::ops::{Heartbeat, OpsState, Registry};
use crate::options::{Loaded, Options, Parsed, Surroundings};
use crate::replication::commit_bus::commit_bus;
use crate::replication::{
    ReplicaInfo, ReplicationConfig, ReplicationCore, ReplicationError, ReplicationHandle, ShardId,
};

/// How often "still waiting for …" is said during a long start.
const STILL_WAITING: Duration = Duration::from_secs(10);
/// How long one look at the replication core waits while it starts; signals are seen in between.
const START_POLL: Duration = Duration::from_millis(20);
/// How often the node looks at its parts while it runs. Signals wake it at once.
const WATCH_INTERVAL: Duration = Duration::from_millis(250);
/// How long the replication core may take to finish the transaction in hand.
const REPLICATION_STOP: Duration = Duration::from_secs(10);
/// How long executors may take to end once they are drained or told to end at once.
const EXECUTOR_STOP: Duration = Duration::from_secs(5);

/// What an embedding program gives and wants to know.
#[derive(Default)]
pub struct Hooks {
    /// Signal handlers, if they are installed already.
    pub signals: Option<Signals>,
    /// Called once when clients can connect, with the address.
    pub ready: Option<Box<dyn FnOnce(SocketAddr) + Send>>,
}

/// Why a node could not start or go on.
#[derive(Debug, thiserror::Error)]
enum NodeError {
    #[error("signal handlers could not be installed: {0}")]
    Signals(std::io::Error),
    #[error("Unable to connect to Postgres. Check your database configuration. ({0})")]
    Postgres(#[from] PgError),
    #[error(transparent)]
    Replication(#[from] ReplicationError),
    #[error("the commit bus could not be made: {0}")]
    Bus(std::io::Error),
    #[error(transparent)]
    Serve(#[from] ServeError),
}

/// Runs a node to its end.
pub fn run(loaded: Loaded, env: &BTreeMap<String, String>, hooks: Hooks) -> Exit {
    let Loaded { options, deprecated, notes } = loaded;
    logging::install(options.log_format, options.log_level);
    log_panics();
    zeroring_net::tls::install_default_provider();
    raise_file_limit();
    if let Err(error) = zeroring_net::rt::reserve_files() {
        tracing::warn!(%error, "no room was made in the table of open files");
    }
    for (variable, instead) in deprecated {
        tracing::warn!("{variable} is deprecated: {instead}");
    }
    for note in notes {
        tracing::warn!("{note}");
    }
    tracing::info!("runtime env: taskID={}, hostIP={}", options.task_id, context::host_ip());
    tracing::info!(
        protocolVersion = zeroring_core::protocol::PROTOCOL_VERSION,
        task_id = options.task_id,
        app = options.app_id,
        shard = options.shard_num,
        port = options.port,
        "starting server@{}",
        options.server_version,
    );
    let exit = match live(options, env, hooks) {
        Ok(exit) => exit,
        Err(error @ NodeError::Postgres(_)) => {
            tracing::error!("exiting with configuration error: {error}");
            Exit::Intended
        }
        Err(error @ NodeError::Replication(ReplicationError::Panicked)) => {
            tracing::error!("exiting with error: {error}");
            Exit::Bug
        }
        Err(error) => {
            tracing::error!("exiting with error: {error}");
            Exit::Failed
        }
    };
    tracing::info!("exiting with code {}", exit.code());
    exit
}

/// The demo: a sample database, the server on it, and the page.
///
/// # Errors
/// [`DemoError`] if the sample database cannot be had.
pub fn demo() -> Result<Exit, DemoError> {
    // Before anything is made that a Ctrl-C must not leave behind.
    let signals = Signals::install()
        .map_err(|cause| DemoError::Io { action: "install signal handlers", cause })?;
    let mut demo = Demo::prepare()?;
    if signals.wait(Some(Duration::ZERO)).is_some() {
        return Ok(Exit::Done);
    }
    let file = |name: &str| demo.file(name).to_string_lossy().into_owned();
    let env: BTreeMap<String, String> = [
        ("ZERO_UPSTREAM_DB", demo.database_url()),
        ("ZERO_REPLICA_FILE", file("replica.db")),
        ("ZERO_CVR_DB", format!("file:{}", file("cvr.db"))),
        ("ZERO_LOG_LEVEL", "warn".to_owned()),
        ("ZERO_PORT", "0".to_owned()),
    ]
    .map(|(key, value)| (key.to_owned(), value))
    .into();
    let around = Surroundings {
        node_env: Some("development".to_owned()),
        random_id: "demo".to_owned(),
        cores: std::thread::available_parallelism().map_or(1, usize::from),
        ..Surroundings::default()
    };
    let settings = match crate::options::parse::parse(&[], &env) {
        Ok(Parsed::Settings(settings)) => settings,
        other => {
            tracing::error!("the demo's own options are refused: {other:?}");
            return Ok(Exit::Bug);
        }
    };
    let loaded = match Options::load(&settings, &around) {
        Ok(loaded) => loaded,
        Err(error) => {
            tracing::error!("the demo's own options do not go together: {error}");
            return Ok(Exit::Bug);
        }
    };
    demo.start_writing()?;
    let ready = |address: SocketAddr| {
        let url = format!("http://127.0.0.1:{}", address.port());
        match crate::demo::page_server::start(&url) {
            Ok(page) => {
                println!("\nLive queries: {page}\n\nCtrl-C ends it and leaves nothing behind.")
            }
            Err(error) => tracing::error!(%error, "the demo's page cannot be served"),
        }
    };
    Ok(run(loaded, &env, Hooks { ready: Some(Box::new(ready)), signals: Some(signals) }))
}

/// Every client is a file descriptor: the soft limit, often 1024, is raised to the hard one.
fn raise_file_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    if current == maximum {
        return;
    }
    match setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }) {
        Ok(()) => tracing::debug!(from = ?current, to = ?maximum, "limit of open files raised"),
        Err(error) => tracing::warn!(%error, limit = ?current, "limit of open files not raised"),
    }
}

/// A panic is a bug: it is logged like everything else. Whatever it took down says more.
fn log_panics() {
    std::panic::set_hook(Box::new(|info| {
        let place = info.location().map(ToString::to_string).unwrap_or_default();
        let payload = info.payload();
        let text = payload
            .downcast_ref::<&str>()
            .copied()
            .or_else(|| payload.downcast_ref::<String>().map(String::as_str));
        let backtrace = std::backtrace::Backtrace::capture();
        tracing::error!(
            errorMsg = text.unwrap_or("unknown"),
            stack = %backtrace,
            "uncaughtException: panic at {place}"
        );
    }));
}

/// Starts everything in order; returns when it has ended.
fn live(options: Options, env: &BTreeMap<String, String>, hooks: Hooks) -> Result<Exit, NodeError> {
    let started = Instant::now();
    let signals = match hooks.signals {
        Some(signals) => signals,
        None => Signals::install().map_err(NodeError::Signals)?,
    };
    tracing::info!("starting zero-cache");
    let upstream = upstream(&options)?;
    // Fails at once, with its reason, on a wrong address or password.
    drop(Client::connect(&upstream)?);
    let (bus, receivers) = commit_bus(options.num_sync_workers).map_err(NodeError::Bus)?;
    let core = replication_config(&options, upstream, env);
    let table_ids = core.table_ids.clone();
    let replication = ReplicationCore::start(core, Box::new(bus))?;
    let replica = match await_replica(&signals, &replication) {
        Awaited::Ready(replica) => replica,
        Awaited::Ended => return ended(replication),
        Awaited::Signal(signal) => {
            tracing::info!("exiting on {}", signal.name());
            stop_replication(replication);
            return Ok(if signal == Signal::Quit { Exit::Intended } else { Exit::Done });
        }
    };
    let ops = Arc::new(ops_state(&options, &replication));
    let mut serving = match Serving::start(&options, &ops, replica, table_ids, receivers) {
        Ok(serving) => serving,
        Err(error) => {
            stop_replication(replication);
            return Err(error.into());
        }
    };
    let address = serving.address();
    tracing::info!("zero-dispatcher listening at {address}");
    tracing::info!("zero-cache ready ({} ms)", started.elapsed().as_millis());
    if let Some(ready) = hooks.ready {
        ready(address);
    }
    let end = watch(&signals, &options, &ops.heartbeat, &mut serving, &replication);
    finish(end, &signals, &options, serving, replication)
}

fn upstream(options: &Options) -> Result<PgConfig, PgError> {
    let mut config = PgConfig::parse(options.upstream_db.expose())?;
    config.read_timeout = options.socket_inactivity;
    Ok(config.with_application_name("zero-change-streamer"))
}

fn replication_config(
    options: &Options,
    upstream: PgConfig,
    env: &BTreeMap<String, String>,
) -> ReplicationConfig {
    let shard = ShardId { app: options.app_id.clone(), num: options.shard_num };
    let timestamp = logging::now_rfc3339();
    ReplicationConfig {
        publications: options.publications.clone(),
        copy_workers: options.copy_workers,
        text_copy: options.text_copy,
        slot_failover: options.slot_failover,
        stream_inbound_timeout: options.stream_inbound_timeout,
        socket_inactivity: options.socket_inactivity,
        auto_reset: options.auto_reset,
        context: context::server_context(&options.app_id, &options.task_id, &timestamp, env),
        ..ReplicationConfig::new(upstream, shard, &options.replica_file)
    }
}

fn ops_state(options: &Options, replication: &ReplicationHandle) -> OpsState {
    OpsState {
        admin: AdminRule::new(options),
        heartbeat: Arc::new(Heartbeat::default()),
        statz: StatzSources {
            version: options.server_version.clone(),
            task_id: options.task_id.clone(),
            started: Instant::now(),
            registry: Registry::new(options.num_sync_workers),
            replication: replication.status().clone(),
            replica_file: options.replica_file.clone(),
        },
    }
}

enum Awaited {
    Ready(ReplicaInfo),
    Ended,
    Signal(Signal),
}

fn await_replica(signals: &Signals, replication: &ReplicationHandle) -> Awaited {
    let mut said = Instant::now();
    tracing::info!("waiting for workers to be ready ...");
    loop {
        if let Some(replica) = replication.wait_ready(START_POLL) {
            return Awaited::Ready(replica);
        }
        if let Some(signal) = signals.wait(Some(Duration::ZERO)) {
            return Awaited::Signal(signal);
        }
        if replication.is_finished() {
            return Awaited::Ended;
        }
        if said.elapsed() >= STILL_WAITING {
            said = Instant::now();
            let status = replication.status().snapshot();
            tracing::info!(phase = ?status.phase, rows = status.copied_rows, "still waiting for replication");
        }
    }
}

/// Why the waiting is over.
enum End {
    /// SIGTERM, SIGINT, or no heartbeat any more: drain.
    Drain(&'static str),
    /// SIGQUIT.
    Quit,
    /// The replication core has ended.
    Replication,
    /// An executor has ended.
    Executor(String),
}

fn watch(
    signals: &Signals,
    options: &Options,
    heartbeat: &Heartbeat,
    serving: &mut Serving,
    replication: &ReplicationHandle,
) -> End {
    let interval = match options.keepalive_timeout {
        Some(timeout) => WATCH_INTERVAL.min(timeout / 4),
        None => WATCH_INTERVAL,
    };
    loop {
        match signals.wait(Some(interval)) {
            Some(Signal::Quit) => return End::Quit,
            Some(signal) => return End::Drain(signal.name()),
            None => {}
        }
        if let Some(failure) = serving.ended() {
            return End::Executor(failure);
        }
        serving.tick();
        if replication.is_finished() {
            return End::Replication;
        }
        let silence = heartbeat.silence(Instant::now());
        if let (Some(silence), Some(limit)) = (silence, options.keepalive_timeout)
            && silence >= limit
        {
            tracing::info!("last /keepalive received {} ms ago", silence.as_millis());
            return End::Drain("heartbeat");
        }
    }
}

fn finish(
    end: End,
    signals: &Signals,
    options: &Options,
    mut serving: Serving,
    replication: ReplicationHandle,
) -> Result<Exit, NodeError> {
    match end {
        End::Drain(reason) => {
            tracing::info!("initiating drain ({reason})");
            let start = Instant::now();
            let deadline = options.drain_timeout.map(|limit| start + limit);
            serving.drain();
            let mut exit = Exit::Done;
            while !serving.all_ended() {
                match signals.wait(Some(START_POLL)) {
                    Some(Signal::Quit) => {
                        exit = Exit::Intended;
                        break;
                    }
                    Some(signal) => tracing::info!("{} again: draining goes on", signal.name()),
                    None if deadline.is_some_and(|d| Instant::now() >= d) => {
                        tracing::warn!("ZERO_DRAIN_TIMEOUT_MS is over: stopping the rest at once");
                        break;
                    }
                    None => {}
                }
            }
            if serving.all_ended() {
                let ms = start.elapsed().as_millis();
                tracing::info!("all user-facing workers drained ({ms} ms)");
            }
            serving.stop_now(EXECUTOR_STOP);
            stop_replication(replication);
            Ok(exit)
        }
        End::Quit => {
            serving.stop_now(EXECUTOR_STOP);
            stop_replication(replication);
            Ok(Exit::Intended)
        }
        End::Replication => {
            serving.stop_now(EXECUTOR_STOP);
            ended(replication)
        }
        End::Executor(failure) => {
            tracing::error!("{failure}");
            serving.stop_now(EXECUTOR_STOP);
            stop_replication(replication);
            Ok(Exit::Bug)
        }
    }
}

/// The replication core has ended by itself: another node took over, a reset is due (then it
/// ended well), or it gave up.
fn ended(replication: ReplicationHandle) -> Result<Exit, NodeError> {
    replication.join()?;
    tracing::info!("replication has ended");
    Ok(Exit::Intended)
}

/// Stops the core after the transaction in hand. What is acknowledged is durable in any case, so
/// nothing is lost if it does not make it in time.
fn stop_replication(replication: ReplicationHandle) {
    replication.stop();
    let deadline = Instant::now() + REPLICATION_STOP;
    while !replication.is_finished() {
        if Instant::now() >= deadline {
            tracing::warn!("replication did not stop within {REPLICATION_STOP:?}; leaving it");
            return;
        }
        std::thread::sleep(START_POLL);
    }
    if let Err(error) = replication.join() {
        tracing::warn!(%error, "replication ended with an error");
    }
}
