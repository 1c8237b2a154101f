//! A private Postgres, a replication core on it, and looks into its replica.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rusqlite::types::Value as SqlValue;
use zeroring::replication::{
    CommitSink, Phase, ReplicaInfo, ReplicationConfig, ReplicationCore, ReplicationHandle, ShardId,
};
use zeroring_core::change::Commit;
use zeroring_net::pg::local_server::LocalServer;
use zeroring_net::pg::{Client, PgConfig};
use zeroring_storage::replica::checkpoint::ReaderBarrier;

/// Longer than anything takes on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(600);

/// What a sink was told.
#[derive(Debug, Default)]
pub struct Told {
    pub commits: Vec<Arc<Commit>>,
    pub replaced: Vec<ReplicaInfo>,
}

#[derive(Debug, Default, Clone)]
pub struct Recorder(pub Arc<Mutex<Told>>);

impl ReaderBarrier for Recorder {
    fn release_all(&mut self, _timeout: Duration) -> bool {
        true
    }
    fn resume(&mut self) {}
}

impl CommitSink for Recorder {
    fn commit(&mut self, commit: Arc<Commit>) {
        self.0.lock().unwrap().commits.push(commit);
    }
    fn replica_replaced(&mut self, _path: &Path, replica: &ReplicaInfo) {
        self.0.lock().unwrap().replaced.push(replica.clone());
    }
}

/// A database and where its replica goes.
pub struct Fixture {
    pub server: LocalServer,
    pub sql: Client,
    pub config: ReplicationConfig,
    pub dir: tempfile::TempDir,
}

impl Fixture {
    /// A database with `sql` run in it.
    pub fn new(sql: &str) -> Fixture {
        log_to_output();
        let server = LocalServer::start(&["max_replication_slots=5"]).unwrap();
        let upstream = PgConfig::parse(&server.url("postgres")).unwrap();
        let mut client = Client::connect(&upstream).unwrap();
        client.batch_execute("CREATE TABLE marker (n int PRIMARY KEY)").unwrap();
        client.batch_execute(sql).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let shard = ShardId { app: "zero".into(), num: 0 };
        let config = ReplicationConfig::new(upstream, shard, dir.path().join("replica.db"));
        Fixture { server, sql: client, config, dir }
    }

    pub fn exec(&mut self, sql: &str) {
        self.sql.batch_execute(sql).unwrap();
    }

    /// A value of one row and column, as text.
    pub fn scalar(&mut self, sql: &str) -> Option<String> {
        self.sql.query_opt(sql, &[]).unwrap().and_then(|r| r.get::<Option<String>>(0).unwrap())
    }

    /// Goes on with a new, empty database of the same server.
    pub fn use_new_database(&mut self, name: &str) {
        self.exec(&format!("CREATE DATABASE {name}"));
        self.config.upstream = PgConfig::parse(&self.server.url(name)).unwrap();
        self.sql = Client::connect(&self.config.upstream).unwrap();
        self.exec("CREATE TABLE marker (n int PRIMARY KEY)");
    }

    pub fn start(&self) -> Running {
        Running::start(&self.config)
    }

    /// Starts and waits for the replica.
    pub fn start_ready(&self) -> Running {
        let running = self.start();
        running.ready();
        running
    }

    /// Waits until everything that is committed upstream now is in the replica.
    pub fn catch_up(&mut self, running: &Running) {
        let sql = "INSERT INTO marker SELECT coalesce(max(n), 0) + 1 FROM marker RETURNING n";
        let n: i64 = self.sql.query_one(sql, &[]).unwrap().get(0).unwrap();
        let path = self.config.replica_path.clone();
        eventually("the replica catches up", || {
            let phase = running.handle.status().phase();
            assert_ne!(phase, Phase::Failed, "{:?}", running.handle.status().snapshot());
            let max = rows(&path, "SELECT max(n) FROM marker");
            (max == [[SqlValue::Integer(n)]]).then_some(())
        });
    }
}

/// What the servers say is shown with a test that fails; their threads have numbers.
fn log_to_output() {
    let subscriber = tracing_subscriber::fmt().with_test_writer().with_thread_ids(true);
    // Only the first of a process counts.
    let _ = subscriber.with_max_level(tracing::Level::DEBUG).try_init();
}

pub struct Running {
    pub handle: ReplicationHandle,
    pub told: Arc<Mutex<Told>>,
    config: ReplicationConfig,
}

impl Running {
    pub fn start(config: &ReplicationConfig) -> Running {
        let recorder = Recorder::default();
        let told = recorder.0.clone();
        let handle = ReplicationCore::start(config.clone(), Box::new(recorder)).unwrap();
        Running { handle, told, config: config.clone() }
    }

    pub fn ready(&self) -> ReplicaInfo {
        self.handle.wait_ready(PATIENCE).unwrap_or_else(|| panic!("no replica: {}", self.found()))
    }

    pub fn wait_streaming(&self) {
        assert!(self.streams_or_ended(), "it ended: {}", self.found());
    }

    /// Waits until it streams, or has ended without a failure.
    pub fn streams_or_ended(&self) -> bool {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.handle.status().phase() {
                Phase::Streaming => return true,
                Phase::Stopped => return false,
                Phase::Failed => panic!("it failed: {}", self.found()),
                _ if Instant::now() >= deadline => panic!("no stream: {}", self.found()),
                _ => std::thread::sleep(Duration::from_millis(5)),
            }
        }
    }

    /// What a failure may be explained by: this server's status, and what Postgres knows.
    fn found(&self) -> String {
        let mut found = format!(
            "{}: {:#?}",
            self.config.replica_path.display(),
            self.handle.status().snapshot()
        );
        let tables = [
            ("replication", "SELECT t::text FROM pg_stat_replication t"),
            ("slots", "SELECT t::text FROM pg_replication_slots t ORDER BY slot_name"),
            (
                "replicas",
                r#"SELECT concat_ws(' ', id, rank, slot, version, "initialSyncContext")
                   FROM zero_0.replicas ORDER BY rank"#,
            ),
            ("activity", "SELECT t::text FROM pg_stat_activity t WHERE query <> ''"),
        ];
        for (what, sql) in tables {
            let rows = Client::connect(&self.config.upstream).and_then(|mut client| {
                let rows = client.query(sql, &[])?;
                rows.iter().map(|row| row.get::<String>(0)).collect::<Result<Vec<_>, _>>()
            });
            found += &format!("\n{what}: {rows:#?}");
        }
        found
    }

    pub fn stop(self) {
        self.handle.stop();
        self.handle.join().unwrap();
    }

    /// The error that it gave up with.
    pub fn failure(self) -> String {
        self.handle.join().unwrap_err().to_string()
    }

    /// Commits so far form a chain; returns them.
    pub fn commits(&self) -> Vec<Arc<Commit>> {
        let commits = self.told.lock().unwrap().commits.clone();
        for pair in commits.windows(2) {
            assert_eq!(pair[0].version, pair[1].previous, "the chain of commits is broken");
        }
        commits
    }
}

/// Polls until there is a result; fails after [`PATIENCE`].
pub fn eventually<T>(what: &str, mut poll: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(result) = poll() {
            return result;
        }
        assert!(Instant::now() < deadline, "not within {PATIENCE:?}: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Rows of the replica; none if the file or table is not there.
pub fn rows(path: &PathBuf, sql: &str) -> Vec<Vec<SqlValue>> {
    let flags = rusqlite::OpenFlags::SQLITE_OPEN_READ_ONLY;
    let Ok(connection) = rusqlite::Connection::open_with_flags(path, flags) else { return vec![] };
    let Ok(mut statement) = connection.prepare(sql) else { return vec![] };
    let width = statement.column_count();
    let rows = statement.query_map([], |row| (0..width).map(|i| row.get(i)).collect());
    rows.unwrap().collect::<Result<_, _>>().unwrap()
}

/// Rows as text, columns joined by `|`.
pub fn texts(path: &PathBuf, sql: &str) -> Vec<String> {
    let text = |v: &SqlValue| match v {
        SqlValue::Null => "NULL".to_owned(),
        SqlValue::Integer(n) => n.to_string(),
        SqlValue::Real(n) => format!("{n:?}"),
        SqlValue::Text(s) => s.clone(),
        SqlValue::Blob(b) => format!("{b:?}"),
    };
    rows(path, sql).iter().map(|r| r.iter().map(text).collect::<Vec<_>>().join("|")).collect()
}
