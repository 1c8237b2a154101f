//! JSON as Node prints it (committed vectors), and as serde_json reads it back.

use std::sync::Arc;

use proptest::prelude::*;

use super::row::{RowJsonError, key_json, wire_json};
use super::write;
use crate::row::Row;
use crate::schema::{ColumnSpec, TableId, TableSpec, ValueType};
use crate::value::Value;
use crate::version::StateVersion;

fn number(n: f64) -> String {
    let mut out = Vec::new();
    write::number(&mut out, n);
    String::from_utf8(out).unwrap()
}

fn string(s: &str) -> String {
    let mut out = Vec::new();
    write::string(&mut out, s);
    String::from_utf8(out).unwrap()
}

fn unhex(text: &str) -> Vec<u8> {
    let byte = |at| u8::from_str_radix(&text[at..at + 2], 16).unwrap();
    (0..text.len()).step_by(2).map(byte).collect()
}

#[test]
fn numbers_and_strings_are_printed_as_node_prints_them() {
    let mut seen = (0, 0);
    for line in include_str!("testdata/vectors.txt").split_terminator('\n') {
        let (kind, rest) = line.split_once(' ').unwrap();
        let (input, expected) = rest.split_once(' ').unwrap();
        if kind == "n" {
            let bits = u64::from_str_radix(input, 16).unwrap();
            assert_eq!(number(f64::from_bits(bits)), expected, "{input}");
            seen.0 += 1;
        } else {
            assert_eq!(string(&String::from_utf8(unhex(input)).unwrap()), expected);
            seen.1 += 1;
        }
    }
    assert!(seen.0 > 500 && seen.1 > 250, "{seen:?}");
}

#[test]
fn escapes_are_found_at_every_offset() {
    for len in 0..40 {
        for at in 0..len {
            for special in ["\"", "\\", "\u{0}", "\u{1f}", "\n", "\u{7f}", "é", " ", "!", "#", "["]
            {
                let text = format!("{}{special}{}", "x".repeat(at), "y".repeat(len - at));
                let back: String = serde_json::from_str(&string(&text)).unwrap();
                assert_eq!(back, text);
            }
        }
    }
}

proptest! {
    #[test]
    fn any_string_reads_back(s in any::<String>()) {
        prop_assert_eq!(serde_json::from_str::<String>(&string(&s)).unwrap(), s);
    }

    #[test]
    fn any_finite_number_reads_back_to_the_same_bits(bits in any::<u64>()) {
        let n = f64::from_bits(bits);
        if n.is_finite() {
            // Rust's own parser is exact; -0 prints as 0.
            let back: f64 = number(n).parse().unwrap();
            prop_assert_eq!(back.to_bits(), (if n == 0.0 { 0.0 } else { n }).to_bits());
        } else {
            prop_assert_eq!(number(n), "null");
        }
    }

    #[test]
    fn rows_are_valid_json_with_every_column(
        texts in prop::collection::vec(prop::option::of(any::<String>()), 1..6),
        n in any::<i32>(),
    ) {
        let columns: Vec<String> = (0..=texts.len()).map(|i| format!("c\"{i}")).collect();
        let names: Vec<&str> = columns.iter().map(String::as_str).collect();
        let table = table(&names);
        let mut values: Vec<Value> =
            texts.iter().map(|t| t.as_ref().map_or(Value::Null, Value::string)).collect();
        values.push(Value::Number(f64::from(n)));
        let row = Row::new(StateVersion::zero(), values);
        let json: serde_json::Value = serde_json::from_slice(wire_json(&table, &row).unwrap()).unwrap();
        prop_assert_eq!(json.as_object().unwrap().len(), columns.len());
        for (name, text) in columns.iter().zip(&texts) {
            let text = text.as_deref().map_or(serde_json::Value::Null, Into::into);
            prop_assert_eq!(&json[name.as_str()], &text);
        }
        prop_assert_eq!(json[columns[texts.len()].as_str()].as_f64(), Some(f64::from(n)));
    }
}

fn table(columns: &[&str]) -> TableSpec {
    let column = |name: &&str| ColumnSpec {
        name: Arc::from(*name),
        value_type: ValueType::String,
        nullable: true,
        upstream_type: Arc::from("text"),
    };
    TableSpec {
        id: TableId(1),
        name: Arc::from("ticket"),
        columns: columns.iter().map(column).collect(),
        primary_key: vec![0],
        replica_key: vec![0],
        unique_keys: Vec::new(),
        min_row_version: StateVersion::zero(),
        indexes: Vec::new(),
    }
}

#[test]
fn a_row_has_every_column_with_nulls_and_json_as_it_is() {
    let table = table(&["id", "done", "due", "created", "meta"]);
    let row = Row::new(
        StateVersion::zero(),
        vec![
            Value::string("t-1"),
            Value::Bool(false),
            Value::Null,
            Value::Number(1764990000000.125),
            Value::Json(r#"{"a": [1, null]}"#.into()),
        ],
    );
    let expected =
        br#"{"id":"t-1","done":false,"due":null,"created":1764990000000.125,"meta":{"a": [1, null]}}"#;
    assert_eq!(wire_json(&table, &row).unwrap(), expected);
    // The second call returns the same bytes, not equal ones.
    let first = wire_json(&table, &row).unwrap().as_ptr();
    assert_eq!(wire_json(&table, &row).unwrap().as_ptr(), first);
}

#[test]
fn an_integer_no_double_holds_is_refused_by_name() {
    let table = table(&["id", "big"]);
    let row = |n| Row::new(StateVersion::zero(), vec![Value::string("a"), Value::from_i64(n)]);
    assert_eq!(
        wire_json(&table, &row((1 << 53) - 1)).unwrap(),
        br#"{"id":"a","big":9007199254740991}"#
    );
    let error = wire_json(&table, &row(1 << 53)).unwrap_err();
    assert_eq!(
        error,
        RowJsonError::OutOfBounds { value: 1 << 53, table: "ticket".into(), column: "big".into() }
    );
    assert!(
        error
            .to_string()
            .starts_with("value 9007199254740992 (in ticket.big) is outside of supported bounds")
    );
}

#[test]
fn keys_name_their_columns() {
    let table = table(&["id", "other"]);
    let mut out = Vec::new();
    key_json(&mut out, &table, &[1, 0], &[Value::Number(2.0), Value::string("x\"")]).unwrap();
    assert_eq!(out, br#"{"other":2,"id":"x\""}"#);
    assert!(key_json(&mut out, &table, &[1], &[]).is_err());
    assert!(key_json(&mut out, &table, &[7], &[Value::Null]).is_err());
}
