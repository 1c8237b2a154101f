//! The upstream database: what must be there, what we create, and slots.
//!
//! [`shard`] creates and migrates the shard's schemas, tables and publications; [`ddl`] the
//! functions and event triggers that report schema changes; [`validate`] checks publications and
//! tables; [`slots`] creates, takes over and cleans up replication slots and `replicas` rows.
//! Everything equals what 1.9.0 creates, so that either server can take over from the other
//! (spec: replication §1).

pub mod ddl;
pub mod shard;
pub mod slots;
pub mod validate;

use std::time::Duration;

use zeroring_net::pg::{Client, PgConfig, PgError, SqlState};

use super::config::ReplicationConfig;

/// Oldest Postgres: row filters and column lists of publications came with 15.
const OLDEST_SERVER: u32 = 150_000;

/// Why upstream cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum UpstreamError {
    /// The server or the connection failed.
    #[error(transparent)]
    Pg(#[from] PgError),
    /// Upstream is not set up for logical replication, or lacks something that we need.
    #[error("{0}")]
    Unsupported(String),
    /// The configuration does not fit upstream.
    #[error("{0}")]
    Invalid(String),
    /// A slot cannot be created yet.
    #[error(
        "replication slot {slot} could not be created within {limit:?}: it waits for older \
         transactions upstream to end. Look for them in pg_stat_activity (backend_xmin)"
    )]
    SlotWaits {
        /// Its name.
        slot: String,
        /// How long it may wait.
        limit: Duration,
    },
    /// The replica is of no use any more: a new initial sync is the answer.
    #[error("the replica must be synced anew: {0}")]
    AutoReset(String),
    /// Something that Postgres or another server wrote is not as expected.
    #[error("{what} cannot be read: {cause}")]
    Malformed {
        /// What.
        what: &'static str,
        /// Why.
        cause: String,
    },
}

impl UpstreamError {
    /// SQLSTATE if the server reported the error.
    pub fn code(&self) -> Option<SqlState> {
        match self {
            UpstreamError::Pg(e) => e.code(),
            _ => None,
        }
    }
}

/// Session settings that make the text form of values the same everywhere, and that let a copy or
/// a stream take its time, whatever the role's or the database's defaults are.
const PINNED: [(&str, &str); 7] = [
    ("DateStyle", "ISO"),
    ("TimeZone", "UTC"),
    ("bytea_output", "hex"),
    ("IntervalStyle", "postgres"),
    ("extra_float_digits", "1"),
    ("statement_timeout", "0"),
    ("idle_in_transaction_session_timeout", "0"),
];

/// The configuration of a session for the purpose `name`, with pinned text output.
pub fn session_config(config: &ReplicationConfig, name: &str) -> PgConfig {
    let mut session = config.upstream.with_application_name(name);
    session.read_timeout = config.socket_inactivity;
    for (setting, value) in PINNED {
        session = session.with_parameter(setting, value);
    }
    session
}

/// Connects and checks that upstream can be replicated from. Returns the session and
/// `server_version_num`.
///
/// # Errors
/// [`UpstreamError::Unsupported`] with the fix.
pub fn connect_checked(
    config: &ReplicationConfig,
    name: &str,
) -> Result<(Client, u32), UpstreamError> {
    let mut client = Client::connect(&session_config(config, name))?;
    let row = client.query_one(
        "SELECT current_setting('server_version_num')::int4, current_setting('wal_level'),
           current_setting('server_version')",
        &[],
    )?;
    let (version, wal_level, text): (u32, &str, &str) = (row.get(0)?, row.get(1)?, row.get(2)?);
    if version < OLDEST_SERVER {
        return Err(UpstreamError::Unsupported(format!(
            "upstream is PostgreSQL {text}; version 15 or newer is needed"
        )));
    }
    if wal_level != "logical" {
        return Err(UpstreamError::Unsupported(format!(
            "upstream has wal_level = {wal_level}; set wal_level = logical in postgresql.conf and \
             restart it"
        )));
    }
    Ok((client, version))
}

/// `wal_sender_timeout` of the server; `None` if it is off.
///
/// # Errors
/// The query failed.
pub fn wal_sender_timeout(client: &mut Client) -> Result<Option<Duration>, UpstreamError> {
    let row = client.query_one(
        "SELECT setting::int8 FROM pg_catalog.pg_settings WHERE name = 'wal_sender_timeout'",
        &[],
    )?;
    let ms: u64 = row.get(0)?;
    Ok((ms > 0).then(|| Duration::from_millis(ms)))
}

/// Runs `body` in a transaction; rolls back on an error.
///
/// # Errors
/// The error of `body`, or of the transaction's own statements.
pub fn in_transaction<T>(
    client: &mut Client,
    body: impl FnOnce(&mut Client) -> Result<T, UpstreamError>,
) -> Result<T, UpstreamError> {
    client.batch_execute("BEGIN")?;
    match body(client) {
        Ok(value) => {
            client.batch_execute("COMMIT")?;
            Ok(value)
        }
        Err(error) => {
            if !client.is_broken() {
                // The first error is the one to tell.
                let _ = client.batch_execute("ROLLBACK");
            }
            Err(error)
        }
    }
}
