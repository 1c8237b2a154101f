//! Client groups: several clients, executors, reconnects.

use serde_json::json;

use crate::hydrate::{DDL, TABLES, WRITES, expect_all, queries, schema, watch_all};
use crate::support::client::Clients;
use crate::support::database::Database;
use crate::support::oracle::expected_view;
use crate::support::server::{CVR_IN_POSTGRES, Server};

#[test]
fn clients_of_one_group_share_rows_and_each_see_their_queries() {
    let mut db = Database::start(DDL, TABLES);
    let server = Server::start(&db.url(), &[]);
    let mut clients = Clients::start();
    for client in ["a", "b"] {
        clients.open(client, &server.url(), "shared", &schema());
    }
    let (first, second) = (queries()[..10].to_vec(), queries()[10..].to_vec());
    watch_all(&mut clients, "a", &first);
    watch_all(&mut clients, "b", &second);
    expect_all(&mut clients, "a", &first, &mut db);
    expect_all(&mut clients, "b", &second, &mut db);
    // A third client joins late and wants what others already have.
    clients.open("c", &server.url(), "shared", &schema());
    watch_all(&mut clients, "c", &first);
    for write in &WRITES[..6] {
        db.sql.batch_execute(write).unwrap();
    }
    for client in ["a", "c"] {
        expect_all(&mut clients, client, &first, &mut db);
    }
    clients.close("a");
    db.sql.batch_execute(WRITES[6]).unwrap();
    expect_all(&mut clients, "c", &first, &mut db);
    expect_all(&mut clients, "b", &second, &mut db);
}

#[test]
fn queries_can_be_dropped_and_taken_up_again() {
    let mut db = Database::start(DDL, TABLES);
    let server = Server::start(&db.url(), &[]);
    let mut clients = Clients::start();
    clients.open("a", &server.url(), "s", &schema());
    let queries = queries();
    watch_all(&mut clients, "a", &queries);
    expect_all(&mut clients, "a", &queries, &mut db);
    for i in 0..queries.len() {
        clients.unwatch("a", &format!("q{i}"));
    }
    db.sql.batch_execute(WRITES[0]).unwrap();
    db.sql.batch_execute(WRITES[3]).unwrap();
    watch_all(&mut clients, "a", &queries);
    expect_all(&mut clients, "a", &queries, &mut db);
}

#[test]
fn groups_on_all_executors_follow_the_same_commits() {
    let mut db = Database::start(DDL, TABLES);
    let server = Server::start(&db.url(), &[("ZERO_NUM_SYNC_WORKERS", "2")]);
    let mut clients = Clients::start();
    let queries = &queries()[9..14];
    let names: Vec<String> = (0..8).map(|i| format!("g{i}")).collect();
    for name in &names {
        clients.open(name, &server.url(), name, &schema());
        watch_all(&mut clients, name, queries);
    }
    for write in &WRITES[..5] {
        db.sql.batch_execute(write).unwrap();
    }
    for name in &names {
        expect_all(&mut clients, name, queries, &mut db);
    }
}

#[test]
fn a_client_comes_back_with_its_cookie_after_a_restart() {
    comes_back(&[]);
}

#[test]
fn a_client_comes_back_with_its_cookie_when_its_group_is_in_postgres() {
    comes_back(&[CVR_IN_POSTGRES]);
}

fn comes_back(env: &[(&str, &str)]) {
    let mut db = Database::start(DDL, TABLES);
    let mut server = Server::start(&db.url(), env);
    let mut clients = Clients::start();
    clients.open("a", &server.url(), "s", &schema());
    let queries = queries();
    watch_all(&mut clients, "a", &queries);
    expect_all(&mut clients, "a", &queries, &mut db);
    assert_eq!(server.terminate(), Some(0), "SIGTERM is a clean exit");
    for write in &WRITES[..4] {
        db.sql.batch_execute(write).unwrap();
    }
    server.launch();
    expect_all(&mut clients, "a", &queries, &mut db);
    let lost: Vec<&String> =
        clients.complaints.iter().filter(|c| c.contains("ClientNotFound")).collect();
    assert!(lost.is_empty(), "the group was lost: {lost:?}");
}

#[test]
fn tables_without_a_permission_rule_are_empty() {
    let mut db = Database::start(DDL, &["issue"]);
    let server = Server::start(&db.url(), &[]);
    let mut clients = Clients::start();
    clients.open("a", &server.url(), "s", &schema());
    let readable = json!({"table": "issue"});
    let forbidden = json!({"table": "label"});
    clients.watch("a", "issues", &readable);
    clients.watch("a", "labels", &forbidden);
    let want = expected_view(&mut db.sql, &schema(), &readable);
    clients.expect_view("a", "issues", &want);
    clients.expect_view("a", "labels", &json!([]));
}
