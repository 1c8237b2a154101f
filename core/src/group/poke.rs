//! From patches to frames (spec: sync-protocol §4, view-syncer-cvr §4).
//!
//! [`WirePatch`]es are made when an update is computed, while the rows' tables are at hand, so that
//! nothing can fail once the update is durable. [`Poke::frames`] then encodes a poke once per
//! distinct set of patches, not once per client or group: clients at the same base share every
//! frame, and clients at different bases that miss the same patches share all parts. What groups
//! share is kept in [`SharedFrames`] for a while. A poke that is too large for that is a
//! [`LargePoke`] per client, and so is one that begins before all of it is known ([`Growth`]).

use std::collections::VecDeque;
use std::hash::{Hash, Hasher};
use std::sync::Arc;

use smallvec::SmallVec;

use super::shared::SharedFrames;
use crate::cvr::internal::ShardTables;
use crate::cvr::{Patch, QueryHash, RowIdentity, VersionedPatch};
use crate::json::{RawJson, row as row_json, write};
use crate::protocol::error::MutationId;
use crate::protocol::poke::{self, Chunks, PokePart, QueryPatch};
use crate::row::RowRef;
use crate::schema::Schema;
use crate::value::Value;
use crate::version::CvrVersion;
use crate::waste::Waste;

/// Patches of a poke that is encoded at once, for all clients of its kind; larger ones are
/// [`LargePoke`]s. Few in tests, so that there are such.
const MAX_PATCHES_AT_ONCE: usize = if cfg!(test) { 8 } else { 2_000 };
/// And bytes of its rows.
const MAX_BYTES_AT_ONCE: usize = 2 << 20;
/// Patches of a large poke that are looked at to say how long it is for a client; of more, all count.
const MAX_COUNTED: usize = 10_000;
/// Patches of a large poke that are encoded at a time.
const MAX_STEP_PATCHES: usize = if cfg!(test) { 3 } else { 1_000 };
/// Bytes of a large poke that are made at a time; one part or row may exceed it.
const MAX_STEP_BYTES: usize = 256 << 10;
/// Of a patch without contents.
const SMALL_PATCH_BYTES: usize = 64;
/// Around a row's JSON and the name of its table.
const PUT_BYTES: usize = 40;

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
    RowPut(Arc<str>, RowRef),
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
        row: &RowRef,
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

/// Patches that were made together.
type Patches = Arc<[(CvrVersion, WirePatch)]>;

/// What a [`LargePoke`] is made of.
#[derive(Debug, Clone)]
enum Slice {
    Patches(Patches),
    Rows(Arc<EarlyRows>),
}

impl Slice {
    fn len(&self) -> usize {
        match self {
            Slice::Patches(patches) => patches.len(),
            Slice::Rows(rows) => rows.rows.len(),
        }
    }
}

/// Rows of one table that go out before the version is known that they belong to: eight bytes
/// each beside the rows, whose JSON is made.
#[derive(Debug)]
struct EarlyRows {
    table: Arc<str>,
    rows: Box<[RowRef]>,
}

/// The patches of one poke, in order; in slices, because there may be a million.
#[derive(Debug, Default)]
pub(super) struct Poke {
    slices: Vec<Patches>,
    patches: usize,
    /// Of their contents.
    bytes: usize,
}

impl Poke {
    /// Encodes versioned patches. Those of undeliverable rows are an error.
    pub(super) fn extend(
        &mut self,
        encoder: &Encoder<'_>,
        patches: &[VersionedPatch],
    ) -> Result<(), EncodeError> {
        let mut slice = Vec::with_capacity(patches.len());
        for VersionedPatch { patch, to_version } in patches {
            if let Some(wire) = encoder.encode(patch)? {
                self.bytes += wire.bytes();
                slice.push((to_version.clone(), wire));
            }
        }
        if !slice.is_empty() {
            self.patches += slice.len();
            self.slices.push(slice.into());
        }
        Ok(())
    }

    /// Too large to be encoded at once, or to wait for a socket as a whole.
    pub(super) fn is_large(&self) -> bool {
        self.patches > MAX_PATCHES_AT_ONCE || self.bytes > MAX_BYTES_AT_ONCE
    }

    /// Starts to hand out the frames of this poke, which ends at `last`.
    pub(super) fn frames(&self, last: &CvrVersion) -> PokeFrames<'_> {
        PokeFrames { poke: self, cookie: last.cookie(), last: last.clone(), made: SmallVec::new() }
    }

    /// This poke, which ends at `last`, for one client at `base`.
    pub(super) fn large(
        &self,
        base: Option<&CvrVersion>,
        last: &CvrVersion,
        binary: bool,
    ) -> LargePoke {
        let mut poke = LargePoke::open(&last.cookie(), base, binary);
        poke.grow(&self.end(last), &mut Waste::default());
        if self.patches <= MAX_COUNTED {
            let applying = self.patches().filter(|(to, _)| base.is_none_or(|base| to > base));
            poke.bytes = applying.map(|(_, patch)| patch.bytes()).sum();
        }
        poke
    }

    /// This poke as the end, at `last`, of one that is open.
    pub(super) fn end(&self, last: &CvrVersion) -> Growth {
        Growth(Grow::End(Arc::new(End {
            slices: self.slices.clone(),
            last: last.clone(),
            bytes: self.bytes,
        })))
    }

    /// It was sent, or will not be: what nobody has of it is left behind.
    pub(super) fn discard(self, waste: &mut Waste) {
        waste.pieces(self.slices, |slice| slice.len());
    }

    fn patches(&self) -> impl Iterator<Item = &(CvrVersion, WirePatch)> {
        self.slices.iter().flat_map(|slice| slice.iter())
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
    /// The frames for a client at `base`, which is not beyond the poke's version.
    pub(super) fn of(
        &mut self,
        base: Option<&CvrVersion>,
        binary: bool,
        shared: &mut SharedFrames,
    ) -> Arc<[Frame]> {
        // A patch above the poke's version belongs to an update that turned out to change nothing.
        let patches = || self.poke.patches();
        let applies: Vec<bool> = patches()
            .map(|(to, _)| base.is_none_or(|base| to > base) && *to <= self.last)
            .collect();
        let known = self.made.iter().position(|m| m.binary == binary && m.applies == applies);
        let at = known.unwrap_or_else(|| {
            let applying: Vec<&WirePatch> =
                patches().zip(&applies).filter(|(_, a)| **a).map(|((_, p), _)| p).collect();
            let encode = || encode(&self.cookie, &applying, binary).into();
            let parts = shared.parts(&self.cookie, &applying, binary, encode);
            self.made.push(Made { applies, binary, parts, pokes: SmallVec::new() });
            self.made.len() - 1
        });
        let made = &mut self.made[at];
        if let Some((_, poke)) = made.pokes.iter().find(|(of, _)| of.as_ref() == base) {
            return poke.clone();
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
        frames
    }
}

/// The parts of a poke.
fn encode(cookie: &str, patches: &[&WirePatch], binary: bool) -> Vec<Frame> {
    let mut out = PartWriter::new(cookie, binary);
    for part in patches.chunks(poke::PART_PATCHES) {
        let rows = part.iter().filter(|patch| matches!(patch, WirePatch::RowPut(..)));
        out.part.reserve_rows(rows.map(|row| row.bytes() + PUT_BYTES).sum());
        part.iter().for_each(|patch| out.add(patch));
    }
    out.finish()
}

/// What comes next of an open [`LargePoke`]; shared by all that get it.
#[derive(Debug, Clone)]
pub struct Growth(Grow);

#[derive(Debug, Clone)]
enum Grow {
    Rows(Arc<EarlyRows>),
    End(Arc<End>),
    Cancel,
}

#[derive(Debug)]
struct End {
    slices: Vec<Patches>,
    last: CvrVersion,
    bytes: usize,
}

impl Growth {
    /// Rows of a table that have their JSON.
    pub(super) fn rows(table: Arc<str>, rows: Vec<RowRef>) -> Growth {
        Growth(Grow::Rows(Arc::new(EarlyRows { table, rows: rows.into() })))
    }

    /// Takes everything back.
    pub(super) fn cancel() -> Growth {
        Growth(Grow::Cancel)
    }

    /// Nobody gets it: it is left behind.
    pub fn discard(self, waste: &mut Waste) {
        if let Grow::End(end) = self.0
            && let Some(end) = Arc::into_inner(end)
        {
            waste.pieces(end.slices, |slice| slice.len());
        }
    }

    /// As [`LargePoke::bytes`].
    pub fn bytes(&self) -> usize {
        match &self.0 {
            Grow::Rows(slice) => {
                let json = |row: &RowRef| row.wire_json.get().map_or(0, |json| json.len());
                slice.rows.iter().map(|row| slice.table.len() + json(row)).sum()
            }
            Grow::End(end) => end.bytes,
            Grow::Cancel => 0,
        }
    }
}

/// A large poke for one client: it is encoded bit by bit, as the client's socket takes it, so that
/// what waits is bounded however much there is to send and however slow the client is. All that
/// get the poke share its patches; those that everybody has got are forgotten. It may be open: what
/// comes next is not known yet.
#[derive(Debug)]
pub struct LargePoke {
    id: String,
    slices: VecDeque<Slice>,
    /// Patches of the first slice that are encoded.
    at: usize,
    base: Option<CvrVersion>,
    until: Until,
    /// `None`: the end is out.
    parts: Option<PartWriter>,
    started: bool,
    bytes: usize,
}

/// How a large poke ends.
#[derive(Debug)]
enum Until {
    /// That is not known yet.
    Open,
    /// At this version.
    Version(CvrVersion),
    Cancelled,
}

/// What of a large poke can be sent now.
#[derive(Debug)]
pub enum NextFrames {
    /// These.
    Some(Arc<[Frame]>),
    /// Nothing before it has grown.
    Waits,
    /// That was all.
    Done,
}

impl LargePoke {
    /// A poke from `base` of which nothing is known yet.
    pub(super) fn open(id: &str, base: Option<&CvrVersion>, binary: bool) -> LargePoke {
        LargePoke {
            id: id.to_owned(),
            slices: VecDeque::new(),
            at: 0,
            base: base.cloned(),
            until: Until::Open,
            parts: Some(PartWriter::new(id, binary)),
            started: false,
            bytes: 0,
        }
    }

    /// Takes in what comes next; nothing comes after the end. What is not sent any more is left
    /// behind.
    pub fn grow(&mut self, growth: &Growth, waste: &mut Waste) {
        if !self.is_open() {
            return;
        }
        self.bytes += growth.bytes();
        match &growth.0 {
            Grow::Rows(rows) => self.slices.push_back(Slice::Rows(rows.clone())),
            Grow::End(end) => {
                self.slices.extend(end.slices.iter().cloned().map(Slice::Patches));
                self.until = Until::Version(end.last.clone());
            }
            Grow::Cancel => {
                waste.pieces(std::mem::take(&mut self.slices), Slice::len);
                self.until = Until::Cancelled;
            }
        }
    }

    /// Nobody gets it: it is left behind.
    pub fn discard(self, waste: &mut Waste) {
        waste.pieces(self.slices, Slice::len);
    }

    /// It is not known yet what comes next.
    pub fn is_open(&self) -> bool {
        matches!(self.until, Until::Open)
    }

    /// About how long it is, in bytes: what it keeps in memory while it waits.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// The next frames: [`MAX_STEP_BYTES`] or [`MAX_STEP_PATCHES`], whichever comes first, so
    /// about a millisecond of work; there may be none yet.
    pub fn next_frames(&mut self) -> NextFrames {
        let mut frames = Vec::new();
        if matches!(self.until, Until::Cancelled) && self.parts.take().is_some() {
            if !self.started {
                return NextFrames::Done;
            }
            frames.push(Frame::text(poke::cancel(&self.id)));
            return NextFrames::Some(frames.into());
        }
        let Some(parts) = self.parts.as_mut() else { return NextFrames::Done };
        if self.slices.is_empty() && matches!(self.until, Until::Open) {
            return NextFrames::Waits;
        }
        if !std::mem::replace(&mut self.started, true) {
            let base = self.base.as_ref().map(CvrVersion::cookie);
            frames.push(Frame::text(poke::start(&self.id, base.as_deref())));
        }
        let mut patches = 0;
        while patches < MAX_STEP_PATCHES && parts.ready_bytes() < MAX_STEP_BYTES {
            let more = match (self.slices.front(), &self.until) {
                (Some(Slice::Rows(slice)), _) => {
                    let row = slice.rows.get(self.at);
                    row.inspect(|row| parts.put_row(&slice.table, row)).is_some()
                }
                (Some(Slice::Patches(slice)), until) => {
                    let patch = slice.get(self.at);
                    // As in [`PokeFrames::of`].
                    let applies = |to: &CvrVersion| {
                        let beyond = self.base.as_ref().is_none_or(|base| to > base);
                        beyond && matches!(until, Until::Version(last) if to <= last)
                    };
                    if let Some((to, patch)) = patch
                        && applies(to)
                    {
                        parts.add(patch);
                    }
                    patch.is_some()
                }
                (None, Until::Version(last)) => {
                    let cookie = last.cookie();
                    if let Some(parts) = self.parts.take() {
                        frames.extend(parts.finish());
                    }
                    frames.push(Frame::text(poke::end(&self.id, &cookie)));
                    return NextFrames::Some(frames.into());
                }
                (None, Until::Open | Until::Cancelled) => break,
            };
            if more {
                self.at += 1;
                patches += 1;
            } else {
                self.slices.pop_front();
                self.at = 0;
            }
        }
        frames.append(&mut parts.frames);
        NextFrames::Some(frames.into())
    }
}

impl WirePatch {
    /// About how long it is on the wire.
    fn bytes(&self) -> usize {
        match self {
            WirePatch::RowPut(table, row) => {
                table.len() + row.wire_json.get().map_or(0, |j| j.len())
            }
            WirePatch::RowDel(id) => id.text().len(),
            WirePatch::MutationPut(id, result) => id.client_id.len() + result.as_str().len(),
            WirePatch::Desired(..)
            | WirePatch::Got(..)
            | WirePatch::LastMutationId(..)
            | WirePatch::MutationDel(_) => SMALL_PATCH_BYTES,
        }
    }

    /// Equal patches have equal fingerprints.
    pub(super) fn fingerprint(&self, hasher: &mut impl Hasher) {
        std::mem::discriminant(self).hash(hasher);
        match self {
            WirePatch::Desired(client, _, query) => (client, query).hash(hasher),
            WirePatch::Got(_, query) => query.hash(hasher),
            WirePatch::RowPut(_, row) => std::ptr::from_ref(&**row).cast::<()>().hash(hasher),
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
            (RowPut(t, row), RowPut(t2, row2)) => RowRef::ptr_eq(row, row2) && t == t2,
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

    /// Length of the frames that are ready.
    fn ready_bytes(&self) -> usize {
        self.frames.iter().map(|frame| frame.payload.len()).sum()
    }

    fn add(&mut self, patch: &WirePatch) {
        match patch {
            WirePatch::Desired(client, op, query) => self.part.desired(client, *op, query.as_str()),
            WirePatch::Got(op, query) => self.part.got(*op, query.as_str()),
            WirePatch::RowPut(table, row) => return self.put_row(table, row),
            WirePatch::RowDel(id) => self.part.del_row(id.table(), &key_object(id)),
            WirePatch::LastMutationId(client, id) => self.part.last_mutation_id(client, *id),
            WirePatch::MutationPut(id, result) => self.part.put_mutation(id, result),
            WirePatch::MutationDel(id) => self.part.del_mutation(id),
        }
        if self.part.is_full() {
            self.flush();
        }
    }

    fn put_row(&mut self, table: &str, row: &RowRef) {
        let json = row.wire_json.get();
        debug_assert!(json.is_some(), "made when the patch was");
        if let Some(json) = json {
            self.part.put_row(table, json);
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
