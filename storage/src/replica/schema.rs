//! The tables of a replica file: internal ones, DDL of the published ones, and the file read back
//! as `core::schema::Schema`.
//!
//! Spec: replication §2.4 (declared types), §2.5 (DDL), §2.6 (what is visible), §6.1 (internal
//! tables). The texts of the internal tables are part of the file format.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use rusqlite::{Connection, params};
use zeroring_core::change::message::lite_name;
use zeroring_core::change::published::{PublishedColumn, PublishedIndex, PublishedTable};
use zeroring_core::schema::{
    ColumnSpec, Schema, TableId, TableSpec, UniqueKey, Unsyncable, ValueType,
};
use zeroring_core::version::StateVersion;

use super::ReplicaError;

/// Name of the version column of every replicated table.
pub const VERSION_COLUMN: &str = "_0_version";

/// DDL of the internal tables except `_zero.versionHistory`.
pub(crate) const INTERNAL_TABLES: [&str; 6] = [
    r#"CREATE TABLE "_zero.replicationConfig" (
    replicaVersion TEXT NOT NULL,
    publications TEXT NOT NULL,
    initialSyncContext TEXT DEFAULT '{}',
    lock INTEGER PRIMARY KEY DEFAULT 1 CHECK (lock=1)
  )"#,
    r#"CREATE TABLE "_zero.replicationState" (
    stateVersion TEXT NOT NULL,
    writeTimeMs INTEGER,
    lock INTEGER PRIMARY KEY DEFAULT 1 CHECK (lock=1)
  )"#,
    r#"CREATE TABLE "_zero.changeLog2" (
    "stateVersion"              TEXT NOT NULL,
    "pos"                       INT  NOT NULL,
    "table"                     TEXT NOT NULL,
    "rowKey"                    TEXT NOT NULL,
    "op"                        TEXT NOT NULL,
    "backfillingColumnVersions" TEXT DEFAULT '{}',
    PRIMARY KEY("stateVersion", "pos"),
    UNIQUE("table", "rowKey")
  )"#,
    r#"CREATE TABLE "_zero.runtimeEvents" (
    event TEXT PRIMARY KEY ON CONFLICT REPLACE,
    timestamp TEXT NOT NULL DEFAULT (current_timestamp)
  )"#,
    r#"CREATE TABLE "_zero.column_metadata" (
    table_name TEXT NOT NULL,
    column_name TEXT NOT NULL,
    upstream_type TEXT NOT NULL,
    is_not_null INTEGER NOT NULL,
    is_enum INTEGER NOT NULL,
    is_array INTEGER NOT NULL,
    character_max_length INTEGER,
    backfill TEXT,
    PRIMARY KEY (table_name, column_name)
  )"#,
    r#"CREATE TABLE "_zero.tableMetadata" (
    "schema"           TEXT NOT NULL,
    "table"            TEXT NOT NULL,
    "minRowVersion"    TEXT NOT NULL DEFAULT "00",
    "upstreamMetadata" TEXT,
    "metadata"         TEXT,  -- deprecated
    PRIMARY KEY ("schema", "table")
  )"#,
];

/// DDL of `_zero.versionHistory`; its row is what makes a file a replica.
pub(crate) const VERSION_HISTORY: &str = r#"CREATE TABLE IF NOT EXISTS "_zero.versionHistory" (
      dataVersion INTEGER NOT NULL,
      schemaVersion INTEGER NOT NULL,
      minSafeVersion INTEGER NOT NULL,

      lock INTEGER PRIMARY KEY DEFAULT 1 CHECK (lock=1)
    )"#;

/// A name as an SQL identifier.
pub fn quote_ident(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// Text as an SQL string literal.
pub(crate) fn quote_text(text: &str) -> String {
    format!("'{}'", text.replace('\'', "''"))
}

/// A column's type as the replica knows it, from its metadata or its declared type.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LiteType {
    /// Postgres type name, `[]` per array dimension included.
    pub upstream_type: String,
    /// NOT NULL upstream.
    pub not_null: bool,
    /// An enum, or an array of enums.
    pub is_enum: bool,
    /// An array.
    pub is_array: bool,
}

impl LiteType {
    /// The type of a published column.
    pub fn of_published(column: &PublishedColumn) -> LiteType {
        let is_array = column.data_type.ends_with("[]");
        LiteType {
            upstream_type: column.data_type.clone(),
            not_null: column.not_null == Some(true),
            is_enum: column.pg_type_class.as_deref() == Some("e")
                || (is_array && column.elem_pg_type_class.as_deref() == Some("e")),
            is_array,
        }
    }

    /// Parses a declared type, the legacy forms too (`int8|TEXT_ARRAY[]`, `nomz|TEXT_ENUM[]`).
    pub fn parse(declared: &str) -> LiteType {
        let base = declared.split('|').next().unwrap_or_default();
        let is_array = declared.contains("|TEXT_ARRAY") || declared.contains("[]");
        let mut upstream_type = base.to_owned();
        if is_array && !base.ends_with("[]") {
            upstream_type.push_str("[]");
        }
        LiteType {
            upstream_type,
            not_null: declared.contains("|NOT_NULL"),
            is_enum: declared.contains("|TEXT_ENUM"),
            is_array,
        }
    }

    /// The declared type in the file: the name and its attributes, in this order.
    pub fn declared(&self) -> String {
        let mut text = self.upstream_type.clone();
        for (set, attribute) in [
            (self.not_null, "|NOT_NULL"),
            (self.is_enum, "|TEXT_ENUM"),
            (self.is_array, "|TEXT_ARRAY"),
        ] {
            if set {
                text.push_str(attribute);
            }
        }
        text
    }

    /// The ZQL type; `None` if clients cannot have the column (spec: zql-ivm §2.1).
    pub fn value_type(&self) -> Option<ValueType> {
        if self.is_array {
            return Some(ValueType::Json);
        }
        if self.is_enum {
            return Some(ValueType::String);
        }
        scalar_value_type(&self.upstream_type)
    }
}

/// ZQL type of a scalar Postgres type, arguments in parentheses ignored.
fn scalar_value_type(upstream_type: &str) -> Option<ValueType> {
    let lower = upstream_type.to_ascii_lowercase();
    let mut name = lower.as_str();
    let stripped;
    if let (Some(open), Some(close)) = (name.find('('), name.find(')'))
        && open < close
    {
        stripped = format!("{}{}", name[..open].trim_end(), &name[close + 1..]);
        name = &stripped;
    }
    match name {
        "smallint"
        | "integer"
        | "int"
        | "int2"
        | "int4"
        | "int8"
        | "bigint"
        | "smallserial"
        | "serial"
        | "serial2"
        | "serial4"
        | "serial8"
        | "bigserial"
        | "decimal"
        | "numeric"
        | "real"
        | "double precision"
        | "float"
        | "float4"
        | "float8"
        | "date"
        | "time"
        | "timetz"
        | "time without time zone"
        | "time with time zone"
        | "timestamp"
        | "timestamptz"
        | "timestamp without time zone"
        | "timestamp with time zone" => Some(ValueType::Number),
        "bpchar" | "character" | "character varying" | "text" | "varchar" | "cidr" | "ean13"
        | "inet" | "isbn" | "isbn13" | "ismn" | "ismn13" | "issn" | "issn13" | "macaddr"
        | "macaddr8" | "pg_lsn" | "upc" | "uuid" => Some(ValueType::String),
        "bool" | "boolean" => Some(ValueType::Boolean),
        "json" | "jsonb" => Some(ValueType::Json),
        _ => None,
    }
}

/// SQLite's column affinity, by the declared type's name (<https://sqlite.org/datatype3.html>
/// §3.1). A Postgres name decides it by accident: `uuid` is NUMERIC, `point_kind` INTEGER.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Affinity {
    /// Numbers that look like integers become integers.
    Integer,
    /// Numbers become text.
    Text,
    /// Nothing changes.
    Blob,
    /// Integers become REAL.
    Real,
    /// Text that looks like a number becomes one.
    Numeric,
}

impl Affinity {
    /// The affinity of a declared type.
    pub fn of_declared(declared: &str) -> Affinity {
        let upper = declared.to_ascii_uppercase();
        let has = |part: &str| upper.contains(part);
        if has("INT") {
            Affinity::Integer
        } else if has("CHAR") || has("CLOB") || has("TEXT") {
            Affinity::Text
        } else if has("BLOB") || upper.is_empty() {
            Affinity::Blob
        } else if has("REAL") || has("FLOA") || has("DOUB") {
            Affinity::Real
        } else {
            Affinity::Numeric
        }
    }
}

/// Columns of a published table in the replica's order: by attribute number. Rows of an initial
/// sync come in this order.
pub fn replica_columns(table: &PublishedTable) -> Vec<(&str, &PublishedColumn)> {
    let mut columns: Vec<_> = table.columns.iter().map(|(n, c)| (n.as_str(), c)).collect();
    columns.sort_by_key(|(_, c)| c.pos);
    columns
}

/// `CREATE TABLE` of a published table; `default_version` is the default of `_0_version`.
pub(crate) fn create_table_sql(
    table: &PublishedTable,
    default_version: Option<&StateVersion>,
) -> String {
    let name = lite_name(&table.schema, &table.name);
    let mut sql = format!("CREATE TABLE {} (\n", quote_ident(&name));
    for (column, spec) in replica_columns(table) {
        let declared = LiteType::of_published(spec).declared();
        sql.push_str(&format!("{} {},\n", quote_ident(column), quote_ident(&declared)));
    }
    sql.push_str(&format!("{} \"text\"", quote_ident(VERSION_COLUMN)));
    if let Some(version) = default_version {
        sql.push_str(&format!(" DEFAULT {}", quote_text(version.as_str())));
    }
    sql.push_str("\n);");
    sql
}

/// `CREATE INDEX` of a published index.
pub(crate) fn create_index_sql(index: &PublishedIndex) -> String {
    let columns: Vec<String> = index
        .columns
        .iter()
        .map(|(column, direction)| {
            let direction = if direction.as_str() == Some("DESC") { "DESC" } else { "ASC" };
            format!("{} {direction}", quote_ident(column))
        })
        .collect();
    format!(
        "CREATE {}INDEX {} ON {} ({});",
        if index.unique { "UNIQUE " } else { "" },
        quote_ident(&lite_name(&index.schema, &index.name)),
        quote_ident(&lite_name(&index.schema, &index.table_name)),
        columns.join(",")
    )
}

/// Inserts the `_zero.column_metadata` rows of a table (none for `_0_version`).
pub(crate) fn insert_column_metadata(
    connection: &Connection,
    table: &PublishedTable,
) -> rusqlite::Result<()> {
    let mut insert = connection.prepare_cached(
        r#"INSERT INTO "_zero.column_metadata" (table_name, column_name, upstream_type,
           is_not_null, is_enum, is_array, character_max_length) VALUES (?,?,?,?,?,?,?)"#,
    )?;
    let name = lite_name(&table.schema, &table.name);
    for (column, spec) in replica_columns(table) {
        let t = LiteType::of_published(spec);
        insert.execute(params![
            name,
            column,
            t.upstream_type,
            t.not_null,
            t.is_enum,
            t.is_array,
            spec.character_maximum_length
        ])?;
    }
    Ok(())
}

/// Numbers of tables, for the life of the process: a name keeps its number over re-reads, new
/// replica files and schema changes. Clones share one numbering.
#[derive(Debug, Clone, Default)]
pub struct TableIds(Arc<Mutex<HashMap<Arc<str>, TableId>>>);

impl TableIds {
    /// The number of a table; a name that was never seen gets the next one.
    pub fn get(&self, name: &str) -> TableId {
        // A poisoned map is still a valid map: insertion is its only write.
        let mut ids = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(&id) = ids.get(name) {
            return id;
        }
        let id = TableId(u32::try_from(ids.len()).unwrap_or(u32::MAX));
        ids.insert(Arc::from(name), id);
        id
    }
}

/// A table of the file with all its columns and unique indexes, visible or not: what the writer
/// needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredTable {
    /// Replica name.
    pub name: Arc<str>,
    /// All columns but `_0_version`, in the order of the table.
    pub columns: Vec<StoredColumn>,
    /// All unique indexes: columns, as indices into `columns`.
    pub unique_indexes: Vec<Vec<usize>>,
    /// The table as clients see it, if they can.
    pub spec: Option<Arc<TableSpec>>,
    /// Rows older than this count as written at this version.
    pub min_row_version: StateVersion,
}

/// A column of a [`StoredTable`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredColumn {
    /// Name.
    pub name: Arc<str>,
    /// Type.
    pub lite_type: LiteType,
    /// What SQLite does to stored values.
    pub affinity: Affinity,
    /// Filled by a backfill that is not complete: invisible.
    pub backfilling: bool,
}

/// A replica's tables, once with everything stored, once as clients see them.
#[derive(Debug, Clone)]
pub struct StoredSchema {
    /// All replicated tables by replica name.
    pub tables: BTreeMap<Arc<str>, Arc<StoredTable>>,
    /// As clients see them.
    pub visible: Arc<Schema>,
}

/// Reads the schema back from the file, at the connection's snapshot.
///
/// # Errors
/// [`ReplicaError`] if the file cannot be read or a version in it is malformed.
pub fn read_schema(
    connection: &Connection,
    path: &Path,
    ids: &TableIds,
) -> Result<StoredSchema, ReplicaError> {
    let raw = read_raw(connection)
        .map_err(ReplicaError::sqlite(path, "reading the schema of the replicated tables"))?;
    let mut schema = Schema::default();
    let mut tables = BTreeMap::new();
    for table in raw {
        let min_row_version = ReplicaError::version(path, &table.min_row_version)?;
        let name: Arc<str> = table.name.as_str().into();
        for column in &table.columns {
            if column.lite_type.value_type().is_none() || column.backfilling {
                schema.invisible_columns.insert(
                    (name.clone(), column.name.clone()),
                    column.lite_type.upstream_type.as_str().into(),
                );
            }
        }
        let spec = match table_spec(&table, &min_row_version, ids) {
            Ok(spec) => {
                let spec = Arc::new(spec);
                schema.tables.insert(name.clone(), spec.clone());
                Some(spec)
            }
            Err(Some(reason)) => {
                schema.unsyncable.insert(name.clone(), reason);
                None
            }
            Err(None) => None,
        };
        let unique_indexes =
            table.indexes.iter().filter(|i| i.unique).map(|i| i.columns.clone()).collect();
        let stored = StoredTable {
            name: name.clone(),
            columns: table.columns,
            unique_indexes,
            spec,
            min_row_version,
        };
        tables.insert(name, Arc::new(stored));
    }
    Ok(StoredSchema { tables, visible: Arc::new(schema) })
}

/// A table as the file has it.
struct RawTable {
    name: String,
    columns: Vec<StoredColumn>,
    /// In index-name order; only indexes over known columns.
    indexes: Vec<RawIndex>,
    min_row_version: String,
}

struct RawIndex {
    unique: bool,
    columns: Vec<usize>,
}

fn read_raw(connection: &Connection) -> rusqlite::Result<Vec<RawTable>> {
    // The exclusions are the original's, LIKE wildcards included.
    let mut list = connection.prepare(
        "SELECT name FROM sqlite_master WHERE type = 'table'
         AND name NOT LIKE 'sqlite_%' AND name NOT LIKE '_zero.%'
         AND name NOT LIKE '_litestream_%' ORDER BY name",
    )?;
    let names: Vec<String> = list.query_map([], |r| r.get(0))?.collect::<rusqlite::Result<_>>()?;
    let mut metadata = read_column_metadata(connection)?;
    let min_row_versions = read_min_row_versions(connection)?;
    let mut tables = Vec::with_capacity(names.len());
    for name in names {
        let known = metadata.remove(&name).unwrap_or_default();
        let columns = read_columns(connection, &name, known)?;
        let indexes = read_indexes(connection, &name, &columns)?;
        let min_row_version =
            min_row_versions.get(&name).cloned().unwrap_or_else(|| "00".to_owned());
        tables.push(RawTable { name, columns, indexes, min_row_version });
    }
    Ok(tables)
}

type ColumnMetadata = HashMap<String, HashMap<String, (LiteType, bool)>>;

fn read_column_metadata(connection: &Connection) -> rusqlite::Result<ColumnMetadata> {
    let mut read = connection.prepare(
        r#"SELECT table_name, column_name, upstream_type, is_not_null, is_enum, is_array,
           backfill IS NOT NULL FROM "_zero.column_metadata""#,
    )?;
    let mut rows = read.query([])?;
    let mut out = ColumnMetadata::new();
    while let Some(row) = rows.next()? {
        let lite_type = LiteType {
            upstream_type: row.get(2)?,
            not_null: row.get(3)?,
            is_enum: row.get(4)?,
            is_array: row.get(5)?,
        };
        out.entry(row.get(0)?).or_default().insert(row.get(1)?, (lite_type, row.get(6)?));
    }
    Ok(out)
}

fn read_min_row_versions(connection: &Connection) -> rusqlite::Result<HashMap<String, String>> {
    let mut read = connection
        .prepare(r#"SELECT "schema", "table", "minRowVersion" FROM "_zero.tableMetadata""#)?;
    let mut rows = read.query([])?;
    let mut out = HashMap::new();
    while let Some(row) = rows.next()? {
        let (schema, table): (String, String) = (row.get(0)?, row.get(1)?);
        out.insert(lite_name(&schema, &table), row.get(2)?);
    }
    Ok(out)
}

fn read_columns(
    connection: &Connection,
    table: &str,
    mut known: HashMap<String, (LiteType, bool)>,
) -> rusqlite::Result<Vec<StoredColumn>> {
    let mut read =
        connection.prepare_cached("SELECT name, type FROM pragma_table_info(?) ORDER BY cid")?;
    let mut rows = read.query([table])?;
    let mut columns = Vec::new();
    while let Some(row) = rows.next()? {
        let (name, declared): (String, String) = (row.get(0)?, row.get(1)?);
        if name == VERSION_COLUMN {
            continue;
        }
        let affinity = Affinity::of_declared(&declared);
        let (lite_type, backfilling) =
            known.remove(&name).unwrap_or_else(|| (LiteType::parse(&declared), false));
        columns.push(StoredColumn { name: name.into(), lite_type, affinity, backfilling });
    }
    Ok(columns)
}

fn read_indexes(
    connection: &Connection,
    table: &str,
    columns: &[StoredColumn],
) -> rusqlite::Result<Vec<RawIndex>> {
    let mut list = connection.prepare_cached(
        "SELECT name, \"unique\" FROM pragma_index_list(?) WHERE partial = 0 ORDER BY name",
    )?;
    let found: Vec<(String, bool)> = list
        .query_map([table], |r| Ok((r.get(0)?, r.get(1)?)))?
        .collect::<rusqlite::Result<_>>()?;
    let mut read =
        connection.prepare_cached("SELECT name FROM pragma_index_info(?) ORDER BY seqno")?;
    let mut indexes = Vec::new();
    for (name, unique) in found {
        let names: Vec<Option<String>> =
            read.query_map([&name], |r| r.get(0))?.collect::<rusqlite::Result<_>>()?;
        let positions: Option<Vec<usize>> = names
            .iter()
            .map(|n| columns.iter().position(|c| Some(&*c.name) == n.as_deref()))
            .collect();
        // An index over an expression or over _0_version is none of ours.
        if let Some(columns) = positions {
            indexes.push(RawIndex { unique, columns });
        }
    }
    Ok(indexes)
}

/// The table as clients see it. `Err(None)`: hidden without a reason to tell (backfilling).
fn table_spec(
    table: &RawTable,
    min_row_version: &StateVersion,
    ids: &TableIds,
) -> Result<TableSpec, Option<Unsyncable>> {
    let mut position = vec![None; table.columns.len()];
    let mut columns = Vec::new();
    for (stored, column) in table.columns.iter().enumerate() {
        if let (Some(value_type), false) = (column.lite_type.value_type(), column.backfilling) {
            position[stored] = Some(columns.len());
            columns.push(ColumnSpec {
                name: column.name.clone(),
                value_type,
                nullable: !column.lite_type.not_null,
                upstream_type: column.lite_type.upstream_type.as_str().into(),
            });
        }
    }
    if !table.columns.is_empty() && table.columns.iter().all(|c| c.backfilling) {
        return Err(None);
    }
    let visible = |index: &RawIndex| -> Option<Vec<usize>> {
        index.columns.iter().map(|&c| position[c]).collect()
    };
    let unique_keys: Vec<UniqueKey> = table
        .indexes
        .iter()
        .filter(|i| i.unique)
        .filter_map(visible)
        .map(|key| UniqueKey { not_null: key.iter().all(|&c| !columns[c].nullable), columns: key })
        .collect();
    let primary_key = unique_keys
        .iter()
        .filter(|k| k.not_null)
        .min_by_key(|k| {
            let names: Vec<&str> = k.columns.iter().map(|&c| &*columns[c].name).collect();
            (names.len(), names)
        })
        .map(|k| k.columns.clone())
        .ok_or_else(|| Some(why_unsyncable(table)))?;
    let indexes: BTreeSet<Vec<usize>> = table.indexes.iter().filter_map(visible).collect();
    Ok(TableSpec {
        id: ids.get(&table.name),
        name: table.name.as_str().into(),
        columns,
        replica_key: primary_key.clone(),
        primary_key,
        unique_keys,
        min_row_version: min_row_version.clone(),
        indexes: indexes.into_iter().collect(),
    })
}

/// A key over NOT NULL columns exists, but ZQL does not know all their types; or there is none.
fn why_unsyncable(table: &RawTable) -> Unsyncable {
    let candidate = table
        .indexes
        .iter()
        .filter(|i| i.unique && i.columns.iter().all(|&c| table.columns[c].lite_type.not_null))
        .min_by_key(|i| {
            (
                i.columns.len(),
                i.columns.iter().map(|&c| table.columns[c].name.clone()).collect::<Vec<_>>(),
            )
        });
    match candidate {
        None => Unsyncable::NoKey,
        Some(index) => Unsyncable::UnsupportedKeyColumns(
            index
                .columns
                .iter()
                .map(|&c| &table.columns[c])
                .filter(|c| c.lite_type.value_type().is_none())
                .map(|c| (c.name.clone(), Arc::from(c.lite_type.upstream_type.as_str())))
                .collect(),
        ),
    }
}
