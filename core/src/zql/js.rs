//! JSON text of whole values exactly as `JSON.stringify` makes it: hashes of queries are hashes of
//! such text.

use serde_json::Value;

use crate::json::write;

/// `JSON.stringify(value)`: compact, keys in insertion order but integer-like ones first,
/// ascending.
pub fn stringify(value: &Value) -> String {
    let mut out = Vec::new();
    push_value(&mut out, value);
    // Only whole strings and ASCII were written.
    String::from_utf8(out).unwrap_or_default()
}

fn push_value(out: &mut Vec<u8>, value: &Value) {
    match value {
        Value::Null => out.extend_from_slice(b"null"),
        Value::Bool(b) => out.extend_from_slice(if *b { b"true" } else { b"false" }),
        Value::Number(n) => write::number(out, n.as_f64().unwrap_or(f64::NAN)),
        Value::String(s) => write::string(out, s),
        Value::Array(items) => {
            out.push(b'[');
            for (i, item) in items.iter().enumerate() {
                if i > 0 {
                    out.push(b',');
                }
                push_value(out, item);
            }
            out.push(b']');
        }
        Value::Object(map) => {
            let mut entries: Vec<(Option<u32>, &String, &Value)> =
                map.iter().map(|(k, v)| (array_index(k), k, v)).collect();
            entries.sort_by_key(|(index, _, _)| index.map_or(u64::MAX, u64::from));
            out.push(b'{');
            for (i, (_, k, v)) in entries.into_iter().enumerate() {
                if i > 0 {
                    out.push(b',');
                }
                write::string(out, k);
                out.push(b':');
                push_value(out, v);
            }
            out.push(b'}');
        }
    }
}

/// The array index that a key is, canonical and below 2^32 − 1: JavaScript lists such keys first.
fn array_index(key: &str) -> Option<u32> {
    let n: u32 = key.parse().ok()?;
    (n != u32::MAX && n.to_string() == key).then_some(n)
}

/// `String(value)` of a literal.
pub fn to_string(value: &Value) -> String {
    match value {
        Value::String(s) => s.clone(),
        Value::Array(items) => items.iter().map(to_string).collect::<Vec<_>>().join(","),
        Value::Object(_) => "[object Object]".to_owned(),
        other => stringify(other),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn numbers_and_keys_print_as_in_javascript() {
        let v: Value = serde_json::from_str(
            r#"{"b":1.0,"2":-0.0,"a":1e21,"1":0.1,"01":1e-7,"x":123456789012345680000}"#,
        )
        .unwrap();
        assert_eq!(
            stringify(&v),
            r#"{"1":0.1,"2":0,"b":1,"a":1e+21,"01":1e-7,"x":123456789012345680000}"#
        );
    }

    #[test]
    fn strings_escape_what_javascript_escapes_and_nothing_else() {
        assert_eq!(
            stringify(&json!("a\"\\/\n\u{1}\u{7f}é😀\u{2028}")),
            "\"a\\\"\\\\/\\n\\u0001\u{7f}é😀\u{2028}\""
        );
        assert_eq!(to_string(&json!([1, "b", true])), "1,b,true");
    }
}
