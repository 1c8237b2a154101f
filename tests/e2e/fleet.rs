//! Several servers of ours on one database: rolling updates, and clients that are sent from one to
//! the other. What is proven is that nobody is lost on the way.

use std::time::Duration;

use rand::Rng;
use serde_json::Value;

use crate::crash::write;
use crate::hydrate::{DDL, TABLES, expect_all, queries, schema, watch_all};
use crate::interop::{expect_no_reset, expect_sound_records, seed};
use crate::support::client::Clients;
use crate::support::database::Database;
use crate::support::eventually;
use crate::support::proxy::Proxy;
use crate::support::server::{CVR_IN_POSTGRES, Kind, Server};

/// Updates in a run; `ZERORING_MOVES` makes it longer.
const UPDATES: u64 = 2;
/// How often a client is sent away as soon as it came.
const REFUSALS: usize = 16;

fn ours(db: &Database) -> Server {
    Server::start_as(Kind::Ours, &db.url(), &[CVR_IN_POSTGRES])
}

/// More than slowness, and sockets that were closed without a code, as an original does.
fn is_trouble(complaint: &str) -> bool {
    !complaint.contains("Slow query materialization")
        && !complaint.contains("Got unexpected socket close event {\"code\":1005,")
}

/// A new server comes up beside the old one and makes its replica; the balancer sends new
/// connections to it; the old one gets SIGTERM and closes its groups one by one. All the while rows
/// are written.
#[test]
fn a_rolling_update_loses_no_client_and_no_row() {
    let updates = std::env::var("ZERORING_MOVES").ok().and_then(|s| s.parse().ok());
    let mut rng = seed();
    let mut db = Database::start(DDL, TABLES);
    let mut old = ours(&db);
    let router = Proxy::start(old.port());
    let url = format!("http://127.0.0.1:{}", router.port);
    let mut clients = Clients::start();
    let all = queries();
    // Tabs of one group, and groups of one tab.
    let watching: Vec<(String, &str, Vec<Value>)> = (0..6)
        .map(|n| {
            let group = ["shared", "shared", "g2", "g3", "g4", "g5"][n];
            (format!("c{n}"), group, all[n * 3..][..5].to_vec())
        })
        .collect();
    for (client, group, queries) in &watching {
        clients.open(client, &url, group, &schema());
        watch_all(&mut clients, client, queries);
    }
    for (client, _, queries) in &watching {
        expect_all(&mut clients, client, queries, &mut db);
    }
    for _ in 0..updates.unwrap_or(UPDATES) {
        for _ in 0..rng.random_range(1..20) {
            write(&mut db, &mut rng);
        }
        let new = ours(&db);
        router.route(new.port());
        old.ask_to_terminate();
        // Some of these meet the old server, some the new one, some a group on its way.
        for _ in 0..30 {
            write(&mut db, &mut rng);
            std::thread::sleep(Duration::from_millis(rng.random_range(0..5)));
        }
        assert_eq!(old.terminated(), Some(0));
        for (client, _, queries) in &watching {
            expect_all(&mut clients, client, queries, &mut db);
        }
        old = new;
    }
    let trouble: Vec<&String> = clients.complaints.iter().filter(|c| is_trouble(c)).collect();
    assert!(trouble.is_empty(), "a closed socket is all that they should notice: {trouble:#?}");
    expect_sound_records(&mut db, 5);
}

/// A real client that hears of an error before it has digested `connected` would never come back.
#[test]
fn clients_that_are_sent_away_as_soon_as_they_come_return() {
    let mut db = Database::start(DDL, TABLES);
    let server = ours(&db);
    let mut clients = Clients::start();
    let queries = queries()[..3].to_vec();
    clients.open("a", &server.url(), "g", &schema());
    watch_all(&mut clients, "a", &queries);
    expect_all(&mut clients, "a", &queries, &mut db);
    let owned = |since: &str| {
        format!(
            "UPDATE \"zero_0/cvr\".\"instances\" SET \"owner\" = 'elsewhere', \
             \"grantedAt\" = now() + interval '{since}'"
        )
    };
    db.sql.batch_execute(&owned("1 hour")).unwrap();
    db.sql.batch_execute("UPDATE issue SET title = title || '.'").unwrap();
    // A new one, which has everything to do when it is refused, and the old one.
    clients.open("b", &server.url(), "g", &schema());
    watch_all(&mut clients, "b", &queries);
    eventually("clients are refused again and again", || {
        clients.view("a", "q0");
        let refused = |c: &&String| c.contains("Failed to connect") && c.contains("transferred to");
        let count = clients.complaints.iter().filter(refused).count();
        if count >= REFUSALS { Ok(()) } else { Err(format!("{count} times")) }
    });
    db.sql.batch_execute(&owned("-1 hour")).unwrap();
    for client in ["a", "b"] {
        expect_all(&mut clients, client, &queries, &mut db);
    }
    expect_no_reset(&clients);
}
