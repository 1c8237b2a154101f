//! Result rows and typed access to their columns.

use std::ops::Range;
use std::sync::Arc;

use super::error::PgError;
use super::frame::Reader;

/// How a value is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// As text.
    Text,
    /// In the type's binary form.
    Binary,
}

/// A column of a result.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Column {
    /// Name.
    pub name: String,
    /// Type.
    pub type_oid: u32,
    /// How its values are written.
    pub format: Format,
}

/// A row; its values are decoded when asked for.
#[derive(Debug, Clone)]
pub struct Row {
    columns: Arc<[Column]>,
    body: Box<[u8]>,
    ranges: Box<[Option<Range<u32>>]>,
}

/// Most columns of a result (Postgres itself stops at 1664).
const MAX_COLUMNS: i16 = 4096;

pub(crate) fn parse_columns(body: &[u8]) -> Result<Arc<[Column]>, PgError> {
    let mut reader = Reader::new(body);
    let count = reader.i16("column count")?;
    if !(0..=MAX_COLUMNS).contains(&count) {
        return Err(PgError::Protocol(format!("a result with {count} columns")));
    }
    let mut columns = Vec::with_capacity(count as usize);
    for _ in 0..count {
        let name = String::from_utf8_lossy(reader.cstr("column name")?).into_owned();
        reader.bytes(6, "column origin")?;
        let type_oid = reader.u32("column type")?;
        reader.bytes(6, "column type")?;
        let format = if reader.i16("column format")? == 1 { Format::Binary } else { Format::Text };
        columns.push(Column { name, type_oid, format });
    }
    Ok(columns.into())
}

impl Row {
    pub(crate) fn parse(columns: &Arc<[Column]>, body: &[u8]) -> Result<Row, PgError> {
        let mut reader = Reader::new(body);
        let count = reader.i16("value count")?;
        if count as usize != columns.len() {
            return Err(PgError::Protocol(format!(
                "a row of {count} values in a result of {} columns",
                columns.len()
            )));
        }
        let mut ranges = Vec::with_capacity(columns.len());
        for _ in 0..count {
            let length = reader.i32("value length")?;
            if length < 0 {
                ranges.push(None);
                continue;
            }
            let start = body.len() - reader.rest.len();
            reader.bytes(length as usize, "value")?;
            ranges.push(Some(start as u32..(start + length as usize) as u32));
        }
        Ok(Row { columns: columns.clone(), body: body.into(), ranges: ranges.into() })
    }

    /// The columns.
    pub fn columns(&self) -> &[Column] {
        &self.columns
    }

    /// The bytes of a value; `None` for NULL or a column that does not exist.
    pub fn raw(&self, index: usize) -> Option<&[u8]> {
        let range = self.ranges.get(index)?.as_ref()?;
        self.body.get(range.start as usize..range.end as usize)
    }

    /// A value by position.
    ///
    /// # Errors
    /// [`PgError::Decode`] naming the column.
    pub fn get<'a, T: FromPg<'a>>(&'a self, index: usize) -> Result<T, PgError> {
        let column = self.columns.get(index).ok_or_else(|| PgError::Decode {
            column: index.to_string(),
            cause: format!("the result has {} columns", self.columns.len()),
        })?;
        T::from_pg(self.raw(index), column)
            .map_err(|cause| PgError::Decode { column: column.name.clone(), cause })
    }

    /// A value by column name.
    ///
    /// # Errors
    /// [`PgError::Decode`] naming the column.
    pub fn by_name<'a, T: FromPg<'a>>(&'a self, name: &str) -> Result<T, PgError> {
        let index = self.columns.iter().position(|c| c.name == name);
        let index = index.ok_or_else(|| PgError::Decode {
            column: name.to_owned(),
            cause: "the result has no such column".into(),
        })?;
        self.get(index)
    }
}

/// A Rust type that a column can be read as.
pub trait FromPg<'a>: Sized {
    /// Decodes a value; `None` is NULL.
    ///
    /// # Errors
    /// What does not fit, without the column's name.
    fn from_pg(raw: Option<&'a [u8]>, column: &Column) -> Result<Self, String>;
}

fn required(raw: Option<&[u8]>) -> Result<&[u8], String> {
    raw.ok_or_else(|| "is NULL".to_owned())
}

fn utf8(raw: &[u8]) -> Result<&str, String> {
    std::str::from_utf8(raw).map_err(|e| format!("is not UTF-8: {e}"))
}

impl<'a, T: FromPg<'a>> FromPg<'a> for Option<T> {
    fn from_pg(raw: Option<&'a [u8]>, column: &Column) -> Result<Self, String> {
        match raw {
            None => Ok(None),
            some => T::from_pg(some, column).map(Some),
        }
    }
}

impl<'a> FromPg<'a> for &'a str {
    fn from_pg(raw: Option<&'a [u8]>, column: &Column) -> Result<Self, String> {
        let raw = required(raw)?;
        // The binary form of jsonb has a version in front.
        match (column.type_oid, column.format, raw) {
            (3802, Format::Binary, [1, rest @ ..]) => utf8(rest),
            _ => utf8(raw),
        }
    }
}

impl FromPg<'_> for String {
    fn from_pg(raw: Option<&[u8]>, column: &Column) -> Result<Self, String> {
        <&str>::from_pg(raw, column).map(str::to_owned)
    }
}

impl FromPg<'_> for bool {
    fn from_pg(raw: Option<&[u8]>, _column: &Column) -> Result<Self, String> {
        match required(raw)? {
            b"t" | [1] => Ok(true),
            b"f" | [0] => Ok(false),
            _ => Err("is no boolean".into()),
        }
    }
}

macro_rules! integer {
    ($($t:ty),*) => {$(
        impl FromPg<'_> for $t {
            fn from_pg(raw: Option<&[u8]>, column: &Column) -> Result<Self, String> {
                let raw = required(raw)?;
                if column.format == Format::Text {
                    let text = utf8(raw)?;
                    return text.parse().map_err(|_| format!("{text:?} is no {}", stringify!($t)));
                }
                let wide = match *raw {
                    [a, b] => i64::from(i16::from_be_bytes([a, b])),
                    // oid and xid have no sign
                    [a, b, c, d] if matches!(column.type_oid, 26 | 28) => {
                        i64::from(u32::from_be_bytes([a, b, c, d]))
                    }
                    [a, b, c, d] => i64::from(i32::from_be_bytes([a, b, c, d])),
                    [a, b, c, d, e, f, g, h] => i64::from_be_bytes([a, b, c, d, e, f, g, h]),
                    _ => return Err("is no binary integer".into()),
                };
                wide.try_into().map_err(|_| format!("{wide} does not fit {}", stringify!($t)))
            }
        }
    )*};
}
integer!(i16, i32, i64, u32, u64);

impl FromPg<'_> for f64 {
    fn from_pg(raw: Option<&[u8]>, column: &Column) -> Result<Self, String> {
        let raw = required(raw)?;
        match (column.format, raw) {
            (Format::Binary, &[a, b, c, d]) => Ok(f32::from_be_bytes([a, b, c, d]).into()),
            (Format::Binary, &[a, b, c, d, e, f, g, h]) => {
                Ok(f64::from_be_bytes([a, b, c, d, e, f, g, h]))
            }
            (Format::Binary, _) => Err("is no binary float".into()),
            (Format::Text, raw) => {
                let text = utf8(raw)?;
                text.parse().map_err(|_| format!("{text:?} is no number"))
            }
        }
    }
}

impl FromPg<'_> for Vec<u8> {
    fn from_pg(raw: Option<&[u8]>, column: &Column) -> Result<Self, String> {
        let raw = required(raw)?;
        if column.format == Format::Binary {
            return Ok(raw.to_vec());
        }
        let hex = raw.strip_prefix(b"\\x").ok_or("is no bytea in hex form")?;
        unhex(hex).ok_or_else(|| "is no bytea in hex form".to_owned())
    }
}

impl FromPg<'_> for serde_json::Value {
    fn from_pg(raw: Option<&[u8]>, column: &Column) -> Result<Self, String> {
        let text = <&str>::from_pg(raw, column)?;
        serde_json::from_str(text).map_err(|e| format!("is no JSON: {e}"))
    }
}

/// A one-dimensional array of text, in text form.
impl FromPg<'_> for Vec<String> {
    fn from_pg(raw: Option<&[u8]>, column: &Column) -> Result<Self, String> {
        if column.format == Format::Binary {
            return Err("arrays are read in text form".into());
        }
        let text = utf8(required(raw)?)?;
        parse_text_array(text).ok_or_else(|| format!("{text:?} is no array of text"))
    }
}

/// Bytes of hexadecimal digits; `None` if they are not.
pub fn unhex(hex: &[u8]) -> Option<Vec<u8>> {
    let digit = |b: u8| char::from(b).to_digit(16).map(|d| d as u8);
    if !hex.len().is_multiple_of(2) {
        return None;
    }
    hex.chunks_exact(2).map(|pair| Some(digit(pair[0])? << 4 | digit(pair[1])?)).collect()
}

/// The elements of `{a,"b,c",…}`; `None` for a nested array, a NULL element or bad syntax.
fn parse_text_array(text: &str) -> Option<Vec<String>> {
    let inner = text.strip_prefix('{')?.strip_suffix('}')?;
    let mut out = vec![];
    if inner.is_empty() {
        return Some(out);
    }
    let mut chars = inner.chars().peekable();
    loop {
        let mut item = String::new();
        if chars.next_if_eq(&'"').is_some() {
            loop {
                match chars.next()? {
                    '"' => break,
                    '\\' => item.push(chars.next()?),
                    c => item.push(c),
                }
            }
        } else {
            while let Some(c) = chars.next_if(|c| *c != ',') {
                match c {
                    '{' | '}' | '"' => return None,
                    '\\' => item.push(chars.next()?),
                    c => item.push(c),
                }
            }
            if item.eq_ignore_ascii_case("null") {
                return None;
            }
        }
        out.push(item);
        match chars.next() {
            None => return Some(out),
            Some(',') => {}
            Some(_) => return None,
        }
    }
}

/// A parameter of an extended query. The server infers its type unless `type_oid` is given.
#[derive(Debug, Clone, PartialEq)]
pub struct Param {
    /// Type, 0 to let the server infer it.
    pub type_oid: u32,
    /// How it is written.
    pub format: Format,
    /// The bytes; `None` is NULL.
    pub value: Option<Vec<u8>>,
}

impl Param {
    /// A value in text form.
    pub fn text(value: impl Into<String>) -> Param {
        let value = Some(value.into().into_bytes());
        Param { type_oid: 0, format: Format::Text, value }
    }

    /// A value in the binary form of the type that the server infers.
    pub fn binary(value: impl Into<Vec<u8>>) -> Param {
        Param { type_oid: 0, format: Format::Binary, value: Some(value.into()) }
    }

    /// NULL.
    pub fn null() -> Param {
        Param { type_oid: 0, format: Format::Text, value: None }
    }

    /// An array of text-form values (`None` is NULL), as array literal.
    pub fn array<'a>(values: impl IntoIterator<Item = Option<&'a str>>) -> Param {
        let mut out = String::from("{");
        for (i, value) in values.into_iter().enumerate() {
            if i > 0 {
                out.push(',');
            }
            let Some(value) = value else {
                out.push_str("NULL");
                continue;
            };
            out.push('"');
            for c in value.chars() {
                if matches!(c, '"' | '\\') {
                    out.push('\\');
                }
                out.push(c);
            }
            out.push('"');
        }
        out.push('}');
        Param::text(out)
    }

    /// With an explicit type.
    pub fn of_type(self, type_oid: u32) -> Param {
        Param { type_oid, ..self }
    }
}

impl From<&str> for Param {
    fn from(value: &str) -> Param {
        Param::text(value)
    }
}
impl From<String> for Param {
    fn from(value: String) -> Param {
        Param::text(value)
    }
}
impl From<i64> for Param {
    fn from(value: i64) -> Param {
        Param::text(value.to_string())
    }
}
impl From<i32> for Param {
    fn from(value: i32) -> Param {
        Param::text(value.to_string())
    }
}
impl From<u32> for Param {
    fn from(value: u32) -> Param {
        Param::text(value.to_string())
    }
}
impl From<f64> for Param {
    fn from(value: f64) -> Param {
        Param::text(value.to_string())
    }
}
impl From<bool> for Param {
    fn from(value: bool) -> Param {
        Param::text(if value { "t" } else { "f" })
    }
}
impl From<&serde_json::Value> for Param {
    fn from(value: &serde_json::Value) -> Param {
        Param::text(value.to_string())
    }
}
impl From<&[String]> for Param {
    fn from(values: &[String]) -> Param {
        Param::array(values.iter().map(|v| Some(v.as_str())))
    }
}
impl<T: Into<Param>> From<Option<T>> for Param {
    fn from(value: Option<T>) -> Param {
        value.map_or_else(Param::null, Into::into)
    }
}

/// `text` as an SQL identifier.
pub fn quote_ident(text: &str) -> String {
    format!("\"{}\"", text.replace('"', "\"\""))
}

/// `text` as an SQL string literal.
pub fn quote_literal(text: &str) -> String {
    let quoted = text.replace('\'', "''");
    if quoted.contains('\\') {
        format!(" E'{}'", quoted.replace('\\', "\\\\"))
    } else {
        format!("'{quoted}'")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arrays_of_text() {
        for (text, items) in [
            ("{}", Some(vec![])),
            ("{a,b}", Some(vec!["a", "b"])),
            (r#"{"a,b","c\"d\\e","NULL",""}"#, Some(vec!["a,b", "c\"d\\e", "NULL", ""])),
            ("{NULL}", None),
            ("{{a}}", None),
            ("{a", None),
        ] {
            let items = items.map(|i| i.into_iter().map(str::to_owned).collect());
            assert_eq!(parse_text_array(text), items, "{text}");
        }
        let param = Param::array([Some("a\"b\\"), None, Some("")]);
        assert_eq!(param.value.unwrap(), br#"{"a\"b\\",NULL,""}"#);
    }

    #[test]
    fn quoting() {
        assert_eq!(quote_ident("a\"b"), "\"a\"\"b\"");
        assert_eq!(quote_literal("it's"), "'it''s'");
        assert_eq!(quote_literal("a\\'"), " E'a\\\\'''");
    }

    #[test]
    fn rows_that_lie_about_their_length_are_errors() {
        let columns: Arc<[Column]> =
            [Column { name: "a".into(), type_oid: 25, format: Format::Text }].into();
        for body in [&b"\0"[..], b"\0\x02", b"\0\x01\0\0\0\x05ab", b"\0\x01\0\0"] {
            assert!(Row::parse(&columns, body).is_err(), "{body:?}");
        }
        let row = Row::parse(&columns, b"\0\x01\0\0\0\x02ab").unwrap();
        assert_eq!(row.get::<&str>(0).unwrap(), "ab");
        assert!(row.get::<i32>(0).unwrap_err().to_string().contains("column a"));
        assert!(row.get::<&str>(1).is_err());
    }
}
