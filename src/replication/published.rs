//! The published schema: the query (spec: replication §1.10), what is derived from it, and how
//! two of them differ.

use zeroring_core::change::published::{PublishedIndex, PublishedSchema, PublishedTable};
use zeroring_net::pg::{Client, quote_literal};

use super::types::TypeCatalog;
use super::upstream::UpstreamError;

/// `server_version_num` of Postgres 16, which stops listing generated columns as published.
const PG_16: u32 = 160_000;

/// The query, as one expression of type JSON. Also the body of the shard's `schema_specs()`.
///
/// Index columns are looked up through the table (an index's own attributes keep the names of
/// renamed columns). Only indexes that a replica can have are listed: no expressions, no
/// predicate, no exclusion constraint, all key columns published.
pub fn published_schema_sql(publications: &[String], server_version: u32) -> String {
    let names: Vec<String> = publications.iter().map(|p| quote_literal(p)).collect();
    let names = names.join(",");
    let not_generated = if server_version < PG_16 { "AND a.attgenerated = ''" } else { "" };
    format!(
        r#"WITH pub AS (
  SELECT p.pubname, p.rowfilter, p.attnames, n.nspname, n.oid AS nspoid,
    c.oid AS relid, c.relname, c.relreplident
  FROM pg_catalog.pg_publication_tables p
  JOIN pg_catalog.pg_namespace n ON n.nspname = p.schemaname
  JOIN pg_catalog.pg_class c ON c.relnamespace = n.oid AND c.relname = p.tablename
  WHERE p.pubname IN ({names})
), col AS (
  SELECT DISTINCT a.attrelid, a.attnum, a.attname
  FROM pub
  JOIN pg_catalog.pg_attribute a ON a.attrelid = pub.relid AND a.attname = ANY (pub.attnames)
  WHERE a.attnum > 0 AND NOT a.attisdropped {not_generated}
), spec AS (
  SELECT col.attrelid, json_object_agg(col.attname, jsonb_build_object(
    'pos', a.attnum,
    'dataType', CASE WHEN a.attndims > 0
      THEN regexp_replace(t.typname::text, '^_', '') || repeat('[]', a.attndims::int) ELSE t.typname::text END,
    'typeOID', a.atttypid::int8,
    'pgTypeClass', t.typtype,
    'elemPgTypeClass', e.typtype,
    'characterMaximumLength', CASE
      WHEN a.atttypmod = -1 THEN NULL
      WHEN a.atttypid IN (1042, 1043) THEN a.atttypmod - 4
      ELSE a.atttypmod END,
    'notNull', a.attnotnull,
    'dflt', pg_catalog.pg_get_expr(d.adbin, d.adrelid)
  ) ORDER BY col.attname) AS columns
  FROM col
  JOIN pg_catalog.pg_attribute a ON a.attrelid = col.attrelid AND a.attnum = col.attnum
  JOIN pg_catalog.pg_type t ON t.oid = a.atttypid
  LEFT JOIN pg_catalog.pg_type e ON e.oid = t.typelem
  LEFT JOIN pg_catalog.pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
  GROUP BY col.attrelid
), ind AS (
  SELECT i.indexrelid, i.indrelid, i.indisunique, i.indisprimary, i.indisreplident,
    i.indimmediate,
    json_object_agg(a.attname,
      CASE WHEN i.indoption[k] & 1 = 1 THEN 'DESC' ELSE 'ASC' END ORDER BY k) AS columns,
    json_agg(a.attname ORDER BY k) AS names
  FROM pg_catalog.pg_index i
  CROSS JOIN LATERAL generate_series(0, i.indnkeyatts - 1) k
  JOIN pg_catalog.pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = i.indkey[k]
  WHERE i.indrelid IN (SELECT relid FROM pub)
    AND i.indisvalid AND i.indpred IS NULL AND i.indexprs IS NULL
    AND NOT EXISTS (SELECT 1 FROM pg_catalog.pg_constraint x
      WHERE x.conindid = i.indexrelid AND x.conrelid = i.indrelid AND x.contype = 'x')
    AND NOT EXISTS (SELECT 1 FROM generate_series(0, i.indnkeyatts - 1) h
      WHERE NOT EXISTS (SELECT 1 FROM col
        WHERE col.attrelid = i.indrelid AND col.attnum = i.indkey[h]))
  GROUP BY i.indexrelid, i.indrelid, i.indisunique, i.indisprimary, i.indisreplident,
    i.indimmediate
), tab AS (
  SELECT pub.nspname, pub.relname, json_build_object(
    'oid', pub.relid::int8,
    'schema', pub.nspname,
    'schemaOID', pub.nspoid::int8,
    'name', pub.relname,
    'replicaIdentity', pub.relreplident,
    'columns', COALESCE((SELECT spec.columns FROM spec WHERE spec.attrelid = pub.relid),
      '{{}}'::json),
    'primaryKey', COALESCE((SELECT ind.names FROM ind
      WHERE ind.indrelid = pub.relid AND ind.indisprimary), '[]'::json),
    'publications',
      json_object_agg(pub.pubname, jsonb_build_object('rowFilter', pub.rowfilter)
        ORDER BY pub.pubname)
  ) AS entry
  FROM pub
  GROUP BY pub.nspname, pub.nspoid, pub.relid, pub.relname, pub.relreplident
), idx AS (
  SELECT n.nspname, t.relname AS tablename, c.relname, json_build_object(
    'schema', n.nspname,
    'tableName', t.relname,
    'name', c.relname,
    'unique', ind.indisunique,
    'isPrimaryKey', ind.indisprimary,
    'isReplicaIdentity', ind.indisreplident,
    'isImmediate', ind.indimmediate,
    'columns', ind.columns
  ) AS entry
  FROM ind
  JOIN pg_catalog.pg_class c ON c.oid = ind.indexrelid
  JOIN pg_catalog.pg_class t ON t.oid = ind.indrelid
  JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
)
SELECT json_build_object(
  'tables', COALESCE((SELECT json_agg(entry ORDER BY nspname, relname) FROM tab), '[]'::json),
  'indexes', COALESCE(
    (SELECT json_agg(entry ORDER BY nspname, tablename, relname) FROM idx), '[]'::json)
)"#
    )
}

/// Runs the query, and corrects what the catalogs say of unusual array types.
///
/// # Errors
/// The query failed, or its result is not of the known shape.
pub fn read_published_schema(
    client: &mut Client,
    catalog: &mut TypeCatalog,
    publications: &[String],
    server_version: u32,
) -> Result<PublishedSchema, UpstreamError> {
    let row = client.query_one(&published_schema_sql(publications, server_version), &[])?;
    let mut schema = parse(row.get(0)?)?;
    let oids = schema.tables.iter().flat_map(|t| t.columns.values().map(|c| c.type_oid));
    catalog.load(client, oids.collect::<Vec<_>>())?;
    for column in schema.tables.iter_mut().flat_map(|t| t.columns.values_mut()) {
        catalog.normalise(column);
    }
    Ok(schema)
}

/// Reads a published schema as Postgres wrote it.
///
/// # Errors
/// [`UpstreamError::Malformed`].
pub fn parse(json: &str) -> Result<PublishedSchema, UpstreamError> {
    serde_json::from_str(json).map_err(|e| UpstreamError::Malformed {
        what: "the published schema",
        cause: e.to_string(),
    })
}

/// The columns that name an old row in the stream, derived from the replica identity; for
/// identity FULL the key under which the replica knows rows.
pub fn replica_identity_columns(table: &PublishedTable, schema: &PublishedSchema) -> Vec<String> {
    let columns = |i: &PublishedIndex| i.columns.keys().cloned().collect::<Vec<_>>();
    match table.replica_identity.as_str() {
        "d" => table.primary_key.clone(),
        "i" => indexes_of(table, schema)
            .find(|i| i.is_replica_identity == Some(true))
            .map(columns)
            .unwrap_or_default(),
        "f" => indexes_of(table, schema)
            .filter(|i| i.unique && not_null(table, i))
            .map(columns)
            .min_by(|a, b| a.len().cmp(&b.len()).then_with(|| a.cmp(b)))
            .unwrap_or_default(),
        _ => vec![],
    }
}

/// The indexes of a table, by name.
pub fn indexes_of<'s>(
    table: &'s PublishedTable,
    schema: &'s PublishedSchema,
) -> impl Iterator<Item = &'s PublishedIndex> {
    schema.indexes.iter().filter(|i| i.schema == table.schema && i.table_name == table.name)
}

/// All columns of an index are NOT NULL.
pub fn not_null(table: &PublishedTable, index: &PublishedIndex) -> bool {
    let is_not_null = |c: &String| table.columns.get(c).is_some_and(|c| c.not_null == Some(true));
    index.columns.keys().all(is_not_null)
}

/// The schema with `replicaIdentityColumns`, as `replicas.initialSchema` holds it.
///
/// # Errors
/// [`UpstreamError::Malformed`] never for a schema that was read.
pub fn initial_schema_json(schema: &PublishedSchema) -> Result<serde_json::Value, UpstreamError> {
    let malformed =
        |e: serde_json::Error| UpstreamError::Malformed { what: "a schema", cause: e.to_string() };
    let mut json = serde_json::to_value(schema).map_err(malformed)?;
    let tables = json.get_mut("tables").and_then(serde_json::Value::as_array_mut);
    for (entry, table) in tables.into_iter().flatten().zip(&schema.tables) {
        entry["replicaIdentityColumns"] = replica_identity_columns(table, schema).into();
    }
    Ok(json)
}

/// What about a table's rows or columns differs between two schemas: the first difference, in
/// words. Index differences count too unless `ignore_indexes` (degraded mode, spec §3.8).
pub fn first_difference(
    before: &PublishedSchema,
    after: &PublishedSchema,
    ignore_indexes: bool,
) -> Option<String> {
    for table in &after.tables {
        let name = format!("{}.{}", table.schema, table.name);
        let Some(old) = before.tables.iter().find(|t| t.oid == table.oid) else {
            return Some(format!("table {name} was added"));
        };
        if (&old.schema, &old.name) != (&table.schema, &table.name) {
            return Some(format!("table {}.{} was renamed to {name}", old.schema, old.name));
        }
        if old.primary_key != table.primary_key {
            return Some(format!("the primary key of table {name} changed"));
        }
        if let Some(difference) = column_difference(old, table) {
            return Some(format!("{difference} of table {name}"));
        }
        if !ignore_indexes && old.replica_identity != table.replica_identity {
            return Some(format!("the replica identity of table {name} changed"));
        }
    }
    let gone = |t: &&PublishedTable| !after.tables.iter().any(|a| a.oid == t.oid);
    if let Some(table) = before.tables.iter().find(gone) {
        return Some(format!("table {}.{} was removed", table.schema, table.name));
    }
    if !ignore_indexes && before.indexes != after.indexes {
        let differs = |i: &&PublishedIndex| !before.indexes.contains(i);
        let index = after.indexes.iter().find(differs);
        let index = index.or_else(|| before.indexes.iter().find(|i| !after.indexes.contains(i)));
        let name = index.map_or("?", |i| &i.name);
        return Some(format!("index {name} was added, removed or changed"));
    }
    None
}

fn column_difference(old: &PublishedTable, new: &PublishedTable) -> Option<String> {
    for (name, column) in &new.columns {
        let Some(before) = old.columns.get(name) else {
            return Some(format!("column {name} was added or renamed"));
        };
        if (before.pos, before.type_oid, before.not_null)
            != (column.pos, column.type_oid, column.not_null)
            || before.data_type != column.data_type
        {
            return Some(format!("the definition of column {name}"));
        }
    }
    let gone = old.columns.keys().find(|name| !new.columns.contains_key(*name));
    gone.map(|name| format!("column {name} was removed"))
}
