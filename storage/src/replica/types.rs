//! Values into and out of SQLite, by column type.
//!
//! Spec: replication §2.4 (what is stored, affinity), zql-ivm §2.1 (what a row shows). Reading is
//! keyed on the ZQL type, not on what SQLite happened to store: affinity turns the JSON text
//! `1.50` into a REAL and a uuid-typed `7000` into an INTEGER.

use rusqlite::types::{ToSql, ToSqlOutput, Value as SqlValue, ValueRef};
use zeroring_core::change::message::LiteValue;
use zeroring_core::schema::ValueType;
use zeroring_core::value::Value;

use super::ReplicaError;
use super::schema::Affinity;

/// A [`LiteValue`] as an SQL parameter.
pub struct LiteParam<'a>(pub &'a LiteValue);

impl ToSql for LiteParam<'_> {
    fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
        Ok(ToSqlOutput::Borrowed(lite_ref(self.0)))
    }
}

/// A [`Value`] as an SQL parameter: booleans are 1/0, JSON is its text.
pub struct ValueParam<'a>(pub &'a Value);

impl ToSql for ValueParam<'_> {
    fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
        Ok(match self.0 {
            Value::Null => ToSqlOutput::Owned(SqlValue::Null),
            Value::Bool(b) => ToSqlOutput::Owned(SqlValue::Integer(i64::from(*b))),
            Value::Number(n) => ToSqlOutput::Owned(number_to_sql(*n)),
            Value::UnsafeInt(n) => ToSqlOutput::Owned(SqlValue::Integer(*n)),
            Value::String(s) | Value::Json(s) => {
                ToSqlOutput::Borrowed(ValueRef::Text(s.as_bytes()))
            }
        })
    }
}

/// Integral numbers go in as INTEGER, so that they compare as text columns would show them.
fn number_to_sql(n: f64) -> SqlValue {
    if n.fract() == 0.0 && n.abs() <= Value::MAX_SAFE_INTEGER as f64 {
        SqlValue::Integer(n as i64)
    } else {
        SqlValue::Real(n)
    }
}

/// A [`LiteValue`] as SQLite sees it.
pub fn lite_ref(value: &LiteValue) -> ValueRef<'_> {
    match value {
        LiteValue::Null => ValueRef::Null,
        LiteValue::Integer(n) => ValueRef::Integer(*n),
        LiteValue::Real(n) => ValueRef::Real(*n),
        LiteValue::Text(s) => ValueRef::Text(s.as_bytes()),
        LiteValue::Blob(b) => ValueRef::Blob(b),
    }
}

/// A stored value as an owned [`LiteValue`].
///
/// # Errors
/// [`ReplicaError::UnsupportedValue`] if a text is not UTF-8.
pub fn lite_from_sql(value: ValueRef<'_>) -> Result<LiteValue, ReplicaError> {
    Ok(match value {
        ValueRef::Null => LiteValue::Null,
        ValueRef::Integer(n) => LiteValue::Integer(n),
        ValueRef::Real(n) => LiteValue::Real(n),
        ValueRef::Text(t) => LiteValue::Text(
            std::str::from_utf8(t)
                .map_err(|e| ReplicaError::UnsupportedValue(format!("a text is not UTF-8: {e}")))?
                .into(),
        ),
        ValueRef::Blob(b) => LiteValue::Blob(b.into()),
    })
}

/// Whether SQLite stores `value` in a column of this affinity so that it reads back the same (an
/// integral REAL may come back as the equal INTEGER). False only means: read it back to know.
pub fn keeps_its_form(value: &LiteValue, affinity: Affinity) -> bool {
    match (value, affinity) {
        (LiteValue::Null | LiteValue::Blob(_), _) | (_, Affinity::Blob) => true,
        (LiteValue::Integer(n), Affinity::Real) => {
            n.unsigned_abs() <= Value::MAX_SAFE_INTEGER as u64
        }
        (LiteValue::Integer(_), affinity) => affinity != Affinity::Text,
        (LiteValue::Real(n), affinity) => affinity != Affinity::Text && !n.is_nan(),
        (LiteValue::Text(_), Affinity::Text) => true,
        (LiteValue::Text(s), _) => !may_be_number(s),
    }
}

/// Cheap and generous: only texts made of these bytes can be numbers to SQLite.
fn may_be_number(text: &str) -> bool {
    text.bytes().all(|b| {
        b.is_ascii_digit() || matches!(b, b'+' | b'-' | b'.' | b'e' | b'E' | b' ' | b'\t'..=b'\r')
    })
}

/// Reads a stored value as the ZQL type of its column.
///
/// An integer outside ±(2^53−1) is [`Value::UnsafeInt`]: the query that delivers or compares it
/// fails, not the read.
///
/// # Errors
/// [`ReplicaError::UnsupportedValue`] naming table and column.
pub fn value_from_sql(
    value: ValueRef<'_>,
    value_type: ValueType,
    table: &str,
    column: &str,
) -> Result<Value, ReplicaError> {
    let wrong = || {
        ReplicaError::UnsupportedValue(format!(
            "value (in {table}.{column}) is stored as {}, which is no {value_type}",
            value.data_type()
        ))
    };
    match (value_type, value) {
        (_, ValueRef::Null) => Ok(Value::Null),
        (ValueType::Boolean, ValueRef::Integer(n)) => Ok(Value::Bool(n != 0)),
        (ValueType::Boolean, ValueRef::Real(n)) => Ok(Value::Bool(n != 0.0)),
        (ValueType::Number, ValueRef::Integer(n)) => Ok(Value::from_i64(n)),
        (ValueType::Number, ValueRef::Real(n)) => Ok(Value::Number(n)),
        (ValueType::String, ValueRef::Text(t)) => Ok(Value::String(utf8(t, table, column)?.into())),
        (ValueType::String, ValueRef::Integer(n)) => {
            Ok(Value::String(itoa::Buffer::new().format(n).into()))
        }
        (ValueType::String, ValueRef::Real(n)) => Ok(Value::String(number_text(n).into())),
        (ValueType::Json, ValueRef::Text(t)) => {
            let text = utf8(t, table, column)?;
            check_json(text, table, column)?;
            Ok(Value::Json(text.into()))
        }
        (ValueType::Json, ValueRef::Integer(n)) => {
            Ok(Value::Json(itoa::Buffer::new().format(n).into()))
        }
        (ValueType::Json, ValueRef::Real(n)) if n.is_finite() => {
            Ok(Value::Json(number_text(n).into()))
        }
        _ => Err(wrong()),
    }
}

fn utf8<'a>(text: &'a [u8], table: &str, column: &str) -> Result<&'a str, ReplicaError> {
    std::str::from_utf8(text).map_err(|e| {
        ReplicaError::UnsupportedValue(format!("value (in {table}.{column}) is not UTF-8: {e}"))
    })
}

/// JSON goes into pokes as it is, so a malformed text would break a whole frame.
fn check_json(text: &str, table: &str, column: &str) -> Result<(), ReplicaError> {
    serde_json::from_str::<serde::de::IgnoredAny>(text).map(drop).map_err(|e| {
        ReplicaError::UnsupportedValue(format!("Failed to parse JSON for {table}.{column}: {e}"))
    })
}

/// A number as JavaScript prints it (which is JSON for finite ones).
pub(crate) fn number_text(n: f64) -> String {
    ryu_js::Buffer::new().format(n).to_owned()
}

/// The text shared by equal neighbours: most rows of a scan have few distinct versions.
#[derive(Debug, Default)]
pub(crate) struct VersionCache {
    last: Option<zeroring_core::version::StateVersion>,
}

impl VersionCache {
    /// The version that `text` names, without an allocation if it is the last one again.
    pub(crate) fn get(
        &mut self,
        text: ValueRef<'_>,
        table: &str,
    ) -> Result<zeroring_core::version::StateVersion, ReplicaError> {
        let text = match text {
            ValueRef::Text(t) => utf8(t, table, super::schema::VERSION_COLUMN)?,
            // Tables made by online DDL have no default: such a row was never written by anybody.
            ValueRef::Null => "00",
            _ => {
                return Err(ReplicaError::UnsupportedValue(format!(
                    "value (in {table}._0_version) is no text"
                )));
            }
        };
        if let Some(last) = &self.last
            && last.as_str() == text
        {
            return Ok(last.clone());
        }
        let version = zeroring_core::version::StateVersion::parse(text).map_err(|e| {
            ReplicaError::UnsupportedValue(format!("value (in {table}._0_version): {e}"))
        })?;
        self.last = Some(version.clone());
        Ok(version)
    }
}
