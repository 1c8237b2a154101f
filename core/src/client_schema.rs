//! The schema that a group's clients were built with: comparison, and validation against the
//! replica (spec: view-syncer-cvr §1.7, §5.5).

use std::collections::BTreeSet;
use std::sync::Arc;

use serde_json::{Map, Value as Json};

use crate::schema::{Schema, TableSpec, Unsyncable};

/// A client schema. Two are equal if they say the same, whatever the order of their keys.
#[derive(Debug, Clone)]
pub struct ClientSchema {
    text: Box<str>,
    tables: Box<[ClientTable]>,
}

/// A table of a client schema, server names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClientTable {
    /// Name.
    pub name: Arc<str>,
    /// Columns and their types, in the client's order.
    pub columns: Vec<(Arc<str>, Arc<str>)>,
    /// Key columns: what the group's row identities are made of. Old clients do not name one.
    pub primary_key: Option<Vec<Arc<str>>>,
}

/// A group's clients must agree on the schema (wire: `InvalidConnectionRequest`).
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ClientSchemaConflict {
    /// The group has another one.
    #[error("Provided schema does not match previous schema")]
    Differs,
    /// The group has none yet, and this client brings none.
    #[error("The initConnection message for a new client group must include client schema.")]
    Missing,
}

/// JSON that is no client schema.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("client schema: {path} {problem}")]
pub struct InvalidClientSchema {
    /// Where.
    pub path: String,
    /// What is wrong.
    pub problem: &'static str,
}

/// Why a client schema cannot be served by this replica.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SchemaMismatch {
    /// The replica is empty (wire: `Internal`).
    #[error(
        "No tables have been synced from upstream. Please check that the ZERO_UPSTREAM_DB has \
         been properly set."
    )]
    NothingSynced,
    /// One line per problem (wire: `SchemaVersionNotSupported`).
    #[error("{0}")]
    Unsupported(String),
}

impl ClientSchema {
    /// Reads a schema as a store gives it, whoever wrote it.
    ///
    /// # Errors
    /// [`InvalidClientSchema`] naming the place.
    pub fn from_json(json: Json) -> Result<ClientSchema, InvalidClientSchema> {
        let tables = object(&json, "tables", "the schema")?
            .iter()
            .map(|(name, table)| ClientTable::from_json(name, table))
            .collect::<Result<_, _>>()?;
        Ok(ClientSchema { text: json.to_string().into(), tables })
    }

    /// Reads JSON text, see [`ClientSchema::from_json`].
    ///
    /// # Errors
    /// [`InvalidClientSchema`].
    pub fn parse(text: &str) -> Result<ClientSchema, InvalidClientSchema> {
        let invalid =
            |_| InvalidClientSchema { path: "the schema".to_owned(), problem: "is not JSON" };
        ClientSchema::from_json(serde_json::from_str(text).map_err(invalid)?)
    }

    /// A schema that was read already: its compact JSON, and its tables.
    pub(crate) fn of_parts(text: String, tables: Box<[ClientTable]>) -> ClientSchema {
        ClientSchema { text: text.into(), tables }
    }

    /// Compact JSON, keys in the order in which they were received.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// The document. It was one before it was text.
    fn json(&self) -> Option<Json> {
        serde_json::from_str(&self.text).ok()
    }

    /// The tables, in the client's order.
    pub fn tables(&self) -> &[ClientTable] {
        &self.tables
    }

    /// A table by name.
    pub fn table(&self, name: &str) -> Option<&ClientTable> {
        self.tables.iter().find(|t| &*t.name == name)
    }

    /// Checks that another client's schema is this one.
    ///
    /// # Errors
    /// [`ClientSchemaConflict::Differs`].
    pub fn require_same(&self, other: &ClientSchema) -> Result<(), ClientSchemaConflict> {
        if self == other { Ok(()) } else { Err(ClientSchemaConflict::Differs) }
    }

    /// Checks that the replica can serve the clients. `app` and `shard` name the schemas whose
    /// tables are not for clients.
    ///
    /// # Errors
    /// [`SchemaMismatch`] with every problem.
    pub fn check(&self, schema: &Schema, app: &str, shard: u32) -> Result<(), SchemaMismatch> {
        if schema.tables.is_empty() && schema.unsyncable.is_empty() {
            return Err(SchemaMismatch::NothingSynced);
        }
        let mut tables: Vec<_> = self.tables.iter().collect();
        tables.sort_by(|a, b| js_order(&a.name, &b.name));
        let mut problems = Vec::new();
        for table in &tables {
            if schema.table(&table.name).is_none() {
                problems.push(unusable_table(&table.name, schema, app, shard));
            }
        }
        for table in &tables {
            if let Some(spec) = schema.table(&table.name) {
                table.check(spec, schema, &mut problems);
            }
        }
        if problems.is_empty() {
            return Ok(());
        }
        Err(SchemaMismatch::Unsupported(problems.join("\n")))
    }
}

impl PartialEq for ClientSchema {
    fn eq(&self, other: &ClientSchema) -> bool {
        // Nearly always: the same build of the app.
        self.text == other.text || self.json() == other.json()
    }
}

fn object<'a>(
    json: &'a Json,
    key: &str,
    path: &str,
) -> Result<&'a Map<String, Json>, InvalidClientSchema> {
    json.get(key).and_then(Json::as_object).ok_or_else(|| InvalidClientSchema {
        path: format!("{path}.{key}"),
        problem: "is not an object",
    })
}

impl ClientTable {
    fn from_json(name: &str, json: &Json) -> Result<ClientTable, InvalidClientSchema> {
        let columns = object(json, "columns", name)?
            .iter()
            .map(|(column, spec)| match spec.get("type").and_then(Json::as_str) {
                Some(t) => Ok((Arc::from(column.as_str()), Arc::from(t))),
                None => Err(InvalidClientSchema {
                    path: format!("{name}.columns.{column}"),
                    problem: "has no type",
                }),
            })
            .collect::<Result<_, _>>()?;
        let primary_key = match json.get("primaryKey") {
            None | Some(Json::Null) => None,
            Some(key) => Some(string_list(key).ok_or_else(|| InvalidClientSchema {
                path: format!("{name}.primaryKey"),
                problem: "is not a list of column names",
            })?),
        };
        Ok(ClientTable { name: name.into(), columns, primary_key })
    }

    /// Problems of a table that the replica has.
    fn check(&self, spec: &TableSpec, schema: &Schema, problems: &mut Vec<String>) {
        let table = &self.name;
        let mut missing: Vec<_> =
            self.columns.iter().map(|(c, _)| c).filter(|c| spec.column(c).is_none()).collect();
        missing.sort_by(|a, b| js_order(a, b));
        for column in missing {
            let invisible = schema.invisible_columns.get(&(table.clone(), column.clone()));
            problems.push(match invisible {
                Some(upstream_type) => format!(
                    "The \"{table}\".\"{column}\" column cannot be synced because it is of an \
                     unsupported data type \"{upstream_type}\""
                ),
                None => format!(
                    "The \"{table}\".\"{column}\" column does not exist or is not one of the \
                     replicated columns: {}.",
                    quoted(spec.columns.iter().map(|c| &*c.name))
                ),
            });
        }
        self.check_types(spec, problems);
        match &self.primary_key {
            None => problems.push(format!(
                "The \"{table}\" table's client schema does not specify a primary key."
            )),
            Some(key) if !is_candidate_key(spec, key) => problems.push(format!(
                "The \"{table}\" table's primaryKey <{}> is not associated with a non-null unique \
                 index.",
                key.join(",")
            )),
            Some(_) => {}
        }
    }

    /// Type differences, in the order of the smaller set of columns (the client's if equal; the
    /// server's set counts its version column).
    fn check_types(&self, spec: &TableSpec, problems: &mut Vec<String>) {
        let mut differing: Vec<(usize, String)> = Vec::new();
        let client_order = self.columns.len() <= spec.columns.len() + 1;
        for (at, (column, client_type)) in self.columns.iter().enumerate() {
            let Some(server_at) = spec.column(column) else { continue };
            let server_type = spec.columns[server_at].value_type.to_string();
            if server_type != **client_type {
                differing.push((
                    if client_order { at } else { server_at },
                    format!(
                        "The \"{}\".\"{column}\" column's upstream type \"{server_type}\" does \
                         not match the client type \"{client_type}\"",
                        self.name
                    ),
                ));
            }
        }
        differing.sort();
        problems.extend(differing.into_iter().map(|(_, problem)| problem));
    }
}

fn string_list(json: &Json) -> Option<Vec<Arc<str>>> {
    json.as_array()?.iter().map(|c| c.as_str().map(Arc::from)).collect()
}

/// The columns are, as a set, a key that can identify the table's rows.
fn is_candidate_key(spec: &TableSpec, key: &[Arc<str>]) -> bool {
    let Some(wanted) = key.iter().map(|c| spec.column(c)).collect::<Option<BTreeSet<_>>>() else {
        return false;
    };
    let unique = spec.unique_keys.iter().filter(|k| k.not_null).map(|k| &k.columns);
    unique
        .chain([&spec.primary_key, &spec.replica_key])
        .any(|columns| columns.iter().copied().collect::<BTreeSet<_>>() == wanted)
}

fn unusable_table(name: &str, schema: &Schema, app: &str, shard: u32) -> String {
    match schema.unsyncable.get(name) {
        Some(Unsyncable::UnsupportedKeyColumns(columns)) => {
            let columns: Vec<_> = columns.iter().map(|(c, t)| format!("\"{c}\" ({t})")).collect();
            format!(
                "The \"{name}\" table's primary key contains unsupported columns: {}. These \
                 columns must use Zero-supported data types to sync the table to the client.",
                columns.join(", ")
            )
        }
        Some(Unsyncable::NoKey) => format!(
            "The \"{name}\" table is missing a primary key or non-null unique index and thus \
             cannot be synced to the client"
        ),
        None => {
            let internal = [format!("{app}."), format!("{app}_{shard}.")];
            let visible = schema.tables.keys().map(|t| &**t);
            let synced = quoted(visible.filter(|t| !internal.iter().any(|p| t.starts_with(p))));
            let tip = if name.contains('.') && !synced.contains('.') {
                " Note that zero does not sync tables from non-public schemas by default. Make \
                 sure you have defined a custom ZERO_APP_PUBLICATION to sync tables from \
                 non-public schemas."
            } else {
                ""
            };
            format!(
                "The \"{name}\" table does not exist or is not one of the replicated tables: \
                 {synced}.{tip}"
            )
        }
    }
}

/// `"a","b"`, sorted.
fn quoted<'a>(names: impl Iterator<Item = &'a str>) -> String {
    let mut names: Vec<_> = names.collect();
    names.sort_by(|a, b| js_order(a, b));
    names.iter().map(|n| format!("\"{n}\"")).collect::<Vec<_>>().join(",")
}

/// JavaScript's order of strings: by UTF-16 code unit.
fn js_order(a: &str, b: &str) -> std::cmp::Ordering {
    a.encode_utf16().cmp(b.encode_utf16())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::schema::{ColumnSpec, TableId, UniqueKey, ValueType};
    use crate::version::StateVersion;

    fn table(id: u32, name: &str, columns: &[(&str, ValueType)], keys: &[&[usize]]) -> TableSpec {
        let column = |(name, value_type): &(&str, ValueType)| ColumnSpec {
            name: (*name).into(),
            value_type: *value_type,
            nullable: false,
            upstream_type: "text".into(),
        };
        TableSpec {
            id: TableId(id),
            name: name.into(),
            columns: columns.iter().map(column).collect(),
            primary_key: keys[0].to_vec(),
            replica_key: keys[0].to_vec(),
            unique_keys: keys
                .iter()
                .map(|k| UniqueKey { columns: k.to_vec(), not_null: true })
                .collect(),
            min_row_version: StateVersion::zero(),
            indexes: Vec::new(),
        }
    }

    fn replica() -> Schema {
        let mut schema = Schema::default();
        for spec in [
            table(
                0,
                "issue",
                &[
                    ("id", ValueType::String),
                    ("n", ValueType::Number),
                    ("a", ValueType::String),
                    ("b", ValueType::String),
                ],
                &[&[0], &[2, 3]],
            ),
            table(1, "zero.permissions", &[("lock", ValueType::Boolean)], &[&[0]]),
            table(2, "zero_0.clients", &[("id", ValueType::String)], &[&[0]]),
        ] {
            schema.tables.insert(spec.name.clone(), Arc::new(spec));
        }
        schema.unsyncable.insert("nokey".into(), Unsyncable::NoKey);
        schema.unsyncable.insert(
            "oddkey".into(),
            Unsyncable::UnsupportedKeyColumns(vec![("k".into(), "tsvector".into())]),
        );
        schema.invisible_columns.insert(("issue".into(), "vec".into()), "tsvector".into());
        schema
    }

    fn check(tables: Json) -> Result<(), String> {
        let schema = ClientSchema::from_json(json!({ "tables": tables })).unwrap();
        schema.check(&replica(), "zero", 0).map_err(|e| e.to_string())
    }

    #[test]
    fn a_subset_of_the_replica_is_fine() {
        let columns = json!({"n": {"type": "number"}, "id": {"type": "string"}});
        assert_eq!(check(json!({"issue": {"columns": columns, "primaryKey": ["id"]}})), Ok(()));
        let columns = json!({"b": {"type": "string"}, "a": {"type": "string"}});
        assert_eq!(check(json!({"issue": {"columns": columns, "primaryKey": ["b", "a"]}})), Ok(()));
        assert_eq!(check(json!({})), Ok(()));
    }

    #[test]
    fn every_problem_has_its_line_in_the_order_of_the_original() {
        let problems = check(json!({
            "oddkey": {"columns": {}, "primaryKey": ["k"]},
            "nokey": {"columns": {}, "primaryKey": ["k"]},
            "other.foo": {"columns": {}, "primaryKey": ["id"]},
            "issue": {"columns": {
                "zip": {"type": "string"},
                "vec": {"type": "string"},
                "n": {"type": "string"},
                "id": {"type": "json"}}},
        }));
        assert_eq!(
            problems.unwrap_err().lines().collect::<Vec<_>>(),
            [
                "The \"nokey\" table is missing a primary key or non-null unique index and thus \
                 cannot be synced to the client",
                "The \"oddkey\" table's primary key contains unsupported columns: \"k\" \
                 (tsvector). These columns must use Zero-supported data types to sync the table to \
                 the client.",
                "The \"other.foo\" table does not exist or is not one of the replicated tables: \
                 \"issue\". Note that zero does not sync tables from non-public schemas by \
                 default. Make sure you have defined a custom ZERO_APP_PUBLICATION to sync tables \
                 from non-public schemas.",
                "The \"issue\".\"vec\" column cannot be synced because it is of an unsupported \
                 data type \"tsvector\"",
                "The \"issue\".\"zip\" column does not exist or is not one of the replicated \
                 columns: \"a\",\"b\",\"id\",\"n\".",
                "The \"issue\".\"n\" column's upstream type \"number\" does not match the client \
                 type \"string\"",
                "The \"issue\".\"id\" column's upstream type \"string\" does not match the client \
                 type \"json\"",
                "The \"issue\" table's client schema does not specify a primary key.",
            ]
        );
    }

    #[test]
    fn the_key_must_be_unique_and_the_replica_not_empty() {
        let columns = json!({"id": {"type": "string"}, "n": {"type": "number"}});
        let issue = json!({"issue": {"columns": columns, "primaryKey": ["id", "n"]}});
        assert_eq!(
            check(issue).unwrap_err(),
            "The \"issue\" table's primaryKey <id,n> is not associated with a non-null unique \
             index."
        );
        let schema = ClientSchema::parse(r#"{"tables":{}}"#).unwrap();
        assert_eq!(schema.check(&Schema::default(), "zero", 0), Err(SchemaMismatch::NothingSynced));
    }

    #[test]
    fn comparison_ignores_the_order_of_keys_but_not_of_the_primary_key() {
        let parse = |s: &str| ClientSchema::parse(s).unwrap();
        let a = parse(
            r#"{"tables":{"t":{"columns":{"a":{"type":"string"},"b":{"type":"json"}},"primaryKey":["a","b"]}}}"#,
        );
        let same = parse(
            r#"{"tables":{"t":{"primaryKey":["a","b"],"columns":{"b":{"type":"json"},"a":{"type":"string"}}}}}"#,
        );
        let other = parse(
            r#"{"tables":{"t":{"columns":{"a":{"type":"string"},"b":{"type":"json"}},"primaryKey":["b","a"]}}}"#,
        );
        assert_eq!(a.require_same(&same), Ok(()));
        assert_eq!(a.require_same(&other), Err(ClientSchemaConflict::Differs));
    }

    #[test]
    fn what_is_no_schema_is_refused_with_its_place() {
        for (text, place) in [
            ("[", "the schema is not JSON"),
            ("{}", "the schema.tables"),
            (r#"{"tables":{"t":{}}}"#, "t.columns"),
            (r#"{"tables":{"t":{"columns":{"a":{}}}}}"#, "t.columns.a has no type"),
            (r#"{"tables":{"t":{"columns":{},"primaryKey":[1]}}}"#, "t.primaryKey"),
        ] {
            let error = ClientSchema::parse(text).unwrap_err().to_string();
            assert!(error.contains(place), "{error}");
        }
    }
}
