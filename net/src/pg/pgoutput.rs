//! Decoder of the `pgoutput` plugin's protocol version 1 (spec: replication §3.3). Everything
//! borrows from the message.

use super::frame::{Reader, Truncated};

/// Columns of a relation or tuple that are accepted (Postgres stops at 1600).
const MAX_COLUMNS: i16 = 4096;

/// Relations of one TRUNCATE that are accepted.
const MAX_TRUNCATED: i32 = 1 << 20;

/// Why a message could not be decoded.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PgOutputError {
    /// It ends too early.
    #[error("pgoutput message {tag:?}: {cause}")]
    Truncated {
        /// Type byte.
        tag: char,
        /// The field.
        cause: Truncated,
    },
    /// It goes on after its end.
    #[error("pgoutput message {tag:?} has {left} bytes too many")]
    TooLong {
        /// Type byte.
        tag: char,
        /// How many.
        left: usize,
    },
    /// A field has an impossible value.
    #[error("pgoutput message {tag:?}: {what} {value}")]
    Invalid {
        /// Type byte.
        tag: char,
        /// Which field.
        what: &'static str,
        /// Its value.
        value: i64,
    },
    /// A name is not UTF-8.
    #[error("pgoutput message {tag:?}: {what} is not UTF-8")]
    NotUtf8 {
        /// Type byte.
        tag: char,
        /// Which field.
        what: &'static str,
    },
    /// The message has no bytes at all.
    #[error("an empty pgoutput message")]
    Empty,
}

/// A message.
#[derive(Debug, Clone, PartialEq)]
pub enum PgOutput<'a> {
    /// A transaction begins.
    Begin {
        /// LSN of its commit record.
        final_lsn: u64,
        /// Microseconds since 2000-01-01.
        commit_time_us: i64,
        /// Transaction id.
        xid: u32,
    },
    /// It ends.
    Commit {
        /// LSN of the commit record.
        commit_lsn: u64,
        /// LSN behind it.
        end_lsn: u64,
        /// Microseconds since 2000-01-01.
        commit_time_us: i64,
    },
    /// Where the transaction came from.
    Origin {
        /// Its LSN there.
        commit_lsn: u64,
        /// Name of the origin.
        name: &'a str,
    },
    /// A relation, before its first change and whenever it changed.
    Relation(RelationBody<'a>),
    /// A type that is not built in.
    Type {
        /// OID.
        oid: u32,
        /// Schema.
        namespace: &'a str,
        /// Name.
        name: &'a str,
    },
    /// A new row.
    Insert {
        /// Relation OID.
        relation: u32,
        /// The row.
        new: TupleData<'a>,
    },
    /// A changed row.
    Update {
        /// Relation OID.
        relation: u32,
        /// The old key or the old row, if sent.
        old: Option<OldTuple<'a>>,
        /// The new row.
        new: TupleData<'a>,
    },
    /// A deleted row.
    Delete {
        /// Relation OID.
        relation: u32,
        /// The old key or the old row.
        old: OldTuple<'a>,
    },
    /// Tables emptied together.
    Truncate {
        /// CASCADE.
        cascade: bool,
        /// RESTART IDENTITY.
        restart_identity: bool,
        /// Relation OIDs.
        relations: Vec<u32>,
    },
    /// `pg_logical_emit_message`.
    Message {
        /// Part of the transaction.
        transactional: bool,
        /// LSN of the message.
        lsn: u64,
        /// Prefix.
        prefix: &'a str,
        /// Content.
        content: &'a [u8],
    },
    /// A type of message that protocol version 1 does not have.
    Unknown(u8),
}

/// A relation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RelationBody<'a> {
    /// OID.
    pub oid: u32,
    /// Schema; Postgres sends it empty for `pg_catalog`.
    pub namespace: &'a str,
    /// Name.
    pub name: &'a str,
    /// Replica identity: `d`, `n`, `f` or `i`.
    pub identity: u8,
    /// Columns in attribute order.
    pub columns: Vec<RelationColumnBody<'a>>,
}

/// A column of a relation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RelationColumnBody<'a> {
    /// Part of the replica identity.
    pub is_key: bool,
    /// Name.
    pub name: &'a str,
    /// Type.
    pub type_oid: u32,
    /// Type modifier.
    pub type_modifier: i32,
}

/// The old row of an update or delete.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum OldTuple<'a> {
    /// Only its key; other columns are NULL.
    Key(TupleData<'a>),
    /// All of it (identity FULL).
    Row(TupleData<'a>),
}

impl<'a> OldTuple<'a> {
    /// The tuple.
    pub fn tuple(&self) -> TupleData<'a> {
        match self {
            OldTuple::Key(t) | OldTuple::Row(t) => *t,
        }
    }
}

/// A tuple whose structure has been checked.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TupleData<'a> {
    columns: usize,
    bytes: &'a [u8],
}

/// One column of a tuple.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TupleColumn<'a> {
    /// NULL.
    Null,
    /// Stored out of line and not changed: not sent.
    Unchanged,
    /// In text form.
    Text(&'a [u8]),
    /// In binary form (never, unless asked for).
    Binary(&'a [u8]),
}

impl<'a> TupleData<'a> {
    /// Number of columns.
    pub fn len(&self) -> usize {
        self.columns
    }

    /// No columns.
    pub fn is_empty(&self) -> bool {
        self.columns == 0
    }

    /// The columns in attribute order.
    pub fn columns(&self) -> impl Iterator<Item = TupleColumn<'a>> + use<'a> {
        let mut reader = Reader::new(self.bytes);
        (0..self.columns).map_while(move |_| column(&mut reader, '?').ok())
    }
}

fn column<'a>(reader: &mut Reader<'a>, tag: char) -> Result<TupleColumn<'a>, PgOutputError> {
    let cut = |cause| PgOutputError::Truncated { tag, cause };
    let kind = reader.u8("column kind").map_err(cut)?;
    let mut value = || {
        let length = reader.i32("value length").map_err(cut)?;
        let length = usize::try_from(length).map_err(|_| PgOutputError::Invalid {
            tag,
            what: "value length",
            value: length.into(),
        })?;
        reader.bytes(length, "value").map_err(cut)
    };
    match kind {
        b'n' => Ok(TupleColumn::Null),
        b'u' => Ok(TupleColumn::Unchanged),
        b't' => Ok(TupleColumn::Text(value()?)),
        b'b' => Ok(TupleColumn::Binary(value()?)),
        other => Err(PgOutputError::Invalid { tag, what: "kind of column", value: other.into() }),
    }
}

/// Reads fields of one message, and puts its type into errors.
struct Body<'a> {
    tag: char,
    reader: Reader<'a>,
}

type Read<'a, T> = fn(&mut Reader<'a>, &'static str) -> Result<T, Truncated>;

impl<'a> Body<'a> {
    fn get<T>(&mut self, read: Read<'a, T>, what: &'static str) -> Result<T, PgOutputError> {
        let tag = self.tag;
        read(&mut self.reader, what).map_err(|cause| PgOutputError::Truncated { tag, cause })
    }

    fn text(&mut self, what: &'static str) -> Result<&'a str, PgOutputError> {
        let tag = self.tag;
        std::str::from_utf8(self.get(Reader::cstr, what)?)
            .map_err(|_| PgOutputError::NotUtf8 { tag, what })
    }

    fn count(&mut self, what: &'static str) -> Result<usize, PgOutputError> {
        let count = self.get(Reader::i16, what)?;
        match usize::try_from(count) {
            Ok(n) if count <= MAX_COLUMNS => Ok(n),
            _ => Err(PgOutputError::Invalid { tag: self.tag, what, value: count.into() }),
        }
    }

    fn tuple(&mut self) -> Result<TupleData<'a>, PgOutputError> {
        let columns = self.count("number of values")?;
        let bytes = self.reader.rest;
        for _ in 0..columns {
            column(&mut self.reader, self.tag)?;
        }
        let used = bytes.len() - self.reader.rest.len();
        Ok(TupleData { columns, bytes: &bytes[..used] })
    }

    fn new_tuple(&mut self) -> Result<TupleData<'a>, PgOutputError> {
        match self.get(Reader::u8, "kind of tuple")? {
            b'N' => self.tuple(),
            other => Err(self.invalid("kind of tuple", other)),
        }
    }

    fn invalid(&self, what: &'static str, value: u8) -> PgOutputError {
        PgOutputError::Invalid { tag: self.tag, what, value: value.into() }
    }
}

/// Decodes a message.
///
/// # Errors
/// [`PgOutputError`] naming the message's type and the field.
pub fn decode(bytes: &[u8]) -> Result<PgOutput<'_>, PgOutputError> {
    let (&tag, rest) = bytes.split_first().ok_or(PgOutputError::Empty)?;
    let mut body = Body { tag: char::from(tag), reader: Reader::new(rest) };
    let message = match tag {
        b'B' => PgOutput::Begin {
            final_lsn: body.get(Reader::u64, "final LSN")?,
            commit_time_us: body.get(Reader::i64, "commit time")?,
            xid: body.get(Reader::u32, "transaction id")?,
        },
        b'C' => {
            body.get(Reader::u8, "flags")?;
            PgOutput::Commit {
                commit_lsn: body.get(Reader::u64, "commit LSN")?,
                end_lsn: body.get(Reader::u64, "end LSN")?,
                commit_time_us: body.get(Reader::i64, "commit time")?,
            }
        }
        b'O' => PgOutput::Origin {
            commit_lsn: body.get(Reader::u64, "origin LSN")?,
            name: body.text("origin name")?,
        },
        b'R' => PgOutput::Relation(relation(&mut body)?),
        b'Y' => PgOutput::Type {
            oid: body.get(Reader::u32, "type OID")?,
            namespace: body.text("type schema")?,
            name: body.text("type name")?,
        },
        b'I' => PgOutput::Insert {
            relation: body.get(Reader::u32, "relation OID")?,
            new: body.new_tuple()?,
        },
        b'U' => update(&mut body)?,
        b'D' => {
            let relation = body.get(Reader::u32, "relation OID")?;
            let old = match body.get(Reader::u8, "kind of tuple")? {
                b'K' => OldTuple::Key(body.tuple()?),
                b'O' => OldTuple::Row(body.tuple()?),
                other => return Err(body.invalid("kind of tuple", other)),
            };
            PgOutput::Delete { relation, old }
        }
        b'T' => truncate(&mut body)?,
        b'M' => message(&mut body)?,
        other => return Ok(PgOutput::Unknown(other)),
    };
    match body.reader.rest.len() {
        0 => Ok(message),
        left => Err(PgOutputError::TooLong { tag: char::from(tag), left }),
    }
}

fn relation<'a>(body: &mut Body<'a>) -> Result<RelationBody<'a>, PgOutputError> {
    let oid = body.get(Reader::u32, "relation OID")?;
    let namespace = body.text("schema")?;
    let name = body.text("table name")?;
    let identity = body.get(Reader::u8, "replica identity")?;
    if !matches!(identity, b'd' | b'n' | b'f' | b'i') {
        return Err(body.invalid("replica identity", identity));
    }
    let count = body.count("number of columns")?;
    let mut columns = Vec::with_capacity(count);
    for _ in 0..count {
        columns.push(RelationColumnBody {
            is_key: body.get(Reader::u8, "column flags")? & 1 == 1,
            name: body.text("column name")?,
            type_oid: body.get(Reader::u32, "column type")?,
            type_modifier: body.get(Reader::i32, "type modifier")?,
        });
    }
    Ok(RelationBody { oid, namespace, name, identity, columns })
}

fn update<'a>(body: &mut Body<'a>) -> Result<PgOutput<'a>, PgOutputError> {
    let relation = body.get(Reader::u32, "relation OID")?;
    let (old, new) = match body.get(Reader::u8, "kind of tuple")? {
        b'N' => (None, body.tuple()?),
        b'K' => (Some(OldTuple::Key(body.tuple()?)), body.new_tuple()?),
        b'O' => (Some(OldTuple::Row(body.tuple()?)), body.new_tuple()?),
        other => return Err(body.invalid("kind of tuple", other)),
    };
    Ok(PgOutput::Update { relation, old, new })
}

fn truncate<'a>(body: &mut Body<'a>) -> Result<PgOutput<'a>, PgOutputError> {
    let count = body.get(Reader::i32, "number of relations")?;
    if !(0..=MAX_TRUNCATED).contains(&count) {
        let what = "number of relations";
        return Err(PgOutputError::Invalid { tag: body.tag, what, value: count.into() });
    }
    let flags = body.get(Reader::u8, "flags")?;
    let mut relations = vec![];
    for _ in 0..count {
        relations.push(body.get(Reader::u32, "relation OID")?);
    }
    Ok(PgOutput::Truncate { cascade: flags & 1 != 0, restart_identity: flags & 2 != 0, relations })
}

fn message<'a>(body: &mut Body<'a>) -> Result<PgOutput<'a>, PgOutputError> {
    let transactional = body.get(Reader::u8, "flags")? & 1 == 1;
    let lsn = body.get(Reader::u64, "message LSN")?;
    let prefix = body.text("prefix")?;
    let length = body.get(Reader::u32, "length")?;
    let tag = body.tag;
    let content = body
        .reader
        .bytes(length as usize, "content")
        .map_err(|cause| PgOutputError::Truncated { tag, cause })?;
    Ok(PgOutput::Message { transactional, lsn, prefix, content })
}
