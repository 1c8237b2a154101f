//! What a client holds: its cookie, rows and queries, as the pokes make them. Pure.
//!
//! Strict on purpose: a broken chain of cookies, a poke inside a poke or a part of another poke is
//! a violation that voids the run (spec: sync-protocol §4.4).

use std::borrow::Cow;
use std::sync::{Arc, LazyLock};

use memchr::memmem::Finder;
use rustc_hash::{FxHashMap, FxHashSet};
use serde::Deserialize;
use serde_json::value::RawValue;

/// First byte of a binary message that is a chunk of a poke.
const CHUNK_TAG: u8 = 0;

/// Longer chunks are not sent (with the tag).
const MAX_CHUNK_BYTES: usize = 1 << 20;

/// The server broke a rule of the protocol.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("protocol violation: {0}")]
pub(crate) struct Violation(pub(crate) String);

/// A message, taken in.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Taken {
    Connected,
    /// Nothing to tell: pongs, starts and parts of pokes, acknowledgements.
    Nothing,
    /// A complete poke was applied.
    Poke(PokeSummary),
    /// The server refused: kind and message.
    Error(String),
}

/// What a poke brought.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct PokeSummary {
    /// Row patches.
    pub(crate) row_ops: u64,
    /// Intended send times (µs of the epoch) of the writes that arrived as changes of rows that
    /// were there. A row that is new here may have been written long ago: it came with a new
    /// query, with the catch-up after a connect, or moved up into a window.
    pub(crate) sent_us: Vec<u64>,
    /// With this poke, the client has all that it asked for.
    pub(crate) became_complete: bool,
    /// The client's last mutation that the server has.
    pub(crate) last_mutation: Option<u64>,
}

/// (table, primary key): every table of the data set has the key `id`.
pub(crate) type RowId = (Arc<str>, Box<str>);

#[derive(Default)]
pub(crate) struct ClientModel {
    cookie: Option<String>,
    rows: FxHashMap<RowId, Box<str>>,
    /// Asked for, not got.
    awaited: FxHashSet<String>,
    got: FxHashSet<String>,
    /// No poke since the socket was opened.
    fresh_socket: bool,
    poke: Option<OpenPoke>,
    kind: ModelKind,
    /// Names of tables that rows came of.
    tables: Vec<Arc<str>>,
}

/// What distinguishes clients' models.
#[derive(Debug, Clone, Default)]
pub(crate) struct ModelKind {
    /// Its own name: mutations are counted by client.
    pub(crate) client_id: String,
    /// Rows that are new here count as writes that arrived.
    pub(crate) counts_new: bool,
    /// Contents of pokes come in binary chunks (from protocol 52 on), not in `pokePart`s.
    pub(crate) chunks: bool,
}

struct OpenPoke {
    id: String,
    rows: Vec<RowChange>,
    queries: Vec<(bool, String)>,
    empty: bool,
    last_mutation: Option<u64>,
    /// Concatenated contents of binary chunks: a JSON array of parts.
    chunks: Vec<u8>,
}

struct RowChange {
    id: RowId,
    /// Row as JSON text and its intended send time; none = deleted.
    put: Option<(Box<str>, u64)>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct PokeStart {
    #[serde(rename = "pokeID")]
    poke_id: String,
    base_cookie: Option<String>,
}

#[derive(Deserialize)]
struct PokeEnd {
    #[serde(rename = "pokeID")]
    poke_id: String,
    cookie: String,
    #[serde(default)]
    cancel: bool,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct PokePart<'a> {
    #[serde(rename = "pokeID", borrow)]
    poke_id: Cow<'a, str>,
    #[serde(borrow)]
    desired_queries_patches: Option<&'a RawValue>,
    #[serde(rename = "lastMutationIDChanges")]
    last_mutation_changes: Option<FxHashMap<String, u64>>,
    #[serde(default, borrow)]
    got_queries_patch: Vec<QueryOp<'a>>,
    #[serde(default, borrow)]
    rows_patch: Vec<RowOp<'a>>,
}

#[derive(Deserialize)]
struct QueryOp<'a> {
    #[serde(borrow)]
    op: Cow<'a, str>,
    hash: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RowOp<'a> {
    #[serde(borrow)]
    op: Cow<'a, str>,
    #[serde(borrow)]
    table_name: Cow<'a, str>,
    #[serde(borrow)]
    value: Option<&'a RawValue>,
    #[serde(borrow)]
    id: Option<&'a RawValue>,
}

/// The columns that the generator itself looks at.
#[derive(Deserialize)]
struct RowHead<'a> {
    #[serde(borrow)]
    id: Cow<'a, str>,
    #[serde(default)]
    sent_us: u64,
}

impl<'a> RowHead<'a> {
    /// Of a row's JSON text.
    fn of(text: &'a str) -> Result<RowHead<'a>, Violation> {
        RowHead::found(text).map_or_else(|| parse("row", text), Ok)
    }

    /// Without reading the whole row, if it is a flat object without escapes in its key. A quote
    /// within a string has a backslash before it, so that a quote after a comma or the brace begins
    /// a member's name, or ends a string, and is then followed by no name.
    fn found(text: &'a str) -> Option<RowHead<'a>> {
        static ID: LazyLock<Finder<'static>> = LazyLock::new(|| Finder::new(r#","id":"#));
        static SENT: LazyLock<Finder<'static>> = LazyLock::new(|| Finder::new(r#","sent_us":"#));
        if memchr::memrchr(b'{', text.as_bytes()) != Some(0) {
            return None;
        }
        // What follows the name of a member.
        let value = |name: &Finder<'static>| {
            let len = name.needle().len();
            let is_first = text.as_bytes().get(1..len) == name.needle().get(1..);
            let at = if is_first { 0 } else { name.find(text.as_bytes())? };
            text.get(at + len..)
        };
        let id = value(&ID)?.strip_prefix('"')?;
        let (id, rest) = id.split_at(memchr::memchr2(b'"', b'\\', id.as_bytes())?);
        if !rest.starts_with('"') {
            return None;
        }
        let sent_us = match value(&SENT) {
            Some(text) => text[..text.find([',', '}'])?].parse().ok()?,
            None => 0,
        };
        Some(RowHead { id: id.into(), sent_us })
    }
}

/// The one name of a table.
fn shared_name(tables: &mut Vec<Arc<str>>, name: &str) -> Arc<str> {
    if let Some(known) = tables.iter().find(|known| &***known == name) {
        return known.clone();
    }
    let new: Arc<str> = name.into();
    tables.push(new.clone());
    new
}

#[derive(Deserialize)]
struct ErrorBody {
    kind: String,
    #[serde(default)]
    message: String,
}

fn parse<'a, T: Deserialize<'a>>(what: &str, body: &'a str) -> Result<T, Violation> {
    serde_json::from_str(body).map_err(|e| Violation(format!("{what}: {e} in {}", excerpt(body))))
}

fn excerpt(text: &str) -> String {
    text.chars().take(200).collect()
}

/// `["type", body]` → type and the text of the body.
fn split(text: &str) -> Option<(&str, &str)> {
    let inner = text.trim().strip_prefix('[')?.strip_suffix(']')?;
    let (kind, rest) = inner.trim_start().strip_prefix('"')?.split_once('"')?;
    Some((kind, rest.trim_start().strip_prefix(',')?))
}

impl ClientModel {
    /// A client without rows.
    pub(crate) fn new(kind: ModelKind) -> ClientModel {
        ClientModel { kind, ..ClientModel::default() }
    }

    /// The version that the client is at.
    pub(crate) fn cookie(&self) -> Option<&str> {
        self.cookie.as_deref()
    }

    /// The client asks for one more query.
    pub(crate) fn ask(&mut self, hash: &str) {
        if !self.got.contains(hash) {
            self.awaited.insert(hash.to_owned());
        }
    }

    /// The client no longer asks for a query.
    pub(crate) fn renounce(&mut self, hash: &str) {
        self.awaited.remove(hash);
    }

    /// A new socket: an unfinished poke of the last one is void.
    pub(crate) fn socket_opened(&mut self) {
        self.poke = None;
        self.fresh_socket = true;
    }

    /// Whether all that was asked for is there.
    pub(crate) fn is_complete(&self) -> bool {
        self.awaited.is_empty() && !self.fresh_socket
    }

    /// A copy of the rows: (table, id) → row as JSON text.
    pub(crate) fn rows(&self) -> Vec<(RowId, Box<str>)> {
        self.rows.iter().map(|(id, row)| (id.clone(), row.clone())).collect()
    }

    /// Takes in one message of the server.
    pub(crate) fn take(&mut self, message: &[u8]) -> Result<Taken, Violation> {
        let text = std::str::from_utf8(message).map_err(|e| Violation(e.to_string()))?;
        let Some((kind, body)) = split(text) else {
            return Err(Violation(format!("not [type, body]: {}", excerpt(text))));
        };
        match kind {
            "pokeStart" => self.start(parse(kind, body)?).map(|()| Taken::Nothing),
            "pokePart" if self.kind.chunks => {
                Err(Violation("a pokePart for a client that was promised binary chunks".to_owned()))
            }
            "pokePart" => self.part(parse(kind, body)?).map(|()| Taken::Nothing),
            "pokeEnd" => self.end(parse(kind, body)?).map(Taken::Poke),
            "connected" => Ok(Taken::Connected),
            "pong" | "deleteClients" => Ok(Taken::Nothing),
            "error" => {
                let error: ErrorBody = parse(kind, body)?;
                Ok(Taken::Error(format!("{}: {}", error.kind, error.message)))
            }
            "transformError" => Ok(Taken::Error(excerpt(text))),
            other => Err(Violation(format!("unexpected message of type {other:?}"))),
        }
    }

    /// Takes in one binary message of the server: a chunk of a poke (spec: sync-protocol §4.6).
    pub(crate) fn take_binary(&mut self, message: &[u8]) -> Result<Taken, Violation> {
        if !self.kind.chunks {
            return Err(Violation("a binary message for a client of protocol 51".to_owned()));
        }
        let Some((&CHUNK_TAG, payload)) = message.split_first() else {
            let tag = message.first();
            return Err(Violation(format!("a binary message that begins with {tag:?}")));
        };
        if message.len() > MAX_CHUNK_BYTES {
            return Err(Violation(format!("a chunk of {} bytes", message.len())));
        }
        let Some(poke) = &mut self.poke else {
            return Err(Violation("a chunk outside of a poke".to_owned()));
        };
        poke.chunks.extend_from_slice(payload);
        Ok(Taken::Nothing)
    }

    /// Applies the parts that came as chunks.
    fn unpack(&mut self) -> Result<(), Violation> {
        let Some(poke) = &mut self.poke else { return Ok(()) };
        let bytes = std::mem::take(&mut poke.chunks);
        if bytes.is_empty() {
            return Ok(());
        }
        let text = std::str::from_utf8(&bytes).map_err(|e| Violation(e.to_string()))?;
        let parts: Vec<PokePart<'_>> = parse("chunks", text)?;
        parts.into_iter().try_for_each(|part| self.part(part))
    }

    fn start(&mut self, start: PokeStart) -> Result<(), Violation> {
        if let Some(open) = &self.poke {
            let (open, new) = (&open.id, &start.poke_id);
            return Err(Violation(format!("poke {new} starts inside of poke {open}")));
        }
        if start.base_cookie != self.cookie {
            return Err(Violation(format!(
                "poke {} is based on {:?}, the client is at {:?}",
                start.poke_id, start.base_cookie, self.cookie
            )));
        }
        self.poke = Some(OpenPoke {
            id: start.poke_id,
            rows: Vec::new(),
            queries: Vec::new(),
            empty: true,
            last_mutation: None,
            chunks: Vec::new(),
        });
        Ok(())
    }

    fn part(&mut self, part: PokePart<'_>) -> Result<(), Violation> {
        let Some(poke) = self.poke.as_mut().filter(|p| p.id == part.poke_id) else {
            return Err(Violation(format!("a part of poke {}, which is not open", part.poke_id)));
        };
        poke.empty &= part.desired_queries_patches.is_none()
            && part.last_mutation_changes.is_none()
            && part.got_queries_patch.is_empty()
            && part.rows_patch.is_empty();
        let mine =
            part.last_mutation_changes.and_then(|all| all.get(&self.kind.client_id).copied());
        poke.last_mutation = mine.or(poke.last_mutation);
        for query in part.got_queries_patch {
            match &*query.op {
                "put" => poke.queries.push((true, query.hash)),
                "del" => poke.queries.push((false, query.hash)),
                other => return Err(Violation(format!("query patch {other:?}"))),
            }
        }
        poke.rows.reserve(part.rows_patch.len());
        for op in part.rows_patch {
            let table = shared_name(&mut self.tables, &op.table_name);
            let change = match (&*op.op, op.value, op.id) {
                ("put", Some(value), _) => {
                    let head = RowHead::of(value.get())?;
                    let id = (table, head.id.into());
                    RowChange { id, put: Some((value.get().into(), head.sent_us)) }
                }
                ("del", _, Some(id)) => {
                    let head = RowHead::of(id.get())?;
                    RowChange { id: (table, head.id.into()), put: None }
                }
                (other, ..) => return Err(Violation(format!("row patch {other:?}"))),
            };
            poke.rows.push(change);
        }
        Ok(())
    }

    fn end(&mut self, end: PokeEnd) -> Result<PokeSummary, Violation> {
        if !end.cancel {
            self.unpack()?;
        }
        let Some(poke) = self.poke.take().filter(|p| p.id == end.poke_id) else {
            return Err(Violation(format!("the end of poke {}, which is not open", end.poke_id)));
        };
        if end.cancel {
            return Ok(PokeSummary::default());
        }
        let at = self.cookie.as_deref().unwrap_or("");
        if end.cookie.as_str() < at {
            return Err(Violation(format!(
                "poke {} goes back from {at} to {}",
                poke.id, end.cookie
            )));
        }
        if end.cookie == at && !poke.empty {
            return Err(Violation(format!("poke {} changes things but not the cookie", poke.id)));
        }
        let was_complete = self.is_complete();
        let mut summary = PokeSummary {
            row_ops: poke.rows.len() as u64,
            last_mutation: poke.last_mutation,
            ..Default::default()
        };
        for change in poke.rows {
            match change.put {
                Some((row, sent_us)) => {
                    let held = self.rows.insert(change.id, row).is_some();
                    if (held || self.kind.counts_new) && was_complete && sent_us > 0 {
                        summary.sent_us.push(sent_us);
                    }
                }
                None => {
                    self.rows.remove(&change.id);
                }
            }
        }
        for (put, hash) in poke.queries {
            if put {
                self.awaited.remove(&hash);
                self.got.insert(hash);
            } else {
                self.got.remove(&hash);
            }
        }
        self.cookie = Some(end.cookie);
        self.fresh_socket = false;
        summary.became_complete = !was_complete && self.is_complete();
        Ok(summary)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model() -> ClientModel {
        let mut model = ClientModel::default();
        model.socket_opened();
        model.ask("q1");
        model
    }

    fn play(model: &mut ClientModel, messages: &[&str]) -> Result<Vec<Taken>, Violation> {
        messages.iter().map(|m| model.take(m.as_bytes())).collect()
    }

    const HYDRATE: [&str; 4] = [
        r#"["connected",{"wsid":"a","timestamp":1}]"#,
        r#"["pokeStart",{"pokeID":"05","baseCookie":null}]"#,
        r#"["pokePart",{"pokeID":"05","gotQueriesPatch":[{"op":"put","hash":"q1"}],"rowsPatch":[{"op":"put","tableName":"t","value":{"id":"a","x":"é","sent_us":3}}]}]"#,
        r#"["pokeEnd",{"pokeID":"05","cookie":"05"}]"#,
    ];

    #[test]
    fn a_rows_head_is_found_as_it_is_parsed() {
        for (row, is_found) in [
            (r#"{"id":"a","sent_us":7}"#, true),
            (r#"{"x":"é","id":"a","n":null,"sent_us":12,"z":true}"#, true),
            (r#"{"x":",\"id\":\"no\"","id":"a"}"#, true),
            (r#"{"x":"id,","id":"a","y":",","sent_us":3}"#, true),
            (r#"{"sent_us":5,"id":"a"}"#, true),
            (r#"{"id":"a\"b","sent_us":7}"#, false),
            (r#"{"id": "a", "sent_us": 7}"#, false),
            (r#"{"x":{"id":"no"},"id":"a"}"#, false),
        ] {
            let parsed: RowHead<'_> = parse("row", row).unwrap();
            let found = RowHead::found(row);
            assert_eq!(found.is_some(), is_found, "{row}");
            let found = RowHead::of(row).unwrap();
            assert_eq!((&*found.id, found.sent_us), (&*parsed.id, parsed.sent_us), "{row}");
        }
        assert!(RowHead::of(r#"{"x":1}"#).is_err());
    }

    #[test]
    fn a_hydration_completes_and_measures_no_write() {
        let mut model = model();
        assert!(!model.is_complete());
        let taken = play(&mut model, &HYDRATE).unwrap();
        let want = PokeSummary { row_ops: 1, became_complete: true, ..PokeSummary::default() };
        assert_eq!(taken[3], Taken::Poke(want));
        assert!(model.is_complete());
        assert_eq!(model.cookie(), Some("05"));
        assert_eq!(model.rows().len(), 1);
    }

    #[test]
    fn a_change_carries_its_intended_time_and_a_delete_removes() {
        let mut model = model();
        play(&mut model, &HYDRATE).unwrap();
        let taken = play(
            &mut model,
            &[
                r#"["pokeStart",{"pokeID":"06","baseCookie":"05"}]"#,
                r#"["pokePart",{"pokeID":"06","rowsPatch":[{"op":"put","tableName":"t","value":{"id":"b","sent_us":7}},{"op":"put","tableName":"t","value":{"id":"a","sent_us":9}}]}]"#,
                r#"["pokeEnd",{"pokeID":"06","cookie":"06"}]"#,
                r#"["pokeStart",{"pokeID":"07","baseCookie":"06"}]"#,
                r#"["pokePart",{"pokeID":"07","rowsPatch":[{"op":"del","tableName":"t","id":{"id":"a"}}]}]"#,
                r#"["pokeEnd",{"pokeID":"07","cookie":"07"}]"#,
            ],
        )
        .unwrap();
        let want = PokeSummary { row_ops: 2, sent_us: vec![9], ..PokeSummary::default() };
        assert_eq!(taken[2], Taken::Poke(want));
        assert_eq!(&*model.rows()[0].0.1, "b");
    }

    #[test]
    fn chunks_are_cut_anywhere_and_are_one_poke() {
        let parts = r#"[{"pokeID":"05","lastMutationIDChanges":{"c":4,"d":9}},{"pokeID":"05","gotQueriesPatch":[{"op":"put","hash":"q1"}],"rowsPatch":[{"op":"put","tableName":"t","value":{"id":"é"}}]}]"#;
        for cut in 1..parts.len() {
            let kind = ModelKind { client_id: "c".into(), chunks: true, counts_new: false };
            let mut model = ClientModel::new(kind);
            model.socket_opened();
            model.ask("q1");
            play(&mut model, &HYDRATE[..2]).unwrap();
            let (head, tail) = parts.as_bytes().split_at(cut);
            for payload in [head, tail] {
                model.take_binary(&[&[0], payload].concat()).unwrap();
            }
            let taken = play(&mut model, &HYDRATE[3..]).unwrap();
            let want = PokeSummary {
                row_ops: 1,
                became_complete: true,
                last_mutation: Some(4),
                ..PokeSummary::default()
            };
            assert_eq!(taken[0], Taken::Poke(want));
        }
    }

    #[test]
    fn chunks_and_parts_do_not_mix() {
        let mut old = model();
        play(&mut old, &HYDRATE[..2]).unwrap();
        assert!(old.take_binary(b"\0[]").is_err(), "protocol 51");
        let mut new = ClientModel::new(ModelKind { chunks: true, ..ModelKind::default() });
        new.socket_opened();
        assert!(new.take_binary(b"\0[]").is_err(), "outside of a poke");
        play(&mut new, &HYDRATE[..2]).unwrap();
        assert!(new.take(HYDRATE[2].as_bytes()).is_err(), "a part");
        assert!(new.take_binary(b"\x01[]").is_err(), "unknown tag");
        assert!(new.take_binary(&[0; MAX_CHUNK_BYTES + 1]).is_err(), "too long");
        new.take_binary(b"\0[]").unwrap();
    }

    #[test]
    fn a_cancelled_poke_leaves_no_trace() {
        let mut model = model();
        let mut messages = HYDRATE;
        messages[3] = r#"["pokeEnd",{"pokeID":"05","cookie":"","cancel":true}]"#;
        play(&mut model, &messages).unwrap();
        assert_eq!(model.cookie(), None);
        assert!(model.rows().is_empty());
        assert!(!model.is_complete());
    }

    #[test]
    fn broken_chains_are_violations() {
        for bad in [
            &[r#"["pokeStart",{"pokeID":"06","baseCookie":"04"}]"#][..],
            &[r#"["pokeStart",{"pokeID":"06","baseCookie":null}]"#][..],
            &[r#"["pokePart",{"pokeID":"06"}]"#][..],
            &[r#"["pokeEnd",{"pokeID":"06","cookie":"06"}]"#][..],
            &[
                r#"["pokeStart",{"pokeID":"06","baseCookie":"05"}]"#,
                r#"["pokeStart",{"pokeID":"07","baseCookie":"05"}]"#,
            ][..],
            &[
                r#"["pokeStart",{"pokeID":"04","baseCookie":"05"}]"#,
                r#"["pokeEnd",{"pokeID":"04","cookie":"04"}]"#,
            ][..],
            &[
                r#"["pokeStart",{"pokeID":"05","baseCookie":"05"}]"#,
                r#"["pokePart",{"pokeID":"05","rowsPatch":[{"op":"del","tableName":"t","id":{"id":"a"}}]}]"#,
                r#"["pokeEnd",{"pokeID":"05","cookie":"05"}]"#,
            ][..],
        ] {
            let mut model = model();
            play(&mut model, &HYDRATE).unwrap();
            assert!(play(&mut model, bad).is_err(), "{bad:?}");
        }
    }
}
