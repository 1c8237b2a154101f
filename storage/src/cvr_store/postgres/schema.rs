//! The tables, and how older ones become them (spec: view-syncer-cvr §2.1, §2.2).
//!
//! The schema is the original's, version 17, and stays it: an original 1.9.0 may start on it at
//! any moment. So we present its version and never raise its rollback limit.

use tracing::info;
use zeroring_net::pg::{Client, PgError, quote_ident, quote_literal};

use super::ConnectError;

/// The version that an original 1.9.0 has.
pub const SCHEMA_VERSION: i32 = 17;

/// The oldest version that can be migrated. The original's own steps fail below it.
const OLDEST: i32 = 6;

/// Name of the Postgres schema (not quoted).
pub(super) fn schema_name(app: &str, shard: u32) -> String {
    format!("{app}_{shard}/cvr")
}

/// Fills `@.` in a statement with the quoted schema.
pub(super) fn qualify(text: &str, schema: &str) -> String {
    text.replace("@.", &format!("{}.", quote_ident(schema)))
}

/// What `versionHistory` says; all zero if it has nothing to say.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Versions {
    data: i32,
    schema: i32,
    min_safe: i32,
}

/// All tables of version 17, as the original makes them.
const SET_UP: &str = r#"
CREATE TABLE @."instances" (
  "clientGroupID"  TEXT PRIMARY KEY,
  "version"        TEXT NOT NULL,
  "lastActive"     TIMESTAMPTZ NOT NULL,
  "ttlClock"       DOUBLE PRECISION NOT NULL DEFAULT 0,
  "replicaVersion" TEXT,
  "owner"          TEXT,
  "grantedAt"      TIMESTAMPTZ,
  "clientSchema"   JSONB,
  "profileID"      TEXT,
  "deleted"        BOOL DEFAULT FALSE
);
CREATE INDEX "instances_last_active" ON @."instances" ("lastActive") WHERE NOT "deleted";
CREATE INDEX "tombstones_last_active" ON @."instances" ("lastActive") WHERE "deleted";
CREATE INDEX "profile_ids_last_active" ON @."instances" ("lastActive", "profileID")
  WHERE "profileID" IS NOT NULL;

CREATE TABLE @."clients" (
  "clientGroupID" TEXT,
  "clientID"      TEXT,
  PRIMARY KEY ("clientGroupID", "clientID"),
  CONSTRAINT "fk_clients_client_group" FOREIGN KEY ("clientGroupID")
    REFERENCES @."instances" ("clientGroupID") ON DELETE CASCADE
);

CREATE TABLE @."queries" (
  "clientGroupID"         TEXT,
  "queryHash"             TEXT,
  "clientAST"             JSONB,
  "queryName"             TEXT,
  "queryArgs"             JSON,
  "patchVersion"          TEXT,
  "transformationHash"    TEXT,
  "transformationVersion" TEXT,
  "internal"              BOOL,
  "deleted"               BOOL,
  "rowSetSignature"       TEXT,
  PRIMARY KEY ("clientGroupID", "queryHash"),
  CONSTRAINT "fk_queries_client_group" FOREIGN KEY ("clientGroupID")
    REFERENCES @."instances" ("clientGroupID") ON DELETE CASCADE
);
CREATE INDEX "queries_patch_version" ON @."queries" ("patchVersion" NULLS FIRST);

CREATE TABLE @."desires" (
  "clientGroupID"   TEXT,
  "clientID"        TEXT,
  "queryHash"       TEXT,
  "patchVersion"    TEXT NOT NULL,
  "deleted"         BOOL,
  "ttl"             INTERVAL,
  "ttlMs"           DOUBLE PRECISION,
  "inactivatedAt"   TIMESTAMPTZ,
  "inactivatedAtMs" DOUBLE PRECISION,
  PRIMARY KEY ("clientGroupID", "clientID", "queryHash"),
  CONSTRAINT "fk_desires_query" FOREIGN KEY ("clientGroupID", "queryHash")
    REFERENCES @."queries" ("clientGroupID", "queryHash") ON DELETE CASCADE
);
CREATE INDEX "desires_patch_version" ON @."desires" ("patchVersion");
CREATE INDEX "desires_inactivated_at" ON @."desires" ("inactivatedAt");

CREATE TABLE @."rowsVersion" (
  "clientGroupID" TEXT PRIMARY KEY,
  "version"       TEXT NOT NULL
);

CREATE TABLE @."rows" (
  "clientGroupID" TEXT,
  "schema"        TEXT,
  "table"         TEXT,
  "rowKey"        JSONB,
  "rowVersion"    TEXT NOT NULL,
  "patchVersion"  TEXT NOT NULL,
  "refCounts"     JSONB,
  PRIMARY KEY ("clientGroupID", "schema", "table", "rowKey"),
  CONSTRAINT "fk_rows_client_group" FOREIGN KEY ("clientGroupID")
    REFERENCES @."rowsVersion" ("clientGroupID") ON DELETE CASCADE
);
CREATE INDEX "row_patch_version" ON @."rows" ("patchVersion");
CREATE INDEX "row_ref_counts" ON @."rows" USING GIN ("refCounts");
"#;

/// A step to the version `to`: definitions, which run once in the life of a schema, and contents,
/// which run again after a rollback to an older server.
struct Step {
    to: i32,
    definitions: &'static str,
    contents: &'static str,
}

const fn step(to: i32, definitions: &'static str, contents: &'static str) -> Step {
    Step { to, definitions, contents }
}

/// From [`OLDEST`] on, in order.
const STEPS: [Step; 11] = [
    step(
        7,
        r#"ALTER TABLE @."desires" ADD "expiresAt" TIMESTAMPTZ, ADD "inactivatedAt" TIMESTAMPTZ,
             ADD "ttl" INTERVAL;
           CREATE INDEX "desires_expires_at" ON @."desires" ("expiresAt");
           CREATE INDEX "desires_inactivated_at" ON @."desires" ("inactivatedAt");"#,
        "",
    ),
    step(8, r#"ALTER TABLE @."desires" DROP CONSTRAINT IF EXISTS "fk_desires_client";"#, ""),
    step(9, r#"ALTER TABLE @."instances" ADD "clientSchema" JSONB;"#, ""),
    step(
        10,
        r#"ALTER TABLE @."queries" ADD "queryName" TEXT, ADD "queryArgs" JSONB,
             ALTER "clientAST" DROP NOT NULL;"#,
        "",
    ),
    step(
        11,
        r#"DROP INDEX IF EXISTS @."desires_expires_at";
           ALTER TABLE @."desires" DROP COLUMN IF EXISTS "expiresAt";
           DROP INDEX IF EXISTS @."client_patch_version";
           ALTER TABLE @."clients" DROP COLUMN IF EXISTS "patchVersion",
             DROP COLUMN IF EXISTS "deleted";"#,
        "",
    ),
    step(12, r#"ALTER TABLE @."queries" ALTER "queryArgs" TYPE JSON USING "queryArgs"::json;"#, ""),
    step(
        13,
        r#"ALTER TABLE @."instances" ADD "ttlClock" DOUBLE PRECISION NOT NULL DEFAULT 0;"#,
        "",
    ),
    step(
        14,
        r#"CREATE INDEX "instances_last_active" ON @."instances" ("lastActive");
           ALTER TABLE @."clients" DROP CONSTRAINT IF EXISTS "fk_clients_client_group",
             ADD CONSTRAINT "fk_clients_client_group" FOREIGN KEY ("clientGroupID")
             REFERENCES @."instances" ("clientGroupID") ON DELETE CASCADE;
           ALTER TABLE @."queries" DROP CONSTRAINT IF EXISTS "fk_queries_client_group",
             ADD CONSTRAINT "fk_queries_client_group" FOREIGN KEY ("clientGroupID")
             REFERENCES @."instances" ("clientGroupID") ON DELETE CASCADE;
           ALTER TABLE @."rows" DROP CONSTRAINT IF EXISTS "fk_rows_client_group",
             ADD CONSTRAINT "fk_rows_client_group" FOREIGN KEY ("clientGroupID")
             REFERENCES @."rowsVersion" ("clientGroupID") ON DELETE CASCADE;"#,
        "",
    ),
    step(
        15,
        r#"ALTER TABLE @."desires" ADD "inactivatedAtMs" DOUBLE PRECISION,
             ADD "ttlMs" DOUBLE PRECISION;"#,
        r#"UPDATE @."desires" SET
             "ttlMs" = extract(epoch FROM "ttl") * 1000,
             "inactivatedAtMs" = extract(epoch FROM "inactivatedAt") * 1000;"#,
    ),
    step(
        16,
        r#"ALTER TABLE @."instances" ADD "profileID" TEXT, ADD "deleted" BOOL DEFAULT FALSE;
           DROP INDEX IF EXISTS @."instances_last_active";
           CREATE INDEX "instances_last_active" ON @."instances" ("lastActive")
             WHERE NOT "deleted";
           CREATE INDEX "tombstones_last_active" ON @."instances" ("lastActive") WHERE "deleted";
           CREATE INDEX "profile_ids_last_active" ON @."instances" ("lastActive", "profileID")
             WHERE "profileID" IS NOT NULL;"#,
        r#"UPDATE @."instances" SET "profileID" = 'cg' || "clientGroupID"
             WHERE "profileID" IS NULL;"#,
    ),
    step(17, r#"ALTER TABLE @."queries" ADD "rowSetSignature" TEXT;"#, ""),
];

/// Makes the tables, or brings them to version 17, in one transaction. Several servers may do so
/// at once: one does it, the others wait and find it done.
pub(super) fn migrate(client: &mut Client, schema: &str) -> Result<(), ConnectError> {
    let failed = |source| ConnectError::Migrate { schema: schema.to_owned(), source };
    client.batch_execute("BEGIN ISOLATION LEVEL READ COMMITTED").map_err(failed)?;
    let done = migrate_in_transaction(client, schema);
    let end = if done.is_ok() { "COMMIT" } else { "ROLLBACK" };
    let ended = client.batch_execute(end).map_err(failed);
    done.and(ended)
}

fn migrate_in_transaction(client: &mut Client, schema: &str) -> Result<(), ConnectError> {
    let failed = |source| ConnectError::Migrate { schema: schema.to_owned(), source };
    let found = lock_and_read(client, schema).map_err(failed)?;
    let Some(script) = script(found, schema)? else { return Ok(()) };
    if found.data == 0 {
        info!(schema, version = SCHEMA_VERSION, "creating the CVR tables");
    } else {
        info!(schema, from = found.data, to = SCHEMA_VERSION, "migrating the CVR tables");
    }
    client.batch_execute(&script).map_err(failed)
}

fn lock_and_read(client: &mut Client, schema: &str) -> Result<Versions, PgError> {
    client.batch_execute(&format!(
        "SET LOCAL statement_timeout = 0; SELECT pg_advisory_xact_lock(hashtext({}))",
        quote_literal(&format!("migrate-schema:{schema}"))
    ))?;
    let exists = client.query_opt(
        "SELECT 1 FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n
           ON n.oid = c.relnamespace
         WHERE n.nspname = $1::text AND c.relname = 'versionHistory'",
        &[schema.into()],
    )?;
    if exists.is_none() {
        client.batch_execute(&qualify(
            &format!(
                r#"CREATE SCHEMA IF NOT EXISTS {};
                CREATE TABLE @."versionHistory" (
                  "dataVersion"    INT NOT NULL,
                  "schemaVersion"  INT NOT NULL,
                  "minSafeVersion" INT NOT NULL,
                  "lock"           CHAR(1) NOT NULL DEFAULT 'v',
                  CONSTRAINT "pk_schema_meta_lock" PRIMARY KEY ("lock"),
                  CONSTRAINT "ck_schema_meta_lock" CHECK ("lock" = 'v')
                )"#,
                quote_ident(schema)
            ),
            schema,
        ))?;
    }
    let row = client.query_opt(
        &qualify(
            r#"SELECT "dataVersion", "schemaVersion", "minSafeVersion" FROM @."versionHistory""#,
            schema,
        ),
        &[],
    )?;
    let Some(row) = row else { return Ok(Versions::default()) };
    Ok(Versions { data: row.get(0)?, schema: row.get(1)?, min_safe: row.get(2)? })
}

/// What has to be run; `None` if nothing.
fn script(found: Versions, schema: &str) -> Result<Option<String>, ConnectError> {
    if SCHEMA_VERSION < found.min_safe {
        return Err(ConnectError::RollbackLimit { limit: found.min_safe });
    }
    let mut script = String::new();
    let mut to = Versions { data: SCHEMA_VERSION, ..found };
    match found.data {
        SCHEMA_VERSION => return Ok(None),
        // A newer server ran here; its definitions stay, and are required to suit us.
        data if data > SCHEMA_VERSION => {}
        0 => {
            script.push_str(SET_UP);
            to = Versions { data: SCHEMA_VERSION, schema: SCHEMA_VERSION, min_safe: 1 };
        }
        data if data < OLDEST => {
            return Err(ConnectError::TooOld { schema: schema.to_owned(), found: data });
        }
        data => {
            for step in STEPS.iter().filter(|s| s.to > data) {
                if found.schema < step.to {
                    script.push_str(step.definitions);
                }
                script.push_str(step.contents);
            }
            to.schema = found.schema.max(SCHEMA_VERSION);
        }
    }
    let Versions { data, schema: definitions, min_safe } = to;
    script.push_str(&format!(
        r#"INSERT INTO @."versionHistory" ("dataVersion", "schemaVersion", "minSafeVersion")
           VALUES ({data}, {definitions}, {min_safe})
           ON CONFLICT ("lock") DO UPDATE SET "dataVersion" = excluded."dataVersion",
             "schemaVersion" = excluded."schemaVersion",
             "minSafeVersion" = excluded."minSafeVersion""#
    ));
    Ok(Some(qualify(&script, schema)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn versions(data: i32, schema: i32, min_safe: i32) -> Versions {
        Versions { data, schema, min_safe }
    }

    #[test]
    fn rollback_limits_and_old_schemas_are_refused() {
        let error = script(versions(18, 18, 18), "s").unwrap_err().to_string();
        assert_eq!(error, "Cannot run view-syncer at schema v17 because rollback limit is v18");
        assert!(script(versions(5, 5, 3), "s").unwrap_err().to_string().contains("version 5"));
    }

    #[test]
    fn after_a_rollback_only_contents_are_brought_up_again() {
        let again = script(versions(14, 17, 3), "a_0/cvr").unwrap().unwrap();
        assert!(!again.contains("ALTER"), "{again}");
        assert_eq!(again.matches("UPDATE \"a_0/cvr\"").count(), 2);
        assert!(again.contains("VALUES (17, 17, 3)"));
        let newer = script(versions(18, 18, 3), "a_0/cvr").unwrap().unwrap();
        assert!(newer.contains("VALUES (17, 18, 3)") && !newer.contains("ALTER"));
        assert_eq!(script(versions(17, 18, 3), "s").unwrap(), None);
    }

    #[test]
    fn steps_lead_from_the_oldest_to_ours_without_a_gap() {
        let to: Vec<_> = STEPS.iter().map(|s| s.to).collect();
        assert_eq!(to, (OLDEST + 1..=SCHEMA_VERSION).collect::<Vec<_>>());
    }
}
