//! From patches to frames (spec: sync-protocol §4, view-syncer-cvr §4).
//!
//! [`WirePatch`]es are made when an update is computed, while the rows' tables are at hand, so that
//! nothing can fail once the update is durable. [`Poke::frames`] then encodes a poke once per
//! distinct set of patches, not once per client or group: clients at the same base share every
//! frame, and clients at different bases that miss the same patches share all parts. What groups
//! share is kept in [`SharedFrames`] for a while.

use std::hash::{Hash, Hasher};
use std::sync::Arc;

use smallvec::SmallVec;

use super::ConnId;
use super::shared::SharedFrames;
use crate::cvr::internal::ShardTables;
use crate::cvr::{Patch, QueryHash, RowIdentity, VersionedPatch};
use crate::json::{RawJson, row as row_json, write};
use crate::protocol::error::MutationId;
use crate::protocol::poke::{self, Chunks, PokePart, QueryPatch};
use crate::row::Row;
use crate::schema::Schema;
use crate::value::Value;
use crate::version::CvrVersion;

/// One WebSocket message, shared by all connections that get it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// A binary message; otherwise text.
    pub binary: bool,
    /// The payload.
    pub payload: Arc<[u8]>,
}

impl Frame {
    /// A text message.
    pub fn text(payload: impl Into<Arc<[u8]>>) -> Frame {
        Frame { binary: false, payload: payload.into() }
    }
}

/// A patch as clients get it.
#[derive(Debug, Clone)]
pub(super) enum WirePatch {
    Desired(Arc<str>, QueryPatch, QueryHash),
    Got(QueryPatch, QueryHash),
    /// The row's JSON is already made.
    RowPut(Arc<str>, Arc<Row>),
    RowDel(Arc<RowIdentity>),
    LastMutationId(Arc<str>, i64),
    MutationPut(MutationId, RawJson),
    MutationDel(MutationId),
}

/// A row that cannot be delivered.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum EncodeError {
    #[error(transparent)]
    Row(#[from] row_json::RowJsonError),
    #[error("table \"{0}\" does not exist in the replica")]
    NoTable(String),
    #[error("row {row} of \"{table}\" is malformed: {why}")]
    Malformed { table: String, row: String, why: &'static str },
}

/// Makes wire patches; knows the tables of last mutation ids and mutation results.
pub(super) struct Encoder<'a> {
    pub(super) tables: &'a ShardTables,
    pub(super) group: &'a str,
    pub(super) schema: &'a Schema,
}

impl Encoder<'_> {
    /// The wire form of a patch; `None` for what is not sent.
    ///
    /// # Errors
    /// The row cannot be delivered.
    pub(super) fn encode(&self, patch: &Patch) -> Result<Option<WirePatch>, EncodeError> {
        Ok(Some(match patch {
            Patch::DesiredPut(client, query) => {
                WirePatch::Desired(client.as_str().into(), QueryPatch::Put, query.clone())
            }
            Patch::DesiredDel(client, query) => {
                WirePatch::Desired(client.as_str().into(), QueryPatch::Del, query.clone())
            }
            Patch::GotPut(query) => WirePatch::Got(QueryPatch::Put, query.clone()),
            Patch::GotDel(query) => WirePatch::Got(QueryPatch::Del, query.clone()),
            Patch::RowPut(id, row) => return self.encode_put(id, row),
            Patch::RowDel(id) if *id.table() == self.tables.clients => return Ok(None),
            Patch::RowDel(id) if *id.table() == self.tables.mutations => {
                WirePatch::MutationDel(mutation_id(id, |c| id.key_value(c))?)
            }
            Patch::RowDel(id) => WirePatch::RowDel(id.clone()),
        }))
    }

    fn encode_put(
        &self,
        id: &Arc<RowIdentity>,
        row: &Arc<Row>,
    ) -> Result<Option<WirePatch>, EncodeError> {
        let name = id.table();
        let table = self
            .schema
            .table(name)
            .ok_or_else(|| EncodeError::NoTable(name.as_ref().to_owned()))?;
        let value = |column: &str| table.column(column).and_then(|c| row.values.get(c));
        if *name == self.tables.clients {
            if string(value("clientGroupID")) != Some(self.group) {
                return Ok(None);
            }
            let client = string(value("clientID")).ok_or_else(|| malformed(id, "no clientID"))?;
            let lmid = integer(value("lastMutationID"))
                .ok_or_else(|| malformed(id, "lastMutationID is no safe integer"))?;
            return Ok(Some(WirePatch::LastMutationId(client.into(), lmid)));
        }
        if *name == self.tables.mutations {
            let result = match value("result") {
                Some(Value::Json(text) | Value::String(text)) => RawJson::parse(text)
                    .map_err(|_| malformed(id, "the mutation's result is no JSON"))?,
                _ => return Err(malformed(id, "the mutation has no result")),
            };
            return Ok(Some(WirePatch::MutationPut(mutation_id(id, value)?, result)));
        }
        row_json::wire_json(table, row)?;
        Ok(Some(WirePatch::RowPut(name.clone(), row.clone())))
    }
}

fn malformed(id: &RowIdentity, why: &'static str) -> EncodeError {
    EncodeError::Malformed { table: id.table().to_string(), row: id.to_string(), why }
}

fn mutation_id<'a>(
    id: &RowIdentity,
    value: impl Fn(&str) -> Option<&'a Value>,
) -> Result<MutationId, EncodeError> {
    let client_id = string(value("clientID")).ok_or_else(|| malformed(id, "no clientID"))?;
    let number = integer(value("mutationID")).filter(|n| *n >= 0);
    let number = number.ok_or_else(|| malformed(id, "mutationID is no safe integer"))?;
    Ok(MutationId { id: number, client_id: client_id.to_owned() })
}

fn string(value: Option<&Value>) -> Option<&str> {
    match value {
        Some(Value::String(s)) => Some(s),
        _ => None,
    }
}

fn integer(value: Option<&Value>) -> Option<i64> {
    match value {
        Some(Value::Number(n)) if n.fract() == 0.0 && n.abs() <= Value::MAX_SAFE_INTEGER as f64 => {
            Some(*n as i64)
        }
        _ => None,
    }
}

/// The patches of one poke, in order.
#[derive(Debug, Default)]
pub(super) struct Poke {
    patches: Vec<(CvrVersion, WirePatch)>,
}

impl Poke {
    /// Encodes versioned patches. Those of undeliverable rows are an error.
    pub(super) fn extend(
        &mut self,
        encoder: &Encoder<'_>,
        patches: &[VersionedPatch],
    ) -> Result<(), EncodeError> {
        self.patches.reserve(patches.len());
        for VersionedPatch { patch, to_version } in patches {
            if let Some(wire) = encoder.encode(patch)? {
                self.patches.push((to_version.clone(), wire));
            }
        }
        Ok(())
    }

    /// Number of patches.
    pub(super) fn len(&self) -> usize {
        self.patches.len()
    }

    /// Starts to hand out the frames of this poke, which ends at `last`.
    pub(super) fn frames(&self, last: &CvrVersion) -> PokeFrames<'_> {
        PokeFrames { poke: self, cookie: last.cookie(), last: last.clone(), made: SmallVec::new() }
    }
}

/// Encoded forms of a poke.
pub(super) struct PokeFrames<'a> {
    poke: &'a Poke,
    cookie: String,
    last: CvrVersion,
    /// Made for clients before.
    made: SmallVec<[Made; 1]>,
}

/// Frames for clients that are alike.
struct Made {
    /// Which patches apply.
    applies: Vec<bool>,
    binary: bool,
    parts: Arc<[Frame]>,
    /// Whole pokes.
    pokes: SmallVec<[Whole; 1]>,
}

/// A poke from a base.
type Whole = (Option<CvrVersion>, Arc<[Frame]>);

impl PokeFrames<'_> {
    /// The frames for a client at `base`; `None` if it needs no poke. `forced`: it gets one even
    /// if nothing applies and it is at the poke's version already.
    pub(super) fn of(
        &mut self,
        base: Option<&CvrVersion>,
        binary: bool,
        forced: bool,
        shared: &mut SharedFrames,
    ) -> Option<Arc<[Frame]>> {
        // A patch above the poke's version belongs to an update that turned out to change nothing.
        let patches = &self.poke.patches;
        let applies: Vec<bool> = patches
            .iter()
            .map(|(to, _)| base.is_none_or(|base| to > base) && *to <= self.last)
            .collect();
        let at_head = base == Some(&self.last);
        debug_assert!(!at_head || !applies.contains(&true), "{base:?} {}", self.cookie);
        if at_head && !forced {
            return None;
        }
        let known = self.made.iter().position(|m| m.binary == binary && m.applies == applies);
        let at = known.unwrap_or_else(|| {
            let applying: Vec<&WirePatch> =
                patches.iter().zip(&applies).filter(|(_, a)| **a).map(|((_, p), _)| p).collect();
            let encode = || encode(&self.cookie, &applying, binary).into();
            let parts = shared.parts(&self.cookie, &applying, binary, encode);
            self.made.push(Made { applies, binary, parts, pokes: SmallVec::new() });
            self.made.len() - 1
        });
        let made = &mut self.made[at];
        if let Some((_, poke)) = made.pokes.iter().find(|(of, _)| of.as_ref() == base) {
            return Some(poke.clone());
        }
        let frames = shared.poke(&self.cookie, base, &made.parts, || {
            let base_cookie = base.map(CvrVersion::cookie);
            let mut frames = Vec::with_capacity(made.parts.len() + 2);
            frames.push(Frame::text(poke::start(&self.cookie, base_cookie.as_deref())));
            frames.extend(made.parts.iter().cloned());
            frames.push(Frame::text(poke::end(&self.cookie, &self.cookie)));
            frames.into()
        });
        made.pokes.push((base.cloned(), frames.clone()));
        Some(frames)
    }
}

/// The parts of a poke.
fn encode(cookie: &str, patches: &[&WirePatch], binary: bool) -> Vec<Frame> {
    let mut out = PartWriter::new(cookie, binary);
    patches.iter().for_each(|patch| out.add(patch));
    out.finish()
}

/// A poke that is too large to be encoded at once: slice by slice, for all who get it.
#[derive(Debug)]
pub(super) struct SlicedPoke {
    patches: std::vec::IntoIter<(CvrVersion, WirePatch)>,
    cookie: String,
    last: CvrVersion,
    readers: Vec<Readers>,
}

/// Clients that are alike.
#[derive(Debug)]
struct Readers {
    base: Option<CvrVersion>,
    binary: bool,
    conns: Vec<ConnId>,
    parts: PartWriter,
}

impl SlicedPoke {
    /// The poke to `last`, for nobody yet.
    pub(super) fn new(poke: Poke, last: &CvrVersion) -> SlicedPoke {
        let patches = poke.patches.into_iter();
        SlicedPoke { patches, cookie: last.cookie(), last: last.clone(), readers: Vec::new() }
    }

    /// Adds a client; its first frame.
    pub(super) fn start(&mut self, conn: ConnId, base: Option<&CvrVersion>, binary: bool) -> Frame {
        match self.readers.iter_mut().find(|r| r.base.as_ref() == base && r.binary == binary) {
            Some(readers) => readers.conns.push(conn),
            None => self.readers.push(Readers {
                base: base.cloned(),
                binary,
                conns: vec![conn],
                parts: PartWriter::new(&self.cookie, binary),
            }),
        }
        Frame::text(poke::start(&self.cookie, base.map(CvrVersion::cookie).as_deref()))
    }

    /// Encodes `count` patches more; what is ready goes to `send`. False at the end of the poke.
    pub(super) fn step(
        &mut self,
        count: usize,
        mut send: impl FnMut(&[ConnId], Arc<[Frame]>),
    ) -> bool {
        for (to, patch) in self.patches.by_ref().take(count) {
            // As in [`PokeFrames::of`].
            let wanted = |r: &&mut Readers| r.base.as_ref().is_none_or(|base| to > *base);
            if to <= self.last {
                self.readers.iter_mut().filter(wanted).for_each(|r| r.parts.add(&patch));
            }
        }
        let more = self.patches.len() > 0;
        for readers in &mut self.readers {
            if more {
                let frames = std::mem::take(&mut readers.parts.frames);
                if !frames.is_empty() {
                    send(&readers.conns, frames.into());
                }
                continue;
            }
            let parts = std::mem::replace(&mut readers.parts, PartWriter::new("", false));
            let mut frames = parts.finish();
            frames.push(Frame::text(poke::end(&self.cookie, &self.cookie)));
            send(&readers.conns, frames.into());
        }
        more
    }
}

impl WirePatch {
    /// Equal patches have equal fingerprints.
    pub(super) fn fingerprint(&self, hasher: &mut impl Hasher) {
        std::mem::discriminant(self).hash(hasher);
        match self {
            WirePatch::Desired(client, _, query) => (client, query).hash(hasher),
            WirePatch::Got(_, query) => query.hash(hasher),
            WirePatch::RowPut(_, row) => Arc::as_ptr(row).hash(hasher),
            WirePatch::RowDel(id) => id.hash(hasher),
            WirePatch::LastMutationId(client, id) => (client, id).hash(hasher),
            WirePatch::MutationPut(id, _) | WirePatch::MutationDel(id) => {
                (&id.client_id, id.id).hash(hasher);
            }
        }
    }

    /// Whether both read the same on the wire. May say no for equal rows read twice.
    pub(super) fn is_same(&self, other: &WirePatch) -> bool {
        use WirePatch::{Desired, Got, LastMutationId, MutationDel, MutationPut, RowDel, RowPut};
        match (self, other) {
            (Desired(c, op, q), Desired(c2, op2, q2)) => c == c2 && op == op2 && q == q2,
            (Got(op, q), Got(op2, q2)) => op == op2 && q == q2,
            (RowPut(t, row), RowPut(t2, row2)) => Arc::ptr_eq(row, row2) && t == t2,
            (RowDel(id), RowDel(id2)) => id == id2,
            (LastMutationId(c, id), LastMutationId(c2, id2)) => c == c2 && id == id2,
            (MutationPut(id, r), MutationPut(id2, r2)) => id == id2 && r.as_str() == r2.as_str(),
            (MutationDel(id), MutationDel(id2)) => id == id2,
            _ => false,
        }
    }
}

#[derive(Debug)]
struct PartWriter {
    cookie: String,
    part: PokePart,
    chunks: Option<Chunks>,
    frames: Vec<Frame>,
}

impl PartWriter {
    fn new(cookie: &str, binary: bool) -> PartWriter {
        PartWriter {
            cookie: cookie.to_owned(),
            part: PokePart::new(),
            chunks: binary.then(|| Chunks::new(cookie)),
            frames: Vec::new(),
        }
    }

    fn add(&mut self, patch: &WirePatch) {
        match patch {
            WirePatch::Desired(client, op, query) => self.part.desired(client, *op, query.as_str()),
            WirePatch::Got(op, query) => self.part.got(*op, query.as_str()),
            WirePatch::RowPut(table, row) => {
                let json = row.wire_json.get();
                debug_assert!(json.is_some(), "made when the patch was");
                if let Some(json) = json {
                    self.part.put_row(table, json);
                }
            }
            WirePatch::RowDel(id) => self.part.del_row(id.table(), &key_object(id)),
            WirePatch::LastMutationId(client, id) => self.part.last_mutation_id(client, *id),
            WirePatch::MutationPut(id, result) => self.part.put_mutation(id, result),
            WirePatch::MutationDel(id) => self.part.del_mutation(id),
        }
        if self.part.is_full() {
            self.flush();
        }
    }

    fn flush(&mut self) {
        let part = std::mem::take(&mut self.part);
        if part.is_empty() {
            return;
        }
        match &mut self.chunks {
            Some(chunks) => {
                chunks.push(&part);
                self.frames.extend(chunks.take_frames().into_iter().map(binary));
            }
            None => self.frames.push(Frame::text(part.message(&self.cookie))),
        }
    }

    fn finish(mut self) -> Vec<Frame> {
        self.flush();
        if let Some(chunks) = self.chunks.take() {
            self.frames.extend(chunks.finish().into_iter().map(binary));
        }
        self.frames
    }
}

fn binary(payload: Vec<u8>) -> Frame {
    Frame { binary: true, payload: payload.into() }
}

/// The `id` of a row `del`: the identity key as an object.
fn key_object(id: &RowIdentity) -> Vec<u8> {
    let mut out = vec![b'{'];
    for (i, (column, value)) in id.key().iter().enumerate() {
        if i > 0 {
            out.push(b',');
        }
        write::string(&mut out, column);
        out.push(b':');
        if let Err(unsafe_integer) = write::value(&mut out, value) {
            // The row was delivered under this key, so a double held it: the nearest one.
            write::number(&mut out, unsafe_integer as f64);
        }
    }
    out.push(b'}');
    out
}
