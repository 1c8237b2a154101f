//! Replication slots and the rows of `replicas` that go with them (spec: replication §1.7).

use std::time::{Duration, Instant};

use tracing::{info, warn};
use zeroring_core::version::StateVersion;
use zeroring_net::pg::replication::parse_lsn;
use zeroring_net::pg::{Client, PgError, Row, SqlState, quote_ident};

use super::{UpstreamError, in_transaction, session_config};
use crate::replication::config::{ReplicationConfig, ShardId};

/// The server's `lock_timeout` is this part of the time for the creation of a slot: it usually
/// gives up by itself.
const LOCK_TIMEOUT: (u32, u32) = (29, 30);

/// How often the name of a new slot may be taken between looking and creating: servers of other
/// databases of the cluster do not wait for our lock, and a session that was given up may still
/// create what it was asked for.
const MAX_NAMES_LOST: u32 = 50;

/// Slot names that are tried; a server has far fewer slots.
const MAX_SLOT_NAMES: u32 = 10_000;

/// First Postgres with slots that survive a failover.
const PG_17: u32 = 170_000;

/// A new replica with its slot. The snapshot lives until `session` does anything else.
#[derive(Debug)]
pub struct NewReplica {
    /// `replicas.id`.
    pub id: String,
    /// Slot name.
    pub slot: String,
    /// Everything up to here is in the snapshot.
    pub version: StateVersion,
    /// For `SET TRANSACTION SNAPSHOT`.
    pub snapshot: String,
    /// Holds the snapshot.
    pub session: Client,
}

/// A row of `replicas`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReplicaRow {
    /// Key.
    pub id: String,
    /// Newest has the highest.
    pub rank: i64,
    /// Its slot.
    pub slot: String,
    /// JSON of the published schema at the initial sync.
    pub initial_schema: Option<String>,
}

/// How the server thinks of a slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SlotHealth {
    /// All WAL that it needs is there.
    Ok,
    /// It may lose WAL at the next checkpoint.
    Unreserved,
    /// It cannot be used any more.
    Lost,
    /// There is none of this name.
    Missing,
}

/// `a` … `z`, `aa`, `ab`, …
fn suffix(mut n: u32) -> String {
    let mut out = vec![];
    loop {
        out.push(b'a' + (n % 26) as u8);
        n /= 26;
        if n == 0 {
            break;
        }
        n -= 1;
    }
    out.iter().rev().map(|b| char::from(*b)).collect()
}

fn lock(client: &mut Client, shard: &ShardId) -> Result<(), UpstreamError> {
    let name = format!("replication-slot-management:{}", shard.schema());
    client.query("SELECT pg_advisory_xact_lock(hashtext($1))", &[name.as_str().into()])?;
    Ok(())
}

/// `{app}_{num}_%` as a LIKE pattern; `_` matches anything in one.
fn slot_pattern(shard: &ShardId) -> String {
    format!("{}\\_%", shard.schema().replace('_', "\\_"))
}

/// Drops slots of the shard that nobody uses and no replica claims; returns their names.
///
/// # Errors
/// The server refused.
pub fn drop_unclaimed_slots(
    client: &mut Client,
    shard: &ShardId,
) -> Result<Vec<String>, UpstreamError> {
    in_transaction(client, |client| {
        lock(client, shard)?;
        let rows = client.query(
            &format!(
                "SELECT slot_name::text, pg_drop_replication_slot(slot_name)
                 FROM pg_catalog.pg_replication_slots
                 WHERE slot_name LIKE $1 AND NOT active
                   AND database = current_database()
                   AND slot_name NOT IN (SELECT slot FROM {}.replicas)",
                quote_ident(&shard.schema())
            ),
            &[slot_pattern(shard).into()],
        )?;
        let names: Vec<String> = rows.iter().map(|r| r.get(0)).collect::<Result<_, _>>()?;
        if !names.is_empty() {
            info!(?names, "dropped replication slots that were left over");
        }
        Ok(names)
    })
}

/// Creates a slot and the `replicas` row that claims it.
///
/// # Errors
/// The server refused, also after the one attempt to mend it (granting REPLICATION, removing dead
/// replicas).
pub fn create_replica(
    client: &mut Client,
    config: &ReplicationConfig,
    server_version: u32,
    id: &str,
) -> Result<NewReplica, UpstreamError> {
    drop_unclaimed_slots(client, &config.shard)?;
    let (mut granted, mut cleaned, mut names_lost) = (false, false, 0);
    loop {
        let error = match try_create(client, config, server_version, id) {
            Ok(replica) => return Ok(replica),
            Err(error) => error,
        };
        match error.code() {
            Some(SqlState::INSUFFICIENT_PRIVILEGE) if !granted => {
                granted = true;
                warn!(%error, "granting REPLICATION to the role, to create a slot");
                client.batch_execute("ALTER ROLE CURRENT_USER WITH REPLICATION")?;
            }
            Some(SqlState::CONFIGURATION_LIMIT_EXCEEDED) if !cleaned => {
                cleaned = true;
                warn!(%error, "no replication slot is free: removing replicas that nobody uses");
                delete_inactive_replicas(client, &config.shard)?;
                drop_unclaimed_slots(client, &config.shard)?;
            }
            Some(SqlState::DUPLICATE_OBJECT) if names_lost < MAX_NAMES_LOST => {
                names_lost += 1;
                info!(%error, "somebody was faster; trying another name");
            }
            _ => return Err(error),
        }
    }
}

fn try_create(
    client: &mut Client,
    config: &ReplicationConfig,
    server_version: u32,
    id: &str,
) -> Result<NewReplica, UpstreamError> {
    let shard = &config.shard;
    let mut unclaimed = None;
    let created = in_transaction(client, |client| {
        lock(client, shard)?;
        let slot = free_slot_name(client, shard)?;
        let failover = config.slot_failover && server_version >= PG_17;
        let (session, lsn, snapshot) = create_slot(client, config, &slot, failover)?;
        unclaimed = Some(slot.clone());
        let version = StateVersion::from_lsn(lsn);
        let row = format!(
            "INSERT INTO {}.replicas (id, slot, version) VALUES ($1, $2, $3)",
            quote_ident(&shard.schema())
        );
        let params = [id.into(), slot.as_str().into(), version.as_str().into()];
        client.execute(&row, &params)?;
        Ok(NewReplica { id: id.to_owned(), slot, version, snapshot, session })
    });
    if let (Err(_), Some(slot)) = (&created, &unclaimed) {
        drop_slot(client, shard, slot, id);
    }
    created
}

fn free_slot_name(client: &mut Client, shard: &ShardId) -> Result<String, UpstreamError> {
    // Names are unique in the whole cluster, whatever the database.
    let rows = client.query("SELECT slot_name::text FROM pg_catalog.pg_replication_slots", &[])?;
    let taken: Vec<String> = rows.iter().map(|r| r.get(0)).collect::<Result<_, _>>()?;
    (0..MAX_SLOT_NAMES)
        .map(|n| format!("{}_{}", shard.schema(), suffix(n)))
        .find(|name| !taken.contains(name))
        .ok_or_else(|| UpstreamError::Unsupported("no name for a replication slot is free".into()))
}

/// Creates the slot on a session of its own; returns its consistent point and snapshot.
fn create_slot(
    client: &mut Client,
    config: &ReplicationConfig,
    slot: &str,
    failover: bool,
) -> Result<(Client, u64, String), UpstreamError> {
    let mut settings = session_config(config, "zero-initial-sync-replication-session");
    settings.read_timeout = Some(config.slot_creation);
    let mut session = Client::connect_replication(&settings)?;
    let lock_timeout = config.slot_creation * LOCK_TIMEOUT.0 / LOCK_TIMEOUT.1;
    session.batch_execute(&format!("SET lock_timeout = {}", lock_timeout.as_millis().max(1)))?;
    let options = if failover { " (FAILOVER)" } else { "" };
    let command =
        format!("CREATE_REPLICATION_SLOT {} LOGICAL pgoutput{options}", quote_ident(slot));
    let results = match session.simple_query(&command) {
        Ok(results) => results,
        Err(PgError::Timeout(limit)) => {
            // It would go on, and leave a slot behind that nobody uses.
            client.execute("SELECT pg_terminate_backend($1)", &[session.process_id().into()])?;
            return Err(UpstreamError::SlotWaits { slot: slot.to_owned(), limit });
        }
        Err(error) if error.is(SqlState::LOCK_NOT_AVAILABLE) => {
            let limit = config.slot_creation;
            return Err(UpstreamError::SlotWaits { slot: slot.to_owned(), limit });
        }
        Err(error) => return Err(error.into()),
    };
    session.set_read_timeout(config.socket_inactivity);
    let row: &Row = results.first().and_then(|r| r.rows.first()).ok_or_else(unreadable_slot)?;
    let lsn = parse_lsn(row.by_name("consistent_point")?).ok_or_else(unreadable_slot)?;
    let snapshot = row.by_name("snapshot_name")?;
    Ok((session, lsn, snapshot))
}

fn unreadable_slot() -> UpstreamError {
    UpstreamError::Malformed {
        what: "the answer to CREATE_REPLICATION_SLOT",
        cause: "consistent_point or snapshot_name is missing".into(),
    }
}

/// Drops the slot of a failed attempt, unless it is gone and its name is that of another replica
/// by now. Only tells the log if that fails (the next start cleans up).
pub fn drop_slot(client: &mut Client, shard: &ShardId, slot: &str, id: &str) {
    let sql = format!(
        "SELECT pg_drop_replication_slot(slot_name) FROM pg_catalog.pg_replication_slots
         WHERE slot_name = $1
           AND slot_name NOT IN (SELECT slot FROM {}.replicas WHERE id <> $2)",
        quote_ident(&shard.schema())
    );
    // Its session may still be going.
    let deadline = Instant::now() + Duration::from_secs(5);
    loop {
        let dropped = in_transaction(client, |client| {
            lock(client, shard)?;
            Ok(client.query(&sql, &[slot.into(), id.into()])?)
        });
        match dropped {
            Ok(_) => return,
            Err(e) if e.code() == Some(SqlState::OBJECT_IN_USE) && Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(20));
            }
            Err(error) => {
                warn!(%error, slot, "a replication slot could not be dropped");
                return;
            }
        }
    }
}

/// Removes replicas whose slot nobody uses (all slots are taken, ours is yet to come).
fn delete_inactive_replicas(client: &mut Client, shard: &ShardId) -> Result<(), UpstreamError> {
    client.execute(
        &format!(
            "DELETE FROM {}.replicas WHERE slot IN
               (SELECT slot_name FROM pg_catalog.pg_replication_slots WHERE NOT active)",
            quote_ident(&shard.schema())
        ),
        &[],
    )?;
    Ok(())
}

/// Marks a replica as usable: its initial sync is complete. False if its row is gone: a newer
/// replica was ready first, and its server removed the older ones.
///
/// # Errors
/// The server refused.
pub fn complete_replica(
    client: &mut Client,
    shard: &ShardId,
    id: &str,
    initial_schema: &serde_json::Value,
    context: &serde_json::Value,
) -> Result<bool, UpstreamError> {
    let updated = client.execute(
        &format!(
            r#"UPDATE {}.replicas SET "initialSchema" = $2::json, "initialSyncContext" = $3::json
               WHERE id = $1"#,
            quote_ident(&shard.schema())
        ),
        &[id.into(), initial_schema.into(), context.into()],
    )?;
    Ok(updated == 1)
}

/// The newest usable replica of a version.
///
/// # Errors
/// The query failed.
pub fn find_replica(
    client: &mut Client,
    shard: &ShardId,
    version: &StateVersion,
) -> Result<Option<ReplicaRow>, UpstreamError> {
    let row = client.query_opt(
        &format!(
            r#"SELECT id, rank, slot, "initialSchema" FROM {}.replicas
               WHERE version = $1 AND "initialSyncContext" IS NOT NULL
               ORDER BY rank DESC LIMIT 1"#,
            quote_ident(&shard.schema())
        ),
        &[version.as_str().into()],
    )?;
    row.map(|row| {
        Ok(ReplicaRow {
            id: row.get(0)?,
            rank: row.get(1)?,
            slot: row.get(2)?,
            initial_schema: row.get(3)?,
        })
    })
    .transpose()
}

/// The health of a slot.
///
/// # Errors
/// The query failed.
pub fn slot_health(client: &mut Client, slot: &str) -> Result<SlotHealth, UpstreamError> {
    let row = client.query_opt(
        "SELECT restart_lsn IS NOT NULL, wal_status FROM pg_catalog.pg_replication_slots
         WHERE slot_name = $1",
        &[slot.into()],
    )?;
    let Some(row) = row else { return Ok(SlotHealth::Missing) };
    Ok(match row.get::<Option<&str>>(1)? {
        Some("lost") => SlotHealth::Lost,
        _ if !row.get::<bool>(0)? => SlotHealth::Lost,
        Some("unreserved") => SlotHealth::Unreserved,
        _ => SlotHealth::Ok,
    })
}

/// Ends whoever streams from the slot. False if there is no such slot (any more): another server
/// has moved on to a new replica.
///
/// # Errors
/// The server refused.
pub fn take_over(
    client: &mut Client,
    config: &ReplicationConfig,
    replica: &ReplicaRow,
) -> Result<bool, UpstreamError> {
    let rows = client.query(
        "SELECT active_pid, CASE WHEN active_pid IS NOT NULL
           THEN pg_terminate_backend(active_pid) END
         FROM pg_catalog.pg_replication_slots WHERE slot_name = $1",
        &[replica.slot.as_str().into()],
    )?;
    let Some(row) = rows.first() else { return Ok(false) };
    if let Some(pid) = row.get::<Option<i32>>(0)? {
        info!(pid, slot = replica.slot, "took the replication slot over");
    }
    client.execute(
        &format!(
            r#"UPDATE {}.replicas SET "subscriberContext" = $2::json WHERE id = $1"#,
            quote_ident(&config.shard.schema())
        ),
        &[replica.id.as_str().into(), (&config.context).into()],
    )?;
    Ok(true)
}

/// Removes replicas older than ours and the slots that nobody claims then. Returns how many
/// unclaimed slots are still in use (their servers are being replaced): try again later.
///
/// # Errors
/// The server refused.
pub fn drop_old_replicas(
    client: &mut Client,
    shard: &ShardId,
    rank: i64,
) -> Result<u64, UpstreamError> {
    let s = quote_ident(&shard.schema());
    client.execute(&format!("DELETE FROM {s}.replicas WHERE rank < $1"), &[rank.into()])?;
    drop_unclaimed_slots(client, shard)?;
    let row = client.query_one(
        &format!(
            "SELECT count(*) FROM pg_catalog.pg_replication_slots
             WHERE slot_name LIKE $1 AND active AND database = current_database()
               AND slot_name NOT LIKE $2
               AND slot_name NOT IN (SELECT slot FROM {s}.replicas)"
        ),
        &[slot_pattern(shard).into(), "%\\_bf\\_%".into()],
    )?;
    Ok(row.get(0)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slot_suffixes_count_in_bijective_base_26() {
        let names: Vec<String> = [0, 1, 25, 26, 27, 51, 52, 701, 702].map(suffix).into();
        assert_eq!(names, ["a", "b", "z", "aa", "ab", "az", "ba", "zz", "aaa"]);
    }

    #[test]
    fn patterns_do_not_take_underscores_for_wildcards() {
        let shard = ShardId { app: "a_b".into(), num: 1 };
        assert_eq!(slot_pattern(&shard), "a\\_b\\_1\\_%");
    }
}
