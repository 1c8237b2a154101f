//! Clients of one group come, go, crash and change their minds while the database changes: each
//! must end with the rows of the queries that it has been told are there, by an unbroken chain of
//! cookies. `ZERORING_WIRE_SEED` repeats a run, `ZERORING_WIRE_STEPS` makes it longer.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::{Value, json};

use crate::socket::{PATIENCE, Poke, Socket};
use crate::support::database::Database;
use crate::support::server::is_original;
use crate::world::{World, change, del, init, items, items_from, others};

const STEPS: usize = 150;
/// Steps between two comparisons.
const ROUND: usize = 25;
const CLIENTS: usize = 4;
/// How long a client looks for a poke that may not come.
const GLANCE: Duration = Duration::from_millis(2);

/// A query: its hash, its AST, and the rows that it holds, for PostgreSQL.
fn queries() -> Vec<(String, Value, String)> {
    let item = "SELECT 'item', to_jsonb(t) FROM item t";
    let mut all = vec![
        ("others".to_owned(), others(), "SELECT 'other', to_jsonb(t) FROM other t".to_owned()),
        ("items".to_owned(), items(), item.to_owned()),
    ];
    for min in [3, 6] {
        all.push((format!("from{min}"), items_from(min), format!("{item} WHERE n >= {min}")));
    }
    for limit in [1, 4] {
        let ast =
            json!({"table": "item", "orderBy": [["n", "desc"], ["id", "asc"]], "limit": limit});
        let sql = format!("({item} ORDER BY n DESC NULLS LAST, id COLLATE \"C\" LIMIT {limit})");
        all.push((format!("top{limit}"), ast, sql));
    }
    let correlation = json!({"parentField": ["id"], "childField": ["b"]});
    let child = json!({"table": "other", "alias": "o", "orderBy": [["a", "asc"], ["b", "asc"]]});
    let related = json!([{"correlation": correlation, "subquery": child}]);
    all.push((
        "related".to_owned(),
        json!({"table": "item", "orderBy": [["id", "asc"]], "related": related}),
        format!(
            "{item} UNION ALL SELECT 'other', to_jsonb(o) FROM other o, item i WHERE o.b = i.id"
        ),
    ));
    all
}

/// What a real client would keep.
#[derive(Default)]
struct Client {
    id: String,
    cookie: Option<String>,
    socket: Option<Socket>,
    wants: BTreeSet<String>,
    got: BTreeSet<String>,
    rows: BTreeMap<String, Value>,
}

impl Client {
    fn absorb(&mut self, poke: Poke) {
        for op in &poke.got {
            match &op[..1] {
                "+" => self.got.insert(op[1..].to_owned()),
                _ => self.got.remove(&op[1..]),
            };
        }
        for op in &poke.rows {
            let table = op["tableName"].as_str().unwrap();
            let row = if op["op"] == "put" { &op["value"] } else { &op["id"] };
            let key = key(table, row);
            if op["op"] == "put" {
                self.rows.insert(key, row.clone());
            } else {
                self.rows.remove(&key);
            }
        }
        self.cookie = Some(poke.cookie);
    }

    fn send(&mut self, message: &Value) {
        self.socket.as_mut().unwrap().send(message);
    }
}

fn key(table: &str, row: &Value) -> String {
    match table {
        "item" => format!("item {}", row["id"]),
        _ => format!("other {} {}", row["a"], row["b"]),
    }
}

/// The rows of these queries now.
fn rows_of(db: &mut Database, got: &BTreeSet<String>) -> BTreeMap<String, Value> {
    let mut rows = BTreeMap::new();
    for (_, _, sql) in queries().iter().filter(|(hash, ..)| got.contains(hash)) {
        let sql = format!("SELECT q.t, q.j::text FROM ({sql}) AS q(t, j)");
        for row in db.sql.query(&sql, &[]).unwrap() {
            let table: String = row.get(0);
            let value: Value = serde_json::from_str(row.get(1)).unwrap();
            rows.insert(key(&table, &value), value);
        }
    }
    rows
}

struct Run {
    world: World,
    rng: StdRng,
    clients: Vec<Client>,
    born: usize,
}

impl Run {
    fn pick(&mut self, n: usize) -> usize {
        self.rng.random_range(0..n)
    }

    fn write(&mut self) {
        let (id, n) = (self.pick(9), self.pick(10));
        let sql = match self.pick(8) {
            0 => format!("INSERT INTO item VALUES ('i{id}', {n}, NULL) ON CONFLICT DO NOTHING"),
            1 => format!("DELETE FROM item WHERE id = 'i{id}'"),
            2 => format!("UPDATE item SET n = {n} WHERE id <= 'i{id}'"),
            3 => format!("UPDATE item SET label = label || '{n}' WHERE id = 'i{id}'"),
            4 => format!("UPDATE item SET id = 'k' || id WHERE id = 'i{id}'"),
            5 => format!("INSERT INTO other VALUES ({n}, 'i{id}', 'v') ON CONFLICT DO NOTHING"),
            6 => {
                format!("UPDATE other SET v = v || '{n}', b = 'i{n}' WHERE a = {n} AND b = 'i{id}'")
            }
            _ => format!("DELETE FROM other WHERE a < {n} AND b = 'i{id}'"),
        };
        // A write may violate a key: then nothing happened.
        let _ = self.world.db.sql.batch_execute(&sql);
    }

    /// A change of what a client wants.
    fn patch(&mut self, at: usize) -> Vec<Value> {
        let all = queries();
        let mut patch = Vec::new();
        for _ in 0..=self.pick(2) {
            let (hash, ast, _) = &all[self.pick(all.len())];
            match self.pick(6) {
                0 => {
                    patch.push(json!({"op": "clear"}));
                    self.clients[at].wants.clear();
                }
                1 | 2 => {
                    patch.push(del(hash));
                    self.clients[at].wants.remove(hash);
                }
                _ => {
                    let ttl = [0, 60_000][self.pick(2)];
                    patch.push(json!({"op": "put", "hash": hash, "ast": ast, "ttl": ttl}));
                    self.clients[at].wants.insert(hash.clone());
                }
            }
        }
        patch
    }

    fn connect(&mut self, at: usize) {
        let client = &mut self.clients[at];
        // Whether its last messages arrived it cannot know: it says all again.
        let patch: Vec<Value> = queries()
            .iter()
            .map(|(hash, ast, _)| match client.wants.contains(hash) {
                true => crate::world::put_ttl(hash, ast, 60_000),
                false => del(hash),
            })
            .collect();
        let connect = self.world.connect("g", &client.id);
        let connect = connect.cookie(client.cookie.as_deref().unwrap_or_default());
        client.socket = Some(connect.init(init(&patch)).connected());
    }

    fn newcomer(&mut self) -> Client {
        self.born += 1;
        Client { id: format!("c{}", self.born), ..Client::default() }
    }

    fn step(&mut self) {
        let at = self.pick(CLIENTS);
        match self.pick(12) {
            0..5 => self.write(),
            5..8 if self.clients[at].socket.is_some() => {
                let patch = self.patch(at);
                self.clients[at].send(&change(&patch));
            }
            8 if self.clients[at].socket.is_some() => {
                let client = &mut self.clients[at];
                let poke = client.socket.as_mut().unwrap().poke_within(GLANCE);
                poke.into_iter().for_each(|poke| client.absorb(poke));
            }
            // Gone without a word, with whatever it did not read.
            9 => self.clients[at].socket = None,
            10 if self.clients[at].socket.is_none() => {
                // Never to come back: another client says so, and a new one takes its place.
                let gone = self.clients[at].id.clone();
                if let Some(other) = self.clients.iter_mut().find(|c| c.socket.is_some()) {
                    other.send(&json!(["deleteClients", {"clientIDs": [gone]}]));
                }
                self.clients[at] = self.newcomer();
            }
            _ if self.clients[at].socket.is_none() => self.connect(at),
            _ => {}
        }
    }

    /// Everybody is there and reads until all is as it should be.
    fn compare(&mut self) {
        for at in 0..CLIENTS {
            if self.clients[at].socket.is_none() {
                self.connect(at);
            }
        }
        for at in 0..CLIENTS {
            loop {
                let client = &self.clients[at];
                let want = rows_of(&mut self.world.db, &client.got);
                if client.wants.is_subset(&client.got) && client.rows == want {
                    break;
                }
                let client = &mut self.clients[at];
                match client.socket.as_mut().unwrap().poke_within(PATIENCE) {
                    Some(poke) => client.absorb(poke),
                    None => panic!(
                        "{} stays behind at {:?}\nwants {:?}, has {:?}\nrows {:#?}\nwant {want:#?}",
                        client.id, client.cookie, client.wants, client.got, client.rows
                    ),
                }
            }
        }
    }
}

#[test]
fn clients_that_come_and_go_end_with_the_right_rows() {
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse().unwrap());
    let seed: u64 = number("ZERORING_WIRE_SEED").unwrap_or_else(rand::random);
    let steps = number("ZERORING_WIRE_STEPS").map_or(STEPS, |n| n as usize);
    println!("ZERORING_WIRE_SEED={seed}");
    let world = World::new(&[]);
    let mut run = Run { world, rng: StdRng::seed_from_u64(seed), clients: Vec::new(), born: 0 };
    for _ in 0..CLIENTS {
        let client = run.newcomer();
        run.clients.push(client);
    }
    for step in 1..=steps {
        run.step();
        if step % ROUND == 0 {
            run.compare();
        }
        if step % (2 * ROUND) == 0 && !is_original() {
            // What was told was durable.
            run.world.server.kill();
            run.clients.iter_mut().for_each(|client| client.socket = None);
            run.write();
            run.world.server.launch();
        }
    }
    run.compare();
}
