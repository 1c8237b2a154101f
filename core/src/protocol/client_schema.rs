//! The schema that a client was built with, in server names (spec: sync-protocol §3.2).

use std::fmt;
use std::marker::PhantomData;

use rustc_hash::FxHashMap;
use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A client's tables. Equality ignores the order of keys, as the original's deep comparison does;
/// the order itself shows in the text of errors.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClientSchema {
    /// Tables by server name.
    pub tables: Entries<ClientTable>,
}

/// A JSON object: entries in the order in which they were written.
#[derive(Debug, Clone)]
pub struct Entries<T> {
    list: Vec<(String, T)>,
    at: FxHashMap<String, usize>,
}

impl<T> Default for Entries<T> {
    fn default() -> Self {
        Entries { list: Vec::new(), at: FxHashMap::default() }
    }
}

impl<T> Entries<T> {
    /// The value of a key.
    pub fn get(&self, key: &str) -> Option<&T> {
        self.at.get(key).map(|at| &self.list[*at].1)
    }

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

impl<T: PartialEq> PartialEq for Entries<T> {
    fn eq(&self, other: &Self) -> bool {
        self.list.len() == other.list.len()
            && self.list.iter().all(|(key, value)| other.get(key) == Some(value))
    }
}

impl<T: Eq> Eq for Entries<T> {}

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
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClientTable {
    /// Columns by server name.
    pub columns: Entries<ClientColumn>,
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
