//! What the real client makes of rows that go out before their results are durable: it shows them
//! when their poke ends, forgets them when it is cancelled or torn, and ends with what Postgres has.

use postgres::NoTls;
use serde_json::json;
use zeroring_net::pg::local_server::LocalServer;

use crate::hydrate::{DDL, TABLES, schema};
use crate::support::client::Clients;
use crate::support::database::Database;
use crate::support::oracle::expected_view;
use crate::support::server::{Server, is_original};

/// More than goes out early at first.
const ROWS: usize = 15_000;
const LOCK: i64 = 4711;

struct Early {
    db: Database,
    /// Of the client view records.
    records: LocalServer,
    server: Server,
    clients: Clients,
}

impl Early {
    /// Two tabs of one browser; before results of queries on issues are stored, `what` happens.
    fn new(what: &str) -> Early {
        let mut db = Database::start(DDL, TABLES);
        let more = format!(
            "INSERT INTO issue SELECT 'r' || g, 'row ' || g, true, 1, 'u' FROM generate_series(1, {ROWS}) g"
        );
        db.sql.batch_execute(&more).unwrap();
        let records = LocalServer::start(&["fsync=off"]).unwrap();
        let server = Server::start(&db.url(), &[("ZERO_CVR_DB", &records.url("postgres"))]);
        let mut clients = Clients::start();
        for tab in ["a", "b"] {
            clients.open(tab, &server.url(), "s", &schema());
            clients.watch(tab, "labels", &json!({"table": "label"}));
            clients.expect_view(
                tab,
                "labels",
                &expected_view(&mut db.sql, &schema(), &json!({"table": "label"})),
            );
        }
        let trigger = format!(
            r#"CREATE SEQUENCE attempt;
               CREATE FUNCTION before_results() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
                 IF NEW."clientAST"->>'table' = 'issue' AND NEW."transformationHash" IS NOT NULL
                 THEN {what} END IF;
                 RETURN NEW;
               END $$;
               CREATE TRIGGER before_results BEFORE INSERT OR UPDATE ON "zero_0/cvr"."queries"
                 FOR EACH ROW EXECUTE FUNCTION before_results()"#
        );
        let early = Early { db, records, server, clients };
        early.connect().batch_execute(&trigger).unwrap();
        early
    }

    fn connect(&self) -> postgres::Client {
        postgres::Client::connect(&self.records.url("postgres"), NoTls).unwrap()
    }

    fn watch_issues(&mut self) {
        for tab in ["a", "b"] {
            self.clients.watch(tab, "issues", &json!({"table": "issue"}));
        }
    }

    /// Both tabs have what Postgres has, then and after a write.
    fn expect_all(&mut self) {
        for write in
            ["", "UPDATE issue SET title = 'x' WHERE id = 'r7'; DELETE FROM issue WHERE id = 'r8'"]
        {
            self.db.sql.batch_execute(write).unwrap();
            let want = expected_view(&mut self.db.sql, &schema(), &json!({"table": "issue"}));
            for tab in ["a", "b"] {
                self.clients.expect_view(tab, "issues", &want);
            }
        }
    }
}

#[test]
fn a_cancelled_poke_leaves_nothing_behind_and_nothing_is_missing() {
    if is_original() {
        // 1.9.0 leaves the poke of the other tab open.
        return;
    }
    let mut early =
        Early::new("IF nextval('public.attempt') <= 2 THEN RAISE EXCEPTION 'not now'; END IF;");
    early.watch_issues();
    early.expect_all();
    let attempts = early.connect().query_one("SELECT last_value FROM attempt", &[]).unwrap();
    assert!(attempts.get::<_, i64>(0) > 2, "the results were refused before they were taken");
}

#[test]
fn a_poke_torn_by_a_crash_leaves_nothing_behind_and_nothing_is_missing() {
    let mut early = Early::new(&format!("PERFORM pg_advisory_xact_lock({LOCK});"));
    let mut holder = early.connect();
    holder.execute("SELECT pg_advisory_lock($1)", &[&LOCK]).unwrap();
    early.watch_issues();
    let waits = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted";
    crate::support::eventually("the results are about to be stored", || {
        match holder.query_one(waits, &[]).map_err(|e| e.to_string())?.get::<_, i64>(0) {
            0 => Err("not yet".to_owned()),
            _ => Ok(()),
        }
    });
    early.server.kill();
    // Nor is anything stored afterwards by what still waits.
    let stop = "SELECT count(pg_terminate_backend(pid)) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted";
    crate::support::eventually("nobody waits", || {
        match holder.query_one(stop, &[]).map_err(|e| e.to_string())?.get::<_, i64>(0) {
            0 => Ok(()),
            _ => Err("not yet".to_owned()),
        }
    });
    holder.execute("SELECT pg_advisory_unlock($1)", &[&LOCK]).unwrap();
    early.server.launch();
    early.expect_all();
}
