//! A client that believes nothing: it checks every rule of the protocol, and keeps what a real one
//! would persist.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value as Json;

use super::super::Frame;

/// A poke on its way in.
struct OpenPoke {
    id: String,
    parts: Vec<Json>,
    binary: Vec<u8>,
}

/// What survives a lost connection.
#[derive(Clone, Default)]
pub struct Persisted {
    pub cookie: Option<String>,
    /// Per client of the group: what it desires.
    pub desired: BTreeMap<String, BTreeSet<String>>,
    pub got: BTreeSet<String>,
    /// JSON by (table, identity text).
    pub rows: BTreeMap<(String, String), String>,
    pub lmids: BTreeMap<String, i64>,
    pub results: BTreeMap<(String, i64), String>,
}

#[derive(Default)]
pub struct ClientModel {
    pub state: Persisted,
    poke: Option<OpenPoke>,
    pub pokes: usize,
    pub empty_pokes: usize,
    pub cancelled: usize,
    /// Of pokes that were not taken back.
    pub row_patches: usize,
    pub transform_errors: Vec<String>,
    pub deleted: Vec<String>,
    /// What the socket's protocol version allows.
    pub binary: bool,
}

impl ClientModel {
    pub fn new(state: Persisted, binary: bool) -> ClientModel {
        ClientModel { state, binary, ..ClientModel::default() }
    }

    /// Patches of the poke that is on its way in.
    pub fn open_parts(&self) -> Option<usize> {
        self.poke.as_ref().map(|poke| poke.parts.len())
    }

    pub fn receive(&mut self, frame: &Frame) {
        if frame.binary {
            assert!(self.binary, "a binary frame for a client before protocol 52");
            assert_eq!(frame.payload[0], 0);
            assert!(frame.payload.len() <= 1 << 20);
            let poke = self.poke.as_mut().expect("a chunk outside of a poke");
            poke.binary.extend_from_slice(&frame.payload[1..]);
            return;
        }
        let message: (String, Json) = serde_json::from_slice(&frame.payload).expect("JSON");
        match (message.0.as_str(), message.1) {
            ("pokeStart", body) => {
                assert!(self.poke.is_none(), "a poke inside a poke");
                let base = body["baseCookie"].as_str().map(str::to_owned);
                assert_eq!(base, self.state.cookie, "unexpected base cookie");
                let id = body["pokeID"].as_str().expect("pokeID").to_owned();
                self.poke = Some(OpenPoke { id, parts: Vec::new(), binary: Vec::new() });
            }
            ("pokePart", body) => {
                assert!(!self.binary, "a pokePart for protocol 52");
                let poke = self.poke.as_mut().expect("a part outside of a poke");
                assert_eq!(body["pokeID"].as_str(), Some(poke.id.as_str()));
                poke.parts.push(body);
            }
            ("pokeEnd", body) => self.end(&body),
            ("transformError", Json::Array(errors)) => self
                .transform_errors
                .extend(errors.iter().map(|e| e["id"].as_str().expect("id").to_owned())),
            ("deleteClients", body) => {
                let ids = body["clientIDs"].as_array().expect("ids");
                self.deleted.extend(ids.iter().map(|c| c.as_str().expect("id").to_owned()));
            }
            (other, body) => panic!("unexpected {other} {body}"),
        }
    }

    fn end(&mut self, body: &Json) {
        let mut poke = self.poke.take().expect("an end without start");
        assert_eq!(body["pokeID"].as_str(), Some(poke.id.as_str()));
        if body.get("cancel") == Some(&Json::Bool(true)) {
            assert_eq!(body["cookie"], "");
            self.cancelled += 1;
            return;
        }
        let cookie = body["cookie"].as_str().expect("cookie").to_owned();
        if self.binary {
            let parts: Vec<Json> = serde_json::from_slice(&poke.binary).expect("an array of parts");
            poke.parts = parts;
        }
        assert!(self.state.cookie.as_ref().is_none_or(|base| *base <= cookie), "cookies rise");
        let patches: usize = poke.parts.iter().map(|p| self.apply(p)).sum();
        if self.state.cookie.as_ref() == Some(&cookie) {
            assert_eq!(patches, 0, "a poke that does not move the cookie is empty");
        }
        self.pokes += 1;
        self.empty_pokes += usize::from(patches == 0);
        self.state.cookie = Some(cookie);
    }

    fn apply(&mut self, part: &Json) -> usize {
        let mut patches = 0;
        for (client, id) in part["lastMutationIDChanges"].as_object().into_iter().flatten() {
            let id = id.as_i64().expect("an integer");
            let known = self.state.lmids.insert(client.clone(), id);
            assert!(known.is_none_or(|known| known <= id), "last mutation ids do not go back");
            patches += 1;
        }
        for (client, ops) in part["desiredQueriesPatches"].as_object().into_iter().flatten() {
            let set = self.state.desired.entry(client.clone()).or_default();
            patches += query_ops(ops, set);
        }
        patches += query_ops(&part["gotQueriesPatch"], &mut self.state.got);
        for op in part["rowsPatch"].as_array().into_iter().flatten() {
            self.row_patches += 1;
            let table = op["tableName"].as_str().expect("table").to_owned();
            match op["op"].as_str() {
                Some("put") => {
                    let id = identity(&table, &serde_json::json!({"id": op["value"]["id"]}));
                    self.state.rows.insert((table, id), op["value"].to_string());
                }
                Some("del") => {
                    let id = identity(&table, &op["id"]);
                    self.state.rows.remove(&(table, id));
                }
                other => panic!("unexpected row op {other:?}"),
            }
            patches += 1;
        }
        for op in part["mutationsPatch"].as_array().into_iter().flatten() {
            patches += 1;
            let id = |id: &Json| {
                (
                    id["clientID"].as_str().expect("client").to_owned(),
                    id["id"].as_i64().expect("id"),
                )
            };
            if op["op"] == "put" {
                let id = id(&op["mutation"]["id"]);
                assert!(
                    self.state.lmids.get(&id.0).is_some_and(|l| *l >= id.1),
                    "a result comes with (or after) its last mutation id"
                );
                self.state.results.insert(id, op["mutation"]["result"].to_string());
            } else {
                self.state.results.remove(&id(&op["id"]));
            }
        }
        assert!(patches <= 100, "{patches} patches in one part");
        patches
    }
}

fn query_ops(ops: &Json, set: &mut BTreeSet<String>) -> usize {
    let ops = ops.as_array().map(Vec::as_slice).unwrap_or_default();
    for op in ops {
        let hash = op["hash"].as_str().expect("hash");
        match op["op"].as_str() {
            Some("put") => set.insert(hash.to_owned()),
            Some("del") => set.remove(hash),
            other => panic!("unexpected query op {other:?}"),
        };
    }
    ops.len()
}

fn identity(table: &str, key: &Json) -> String {
    let mut parts = vec![Json::from(""), Json::from(table)];
    for (column, value) in key.as_object().expect("a key") {
        parts.push(Json::from(column.as_str()));
        parts.push(value.clone());
    }
    Json::Array(parts).to_string()
}
