//! A group that executes a very large query does not keep the others of its executor waiting
//! (issue: fairness; spec: view-syncer-cvr §5.8). Judged by the order of events, not by time.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;

use zeroring_core::change::message::LiteValue;
use zeroring_net::pg::PgConfig;
use zeroring_net::pg::local_server::LocalServer;
use zeroring_storage::cvr_store::postgres::PostgresCvrConfig;

use crate::support::*;

/// Rows of the large query; `ZERORING_FAIRNESS_ROWS` makes it larger.
const ROWS: i64 = 40_000;
/// How often the small group is poked at least, one commit after the other, before the last row of
/// the large query comes.
const POKES: usize = 5;

#[test]
fn a_small_group_is_poked_while_a_large_query_is_executed() {
    keeps_poking(None);
}

#[test]
fn nor_does_it_wait_for_the_records_of_a_large_one_in_postgres() {
    let postgres = LocalServer::start(&["fsync=off"]).unwrap();
    let connection = PgConfig::parse(&postgres.url("postgres")).unwrap();
    keeps_poking(Some(PostgresCvrConfig {
        max_connections: 3,
        ..PostgresCvrConfig::new(connection)
    }));
}

fn keeps_poking(records: Option<PostgresCvrConfig>) {
    let rows = std::env::var("ZERORING_FAIRNESS_ROWS").ok().and_then(|s| s.parse().ok());
    let rows: i64 = rows.unwrap_or(ROWS);
    let mut server = Server::start(&Setup { executors: 1, records, ..Setup::default() });
    let mut changes: Vec<_> = (0..rows).map(|n| server.issue(&format!("i{n}"), n)).collect();
    changes.push(server.issue("watched", 0));
    server.commit(changes);
    let one = r#"{"table":"issue","where":{"type":"simple","op":"=","left":{"type":"column","name":"id"},"right":{"type":"literal","value":"watched"}},"orderBy":[["id","asc"]]}"#;
    let put_one = format!(r#"{{"op":"put","hash":"one","ast":{one},"ttl":60000}}"#);
    let mut small = Client::joined(&server, &dial("small", "c"), &put_one);
    small.pokes_until(is_got);

    let mut large = Client::joined(&server, &dial("large", "c"), &put("all"));
    let (begins, begun) = channel();
    let last_row_came = Arc::new(AtomicBool::new(false));
    let came = last_row_came.clone();
    let reading = std::thread::spawn(move || {
        // Its configuration is stored; what comes next is the execution.
        large.poke();
        begins.send(()).unwrap();
        let mut put = 0;
        while put < rows + 1 {
            let Got::Json(kind, body) = large.next() else { panic!("no message") };
            assert_ne!(kind, "error", "{body}");
            put += body["rowsPatch"].as_array().map_or(0, |patches| patches.len() as i64);
        }
        came.store(true, Ordering::SeqCst);
    });
    begun.recv_timeout(PATIENCE).unwrap();
    let mut pokes = 0;
    let mut n = 0;
    while !last_row_came.load(Ordering::SeqCst) {
        n += 1;
        let values = [text("watched"), text("title"), LiteValue::Integer(n)];
        let update = server.update("issue", &values);
        server.commit(vec![update]);
        let parts = small.poke();
        assert_eq!(parts[0]["rowsPatch"][0]["value"]["n"], n, "each commit by itself");
        pokes += usize::from(!last_row_came.load(Ordering::SeqCst));
    }
    println!("{pokes} pokes of the small group while {rows} rows were executed");
    assert!(pokes >= POKES, "{pokes} pokes");
    reading.join().unwrap();
}
