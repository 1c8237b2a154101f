//! Rows of a large query are on their way before its results are durable; what they belong to
//! counts from its `pokeEnd` on, and is taken back if it cannot be stored
//! (spec: sync-protocol §4.5; view-syncer-cvr traps T9, T33).

use std::collections::BTreeSet;
use std::time::Duration;

use postgres::NoTls;
use serde_json::{Value, json};
use zeroring_net::pg::local_server::LocalServer;

use crate::socket::Socket;
use crate::support::server::is_original;
use crate::world::{DDL, World, change, init, items, put};

/// More than goes out early at first.
const ROWS: usize = 25_000;

/// A server with client view records in a database of their own.
struct Early {
    world: World,
    records: LocalServer,
}

fn world() -> Early {
    let records = LocalServer::start(&["fsync=off"]).unwrap();
    let more =
        format!("INSERT INTO item SELECT 'r' || g, g, 'x' FROM generate_series(4, {ROWS}) g");
    let env = [("ZERO_CVR_DB", &*records.url("postgres"))];
    let world = World::with(&format!("{DDL} {more}"), &["item", "other"], &env);
    Early { world, records }
}

fn connect(records: &LocalServer) -> postgres::Client {
    postgres::Client::connect(&records.url("postgres"), NoTls).unwrap()
}

/// The first client of group `g`; it has nothing yet.
fn joined(world: &World) -> Socket {
    let mut socket = world.connect("g", "c").init(init(&[])).connected();
    // Its configuration, then last mutation ids.
    socket.poke();
    socket.poke();
    socket
}

/// Whenever results of the query `q` are stored, `what` happens first.
fn before_results(records: &mut postgres::Client, what: &str) {
    let trigger = format!(
        r#"CREATE FUNCTION before_results() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
             IF NEW."queryHash" = 'q' AND NEW."transformationHash" IS NOT NULL THEN {what} END IF;
             RETURN NEW;
           END $$;
           CREATE TRIGGER before_results BEFORE INSERT OR UPDATE ON "zero_0/cvr"."queries"
             FOR EACH ROW EXECUTE FUNCTION before_results()"#
    );
    records.batch_execute(&trigger).unwrap();
}

/// Reads until the client is told that the query is desired; the cookie then.
fn desires(socket: &mut Socket) -> String {
    loop {
        let poke = socket.poke();
        if poke.desired.values().flatten().any(|q| q == "+q") {
            return poke.cookie;
        }
    }
}

/// The next message of a poke; everything else is skipped.
fn of_poke(socket: &mut Socket) -> (String, Value) {
    loop {
        let frame = socket.frame();
        let kind = frame[0].as_str().unwrap();
        assert_ne!(kind, "error", "{frame}");
        if kind.starts_with("poke") {
            return (kind.to_owned(), frame[1].clone());
        }
    }
}

/// Reads a poke, which has begun, until so many rows were put; their ids.
fn rows(socket: &mut Socket, at_least: usize) -> BTreeSet<String> {
    let mut ids = BTreeSet::new();
    while ids.len() < at_least {
        let (kind, body) = of_poke(socket);
        assert_eq!(kind, "pokePart", "{body}");
        for op in body["rowsPatch"].as_array().into_iter().flatten() {
            assert_eq!(op["op"], "put");
            let is_new = ids.insert(op["value"]["id"].as_str().unwrap().to_owned());
            assert!(is_new, "sent twice: {op}");
        }
    }
    ids
}

#[test]
fn rows_of_a_large_query_come_before_its_results_are_durable() {
    let Early { world, records } = &mut world();
    let mut socket = joined(world);
    let mut holder = connect(records);
    // Nothing of the query can be stored before the gate is open.
    holder.batch_execute("CREATE TABLE gate ()").unwrap();
    before_results(
        &mut holder,
        "LOOP EXIT WHEN EXISTS (SELECT FROM public.gate); PERFORM pg_sleep(0.01); END LOOP;",
    );
    socket.send(&change(&[put("q", &items())]));
    let base = desires(&mut socket);
    let (kind, start) = of_poke(&mut socket);
    assert_eq!((&*kind, &start["baseCookie"]), ("pokeStart", &json!(base)));
    let mut ids = rows(&mut socket, 10_000);
    let stored = holder.query_one(r#"SELECT "version" FROM "zero_0/cvr"."instances""#, &[]);
    assert_eq!(stored.unwrap().get::<_, String>(0), base);

    holder.batch_execute("INSERT INTO gate DEFAULT VALUES").unwrap();
    ids.extend(rows(&mut socket, ROWS - ids.len()));
    assert_eq!(ids.len(), ROWS);
    let end = loop {
        let (kind, body) = of_poke(&mut socket);
        if kind == "pokeEnd" {
            break body;
        }
        assert!(body["rowsPatch"].is_null(), "{body}");
    };
    assert!(end["cancel"].is_null() && end["cookie"].as_str().unwrap() > &*base, "{end}");
    socket.cookie = Some(end["cookie"].as_str().unwrap().to_owned());
    world.sql("UPDATE item SET n = 0 WHERE id = 'i1'");
    assert_eq!(socket.poke().puts("item").len(), 1, "it goes on from there");
}

#[test]
fn rows_whose_results_cannot_be_stored_are_taken_back_and_come_again() {
    if is_original() {
        // 1.9.0 leaves the poke of the other client open (trap T33).
        return;
    }
    let Early { world, records } = &world();
    let mut asking = joined(world);
    let mut other = world.connect("g", "d").init(init(&[])).connected();
    other.poke();
    let mut records = connect(records);
    records.batch_execute("CREATE SEQUENCE attempt").unwrap();
    before_results(
        &mut records,
        "IF nextval('public.attempt') = 1 THEN RAISE EXCEPTION 'not now'; END IF;",
    );
    asking.send(&change(&[put("q", &items())]));
    let base = desires(&mut other);
    let (kind, _) = of_poke(&mut other);
    assert_eq!(kind, "pokeStart");
    rows(&mut other, 10_000);
    let end = loop {
        let (kind, body) = of_poke(&mut other);
        if kind == "pokeEnd" {
            break body;
        }
    };
    assert_eq!((&end["cancel"], &end["cookie"]), (&json!(true), &json!("")));
    // It is where it was, and gets everything from there.
    let poke = other.poke_within(Duration::from_secs(60)).unwrap();
    assert_eq!((poke.base.as_deref(), poke.puts("item").len()), (Some(&*base), ROWS));
    assert_eq!(poke.got, ["+q"]);
    // The client that asked has to ask again.
    assert_eq!(asking.error_frame()["kind"], "Rehome");
}
