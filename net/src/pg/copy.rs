//! `COPY … TO STDOUT`: chunks as they come, and a reader of the binary format.

use std::ops::Range;

use super::client::Client;
use super::error::PgError;
use super::frame::{Reader, server_error};

/// A running `COPY … TO STDOUT`. Read it to its end; dropped earlier, it leaves the session
/// unusable (the rest of the data is still on its way).
#[derive(Debug)]
pub struct CopyOut<'c> {
    client: &'c mut Client,
    binary: bool,
}

impl<'c> CopyOut<'c> {
    pub(crate) fn new(client: &'c mut Client, binary: bool) -> Self {
        CopyOut { client, binary }
    }

    /// The data is in binary format.
    pub fn is_binary(&self) -> bool {
        self.binary
    }

    /// The next piece of data; `None` at the end, after which the session is usable again.
    ///
    /// # Errors
    /// The server's error, or a broken connection.
    pub fn next_chunk(&mut self) -> Result<Option<&[u8]>, PgError> {
        let mut failed = None;
        loop {
            let frame = self.client.next_frame()?;
            match frame.tag {
                b'd' => break,
                b'E' => {
                    let error = server_error(frame.body);
                    if error.severity != "ERROR" {
                        return Err(PgError::Server(Box::new(error)));
                    }
                    failed = Some(Box::new(error));
                }
                b'Z' => {
                    let status = frame.body.first().copied();
                    self.client.ready_from(status)?;
                    return failed.map_or(Ok(None), |e| Err(PgError::Server(e)));
                }
                b'c' | b'C' => {}
                other => {
                    return Err(PgError::Protocol(format!(
                        "message {:?} within a COPY",
                        char::from(other)
                    )));
                }
            }
        }
        Ok(self.client.wire.again().map(|f| f.body))
    }
}

const SIGNATURE: &[u8] = b"PGCOPY\n\xff\r\n\0";

/// Most fields of a row (Postgres stops at 1664).
const MAX_FIELDS: i16 = 4096;

/// Largest header extension accepted; none is defined today.
const MAX_EXTENSION_BYTES: usize = 64 << 10;

/// Splits the binary COPY format into rows, however it arrives in chunks. Postgres sends a row a
/// chunk, so normally nothing is copied.
#[derive(Debug, Default)]
pub struct BinaryRows {
    header_done: bool,
    finished: bool,
    carry: Vec<u8>,
    ranges: Vec<Option<Range<usize>>>,
}

impl BinaryRows {
    /// Takes a chunk and calls `on_row` with the fields of every row that is complete.
    ///
    /// # Errors
    /// Data that is not in the format, or an error of `on_row`.
    pub fn feed<E: From<PgError>>(
        &mut self,
        chunk: &[u8],
        mut on_row: impl FnMut(Fields<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        if self.carry.is_empty() {
            let used = self.run(chunk, &mut on_row)?;
            self.carry.extend_from_slice(&chunk[used..]);
            return Ok(());
        }
        let mut bytes = std::mem::take(&mut self.carry);
        bytes.extend_from_slice(chunk);
        let used = self.run(&bytes, &mut on_row)?;
        bytes.drain(..used);
        self.carry = bytes;
        Ok(())
    }

    /// Call at the end of the data.
    ///
    /// # Errors
    /// The data ended in the middle of a row.
    pub fn finish(&self) -> Result<(), PgError> {
        if self.finished && self.carry.is_empty() {
            return Ok(());
        }
        Err(PgError::protocol("a binary COPY ended without its trailer"))
    }

    fn run<E: From<PgError>>(
        &mut self,
        bytes: &[u8],
        on_row: &mut impl FnMut(Fields<'_>) -> Result<(), E>,
    ) -> Result<usize, E> {
        let mut at = 0;
        if !self.header_done {
            match header_len(bytes)? {
                None => return Ok(0),
                Some(n) => at = n,
            }
            self.header_done = true;
        }
        while at < bytes.len() {
            if self.finished {
                return Err(PgError::protocol("data after the end of a binary COPY").into());
            }
            match self.row(&bytes[at..])? {
                None => break,
                Some(used) => {
                    if !self.finished {
                        on_row(Fields { bytes: &bytes[at..], ranges: &self.ranges })?;
                    }
                    at += used;
                }
            }
        }
        Ok(at)
    }

    /// Finds the fields of the row at the front; `None` if it is not complete.
    fn row(&mut self, bytes: &[u8]) -> Result<Option<usize>, PgError> {
        self.ranges.clear();
        let mut reader = Reader::new(bytes);
        let Ok(count) = reader.i16("field count") else { return Ok(None) };
        if count == -1 {
            self.finished = true;
            return Ok(Some(2));
        }
        if !(0..=MAX_FIELDS).contains(&count) {
            return Err(PgError::Protocol(format!("a binary COPY row with {count} fields")));
        }
        for _ in 0..count {
            let Ok(length) = reader.i32("field length") else { return Ok(None) };
            if length == -1 {
                self.ranges.push(None);
                continue;
            }
            let length = usize::try_from(length)
                .map_err(|_| PgError::Protocol(format!("a COPY field of {length} bytes")))?;
            let start = bytes.len() - reader.rest.len();
            if reader.bytes(length, "field").is_err() {
                return Ok(None);
            }
            self.ranges.push(Some(start..start + length));
        }
        Ok(Some(bytes.len() - reader.rest.len()))
    }
}

fn header_len(bytes: &[u8]) -> Result<Option<usize>, PgError> {
    let seen = bytes.len().min(SIGNATURE.len());
    if bytes[..seen] != SIGNATURE[..seen] {
        return Err(PgError::protocol("this is no binary COPY data"));
    }
    let mut reader = Reader::new(&bytes[seen..]);
    let (Ok(flags), Ok(extension)) = (reader.u32("flags"), reader.u32("extension")) else {
        return Ok(None);
    };
    // The low half may be ignored, the high half not.
    if flags >> 16 != 0 || extension as usize > MAX_EXTENSION_BYTES {
        return Err(PgError::Protocol(format!(
            "a binary COPY with unknown flags {flags:#x} or an extension of {extension} bytes"
        )));
    }
    let end = SIGNATURE.len() + 8 + extension as usize;
    Ok((bytes.len() >= end).then_some(end))
}

/// The fields of one row.
#[derive(Debug, Clone, Copy)]
pub struct Fields<'a> {
    bytes: &'a [u8],
    ranges: &'a [Option<Range<usize>>],
}

impl<'a> Fields<'a> {
    /// How many.
    pub fn len(&self) -> usize {
        self.ranges.len()
    }

    /// None at all.
    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    /// A field's bytes; `None` is NULL.
    pub fn get(&self, index: usize) -> Option<&'a [u8]> {
        self.ranges.get(index)?.clone().map(|range| &self.bytes[range])
    }
}

/// Splits a row of the text COPY format (one chunk, with or without its newline) into fields and
/// undoes the escapes. `scratch` is reused; `on_field` gets each field, `None` for NULL.
///
/// # Errors
/// An escape that Postgres does not write, or an error of `on_field`.
pub fn text_fields<E: From<PgError>>(
    line: &[u8],
    scratch: &mut Vec<u8>,
    mut on_field: impl FnMut(Option<&[u8]>) -> Result<(), E>,
) -> Result<(), E> {
    let line = line.strip_suffix(b"\n").unwrap_or(line);
    for field in line.split(|b| *b == b'\t') {
        if field == b"\\N" {
            on_field(None)?;
            continue;
        }
        if memchr::memchr(b'\\', field).is_none() {
            on_field(Some(field))?;
            continue;
        }
        scratch.clear();
        let mut bytes = field.iter();
        while let Some(&b) = bytes.next() {
            scratch.push(match b {
                b'\\' => match bytes.next() {
                    Some(b'\\') => b'\\',
                    Some(b'b') => 8,
                    Some(b'f') => 12,
                    Some(b'n') => b'\n',
                    Some(b'r') => b'\r',
                    Some(b't') => b'\t',
                    Some(b'v') => 11,
                    other => {
                        return Err(PgError::Protocol(format!(
                            "escape {other:?} in text COPY data"
                        ))
                        .into());
                    }
                },
                b => b,
            });
        }
        on_field(Some(scratch))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    type Rows = Vec<Vec<Option<Vec<u8>>>>;

    fn encode(rows: &Rows) -> Vec<u8> {
        let mut out = SIGNATURE.to_vec();
        out.extend([0; 8]);
        for row in rows {
            out.extend((row.len() as i16).to_be_bytes());
            for field in row {
                match field {
                    None => out.extend((-1i32).to_be_bytes()),
                    Some(f) => {
                        out.extend((f.len() as i32).to_be_bytes());
                        out.extend(f);
                    }
                }
            }
        }
        out.extend((-1i16).to_be_bytes());
        out
    }

    fn decode(bytes: &[u8], piece: usize) -> Result<Rows, PgError> {
        let (mut rows, mut out) = (BinaryRows::default(), vec![]);
        for chunk in bytes.chunks(piece) {
            rows.feed::<PgError>(chunk, |fields| {
                out.push((0..fields.len()).map(|i| fields.get(i).map(<[u8]>::to_vec)).collect());
                Ok(())
            })?;
        }
        rows.finish()?;
        Ok(out)
    }

    proptest! {
        #[test]
        fn binary_rows_do_not_depend_on_the_chunks(
            rows in prop::collection::vec(
                prop::collection::vec(prop::option::of(prop::collection::vec(any::<u8>(), 0..20)), 0..5),
                0..20,
            ),
            piece in 1usize..200,
        ) {
            prop_assert_eq!(decode(&encode(&rows), piece).unwrap(), rows);
        }

        #[test]
        fn binary_rows_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = decode(&bytes, 7);
            let _ = decode(&[&encode(&vec![])[..19], &bytes].concat(), 50);
        }
    }

    #[test]
    fn truncated_copies_are_errors() {
        let bytes = encode(&vec![vec![Some(b"abc".to_vec())]]);
        for cut in 0..bytes.len() {
            assert!(decode(&bytes[..cut], 1000).is_err(), "{cut}");
        }
    }

    #[test]
    fn text_rows() {
        let mut out = vec![];
        let line = b"a\\tb\t\\N\t\t\\\\N\\n\n";
        text_fields::<PgError>(line, &mut vec![], |f| {
            out.push(f.map(<[u8]>::to_vec));
            Ok(())
        })
        .unwrap();
        let expected: Vec<Option<&[u8]>> = vec![Some(b"a\tb"), None, Some(b""), Some(b"\\N\n")];
        assert_eq!(out.iter().map(Option::as_deref).collect::<Vec<_>>(), expected);
        assert!(text_fields::<PgError>(b"\\q", &mut vec![], |_| Ok(())).is_err());
    }
}
