//! Postgres values as the replica stores them (spec: replication §2.4, decisions 16).
//!
//! A value arrives in text form (the stream, and columns that COPY casts) or in binary form (other
//! columns of COPY). Both give the same stored value: where the original's two ways differ, this
//! is the one that agrees with Postgres:
//! - numbers are the nearest double of the decimal text, float4 too; NaN is NULL, infinities stay;
//! - dates and timestamps are exact for all years, as the nearest double of the milliseconds;
//! - NULL inside arrays is `null`, lower bounds of arrays are dropped;
//! - everything else is the text of the type's output function (an inet host has no `/32`).

mod array;
mod binary;
mod text;

use std::collections::HashMap;

use zeroring_core::change::message::LiteValue;
use zeroring_core::change::published::PublishedColumn;
use zeroring_net::pg::{Client, PgError, quote_ident};
use zeroring_storage::replica::initial::RowBatch;

/// What a scalar type is decoded as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scalar {
    /// 0 / 1.
    Bool,
    /// A blob.
    Bytea,
    /// `int2`.
    Int2,
    /// `int4`.
    Int4,
    /// `int8`.
    Int8,
    /// `float4`.
    Float4,
    /// `float8`.
    Float8,
    /// `numeric`.
    Numeric,
    /// Milliseconds since the epoch.
    Date,
    /// Milliseconds since midnight.
    Time,
    /// Milliseconds since midnight, UTC.
    TimeTz,
    /// Milliseconds since the epoch, as if UTC.
    Timestamp,
    /// Milliseconds since the epoch.
    TimestampTz,
    /// JSON text.
    Json,
    /// JSON text with a version byte in its binary form.
    Jsonb,
    /// Text with hyphens.
    Uuid,
    /// Text whose binary form is the text.
    Text,
    /// Anything else: the text of its output function.
    Other,
}

/// How values of a type are decoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Codec {
    /// One value.
    Scalar(Scalar),
    /// An array: JSON text.
    Array {
        /// Its elements.
        element: Scalar,
        /// What separates them in text form.
        delimiter: u8,
    },
}

/// A value that is not of its type's form: never Postgres' doing, so replication cannot go on.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{value:?} is no {what}")]
pub struct BadValue {
    /// What was expected.
    pub what: &'static str,
    /// The beginning of the value.
    pub value: String,
}

/// How much of a bad value is shown.
const SHOWN_BYTES: usize = 64;

impl BadValue {
    pub(crate) fn new(what: &'static str, raw: &[u8]) -> BadValue {
        let shown = &raw[..raw.len().min(SHOWN_BYTES)];
        BadValue { what, value: String::from_utf8_lossy(shown).into_owned() }
    }
}

/// Where decoded values go.
pub trait LiteSink {
    /// NULL.
    fn null(&mut self);
    /// INTEGER.
    fn integer(&mut self, n: i64);
    /// REAL.
    fn real(&mut self, n: f64);
    /// TEXT.
    fn text(&mut self, text: &str);
    /// BLOB.
    fn blob(&mut self, blob: &[u8]);
}

impl LiteSink for RowBatch {
    fn null(&mut self) {
        RowBatch::null(self);
    }
    fn integer(&mut self, n: i64) {
        RowBatch::integer(self, n);
    }
    fn real(&mut self, n: f64) {
        RowBatch::real(self, n);
    }
    fn text(&mut self, text: &str) {
        RowBatch::text(self, text);
    }
    fn blob(&mut self, blob: &[u8]) {
        RowBatch::blob(self, blob);
    }
}

impl LiteSink for LiteValue {
    fn null(&mut self) {
        *self = LiteValue::Null;
    }
    fn integer(&mut self, n: i64) {
        *self = LiteValue::Integer(n);
    }
    fn real(&mut self, n: f64) {
        *self = LiteValue::Real(n);
    }
    fn text(&mut self, text: &str) {
        *self = LiteValue::Text(text.into());
    }
    fn blob(&mut self, blob: &[u8]) {
        *self = LiteValue::Blob(blob.into());
    }
}

/// Hands a number over: NaN is NULL, −0 is 0.
fn number(n: f64, out: &mut impl LiteSink) {
    if n.is_nan() {
        out.null();
    } else {
        out.real(if n == 0.0 { 0.0 } else { n });
    }
}

impl Codec {
    const OTHER: Codec = Codec::Scalar(Scalar::Other);

    /// Decodes a value in text form.
    ///
    /// # Errors
    /// [`BadValue`] if it is not of the type's form.
    pub fn decode_text(&self, raw: &[u8], out: &mut impl LiteSink) -> Result<(), BadValue> {
        match self {
            Codec::Scalar(scalar) => text::scalar(*scalar, raw, out),
            Codec::Array { element, delimiter } => {
                out.text(&array::from_text(*element, *delimiter, raw)?);
                Ok(())
            }
        }
    }

    /// Decodes a value in binary form. Only for codecs that [`Codec::has_binary`].
    ///
    /// # Errors
    /// [`BadValue`] if it is not of the type's form.
    pub fn decode_binary(&self, raw: &[u8], out: &mut impl LiteSink) -> Result<(), BadValue> {
        match self {
            Codec::Scalar(scalar) => binary::scalar(*scalar, raw, out),
            Codec::Array { element, .. } => {
                out.text(&array::from_binary(*element, raw)?);
                Ok(())
            }
        }
    }

    /// COPY can deliver the type in binary form. float4 cannot: its shortest text is not to be had
    /// from the bits by other means than Postgres' own.
    pub fn has_binary(&self) -> bool {
        let (Codec::Scalar(scalar) | Codec::Array { element: scalar, .. }) = self;
        !matches!(scalar, Scalar::Other | Scalar::Float4)
    }

    /// The expression that COPY selects for a column of this type; `binary` as by
    /// [`Codec::has_binary`]. A cast to text would not always be the output function (inet,
    /// domains over char, …), `format` is.
    pub fn select_expression(&self, column: &str, binary: bool) -> String {
        let column = quote_ident(column);
        if binary && self.has_binary() {
            return column;
        }
        format!("CASE WHEN {column} IS NOT NULL THEN pg_catalog.format('%s', {column}) END")
    }
}

/// Element type and delimiter of Postgres' own array types, by OID.
fn builtin_array(oid: u32) -> Option<u32> {
    Some(match oid {
        1000 => 16,
        1001 => 17,
        1002 => 18,
        1003 => 19,
        1005 => 21,
        1006 => 22,
        1007 => 23,
        1008 => 24,
        1009 => 25,
        1028 => 26,
        1010 => 27,
        1011 => 28,
        1012 => 29,
        1013 => 30,
        199 => 114,
        143 => 142,
        1014 => 1042,
        1015 => 1043,
        1016 => 20,
        1017 => 600,
        1018 => 601,
        1019 => 602,
        1020 => 603,
        1021 => 700,
        1022 => 701,
        1027 => 604,
        629 => 628,
        719 => 718,
        791 => 790,
        1040 => 829,
        775 => 774,
        1041 => 869,
        651 => 650,
        1182 => 1082,
        1183 => 1083,
        1115 => 1114,
        1185 => 1184,
        1187 => 1186,
        1270 => 1266,
        1561 => 1560,
        1563 => 1562,
        1231 => 1700,
        2951 => 2950,
        3221 => 3220,
        3643 => 3614,
        3645 => 3615,
        3807 => 3802,
        4073 => 4072,
        3905 => 3904,
        3907 => 3906,
        3909 => 3908,
        3911 => 3910,
        3913 => 3912,
        3927 => 3926,
        _ => return None,
    })
}

/// OID of `box`, whose arrays are separated by semicolons.
const BOX: u32 = 603;

/// First OID that a user's own types can have.
const FIRST_USER_OID: u32 = 16384;

fn scalar_of(oid: u32) -> Scalar {
    match oid {
        16 => Scalar::Bool,
        17 => Scalar::Bytea,
        20 => Scalar::Int8,
        21 => Scalar::Int2,
        23 => Scalar::Int4,
        25 | 1042 | 1043 => Scalar::Text,
        114 => Scalar::Json,
        700 => Scalar::Float4,
        701 => Scalar::Float8,
        1082 => Scalar::Date,
        1083 => Scalar::Time,
        1114 => Scalar::Timestamp,
        1184 => Scalar::TimestampTz,
        1266 => Scalar::TimeTz,
        1700 => Scalar::Numeric,
        2950 => Scalar::Uuid,
        3802 => Scalar::Jsonb,
        _ => Scalar::Other,
    }
}

/// What is known of the database's types. Types are looked up by OID when they are first seen.
#[derive(Debug, Clone, Default)]
pub struct TypeCatalog {
    /// Types beyond Postgres' own.
    user: HashMap<u32, Codec>,
}

/// User types that are remembered; a database has far fewer.
const MAX_USER_TYPES: usize = 100_000;

impl TypeCatalog {
    /// The codec of a type; `None` if it must be [`TypeCatalog::load`]ed first.
    pub fn codec(&self, oid: u32) -> Option<Codec> {
        if let Some(element) = builtin_array(oid) {
            let delimiter = if element == BOX { b';' } else { b',' };
            return Some(Codec::Array { element: scalar_of(element), delimiter });
        }
        if oid < FIRST_USER_OID {
            return Some(Codec::Scalar(scalar_of(oid)));
        }
        self.user.get(&oid).copied()
    }

    /// Looks up those of `oids` that are not known. A type that does not exist (any more) is read
    /// as text.
    ///
    /// # Errors
    /// The query failed.
    pub fn load(
        &mut self,
        client: &mut Client,
        oids: impl IntoIterator<Item = u32>,
    ) -> Result<(), PgError> {
        let mut unknown: Vec<u32> =
            oids.into_iter().filter(|oid| self.codec(*oid).is_none()).collect();
        unknown.sort_unstable();
        unknown.dedup();
        if unknown.is_empty() {
            return Ok(());
        }
        if self.user.len() > MAX_USER_TYPES {
            self.user.clear();
        }
        let wanted: Vec<String> = unknown.iter().map(u32::to_string).collect();
        // A true array type is the one that its element names as its array.
        let rows = client.query(
            "SELECT t.oid, e.oid, ascii(e.typdelim::text)
             FROM pg_catalog.pg_type t
             JOIN pg_catalog.pg_type e ON e.oid = t.typelem AND e.typarray = t.oid
             WHERE t.typlen = -1 AND t.oid = ANY($1::text[]::oid[])",
            &[wanted.as_slice().into()],
        )?;
        for oid in unknown {
            self.user.insert(oid, Codec::OTHER);
        }
        for row in rows {
            let delimiter = u8::try_from(row.get::<i32>(2)?).unwrap_or(b',');
            let element = scalar_of(row.get(1)?);
            self.user.insert(row.get(0)?, Codec::Array { element, delimiter });
        }
        Ok(())
    }

    /// Corrects a column of the published schema: array columns made by CREATE TABLE AS have no
    /// dimensions in the catalog, and some scalars (point, int2vector, …) have an element type.
    pub fn normalise(&self, column: &mut PublishedColumn) {
        let is_array = matches!(self.codec(column.type_oid), Some(Codec::Array { .. }));
        if is_array && !column.data_type.ends_with("[]") {
            let element = column.data_type.strip_prefix('_').unwrap_or(&column.data_type);
            column.data_type = format!("{element}[]");
        }
        if !is_array && column.pg_type_class.as_deref() == Some("b") {
            column.elem_pg_type_class = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text_value(oid: u32, raw: &str) -> Result<LiteValue, BadValue> {
        let mut out = LiteValue::Null;
        TypeCatalog::default().codec(oid).unwrap().decode_text(raw.as_bytes(), &mut out)?;
        Ok(out)
    }

    fn text(s: &str) -> LiteValue {
        LiteValue::Text(s.into())
    }

    #[test]
    fn scalars_in_text_form() {
        use LiteValue::{Blob, Integer, Null, Real};
        for (oid, raw, value) in [
            (16, "t", Integer(1)),
            (16, "f", Integer(0)),
            (20, "-9223372036854775808", Integer(i64::MIN)),
            (21, "-5", Integer(-5)),
            (700, "0.1", Real(0.1)),
            (701, "NaN", Null),
            (701, "-Infinity", Real(f64::NEG_INFINITY)),
            (701, "-0", Real(0.0)),
            (1700, "0.0012345678901234567", Real(0.0012345678901234567)),
            (1700, "NaN", Null),
            (1700, "Infinity", Real(f64::INFINITY)),
            (17, "\\x00ff", Blob([0, 255].into())),
            (1042, "a  ", text("a  ")),
            (
                2950,
                "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11",
                text("a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11"),
            ),
            (869, "10.0.0.1", text("10.0.0.1")),
            (114, "{\"a\" : 1}", text("{\"a\" : 1}")),
        ] {
            assert_eq!(text_value(oid, raw), Ok(value), "{oid} {raw}");
        }
        for (oid, raw) in [(16, "x"), (20, "9223372036854775808"), (701, ""), (17, "x"), (1082, "")]
        {
            assert!(text_value(oid, raw).is_err(), "{oid} {raw}");
        }
    }

    #[test]
    fn dates_and_times_in_text_form() {
        use LiteValue::{Integer, Real};
        for (oid, raw, value) in [
            (1082, "1970-01-01", Real(0.0)),
            (1082, "1969-12-31", Real(-86_400_000.0)),
            (1082, "0001-01-01 BC", Real(-62_167_219_200_000.0)),
            (1082, "0044-03-15", Real(-60_772_291_200_000.0)),
            (1082, "5874897-12-31", Real(185_331_706_992_000_000.0)),
            (1082, "infinity", Real(f64::INFINITY)),
            (1114, "2000-01-01 00:00:00.000001", Real(946_684_800_000.001)),
            (1114, "1969-12-31 23:59:59.999999", Real(-0.001)),
            (1114, "-infinity", Real(f64::NEG_INFINITY)),
            (1184, "1937-01-01 00:00:00+00:19:32", Real(-1_041_380_372_000.0)),
            (1184, "2020-02-29 12:34:56.5-05:30", Real(1_582_999_496_500.0)),
            (1184, "0002-01-01 00:00:00+00 BC", Real(-62_198_755_200_000.0)),
            (1083, "23:59:59.999999", Integer(86_399_999)),
            (1083, "24:00:00", Integer(86_400_000)),
            (1266, "00:30:00+01", Integer(84_600_000)),
            (1266, "12:00:00+05:30:15", Integer(23_385_000)),
            (1266, "12:00:00.5-08", Integer(72_000_500)),
        ] {
            assert_eq!(text_value(oid, raw), Ok(value), "{oid} {raw}");
        }
    }

    #[test]
    fn arrays_in_text_form() {
        for (oid, raw, json) in [
            (1007, "{}", "[]"),
            (1007, "{1,NULL,-3}", "[1,null,-3]"),
            (1007, "[0:1]={5,6}", "[5,6]"),
            (1007, "[1:1][-2:-1]={{5,6}}", "[[5,6]]"),
            (1016, "{9007199254740993}", "[9007199254740993]"),
            (1000, "{t,f,NULL}", "[true,false,null]"),
            (
                1009,
                r#"{a,"NULL","b\"c\\d",NULL,"","x,y","{}"}"#,
                r#"["a","NULL","b\"c\\d",null,"","x,y","{}"]"#,
            ),
            (1022, "{1,0.1,NaN,Infinity,1e300,-0}", "[1,0.1,null,null,1e+300,0]"),
            (1231, "{1.50,NULL}", "[1.5,null]"),
            (1182, "{2000-01-01,infinity}", "[946684800000,null]"),
            (1115, "{\"2000-01-01 00:00:00.001\"}", "[946684800001]"),
            (199, r#"{"{\"a\" : [1, \"x y\"]}",1}"#, r#"[{"a":[1,"x y"]},1]"#),
            (3807, r#"{"12345678901234567890"}"#, "[12345678901234567890]"),
            (1001, r#"{"\\x0102"}"#, r#"[{"type":"Buffer","data":[1,2]}]"#),
            (1187, "{\"1 day\"}", "[\"1 day\"]"),
            (1020, "{(1,1),(0,0);(3,3),(2,2)}", r#"["(1,1),(0,0)","(3,3),(2,2)"]"#),
        ] {
            assert_eq!(text_value(oid, raw), Ok(text(json)), "{oid} {raw}");
        }
        for raw in ["", "{", "{1", "{1,}", "{1}x", "{{1}", "{1,a}", "[0:1]{1}", "{\"1}"] {
            assert!(text_value(1007, raw).is_err(), "{raw}");
        }
        let deep = "{".repeat(100_000);
        assert!(text_value(1007, &deep).is_err());
    }

    #[test]
    fn bad_values_are_shown_shortened() {
        let error = text_value(23, &"9".repeat(1000)).unwrap_err();
        assert_eq!(error.value.len(), SHOWN_BYTES);
    }
}
