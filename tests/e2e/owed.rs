//! Rows that follow their metadata (spec: view-syncer-cvr §2.7, checklist 15–17): clients have them
//! before the database of client view records has. Who takes the group over meanwhile waits for
//! them; if their server dies first, the group is lost and its clients start anew. Ours and an
//! original, in both roles.
//!
//! The moment between metadata and rows is made to last: the test holds the group's `rowsVersion`,
//! which whoever writes rows needs first.

use std::collections::BTreeSet;

use postgres::NoTls;
use serde_json::{Value, json};

use crate::hydrate::{DDL, TABLES, expect_all, schema, watch_all};
use crate::interop::{expect_no_reset, original, ours};
use crate::support::client::Clients;
use crate::support::database::Database;
use crate::support::eventually;
use crate::support::proxy::Proxy;
use crate::support::server::Server;

/// A commit that changes more rows than are written with their metadata (100): all comments.
const LARGE: &str = "UPDATE comment SET n = n + 1";

/// What a group watches that the commit touches as a whole, in a few rows, not at all.
fn much() -> Vec<Value> {
    vec![json!({"table": "comment"}), json!({"table": "issue"})]
}

fn little() -> Vec<Value> {
    vec![json!({"table": "comment", "orderBy": [["id", "asc"]], "limit": 5})]
}

fn nothing() -> Vec<Value> {
    vec![json!({"table": "label"}), json!({"table": "issue", "limit": 3})]
}

/// A client, its group and what it watches.
struct Watching {
    client: String,
    group: String,
    queries: Vec<Value>,
}

/// A database, clients that connect through a router, and the groups as the records know them.
struct World {
    db: Database,
    clients: Clients,
    router: Proxy,
    watching: Vec<Watching>,
    /// Groups in the records so far.
    known: BTreeSet<String>,
}

impl World {
    fn new(db: Database, server: &Server) -> World {
        let router = Proxy::start(server.port());
        router.wait_for_target();
        let (clients, watching) = (Clients::start(), Vec::new());
        World { db, clients, router, watching, known: BTreeSet::new() }
    }

    /// A client that connects through the router, and gets everything; the id of its group.
    fn join(&mut self, client: &str, storage: &str, queries: Vec<Value>) -> String {
        let url = format!("http://127.0.0.1:{}", self.router.port);
        self.open(&url, client, storage, queries.clone());
        expect_all(&mut self.clients, client, &queries, &mut self.db);
        let new = self.new_groups();
        // A later tab of a group.
        let of_storage = self.watching.iter().find(|w| w.client.starts_with(storage));
        let group = new.into_iter().next().or(of_storage.map(|w| w.group.clone())).unwrap();
        let client = client.to_owned();
        self.watching.push(Watching { client, group: group.clone(), queries });
        group
    }

    fn open(&mut self, url: &str, client: &str, storage: &str, queries: Vec<Value>) {
        self.clients.open(client, url, storage, &schema());
        watch_all(&mut self.clients, client, &queries);
    }

    fn new_groups(&mut self) -> Vec<String> {
        let sql = r#"SELECT "clientGroupID" FROM "zero_0/cvr"."instances""#;
        let all = self.db.sql.query(sql, &[]).unwrap();
        let all = all.iter().map(|row| row.get::<_, String>(0));
        all.filter(|group| self.known.insert(group.clone())).collect()
    }

    fn expect_everybody(&mut self) {
        for Watching { client, queries, .. } in &self.watching {
            expect_all(&mut self.clients, client, queries, &mut self.db);
        }
    }

    fn write(&mut self, sql: &str) {
        self.db.sql.batch_execute(sql).unwrap();
    }

    /// Version of a group, and of its rows.
    fn versions(&mut self, group: &str) -> (String, String) {
        let sql = r#"SELECT i."version", v."version" FROM "zero_0/cvr"."instances" i
            JOIN "zero_0/cvr"."rowsVersion" v USING ("clientGroupID")
            WHERE "clientGroupID" = $1"#;
        let row = self.db.sql.query_one(sql, &[&group]).unwrap();
        (row.get(0), row.get(1))
    }

    /// Nothing is owed of these groups.
    fn expect_nothing_owed(&mut self, groups: &[&str]) {
        for group in groups {
            eventually("all rows are written", || match self.versions(group) {
                (metadata, rows) if metadata == rows => Ok(()),
                versions => Err(format!("{versions:?}")),
            });
        }
    }

    fn owner(&mut self, group: &str) -> Option<String> {
        let sql = r#"SELECT "owner" FROM "zero_0/cvr"."instances" WHERE "clientGroupID" = $1"#;
        self.db.sql.query_one(sql, &[&group]).unwrap().get(0)
    }

    /// A large commit, of which the rows of this group are owed until the hold is given up.
    /// Everybody has it; nobody else is owed anything.
    fn owe(&mut self, group: &str) -> postgres::Client {
        let groups: BTreeSet<String> = self.watching.iter().map(|w| w.group.clone()).collect();
        let groups: Vec<&str> = groups.iter().map(String::as_str).collect();
        self.expect_nothing_owed(&groups);
        let mut hold = postgres::Client::connect(&self.db.url(), NoTls).unwrap();
        hold.batch_execute("BEGIN").unwrap();
        let lock =
            r#"SELECT FROM "zero_0/cvr"."rowsVersion" WHERE "clientGroupID" = $1 FOR UPDATE"#;
        assert_eq!(hold.execute(lock, &[&group]).unwrap(), 1);
        let (before, _) = self.versions(group);
        self.write(LARGE);
        // No client waits for the rows to be written.
        self.expect_everybody();
        let (metadata, rows) = self.versions(group);
        assert!(metadata > rows && rows == before, "{metadata} {rows}");
        let others: Vec<&str> = groups.into_iter().filter(|other| *other != group).collect();
        self.expect_nothing_owed(&others);
        eventually("the rows are being written", || match self.backends("pid").len() {
            0 => Err("nobody waits for the hold".to_owned()),
            _ => Ok(()),
        });
        hold
    }

    /// `kill -9` while rows of a group are owed: they are never written.
    fn kill(&mut self, server: &mut Server, mut hold: postgres::Client) {
        server.kill();
        // Postgres would finish what it has read.
        self.backends("pg_terminate_backend(pid)");
        eventually("its sessions end", || match self.backends("pid").len() {
            0 => Ok(()),
            n => Err(format!("{n} are left")),
        });
        hold.batch_execute("ROLLBACK").unwrap();
    }

    /// This of all sessions that wait for locks.
    fn backends(&mut self, what: &str) -> Vec<postgres::Row> {
        let sql = format!("SELECT {what} FROM pg_stat_activity WHERE wait_event_type = 'Lock'");
        self.db.sql.query(&sql, &[]).unwrap()
    }

    /// A tab of the group comes to another server while rows are owed: it waits until they are
    /// there. Everybody follows it, and nobody is reset.
    fn take_over(&mut self, storage: &str, to: &Server, mut hold: postgres::Client) {
        let first = self.watching.iter().find(|w| w.client.starts_with(storage)).unwrap();
        let (group, queries) = (first.group.clone(), first.queries.clone());
        let before = self.owner(&group);
        let late = format!("{storage}-late");
        self.router.route(to.port());
        self.open(
            &format!("http://127.0.0.1:{}", self.router.port),
            &late,
            storage,
            queries.clone(),
        );
        // The first attempt to load it tells the former owner.
        eventually("another server wants it", || {
            if self.owner(&group) == before { Err(format!("{before:?}")) } else { Ok(()) }
        });
        let (metadata, rows) = self.versions(&group);
        assert!(metadata > rows, "it was taken over while rows were owed");
        assert!(!self.clients.view(&late, "q0").complete);
        hold.batch_execute("ROLLBACK").unwrap();
        expect_all(&mut self.clients, &late, &queries, &mut self.db);
        self.watching.push(Watching { client: late, group: group.clone(), queries });
        // The former owner hears of it by its next flush; its clients are sent to the new one.
        self.write("UPDATE issue SET title = title || '!' WHERE id = 'i1'");
        self.write(LARGE);
        self.expect_everybody();
        self.expect_nothing_owed(&[&group]);
        assert_ne!(self.owner(&group), before);
        assert!(self.new_groups().is_empty());
    }

    /// The clients of this group, and nobody else, start anew, in a new group; the id of that.
    fn expect_lost(&mut self, group: &str) -> String {
        let of_group = self.watching.iter().filter(|w| w.group == group);
        let want: BTreeSet<String> = of_group.map(|w| w.client.clone()).collect();
        eventually("its clients hear of it", || {
            self.clients.listen();
            let lost: BTreeSet<String> = self.clients.lost.iter().cloned().collect();
            if want.is_subset(&lost) { Ok(()) } else { Err(format!("{lost:?}")) }
        });
        self.expect_everybody();
        let new = self.new_groups();
        assert_eq!(new.len(), 1, "{new:?}");
        for watching in self.watching.iter_mut().filter(|w| w.group == group) {
            watching.group.clone_from(&new[0]);
        }
        self.write("UPDATE issue SET title = title || '?' WHERE id = 'i2'");
        self.write(LARGE);
        self.expect_everybody();
        let lost: BTreeSet<String> = self.clients.lost.drain(..).collect();
        assert_eq!(lost, want, "nobody else");
        new[0].clone()
    }
}

#[test]
fn a_server_killed_between_metadata_and_rows_loses_their_group_only() {
    let db = Database::start(DDL, TABLES);
    let mut server = ours(&db);
    let mut world = World::new(db, &server);
    let much = world.join("much", "much", much());
    // Two tabs, which want different things.
    assert_eq!(world.join("much-2", "much", little()), much);
    world.join("little", "little", little());
    world.join("nothing", "nothing", nothing());
    let hold = world.owe(&much);
    world.kill(&mut server, hold);
    world.write("UPDATE comment SET n = 0 WHERE id = 'c1'; DELETE FROM comment WHERE id = 'c2'");
    server.launch();
    let again = world.expect_lost(&much);
    // What was lost is not touched any more, and the new group is as any other.
    let (metadata, rows) = world.versions(&much);
    assert!(metadata > rows, "{metadata} {rows}");
    let hold = world.owe(&again);
    world.kill(&mut server, hold);
    server.launch();
    world.expect_lost(&again);
}

#[test]
fn who_takes_a_group_over_waits_for_the_rows_that_its_owner_owes() {
    let db = Database::start(DDL, TABLES);
    let (first, second) = (ours(&db), ours(&db));
    let mut world = World::new(db, &first);
    let much = world.join("much", "much", much());
    world.join("little", "little", little());
    let hold = world.owe(&much);
    world.take_over("much", &second, hold);
    expect_no_reset(&world.clients);
}

#[test]
fn an_original_and_we_wait_for_each_others_rows_and_lose_alike_what_is_never_written() {
    let mut db = Database::start(DDL, TABLES);
    // Each has a newer replica than the one before: groups do not go back to an older one.
    let mut first = ours(&db);
    let mut second = original(&mut db, "changes");
    let mut world = World::new(db, &first);
    let waits = world.join("waits", "waits", much());
    world.join("little", "little", little());
    // We owe rows, and the original takes over.
    let hold = world.owe(&waits);
    world.take_over("waits", &second, hold);
    expect_no_reset(&world.clients);
    // We die with what we owe.
    world.router.route(first.port());
    let dies = world.join("dies", "dies", much());
    world.router.route(second.port());
    let hold = world.owe(&dies);
    world.kill(&mut first, hold);
    let dies = world.expect_lost(&dies);
    // The original owes rows, and we take over.
    let third = ours(&world.db);
    let hold = world.owe(&waits);
    world.take_over("waits", &third, hold);
    // It dies with what it owes.
    let hold = world.owe(&dies);
    world.kill(&mut second, hold);
    world.expect_lost(&dies);
}
