//! Pokes on the wire (spec: sync-protocol §4).
//!
//! A poke is `pokeStart`, parts, `pokeEnd`. A [`PokePart`] collects patches as JSON text; up to
//! protocol 51 each part travels as a `pokePart` message, from 52 on the parts of a poke are one
//! JSON array cut into binary frames by [`Chunks`].

use super::error::MutationId;
use crate::json::{RawJson, write};

/// Patches after which a part is sent.
pub const PART_PATCHES: usize = 100;
/// Bytes of row patches after which a part is sent: no text frame grows much beyond this.
pub const PART_ROW_BYTES: usize = 1024 * 1024;
/// Length of a binary frame, its tag byte included.
pub const CHUNK_BYTES: usize = 1024 * 1024;
/// First byte of a binary frame: a chunk of a poke.
pub const CHUNK_TAG: u8 = 0;

/// `pokeStart`. `base_cookie` is exactly the cookie at which this client is.
pub fn start(poke_id: &str, base_cookie: Option<&str>) -> Vec<u8> {
    let mut out = Vec::with_capacity(96);
    out.extend_from_slice(br#"["pokeStart",{"pokeID":"#);
    write::string(&mut out, poke_id);
    out.extend_from_slice(br#","baseCookie":"#);
    match base_cookie {
        Some(cookie) => write::string(&mut out, cookie),
        None => out.extend_from_slice(b"null"),
    }
    out.extend_from_slice(b"}]");
    out
}

/// `pokeEnd`. `cookie` names a version that is durable.
pub fn end(poke_id: &str, cookie: &str) -> Vec<u8> {
    let mut out = Vec::with_capacity(96);
    out.extend_from_slice(br#"["pokeEnd",{"pokeID":"#);
    write::string(&mut out, poke_id);
    out.extend_from_slice(br#","cookie":"#);
    write::string(&mut out, cookie);
    out.extend_from_slice(b"}]");
    out
}

/// `pokeEnd` that discards the poke; the client stays at its base.
pub fn cancel(poke_id: &str) -> Vec<u8> {
    let mut out = Vec::with_capacity(96);
    out.extend_from_slice(br#"["pokeEnd",{"pokeID":"#);
    write::string(&mut out, poke_id);
    out.extend_from_slice(br#","cookie":"","cancel":true}]"#);
    out
}

/// What happens to a query in a `desiredQueriesPatches` or `gotQueriesPatch`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QueryPatch {
    /// It is desired, or got.
    Put,
    /// It no longer is.
    Del,
}

/// Patches of a part, each kind as the JSON text of its elements. The order of patches of one
/// kind is kept.
#[derive(Debug, Clone, Default)]
pub struct PokePart {
    lmids: Vec<(String, i64)>,
    desired: Vec<(String, Vec<u8>)>,
    got: Vec<u8>,
    rows: Vec<u8>,
    mutations: Vec<u8>,
    patches: usize,
}

impl PokePart {
    /// A part without patches.
    pub fn new() -> PokePart {
        PokePart::default()
    }

    /// Makes room for so many bytes of row patches, so that nothing has to be moved on the way.
    pub fn reserve_rows(&mut self, bytes: usize) {
        self.rows.reserve(bytes.min(PART_ROW_BYTES));
    }

    /// The last mutation of a client that the poke covers.
    pub fn last_mutation_id(&mut self, client_id: &str, id: i64) {
        self.patches += 1;
        match self.lmids.iter_mut().find(|(client, _)| client == client_id) {
            Some((_, known)) => *known = id,
            None => self.lmids.push((client_id.to_owned(), id)),
        }
    }

    /// A query that a client desires, or no longer does.
    pub fn desired(&mut self, client_id: &str, patch: QueryPatch, hash: &str) {
        self.patches += 1;
        let at = self.desired.iter().position(|(client, _)| client == client_id);
        let at = at.unwrap_or_else(|| {
            self.desired.push((client_id.to_owned(), Vec::new()));
            self.desired.len() - 1
        });
        query_patch(&mut self.desired[at].1, patch, hash);
    }

    /// A query whose rows the group has, or no longer has.
    pub fn got(&mut self, patch: QueryPatch, hash: &str) {
        self.patches += 1;
        query_patch(&mut self.got, patch, hash);
    }

    /// A row as it is now: the object of [`crate::json::row::wire_json`].
    pub fn put_row(&mut self, table: &str, row_json: &[u8]) {
        self.patches += 1;
        separate(&mut self.rows);
        self.rows.extend_from_slice(br#"{"op":"put","tableName":"#);
        write::string(&mut self.rows, table);
        self.rows.extend_from_slice(br#","value":"#);
        self.rows.extend_from_slice(row_json);
        self.rows.push(b'}');
    }

    /// A row that is gone: the object of [`crate::json::row::key_json`], in the columns of the
    /// client schema's key.
    pub fn del_row(&mut self, table: &str, id_json: &[u8]) {
        self.patches += 1;
        separate(&mut self.rows);
        self.rows.extend_from_slice(br#"{"op":"del","tableName":"#);
        write::string(&mut self.rows, table);
        self.rows.extend_from_slice(br#","id":"#);
        self.rows.extend_from_slice(id_json);
        self.rows.push(b'}');
    }

    /// The result of a mutation. Must be in the same poke as its last mutation id.
    pub fn put_mutation(&mut self, id: &MutationId, result: &RawJson) {
        self.patches += 1;
        separate(&mut self.mutations);
        self.mutations.extend_from_slice(br#"{"op":"put","mutation":{"id":"#);
        mutation_id(&mut self.mutations, id);
        self.mutations.extend_from_slice(br#","result":"#);
        self.mutations.extend_from_slice(result.as_str().as_bytes());
        self.mutations.extend_from_slice(b"}}");
    }

    /// A mutation result that is gone.
    pub fn del_mutation(&mut self, id: &MutationId) {
        self.patches += 1;
        separate(&mut self.mutations);
        self.mutations.extend_from_slice(br#"{"op":"del","id":"#);
        mutation_id(&mut self.mutations, id);
        self.mutations.push(b'}');
    }

    /// Number of patches of all kinds.
    pub fn len(&self) -> usize {
        self.patches
    }

    /// True without patches.
    pub fn is_empty(&self) -> bool {
        self.patches == 0
    }

    /// True when the part should be sent and a new one begun.
    pub fn is_full(&self) -> bool {
        self.patches >= PART_PATCHES || self.rows.len() >= PART_ROW_BYTES
    }

    /// Appends the part's body.
    pub fn write_body(&self, out: &mut Vec<u8>, poke_id: &str) {
        out.reserve(self.rows.len() + 256);
        out.extend_from_slice(br#"{"pokeID":"#);
        write::string(out, poke_id);
        if !self.lmids.is_empty() {
            out.extend_from_slice(br#","lastMutationIDChanges":{"#);
            for (i, (client, id)) in self.lmids.iter().enumerate() {
                if i > 0 {
                    out.push(b',');
                }
                write::string(out, client);
                out.push(b':');
                out.extend_from_slice(itoa::Buffer::new().format(*id).as_bytes());
            }
            out.push(b'}');
        }
        if !self.desired.is_empty() {
            out.extend_from_slice(br#","desiredQueriesPatches":{"#);
            for (i, (client, patches)) in self.desired.iter().enumerate() {
                if i > 0 {
                    out.push(b',');
                }
                write::string(out, client);
                out.extend_from_slice(b":[");
                out.extend_from_slice(patches);
                out.push(b']');
            }
            out.push(b'}');
        }
        let lists: [(&[u8], &Vec<u8>); 3] = [
            (br#","gotQueriesPatch":["#, &self.got),
            (br#","rowsPatch":["#, &self.rows),
            (br#","mutationsPatch":["#, &self.mutations),
        ];
        for (name, patches) in lists {
            if !patches.is_empty() {
                out.extend_from_slice(name);
                out.extend_from_slice(patches);
                out.push(b']');
            }
        }
        out.push(b'}');
    }

    /// The part as a `pokePart` message (protocol ≤ 51).
    pub fn message(&self, poke_id: &str) -> Vec<u8> {
        let mut out = Vec::with_capacity(self.rows.len() + 256);
        out.extend_from_slice(br#"["pokePart","#);
        self.write_body(&mut out, poke_id);
        out.push(b']');
        out
    }
}

fn separate(list: &mut Vec<u8>) {
    if !list.is_empty() {
        list.push(b',');
    }
}

fn query_patch(list: &mut Vec<u8>, patch: QueryPatch, hash: &str) {
    separate(list);
    list.extend_from_slice(match patch {
        QueryPatch::Put => br#"{"op":"put","hash":"#,
        QueryPatch::Del => br#"{"op":"del","hash":"#,
    });
    write::string(list, hash);
    list.push(b'}');
}

fn mutation_id(out: &mut Vec<u8>, id: &MutationId) {
    out.extend_from_slice(br#"{"clientID":"#);
    write::string(out, &id.client_id);
    out.extend_from_slice(br#","id":"#);
    out.extend_from_slice(itoa::Buffer::new().format(id.id).as_bytes());
    out.push(b'}');
}

/// Cuts the parts of one poke into binary frames (protocol ≥ 52): their payloads, each behind
/// [`CHUNK_TAG`], are the UTF-8 text of one JSON array of part bodies.
#[derive(Debug)]
pub struct Chunks {
    poke_id: String,
    text: Vec<u8>,
    frames: Vec<Vec<u8>>,
    first: bool,
}

impl Chunks {
    /// The chunks of a poke.
    pub fn new(poke_id: &str) -> Chunks {
        Chunks {
            poke_id: poke_id.to_owned(),
            text: vec![CHUNK_TAG, b'['],
            frames: Vec::new(),
            first: true,
        }
    }

    /// Adds a part.
    pub fn push(&mut self, part: &PokePart) {
        if !std::mem::take(&mut self.first) {
            self.text.push(b',');
        }
        part.write_body(&mut self.text, &self.poke_id);
        self.cut();
    }

    /// Frames that are complete so far; each is sent as one binary message.
    pub fn take_frames(&mut self) -> Vec<Vec<u8>> {
        std::mem::take(&mut self.frames)
    }

    /// The remaining frames. A poke without parts is one frame with `[]`.
    pub fn finish(mut self) -> Vec<Vec<u8>> {
        self.text.push(b']');
        self.cut();
        if self.text.len() > 1 {
            self.frames.push(self.text);
        }
        self.frames
    }

    fn cut(&mut self) {
        if self.text.len() < CHUNK_BYTES {
            return;
        }
        let mut start = 1;
        while self.text.len() - start >= CHUNK_BYTES - 1 {
            let mut end = start + CHUNK_BYTES - 1;
            // Not inside a code point (continuation bytes are 10xxxxxx).
            while self.text.get(end).is_some_and(|b| b & 0xc0 == 0x80) {
                end -= 1;
            }
            let mut frame = Vec::with_capacity(1 + end - start);
            frame.push(CHUNK_TAG);
            frame.extend_from_slice(&self.text[start..end]);
            self.frames.push(frame);
            start = end;
        }
        self.text.drain(1..start);
    }
}
