//! The functions and event triggers that report schema changes as logical messages
//! (spec: replication §1.6).

use tracing::warn;
use zeroring_net::pg::{Client, SqlState, quote_ident, quote_literal};

use super::{UpstreamError, shard};
use crate::replication::config::ShardId;
use crate::replication::published::published_schema_sql;

/// Serialises schema changes of all sessions, so that each is compared with the one before.
const DDL_LOCK: i64 = 0x3c6b_8468_f1ba_c0b0;

/// Commands that are reported when they start and when they end.
const TAGS: [&str; 7] = [
    "CREATE TABLE",
    "ALTER TABLE",
    "CREATE INDEX",
    "DROP TABLE",
    "DROP INDEX",
    "ALTER PUBLICATION",
    "ALTER SCHEMA",
];

/// Installs the functions, notes the present schema, and tries to create the triggers. Without
/// the privilege for event triggers the shard works in degraded mode: a schema change stops
/// replication and leads to a resync.
///
/// # Errors
/// Anything but the missing privilege.
pub fn install(
    client: &mut Client,
    shard: &ShardId,
    publications: &[String],
    server_version: u32,
) -> Result<(), UpstreamError> {
    client.batch_execute(&functions_sql(shard, publications, server_version))?;
    client.batch_execute("SAVEPOINT event_triggers")?;
    match client.batch_execute(&triggers_sql(shard)) {
        Ok(()) => Ok(client.batch_execute("RELEASE SAVEPOINT event_triggers")?),
        Err(error) if error.is(SqlState::INSUFFICIENT_PRIVILEGE) => {
            client.batch_execute("ROLLBACK TO SAVEPOINT event_triggers")?;
            if shard::read_config(client, shard)?.ddl_detection {
                return Err(error.into());
            }
            warn!(
                %error,
                "no event triggers could be created upstream: a schema change will stop \
                 replication and lead to a new initial sync. Connect as a role that may create \
                 event triggers to avoid that"
            );
            Ok(())
        }
        Err(error) => Err(error.into()),
    }
}

fn functions_sql(shard: &ShardId, publications: &[String], server_version: u32) -> String {
    let s = quote_ident(&shard.schema());
    let specs = published_schema_sql(publications, server_version);
    let names = shard::literals(publications);
    let prefix = quote_literal(&shard.ddl_prefix());
    format!(
        r#"CREATE TABLE IF NOT EXISTS {s}."publishedSchema" (
  "current" JSON,
  "exists" BOOL PRIMARY KEY DEFAULT true CHECK ("exists")
);

CREATE OR REPLACE FUNCTION {s}.get_trigger_context() RETURNS record LANGUAGE plpgsql AS $zr$
DECLARE
  context record;
BEGIN
  SELECT COALESCE(current_query(), '(unknown statement)') AS query INTO context;
  RETURN context;
END
$zr$;

CREATE OR REPLACE FUNCTION {s}.notice_ignore(reason text, tag text, target record)
RETURNS void LANGUAGE plpgsql AS $zr$
BEGIN
  RAISE NOTICE 'not replicated by {s}: % (%) of %', tag, reason, target;
END
$zr$;

DROP FUNCTION IF EXISTS {s}.schema_specs();
CREATE FUNCTION {s}.schema_specs() RETURNS json LANGUAGE sql STABLE AS $zr$
{specs}
$zr$;

CREATE OR REPLACE FUNCTION {s}.update_schemas(event_type text, tag text, target record)
RETURNS void LANGUAGE plpgsql AS $zr$
DECLARE
  context record;
  previous json;
  present json;
BEGIN
  SELECT "current" INTO previous FROM {s}."publishedSchema";
  present := {s}.schema_specs();
  IF previous::text IS DISTINCT FROM present::text THEN
    INSERT INTO {s}."publishedSchema" ("current") VALUES (present)
      ON CONFLICT ("exists") DO UPDATE SET "current" = EXCLUDED."current";
  ELSIF event_type = 'ddlStart' THEN
    previous := NULL;
  ELSIF event_type = 'ddlUpdate' THEN
    PERFORM {s}.notice_ignore('no published object changed', tag, target);
    RETURN;
  END IF;
  context := {s}.get_trigger_context();
  PERFORM pg_catalog.pg_logical_emit_message(true, {prefix}, json_build_object(
    'type', event_type,
    'version', 1,
    'previousSchema', previous,
    'schema', present,
    'event', json_build_object('tag', tag),
    'context', json_build_object('query', context.query)
  )::text);
END
$zr$;

CREATE OR REPLACE FUNCTION {s}.update_schemas() RETURNS void LANGUAGE plpgsql AS $zr$
BEGIN
  PERFORM {s}.update_schemas('schemaSnapshot', 'MANUAL', NULL);
END
$zr$;

CREATE OR REPLACE FUNCTION {s}.emit_ddl_start() RETURNS event_trigger LANGUAGE plpgsql AS $zr$
BEGIN
  PERFORM pg_catalog.pg_advisory_xact_lock({DDL_LOCK});
  PERFORM {s}.update_schemas('ddlStart', TG_TAG, NULL);
END
$zr$;

CREATE OR REPLACE FUNCTION {s}.emit_ddl_end() RETURNS event_trigger LANGUAGE plpgsql AS $zr$
DECLARE
  target record;
  kind text;
  relevant bool;
BEGIN
  SELECT classid, objid, objsubid, object_type, schema_name, object_identity INTO target
    FROM pg_catalog.pg_event_trigger_ddl_commands() LIMIT 1;
  kind := target.object_type;
  -- What was dropped is not listed. A CREATE without an entry did nothing (IF NOT EXISTS). An
  -- altered table may have left the publications, so it always counts.
  relevant := CASE
    WHEN TG_TAG = 'ALTER TABLE' THEN true
    WHEN kind IS NULL THEN TG_TAG NOT LIKE 'CREATE %'
    WHEN kind IN ('table', 'table column') THEN EXISTS (
      SELECT 1 FROM pg_catalog.pg_publication_tables p
      JOIN pg_catalog.pg_namespace n ON n.nspname = p.schemaname
      JOIN pg_catalog.pg_class c ON c.relnamespace = n.oid AND c.relname = p.tablename
      WHERE p.pubname IN ({names}) AND c.oid = target.objid)
    WHEN kind = 'index' THEN EXISTS (
      SELECT 1 FROM pg_catalog.pg_publication_tables p
      JOIN pg_catalog.pg_namespace n ON n.nspname = p.schemaname
      JOIN pg_catalog.pg_class c ON c.relnamespace = n.oid AND c.relname = p.tablename
      JOIN pg_catalog.pg_index i ON i.indrelid = c.oid
      WHERE p.pubname IN ({names}) AND i.indexrelid = target.objid)
    WHEN kind = 'publication relation' THEN EXISTS (
      SELECT 1 FROM pg_catalog.pg_publication_rel r
      JOIN pg_catalog.pg_publication p ON p.oid = r.prpubid
      WHERE p.pubname IN ({names}) AND r.oid = target.objid)
    WHEN kind = 'publication namespace' THEN EXISTS (
      SELECT 1 FROM pg_catalog.pg_publication_namespace r
      JOIN pg_catalog.pg_publication p ON p.oid = r.pnpubid
      WHERE p.pubname IN ({names}) AND r.oid = target.objid)
    WHEN kind = 'publication' THEN EXISTS (
      SELECT 1 FROM pg_catalog.pg_publication p
      WHERE p.pubname IN ({names}) AND p.oid = target.objid)
    WHEN kind = 'schema' THEN EXISTS (
      SELECT 1 FROM pg_catalog.pg_publication_tables p
      JOIN pg_catalog.pg_namespace n ON n.nspname = p.schemaname
      WHERE p.pubname IN ({names}) AND n.oid = target.objid)
    ELSE false
  END;
  IF NOT relevant THEN
    PERFORM {s}.notice_ignore('it is not published', TG_TAG, target);
  ELSIF TG_TAG = 'COMMENT' AND kind = 'publication' THEN
    PERFORM {s}.update_schemas('schemaSnapshot', TG_TAG, target);
  ELSE
    PERFORM {s}.update_schemas('ddlUpdate', TG_TAG, target);
  END IF;
END
$zr$;

INSERT INTO {s}."publishedSchema" ("current") VALUES ({s}.schema_specs())
  ON CONFLICT ("exists") DO UPDATE SET "current" = EXCLUDED."current";"#
    )
}

fn triggers_sql(shard: &ShardId) -> String {
    let s = quote_ident(&shard.schema());
    let start = quote_ident(&format!("{}_ddl_start_{}", shard.app, shard.num));
    let end = quote_ident(&format!("{}_ddl_end_{}", shard.app, shard.num));
    let quoted: Vec<String> = TAGS.iter().map(|t| quote_literal(t)).collect();
    let tags = quoted.join(",");
    let legacy: Vec<String> = TAGS
        .iter()
        .chain(&["COMMENT"])
        .map(|t| t.to_ascii_lowercase().replace(' ', "_"))
        .map(|t| format!("DROP FUNCTION IF EXISTS {s}.emit_{t}();"))
        .collect();
    let legacy = legacy.join("\n");
    format!(
        r#"DROP EVENT TRIGGER IF EXISTS {start};
DROP EVENT TRIGGER IF EXISTS {end};
DROP FUNCTION IF EXISTS {s}.emit_ddl_end(text);
DROP FUNCTION IF EXISTS {s}.notice_ignore(text, record);
{legacy}
CREATE EVENT TRIGGER {start} ON ddl_command_start WHEN TAG IN ({tags})
  EXECUTE FUNCTION {s}.emit_ddl_start();
CREATE EVENT TRIGGER {end} ON ddl_command_end WHEN TAG IN ({tags}, 'COMMENT')
  EXECUTE FUNCTION {s}.emit_ddl_end();
UPDATE {s}."shardConfig" SET "ddlDetection" = true;"#
    )
}
