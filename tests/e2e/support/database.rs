//! A private PostgreSQL with a small schema, and permissions that let every client read it.

use postgres::{Client, NoTls};
use serde_json::{Value, json};
use zeroring_net::pg::local_server::LocalServer;

/// A running database and a connection to it.
pub struct Database {
    pub server: LocalServer,
    pub sql: Client,
}

impl Database {
    /// Starts a server, runs `ddl`, and lets anybody read `tables`.
    pub fn start(ddl: &str, tables: &[&str]) -> Database {
        let server = LocalServer::start(&["fsync=off", "jit=off"]).unwrap();
        let mut sql = Client::connect(&server.url("postgres"), NoTls).unwrap();
        sql.batch_execute(ddl).unwrap();
        let mut db = Database { server, sql };
        db.deploy_permissions(tables);
        db
    }

    pub fn url(&self) -> String {
        self.server.url("postgres")
    }

    /// The server crashes and comes back.
    pub fn crash(&mut self) {
        self.server.kill();
        self.server.restart().unwrap();
        self.sql = Client::connect(&self.url(), NoTls).unwrap();
    }

    /// What `zero-deploy-permissions` would do for rules that allow every read.
    /// Spec: replication §1.3, operations §6.2.
    fn deploy_permissions(&mut self, tables: &[&str]) {
        let rules: serde_json::Map<String, Value> = tables
            .iter()
            .map(|t| {
                let always = json!([["allow", {"type": "and", "conditions": []}]]);
                ((*t).to_owned(), json!({"row": {"select": always}}))
            })
            .collect();
        self.sql
            .batch_execute(
                "CREATE SCHEMA IF NOT EXISTS zero;
                 CREATE TABLE IF NOT EXISTS zero.permissions (
                   permissions JSONB, hash TEXT,
                   lock BOOL PRIMARY KEY DEFAULT true CHECK (lock));",
            )
            .unwrap();
        self.sql
            .execute(
                "INSERT INTO zero.permissions (permissions, hash) VALUES ($1::text::jsonb, md5($1::text))",
                &[&json!({"tables": rules}).to_string()],
            )
            .unwrap();
    }
}
