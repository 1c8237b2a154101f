//! Arrays as JSON text, with numbers as JavaScript writes them.

use zeroring_net::pg::frame::Reader;

use super::{BadValue, Scalar, binary, text};

/// Postgres' own limit.
const MAX_DIMENSIONS: usize = 6;

/// An element as JSON, from its text form.
fn element_from_text(element: Scalar, raw: &[u8], out: &mut String) -> Result<(), BadValue> {
    match element {
        Scalar::Bool => push_bool(text::boolean(raw)?, out),
        Scalar::Bytea => push_buffer(&text::bytea(raw)?, out),
        Scalar::Int2 | Scalar::Int4 | Scalar::Int8 => push_integer(text::integer(raw)?, out),
        Scalar::Float4 | Scalar::Float8 | Scalar::Numeric => push_number(text::float(raw)?, out),
        Scalar::Date => push_number(text::date(raw)?, out),
        Scalar::Timestamp | Scalar::TimestampTz => push_number(text::timestamp(raw)?, out),
        Scalar::Time | Scalar::TimeTz => push_integer(text::time(raw)?, out),
        Scalar::Json | Scalar::Jsonb => push_json(text::utf8(raw)?, out),
        Scalar::Uuid | Scalar::Text | Scalar::Other => push_string(text::utf8(raw)?, out),
    }
    Ok(())
}

/// An element as JSON, from its binary form.
fn element_from_binary(element: Scalar, raw: &[u8], out: &mut String) -> Result<(), BadValue> {
    match element {
        Scalar::Bool => push_bool(binary::boolean(raw)?, out),
        Scalar::Bytea => push_buffer(raw, out),
        Scalar::Int2 | Scalar::Int4 | Scalar::Int8 => push_integer(binary::integer(raw)?, out),
        Scalar::Float8 => push_number(binary::float8(raw)?, out),
        Scalar::Numeric => push_number(binary::numeric(raw)?, out),
        Scalar::Date => push_number(binary::date(raw)?, out),
        Scalar::Timestamp | Scalar::TimestampTz => push_number(binary::timestamp(raw)?, out),
        Scalar::Time => push_integer(binary::integer(raw)? / 1000, out),
        Scalar::TimeTz => push_integer(binary::time_tz(raw)?, out),
        Scalar::Json => push_json(text::utf8(raw)?, out),
        Scalar::Jsonb => push_json(binary::jsonb(raw)?, out),
        Scalar::Uuid => push_string(binary::uuid(raw, &mut [0; 36])?, out),
        Scalar::Text => push_string(text::utf8(raw)?, out),
        Scalar::Float4 | Scalar::Other => return Err(binary::unreadable(raw)),
    }
    Ok(())
}

fn push_bool(value: bool, out: &mut String) {
    out.push_str(if value { "true" } else { "false" });
}

fn push_integer(value: i64, out: &mut String) {
    out.push_str(itoa::Buffer::new().format(value));
}

fn push_number(value: f64, out: &mut String) {
    if value.is_finite() {
        // As JavaScript: integral values without a point, −0 as 0.
        out.push_str(ryu_js::Buffer::new().format(if value == 0.0 { 0.0 } else { value }));
    } else {
        out.push_str("null");
    }
}

/// As the original serialises a byte buffer.
fn push_buffer(bytes: &[u8], out: &mut String) {
    out.push_str(r#"{"type":"Buffer","data":["#);
    for (i, b) in bytes.iter().enumerate() {
        if i > 0 {
            out.push(',');
        }
        push_integer(i64::from(*b), out);
    }
    out.push_str("]}");
}

fn push_string(value: &str, out: &mut String) {
    out.push('"');
    let mut clean = 0;
    for (i, b) in value.bytes().enumerate() {
        if b >= 0x20 && b != b'"' && b != b'\\' {
            continue;
        }
        out.push_str(&value[clean..i]);
        clean = i + 1;
        match b {
            b'"' => out.push_str("\\\""),
            b'\\' => out.push_str("\\\\"),
            8 => out.push_str("\\b"),
            12 => out.push_str("\\f"),
            b'\n' => out.push_str("\\n"),
            b'\r' => out.push_str("\\r"),
            b'\t' => out.push_str("\\t"),
            _ => out.push_str(&format!("\\u{b:04x}")),
        }
    }
    out.push_str(&value[clean..]);
    out.push('"');
}

/// JSON without the white space between its tokens. Postgres has checked it already.
fn push_json(json: &str, out: &mut String) {
    let (mut in_string, mut escaped) = (false, false);
    let mut clean = 0;
    for (i, b) in json.bytes().enumerate() {
        if in_string {
            match b {
                _ if escaped => escaped = false,
                b'\\' => escaped = true,
                b'"' => in_string = false,
                _ => {}
            }
        } else if b == b'"' {
            in_string = true;
        } else if matches!(b, b' ' | b'\t' | b'\n' | b'\r') {
            out.push_str(&json[clean..i]);
            clean = i + 1;
        }
    }
    out.push_str(&json[clean..]);
}

/// `{…}` with an optional prefix of bounds.
pub(super) fn from_text(element: Scalar, delimiter: u8, raw: &[u8]) -> Result<String, BadValue> {
    let bad = || BadValue::new("array", raw);
    let mut rest = raw;
    if raw.first() == Some(&b'[') {
        let at = raw.iter().position(|b| *b == b'=').ok_or_else(bad)?;
        rest = &raw[at + 1..];
    }
    let mut out = String::with_capacity(rest.len() + 8);
    let mut depth = 0;
    let mut scratch = vec![];
    // True where a value or `{` must come, false where a delimiter or `}` must.
    let mut wants_value = true;
    let mut at = 0;
    loop {
        let &b = rest.get(at).ok_or_else(bad)?;
        at += 1;
        match b {
            b'{' if wants_value && depth < MAX_DIMENSIONS => {
                out.push('[');
                depth += 1;
                if rest.get(at) == Some(&b'}') {
                    wants_value = false;
                }
            }
            b'}' if !wants_value && depth > 0 => {
                out.push(']');
                depth -= 1;
                if depth == 0 {
                    break;
                }
            }
            b if b == delimiter && !wants_value && depth > 0 => {
                out.push(',');
                wants_value = true;
            }
            b'"' if wants_value && depth > 0 => {
                at += unquote(&rest[at..], &mut scratch).ok_or_else(bad)?;
                element_from_text(element, &scratch, &mut out)?;
                wants_value = false;
            }
            _ if wants_value && depth > 0 => {
                let start = at - 1;
                let end = |b: &u8| *b == delimiter || *b == b'}';
                at = start + rest[start..].iter().position(end).ok_or_else(bad)?;
                match &rest[start..at] {
                    b"" => return Err(bad()),
                    b"NULL" => out.push_str("null"),
                    plain => element_from_text(element, plain, &mut out)?,
                }
                wants_value = false;
            }
            _ => return Err(bad()),
        }
    }
    if at == rest.len() { Ok(out) } else { Err(bad()) }
}

/// Undoes the quoting of an element, whose opening quote has been read; returns how many bytes
/// it took with the closing quote.
fn unquote(raw: &[u8], out: &mut Vec<u8>) -> Option<usize> {
    out.clear();
    let mut at = 0;
    loop {
        let &b = raw.get(at)?;
        at += 1;
        match b {
            b'"' => return Some(at),
            b'\\' => {
                out.push(*raw.get(at)?);
                at += 1;
            }
            b => out.push(b),
        }
    }
}

/// Dimensions, a flag for NULLs, the element's OID, bounds, elements in row-major order.
pub(super) fn from_binary(element: Scalar, raw: &[u8]) -> Result<String, BadValue> {
    let bad = || BadValue::new("array", raw);
    let mut reader = Reader::new(raw);
    let mut word = |what| reader.i32(what).map_err(|_| bad());
    let dimensions = usize::try_from(word("dimensions")?).map_err(|_| bad())?;
    word("flags")?;
    word("element type")?;
    if dimensions > MAX_DIMENSIONS {
        return Err(bad());
    }
    let mut sizes = [0usize; MAX_DIMENSIONS];
    for size in &mut sizes[..dimensions] {
        *size = usize::try_from(word("size")?).map_err(|_| bad())?;
        word("lower bound")?;
    }
    let mut out = String::with_capacity(raw.len());
    let sizes = &sizes[..dimensions];
    if sizes.is_empty() || sizes.contains(&0) {
        out.push_str("[]");
    } else {
        nested(element, sizes, &mut reader, &mut out).map_err(|e| e.unwrap_or_else(bad))?;
    }
    if reader.rest.is_empty() { Ok(out) } else { Err(bad()) }
}

/// One dimension after the other; `Err(None)` if the bytes do not suffice.
fn nested(
    element: Scalar,
    sizes: &[usize],
    reader: &mut Reader<'_>,
    out: &mut String,
) -> Result<(), Option<BadValue>> {
    let Some((size, inner)) = sizes.split_first() else {
        let length = reader.i32("length").map_err(|_| None)?;
        if length == -1 {
            out.push_str("null");
            return Ok(());
        }
        let length = usize::try_from(length).map_err(|_| None)?;
        let raw = reader.bytes(length, "element").map_err(|_| None)?;
        return element_from_binary(element, raw, out).map_err(Some);
    };
    out.push('[');
    for i in 0..*size {
        if i > 0 {
            out.push(',');
        }
        nested(element, inner, reader, out)?;
    }
    out.push(']');
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn no_input_panics(raw in prop::collection::vec(any::<u8>(), 0..80)) {
            let _ = from_text(Scalar::Text, b',', &raw);
            let _ = from_binary(Scalar::Int4, &raw);
            let _ = binary::numeric(&raw);
            let _ = text::timestamp(&raw);
            let _ = text::time(&raw);
        }

        #[test]
        fn strings_are_json(s in any::<String>()) {
            let mut out = String::new();
            push_string(&s, &mut out);
            prop_assert_eq!(serde_json::from_str::<String>(&out).unwrap(), s);
        }
    }

    #[test]
    fn a_claim_of_many_elements_does_not_allocate() {
        let mut raw = vec![0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 23];
        raw.extend([0x7f, 0xff, 0xff, 0xff, 0, 0, 0, 1]);
        assert!(from_binary(Scalar::Int4, &raw).is_err());
    }
}
