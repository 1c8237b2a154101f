//! Queries hydrate, stay live, and equal Postgres.

use serde_json::{Value, json};

use crate::support::client::Clients;
use crate::support::database::Database;
use crate::support::oracle::expected_view;
use crate::support::server::Server;

pub const DDL: &str = "
    CREATE TABLE issue (id TEXT PRIMARY KEY, title TEXT NOT NULL, open BOOL NOT NULL,
        priority INT, owner TEXT);
    CREATE TABLE comment (id TEXT PRIMARY KEY, \"issueId\" TEXT, body TEXT, n DOUBLE PRECISION);
    CREATE TABLE label (id TEXT PRIMARY KEY, name TEXT NOT NULL);
    CREATE TABLE \"issueLabel\" (\"issueId\" TEXT NOT NULL, \"labelId\" TEXT NOT NULL,
        PRIMARY KEY (\"issueId\", \"labelId\"));
    INSERT INTO issue SELECT 'i' || g, 'Issue ' || g, g % 2 = 0, nullif(g % 5, 0), 'u' || g % 3
        FROM generate_series(1, 40) g;
    INSERT INTO comment SELECT 'c' || g, 'i' || (g * 7 % 50), 'text ' || g, g / 4.0
        FROM generate_series(1, 120) g;
    INSERT INTO label SELECT 'l' || g, 'label ' || g FROM generate_series(1, 5) g;
    INSERT INTO \"issueLabel\" SELECT DISTINCT 'i' || (g % 40 + 1), 'l' || (g * 3 % 5 + 1)
        FROM generate_series(1, 60) g;";

pub const TABLES: &[&str] = &["issue", "comment", "label", "issueLabel"];

pub fn schema() -> Value {
    json!({
        "tables": {
            "issue": {"columns": {"id": "string", "title": "string", "open": "boolean",
                "priority": "number", "owner": "string"}, "primaryKey": ["id"]},
            "comment": {"columns": {"id": "string", "issueId": "string", "body": "string",
                "n": "number"}, "primaryKey": ["id"]},
            "label": {"columns": {"id": "string", "name": "string"}, "primaryKey": ["id"]},
            "issueLabel": {"columns": {"issueId": "string", "labelId": "string"},
                "primaryKey": ["issueId", "labelId"]},
        },
        "relationships": {
            "issue": {
                "comments": [{"sourceField": ["id"], "destField": ["issueId"], "destTable": "comment"}],
                "labels": [
                    {"sourceField": ["id"], "destField": ["issueId"], "destTable": "issueLabel"},
                    {"sourceField": ["labelId"], "destField": ["id"], "destTable": "label"}],
            },
            "comment": {
                "issue": [{"sourceField": ["issueId"], "destField": ["id"], "destTable": "issue"}],
            },
        },
    })
}

/// Twenty queries of every common shape.
pub fn queries() -> Vec<Value> {
    vec![
        json!({"table": "issue"}),
        json!({"table": "issue", "where": {"cmp": ["open", "=", true]}}),
        json!({"table": "issue", "where": {"cmp": ["priority", "IS", null]}}),
        json!({"table": "issue", "where": {"cmp": ["priority", ">", 2]},
            "orderBy": [["priority", "desc"], ["title", "asc"]]}),
        json!({"table": "issue", "where": {"cmp": ["owner", "IN", ["u1", "u2"]]}}),
        json!({"table": "issue", "where": {"cmp": ["title", "LIKE", "Issue 1%"]}}),
        json!({"table": "issue", "where": {"cmp": ["title", "ILIKE", "%ISSUE _"]}}),
        json!({"table": "issue", "orderBy": [["priority", "asc"]], "limit": 7}),
        json!({"table": "issue", "orderBy": [["priority", "desc"], ["title", "desc"]], "limit": 5}),
        json!({"table": "issue", "orderBy": [["priority", "asc"]],
            "start": {"row": {"priority": 2}, "inclusive": false}, "limit": 10}),
        json!({"table": "issue", "related": [{"rel": "comments"}]}),
        json!({"table": "issue", "limit": 6, "orderBy": [["title", "desc"]],
            "related": [{"rel": "comments", "spec": {"orderBy": [["n", "desc"]], "limit": 2}}]}),
        json!({"table": "issue", "related": [{"rel": "labels"}]}),
        json!({"table": "issue", "where": {"exists": "comments"}}),
        json!({"table": "issue", "where": {"exists": "comments",
            "spec": {"where": {"cmp": ["n", "<", 10]}}}, "limit": 4}),
        json!({"table": "issue", "where": {"or": [{"exists": "labels",
            "spec": {"where": {"cmp": ["name", "=", "label 2"]}}}, {"cmp": ["priority", "=", 4]}]}}),
        json!({"table": "issue", "where": {"and": [{"exists": "labels"}, {"exists": "comments"},
            {"cmp": ["open", "=", false]}]}, "related": [{"rel": "labels"}, {"rel": "comments"}]}),
        json!({"table": "comment", "where": {"exists": "issue",
            "spec": {"where": {"cmp": ["open", "=", true]}}}, "related": [{"rel": "issue"}]}),
        json!({"table": "comment", "where": {"exists": "issue", "spec": {"where":
            {"exists": "labels"}}}, "orderBy": [["n", "desc"]], "limit": 9}),
        json!({"table": "label"}),
    ]
}

/// Watches all queries as `q0`, `q1`, … of a client.
pub fn watch_all(clients: &mut Clients, client: &str, queries: &[Value]) {
    for (i, query) in queries.iter().enumerate() {
        clients.watch(client, &format!("q{i}"), query);
    }
}

/// Every query of the client converges to what Postgres answers now.
pub fn expect_all(clients: &mut Clients, client: &str, queries: &[Value], db: &mut Database) {
    let schema = schema();
    for (i, query) in queries.iter().enumerate() {
        let want = expected_view(&mut db.sql, &schema, query);
        clients.expect_view(client, &format!("q{i}"), &want);
    }
}

/// Transactions that move rows in and out of all of [`queries`].
pub const WRITES: &[&str] = &[
    "UPDATE issue SET title = 'Issue 11 renamed' WHERE id = 'i11'",
    "UPDATE issue SET open = NOT open WHERE id IN ('i3', 'i4', 'i5')",
    "INSERT INTO issue VALUES ('i99', 'Issue 1 new', true, 4, 'u1'); INSERT INTO comment VALUES ('c999', 'i99', 'hi', 1)",
    "DELETE FROM comment WHERE n < 5",
    "UPDATE comment SET \"issueId\" = 'i1' WHERE \"issueId\" = 'i7'",
    "UPDATE issue SET priority = NULL WHERE priority = 3",
    "UPDATE issue SET id = 'i100' WHERE id = 'i2'",
    "DELETE FROM \"issueLabel\" WHERE \"labelId\" = 'l2'; INSERT INTO \"issueLabel\" VALUES ('i8', 'l2'), ('i9', 'l1')",
    "UPDATE label SET name = 'label 2' WHERE id = 'l4'",
    "DELETE FROM issue WHERE priority = 1; UPDATE issue SET priority = 1 WHERE priority IS NULL",
    "TRUNCATE comment",
    "INSERT INTO comment SELECT 'n' || g, 'i' || g, 'again', g FROM generate_series(1, 30) g",
];

#[test]
fn twenty_queries_of_a_real_client_follow_postgres() {
    let mut db = Database::start(DDL, TABLES);
    let server = Server::start(&db.url(), &[]);
    let mut clients = Clients::start();
    clients.open("a", &server.url(), "s", &schema());
    let queries = queries();
    watch_all(&mut clients, "a", &queries);
    expect_all(&mut clients, "a", &queries, &mut db);
    for write in WRITES {
        db.sql.batch_execute(write).unwrap();
        expect_all(&mut clients, "a", &queries, &mut db);
    }
}
