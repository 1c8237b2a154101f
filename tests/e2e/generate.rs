//! Random queries and transactions over a small schema with colliding keys.

use rand::Rng;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use serde_json::{Value, json};

/// Three tables that join to each other and to themselves over few values. The columns of the
/// composite key are in alphabetical order: that is how clients send a key to the server, and so
/// the order in which it completes an `orderBy`. A client that declares another order may get a
/// window of other rows than it shows, here as with the original.
pub const DDL: &str = "
    CREATE TABLE a (id INT PRIMARY KEY, x INT, y INT, s TEXT, f BOOL);
    CREATE TABLE b (id INT PRIMARY KEY, x INT, y INT, s TEXT, f BOOL);
    CREATE TABLE c (id INT NOT NULL, x INT NOT NULL, y INT, s TEXT, f BOOL, PRIMARY KEY (id, x));
    ALTER TABLE b REPLICA IDENTITY FULL;";

pub const TABLES: &[&str] = &["a", "b", "c"];
/// No text outside the basic plane: the client matches `_` with one UTF-16 unit, Postgres and we
/// with one code point.
const TEXTS: &[&str] = &["", "x", "X", "xy", "é", "中", "100%", "a_b"];

/// The schema as the client knows it: every table is related to every table, over two columns.
pub fn schema() -> Value {
    let mut tables = serde_json::Map::new();
    let mut relationships = serde_json::Map::new();
    for table in TABLES {
        let key = if *table == "c" { json!(["id", "x"]) } else { json!(["id"]) };
        tables.insert(
            (*table).to_owned(),
            json!({"columns": {"id": "number", "x": "number", "y": "number", "s": "string",
                "f": "boolean"}, "primaryKey": key}),
        );
        let mut edges = serde_json::Map::new();
        for other in TABLES {
            for (name, source, dest) in [("xx", "x", "x"), ("yx", "y", "x"), ("ix", "id", "y")] {
                edges.insert(
                    format!("{other}_{name}"),
                    json!([{"sourceField": [source], "destField": [dest], "destTable": other}]),
                );
            }
        }
        relationships.insert((*table).to_owned(), Value::Object(edges));
    }
    json!({"tables": tables, "relationships": relationships})
}

/// Random specs and statements.
pub struct Generator {
    pub rng: StdRng,
}

impl Generator {
    pub fn query(&mut self) -> Value {
        let table = *TABLES.choose(&mut self.rng).unwrap_or(&"a");
        let mut spec = self.spec(2, true);
        spec["table"] = json!(table);
        spec
    }

    fn relationship(&mut self) -> String {
        let other = TABLES.choose(&mut self.rng).unwrap_or(&"a");
        let edge = ["xx", "yx", "ix"].choose(&mut self.rng).unwrap_or(&"xx");
        format!("{other}_{edge}")
    }

    /// Body of a query node. `ordered`: order, limit and start are allowed.
    fn spec(&mut self, depth: u32, ordered: bool) -> Value {
        let mut spec = json!({});
        if self.rng.random_bool(0.7) {
            spec["where"] = self.condition(depth, 2);
        }
        if ordered && depth > 0 && self.rng.random_bool(0.5) {
            let related: Vec<Value> = (0..self.rng.random_range(1..=2))
                .map(|_| json!({"rel": self.relationship(), "spec": self.spec(depth - 1, true)}))
                .collect();
            // The last definition of a relationship wins in the original: name each once.
            let unique = related
                .iter()
                .enumerate()
                .all(|(i, r)| related[..i].iter().all(|other| other["rel"] != r["rel"]));
            if unique {
                spec["related"] = Value::Array(related);
            }
        }
        if ordered && self.rng.random_bool(0.5) {
            let column = *["x", "y", "s", "f"].choose(&mut self.rng).unwrap_or(&"x");
            let direction = if self.rng.random() { "asc" } else { "desc" };
            spec["orderBy"] = json!([[column, direction]]);
            if self.rng.random_bool(0.3) {
                let value = self.value(column);
                spec["start"] =
                    json!({"row": {column: value}, "inclusive": self.rng.random::<bool>()});
            }
        }
        if ordered && self.rng.random_bool(0.5) {
            spec["limit"] = json!(self.rng.random_range(1..5));
        }
        spec
    }

    fn value(&mut self, column: &str) -> Value {
        if self.rng.random_bool(0.15) {
            return Value::Null;
        }
        match column {
            "s" => json!(TEXTS.choose(&mut self.rng)),
            "f" => json!(self.rng.random::<bool>()),
            _ => json!(self.rng.random_range(0..5)),
        }
    }

    fn condition(&mut self, depth: u32, width: u32) -> Value {
        let pick = self.rng.random_range(0..10);
        if width > 0 && pick < 4 {
            let word = if pick < 2 { "and" } else { "or" };
            let parts: Vec<Value> = (0..self.rng.random_range(2..=3))
                .map(|_| self.condition(depth, width - 1))
                .collect();
            return json!({word: parts});
        }
        if depth > 0 && pick < 7 {
            // No `flip` hint: the client obeys it too, and its own engine loses rows or fails an
            // assertion ("node does not exist") for a flipped EXISTS inside an OR.
            return json!({"exists": self.relationship(), "spec": self.spec(depth - 1, false)});
        }
        self.comparison()
    }

    fn comparison(&mut self) -> Value {
        let column = *["id", "x", "y", "s", "f"].choose(&mut self.rng).unwrap_or(&"x");
        let op = match column {
            "s" => {
                ["=", "!=", "<", ">=", "IS", "IS NOT", "IN", "NOT IN", "LIKE", "NOT LIKE", "ILIKE"]
                    .choose(&mut self.rng)
            }
            "f" => ["=", "!=", "IS", "IS NOT"].choose(&mut self.rng),
            _ => ["=", "!=", "<", ">", "<=", ">=", "IS", "IS NOT", "IN", "NOT IN"]
                .choose(&mut self.rng),
        }
        .copied()
        .unwrap_or("=");
        let right = match op {
            "IN" | "NOT IN" => {
                let n = self.rng.random_range(0..4);
                let list: Vec<Value> =
                    (0..n).map(|_| self.value(column)).filter(|v| !v.is_null()).collect();
                json!(list)
            }
            "LIKE" | "NOT LIKE" | "ILIKE" => {
                json!(["%x%", "x_", "_", "%", "X%", "100\\%", "a\\_b", "é"].choose(&mut self.rng))
            }
            "IS" | "IS NOT" => self.value(column),
            _ => match self.value(column) {
                Value::Null => json!(if column == "f" {
                    json!(true)
                } else if column == "s" {
                    json!("x")
                } else {
                    json!(1)
                }),
                value => value,
            },
        };
        json!({"cmp": [column, op, right]})
    }

    /// A transaction of one to six statements.
    pub fn transaction(&mut self) -> String {
        let n = self.rng.random_range(1..=6);
        let statements: Vec<String> = (0..n).map(|_| self.statement()).collect();
        format!("BEGIN; {}; COMMIT", statements.join("; "))
    }

    fn statement(&mut self) -> String {
        let table = *TABLES.choose(&mut self.rng).unwrap_or(&"a");
        let id = self.rng.random_range(0..9);
        let conflict = if table == "c" { "id, x" } else { "id" };
        match self.rng.random_range(0..20) {
            0..8 => format!(
                "INSERT INTO {table} (id, x, y, s, f) VALUES ({id}, {}, {}, {}, {})
                 ON CONFLICT ({conflict}) DO UPDATE SET y = excluded.y, s = excluded.s",
                self.rng.random_range(0..4),
                self.sql("y"),
                self.sql("s"),
                self.sql("f"),
            ),
            8..14 => {
                let columns: &[&str] =
                    if table == "c" { &["y", "s", "f"] } else { &["x", "y", "s", "f"] };
                let column = *columns.choose(&mut self.rng).unwrap_or(&"y");
                format!("UPDATE {table} SET {column} = {} WHERE id = {id}", self.sql(column))
            }
            14..17 => format!("DELETE FROM {table} WHERE id = {id}"),
            17 => format!(
                "UPDATE {table} SET id = id + 20 WHERE id = {id} AND NOT EXISTS (SELECT 1 FROM {table} o WHERE o.id = {})",
                id + 20
            ),
            18 => format!("DELETE FROM {table} WHERE y = {}", self.rng.random_range(0..5)),
            _ => format!("UPDATE {table} SET y = {} WHERE y IS NULL", self.sql("y")),
        }
    }

    fn sql(&mut self, column: &str) -> String {
        match self.value(column) {
            Value::String(s) => format!("'{s}'"),
            other => other.to_string(),
        }
    }
}
