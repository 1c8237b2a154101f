//! How rows are named outside an executor, and the row-set signature (spec: view-syncer-cvr §1.5,
//! §1.6).

use std::fmt::{self, Write};
use std::hash::{Hash, Hasher};
use std::sync::Arc;

use xxhash_rust::xxh32::xxh32;

use crate::row::Row;
use crate::schema::TableSpec;
use crate::value::Value;

/// A row's identity in CVRs: table name and key, whatever the process or schema generation. The
/// key columns are those of the client schema's primary key where the table is in it.
///
/// Made once per row and engine advance, then shared by reference. Equality, order and hash are
/// those of the identity text.
#[derive(Clone)]
pub struct RowIdentity {
    table: Arc<str>,
    /// Sorted by column name (UTF-16 code units, as JavaScript sorts).
    key: Box<[(Arc<str>, Value)]>,
    /// The identity text, and behind it the key as JSON: all groups that share the identity write
    /// the same.
    texts: Box<str>,
    split: usize,
}

/// A text that is no row identity.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not a row identity: {text}: {why}")]
pub struct RowIdentityError {
    /// The text.
    pub text: String,
    /// What is wrong.
    pub why: &'static str,
}

impl RowIdentity {
    /// The row of `table` with this key, columns in any order.
    pub fn new(table: Arc<str>, mut key: Vec<(Arc<str>, Value)>) -> RowIdentity {
        key.sort_by(|a, b| a.0.encode_utf16().cmp(b.0.encode_utf16()));
        let (texts, split) = texts(&table, &key);
        RowIdentity { table, key: key.into_boxed_slice(), texts, split }
    }

    /// The identity of `row` under the table's identity key ([`TableSpec::primary_key`]).
    pub fn of(table: &TableSpec, row: &Row) -> RowIdentity {
        Self::with_key(table, table.primary_key.iter().map(|&c| &row.values[c]))
    }

    /// The identity of a row given the values of the identity key, in key order.
    pub fn with_key<'a>(
        table: &TableSpec,
        values: impl IntoIterator<Item = &'a Value>,
    ) -> RowIdentity {
        let names = table.primary_key.iter().map(|&c| table.columns[c].name.clone());
        RowIdentity::new(table.name.clone(), names.zip(values.into_iter().cloned()).collect())
    }

    /// Reads an identity text.
    ///
    /// # Errors
    /// [`RowIdentityError`] if it is not what [`RowIdentity::text`] gives.
    pub fn parse(text: &str) -> Result<RowIdentity, RowIdentityError> {
        let err = |why| RowIdentityError { text: text.to_owned(), why };
        let parts: Vec<serde_json::Value> =
            serde_json::from_str(text).map_err(|_| err("not a JSON array"))?;
        let mut parts = parts.into_iter();
        if parts.next().as_ref().and_then(|s| s.as_str()) != Some("") {
            return Err(err("the schema is not empty"));
        }
        let Some(serde_json::Value::String(table)) = parts.next() else {
            return Err(err("no table name"));
        };
        let mut key = Vec::with_capacity(parts.len() / 2);
        while let Some(column) = parts.next() {
            let (serde_json::Value::String(column), Some(value)) = (column, parts.next()) else {
                return Err(err("columns and values do not alternate"));
            };
            key.push((Arc::from(column), key_value(value)));
        }
        Ok(RowIdentity::new(table.into(), key))
    }

    /// The row of `table` whose key is this JSON object, columns in any order (as JSONB gives it).
    ///
    /// # Errors
    /// [`RowIdentityError`] if it is no object.
    pub fn from_key_json(table: &str, json: &str) -> Result<RowIdentity, RowIdentityError> {
        let key: serde_json::Map<String, serde_json::Value> = serde_json::from_str(json)
            .map_err(|_| RowIdentityError { text: json.to_owned(), why: "not a JSON object" })?;
        let key = key.into_iter().map(|(column, value)| (Arc::from(column), key_value(value)));
        Ok(RowIdentity::new(table.into(), key.collect()))
    }

    /// The key as JSON object `{column: value, …}`.
    pub fn key_json(&self) -> &str {
        &self.texts[self.split..]
    }

    /// The table: `name`, or `schema.name` outside `public`.
    pub fn table(&self) -> &Arc<str> {
        &self.table
    }

    /// Key columns and values, by column name.
    pub fn key(&self) -> &[(Arc<str>, Value)] {
        &self.key
    }

    /// The value of a key column.
    pub fn key_value(&self, column: &str) -> Option<&Value> {
        self.key.iter().find(|(c, _)| &**c == column).map(|(_, v)| v)
    }

    /// JSON text of `["", table, column, value, …]`.
    pub fn text(&self) -> &str {
        &self.texts[..self.split]
    }

    /// What one occurrence of the row contributes to its query's row-set signature. A query's
    /// signature is the XOR over all its occurrences, so a row with an even count adds nothing.
    pub fn signature_unit(&self) -> u64 {
        let bytes = self.text().as_bytes();
        u64::from(xxh32(bytes, 0)) << 32 | u64::from(xxh32(bytes, 1))
    }
}

/// A key value as JSON gave it: 64-bit integers keep all their digits.
fn key_value(value: serde_json::Value) -> Value {
    match value {
        serde_json::Value::Null => Value::Null,
        serde_json::Value::Bool(b) => Value::Bool(b),
        serde_json::Value::Number(n) => match n.as_i64() {
            Some(i) => Value::from_i64(i),
            None => Value::Number(n.as_f64().unwrap_or(f64::NAN)),
        },
        serde_json::Value::String(s) => Value::String(s.into()),
        json => Value::Json(json.to_string().into()),
    }
}

/// The identity text, the key as JSON, and where that begins.
fn texts(table: &str, key: &[(Arc<str>, Value)]) -> (Box<str>, usize) {
    let mut out = String::with_capacity(16 + table.len() + 48 * key.len());
    out.push_str("[\"\",");
    push_json_string(&mut out, table);
    for (column, value) in key {
        out.push(',');
        push_json_string(&mut out, column);
        out.push(',');
        push_json_value(&mut out, value);
    }
    out.push(']');
    let split = out.len();
    for (i, (column, value)) in key.iter().enumerate() {
        out.push(if i == 0 { '{' } else { ',' });
        push_json_string(&mut out, column);
        out.push(':');
        push_json_value(&mut out, value);
    }
    out.push_str(if key.is_empty() { "{}" } else { "}" });
    (out.into_boxed_str(), split)
}

/// Appends what `JSON.stringify` makes of a key value.
pub(super) fn push_json_value(out: &mut String, value: &Value) {
    match value {
        Value::Null => out.push_str("null"),
        Value::Bool(b) => out.push_str(if *b { "true" } else { "false" }),
        Value::Number(n) if n.is_finite() => out.push_str(ryu_js::Buffer::new().format(*n)),
        Value::Number(_) => out.push_str("null"),
        Value::UnsafeInt(n) => out.push_str(itoa::Buffer::new().format(*n)),
        Value::String(s) => push_json_string(out, s),
        Value::Json(text) => out.push_str(text),
    }
}

/// Appends what `JSON.stringify` makes of a string.
fn push_json_string(out: &mut String, s: &str) {
    out.push('"');
    let mut clean = 0;
    for (at, b) in s.bytes().enumerate() {
        if b >= 0x20 && b != b'"' && b != b'\\' {
            continue;
        }
        out.push_str(&s[clean..at]);
        clean = at + 1;
        match b {
            b'"' => out.push_str("\\\""),
            b'\\' => out.push_str("\\\\"),
            0x08 => out.push_str("\\b"),
            0x09 => out.push_str("\\t"),
            0x0a => out.push_str("\\n"),
            0x0c => out.push_str("\\f"),
            0x0d => out.push_str("\\r"),
            // Writing to a String does not fail.
            _ => drop(write!(out, "\\u{b:04x}")),
        }
    }
    out.push_str(&s[clean..]);
    out.push('"');
}

impl PartialEq for RowIdentity {
    fn eq(&self, other: &RowIdentity) -> bool {
        self.text() == other.text()
    }
}
impl Eq for RowIdentity {}
impl PartialOrd for RowIdentity {
    fn partial_cmp(&self, other: &RowIdentity) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for RowIdentity {
    fn cmp(&self, other: &RowIdentity) -> std::cmp::Ordering {
        self.text().cmp(other.text())
    }
}
impl Hash for RowIdentity {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.text().hash(state);
    }
}
impl fmt::Display for RowIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.text())
    }
}
impl fmt::Debug for RowIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.text())
    }
}

/// A signature as it is stored: lower-case hex, no padding.
pub fn format_signature(signature: u64) -> String {
    format!("{signature:x}")
}

/// Reads a stored signature; empty or malformed text is no signature.
pub fn parse_signature(text: &str) -> Option<u64> {
    u64::from_str_radix(text, 16).ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn id(table: &str, key: &[(&str, Value)]) -> RowIdentity {
        let key = key.iter().map(|(c, v)| (Arc::from(*c), v.clone())).collect();
        RowIdentity::new(table.into(), key)
    }

    #[test]
    fn signature_units_of_the_spec() {
        for (identity, unit) in [
            (id("issue", &[("id", Value::string("1"))]), "2e8f2dbbadcc30e"),
            (
                id("issue", &[("a", Value::string("x")), ("b", 2.0.into_value())]),
                "421c1760d80005fc",
            ),
            (id("t", &[("id", Value::from_i64(9_007_199_254_740_993))]), "11b93c95c8d79346"),
            (id("issue", &[("id", Value::string("i1"))]), "39575b73a345022a"),
            (id("pt", &[("b", Value::string("x")), ("a", 1.0.into_value())]), "fec9c89b5a80a336"),
        ] {
            assert_eq!(format_signature(identity.signature_unit()), unit, "{identity}");
        }
        assert_eq!(format_signature(0), "0");
        assert_eq!((parse_signature(""), parse_signature("1f")), (None, Some(31)));
    }

    trait IntoValue {
        fn into_value(self) -> Value;
    }
    impl IntoValue for f64 {
        fn into_value(self) -> Value {
            Value::Number(self)
        }
    }

    #[test]
    fn identity_ignores_column_order_and_tells_tables_apart() {
        let a = id("t", &[("b", Value::Bool(true)), ("a", Value::Null)]);
        let b = id("t", &[("a", Value::Null), ("b", Value::Bool(true))]);
        assert_eq!(a, b);
        assert_eq!(a.text(), r#"["","t","a",null,"b",true]"#);
        assert_ne!(a, id("u", &[("a", Value::Null), ("b", Value::Bool(true))]));
        assert_ne!(id("t", &[("a", 1.0.into_value())]), id("t", &[("a", Value::string("1"))]));
    }

    #[test]
    fn numbers_print_as_javascript_prints_them() {
        for (n, text) in
            [(1e21, "1e+21"), (1.5, "1.5"), (-0.0, "0"), (100.0, "100"), (1e-7, "1e-7")]
        {
            let mut out = String::new();
            push_json_value(&mut out, &Value::Number(n));
            assert_eq!(out, text);
        }
    }

    #[test]
    fn what_is_no_identity_is_refused() {
        for bad in
            ["", "{}", "[]", r#"["x","t"]"#, r#"["",1]"#, r#"["","t","a"]"#, r#"["","t",1,2]"#]
        {
            assert!(RowIdentity::parse(bad).is_err(), "{bad}");
        }
    }

    fn any_value() -> impl Strategy<Value = Value> {
        prop_oneof![
            any::<bool>().prop_map(Value::Bool),
            any::<i64>().prop_map(Value::from_i64),
            (-1e12f64..1e12).prop_map(Value::Number),
            any::<String>().prop_map(|s| Value::string(&s)),
        ]
    }

    proptest! {
        #[test]
        fn texts_read_back(table in any::<String>(),
                           key in proptest::collection::btree_map(any::<String>(), any_value(), 1..4)) {
            let key: Vec<_> = key.into_iter().map(|(c, v)| (Arc::from(c), v)).collect();
            let identity = RowIdentity::new(table.into(), key);
            let back = RowIdentity::parse(identity.text()).unwrap();
            prop_assert_eq!(&back, &identity);
            prop_assert_eq!(back.key(), identity.key());
            prop_assert_eq!(back.table(), identity.table());
            let back = RowIdentity::from_key_json(identity.table(), identity.key_json()).unwrap();
            prop_assert_eq!(&back, &identity);
        }

        #[test]
        fn strings_are_escaped_as_serde_json_does(s in any::<String>()) {
            let mut out = String::new();
            push_json_string(&mut out, &s);
            prop_assert_eq!(out, serde_json::to_string(&s).unwrap());
        }
    }
}
