//! `zeroring demo`: one command, a live page, and nothing left behind.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Command, Stdio};

use serde_json::json;

use crate::support::client::Clients;
use crate::support::eventually;

fn fetch(address: &str, path: &str) -> String {
    let host = address.trim_start_matches("http://").trim_end_matches('/');
    let mut socket = TcpStream::connect(host).unwrap();
    write!(socket, "GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n").unwrap();
    let mut answer = String::new();
    socket.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{path}: {answer}");
    answer
}

#[test]
fn the_demo_serves_live_queries_and_leaves_nothing_behind() {
    let scratch = tempfile::tempdir().unwrap();
    // PostgreSQL runs as another user when the tests run as root.
    let mut open = std::fs::metadata(scratch.path()).unwrap().permissions();
    std::os::unix::fs::PermissionsExt::set_mode(&mut open, 0o755);
    std::fs::set_permissions(scratch.path(), open).unwrap();
    let mut demo = Command::new(env!("CARGO_BIN_EXE_zeroring"))
        .arg("demo")
        .env("TMPDIR", scratch.path())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(demo.stdout.take().unwrap()).lines();
    let address = lines
        .find_map(|line| Some(line.unwrap().strip_prefix("Live queries: ")?.to_owned()))
        .expect("the demo prints its address");
    for path in ["/", "/style.css", "/app.js"] {
        fetch(&address, path);
    }
    let config = fetch(&address, "/config.js");
    let server = config.split('"').nth(1).unwrap().to_owned();

    // The real client sees the sample, and the writes that go on.
    let schema = json!({"tables": {"issue": {"columns": {"id": "string", "updated_at": "number"},
        "primaryKey": ["id"]}}});
    let mut clients = Clients::start();
    clients.open("a", &server, "s", &schema);
    let newest = json!({"table": "issue", "orderBy": [["updated_at", "desc"]], "limit": 5});
    clients.watch("a", "newest", &newest);
    let mut look = |before: &serde_json::Value| {
        eventually("the list of newest issues changes", || {
            let view = clients.view("a", "newest");
            let full = view.data.as_array().is_some_and(|rows| rows.len() == 5);
            if full && view.data != *before { Ok(view.data) } else { Err(view.data.to_string()) }
        })
    };
    let first = look(&json!(null));
    look(&first);

    Command::new("kill").args(["-s", "INT", &demo.id().to_string()]).status().unwrap();
    let status = eventually("the demo ends", || demo.try_wait().unwrap().ok_or("runs".into()));
    assert!(status.success(), "{status}");
    let left: Vec<_> = std::fs::read_dir(scratch.path()).unwrap().collect();
    assert!(left.is_empty(), "left behind: {left:?}");
}
