//! A poke that is larger than anything that may wait for a socket: a client that does not read
//! keeps nobody waiting, costs a bounded amount of memory, and gets all of it when it reads.

use std::collections::BTreeSet;
use std::time::Duration;

use serde_json::Value;
use zeroring_core::change::message::LiteValue;

use crate::support::*;

/// Rows, and the length of each: twice what may wait for a socket in ordinary pokes.
const ROWS: i64 = 5_000;
const ROW_BYTES: usize = 4_000;
/// What waits for a socket while a large poke is on its way (`src/sync/sockets.rs`): two steps, and
/// a part of a hundred rows more.
const MAX_WAITING: u64 = 2 * (256 << 10) + 100 * 2 * ROW_BYTES as u64;

fn ids(parts: &[Value]) -> BTreeSet<String> {
    let rows = parts.iter().filter_map(|p| p["rowsPatch"].as_array()).flatten();
    rows.map(|op| op["value"]["id"].as_str().unwrap().to_owned()).collect()
}

/// More than a socket takes at once.
fn commit_large(server: &mut Server) {
    let title = text(&"x".repeat(ROW_BYTES));
    let row = |n: i64| [text(&format!("i{n:05}")), title.clone(), LiteValue::Integer(n)];
    let all = (0..ROWS).map(|n| server.insert("issue", &row(n))).collect();
    server.commit(all);
}

#[test]
fn a_client_that_does_not_read_a_large_poke_costs_little_and_delays_nobody() {
    let mut server = Server::start(&Setup::default());
    commit_large(&mut server);

    let mut stalled = Client::joined(&server, &dial("g", "stalled"), &put("q"));
    let mut reads = Client::joined(&server, &dial("g", "reads"), &put("q"));
    let first = reads.pokes_until(|part| part.get("rowsPatch").is_some());
    assert_eq!(ids(&first).len() as i64, ROWS);
    for n in 0..20 {
        let more = server.issue(&format!("later{n}"), n);
        let version = server.commit(vec![more]);
        let parts = reads.poke();
        assert_eq!(ids(&parts).len(), 1);
        assert_eq!(reads.cookie.as_deref(), Some(version.as_str()));
    }
    eventually("the numbers are there", || server.number("largePokes") >= 2);
    let most = server.number("mostQueuedBytes");
    assert!(most > 0 && most <= MAX_WAITING, "{most} bytes waited for a socket");
    assert_eq!(server.number("slowClients"), 0);

    // It has missed nothing.
    let mut seen = BTreeSet::new();
    while seen.len() as i64 != ROWS + 20 {
        let parts = stalled.poke();
        let new = ids(&parts);
        assert!(seen.is_disjoint(&new), "a row was sent twice");
        seen.extend(new);
    }
    assert_eq!(stalled.cookie, reads.cookie);
}

#[test]
fn a_client_that_reads_nothing_of_a_large_poke_is_closed_with_a_reason_and_delays_nobody() {
    let stalled = Duration::from_secs(1);
    let mut server = Server::start(&Setup { stalled, ..Setup::default() });
    commit_large(&mut server);
    let mut stalled = Client::joined(&server, &dial("g", "stalled"), &put("q"));
    let mut reads = Client::joined(&server, &dial("g", "reads"), &put("q"));
    reads.pokes_until(|part| part.get("rowsPatch").is_some());
    eventually("it is given up", || server.number("slowClients") == 1);
    let more = server.issue("later", 1);
    server.commit(vec![more]);
    assert_eq!(ids(&reads.poke()).len(), 1);
    // What was on its way comes, and then the reason; unless it takes too long even for that.
    let end = stalled.end();
    assert!(end.code.is_none_or(|code| code == 1013), "{:?}", end.code);
    assert!(end.code.is_none() || end.reason == "the client does not read fast enough");
    let mut back = Client::joined(&server, &dial("g", "stalled"), "");
    let all = back.pokes_until(|part| part.get("rowsPatch").is_some());
    assert_eq!(ids(&all).len() as i64, ROWS + 1);
}

#[test]
fn a_large_poke_ends_with_the_socket_that_it_is_for() {
    let mut server = Server::start(&Setup::default());
    commit_large(&mut server);
    let client = Client::joined(&server, &dial("g", "c"), &put("q"));
    eventually("the poke has begun", || server.number("largePokes") == 1);
    client.drop_connection();
    eventually("it is gone", || server.number("connections") == 0);
    let mut again = Client::joined(&server, &dial("g", "c"), &put("q"));
    let all = again.pokes_until(|part| part.get("rowsPatch").is_some());
    assert_eq!(ids(&all).len() as i64, ROWS);
}
