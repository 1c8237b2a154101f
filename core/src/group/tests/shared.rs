//! What changes cost: those that reach many groups are encoded once, queries that come and go read
//! no records (engine.md §6).

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::super::ConnId;
use super::client::Persisted;
use super::harness::{CLIENT_SCHEMA, Harness, Question};
use crate::value::Value;

const MINE: &str = r#"{"table":"issue","where":{"type":"simple","op":"=","left":{"type":"column","name":"owner"},"right":{"type":"literal","value":"o"}},"orderBy":[["id","asc"]]}"#;

fn change(h: &Harness, id: &str, owner: Option<&str>) -> super::world::Change {
    let values = owner.map(|o| vec![Value::string(id), Value::string(o), Value::Number(1.0)]);
    (h.world.table("issue"), [Value::string(id)].into_iter().collect(), values)
}

/// Groups of one client each, all with the same query, some with protocol 52.
fn groups(h: &mut Harness, count: usize) -> Vec<ConnId> {
    (0..count)
        .map(|i| {
            let protocol = if i % 2 == 0 { 51 } else { 52 };
            let group = format!("g{i}");
            let conn = h.connect(&group, "c", None, Persisted::default(), protocol).unwrap();
            h.say(
                conn,
                &format!(
                    r#"["initConnection",{{"desiredQueriesPatch":[{{"op":"put","hash":"q","ast":{MINE}}}],"clientSchema":{CLIENT_SCHEMA}}}]"#
                ),
            );
            conn
        })
        .collect()
}

fn made(h: &mut Harness) -> u64 {
    use super::super::World;
    h.world.shared().frames.made()
}

#[test]
fn a_write_that_reaches_many_groups_is_encoded_once_per_protocol() {
    let mut h = Harness::new(false);
    let rows = (0..5).map(|i| change(&h, &format!("i{i}"), Some("o"))).collect();
    h.commit(rows);
    let conns = groups(&mut h, 40);
    h.settle();
    // Entering, changing, leaving by an update, and a delete; also several at a time.
    let steps: [&[(&str, Option<&str>)]; 5] = [
        &[("new", Some("o"))],
        &[("i1", Some("o"))],
        &[("i2", Some("elsewhere"))],
        &[("i3", None)],
        &[("i0", Some("o")), ("i4", None), ("more", Some("o"))],
    ];
    for step in steps {
        let (before, reads) = (made(&mut h), h.world.reads);
        let changes = step.iter().map(|(id, owner)| change(&h, id, *owner)).collect();
        h.commit(changes);
        h.settle();
        assert_eq!(made(&mut h) - before, 2, "text and binary: {step:?}");
        assert_eq!(h.world.reads, reads, "no row is read: no other query of a group has the table");
    }
    let rows = h.state(conns[0]).rows.clone();
    assert_eq!(rows.len(), 4);
    assert!(conns.iter().all(|c| h.state(*c).rows == rows));
}

#[test]
fn advances_that_gather_while_groups_flush_are_encoded_once() {
    let mut h = Harness::new(false);
    let conns = groups(&mut h, 10);
    h.settle();
    let before = made(&mut h);
    for round in 0..20 {
        let changes = vec![change(&h, &format!("i{}", round % 7), Some("o"))];
        h.commit(changes);
    }
    h.settle();
    // The first advance was under way, the others are one update.
    assert_eq!(made(&mut h) - before, 4);
    assert!(conns.iter().all(|c| h.state(*c).rows.len() == 7));
}

#[test]
fn a_large_poke_of_one_group_alone_is_not_kept_and_one_of_many_is_made_twice() {
    use super::super::World;
    let mut h = Harness::new(false);
    let long = |i: usize| format!("{i}-{}", "x".repeat(2_000));
    let rows = (0..5).map(|i| change(&h, &long(i), Some("o"))).collect();
    h.commit(rows);
    let first = groups(&mut h, 1)[0];
    h.settle();
    assert_eq!(h.state(first).rows.len(), 5);
    let kept = h.world.shared().frames.kept_bytes();
    assert!(kept < 4_000, "{kept} bytes are kept of a poke that came once");
    // Those of protocol 51 say the same as the first one did.
    let before = made(&mut h);
    let conns: Vec<ConnId> = groups(&mut h, 21);
    h.settle();
    assert!(conns.iter().skip(1).all(|c| h.state(*c).rows.len() == 5));
    let changes = (0..5).map(|i| change(&h, &long(i + 5), Some("o"))).collect();
    let hydrated = made(&mut h) - before;
    h.commit(changes);
    h.settle();
    let advanced = made(&mut h) - before - hydrated;
    assert_eq!(advanced, 4, "twice each, text and binary");
    assert!(conns.iter().skip(1).all(|c| h.state(*c).rows.len() == 10));
}

#[test]
fn a_row_that_many_groups_missed_is_read_once() {
    let mut h = Harness::new(false);
    let first = change(&h, "i1", Some("o"));
    h.commit(vec![first]);
    let conns = groups(&mut h, 10);
    h.settle();
    let states: Vec<Persisted> = conns.iter().map(|c| h.disconnect(*c)).collect();
    let stays: Vec<ConnId> = (0..10)
        .map(|i| {
            let conn =
                h.connect(&format!("g{i}"), "other", None, Persisted::default(), 51).unwrap();
            h.say(conn, r#"["initConnection",{"desiredQueriesPatch":[]}]"#);
            conn
        })
        .collect();
    h.settle();
    let missed = (0..3).map(|i| change(&h, &format!("i{i}"), Some("o"))).collect();
    h.commit(missed);
    h.settle();
    let reads = h.world.reads;
    for (i, state) in states.into_iter().enumerate() {
        let conn = h.connect(&format!("g{i}"), "c", None, state, 51).unwrap();
        h.say(conn, r#"["initConnection",{"desiredQueriesPatch":[]}]"#);
        h.settle();
        assert_eq!(h.state(conn).rows, h.state(stays[i]).rows);
    }
    assert_eq!(h.world.reads - reads, 3);
}

#[test]
fn queries_come_and_go_at_the_head_without_reading_records() {
    let mut h = Harness::new(false);
    let rows = (0..4).map(|i| change(&h, &format!("i{i}"), Some("o"))).collect();
    h.commit(rows);
    let conn = groups(&mut h, 1)[0];
    h.settle();
    let all = r#"{"table":"issue","orderBy":[["id","asc"]]}"#;
    let top = r#"{"table":"issue","orderBy":[["id","asc"]],"limit":1}"#;
    let say = |h: &mut Harness, ops: &str| {
        h.say(conn, &format!(r#"["changeDesiredQueries",{{"desiredQueriesPatch":[{ops}]}}]"#));
    };
    let extra = change(&h, "x", Some("elsewhere"));
    h.commit(vec![extra]);
    say(&mut h, &format!(r#"{{"op":"put","hash":"all","ast":{all},"ttl":0}}"#));
    h.settle();
    assert_eq!(h.state(conn).rows.len(), 5);
    // One goes, another comes, while rows change.
    say(&mut h, r#"{"op":"del","hash":"q"}"#);
    say(&mut h, &format!(r#"{{"op":"put","hash":"top","ast":{top},"ttl":0}}"#));
    let changes = vec![change(&h, "i1", None), change(&h, "a", Some("o"))];
    h.commit(changes);
    h.settle();
    say(&mut h, r#"{"op":"del","hash":"all"}"#);
    h.settle();
    h.pass(1_000_000.0);
    h.settle();
    assert_eq!(h.state(conn).got.iter().collect::<Vec<_>>(), ["top"]);
    assert_eq!(h.state(conn).rows.len(), 1, "{:?}", h.state(conn).rows);
    assert_eq!((h.row_reads, h.store.anomalies), (0, 0));
    // A tab that comes back is caught up: what it missed was written all the same.
    let live = h.store.rows(&"g0".into());
    assert_eq!(live.len(), 1);
}

#[test]
fn a_large_hydration_delays_nobody_and_is_of_one_version() {
    let all = r#"{"table":"issue","orderBy":[["id","asc"]]}"#;
    let mut interrupted = 0;
    for seed in 0..30 {
        let mut rng = StdRng::seed_from_u64(seed);
        let mut h = Harness::new(false);
        let rows = (0..60).map(|i| change(&h, &format!("i{i}"), Some("x"))).collect();
        h.commit(rows);
        let small = groups(&mut h, 1)[0];
        h.settle();
        let large = h.connect("large", "c", None, Persisted::default(), 51).unwrap();
        h.say(
            large,
            &format!(
                r#"["initConnection",{{"desiredQueriesPatch":[{{"op":"put","hash":"all","ast":{all}}}],"clientSchema":{CLIENT_SCHEMA}}}]"#
            ),
        );
        let mut wanted = 0;
        while h.answer(&"large".into()) {
            while h.receive(large) {}
            let computes = matches!(h.groups["large"].questions.front(), Some(Question::Continue));
            if !computes || wanted > 5 || rng.random_bool(0.8) {
                continue;
            }
            // The other group's row changes meanwhile, which is in the large result as well.
            wanted += 1;
            let owner = format!("i{}", rng.random_range(0..60));
            let changes = vec![
                change(&h, &format!("new{wanted}"), Some("o")),
                change(&h, &owner, (!rng.random_bool(0.3)).then_some("y")),
            ];
            h.commit(changes);
            while h.answer(&"g0".into()) {}
            while h.receive(small) {}
            assert_eq!(h.state(small).rows.len(), wanted, "seed {seed}: it is there at once");
            interrupted += 1;
        }
        h.settle();
        let expected = h.world.expected(&serde_json::from_str(all).unwrap());
        let rows = &h.state(large).rows;
        assert_eq!(rows.len(), expected.len(), "seed {seed}");
        for ((_, id), row) in rows {
            let row: serde_json::Value = serde_json::from_str(row).unwrap();
            let owner = &expected[id].2.values[1];
            let held = row["owner"].as_str().map(Value::string);
            assert_eq!(held.as_ref(), Some(owner), "seed {seed}: {id}");
        }
        assert_eq!(h.store.anomalies, 0, "seed {seed}");
        assert_eq!(h.store.rows(&"large".into()).len(), expected.len(), "seed {seed}");
    }
    assert!(interrupted > 60, "{interrupted} interruptions only");
}
