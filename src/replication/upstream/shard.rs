//! The shard's schemas, tables and publications, and their version history.

use tracing::{info, warn};
use zeroring_net::pg::{Client, Param, SqlState, quote_ident, quote_literal};

use super::{UpstreamError, ddl, in_transaction, validate};
use crate::replication::config::ShardId;

/// The version of the shard's schema that 1.9.0 writes, and we.
pub const SHARD_SCHEMA_VERSION: i64 = 23;

/// What is written as `minSafeVersion`: any server may take the schema back.
const MIN_SAFE_VERSION: i64 = 1;

/// Shards older than this are dropped and made anew by a resync (spec: replication §1.8 #12).
const OLDEST_RESETTABLE: i64 = 4;

/// Shards from this version on differ from the current one in nothing but the trigger functions.
const OLDEST_UPGRADED: i64 = 22;

/// What a shard replicates.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShardConfig {
    /// All publications, internal ones too, sorted.
    pub publications: Vec<String>,
    /// Event triggers report schema changes.
    pub ddl_detection: bool,
}

/// When a shard is looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Occasion {
    /// Before an initial sync: an absent shard is created.
    InitialSync,
    /// With a replica at hand: an absent shard means that the replica is worthless.
    Resume,
}

/// Checks the names of requested publications (spec: replication §1.4).
///
/// # Errors
/// [`UpstreamError::Invalid`] naming the first bad one.
pub fn check_publication_names(names: &[String]) -> Result<(), UpstreamError> {
    for name in names {
        let mut bytes = name.bytes();
        let first_ok = bytes.next().is_some_and(|b| b.is_ascii_alphabetic() || b == b'_');
        let problem = if name.starts_with('_') {
            "publication names starting with \"_\" are reserved for internal use"
        } else if name.len() > 63 {
            "it is longer than 63 characters"
        } else if !first_ok || !bytes.all(|b| b.is_ascii_alphanumeric() || b == b'_') {
            "it must consist of letters, digits and \"_\", and not begin with a digit"
        } else {
            continue;
        };
        return Err(UpstreamError::Invalid(format!(
            "ZERO_APP_PUBLICATIONS: the publication name {name:?} is not allowed: {problem}"
        )));
    }
    Ok(())
}

/// Makes sure that the shard is there, in the current version.
///
/// # Errors
/// [`UpstreamError::AutoReset`] if it is absent or too old although there is a replica.
pub fn ensure_shard(
    client: &mut Client,
    shard: &ShardId,
    requested: &[String],
    server_version: u32,
    occasion: Occasion,
) -> Result<(), UpstreamError> {
    check_publication_names(requested)?;
    let schema = shard.schema();
    // Looked at first without the lock: normally there is nothing to do, and nothing is written.
    if let Some(history) = read_history(client, &schema)?
        && history.data == SHARD_SCHEMA_VERSION
        && history.min_safe <= SHARD_SCHEMA_VERSION
    {
        return Ok(());
    }
    in_transaction(client, |client| {
        let lock = format!("migrate-schema:{schema}");
        client.query("SELECT pg_advisory_xact_lock(hashtext($1))", &[lock.as_str().into()])?;
        let history = read_history(client, &schema)?;
        let data = history.as_ref().map_or(0, |h| h.data);
        if let Some(history) = &history
            && history.min_safe > SHARD_SCHEMA_VERSION
        {
            return Err(UpstreamError::Unsupported(format!(
                "the upstream schema {schema} was migrated to version {} by a newer server and \
                 demands at least version {}; this server knows {SHARD_SCHEMA_VERSION}",
                history.data, history.min_safe
            )));
        }
        match data {
            0 if occasion == Occasion::Resume => Err(UpstreamError::AutoReset(format!(
                "the upstream schema {schema} does not exist"
            ))),
            0 => {
                set_up(client, shard, requested, server_version)?;
                write_history(client, &schema, history.is_some(), MIN_SAFE_VERSION)
            }
            SHARD_SCHEMA_VERSION => Ok(()),
            newer if newer > SHARD_SCHEMA_VERSION => {
                info!(from = newer, to = SHARD_SCHEMA_VERSION, "setting {schema}'s version back");
                client.execute(
                    &format!(
                        "UPDATE {}.\"versionHistory\" SET \"dataVersion\" = $1",
                        quote_ident(&schema)
                    ),
                    &[SHARD_SCHEMA_VERSION.into()],
                )?;
                Ok(())
            }
            old if old < OLDEST_RESETTABLE => Err(UpstreamError::AutoReset(format!(
                "the upstream schema {schema} has version {old}, which is too old"
            ))),
            old if old < OLDEST_UPGRADED => Err(UpstreamError::Unsupported(format!(
                "the upstream schema {schema} has version {old}. Start zero-cache 1.9.0 once to \
                 upgrade it to version {SHARD_SCHEMA_VERSION}, then this server"
            ))),
            _ => {
                let config = read_config(client, shard)?;
                ddl::install(client, shard, &config.publications, server_version)?;
                write_history(client, &schema, true, MIN_SAFE_VERSION)
            }
        }
    })
}

struct History {
    data: i64,
    min_safe: i64,
}

fn table_exists(client: &mut Client, schema: &str, table: &str) -> Result<bool, UpstreamError> {
    let row = client.query_one(
        "SELECT EXISTS (SELECT 1 FROM pg_catalog.pg_tables
           WHERE schemaname = $1 AND tablename = $2)",
        &[schema.into(), table.into()],
    )?;
    Ok(row.get(0)?)
}

fn read_history(client: &mut Client, schema: &str) -> Result<Option<History>, UpstreamError> {
    if !table_exists(client, schema, "versionHistory")? {
        return Ok(None);
    }
    let sql = format!(
        "SELECT \"dataVersion\", \"minSafeVersion\" FROM {}.\"versionHistory\"",
        quote_ident(schema)
    );
    let Some(row) = client.query_opt(&sql, &[])? else {
        return Ok(Some(History { data: 0, min_safe: 0 }));
    };
    Ok(Some(History { data: row.get(0)?, min_safe: row.get(1)? }))
}

fn write_history(
    client: &mut Client,
    schema: &str,
    exists: bool,
    min_safe: i64,
) -> Result<(), UpstreamError> {
    let s = quote_ident(schema);
    if !exists {
        client.batch_execute(&format!(
            r#"CREATE TABLE IF NOT EXISTS {s}."versionHistory" (
                 "dataVersion" int NOT NULL,
                 "schemaVersion" int NOT NULL,
                 "minSafeVersion" int NOT NULL,
                 lock char(1) NOT NULL CONSTRAINT df_schema_meta_lock DEFAULT 'v',
                 CONSTRAINT pk_schema_meta_lock PRIMARY KEY (lock),
                 CONSTRAINT ck_schema_meta_lock CHECK (lock = 'v')
               )"#
        ))?;
    }
    client.execute(
        &format!(
            r#"INSERT INTO {s}."versionHistory"
                 ("dataVersion", "schemaVersion", "minSafeVersion") VALUES ($1, $1, $2)
               ON CONFLICT (lock) DO UPDATE SET
                 "dataVersion" = EXCLUDED."dataVersion",
                 "schemaVersion" =
                   GREATEST({s}."versionHistory"."schemaVersion", EXCLUDED."schemaVersion"),
                 "minSafeVersion" =
                   GREATEST({s}."versionHistory"."minSafeVersion", EXCLUDED."minSafeVersion")"#
        ),
        &[SHARD_SCHEMA_VERSION.into(), min_safe.into()],
    )?;
    Ok(())
}

/// Creates the global schema, the shard, its publications, and the reporting of schema changes.
fn set_up(
    client: &mut Client,
    shard: &ShardId,
    requested: &[String],
    server_version: u32,
) -> Result<(), UpstreamError> {
    let schema = shard.schema();
    info!(%schema, "setting up the upstream database");
    client.batch_execute(&global_sql(&shard.app))?;
    let mut publications = requested.to_vec();
    check_publications_exist(client, requested)?;
    client.batch_execute(&shard_sql(shard))?;
    if requested.is_empty() {
        let name = shard.default_publication();
        let quoted = quote_ident(&name);
        let create = client.batch_execute(&format!(
            "DROP PUBLICATION IF EXISTS {quoted};
             CREATE PUBLICATION {quoted} FOR TABLES IN SCHEMA public
               WITH (publish_via_partition_root = true)"
        ));
        create.map_err(|error| match error {
            error if error.is(SqlState::INSUFFICIENT_PRIVILEGE) => {
                UpstreamError::Unsupported(format!(
                    "publication `{name}` for all tables cannot be created: {error}. Use a \
                     superuser, or create a publication of your tables and name it in \
                     ZERO_APP_PUBLICATIONS"
                ))
            }
            error => error.into(),
        })?;
        publications.push(name);
    }
    publications.push(shard.metadata_publication());
    publications.sort();
    publications.dedup();
    client.batch_execute(&metadata_publication_sql(shard))?;
    client.execute(
        &format!(
            r#"INSERT INTO {}."shardConfig" (publications, "ddlDetection")
               VALUES ($1::text[], false)"#,
            quote_ident(&schema)
        ),
        &[publications.as_slice().into()],
    )?;
    validate::set_replica_identities(client, &publications, server_version)?;
    ddl::install(client, shard, &publications, server_version)
}

fn check_publications_exist(
    client: &mut Client,
    requested: &[String],
) -> Result<(), UpstreamError> {
    if requested.is_empty() {
        return Ok(());
    }
    let rows = client.query(
        "SELECT pubname::text FROM pg_catalog.pg_publication WHERE pubname = ANY($1::text[])",
        &[requested.into()],
    )?;
    let known: Vec<String> = rows.iter().map(|r| r.get(0)).collect::<Result<_, _>>()?;
    match requested.iter().find(|name| !known.contains(name)) {
        None => Ok(()),
        Some(name) => Err(UpstreamError::Invalid(format!(
            "ZERO_APP_PUBLICATIONS names the publication {name:?}, which does not exist upstream. \
             Create it: CREATE PUBLICATION {} FOR TABLE …",
            quote_ident(name)
        ))),
    }
}

fn global_sql(app: &str) -> String {
    let a = quote_ident(app);
    format!(
        r#"CREATE SCHEMA IF NOT EXISTS {a};
CREATE TABLE IF NOT EXISTS {a}.permissions (
  "permissions" JSONB,
  "hash" TEXT,
  "lock" BOOL PRIMARY KEY DEFAULT true CHECK (lock)
);
CREATE OR REPLACE FUNCTION {a}.set_permissions_hash() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  NEW.hash := md5(NEW.permissions::text);
  RETURN NEW;
END
$$;
CREATE OR REPLACE TRIGGER on_set_permissions BEFORE INSERT OR UPDATE ON {a}.permissions
  FOR EACH ROW EXECUTE FUNCTION {a}.set_permissions_hash();
INSERT INTO {a}.permissions (permissions) VALUES (NULL) ON CONFLICT DO NOTHING;"#
    )
}

fn shard_sql(shard: &ShardId) -> String {
    let s = quote_ident(&shard.schema());
    format!(
        r#"CREATE SCHEMA IF NOT EXISTS {s};
CREATE TABLE {s}."clients" (
  "clientGroupID" TEXT NOT NULL,
  "clientID" TEXT NOT NULL,
  "lastMutationID" BIGINT NOT NULL,
  "userID" TEXT,
  PRIMARY KEY ("clientGroupID", "clientID")
);
CREATE TABLE {s}."mutations" (
  "clientGroupID" TEXT NOT NULL,
  "clientID" TEXT NOT NULL,
  "mutationID" BIGINT NOT NULL,
  "result" JSON NOT NULL,
  PRIMARY KEY ("clientGroupID", "clientID", "mutationID")
);
CREATE TABLE {s}."shardConfig" (
  "publications" TEXT[] NOT NULL,
  "ddlDetection" BOOL NOT NULL,
  "lock" BOOL PRIMARY KEY DEFAULT true CHECK (lock)
);
CREATE TABLE {s}."replicas" (
  "id" TEXT PRIMARY KEY DEFAULT replace(gen_random_uuid()::text, '-', ''),
  "rank" BIGSERIAL,
  "slot" TEXT NOT NULL,
  "version" TEXT NOT NULL,
  "initialSchema" JSON,
  "initialSyncContext" JSON,
  "subscriberContext" JSON
);"#
    )
}

fn metadata_publication_sql(shard: &ShardId) -> String {
    let (a, s) = (quote_ident(&shard.app), quote_ident(&shard.schema()));
    let name = quote_ident(&shard.metadata_publication());
    format!(
        r#"DROP PUBLICATION IF EXISTS {name};
CREATE PUBLICATION {name} FOR TABLE {a}."permissions", {s}."clients", {s}."mutations";"#
    )
}

/// What the shard replicates.
///
/// # Errors
/// The query failed; [`UpstreamError::Malformed`] if the row is missing.
pub fn read_config(client: &mut Client, shard: &ShardId) -> Result<ShardConfig, UpstreamError> {
    let sql = format!(
        r#"SELECT publications, "ddlDetection" FROM {}."shardConfig""#,
        quote_ident(&shard.schema())
    );
    let row = client
        .query_opt(&sql, &[])?
        .ok_or(UpstreamError::Malformed { what: "shardConfig", cause: "it has no row".into() })?;
    let mut publications: Vec<String> = row.get(0)?;
    publications.sort();
    Ok(ShardConfig { publications, ddl_detection: row.get(1)? })
}

/// Removes the shard: its publications and its schema (event triggers go with their functions).
/// `{app}.permissions` and slots stay.
///
/// # Errors
/// The server refused.
pub fn drop_shard(client: &mut Client, shard: &ShardId) -> Result<(), UpstreamError> {
    warn!(schema = shard.schema(), "dropping the upstream shard");
    client.batch_execute(&format!(
        "BEGIN; DROP PUBLICATION IF EXISTS {}; DROP PUBLICATION IF EXISTS {};
         DROP SCHEMA IF EXISTS {} CASCADE; COMMIT",
        quote_ident(&shard.default_publication()),
        quote_ident(&shard.metadata_publication()),
        quote_ident(&shard.schema())
    ))?;
    Ok(())
}

/// Publications of `all` that a user configured.
pub fn user_publications<'a>(
    shard: &ShardId,
    all: &'a [String],
    occasion: Occasion,
) -> Vec<&'a str> {
    let internal = format!("_{}_", shard.app);
    let is_internal = |p: &&str| match occasion {
        Occasion::InitialSync => p.starts_with('_'),
        Occasion::Resume => p.starts_with(&internal),
    };
    all.iter().map(String::as_str).filter(|p| !is_internal(p)).collect()
}

/// The requested publications are those that the shard was made with.
pub fn publications_match(
    shard: &ShardId,
    config: &ShardConfig,
    requested: &[String],
    occasion: Occasion,
) -> bool {
    let mut wanted: Vec<&str> = requested.iter().map(String::as_str).collect();
    wanted.sort_unstable();
    wanted.dedup();
    user_publications(shard, &config.publications, occasion) == wanted
}

/// Publications of `names` that do not exist (any more).
///
/// # Errors
/// The query failed.
pub fn missing_publications(
    client: &mut Client,
    names: &[String],
) -> Result<Vec<String>, UpstreamError> {
    let rows = client.query(
        "SELECT name FROM unnest($1::text[]) name
         WHERE name NOT IN (SELECT pubname FROM pg_catalog.pg_publication)",
        &[Param::from(names)],
    )?;
    Ok(rows.iter().map(|r| r.get(0)).collect::<Result<_, _>>()?)
}

/// The literal of a list of names for `IN (…)`.
pub(super) fn literals(names: &[String]) -> String {
    names.iter().map(|n| quote_literal(n)).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn publication_names() {
        let check = |name: &str| check_publication_names(&[name.to_owned()]);
        for good in ["a", "zero_all", "A1", &"x".repeat(63)] {
            assert!(check(good).is_ok(), "{good}");
        }
        for bad in ["", "_a", "1a", "a-b", "ä", "a\"", &"x".repeat(64)] {
            assert!(matches!(check(bad), Err(UpstreamError::Invalid(_))), "{bad}");
        }
    }

    #[test]
    fn publications_compare_as_sets_without_internal_ones() {
        let shard = ShardId { app: "zero".into(), num: 0 };
        let names = |n: &[&str]| n.iter().map(|s| (*s).to_owned()).collect::<Vec<_>>();
        let config = ShardConfig {
            publications: names(&["_zero_metadata_0", "a", "b"]),
            ddl_detection: true,
        };
        let matches = |r: &[&str]| publications_match(&shard, &config, &names(r), Occasion::Resume);
        assert!(matches(&["b", "a", "a"]));
        assert!(!matches(&["a"]));
        assert!(!matches(&[]));
        let config = ShardConfig {
            publications: names(&["_zero_metadata_0", "_zero_public_0"]),
            ddl_detection: true,
        };
        assert!(publications_match(&shard, &config, &[], Occasion::Resume));
    }
}
