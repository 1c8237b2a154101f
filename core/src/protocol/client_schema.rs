//! The client schema as `initConnection` brings it (spec: sync-protocol §3.2): the grammar of the
//! wire, which is stricter than what a CVR may hold.

use std::fmt;
use std::marker::PhantomData;
use std::sync::Arc;

use rustc_hash::FxHashMap;
use serde::de::{Error, MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::client_schema::{ClientSchema, ClientTable};

/// A field that may be absent, but not null.
pub(super) fn present<'de, D: Deserializer<'de>>(
    d: D,
) -> Result<Option<Arc<ClientSchema>>, D::Error> {
    let schema = WireSchema::deserialize(d)?;
    let text = serde_json::to_string(&schema).map_err(D::Error::custom)?;
    let tables = schema.tables.list.into_iter().map(|(name, table)| table.named(&name));
    Ok(Some(Arc::new(ClientSchema::of_parts(text, tables.collect()))))
}

/// A client's tables.
#[derive(Serialize, Deserialize)]
struct WireSchema {
    /// By server name.
    tables: Entries<WireTable>,
}

/// A JSON object: entries in the order in which they were written, which shows in the text of
/// errors.
struct Entries<T> {
    list: Vec<(String, T)>,
    at: FxHashMap<String, usize>,
}

impl<T> Default for Entries<T> {
    fn default() -> Self {
        Entries { list: Vec::new(), at: FxHashMap::default() }
    }
}

impl<T> Entries<T> {
    /// Sets the value of a key; one that is known keeps its place, as in JavaScript.
    fn set(&mut self, key: String, value: T) {
        match self.at.get(&key) {
            Some(at) => self.list[*at].1 = value,
            None => {
                self.at.insert(key.clone(), self.list.len());
                self.list.push((key, value));
            }
        }
    }
}

impl<T: Serialize> Serialize for Entries<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.list.iter().map(|(key, value)| (key, value)))
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Entries<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Object<T>(PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for Object<T> {
            type Value = Entries<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Entries<T>, A::Error> {
                let mut entries = Entries::default();
                while let Some((key, value)) = map.next_entry()? {
                    entries.set(key, value);
                }
                Ok(entries)
            }
        }
        deserializer.deserialize_map(Object(PhantomData))
    }
}

/// A table of a client schema.
#[derive(Serialize, Deserialize)]
struct WireTable {
    /// By server name.
    columns: Entries<WireColumn>,
    /// Columns of the client's key, in its order. Rows are named by it on the wire.
    #[serde(rename = "primaryKey")]
    primary_key: Vec<String>,
}

impl WireTable {
    fn named(self, name: &str) -> ClientTable {
        let columns = self.columns.list.iter();
        let columns = columns.map(|(name, c)| (name.as_str().into(), c.value_type.name().into()));
        let primary_key = self.primary_key.iter().map(|column| column.as_str().into()).collect();
        let columns = columns.collect();
        ClientTable { name: name.into(), columns, primary_key: Some(primary_key) }
    }
}

/// A column of a client schema.
#[derive(Serialize, Deserialize)]
struct WireColumn {
    #[serde(rename = "type")]
    value_type: WireType,
}

/// Column types that a client schema can name.
#[derive(Clone, Copy, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum WireType {
    String,
    Number,
    Boolean,
    /// Legal, matches no replicated column.
    Null,
    Json,
}

impl WireType {
    fn name(self) -> &'static str {
        match self {
            WireType::String => "string",
            WireType::Number => "number",
            WireType::Boolean => "boolean",
            WireType::Null => "null",
            WireType::Json => "json",
        }
    }
}
