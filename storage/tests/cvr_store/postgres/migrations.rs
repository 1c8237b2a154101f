//! Every version from 6 on becomes ours, and so does a schema that an older server used in between
//! (spec: view-syncer-cvr §2.2; conformance checklist 7, 8). The steps are written down here once
//! more: a schema of a version in the middle is not made by the code that is tested.

use zeroring_core::cvr::TtlClock;

use super::lab::{PostgresLab, server};
use super::schema::{database, describe, versions};
use crate::lab::{Lab, state, version};

/// What leads to each version.
const STEPS: [(u32, &str); 10] = [
    (
        7,
        r#"ALTER TABLE @."desires" ADD "expiresAt" TIMESTAMPTZ, ADD "inactivatedAt" TIMESTAMPTZ,
             ADD "ttl" INTERVAL;
           CREATE INDEX "desires_expires_at" ON @."desires" ("expiresAt");
           CREATE INDEX "desires_inactivated_at" ON @."desires" ("inactivatedAt");
           UPDATE @."desires" SET "ttl" = '7 minutes';"#,
    ),
    (8, r#"ALTER TABLE @."desires" DROP CONSTRAINT "fk_desires_client""#),
    (9, r#"ALTER TABLE @."instances" ADD "clientSchema" JSONB"#),
    (
        10,
        r#"ALTER TABLE @."queries" ADD "queryName" TEXT, ADD "queryArgs" JSONB;
           ALTER TABLE @."queries" ALTER "clientAST" DROP NOT NULL;
           INSERT INTO @."queries" ("clientGroupID", "queryHash", "queryName", "queryArgs")
             VALUES ('g', 'named', 'n', '[1,  true]')"#,
    ),
    (
        11,
        r#"DROP INDEX @."desires_expires_at"; ALTER TABLE @."desires" DROP "expiresAt";
           DROP INDEX @."client_patch_version";
           ALTER TABLE @."clients" DROP "patchVersion", DROP "deleted""#,
    ),
    (12, r#"ALTER TABLE @."queries" ALTER "queryArgs" TYPE JSON USING "queryArgs"::json"#),
    (13, r#"ALTER TABLE @."instances" ADD "ttlClock" DOUBLE PRECISION NOT NULL DEFAULT 0"#),
    (
        14,
        r#"CREATE INDEX "instances_last_active" ON @."instances" ("lastActive");
           ALTER TABLE @."clients" DROP CONSTRAINT "fk_clients_client_group",
             ADD CONSTRAINT "fk_clients_client_group" FOREIGN KEY ("clientGroupID")
             REFERENCES @."instances" ("clientGroupID") ON DELETE CASCADE;
           ALTER TABLE @."queries" DROP CONSTRAINT "fk_queries_client_group",
             ADD CONSTRAINT "fk_queries_client_group" FOREIGN KEY ("clientGroupID")
             REFERENCES @."instances" ("clientGroupID") ON DELETE CASCADE;
           ALTER TABLE @."rows" ADD CONSTRAINT "fk_rows_client_group" FOREIGN KEY ("clientGroupID")
             REFERENCES @."rowsVersion" ("clientGroupID") ON DELETE CASCADE"#,
    ),
    (
        15,
        r#"ALTER TABLE @."desires" ADD "inactivatedAtMs" DOUBLE PRECISION,
             ADD "ttlMs" DOUBLE PRECISION;
           UPDATE @."desires" SET "ttlMs" = extract(epoch FROM "ttl") * 1000"#,
    ),
    (
        16,
        r#"ALTER TABLE @."instances" ADD "profileID" TEXT, ADD "deleted" BOOL DEFAULT FALSE;
           DROP INDEX @."instances_last_active";
           CREATE INDEX "instances_last_active" ON @."instances" ("lastActive") WHERE NOT "deleted";
           CREATE INDEX "tombstones_last_active" ON @."instances" ("lastActive") WHERE "deleted";
           CREATE INDEX "profile_ids_last_active" ON @."instances" ("lastActive", "profileID")
             WHERE "profileID" IS NOT NULL;
           UPDATE @."instances" SET "profileID" = 'cgg'"#,
    ),
];

/// The contents of `v6.sql`, and what the steps added, are there.
fn expect_contents(lab: &PostgresLab, from: u32) {
    let store = lab.open("t");
    let cvr = store.load("g");
    assert_eq!((&cvr.version, &cvr.replica_version), (&version(5, 1), &Some(state(1))));
    assert_eq!((cvr.profile_id.as_deref(), cvr.ttl_clock), (Some("cgg"), TtlClock(0.0)));
    assert!(cvr.clients["c"].desired.contains("q"));
    let ttl_ms = cvr.query(&"q".into()).unwrap().client_state["c"].ttl_ms;
    assert_eq!(ttl_ms, if from < 7 { 300_000.0 } else { 420_000.0 }, "from {from}");
    assert_eq!(cvr.query(&"named".into()).is_some(), from >= 10);
    assert_eq!(store.rows(&cvr, &["q"], &[]).unwrap().len(), 1);
}

#[test]
fn every_version_from_6_on_becomes_what_the_original_makes_of_the_oldest() {
    let server = server();
    let original = database(&server, "theirs");
    original.client().batch_execute(include_str!("original_from_v6.sql")).unwrap();
    let wanted = describe(&mut original.client(), "zero_0/cvr");
    for from in 6..17 {
        let lab = database(&server, &format!("v{from}"));
        let mut client = lab.client();
        client.batch_execute(include_str!("v6.sql")).unwrap();
        for (_, step) in STEPS.iter().filter(|(to, _)| *to <= from) {
            client.batch_execute(&lab.sql(step)).unwrap();
        }
        let set = format!(
            r#"UPDATE @."versionHistory" SET "dataVersion" = {from}, "schemaVersion" = {from}"#
        );
        client.batch_execute(&lab.sql(&set)).unwrap();
        expect_contents(&lab, from);
        assert_eq!(describe(&mut client, "zero_0/cvr"), wanted, "from version {from}");
        assert_eq!(versions(&lab), ["17", "17", "3"]);
    }
}

/// An older server ran for a while on the tables of ours, and wrote what it knows.
#[test]
fn after_an_older_server_its_contents_are_brought_up_and_nothing_is_defined_again() {
    let server = server();
    let lab = database(&server, "back");
    let mut client = lab.client();
    client.batch_execute(include_str!("v6.sql")).unwrap();
    drop(lab.connect("t"));
    let wanted = describe(&mut client, "zero_0/cvr");
    for older in 6..17 {
        let wrote = format!(
            r#"UPDATE @."versionHistory" SET "dataVersion" = {older};
               UPDATE @."instances" SET "profileID" = NULL;
               UPDATE @."desires" SET "ttlMs" = NULL, "ttl" = '7 minutes'"#
        );
        client.batch_execute(&lab.sql(&wrote)).unwrap();
        let cvr = lab.open("t").load("g");
        assert_eq!(describe(&mut client, "zero_0/cvr"), wanted, "after version {older}");
        assert_eq!(versions(&lab), ["17", "17", "3"]);
        let ttl_ms = cvr.query(&"q".into()).unwrap().client_state["c"].ttl_ms;
        let is_brought_up = (cvr.profile_id.is_some(), ttl_ms == 420_000.0);
        assert_eq!(is_brought_up, (older < 16, older < 15), "after version {older}");
    }
}
