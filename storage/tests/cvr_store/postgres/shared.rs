//! What other servers on the database see, and what they do to us (conformance checklist 11–20,
//! 63).

use std::sync::mpsc::channel;

use zeroring_core::cvr::store::{CvrStoreError, DesireWrite};
use zeroring_core::cvr::{ConfigUpdater, FlushTimes, GroupFlush, QueryUpdater, TtlClock};
use zeroring_core::version::CvrVersion;
use zeroring_storage::cvr_store::PurgeLimits;

use super::lab::{PostgresLab, server};
use crate::lab::*;
use crate::suite::{at_connect, custom, entering, execute, group, large, legacy};

#[test]
fn records_are_encoded_as_the_original_does() {
    let postgres = server();
    let lab = PostgresLab::new(&postgres, "encoding");
    let store = lab.open("task");
    let mut updater = ConfigUpdater::new(&store.load("g"));
    updater.ensure_client(&"c".into(), &shard());
    updater.put_desired(&"c".into(), &[custom("q"), legacy("ast")]).unwrap();
    let at = FlushTimes { connect_ms: 1_500.0, now_ms: 2_250.7, ttl_clock: TtlClock(1.5) };
    let cvr = store.commit(updater.finish(at));

    let instance = r#"SELECT "version", "lastActive" AT TIME ZONE 'UTC', "ttlClock",
        "replicaVersion", "owner", "grantedAt" AT TIME ZONE 'UTC', "clientSchema", "profileID",
        "deleted" FROM @."instances""#;
    let times = ["1970-01-01 00:00:02.25", "1970-01-01 00:00:01.5"];
    assert_eq!(
        lab.values(instance),
        [["00:01", times[0], "1.5", "-", "task", times[1], "-", "-", "f"]]
    );
    assert_eq!(lab.values(r#"SELECT * FROM @."rowsVersion""#), [["g", "00:01"]]);
    assert_eq!(lab.values(r#"SELECT * FROM @."clients""#), [["g", "c"]]);
    let queries = lab.values(
        r#"SELECT "queryHash", "clientAST" IS NULL, "queryName", "queryArgs", "internal",
           "deleted", "patchVersion", "rowSetSignature" FROM @."queries" ORDER BY 1"#,
    );
    let args = r#"[true,{"b":1,"a":[]}]"#;
    assert_eq!(
        queries,
        [
            ["ast", "f", "-", "-", "-", "f", "-", "-"],
            ["lmids", "f", "-", "-", "t", "f", "-", "-"],
            ["mutationResults", "f", "-", "-", "t", "f", "-", "-"],
            ["q", "t", "byOwner", args, "-", "f", "-", "-"],
        ]
    );
    let desires = r#"SELECT "queryHash", "patchVersion", "deleted", "ttl", "ttlMs",
        "inactivatedAt" AT TIME ZONE 'UTC', "inactivatedAtMs" FROM @."desires" ORDER BY 1"#;
    assert_eq!(
        lab.values(desires),
        [
            ["ast", "00:01", "f", "00:10:00", "600000", "-", "-"],
            ["q", "00:01", "f", "00:05:00", "300000", "-", "-"],
        ]
    );

    let mut updater = ConfigUpdater::new(&cvr);
    updater.inactivate_desired(&"c".into(), &["q".into()], TtlClock(123_456.0));
    let cvr = store.commit(updater.finish(at));
    let since = "1970-01-01 00:00:00.123456";
    assert_eq!(lab.values(desires)[1], ["q", "00:02", "t", "00:05:00", "300000", since, "123456"]);
    assert_eq!(lab.values(r#"SELECT * FROM @."rowsVersion""#), [["g", "00:02"]], "without rows");

    let cvr = execute(&store, &cvr, 5, &[(1, &[("q", 1)]), (1 << 60, &[("q", 2), ("ast", 1)])]);
    let rows = r#"SELECT "schema", "table", "rowKey", "rowVersion", "patchVersion", "refCounts"
        FROM @."rows" ORDER BY "rowKey""#;
    let (small, large) = (r#"{"id": 1}"#, r#"{"id": 1152921504606846976}"#);
    assert_eq!(
        lab.values(rows),
        [
            ["", "issue", small, "05", "05", r#"{"q": 1}"#],
            ["", "issue", large, "05", "05", r#"{"q": 2, "ast": 1}"#],
        ]
    );
    execute(&store, &cvr, 6, &[]);
    assert_eq!(lab.values(rows)[0], ["", "issue", small, "05", "06", "-"]);
    assert_eq!(lab.values(r#"SELECT * FROM @."rowsVersion""#), [["g", "06"]]);
}

/// Every form in which a desire may be stored, by whatever server.
#[test]
fn desires_are_read_as_the_original_reads_them() {
    let postgres = server();
    let lab = PostgresLab::new(&postgres, "desires");
    let store = lab.open("task");
    group(&store, "g", &["q"]);
    lab.client()
        .batch_execute(&lab.sql(
            r#"UPDATE @."queries" SET "internal" = FALSE WHERE "queryHash" = 'q';
               INSERT INTO @."queries" ("clientGroupID", "queryHash", "queryName", "queryArgs",
                   "patchVersion", "deleted")
                 VALUES ('g', 'removed', 'n', '[]', '00:01', true);
               INSERT INTO @."clients" VALUES ('g', 'active'), ('g', 'left'), ('g', 'cleared'),
                 ('g', 'odd');
               INSERT INTO @."desires" ("clientGroupID", "clientID", "queryHash", "patchVersion",
                   "deleted", "ttlMs", "inactivatedAtMs") VALUES
                 ('g', 'active', 'q', '00:01', NULL, NULL, NULL),
                 ('g', 'left', 'q', '00:01', true, 9e9, 5),
                 ('g', 'cleared', 'q', '00:01', true, 300000, NULL),
                 ('g', 'odd', 'q', '00:01', false, -1, 6),
                 ('g', 'nobody', 'q', '00:01', false, 7, NULL),
                 ('g', 'active', 'removed', '00:01', false, 7, NULL),
                 ('g', 'active', 'lmids', '00:01', false, 7, NULL)"#,
        ))
        .unwrap();
    let cvr = store.load("g");
    let states: Vec<_> = cvr
        .query(&"q".into())
        .unwrap()
        .client_state
        .iter()
        .map(|(client, s)| (client.as_str(), s.ttl_ms, s.inactivated_at.map(|at| at.0)))
        .collect();
    let wanted = [
        ("active", 300_000.0, None),
        ("c", 300_000.0, None),
        ("left", 600_000.0, Some(5.0)),
        ("nobody", 7.0, None),
        ("odd", 600_000.0, Some(6.0)),
    ];
    assert_eq!(states, wanted);
    let desired = |client: &str| cvr.clients[client].desired.iter().map(|q| q.as_str()).collect();
    let of_active: Vec<&str> = desired("active");
    assert_eq!(of_active, ["lmids", "q", "removed"]);
    for client in ["left", "cleared", "odd"] {
        let none: Vec<&str> = desired(client);
        assert!(none.is_empty(), "{client}: {none:?}");
    }
    assert!(!cvr.clients.contains_key("nobody"));
    assert!(cvr.query(&"removed".into()).is_none());
    assert!(cvr.query(&"lmids".into()).unwrap().client_state.is_empty());
}

/// As an original that was asked to write many rows: the metadata is there, the rows are not.
fn leave_rows_behind(lab: &PostgresLab, group: &str) {
    let sql =
        format!(r#"UPDATE @."rowsVersion" SET "version" = '00' WHERE "clientGroupID" = '{group}'"#);
    lab.client().batch_execute(&lab.sql(&sql)).unwrap();
}

#[test]
fn a_load_waits_for_the_rows_of_the_former_owner() {
    let postgres = server();
    let lab = PostgresLab::new(&postgres, "behind");
    let (a, b) = (lab.open("a"), lab.open("b"));
    let cvr = group(&a, "g", &["q"]);
    let stuck = group(&a, "stuck", &["q"]);
    leave_rows_behind(&lab, "g");
    leave_rows_behind(&lab, "stuck");
    let load = |id: &'static str| {
        let (send, answer) = channel();
        b.0.load(id.into(), 2_000.0, Box::new(move |loaded| send.send(loaded).unwrap()));
        answer
    };
    let since = std::time::Instant::now();
    let (answer, stuck_answer) = (load("g"), load("stuck"));
    // The first attempt has taken place when the former owner is told.
    let owner = r#"SELECT "owner" FROM @."instances" WHERE "clientGroupID" = 'g'"#;
    lab.until(owner, |found| *found == [["b"]]);
    assert!(answer.try_recv().is_err());
    // Which may still write the rows that it owes; but no metadata.
    let late = a.flush(&join(&cvr, "late").flush).unwrap_err();
    assert!(matches!(&late, CvrStoreError::Ownership { owner, .. } if &**owner == "b"), "{late}");
    let catch_up = r#"UPDATE @."rowsVersion" SET "version" = '00:01'
        WHERE "clientGroupID" = 'g'"#;
    lab.client().batch_execute(&lab.sql(catch_up)).unwrap();
    let loaded = answer.recv().unwrap().unwrap();
    assert_eq!((&loaded.cvr, loaded.taken_over_from), (&cvr, None), "ours since the first attempt");
    let gone = stuck_answer.recv().unwrap().unwrap_err();
    // Ten attempts, half a second apart.
    assert!(since.elapsed() >= std::time::Duration::from_millis(4_500));
    assert_eq!(
        gone,
        CvrStoreError::ClientNotFound(
            "max attempts exceeded waiting for CVR@00:01 to catch up from 00".to_owned()
        )
    );
    assert!(b.rows(&stuck, &["q"], &[]).is_err(), "rows of another version are not used");
}

/// As the original: metadata first, then rows, whoever owns the group by then; until no rows are
/// owed, later flushes write none with their metadata, not even that there are none.
#[test]
fn rows_follow_their_metadata_whatever_happens_to_the_group() {
    let postgres = server();
    let mut lab = PostgresLab::new(&postgres, "follow");
    lab.config.max_connections = 8;
    // What is held up holds up nothing else.
    lab.config.rows.pace.quiet = std::time::Duration::ZERO;
    lab.config.rows.pace.limit = std::time::Duration::ZERO;
    let (a, b) = (lab.open("a"), lab.open("b"));
    let cvr = group(&a, "g", &["q"]);
    let mut holder = lab.client();
    let hold = r#"BEGIN; SELECT 1 FROM @."rowsVersion" WHERE "clientGroupID" = 'g' FOR UPDATE"#;
    holder.batch_execute(&lab.sql(hold)).unwrap();
    let (cvr, flushed) = large(&a, &cvr, 5, 0..101);
    assert!(flushed.rows_follow);
    let stored = r#"SELECT i."version", v."version", (SELECT count(*) FROM @."rows" r
          WHERE r."clientGroupID" = i."clientGroupID")
        FROM @."instances" i JOIN @."rowsVersion" v USING ("clientGroupID")
        WHERE i."clientGroupID" = 'g'"#;
    assert_eq!(lab.values(stored), [["05", "00:01", "0"]], "durable, without its rows");
    // Others are flushed meanwhile, and their rows follow, too.
    let (_, flushed) = large(&a, &group(&a, "h", &["q"]), 5, 0..101);
    assert!(flushed.rows_follow);
    assert_eq!(a.await_rows("h"), Ok(()));
    // The same group defers on, even without rows.
    let (cvr, flushed) = large(&a, &cvr, 6, 200..201);
    assert!(flushed.rows_follow);
    let prepared = join(&cvr, "d");
    assert!(a.flush(&prepared.flush).unwrap().rows_follow);
    let cvr = prepared.cvr;
    assert_eq!(lab.values(stored), [["06:01", "00:01", "0"]]);
    // Whoever needs the rows waits: our own load, and that of a server which takes over.
    let load = |server: &Server, connect_ms| {
        let (send, answer) = channel();
        server.0.load("g".into(), connect_ms, Box::new(move |loaded| send.send(loaded).unwrap()));
        answer
    };
    let ours = load(&a, 1_000.0);
    let theirs = load(&b, 2_000.0);
    let owner = r#"SELECT "owner" FROM @."instances" WHERE "clientGroupID" = 'g'"#;
    lab.until(owner, |found| *found == [["b"]]);
    assert!(ours.try_recv().is_err() && theirs.try_recv().is_err());
    // The former owner writes no more metadata, but the rows that it owes.
    let late = a.flush(&join(&cvr, "late").flush).unwrap_err();
    assert!(matches!(&late, CvrStoreError::Ownership { owner, .. } if &**owner == "b"), "{late}");
    let (send, told) = channel();
    a.0.await_rows("g".into(), Box::new(move |written| send.send(written).unwrap()));
    assert!(told.try_recv().is_err());
    holder.batch_execute("COMMIT").unwrap();
    assert_eq!(told.recv().unwrap(), Ok(()));
    assert_eq!(theirs.recv().unwrap().unwrap().cvr, cvr);
    assert!(matches!(ours.recv().unwrap(), Err(CvrStoreError::Ownership { .. })));
    assert_eq!(lab.values(stored), [["06:01", "06:01", "102"]]);
    assert_eq!(b.rows(&cvr, &["q"], &[]).unwrap().len(), 102);
}

/// A change that moves neither rows nor the version, behind rows that follow: they are written
/// once, for by then somebody else may have written a later version.
#[test]
fn a_change_without_a_version_owes_nothing() {
    let postgres = server();
    let mut lab = PostgresLab::new(&postgres, "unversioned");
    lab.config.max_connections = 8;
    // What is held up holds up nothing else.
    lab.config.rows.pace.quiet = std::time::Duration::ZERO;
    lab.config.rows.pace.limit = std::time::Duration::ZERO;
    let store = lab.open("a");
    let mut updater = ConfigUpdater::new(&group(&store, "g", &["q"]));
    updater.ensure_client(&"idle".into(), &shard());
    let cvr = store.commit(updater.finish(times(1.0)));
    lab.client()
        .batch_execute(&lab.sql(
            r#"CREATE TABLE written (version text);
               CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS
                 'BEGIN INSERT INTO written VALUES (NEW."version"); RETURN NEW; END';
               CREATE TRIGGER note AFTER INSERT OR UPDATE ON @."rowsVersion"
                 FOR EACH ROW EXECUTE FUNCTION note()"#,
        ))
        .unwrap();
    let mut holder = lab.client();
    let hold = r#"BEGIN; SELECT 1 FROM @."rowsVersion" WHERE "clientGroupID" = 'g' FOR UPDATE"#;
    holder.batch_execute(&lab.sql(hold)).unwrap();
    let (cvr, flushed) = large(&store, &cvr, 5, 0..101);
    assert!(flushed.rows_follow);
    let mut updater = ConfigUpdater::new(&cvr);
    updater.delete_client(&"idle".into(), TtlClock(1.0));
    let prepared = updater.finish(times(2.0)).unwrap();
    assert_eq!(prepared.cvr.version, cvr.version);
    assert!(store.flush(&prepared.flush).unwrap().rows_follow);
    holder.batch_execute("COMMIT").unwrap();
    assert_eq!(store.await_rows("g"), Ok(()));
    assert_eq!(lab.values("SELECT version FROM written"), [["05"]]);
    assert_eq!(store.load("g"), prepared.cvr);
}

/// Rows that cannot be written: the group is lost, nobody uses what is there of it, and the others
/// do not notice.
#[test]
fn rows_that_cannot_be_written_lose_their_group_only() {
    let postgres = server();
    let mut lab = PostgresLab::new(&postgres, "refused");
    lab.config.rows.load_delay = std::time::Duration::from_millis(5);
    let store = lab.open("a");
    let cvrs = ["bad", "good"].map(|id| group(&store, id, &["q"]));
    let refuse = r#"ALTER TABLE @."rows" ADD CHECK ("clientGroupID" <> 'bad')"#;
    lab.client().batch_execute(&lab.sql(refuse)).unwrap();
    let prepared = cvrs.each_ref().map(|cvr| {
        let mut updater = QueryUpdater::new(cvr, &state(5), &state(1)).unwrap();
        updater.advanced(entering(0..500), &cvr.version.state).unwrap();
        finish(updater, 3.0).unwrap()
    });
    for verdict in store.flush_all(prepared.iter().map(|p| p.flush.clone()).collect()) {
        assert!(verdict.result.unwrap().rows_follow);
    }
    let why = store.await_rows("bad");
    // Told if it still waited; afterwards nothing is owed any more.
    assert!(matches!(why, Ok(()) | Err(CvrStoreError::Damaged { .. })), "{why:?}");
    assert_eq!(store.await_rows("good"), Ok(()));
    assert_eq!(store.rows(&prepared[1].cvr, &["q"], &[]).unwrap().len(), 500);
    let [bad, _] = prepared;
    assert!(store.rows(&bad.cvr, &["q"], &[]).is_err());
    let later = store.flush(&join(&bad.cvr, "late").flush).unwrap_err();
    assert!(matches!(later, CvrStoreError::ConcurrentModification { .. }), "{later}");
    let gone = store.try_load("bad", 1e15).unwrap_err();
    assert!(gone.to_string().contains("to catch up from 00:01"), "{gone}");
}

/// Two servers write many rows of the same groups, unsorted and in opposite orders: `rowsVersion`
/// keeps them apart.
#[test]
fn large_flushes_of_two_servers_do_not_deadlock() {
    let postgres = server();
    let mut lab = PostgresLab::new(&postgres, "large");
    lab.config.max_connections = 8;
    let stores = [lab.open("a"), lab.open("b")];
    const ROWS: i64 = 11_000;
    for round in 0..3 {
        let at = 6 + round;
        let cvrs: Vec<_> = ["g", "h"]
            .iter()
            .map(|id| if round == 0 { group(&stores[0], id, &["q"]) } else { stores[0].load(id) })
            .collect();
        let flushes = |back: bool| -> Vec<GroupFlush> {
            let flush = |cvr: &zeroring_core::cvr::Cvr| {
                let mut updater = QueryUpdater::new(cvr, &state(at), &state(1)).unwrap();
                updater.advanced(entering(0..ROWS), &cvr.version.state).unwrap();
                let mut flush = at_connect(finish(updater, 3.0).unwrap().flush, 1e15);
                if back {
                    flush.rows.reverse();
                }
                flush
            };
            let mut all: Vec<_> = cvrs.iter().map(flush).collect();
            if back {
                all.reverse();
            }
            all
        };
        let (forth, back) = (flushes(false), flushes(true));
        let mut results = std::thread::scope(|scope| {
            let a = scope.spawn(|| stores[0].flush_all(forth));
            let b = scope.spawn(|| stores[1].flush_all(back));
            [a.join().unwrap(), b.join().unwrap()]
        });
        results[1].reverse();
        for (a, b) in results[0].iter().zip(&results[1]) {
            assert!(a.result.is_ok() != b.result.is_ok(), "{a:?} {b:?}");
            for store in &stores {
                assert_eq!(store.await_rows(a.group.as_str()), Ok(()));
            }
        }
        for id in ["g", "h"] {
            let cvr = stores[1].load(id);
            assert_eq!(stores[1].rows(&cvr, &["q"], &[]).unwrap().len(), ROWS as usize);
        }
    }
    let deadlocks = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()";
    assert_eq!(lab.values(deadlocks), [["0"]]);
}

/// One batch meets everything at once: a take-over, another version, a lock, a poisoned record.
#[test]
fn troubles_of_one_group_leave_the_batch_alone() {
    let postgres = server();
    let lab = PostgresLab::new(&postgres, "troubles");
    let store = lab.open("a");
    let names = ["fine1", "locked", "taken", "newer", "poison", "fine2"];
    let cvrs: Vec<_> = names.iter().map(|n| group(&store, n, &["q"])).collect();
    lab.client()
        .batch_execute(&lab.sql(
            r#"UPDATE @."instances" SET "owner" = 'b', "grantedAt" = '2030-01-01Z'
                 WHERE "clientGroupID" = 'taken';
               UPDATE @."instances" SET "version" = '07' WHERE "clientGroupID" = 'newer';"#,
        ))
        .unwrap();
    let mut holder = lab.client();
    holder
        .batch_execute(&lab.sql(
            r#"BEGIN; SELECT 1 FROM @."instances" WHERE "clientGroupID" = 'locked' FOR UPDATE"#,
        ))
        .unwrap();
    let mut batch: Vec<_> = cvrs.iter().map(|cvr| join(cvr, "n").flush).collect();
    batch.push(join(&empty("brand new"), "n").flush);
    batch[4].desires.push(DesireWrite {
        client: "nul\0".into(),
        query: "q".into(),
        patch_version: version(0, 2),
        deleted: false,
        ttl_ms: 1.0,
        inactivated_at: None,
    });
    let (send, answer) = channel();
    store.0.flush(batch, Box::new(move |verdicts| send.send(verdicts).unwrap()));
    // The others get their verdicts while the lock is held.
    let mut verdicts = answer.recv().unwrap();
    assert_eq!(verdicts.len(), cvrs.len(), "all but one: {verdicts:?}");
    assert!(verdicts.iter().all(|v| v.group.as_str() != "locked") && answer.try_recv().is_err());
    holder.batch_execute("COMMIT").unwrap();
    verdicts.extend(answer.recv().unwrap());
    verdicts.sort_by_key(|v| v.at);
    let fine: Vec<_> = verdicts.iter().map(|v| v.result.is_ok()).collect();
    assert_eq!(fine, [true, true, false, false, false, true, true], "{verdicts:?}");
    let error = |n: usize| verdicts[n].result.clone().unwrap_err();
    assert!(matches!(error(2), CvrStoreError::Ownership { .. }));
    assert!(
        matches!(error(3), CvrStoreError::ConcurrentModification { actual, .. } if actual == "07")
    );
    assert!(matches!(error(4), CvrStoreError::Damaged { .. }), "{}", error(4));
    for (n, cvr) in cvrs.iter().enumerate() {
        let joined = format!(
            r#"SELECT 1 FROM @."clients" WHERE "clientGroupID" = '{}' AND "clientID" = 'n'"#,
            cvr.id
        );
        assert_eq!(lab.values(&joined).len(), usize::from(fine[n]), "{}", cvr.id);
    }
    // A group that cannot even begin leaves nothing at all.
    let mut hopeless = join(&empty("hopeless"), "n").flush;
    hopeless.desires = vec![];
    hopeless.queries.clear();
    hopeless.queries.push(zeroring_core::cvr::store::QueryWrite::Removed {
        id: "none".into(),
        patch_version: version(0, 1),
    });
    let verdicts = store.flush_all(vec![hopeless, join(&empty("other"), "n").flush]);
    assert!(verdicts[0].result.is_err() && verdicts[1].result.is_ok(), "{verdicts:?}");
    assert!(!store.load("hopeless").stored && store.load("other").stored);
}

#[test]
fn an_original_that_commits_while_we_wait_wins() {
    let postgres = server();
    let lab = PostgresLab::new(&postgres, "waits");
    let store = lab.open("a");
    let cvr = group(&store, "g", &["q"]);
    let mut original = lab.client();
    original
        .batch_execute(&lab.sql(
            r#"BEGIN; SELECT 1 FROM @."instances" WHERE "clientGroupID" = 'g' FOR UPDATE;
               UPDATE @."instances" SET "version" = '09', "owner" = 'o', "grantedAt" = '1970-01-01Z'
                 WHERE "clientGroupID" = 'g'"#,
        ))
        .unwrap();
    let (send, answer) = channel();
    let flush = join(&cvr, "n").flush;
    store.0.flush(vec![flush], Box::new(move |verdicts| send.send(verdicts).unwrap()));
    let waits = "SELECT 1 FROM pg_locks WHERE NOT granted";
    lab.until(waits, |found| !found.is_empty());
    original.batch_execute("COMMIT").unwrap();
    let error = answer.recv().unwrap().remove(0).result.unwrap_err();
    let CvrStoreError::ConcurrentModification { expected, actual } = error else {
        panic!("{error}")
    };
    assert_eq!((expected.as_str(), actual.as_str()), ("00:01", "09"));
    assert_eq!(lab.values(r#"SELECT "clientID" FROM @."clients""#), [["c"]]);
}

/// Two servers flush the same groups in opposite orders, first flushes among them.
#[test]
fn of_two_servers_exactly_one_commits_and_none_deadlocks() {
    const GROUPS: usize = 12;
    const ROUNDS: usize = 15;
    let postgres = server();
    let lab = PostgresLab::new(&postgres, "race");
    let stores = [lab.open("a"), lab.open("b")];
    let mut versions = vec![CvrVersion::empty(); GROUPS];
    for round in 0..ROUNDS {
        let cvrs: Vec<_> = (0..GROUPS).map(|n| stores[0].load(&format!("g{n}"))).collect();
        let flushes = |who: &str| -> Vec<GroupFlush> {
            let client = format!("{who}{round}");
            cvrs.iter().map(|cvr| at_connect(join(cvr, &client).flush, 1e15)).collect()
        };
        let (forth, mut back) = (flushes("a"), flushes("b"));
        back.reverse();
        let results = std::thread::scope(|scope| {
            let a = scope.spawn(|| stores[0].flush_all(forth));
            let b = scope.spawn(|| stores[1].flush_all(back));
            [a.join().unwrap(), b.join().unwrap()]
        });
        for n in 0..GROUPS {
            let (a, b) = (&results[0][n], &results[1][GROUPS - 1 - n]);
            assert_eq!(a.group, b.group);
            assert!(a.result.is_ok() != b.result.is_ok(), "{a:?} {b:?}");
            let lost = a.result.as_ref().err().or(b.result.as_ref().err()).unwrap();
            assert!(matches!(lost, CvrStoreError::ConcurrentModification { .. }), "{lost}");
            let now = stores[0].load(a.group.as_str());
            assert!(now.version > versions[n]);
            assert_eq!(now.clients.len(), round + 1, "each round one client joins");
            versions[n] = now.version;
        }
    }
    let deadlocks = "SELECT sum(deadlocks) FROM pg_stat_database";
    assert_eq!(lab.values(deadlocks), [["0"]]);
}

#[test]
fn few_connections_do_all_the_work_and_limits_are_kept() {
    let postgres = server();
    for connections in [1, 2, 3, 4, 30] {
        let mut lab = PostgresLab::new(&postgres, &format!("conns{connections}"));
        lab.config.max_connections = connections;
        let store = lab.open("t");
        let cvr = group(&store, "g", &["q"]);
        // Rows follow, on the connections that there are.
        let rows: Vec<_> = (0..1_500).map(|n| (n, &[("q", 1)][..])).collect();
        let cvr = execute(&store, &cvr, 5, &rows);
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    assert_eq!(store.load("g"), cvr);
                    assert_eq!(store.rows(&cvr, &["q"], &[]).unwrap().len(), 1_500);
                });
            }
        });
        let open = lab.values(
            "SELECT count(*) FROM pg_stat_activity
             WHERE application_name LIKE 'zero-sync-worker-%-cvr'",
        );
        let open: usize = open[0][0].parse().unwrap();
        assert!((1..=connections).contains(&open), "{open} of {connections}");
        drop(store);
        // The sessions end a moment after their sockets.
        let rest = "SELECT 1 FROM pg_stat_activity
             WHERE application_name LIKE 'zero-sync-worker-%-cvr'";
        lab.until(rest, <[_]>::is_empty);
    }
}

#[test]
fn a_purge_leaves_alone_what_others_hold_and_whom_it_belongs_to() {
    let postgres = server();
    let lab = PostgresLab::new(&postgres, "purge");
    let store = lab.open("a");
    for name in ["oldest", "old", "new"] {
        group(&store, name, &["q"]);
    }
    let ages = r#"UPDATE @."instances" SET "profileID" = 'p', "lastActive" = CASE "clientGroupID"
        WHEN 'oldest' THEN '2000-01-02Z'::timestamptz WHEN 'old' THEN '2000-01-05Z'
        ELSE '2000-01-30Z' END"#;
    lab.client().batch_execute(&lab.sql(ages)).unwrap();
    let mut holder = lab.client();
    let hold = r#"BEGIN; SELECT 1 FROM @."instances" WHERE "clientGroupID" = 'oldest' FOR UPDATE"#;
    holder.batch_execute(&lab.sql(hold)).unwrap();
    const JANUARY_31_MS: f64 = 949_276_800_000.0;
    let ten_days_ms = 10.0 * 86_400_000.0;
    let limits = PurgeLimits { now_ms: JANUARY_31_MS, inactive_ms: ten_days_ms, batch: 1 };
    let purged = store.purge(limits);
    assert_eq!((purged.groups, purged.remaining), (1, 1), "the oldest one remains to be done");
    let buried = r#"SELECT "clientGroupID", "version", "ttlClock", "replicaVersion", "owner",
        "grantedAt", "clientSchema", "profileID", extract(day FROM "lastActive" AT TIME ZONE 'UTC')
        FROM @."instances" WHERE "deleted""#;
    assert_eq!(lab.values(buried), [["old", "00", "0", "-", "-", "-", "-", "p", "5"]]);
    for table in ["desires", "queries", "clients", "rowsVersion"] {
        let left = format!(r#"SELECT DISTINCT "clientGroupID" FROM @."{table}" ORDER BY 1"#);
        assert_eq!(lab.values(&left), [["new"], ["oldest"]], "{table}");
    }
    holder.batch_execute("COMMIT").unwrap();
    assert_eq!(store.purge(limits).groups, 1);
    assert!(store.load("new").stored);
}
