//! What the replication core is told at its start.

use std::path::PathBuf;
use std::time::Duration;

use zeroring_net::pg::PgConfig;
use zeroring_storage::replica::schema::TableIds;

/// Connections of the initial copy, as `ZERO_INITIAL_SYNC_TABLE_COPY_WORKERS`.
pub const DEFAULT_COPY_WORKERS: usize = 5;

/// Longest silence of a Postgres session while it owes an answer
/// (`ZERO_PG_SOCKET_INACTIVITY_TIMEOUT`).
pub const DEFAULT_SOCKET_INACTIVITY: Duration = Duration::from_secs(120);

/// The names that everything of a shard carries (spec: replication §1.2).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShardId {
    /// `ZERO_APP_ID`.
    pub app: String,
    /// `ZERO_SHARD_NUM`.
    pub num: u32,
}

impl ShardId {
    /// The shard's schema upstream and the prefix of its slots: `{app}_{num}`.
    pub fn schema(&self) -> String {
        format!("{}_{}", self.app, self.num)
    }

    /// The publication made when none is configured.
    pub fn default_publication(&self) -> String {
        format!("_{}_public_{}", self.app, self.num)
    }

    /// The publication of the shard's own tables.
    pub fn metadata_publication(&self) -> String {
        format!("_{}_metadata_{}", self.app, self.num)
    }

    /// Prefix of logical messages with schema changes.
    pub fn ddl_prefix(&self) -> String {
        format!("{}/{}/ddl", self.app, self.num)
    }

    /// Prefix of logical messages with lag reports.
    pub fn lag_report_prefix(&self) -> String {
        format!("{}/{}/lag-report/v1", self.app, self.num)
    }
}

/// As the original waits (spec: replication §1.7).
const SLOT_CREATION: Duration = Duration::from_secs(30);

/// Everything that [`super::ReplicationCore::start`] needs.
#[derive(Debug, Clone)]
pub struct ReplicationConfig {
    /// Upstream database (`ZERO_UPSTREAM_DB`).
    pub upstream: PgConfig,
    /// App id and shard number.
    pub shard: ShardId,
    /// Requested publications (`ZERO_APP_PUBLICATIONS`); empty: everything in schema `public`.
    pub publications: Vec<String>,
    /// The replica (`ZERO_REPLICA_FILE`).
    pub replica_path: PathBuf,
    /// Connections of the initial copy.
    pub copy_workers: usize,
    /// Initial copy in text instead of binary (`ZERO_INITIAL_SYNC_TEXT_COPY`).
    pub text_copy: bool,
    /// Make slots that survive a failover, Postgres 17+
    /// (`ZERO_UPSTREAM_PG_REPLICATION_SLOT_FAILOVER`).
    pub slot_failover: bool,
    /// Silence of the stream after which it is torn down
    /// (`ZERO_UPSTREAM_PG_STREAM_INBOUND_TIMEOUT_MS`); `None`: twice the server's
    /// `wal_sender_timeout`.
    pub stream_inbound_timeout: Option<Duration>,
    /// Silence of an ordinary session that owes an answer; `None`: no limit.
    pub socket_inactivity: Option<Duration>,
    /// How long the creation of a slot may wait for older transactions upstream, before it is
    /// tried again.
    pub slot_creation: Duration,
    /// Answer a stream that cannot be continued by a new initial sync (`ZERO_AUTO_RESET`).
    pub auto_reset: bool,
    /// Who we are, as JSON object (`appID`, `taskID`, `hostIP`, `hostname`, `timestamp`); stored
    /// with the replica and upstream.
    pub context: serde_json::Value,
    /// Numbers of tables: the executors' readers must have the same.
    pub table_ids: TableIds,
}

impl ReplicationConfig {
    /// A configuration with the defaults of every option.
    pub fn new(upstream: PgConfig, shard: ShardId, replica_path: impl Into<PathBuf>) -> Self {
        let context = serde_json::json!({ "appID": shard.app });
        ReplicationConfig {
            upstream,
            shard,
            publications: Vec::new(),
            replica_path: replica_path.into(),
            copy_workers: DEFAULT_COPY_WORKERS,
            text_copy: false,
            slot_failover: false,
            stream_inbound_timeout: None,
            socket_inactivity: Some(DEFAULT_SOCKET_INACTIVITY),
            slot_creation: SLOT_CREATION,
            auto_reset: true,
            context,
            table_ids: TableIds::default(),
        }
    }
}
