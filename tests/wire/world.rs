//! The database and server of a test, and bodies of messages.

use serde_json::{Value, json};

use crate::socket::Connect;
use crate::support::database::Database;
use crate::support::server::{Server, is_original};

/// Two small tables.
pub const DDL: &str = "
    CREATE TABLE item (id text PRIMARY KEY, n int, label text);
    CREATE TABLE other (a int, b text, v text, PRIMARY KEY (a, b));
    INSERT INTO item SELECT 'i' || g, g, 'label ' || g FROM generate_series(1, 3) g;
    INSERT INTO other VALUES (1, 'x', 'one');";

/// The newest protocol version of the server under test.
pub fn newest_version() -> u32 {
    if is_original() { 51 } else { 52 }
}

/// A database and a server on it.
pub struct World {
    pub db: Database,
    pub server: Server,
}

impl World {
    pub fn new(env: &[(&str, &str)]) -> World {
        World::with(DDL, &["item", "other"], env)
    }

    pub fn with(ddl: &str, tables: &[&str], env: &[(&str, &str)]) -> World {
        let db = Database::start(ddl, tables);
        let server = Server::start(&db.url(), env);
        World { db, server }
    }

    pub fn port(&self) -> u16 {
        self.server.url().rsplit(':').next().unwrap().parse().unwrap()
    }

    pub fn connect(&self, group: &str, client: &str) -> Connect {
        Connect::new(self.port(), group, client)
    }

    pub fn sql(&mut self, text: &str) {
        self.db.sql.batch_execute(text).unwrap();
    }
}

/// The client schema of [`DDL`].
pub fn schema() -> Value {
    json!({"tables": {
        "item": {
            "columns": {
                "id": {"type": "string"}, "n": {"type": "number"}, "label": {"type": "string"},
            },
            "primaryKey": ["id"],
        },
        "other": {
            "columns": {
                "a": {"type": "number"}, "b": {"type": "string"}, "v": {"type": "string"},
            },
            "primaryKey": ["a", "b"],
        },
    }})
}

pub fn items() -> Value {
    json!({"table": "item", "orderBy": [["id", "asc"]]})
}

pub fn others() -> Value {
    json!({"table": "other", "orderBy": [["a", "asc"], ["b", "asc"]]})
}

/// Items with `n` of at least `min`.
pub fn items_from(min: i64) -> Value {
    json!({"table": "item", "orderBy": [["id", "asc"]], "where": {
        "type": "simple", "op": ">=",
        "left": {"type": "column", "name": "n"}, "right": {"type": "literal", "value": min},
    }})
}

pub fn put(hash: &str, ast: &Value) -> Value {
    json!({"op": "put", "hash": hash, "ast": ast})
}

pub fn put_ttl(hash: &str, ast: &Value, ttl: i64) -> Value {
    json!({"op": "put", "hash": hash, "ast": ast, "ttl": ttl})
}

pub fn put_named(hash: &str, name: &str, args: Value) -> Value {
    json!({"op": "put", "hash": hash, "name": name, "args": args})
}

pub fn del(hash: &str) -> Value {
    json!({"op": "del", "hash": hash})
}

/// The body of a first `initConnection`.
pub fn init(patch: &[Value]) -> Value {
    json!({"desiredQueriesPatch": patch, "clientSchema": schema()})
}

/// The body of an `initConnection` of a group that has its schema.
pub fn again(patch: &[Value]) -> Value {
    json!({"desiredQueriesPatch": patch})
}

pub fn change(patch: &[Value]) -> Value {
    json!(["changeDesiredQueries", {"desiredQueriesPatch": patch}])
}
