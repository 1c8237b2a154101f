//! A JSON value kept as text.

use std::fmt;
use std::sync::Arc;

use serde::de::{Deserialize, DeserializeOwned, Deserializer};
use serde::ser::{Error as _, Serialize, Serializer};
use serde_json::value::RawValue;

/// Well-formed JSON text, as its sender wrote it. Compared by bytes, shared by reference.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RawJson(Arc<str>);

impl RawJson {
    /// JSON text that is checked here.
    ///
    /// # Errors
    /// The parser's message if the text is not one JSON value.
    pub fn parse(text: &str) -> Result<RawJson, serde_json::Error> {
        serde_json::from_str::<&RawValue>(text).map(|raw| RawJson(Arc::from(raw.get())))
    }

    /// JSON text that is known to be well-formed, e.g. read from a JSON column.
    pub fn from_trusted(text: impl Into<Arc<str>>) -> RawJson {
        RawJson(text.into())
    }

    /// The JSON of a serialisable value.
    ///
    /// # Errors
    /// If the value cannot be written as JSON (a map with keys that are no strings).
    pub fn of<T: Serialize>(value: &T) -> Result<RawJson, serde_json::Error> {
        serde_json::to_string(value).map(|text| RawJson(text.into()))
    }

    /// `null`.
    pub fn null() -> RawJson {
        RawJson(Arc::from("null"))
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The text, shared.
    pub fn to_arc(&self) -> Arc<str> {
        Arc::clone(&self.0)
    }

    /// The value as a Rust type.
    ///
    /// # Errors
    /// The parser's message if the value has another shape.
    pub fn decode<T: DeserializeOwned>(&self) -> Result<T, serde_json::Error> {
        serde_json::from_str(&self.0)
    }
}

impl fmt::Debug for RawJson {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Display for RawJson {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for RawJson {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<RawJson, D::Error> {
        // A boxed raw value also reads from a stream, where there is no text to borrow.
        Box::<RawValue>::deserialize(deserializer).map(|raw| RawJson(Arc::from(raw.get())))
    }
}

impl Serialize for RawJson {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serde_json::from_str::<&RawValue>(&self.0).map_err(S::Error::custom)?.serialize(serializer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_survives_a_round_trip_unchanged() {
        for text in ["1.0", "1e400", r#"{"b":1,"a":[ ]}"#, r#""\ud800 é""#, "null"] {
            let raw: RawJson = serde_json::from_str(text).unwrap();
            assert_eq!(raw.as_str(), text);
            assert_eq!(serde_json::to_string(&raw).unwrap(), text);
        }
        assert!(RawJson::parse("[1").is_err());
        assert!(RawJson::parse("1 2").is_err());
    }
}
