//! The CVR store on Postgres, schema version 17: shared with other servers, ours and originals
//! (1.9.0), which may read and write the same groups at any moment.
//!
//! ```text
//! executors ──flushes───────────────▶ flush lane ──▶ 1 worker   ─┐
//!     │                                  │ rows that follow       │
//!     │                                  └▶ rows lane ▶ ≤ 2 workers ─┼─▶ Postgres
//!     ├──────locked flushes, TTL, purge▶ slow lane ───▶ 1 worker   ─┤
//!     └──────load, rows, catch-up─────▶ read lane ───▶ ≤ 4 workers ─┘
//! ```
//!
//! Each worker is a thread with one connection ([`session`]): made when needed (some at the start,
//! [`warm`]), renewed after 5–10 minutes, closed when idle. With fewer than four connections allowed, workers serve several
//! lanes.
//!
//! *Group commit.* The flush worker takes everything that waits and writes it as one transaction in
//! one round trip ([`sql`], [`batch`], [`write`]); while it commits, the next batch gathers. A
//! refused group writes nothing and leaves the others alone; one that is locked elsewhere waits in
//! the slow lane. The rows of large flushes, and of many small ones together, follow on connections
//! of their own ([`rows`]), so that a big hydration delays nobody's poke. They coalesce while they
//! wait, and give way to everything else ([`pace`]).
//!
//! *Reads* that wait together are one round trip too: many groups in one load, and other reads of
//! many groups in one transaction.
//!
//! *Invariants* that all servers of a database keep (spec: view-syncer-cvr §2.11), and how:
//! - a group changes only under the lock of its `instances` row, after ownership and version were
//!   checked there: every flush begins so;
//! - `rowsVersion` names the version that `rows` are of: both are written in one transaction, that
//!   of the metadata or (rows that follow) a later one, in the order of versions. Loads wait for the
//!   rows of others, reads and flushes check;
//! - a verdict is given after the commit was acknowledged, or found to have happened.
//!
//! *Failures.* A lost connection is made anew, and what was under way is done again or found done;
//! for a minute requests only wait. Then they fail with `Storage`.

mod batch;
mod job;
mod pace;
mod params;
mod queue;
mod read;
mod rows;
mod schema;
mod session;
mod sql;
mod warm;
mod worker;
mod write;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::RecvTimeoutError;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use zeroring_core::cvr::store::{
    CatchupPage, CvrStoreError, InspectedQuery, Loaded, Purged, RowPage,
};
use zeroring_core::cvr::{ClientGroupId, ClientId, GroupFlush, TtlClock};
use zeroring_net::pg::{Client, PgConfig, PgError};

use self::job::{FlushPart, Job, LoadJob, Read, answer};
use self::pace::Pace;
use self::queue::{Lane, MAX_WAITING, Queue, Refused};
pub use self::schema::SCHEMA_VERSION;
pub use self::session::ConnectionLife;
use self::session::{Session, Shared};
use self::sql::Sql;
use self::worker::Worker;
use super::owed::Owed;
use super::{Answer, CatchupScan, CvrStore, PurgeLimits, Reply, RowLookup, RowOptions, Verdicts};

/// More connections than this do not read faster: a load takes many groups at once.
const MAX_READERS: usize = 4;

/// Writers of rows that follow: while one writes those of a large hydration, another one does not
/// let the rest wait.
const MAX_ROW_WRITERS: usize = 2;

/// How long the start waits for connections to be made.
const WARM_UP: Duration = Duration::from_secs(5);

/// Where the store is and how it is used.
#[derive(Debug, Clone)]
pub struct PostgresCvrConfig {
    /// The database: `ZERO_CVR_DB`, by default that of `ZERO_UPSTREAM_DB`.
    pub connection: PgConfig,
    /// `ZERO_APP_ID`; with the shard it names the schema, `"{app}_{shard}/cvr"`.
    pub app: String,
    /// `ZERO_SHARD_NUM`.
    pub shard: u32,
    /// `ZERO_CVR_MAX_CONNS`; at least one is used.
    pub max_connections: usize,
    /// `ZERO_PG_SOCKET_INACTIVITY_TIMEOUT`: a connection on which an answer is awaited and nothing
    /// arrives for so long is given up. `None` waits for ever.
    pub socket_inactivity: Option<Duration>,
    /// `ZERO_IDLE_IN_TRANSACTION_SESSION_TIMEOUT`; zero for none.
    pub idle_in_transaction: Duration,
    /// How long connections live.
    pub connections: ConnectionLife,
    /// Rows that follow.
    pub rows: RowOptions,
}

impl PostgresCvrConfig {
    /// The original's defaults for everything but the database.
    pub fn new(connection: PgConfig) -> PostgresCvrConfig {
        PostgresCvrConfig {
            connection,
            app: "zero".to_owned(),
            shard: 0,
            max_connections: 30,
            socket_inactivity: Some(Duration::from_secs(120)),
            idle_in_transaction: Duration::from_secs(60),
            connections: ConnectionLife::default(),
            rows: RowOptions::default(),
        }
    }
}

/// Why the store cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// No connection.
    #[error("CVR database: {0}")]
    Connect(#[from] PgError),
    /// The tables cannot be made or brought up to date.
    #[error("CVR database: migrating schema \"{schema}\" failed: {source}")]
    Migrate {
        /// The schema.
        schema: String,
        /// Postgres' error.
        source: PgError,
    },
    /// A newer server has changed what we rely on.
    #[error(
        "Cannot run view-syncer at schema v{SCHEMA_VERSION} because rollback limit is v{limit}"
    )]
    RollbackLimit {
        /// The oldest version that may run.
        limit: i32,
    },
    /// The tables are of a time before anything that can be migrated.
    #[error(
        "CVR schema \"{schema}\" is of version {found}, the oldest that can be migrated is 6: drop \
         the schema (its clients will resync) or migrate it with an older server"
    )]
    TooOld {
        /// The schema.
        schema: String,
        /// Its version.
        found: i32,
    },
    /// No thread.
    #[error("CVR store: no thread could be started: {0}")]
    Thread(std::io::Error),
}

/// The store. Dropping it finishes what waits and closes the connections.
///
/// To wire it: make a [`PostgresCvrConfig`] of the options, [`PostgresCvrStore::connect`] once per
/// process (it migrates; several servers may do so at once) with the task id (`ZERO_TASK_ID`,
/// unique per server), and give the store to the executors as `Arc<dyn CvrStore>`. Rounds of
/// purging are asked for by the caller, as with the embedded store. Executors should flush what
/// becomes ready together as one batch.
#[derive(Debug)]
pub struct PostgresCvrStore {
    queue: Arc<Queue<Job>>,
    owed: Arc<Owed<Job>>,
    pace: Arc<Pace>,
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

/// How many workers serve these lanes.
fn workers(lanes: &[Lane], connections: usize) -> usize {
    // One each for flushes, slow ones, rows and reads; then more for reads.
    match lanes {
        [Lane::Read] => connections.saturating_sub(3).clamp(1, MAX_READERS),
        [Lane::Rows] => connections.saturating_sub(2 + MAX_READERS).clamp(1, MAX_ROW_WRITERS),
        _ => 1,
    }
}

/// The lanes of each kind of worker, by the number of connections allowed.
fn kinds(connections: usize) -> &'static [&'static [Lane]] {
    match connections {
        0 | 1 => &[&[Lane::Flush, Lane::Slow, Lane::Rows, Lane::Read]],
        2 => &[&[Lane::Flush, Lane::Slow, Lane::Rows], &[Lane::Read]],
        3 => &[&[Lane::Flush], &[Lane::Slow, Lane::Rows], &[Lane::Read]],
        _ => &[&[Lane::Flush], &[Lane::Slow], &[Lane::Rows], &[Lane::Read]],
    }
}

impl PostgresCvrStore {
    /// Connects, makes or migrates the tables, and starts the workers. `task_id` names this server
    /// among those that share the database.
    ///
    /// # Errors
    /// [`ConnectError`].
    pub fn connect(
        config: &PostgresCvrConfig,
        task_id: &str,
    ) -> Result<PostgresCvrStore, ConnectError> {
        let schema: Arc<str> = schema::schema_name(&config.app, config.shard).into();
        let mut connection = config
            .connection
            .with_application_name(&format!("zero-sync-worker-{}-cvr", std::process::id()));
        let mut first = Client::connect(&connection)?;
        schema::migrate(&mut first, &schema)?;
        warm::ping(&mut first)?;
        connection.read_timeout = config.socket_inactivity;
        first.set_read_timeout(config.socket_inactivity);
        let shared = Arc::new(Shared {
            connection,
            sql: Sql::new(&schema),
            task_id: task_id.into(),
            idle_in_transaction: config.idle_in_transaction.as_millis().to_string(),
            life: config.connections,
            closing: AtomicBool::new(false),
            pooled: AtomicBool::new(false),
        });
        let kinds = kinds(config.max_connections);
        let queue = Arc::new(Queue::new(kinds));
        let owed = Arc::new(Owed::new(config.rows));
        let pace = Arc::new(Pace::new(config.rows.pace, Instant::now()));
        let mut store = PostgresCvrStore {
            queue: queue.clone(),
            owed: owed.clone(),
            pace: pace.clone(),
            shared: shared.clone(),
            threads: Vec::new(),
        };
        let mut first = Some(first);
        let (warm, warmed) = std::sync::mpsc::channel();
        for lanes in kinds {
            for n in 0..workers(lanes, config.max_connections) {
                let mut session = Session::new(shared.clone());
                if let Some(client) = first.take() {
                    session.adopt(client);
                }
                let (queue, owed, pace) = (queue.clone(), owed.clone(), pace.clone());
                let mut worker = Worker::new(queue, owed, pace, lanes, session, schema.clone());
                let warm = warm::is_needed_at_start(lanes, n).then(|| warm.clone());
                let name = format!("cvr-{:?}-{n}", lanes[0]).to_lowercase();
                let thread = std::thread::Builder::new().name(name).spawn(move || {
                    if let Some(warm) = warm {
                        worker.warm_up();
                        drop(warm);
                    }
                    worker.run();
                });
                store.threads.push(thread.map_err(ConnectError::Thread)?);
            }
        }
        drop(warm);
        // Nothing is ever sent: when the last one is dropped, all are warm.
        let warmed: Result<(), _> = warmed.recv_timeout(WARM_UP);
        if matches!(warmed, Err(RecvTimeoutError::Timeout)) {
            tracing::warn!("the CVR database is slow: connections to it are still being made");
        }
        Ok(store)
    }

    /// Reads what may be owed; then it waits, and has it written.
    fn read(&self, group: &ClientGroupId, job: Job) {
        match self.owed.wait(group, job) {
            Some(job) => self.push(Lane::Read, job),
            None if self.pace.awaited(group.clone()) => self.push(Lane::Rows, Job::WriteRows),
            None => {}
        }
    }

    fn push(&self, lane: Lane, job: Job) {
        self.push_all(lane, vec![job]);
    }

    fn push_all(&self, lane: Lane, jobs: Vec<Job>) {
        let Err((jobs, why)) = self.queue.push_all(lane, jobs) else { return };
        for job in jobs {
            job.refuse(match why {
                Refused::Full => CvrStoreError::Overloaded(MAX_WAITING),
                Refused::Closed => CvrStoreError::Closed,
            });
        }
    }
}

impl CvrStore for PostgresCvrStore {
    fn load(&self, group: ClientGroupId, connect_ms: f64, reply: Reply<Answer<Loaded>>) {
        let job = LoadJob { group: group.clone(), connect_ms, attempts: 0, reply };
        self.read(&group, Job::Load(job));
    }

    fn flush(&self, batch: Vec<GroupFlush>, reply: Verdicts) {
        let parts = FlushPart::split(batch, reply);
        self.push_all(Lane::Flush, parts.into_iter().map(Job::Flush).collect());
    }

    fn await_rows(&self, group: ClientGroupId, reply: Reply<Answer<()>>) {
        self.owed.tell(&group, reply);
    }

    fn hurry(&self) {
        self.pace.hurry();
        self.push(Lane::Rows, Job::WriteRows);
    }

    fn rows(&self, lookup: RowLookup, reply: Reply<Answer<RowPage>>) {
        let group = lookup.group.clone();
        self.read(&group, Job::Read(Read::Rows(lookup, reply)));
    }

    fn catch_up(&self, scan: CatchupScan, reply: Reply<Answer<CatchupPage>>) {
        if scan.range.is_empty() {
            return answer(reply, Ok(CatchupPage::default()));
        }
        let group = scan.range.group.clone();
        self.read(&group, Job::Read(Read::CatchUp(scan, reply)));
    }

    fn write_ttl_clock(&self, group: ClientGroupId, clock: TtlClock, now_ms: f64) {
        self.push(Lane::Slow, Job::TtlClock(group, clock, now_ms));
    }

    fn inspect(
        &self,
        group: ClientGroupId,
        client: Option<ClientId>,
        clock: TtlClock,
        reply: Reply<Answer<Vec<InspectedQuery>>>,
    ) {
        self.push(Lane::Read, Job::Read(Read::Inspect(group, client, clock, reply)));
    }

    fn purge(&self, limits: PurgeLimits, reply: Reply<Answer<Purged>>) {
        self.push(Lane::Slow, Job::Purge(limits, reply));
    }
}

impl Drop for PostgresCvrStore {
    fn drop(&mut self) {
        self.shared.closing.store(true, Ordering::Relaxed);
        self.pace.hurry();
        self.queue.close();
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a thread of the CVR store panicked");
            }
        }
        self.owed.abandon().into_iter().for_each(|job| job.refuse(CvrStoreError::Closed));
    }
}
