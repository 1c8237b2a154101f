//! Numbers and strings exactly as `JSON.stringify` prints them, appended to a byte buffer.

use crate::value::Value;

/// Appends a number: shortest round-trip form in JavaScript's notation; `-0` is `0`; what is not
/// finite is `null`.
pub fn number(out: &mut Vec<u8>, n: f64) {
    if n.trunc() == n && n.abs() < 9_007_199_254_740_992.0 {
        // Also turns -0 into 0. Most numbers on the wire are integers.
        out.extend_from_slice(itoa::Buffer::new().format(n as i64).as_bytes());
    } else if n.is_finite() {
        out.extend_from_slice(ryu_js::Buffer::new().format_finite(n).as_bytes());
    } else {
        out.extend_from_slice(b"null");
    }
}

/// Appends an unsigned integer.
pub fn unsigned(out: &mut Vec<u8>, n: u64) {
    out.extend_from_slice(itoa::Buffer::new().format(n).as_bytes());
}

/// Appends a string with its quotes.
pub fn string(out: &mut Vec<u8>, s: &str) {
    out.push(b'"');
    let bytes = s.as_bytes();
    let mut rest = bytes;
    loop {
        let at = escape_at(rest);
        out.extend_from_slice(&rest[..at]);
        let Some(&byte) = rest.get(at) else { break };
        escape(out, byte);
        rest = &rest[at + 1..];
    }
    out.push(b'"');
}

/// Appends a value; JSON values as their text.
///
/// # Errors
/// The integer, if it is beyond what a double holds exactly: it must not reach a client.
pub fn value(out: &mut Vec<u8>, v: &Value) -> Result<(), i64> {
    match v {
        Value::Null => out.extend_from_slice(b"null"),
        Value::Bool(true) => out.extend_from_slice(b"true"),
        Value::Bool(false) => out.extend_from_slice(b"false"),
        Value::Number(n) => number(out, *n),
        Value::UnsafeInt(n) => return Err(*n),
        Value::String(s) => string(out, s),
        Value::Json(text) => out.extend_from_slice(text.as_bytes()),
    }
    Ok(())
}

const LOW_BITS: u64 = 0x0101_0101_0101_0101;
const HIGH_BITS: u64 = 0x8080_8080_8080_8080;

/// Marks (with the byte's high bit) bytes of a word that need an escape. Marks above the lowest
/// one may be wrong (a borrow can run upwards); the lowest never is.
fn marks(word: u64) -> u64 {
    let zero = |w: u64| w.wrapping_sub(LOW_BITS) & !w;
    let quote = zero(word ^ (LOW_BITS * u64::from(b'"')));
    let backslash = zero(word ^ (LOW_BITS * u64::from(b'\\')));
    let control = word.wrapping_sub(LOW_BITS * 0x20) & !word;
    (quote | backslash | control) & HIGH_BITS
}

/// Index of the first byte that needs an escape, or the length. Eight bytes a step.
fn escape_at(bytes: &[u8]) -> usize {
    let (words, tail) = bytes.as_chunks::<8>();
    for (i, word) in words.iter().enumerate() {
        let found = marks(u64::from_le_bytes(*word));
        if found != 0 {
            return i * 8 + found.trailing_zeros() as usize / 8;
        }
    }
    let start = bytes.len() - tail.len();
    tail.iter()
        .position(|&b| b < 0x20 || b == b'"' || b == b'\\')
        .map_or(bytes.len(), |at| start + at)
}

fn escape(out: &mut Vec<u8>, byte: u8) {
    const HEX: &[u8; 16] = b"0123456789abcdef";
    let short = match byte {
        b'"' | b'\\' => byte,
        0x08 => b'b',
        b'\t' => b't',
        b'\n' => b'n',
        0x0c => b'f',
        b'\r' => b'r',
        _ => {
            out.extend_from_slice(b"\\u00");
            out.push(HEX[usize::from(byte >> 4)]);
            out.push(HEX[usize::from(byte & 15)]);
            return;
        }
    };
    out.extend_from_slice(&[b'\\', short]);
}
