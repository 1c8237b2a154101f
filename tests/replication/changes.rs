//! Inserts, updates, deletes and truncates of the stream, with every replica identity.

use super::support::{Fixture, texts};

#[test]
fn every_kind_of_change_and_identity_converges() {
    let mut f = Fixture::new(
        "CREATE TABLE t (id int PRIMARY KEY, a text, b text);
         CREATE TABLE by_index (x int NOT NULL, y text NOT NULL, z text, UNIQUE (y, x));
         CREATE TABLE full_id (id int NOT NULL, a text, big text);
         ALTER TABLE full_id REPLICA IDENTITY FULL;
         CREATE UNIQUE INDEX ON full_id (id);
         CREATE TABLE wide (id int PRIMARY KEY, n int, big text);
         ALTER TABLE wide ALTER big SET STORAGE EXTERNAL;
         CREATE TABLE parent (id int PRIMARY KEY);
         CREATE TABLE kid (id int PRIMARY KEY, p int REFERENCES parent);
         INSERT INTO t VALUES (1, 'a', 'x'), (2, 'b', 'y'), (3, 'c', 'z');
         INSERT INTO by_index VALUES (1, 'p', 'q'), (2, 'r', 's');
         INSERT INTO full_id VALUES (1, 'a', repeat('f', 9000)), (2, NULL, NULL);
         INSERT INTO wide VALUES (1, 1, repeat('w', 20000));
         INSERT INTO parent VALUES (1); INSERT INTO kid VALUES (1, 1);",
    );
    let running = f.start_ready();
    f.exec(
        "BEGIN;
         INSERT INTO t VALUES (4, NULL, 'new');
         UPDATE t SET a = 'changed' WHERE id = 1;
         UPDATE t SET id = 20 WHERE id = 2;
         DELETE FROM t WHERE id = 3;
         UPDATE by_index SET z = 'zz' WHERE x = 1;
         UPDATE by_index SET y = 'moved' WHERE x = 2;
         UPDATE full_id SET a = 'b' WHERE id = 1;
         DELETE FROM full_id WHERE id = 2;
         UPDATE wide SET n = 2;
         COMMIT;
         BEGIN; INSERT INTO t VALUES (99, 'gone', ''); ROLLBACK;
         TRUNCATE parent CASCADE;
         INSERT INTO parent VALUES (5);",
    );
    f.catch_up(&running);
    let path = f.config.replica_path.clone();
    let all = |sql: &str| texts(&path, sql);
    assert_eq!(all("SELECT id, a, b FROM t ORDER BY id"), ["1|changed|x", "4|NULL|new", "20|b|y"]);
    assert_eq!(all("SELECT x, y, z FROM by_index ORDER BY x"), ["1|p|zz", "2|moved|s"]);
    assert_eq!(all("SELECT id, a, length(big) FROM full_id"), ["1|b|9000"]);
    assert_eq!(all("SELECT id, n, length(big) FROM wide"), ["1|2|20000"]);
    assert_eq!(all("SELECT id FROM parent"), ["5"]);
    assert!(all("SELECT id FROM kid").is_empty());

    // The net effect reached the executors: the update of the wide row carries its text.
    let commits = running.commits();
    let wide = commits
        .iter()
        .flat_map(|c| &c.tables)
        .find(|t| &*t.table.name == "wide")
        .expect("a change of wide");
    let (row, big) = (&wide.rows[0], wide.table.column("big").unwrap());
    assert_eq!(row.new.as_ref().unwrap().values[big], row.old.as_ref().unwrap().values[big]);
    assert!(commits.iter().all(|c| c.upstream_commit_ms > 1.7e12));
    let truncated = commits.iter().flat_map(|c| &c.tables).filter(|t| t.truncated);
    assert_eq!(truncated.count(), 2);
    running.stop();
}

#[test]
fn a_large_transaction_among_small_ones_arrives_once_and_in_order() {
    let mut f = Fixture::new("CREATE TABLE t (id int PRIMARY KEY, n int)");
    let running = f.start_ready();
    f.exec("INSERT INTO t SELECT g, 0 FROM generate_series(1, 20000) g");
    let mut big = zeroring_net::pg::Client::connect(&f.config.upstream).unwrap();
    big.batch_execute("BEGIN; UPDATE t SET n = n + 1 WHERE id > 100").unwrap();
    for _ in 0..50 {
        f.exec("UPDATE t SET n = n + 1 WHERE id <= 10");
    }
    big.batch_execute("COMMIT").unwrap();
    f.catch_up(&running);
    let sql = "SELECT count(*), sum(n), max(n) FROM t";
    let sum = 50 * 10 + 19_900;
    assert_eq!(texts(&f.config.replica_path, sql), [format!("20000|{sum}|50")]);
    running.commits();
    running.stop();
}

#[test]
fn writes_during_the_initial_copy_are_neither_lost_nor_doubled() {
    let mut f = Fixture::new(
        "CREATE TABLE t (id serial PRIMARY KEY, n int NOT NULL, pad text);
         INSERT INTO t (n, pad) SELECT g, repeat('x', 200) FROM generate_series(1, 30000) g;
         CREATE TABLE ledger (id serial PRIMARY KEY, t int);",
    );
    let upstream = f.config.upstream.clone();
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let mut sql = zeroring_net::pg::Client::connect(&upstream).unwrap();
            let mut i = 0u32;
            while !done.load(std::sync::atomic::Ordering::Relaxed) {
                i += 1;
                let id = i * 7919 % 30000 + 1;
                sql.batch_execute(&format!(
                    "BEGIN; UPDATE t SET n = n + 1 WHERE id = {id};
                     INSERT INTO ledger (t) VALUES ({id}); DELETE FROM t WHERE id = {};
                     INSERT INTO t (n) VALUES ({i}); COMMIT",
                    30000 - i
                ))
                .unwrap();
            }
            i
        });
        let running = f.start_ready();
        running.wait_streaming();
        done.store(true, std::sync::atomic::Ordering::Relaxed);
        assert!(writer.join().unwrap() > 0);
        f.catch_up(&running);
        running.stop();
    });
    for table in ["t", "ledger"] {
        let columns =
            if table == "t" { "sum(id::int8 * 31 + n)" } else { "sum(id::int8 * 31 + t)" };
        let upstream =
            f.scalar(&format!("SELECT count(*) || '|' || {columns} FROM {table}")).unwrap();
        let sql = format!("SELECT count(*), {} FROM {table}", columns.replace("::int8", ""));
        assert_eq!(texts(&f.config.replica_path, &sql), [upstream], "{table}");
    }
}
