//! Custom mutators: the real client, through the server, to an app and its database, and back
//! (spec: sync-protocol §7).

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use postgres::{Client, NoTls};
use serde_json::{Value, json};

use crate::hydrate::{DDL, TABLES, schema};
use crate::support::client::Clients;
use crate::support::database::Database;
use crate::support::eventually;
use crate::support::oracle::expected_view;
use crate::support::server::{Server, is_original};

/// An app with the driver's mutators (spec: sync-protocol §7.7).
struct App {
    url: String,
    /// Mutations that took effect, refused ones included.
    applied: Arc<AtomicUsize>,
}

impl App {
    fn start(database: &str) -> App {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/mutate", listener.local_addr().unwrap());
        let applied = Arc::new(AtomicUsize::new(0));
        let (count, database) = (applied.clone(), database.to_owned());
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (count, database) = (count.clone(), database.clone());
                std::thread::spawn(move || serve(stream.unwrap(), &database, &count));
            }
        });
        App { url, applied }
    }
}

/// One request.
fn serve(mut stream: TcpStream, database: &str, applied: &AtomicUsize) {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let (mut length, mut line) = (0, String::new());
    while reader.read_line(&mut line).is_ok_and(|n| n > 2) {
        if let Some(n) = line.to_ascii_lowercase().strip_prefix("content-length:") {
            length = n.trim().parse().unwrap();
        }
        line.clear();
    }
    let mut body = vec![0; length];
    if reader.read_exact(&mut body).is_err() {
        return;
    }
    let push: Value = serde_json::from_slice(&body).unwrap();
    let group = push["clientGroupID"].as_str().unwrap();
    let mut sql = Client::connect(database, NoTls).unwrap();
    let mut results = Vec::new();
    for mutation in push["mutations"].as_array().unwrap() {
        let result = if mutation["name"] == "_zero_cleanupResults" {
            let arg = &mutation["args"][0];
            sql.execute(
                "DELETE FROM zero_0.mutations WHERE \"clientGroupID\" = $1 AND \"clientID\" = $2 \
                 AND \"mutationID\" <= $3",
                &[&group, &arg["clientID"].as_str(), &arg["upToMutationID"].as_i64()],
            )
            .unwrap();
            json!({})
        } else {
            mutate(&mut sql, group, mutation, applied)
        };
        let id = json!({"id": mutation["id"], "clientID": mutation["clientID"]});
        results.push(json!({"id": id, "result": result}));
    }
    let answer = json!({"kind": "MutateResponse", "mutations": results}).to_string();
    let head = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\n";
    let _ = write!(stream, "{head}Content-Length: {}\r\n\r\n{answer}", answer.len());
}

fn mutate(sql: &mut Client, group: &str, mutation: &Value, applied: &AtomicUsize) -> Value {
    let client = mutation["clientID"].as_str().unwrap();
    let id = mutation["id"].as_i64().unwrap();
    let mut tx = sql.transaction().unwrap();
    let last: i64 = tx
        .query_one(
            "INSERT INTO zero_0.clients AS c (\"clientGroupID\", \"clientID\", \
             \"lastMutationID\") VALUES ($1, $2, 1) ON CONFLICT (\"clientGroupID\", \"clientID\") \
             DO UPDATE SET \"lastMutationID\" = c.\"lastMutationID\" + 1 RETURNING \
             \"lastMutationID\"",
            &[&group, &client],
        )
        .unwrap()
        .get(0);
    if id < last {
        return json!({"error": "alreadyProcessed"});
    }
    assert_eq!(id, last, "the server keeps the order");
    let result = match mutation["name"].as_str().unwrap() {
        "app|upsert" | "app.upsert" => {
            let row = &mutation["args"][0]["row"];
            assert_eq!(mutation["args"][0]["table"], "issue");
            let text = row.to_string();
            tx.execute(
                "INSERT INTO issue SELECT * FROM json_populate_record(null::issue, $1::text::json) \
                 ON CONFLICT (id) DO UPDATE SET title = excluded.title, open = excluded.open, \
                 priority = excluded.priority, owner = excluded.owner",
                &[&text],
            )
            .unwrap();
            json!({})
        }
        "app|refused" | "app.refused" => {
            let result = json!({"error": "app", "message": "not allowed", "details": {"code": 7}});
            tx.execute(
                "INSERT INTO zero_0.mutations (\"clientGroupID\", \"clientID\", \"mutationID\", \
                 result) VALUES ($1, $2, $3, $4::text::json)",
                &[&group, &client, &id, &result.to_string()],
            )
            .unwrap();
            result
        }
        other => panic!("no mutator {other}"),
    };
    tx.commit().unwrap();
    applied.fetch_add(1, Ordering::SeqCst);
    result
}

fn issue(id: &str, title: &str) -> Value {
    json!({"table": "issue", "row": {"id": id, "title": title, "open": true, "priority": 1,
        "owner": "u1"}})
}

#[test]
fn mutations_of_real_clients_are_applied_once_and_seen_by_everybody() {
    let mut db = Database::start(DDL, TABLES);
    let app = App::start(&db.url());
    let mut server = Server::start(&db.url(), &[("ZERO_MUTATE_URL", &app.url)]);
    let mut clients = Clients::start();
    let query = json!({"table": "issue", "where": {"cmp": ["owner", "=", "u1"]}});
    // Two tabs of one group, and somebody else.
    for (client, storage) in [("a", "s"), ("b", "s"), ("c", "other")] {
        clients.open_mutating(client, &server.url(), storage, &schema());
        clients.watch(client, "q", &query);
    }
    let expect = |clients: &mut Clients, db: &mut Database| {
        let want = expected_view(&mut db.sql, &schema(), &query);
        for client in ["a", "b", "c"] {
            clients.expect_view(client, "q", &want);
        }
        want
    };
    expect(&mut clients, &mut db);
    for n in 0..10 {
        let client = ["a", "b", "c"][n % 3];
        clients.mutate(client, &format!("m{n}"), "upsert", &issue(&format!("n{n}"), "made"));
    }
    for n in 0..10 {
        assert_eq!(clients.mutated(&format!("m{n}"))["type"], "success");
    }
    let rows = expect(&mut clients, &mut db);
    assert_eq!(rows.as_array().unwrap().iter().filter(|r| r["title"] == "made").count(), 10);

    // An error of the app takes the optimistic change back.
    clients.mutate("a", "bad", "refused", &issue("n1", "never"));
    let result = clients.mutated("bad");
    assert_eq!(result["type"], "error", "{result}");
    assert!(result.to_string().contains("not allowed"), "{result}");
    assert_eq!(expect(&mut clients, &mut db), rows);

    eventually("a result that was seen is cleaned up", || {
        let left = db.sql.query_one("SELECT count(*) FROM zero_0.mutations", &[]).unwrap();
        if left.get::<_, i64>(0) == 0 { Ok(()) } else { Err("it is still there".to_owned()) }
    });

    // What is done while the server is away is done once, when it is back.
    if is_original() {
        // Its children would outlive a kill, and keep the port.
        server.terminate();
    } else {
        server.kill();
    }
    for (n, client) in ["a", "b", "a", "c"].into_iter().enumerate() {
        let change = issue(&format!("n{n}"), &format!("offline {n}"));
        clients.mutate(client, &format!("off{n}"), "upsert", &change);
    }
    server.launch();
    for n in 0..4 {
        assert_eq!(clients.mutated(&format!("off{n}"))["type"], "success");
    }
    let rows = expect(&mut clients, &mut db);
    let offline = rows.as_array().unwrap().iter();
    assert_eq!(offline.filter(|r| r["title"].as_str().unwrap().starts_with("offline")).count(), 4);
    assert_eq!(app.applied.load(Ordering::SeqCst), 15);
}
