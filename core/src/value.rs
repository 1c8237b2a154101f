//! Values as ZQL sees them, and their one total comparison.

use std::cmp::Ordering;
use std::hash::{Hash, Hasher};

use crate::text::Text;

/// One column value of a replicated row, or a literal of a query.
///
/// Spec: zql-ivm §2.1. Numbers are IEEE doubles, as every client sees them. JSON stays text:
/// it is never compared, only delivered.
#[derive(Debug, Clone)]
pub enum Value {
    /// SQL NULL, a missing key and JSON `null` are one thing.
    Null,
    /// A boolean (stored 0/1 in the replica; any non-zero is true).
    Bool(bool),
    /// A number. Never NaN; infinities are delivered as `null`.
    Number(f64),
    /// A 64-bit integer outside ±(2^53−1). It may be stored and replicated, but delivering or
    /// comparing it is an error of the query that does so, never a truncated number.
    UnsafeInt(i64),
    /// A string (UTF-8; compared by bytes, which is code point order).
    String(Text),
    /// JSON text, delivered as is.
    Json(Text),
}

// Rows consist of these.
const _: () = assert!(size_of::<Value>() == 16);

impl Value {
    /// Largest integer that a double holds exactly: 2^53 − 1.
    pub const MAX_SAFE_INTEGER: i64 = (1 << 53) - 1;

    /// A value from a 64-bit integer of the replica.
    pub fn from_i64(n: i64) -> Value {
        if (-Self::MAX_SAFE_INTEGER..=Self::MAX_SAFE_INTEGER).contains(&n) {
            Value::Number(n as f64)
        } else {
            Value::UnsafeInt(n)
        }
    }

    /// A string value.
    pub fn string(s: impl AsRef<str>) -> Value {
        Value::String(Text::from(s.as_ref()))
    }

    /// True for SQL NULL.
    pub fn is_null(&self) -> bool {
        matches!(self, Value::Null)
    }

    /// Rank of the variant in the total order (null lowest).
    fn rank(&self) -> u8 {
        match self {
            Value::Null => 0,
            Value::Bool(_) => 1,
            Value::Number(_) | Value::UnsafeInt(_) => 2,
            Value::String(_) => 3,
            Value::Json(_) => 4,
        }
    }

    /// The total order used for `orderBy`, keys and windows: null first, then by value
    /// (spec: zql-ivm §2.3). Values of different types order by type, so that the order is total;
    /// predicates never compare across types (plans reject that).
    pub fn compare(&self, other: &Value) -> Ordering {
        match (self, other) {
            (Value::Bool(a), Value::Bool(b)) => a.cmp(b),
            (Value::Number(a), Value::Number(b)) => {
                a.partial_cmp(b).unwrap_or_else(|| a.is_nan().cmp(&b.is_nan()))
            }
            (Value::UnsafeInt(a), Value::UnsafeInt(b)) => a.cmp(b),
            (Value::UnsafeInt(a), Value::Number(b)) => cmp_int_double(*a, *b),
            (Value::Number(a), Value::UnsafeInt(b)) => cmp_int_double(*b, *a).reverse(),
            (Value::String(a), Value::String(b)) | (Value::Json(a), Value::Json(b)) => {
                a.as_bytes().cmp(b.as_bytes())
            }
            _ => self.rank().cmp(&other.rank()),
        }
    }
}

/// Compares a 64-bit integer that no double holds exactly with a double.
fn cmp_int_double(a: i64, b: f64) -> Ordering {
    if b >= 9_223_372_036_854_775_808.0 {
        Ordering::Less
    } else if b < -9_223_372_036_854_775_808.0 {
        Ordering::Greater
    } else {
        a.cmp(&(b as i64))
    }
}

impl PartialEq for Value {
    fn eq(&self, other: &Self) -> bool {
        self.compare(other) == Ordering::Equal
    }
}
impl Eq for Value {}
impl PartialOrd for Value {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Value {
    fn cmp(&self, other: &Self) -> Ordering {
        self.compare(other)
    }
}

impl Hash for Value {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.rank().hash(state);
        match self {
            Value::Null => {}
            Value::Bool(b) => b.hash(state),
            // -0 and 0 are equal, hence one hash.
            Value::Number(n) => (if *n == 0.0 { 0.0 } else { *n }).to_bits().hash(state),
            // An equal double may exist (2^53 + 2 = 9007199254740994.0).
            Value::UnsafeInt(n) => (*n as f64).to_bits().hash(state),
            Value::String(s) | Value::Json(s) => s.hash(state),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strings_order_by_code_point_not_utf16() {
        assert_eq!(Value::string("\u{FFFD}").compare(&Value::string("😀")), Ordering::Less);
    }

    #[test]
    fn null_is_lowest_and_zero_has_one_hash() {
        assert!(Value::Null < Value::Bool(false));
        assert_eq!(Value::Number(-0.0), Value::Number(0.0));
    }

    #[test]
    fn unsafe_integers_keep_their_place_among_doubles() {
        let big = Value::from_i64(i64::MAX);
        assert!(matches!(big, Value::UnsafeInt(_)));
        assert!(big > Value::Number(9.0e15));
        assert!(big < Value::Number(1.0e19));
    }
}
