//! A client that loses its connection, comes back with its cookie, here or elsewhere, and keeps
//! what it was told.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use serde_json::Value;

use crate::support::*;

/// What a browser would keep of one client; it watches all issues as query `q`.
pub struct Roamer {
    group: String,
    id: String,
    sockets: usize,
    pub cookie: Option<String>,
    /// Issues by id: their number.
    pub rows: BTreeMap<String, i64>,
    pub socket: Option<Client>,
}

/// Why a connection is over.
#[derive(Debug, Clone, PartialEq)]
pub enum Over {
    /// The server closed it without an error, or it broke.
    Closed,
    /// Kind and message.
    Error(String, String),
}

impl Roamer {
    pub fn new(group: &str, id: &str) -> Roamer {
        let (group, id) = (group.to_owned(), id.to_owned());
        Roamer { group, id, sockets: 0, cookie: None, rows: BTreeMap::new(), socket: None }
    }

    /// Connects with what it has; the last connection, if any, breaks.
    pub fn connect(&mut self, addr: SocketAddr) {
        self.sockets += 1;
        self.socket = None;
        let cookie = self.cookie.as_deref().unwrap_or_default();
        let mut dial = dial(&self.group, &self.id).cookie(cookie);
        dial.query = dial.query.replace("wsid=", &format!("wsid={}-", self.sockets));
        let mut client = Client::connect_to(addr, &dial).unwrap();
        client.say(&init(&put("q")));
        self.socket = Some(client);
    }

    /// Takes pokes until `done`.
    pub fn read_until(
        &mut self,
        done: impl Fn(&BTreeMap<String, i64>) -> bool,
    ) -> Result<(), Over> {
        while !done(&self.rows) {
            self.poke()?;
        }
        Ok(())
    }

    /// One poke, applied if it is not cancelled.
    pub fn poke(&mut self) -> Result<(), Over> {
        let mut parts = Vec::new();
        let mut started = false;
        loop {
            let socket = self.socket.as_mut().unwrap();
            let (kind, body) = match socket.try_next() {
                Ok(Got::Json(kind, body)) => (kind, body),
                Ok(Got::Binary(bytes)) => panic!("binary: {bytes:?}"),
                Ok(Got::End(_)) => return Err(Over::Closed),
                Err(tungstenite::Error::Io(e)) if e.kind() != std::io::ErrorKind::WouldBlock => {
                    return Err(Over::Closed);
                }
                Err(e) => panic!("{}/{}: nothing comes: {e}; {:?}", self.group, self.id, self.rows),
            };
            match kind.as_str() {
                "pokeStart" => {
                    assert!(!started, "a poke in a poke");
                    started = true;
                    assert_eq!(body["baseCookie"].as_str(), self.cookie.as_deref(), "the chain");
                }
                "pokePart" => parts.push(body),
                "pokeEnd" if body["cancel"] == true => return Ok(()),
                "pokeEnd" => {
                    parts.iter().for_each(|part| self.apply(part));
                    let cookie = body["cookie"].as_str().unwrap().to_owned();
                    assert!(self.cookie.as_ref().is_none_or(|old| *old <= cookie));
                    self.cookie = Some(cookie);
                    return Ok(());
                }
                "error" => {
                    let text = |key: &str| body[key].as_str().unwrap().to_owned();
                    return Err(Over::Error(text("kind"), text("message")));
                }
                "pong" | "connected" => {}
                other => panic!("{other}: {body}"),
            }
        }
    }

    fn apply(&mut self, part: &Value) {
        for patch in part["rowsPatch"].as_array().into_iter().flatten() {
            let row = if patch["op"] == "put" { &patch["value"] } else { &patch["id"] };
            let id = row["id"].as_str().unwrap().to_owned();
            if patch["op"] == "put" {
                self.rows.insert(id, row["n"].as_i64().unwrap());
            } else {
                // A row that came and went while it was away is deleted, too.
                self.rows.remove(&id);
            }
        }
    }
}

/// Issues, and the commits that change them.
#[derive(Default)]
pub struct Issues(pub BTreeMap<String, i64>, Vec<(String, Option<i64>)>);

impl Issues {
    /// One commit, on all of these servers.
    pub fn commit(&mut self, servers: &mut [Server], id: &str, n: Option<i64>) {
        for server in servers {
            let change = match n {
                None => server.delete_issue(id),
                Some(n) if self.0.contains_key(id) => server.update("issue", &issue_values(id, n)),
                Some(n) => server.issue(id, n),
            };
            server.commit(vec![change]);
        }
        self.1.push((id.to_owned(), n));
        match n {
            Some(n) => self.0.insert(id.to_owned(), n),
            None => self.0.remove(id),
        };
    }

    /// Brings a new server to where the others are, at the same versions.
    pub fn replay(&self, server: &mut Server) {
        let mut again = Issues::default();
        for (id, n) in &self.1 {
            again.commit(std::slice::from_mut(server), id, *n);
        }
    }

    /// The `k`-th of a series in which issues come, change and go.
    pub fn step(&mut self, servers: &mut [Server], k: i64) {
        let id = format!("i{}", k * 7 % 11);
        let n = (k % 4 != 3 || !self.0.contains_key(&id)).then_some(k);
        self.commit(servers, &id, n);
    }
}
