//! What happens to the replica under the clients' feet: it is replaced, or changes faster than an
//! executor can follow.

use std::collections::BTreeMap;

use crate::held_store::HeldStore;
use crate::roaming::{Issues, Over, Roamer};
use crate::support::*;

fn rows(issues: &[(&str, i64)]) -> BTreeMap<String, i64> {
    issues.iter().map(|(id, n)| ((*id).to_owned(), *n)).collect()
}

#[test]
fn clients_come_back_to_a_replaced_replica_and_get_the_difference() {
    for executors in [1, 2] {
        let mut servers = [Server::start(&Setup { executors, ..Setup::default() })];
        let mut issues = Issues::default();
        for (id, n) in [("i1", 1), ("i2", 2), ("i3", 3)] {
            issues.commit(&mut servers, id, Some(n));
        }
        let mut roamers: Vec<Roamer> =
            (0..4).map(|n| Roamer::new(&format!("g{}", n % 3), &format!("c{n}"))).collect();
        for roamer in &mut roamers {
            roamer.connect(servers[0].addr);
            roamer.read_until(|rows| rows.len() == 3).unwrap();
        }
        let new = [("i2", 2), ("i3", 33), ("i4", 4)];
        // With a flush on its way.
        issues.commit(&mut servers, "i9", Some(9));
        servers[0].replace_replica(1_000_000, &new);
        issues.0 = rows(&new);
        for roamer in &mut roamers {
            let over = roamer.read_until(|_| false).unwrap_err();
            assert_eq!(over, Over::Closed, "nothing is wrong with the client");
            roamer.connect(servers[0].addr);
            roamer.read_until(|rows| *rows == issues.0).unwrap();
        }
        issues.commit(&mut servers, "i5", Some(5));
        for roamer in &mut roamers {
            roamer.read_until(|rows| *rows == issues.0).unwrap();
        }
    }
}

#[test]
fn a_group_that_comes_back_at_once_sees_what_it_was_just_writing() {
    let store = HeldStore::new();
    let setup = Setup { store: Some(store.clone()), ..Setup::default() };
    let mut servers = [Server::start(&setup)];
    let mut issues = Issues::default();
    issues.commit(&mut servers, "i1", Some(1));
    let mut roamer = Roamer::new("g", "c");
    roamer.connect(servers[0].addr);
    roamer.read_until(|rows| rows.len() == 1).unwrap();
    store.hold_flushes();
    issues.commit(&mut servers, "i2", Some(2));
    store.let_flushes_go_after(|| {
        servers[0].replace_replica(1_000_000, &[("i3", 3)]);
        assert_eq!(roamer.read_until(|_| false), Err(Over::Closed));
        roamer.connect(servers[0].addr);
        // It is known to the store by now, if it is in a hurry.
        eventually("it comes up", || servers[0].number("groupsComingUp") == 1);
    });
    roamer.read_until(|now| *now == rows(&[("i3", 3)])).unwrap();
    assert_eq!(store.overtaking(), []);
}

#[test]
fn a_replica_that_is_older_than_a_group_does_not_serve_it() {
    let mut servers = [Server::start(&Setup::default())];
    let mut issues = Issues::default();
    issues.commit(&mut servers, "i1", Some(1));
    let mut roamer = Roamer::new("g", "c");
    roamer.connect(servers[0].addr);
    roamer.read_until(|rows| rows.len() == 1).unwrap();
    let older = servers[0].replace_replica(-1_000, &[("i2", 2)]);
    assert_eq!(roamer.read_until(|_| false), Err(Over::Closed));
    roamer.connect(servers[0].addr);
    let Err(Over::Error(kind, message)) = roamer.read_until(|_| false) else { panic!("served") };
    assert_eq!(kind, "ClientNotFound");
    assert!(message.ends_with(&format!(", DB={older}")), "{message}");
    assert!(message.starts_with("Cannot sync from older replica: CVR="), "{message}");
    // The client starts afresh.
    let mut fresh = Roamer::new("h", "c");
    fresh.connect(servers[0].addr);
    fresh.read_until(|now| *now == rows(&[("i2", 2)])).unwrap();
}

#[test]
fn an_executor_that_cannot_follow_reads_anew_and_no_row_is_wrong() {
    const PATIENT_COMMITS: i64 = 20_000;
    let mut servers = [Server::start(&Setup { executors: 2, ring: 2, ..Setup::default() })];
    let mut issues = Issues::default();
    let mut roamers: Vec<Roamer> = (0..6).map(|n| Roamer::new(&format!("g{n}"), "c")).collect();
    for roamer in &mut roamers {
        roamer.connect(servers[0].addr);
        roamer.poke().unwrap();
    }
    let mut k = 0;
    while servers[0].dropped() < 50 {
        assert!(k < PATIENT_COMMITS, "the executors keep up");
        issues.step(&mut servers, k);
        k += 1;
    }
    for roamer in &mut roamers {
        roamer.read_until(|rows| *rows == issues.0).unwrap();
    }
    issues.commit(&mut servers, "last", Some(1));
    for roamer in &mut roamers {
        roamer.read_until(|rows| *rows == issues.0).unwrap();
    }
    assert!(servers[0].stop());
}

#[test]
fn many_groups_that_come_back_at_once_all_get_on() {
    const GROUPS: usize = 80;
    let mut servers = [Server::start(&Setup { executors: 2, ..Setup::default() })];
    let mut issues = Issues::default();
    issues.commit(&mut servers, "i1", Some(1));
    let mut roamers: Vec<Roamer> =
        (0..GROUPS).map(|n| Roamer::new(&format!("g{n}"), &format!("c{n}"))).collect();
    for roamer in &mut roamers {
        roamer.connect(servers[0].addr);
    }
    for roamer in &mut roamers {
        roamer.read_until(|rows| rows.len() == 1).unwrap();
        roamer.socket = None;
    }
    for k in 0..20 {
        issues.step(&mut servers, k);
    }
    // Everybody with a cookie, before anybody reads.
    for roamer in &mut roamers {
        roamer.connect(servers[0].addr);
    }
    for roamer in &mut roamers {
        roamer.read_until(|rows| *rows == issues.0).unwrap();
    }
}
