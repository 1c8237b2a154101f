//! The application's endpoint for mutations: applies them to Postgres, as `@rocicorp/zero/server`
//! would (spec: sync-protocol §7.4), and knows a single mutator, `title`.

use std::io::{self, BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use postgres::{Client, NoTls, Statement};
use serde::Deserialize;
use serde_json::json;

use crate::error::LoadError;

/// Longer requests are not those of a sync server.
const MAX_BODY_BYTES: usize = 10 << 20;
const MAX_HEAD_LINES: usize = 200;

/// The tables of the default app and shard, where the last mutation of each client is kept.
const CLIENTS: &str = "\"zero_0\".clients";

/// Connections to Postgres that wait for the next request.
type Pool = Mutex<Vec<Connection>>;

struct Connection {
    sql: Client,
    mutate: Statement,
}

/// A running endpoint. It ends with the process.
pub(crate) struct Api {
    port: u16,
    mutations: Arc<AtomicU64>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Push {
    #[serde(rename = "clientGroupID")]
    client_group_id: String,
    mutations: Vec<Mutation>,
}

#[derive(Deserialize)]
struct Mutation {
    id: u64,
    #[serde(rename = "clientID")]
    client_id: String,
    name: String,
    args: Vec<Title>,
}

/// The mutator's argument.
#[derive(Deserialize)]
struct Title {
    item: String,
    sent: i64,
}

impl Api {
    /// Listens on a free port, for an application on the database at `url`.
    pub(crate) fn start(url: &str) -> Result<Api, LoadError> {
        let listening = || LoadError::io("starting the application's endpoint");
        let listener = TcpListener::bind(("127.0.0.1", 0)).map_err(listening())?;
        let port = listener.local_addr().map_err(listening())?.port();
        let mutations = Arc::new(AtomicU64::new(0));
        let (counter, url) = (mutations.clone(), url.to_owned());
        let pool: Arc<Pool> = Arc::default();
        let accept = move || {
            for socket in listener.incoming().flatten() {
                let (counter, url, pool) = (counter.clone(), url.clone(), pool.clone());
                let serve = move || {
                    // The server sees a closed connection, and tries again.
                    if let Err(error) = serve(&socket, &url, &pool, &counter) {
                        eprintln!("the application's endpoint: {error}");
                    }
                };
                // Without a thread the connection is closed.
                let _ = std::thread::Builder::new().name("api".to_owned()).spawn(serve);
            }
        };
        std::thread::Builder::new().name("api".to_owned()).spawn(accept).map_err(listening())?;
        Ok(Api { port, mutations })
    }

    /// For `ZERO_MUTATE_URL`.
    pub(crate) fn url(&self) -> String {
        format!("http://127.0.0.1:{}/mutate", self.port)
    }

    /// Mutations that were applied.
    pub(crate) fn mutations(&self) -> u64 {
        self.mutations.load(Ordering::Relaxed)
    }
}

fn serve(socket: &TcpStream, url: &str, pool: &Pool, counter: &AtomicU64) -> io::Result<()> {
    socket.set_nodelay(true)?;
    let mut reader = BufReader::new(socket);
    while let Some(body) = request(&mut reader)? {
        let (status, answer) = match answer(&body, url, pool, counter) {
            Ok(answer) => ("200 OK", answer),
            // The server tries again, as it would with an application whose database is down.
            Err(cause) => ("500 Internal Server Error", cause),
        };
        let head = format!(
            "HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n",
            answer.len()
        );
        (&mut &*socket).write_all((head + &answer).as_bytes())?;
    }
    Ok(())
}

/// The body of the next request; none at the end of the connection.
fn request(reader: &mut impl BufRead) -> io::Result<Option<Vec<u8>>> {
    let mut length = None;
    let mut chunked = false;
    for nth in 0..MAX_HEAD_LINES {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 {
            return if nth == 0 { Ok(None) } else { Err(io::ErrorKind::UnexpectedEof.into()) };
        }
        let line = line.trim_end();
        if line.is_empty() {
            return body(reader, length, chunked).map(Some);
        }
        if let Some((name, value)) = line.split_once(':') {
            match name.to_ascii_lowercase().as_str() {
                "content-length" => length = value.trim().parse::<usize>().ok(),
                "transfer-encoding" => chunked = value.trim().eq_ignore_ascii_case("chunked"),
                _ => {}
            }
        }
    }
    Err(io::Error::other("an endless head"))
}

fn body(reader: &mut impl BufRead, length: Option<usize>, chunked: bool) -> io::Result<Vec<u8>> {
    let mut all = Vec::new();
    if !chunked {
        let length = length.unwrap_or(0).min(MAX_BODY_BYTES);
        all.resize(length, 0);
        reader.read_exact(&mut all)?;
        return Ok(all);
    }
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        let size = usize::from_str_radix(line.trim(), 16).map_err(io::Error::other)?;
        if all.len() + size > MAX_BODY_BYTES {
            return Err(io::Error::other("too long a request"));
        }
        let begin = all.len();
        all.resize(begin + size, 0);
        reader.read_exact(&mut all[begin..])?;
        let mut end = [0; 2];
        reader.read_exact(&mut end)?;
        if size == 0 {
            return Ok(all);
        }
    }
}

fn connect(url: &str) -> Result<Connection, postgres::Error> {
    let mut sql = Client::connect(url, NoTls)?;
    // One transaction: the last mutation's number steps on, and the row changes.
    let mutate = sql.prepare(&format!(
        "WITH step AS (INSERT INTO {CLIENTS} AS c (\"clientGroupID\", \"clientID\",
           \"lastMutationID\") VALUES ($1, $2, 1) ON CONFLICT (\"clientGroupID\", \"clientID\")
           DO UPDATE SET \"lastMutationID\" = c.\"lastMutationID\" + 1 RETURNING 1)
         UPDATE item SET title = $3, sent_us = $4 WHERE id = $5"
    ))?;
    Ok(Connection { sql, mutate })
}

fn answer(body: &[u8], url: &str, pool: &Pool, counter: &AtomicU64) -> Result<String, String> {
    let push: Push = serde_json::from_slice(body).map_err(|e| e.to_string())?;
    let idle = pool.lock().unwrap_or_else(PoisonError::into_inner).pop();
    let mut connection = match idle {
        Some(connection) => connection,
        None => connect(url).map_err(|e| format!("{e:?}"))?,
    };
    let mut results = Vec::new();
    for mutation in &push.mutations {
        let (Some(title), "title") = (mutation.args.first(), mutation.name.as_str()) else {
            return Err(format!("an unknown mutation {:?}", mutation.name));
        };
        let text = format!("Mutated by {} {}", mutation.client_id, mutation.id);
        let Connection { sql, mutate } = &mut connection;
        sql.execute(
            &*mutate,
            &[&push.client_group_id, &mutation.client_id, &text, &title.sent, &title.item],
        )
        .map_err(|e| format!("{e:?}"))?;
        counter.fetch_add(1, Ordering::Relaxed);
        let id = json!({"clientID": mutation.client_id, "id": mutation.id});
        results.push(json!({"id": id, "result": {}}));
    }
    pool.lock().unwrap_or_else(PoisonError::into_inner).push(connection);
    Ok(json!({ "mutations": results }).to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use zeroring_net::pg::local_server::LocalServer;

    #[test]
    fn requests_are_read_whole_in_both_encodings_and_one_after_the_other() {
        let text = b"POST /x HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc\
                     POST /y HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nde\r\n1\r\nf\r\n0\r\n\r\n";
        let mut reader = &text[..];
        assert_eq!(request(&mut reader).unwrap().unwrap(), b"abc");
        assert_eq!(request(&mut reader).unwrap().unwrap(), b"def");
        assert_eq!(request(&mut reader).unwrap(), None);
    }

    #[test]
    fn a_push_changes_the_row_and_steps_the_clients_number() {
        let server = LocalServer::start(&["fsync=off"]).unwrap();
        let url = server.url("postgres");
        let mut sql = Client::connect(&url, NoTls).unwrap();
        sql.batch_execute(
            "CREATE TABLE item (id TEXT PRIMARY KEY, title TEXT, sent_us BIGINT);
             INSERT INTO item VALUES ('p0-i1', 'old', 0);
             CREATE SCHEMA zero_0;
             CREATE TABLE zero_0.clients (\"clientGroupID\" TEXT, \"clientID\" TEXT,
               \"lastMutationID\" BIGINT, \"userID\" TEXT,
               PRIMARY KEY (\"clientGroupID\", \"clientID\"));",
        )
        .unwrap();
        let api = Api::start(&url).unwrap();
        let body = json!({"clientGroupID": "g", "pushVersion": 1, "mutations": [
            {"type": "custom", "id": 1, "clientID": "c", "name": "title", "timestamp": 1,
             "args": [{"item": "p0-i1", "sent": 5}]},
            {"type": "custom", "id": 2, "clientID": "c", "name": "title", "timestamp": 1,
             "args": [{"item": "p0-i1", "sent": 6}]}]})
        .to_string();
        let mut socket = TcpStream::connect(("127.0.0.1", api.port)).unwrap();
        let head = format!("POST /mutate HTTP/1.1\r\nContent-Length: {}\r\n\r\n", body.len());
        socket.write_all((head + &body).as_bytes()).unwrap();
        socket.shutdown(std::net::Shutdown::Write).unwrap();
        let mut text = String::new();
        socket.read_to_string(&mut text).unwrap();
        assert!(text.starts_with("HTTP/1.1 200"), "{text}");
        assert!(text.contains(r#"{"id":{"clientID":"c","id":2},"result":{}}"#), "{text}");
        let row = sql.query_one("SELECT sent_us FROM item", &[]).unwrap();
        assert_eq!(row.get::<_, i64>(0), 6);
        let row = sql.query_one("SELECT \"lastMutationID\" FROM zero_0.clients", &[]).unwrap();
        assert_eq!((row.get::<_, i64>(0), api.mutations()), (2, 2));
    }
}
