//! The row-set signature: what each row contributes (spec: zql-ivm §5.8, §1.10).

use xxhash_rust::xxh32::xxh32;

use crate::row::Row;
use crate::schema::TableSpec;
use crate::value::Value;

/// Two 32-bit hashes of a text as one number.
fn h64(text: &[u8]) -> u64 {
    (u64::from(xxh32(text, 0)) << 32) | u64::from(xxh32(text, 1))
}

/// The compact JSON array `["", table, column, value, …]` of a row id, without its values: key
/// columns in UTF-16 order of their names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct RowName {
    /// Text before each value, and the value's column.
    parts: Vec<(String, usize)>,
}

impl RowName {
    pub(super) fn new(table: &TableSpec) -> RowName {
        let mut columns = table.primary_key.clone();
        let name = |c: usize| table.columns.get(c).map_or("", |spec| &*spec.name);
        columns.sort_by(|&a, &b| name(a).encode_utf16().cmp(name(b).encode_utf16()));
        let mut before = String::from("[\"\",");
        push_string(&mut before, &table.name);
        let mut parts = Vec::with_capacity(columns.len());
        for column in columns {
            before.push(',');
            push_string(&mut before, name(column));
            before.push(',');
            parts.push((std::mem::take(&mut before), column));
        }
        RowName { parts }
    }

    /// What one occurrence of the row contributes.
    pub(super) fn hash(&self, row: &Row) -> u64 {
        let mut text = String::with_capacity(96);
        for (before, column) in &self.parts {
            text.push_str(before);
            push_value(&mut text, &row.values[*column]);
        }
        text.push(']');
        h64(text.as_bytes())
    }
}

/// As `JSON.stringify` writes it.
fn push_value(out: &mut String, value: &Value) {
    match value {
        Value::Null => out.push_str("null"),
        Value::Bool(b) => out.push_str(if *b { "true" } else { "false" }),
        Value::Number(n) if !n.is_finite() => out.push_str("null"),
        // Adding zero makes -0 a 0.
        Value::Number(n) => out.push_str(ryu_js::Buffer::new().format_finite(n + 0.0)),
        Value::UnsafeInt(n) => out.push_str(itoa::Buffer::new().format(*n)),
        Value::String(s) => push_string(out, s),
        Value::Json(text) => out.push_str(text),
    }
}

fn push_string(out: &mut String, s: &str) {
    const HEX: &[u8; 16] = b"0123456789abcdef";
    out.push('"');
    for c in s.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            c if (c as u32) < 0x20 => {
                out.push_str("\\u00");
                out.push(HEX[(c as usize) >> 4] as char);
                out.push(HEX[(c as usize) & 15] as char);
            }
            c => out.push(c),
        }
    }
    out.push('"');
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::schema::{ColumnSpec, TableId, ValueType};
    use crate::version::StateVersion;

    fn table(name: &str, columns: &[&str], key: &[usize]) -> TableSpec {
        let column = |name: &&str| ColumnSpec {
            name: Arc::from(*name),
            value_type: ValueType::String,
            nullable: false,
            upstream_type: Arc::from("text"),
        };
        TableSpec {
            id: TableId(0),
            name: Arc::from(name),
            columns: columns.iter().map(column).collect(),
            primary_key: key.to_vec(),
            replica_key: key.to_vec(),
            unique_keys: Vec::new(),
            min_row_version: StateVersion::zero(),
            indexes: Vec::new(),
        }
    }

    #[test]
    fn vectors_of_the_spec() {
        assert_eq!(h64(b""), 0x02cc_5d05_0b2c_b792);
        assert_eq!(h64(b"abc"), 0x32d1_53ff_aa3d_a8ff);
        assert_eq!(h64("é😀".as_bytes()), 0x89d4_69a0_8855_9b8b);
        let issue = RowName::new(&table("issue", &["id"], &[0]));
        let a = issue.hash(&Row::new(StateVersion::zero(), vec![Value::string("i1")]));
        assert_eq!(a, 0x3957_5b73_a345_022a);
        // Key columns are named in the order of their names, not of the key.
        let pt = RowName::new(&table("pt", &["b", "a"], &[0, 1]));
        let row = Row::new(StateVersion::zero(), vec![Value::string("x"), Value::Number(1.0)]);
        assert_eq!(pt.hash(&row), 0xfec9_c89b_5a80_a336);
        assert_eq!(a ^ pt.hash(&row), 0xc79e_93e8_f9c5_a11c);
    }

    #[test]
    fn values_are_written_as_javascript_writes_them() {
        let mut s = String::new();
        for v in [
            Value::Number(-0.0),
            Value::Number(1e21),
            Value::Number(0.5),
            Value::string("a\"\\\n\u{1}é"),
            Value::Bool(true),
            Value::Null,
        ] {
            push_value(&mut s, &v);
            s.push(' ');
        }
        assert_eq!(s, "0 1e+21 0.5 \"a\\\"\\\\\\n\\u0001é\" true null ");
    }
}
