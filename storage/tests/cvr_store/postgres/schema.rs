//! The tables are the original's, whether new or migrated, and its rules of versions are kept
//! (conformance checklist 7–9).

use zeroring_net::pg::local_server::LocalServer;
use zeroring_net::pg::{Client, PgConfig};
use zeroring_storage::cvr_store::postgres::{ConnectError, PostgresCvrStore};

use super::lab::{PostgresLab, server};
use crate::lab::{Lab, state, version};

/// Everything of a schema that a dump would show, from the catalogs.
const DESCRIBE: &str = include_str!("catalog.sql");

pub(super) fn describe(client: &mut Client, schema: &str) -> Vec<String> {
    let sql = DESCRIBE.replace("NAME", &format!("\"{schema}\""));
    let rows = client.simple_query(&sql).unwrap().remove(0).rows;
    let lines: Vec<String> = rows.iter().map(|r| r.get::<String>(0).unwrap()).collect();
    assert!(lines.len() > 50, "{lines:?}");
    lines.into_iter().map(|l| l.replace(schema, "SCHEMA")).collect()
}

/// A database of its own, and a lab on it with the names of the dumps.
pub(super) fn database(server: &LocalServer, name: &str) -> PostgresLab {
    let mut lab = PostgresLab::new(server, "zero");
    lab.client().batch_execute(&format!("CREATE DATABASE {name}")).unwrap();
    lab.config.connection = PgConfig::parse(&server.url(name)).unwrap();
    lab
}

fn expect_same(lab: &PostgresLab, original: &PostgresLab, dump: &str) {
    original.client().batch_execute(dump).unwrap();
    let ours = describe(&mut lab.client(), "zero_0/cvr");
    let theirs = describe(&mut original.client(), "zero_0/cvr");
    assert_eq!(ours, theirs);
}

pub(super) fn versions(lab: &PostgresLab) -> Vec<String> {
    let sql = r#"SELECT "dataVersion", "schemaVersion", "minSafeVersion" FROM @."versionHistory""#;
    lab.values(sql).remove(0)
}

#[test]
fn new_tables_are_those_of_the_original() {
    let server = server();
    let (lab, original) = (database(&server, "ours"), database(&server, "theirs"));
    drop(lab.connect("t"));
    expect_same(&lab, &original, include_str!("original_fresh.sql"));
    assert_eq!(versions(&lab), ["17", "17", "1"]);

    // A newer server was here: it may change more, we only say that we ran last.
    let set = |data, schema, min| {
        lab.client()
            .batch_execute(&lab.sql(&format!(
                r#"UPDATE @."versionHistory" SET "dataVersion" = {data},
                   "schemaVersion" = {schema}, "minSafeVersion" = {min}"#
            )))
            .unwrap();
    };
    set(18, 18, 3);
    assert!(!lab.open("t").load("g").stored);
    assert_eq!(versions(&lab), ["17", "18", "3"]);
    set(18, 18, 18);
    let refused = PostgresCvrStore::connect(&lab.config, "t").unwrap_err();
    assert!(matches!(refused, ConnectError::RollbackLimit { limit: 18 }), "{refused}");
    assert_eq!(versions(&lab), ["18", "18", "18"], "nothing was touched");
    set(5, 5, 1);
    let refused = PostgresCvrStore::connect(&lab.config, "t").unwrap_err();
    assert!(matches!(refused, ConnectError::TooOld { found: 5, .. }), "{refused}");
}

#[test]
fn tables_of_version_6_become_what_the_original_makes_of_them() {
    let server = server();
    let (lab, original) = (database(&server, "ours"), database(&server, "theirs"));
    lab.client().batch_execute(include_str!("v6.sql")).unwrap();
    let cvr = lab.open("t").load("g");
    expect_same(&lab, &original, include_str!("original_from_v6.sql"));
    assert_eq!(versions(&lab), ["17", "17", "3"]);
    assert_eq!((&cvr.version, &cvr.replica_version), (&version(5, 1), &Some(state(1))));
    assert_eq!(cvr.profile_id.as_deref(), Some("cgg"));
    assert!(cvr.clients["c"].desired.contains("q"));
    let query = cvr.query(&"q".into()).unwrap();
    assert_eq!(query.client_state["c"].ttl_ms, 300_000.0);
    assert_eq!(lab.open("t").rows(&cvr, &["q"], &[]).unwrap().len(), 1);
}

#[test]
fn servers_that_start_at_once_migrate_once() {
    let server = server();
    for (name, script) in [("fresh", ""), ("six", include_str!("v6.sql"))] {
        let lab = database(&server, name);
        lab.client().batch_execute(script).unwrap();
        std::thread::scope(|scope| {
            for n in 0..6 {
                let lab = &lab;
                scope.spawn(move || drop(lab.connect(&format!("t{n}"))));
            }
        });
        assert_eq!(versions(&lab)[..2], ["17", "17"]);
    }
}
