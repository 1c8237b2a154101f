//! The schema that a client was built with, in server names (spec: sync-protocol §3.2).

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// A client's tables. Equality ignores the order of keys, as the original's deep comparison does.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClientSchema {
    /// Tables by server name.
    pub tables: BTreeMap<String, ClientTable>,
}

/// A table of a client schema.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClientTable {
    /// Columns by server name.
    pub columns: BTreeMap<String, ClientColumn>,
    /// Columns of the client's key, in its order. Rows are named by it on the wire.
    #[serde(rename = "primaryKey")]
    pub primary_key: Vec<String>,
}

/// A column of a client schema.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClientColumn {
    /// Its type.
    #[serde(rename = "type")]
    pub value_type: ClientType,
}

/// Column types that a client schema can name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ClientType {
    /// `string`
    String,
    /// `number`
    Number,
    /// `boolean`
    Boolean,
    /// `null`: legal, matches no replicated column.
    Null,
    /// `json`
    Json,
}

impl ClientType {
    /// The wire name.
    pub fn name(self) -> &'static str {
        match self {
            ClientType::String => "string",
            ClientType::Number => "number",
            ClientType::Boolean => "boolean",
            ClientType::Null => "null",
            ClientType::Json => "json",
        }
    }
}
