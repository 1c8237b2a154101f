//! Records as parameters: one array per column.

use std::borrow::Cow;
use std::fmt::Write;

use zeroring_core::cvr::RefCounts;
use zeroring_net::pg::Param;

/// A value of a record.
pub(super) enum Cell<'a> {
    Null,
    Text(Cow<'a, str>),
    Float(f64),
    Bool(bool),
}

impl<'a> From<&'a str> for Cell<'a> {
    fn from(text: &'a str) -> Cell<'a> {
        Cell::Text(Cow::Borrowed(text))
    }
}
impl From<String> for Cell<'_> {
    fn from(text: String) -> Self {
        Cell::Text(Cow::Owned(text))
    }
}
impl From<f64> for Cell<'_> {
    fn from(value: f64) -> Self {
        Cell::Float(value)
    }
}
impl From<bool> for Cell<'_> {
    fn from(value: bool) -> Self {
        Cell::Bool(value)
    }
}
impl<'a, T: Into<Cell<'a>>> From<Option<T>> for Cell<'a> {
    fn from(value: Option<T>) -> Cell<'a> {
        value.map_or(Cell::Null, Into::into)
    }
}

/// Records of `N` columns.
pub(super) struct Records<const N: usize> {
    columns: [String; N],
    len: usize,
}

impl<const N: usize> Default for Records<N> {
    fn default() -> Records<N> {
        Records::new()
    }
}

impl<const N: usize> Records<N> {
    pub(super) fn new() -> Records<N> {
        Records { columns: std::array::from_fn(|_| String::new()), len: 0 }
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn push(&mut self, record: [Cell<'_>; N]) {
        for (column, cell) in self.columns.iter_mut().zip(record) {
            column.push(if self.len == 0 { '{' } else { ',' });
            // Writing to a String does not fail.
            match cell {
                Cell::Null => column.push_str("NULL"),
                Cell::Bool(b) => column.push(if b { 't' } else { 'f' }),
                Cell::Float(n) => drop(write!(column, "{n}")),
                Cell::Text(text) => push_quoted(column, &text),
            }
        }
        self.len += 1;
    }

    /// The arrays; empties the records.
    pub(super) fn take(&mut self) -> impl Iterator<Item = Param> {
        let columns = std::mem::take(self).columns;
        columns.into_iter().map(|mut column| {
            column.push_str(if column.is_empty() { "{}" } else { "}" });
            Param::text(column)
        })
    }
}

fn push_quoted(out: &mut String, text: &str) {
    out.push('"');
    let mut clean = 0;
    for (at, _) in text.match_indices(['"', '\\']) {
        out.push_str(&text[clean..at]);
        out.push('\\');
        clean = at;
    }
    out.push_str(&text[clean..]);
    out.push('"');
}

/// Reference counts as a JSON object.
pub(super) fn ref_counts_json<'a>(
    counts: impl Iterator<Item = (&'a zeroring_core::cvr::QueryHash, i64)>,
) -> String {
    let mut out = String::from("{");
    for (query, count) in counts {
        if out.len() > 1 {
            out.push(',');
        }
        let _ = write!(out, "{}:{count}", serde_json::Value::from(query.as_str()));
    }
    out.push('}');
    out
}

/// Reference counts as they are stored: nothing is a tombstone.
pub(super) fn stored_ref_counts(counts: &RefCounts) -> Option<String> {
    (!counts.is_empty()).then(|| ref_counts_json(counts.iter()))
}

/// A wall time as it is stored: whole milliseconds, as the original has them.
pub(super) fn wall(ms: f64) -> f64 {
    ms.floor()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(param: &Param) -> &str {
        std::str::from_utf8(param.value.as_deref().unwrap()).unwrap()
    }

    #[test]
    fn columns_are_array_literals() {
        let mut records = Records::<4>::new();
        records.push(["a\"b\\".into(), None::<&str>.into(), 1.5.into(), true.into()]);
        records.push(["".into(), "NULL".into(), 1e21.into(), false.into()]);
        assert_eq!(records.len(), 2);
        let params: Vec<_> = records.take().collect();
        let texts: Vec<_> = params.iter().map(text).collect();
        assert_eq!(
            texts,
            [r#"{"a\"b\\",""}"#, r#"{NULL,"NULL"}"#, "{1.5,1000000000000000000000}", "{t,f}"]
        );
        assert_eq!((records.len(), text(&records.take().next().unwrap())), (0, "{}"));
    }

    #[test]
    fn reference_counts_are_objects() {
        let counts: RefCounts = [("q\"1".into(), 2), ("r".into(), -1)].into_iter().collect();
        assert_eq!(stored_ref_counts(&counts).unwrap(), r#"{"q\"1":2,"r":-1}"#);
        assert_eq!(stored_ref_counts(&RefCounts::new()), None);
    }
}
