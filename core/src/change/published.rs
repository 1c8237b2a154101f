//! The published schema: what the shard's publications contain, as JSON made by Postgres
//! (spec: replication §1.10). Also the body of DDL messages.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Tables and indexes of all publications of a shard.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct PublishedSchema {
    /// Ordered by schema and name.
    pub tables: Vec<PublishedTable>,
    /// Ordered by schema, table and index name.
    pub indexes: Vec<PublishedIndex>,
}

/// A published table.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PublishedTable {
    /// Table OID.
    pub oid: u32,
    /// Postgres schema.
    pub schema: String,
    /// OID of the schema.
    #[serde(rename = "schemaOID")]
    pub schema_oid: u32,
    /// Table name.
    pub name: String,
    /// `d`, `n`, `f` or `i`.
    pub replica_identity: String,
    /// By name; order of the replica's table is [`PublishedColumn::pos`].
    pub columns: BTreeMap<String, PublishedColumn>,
    /// In key order; empty without one.
    #[serde(default)]
    pub primary_key: Vec<String>,
    /// Per publication its row filter.
    pub publications: BTreeMap<String, PublicationFilter>,
}

/// A publication's part in a table.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PublicationFilter {
    /// SQL of the row filter.
    pub row_filter: Option<String>,
}

/// A published column.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PublishedColumn {
    /// `attnum`: stable id of the column.
    pub pos: i32,
    /// `typname`; arrays without the leading `_`, plus `[]` per dimension.
    pub data_type: String,
    /// `typtype`.
    pub pg_type_class: Option<String>,
    /// `typtype` of the element type of an array.
    pub elem_pg_type_class: Option<String>,
    /// Type OID.
    #[serde(rename = "typeOID")]
    pub type_oid: u32,
    /// Length or raw typmod.
    pub character_maximum_length: Option<i64>,
    /// NOT NULL.
    pub not_null: Option<bool>,
    /// `pg_get_expr` of the default.
    pub dflt: Option<String>,
}

/// A published index: key columns only, no partial or expression index.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PublishedIndex {
    /// Postgres schema.
    pub schema: String,
    /// Table name.
    pub table_name: String,
    /// Index name.
    pub name: String,
    /// UNIQUE.
    pub unique: bool,
    /// PRIMARY KEY.
    #[serde(default)]
    pub is_primary_key: Option<bool>,
    /// REPLICA IDENTITY USING INDEX.
    #[serde(default)]
    pub is_replica_identity: Option<bool>,
    /// Not deferrable.
    #[serde(default)]
    pub is_immediate: Option<bool>,
    /// Column → `ASC` / `DESC`, in index order.
    pub columns: serde_json::Map<String, serde_json::Value>,
}
