//! The messages of a live server against a recording of PostgreSQL 15: the same meaning, and every
//! damaged byte sequence is an error.
//!
//! `ZERORING_RECORD=1` makes the recording anew.

// A failed unwrap is a failed test.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::collections::HashMap;
use std::fmt::Write as _;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use zeroring_net::pg::local_server::LocalServer;
use zeroring_net::pg::pgoutput::{PgOutput, TupleColumn, TupleData, decode};
use zeroring_net::pg::row::unhex;
use zeroring_net::pg::{Client, PgConfig, StreamEvent};

const SCRIPT: &[&str] = &[
    "CREATE TYPE mood AS ENUM ('sad', 'ok');
     CREATE TABLE t (id int PRIMARY KEY, a text, m mood, big text);
     ALTER TABLE t ALTER big SET STORAGE EXTERNAL;
     CREATE TABLE by_index (x int NOT NULL, y text NOT NULL, z bytea);
     CREATE UNIQUE INDEX i ON by_index (y, x);
     ALTER TABLE by_index REPLICA IDENTITY USING INDEX i;
     CREATE TABLE \"Full\" (a int[], b numeric(10,2)); ALTER TABLE \"Full\" REPLICA IDENTITY FULL;
     CREATE PUBLICATION p FOR ALL TABLES;",
    "SELECT pg_create_logical_replication_slot('s', 'pgoutput')",
    "INSERT INTO t VALUES (1, 'ä', 'ok', repeat('x', 3000)), (2, NULL, NULL, '')",
    "UPDATE t SET a = 'b' WHERE id = 1",
    "UPDATE t SET id = 3 WHERE id = 2",
    "DELETE FROM t WHERE id = 3",
    "BEGIN; INSERT INTO by_index VALUES (1, 'k', '\\x00ff'); UPDATE by_index SET z = NULL;
     UPDATE by_index SET y = 'l'; DELETE FROM by_index; COMMIT",
    "INSERT INTO \"Full\" VALUES ('{1,NULL}', 1.5); UPDATE \"Full\" SET b = 2; DELETE FROM \"Full\"",
    "TRUNCATE t, by_index RESTART IDENTITY CASCADE",
    "SELECT pg_logical_emit_message(true, 'in/tx', 'content')",
    "SELECT pg_logical_emit_message(false, 'outside', '')",
    "SELECT pg_replication_origin_create('elsewhere')",
    "SELECT pg_replication_origin_session_setup('elsewhere')",
    "BEGIN; SELECT pg_replication_origin_xact_setup('0/ABC', '2020-01-01'); INSERT INTO t (id) VALUES (9); COMMIT",
    "SELECT pg_replication_origin_session_reset()",
    "SELECT pg_logical_emit_message(true, 'end', '')",
];

fn recording() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden/pgoutput_15.txt")
}

/// Runs the script and returns the messages as they came.
fn live() -> Vec<Vec<u8>> {
    let server = LocalServer::start(&[]).unwrap();
    let config = PgConfig::parse(&server.url("postgres")).unwrap();
    let mut sql = Client::connect(&config).unwrap();
    for statement in SCRIPT {
        sql.batch_execute(statement).unwrap();
    }
    let client = Client::connect_replication(&config).unwrap();
    let mut stream = client
        .start_replication(
            "START_REPLICATION SLOT s LOGICAL 0/0 \
             (proto_version '1', publication_names 'p', messages 'true')",
        )
        .unwrap();
    let deadline = Instant::now() + Duration::from_secs(120);
    let (mut messages, mut ended) = (vec![], false);
    loop {
        match stream.next(Some(deadline), None).unwrap() {
            StreamEvent::Data { payload, .. } => {
                messages.push(payload.to_vec());
                match decode(payload).unwrap() {
                    PgOutput::Message { prefix: "end", .. } => ended = true,
                    PgOutput::Commit { .. } if ended => return messages,
                    _ => {}
                }
            }
            StreamEvent::KeepAlive { .. } => {}
            other => panic!("{other:?}"),
        }
    }
}

/// A message in words, without what differs from run to run: LSNs, times, object ids.
fn describe(message: &PgOutput<'_>, names: &mut HashMap<u32, String>) -> String {
    let tuple = |t: TupleData<'_>| {
        let mut out = String::new();
        for column in t.columns() {
            match column {
                TupleColumn::Null => out.push_str(" NULL"),
                TupleColumn::Unchanged => out.push_str(" unchanged"),
                TupleColumn::Text(raw) if raw.len() > 100 => {
                    let _ = write!(out, " [{} bytes]", raw.len());
                }
                TupleColumn::Text(raw) => {
                    let _ = write!(out, " {:?}", String::from_utf8_lossy(raw));
                }
                TupleColumn::Binary(raw) => {
                    let _ = write!(out, " binary {raw:?}");
                }
            }
        }
        out
    };
    match message {
        PgOutput::Begin { final_lsn, commit_time_us, xid } => {
            assert!(*final_lsn > 0 && *xid > 0 && *commit_time_us != 0);
            "begin".to_owned()
        }
        PgOutput::Commit { commit_lsn, end_lsn, .. } => {
            assert!(commit_lsn < end_lsn);
            "commit".to_owned()
        }
        PgOutput::Origin { commit_lsn, name } => format!("origin {name} at {commit_lsn:X}"),
        PgOutput::Type { namespace, name, .. } => format!("type {namespace}.{name}"),
        PgOutput::Relation(r) => {
            names.insert(r.oid, format!("{}.{}", r.namespace, r.name));
            let mut out = format!("relation {}.{} {}", r.namespace, r.name, char::from(r.identity));
            for c in &r.columns {
                let oid = if c.type_oid < 16384 { c.type_oid } else { 0 };
                let key = if c.is_key { " key" } else { "" };
                let _ = write!(out, ", {} {oid} {}{key}", c.name, c.type_modifier);
            }
            out
        }
        PgOutput::Insert { relation, new } => format!("insert {}:{}", names[relation], tuple(*new)),
        PgOutput::Update { relation, old, new } => {
            let old = old.map_or(" -".to_owned(), |o| format!(" {}", describe_old(&o, &tuple)));
            format!("update {}:{old} ->{}", names[relation], tuple(*new))
        }
        PgOutput::Delete { relation, old } => {
            format!("delete {}: {}", names[relation], describe_old(old, &tuple))
        }
        PgOutput::Truncate { cascade, restart_identity, relations } => {
            let names: Vec<&str> = relations.iter().map(|r| names[r].as_str()).collect();
            format!("truncate {names:?} cascade {cascade} restart {restart_identity}")
        }
        PgOutput::Message { transactional, lsn, prefix, content } => {
            assert!(*lsn > 0);
            format!("message {transactional} {prefix} {:?}", String::from_utf8_lossy(content))
        }
        PgOutput::Unknown(tag) => format!("unknown {tag}"),
    }
}

fn describe_old(
    old: &zeroring_net::pg::pgoutput::OldTuple<'_>,
    tuple: &dyn Fn(TupleData<'_>) -> String,
) -> String {
    use zeroring_net::pg::pgoutput::OldTuple;
    match old {
        OldTuple::Key(t) => format!("key{}", tuple(*t)),
        OldTuple::Row(t) => format!("row{}", tuple(*t)),
    }
}

fn describe_all(messages: &[Vec<u8>]) -> Vec<String> {
    let mut names = HashMap::new();
    messages.iter().map(|m| describe(&decode(m).unwrap(), &mut names)).collect()
}

/// The recording: a line in hexadecimal and a line in words for each message.
fn recorded() -> (Vec<Vec<u8>>, Vec<String>) {
    let text = std::fs::read_to_string(recording()).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    lines.chunks(2).map(|pair| (unhex(pair[0].as_bytes()).unwrap(), pair[1].to_owned())).unzip()
}

#[test]
fn a_live_server_says_what_was_recorded() {
    let live = live();
    if std::env::var_os("ZERORING_RECORD").is_some() {
        let mut out = String::new();
        for (bytes, words) in live.iter().zip(describe_all(&live)) {
            for b in bytes {
                let _ = write!(out, "{b:02x}");
            }
            let _ = writeln!(out, "\n{words}");
        }
        std::fs::create_dir_all(recording().parent().unwrap()).unwrap();
        std::fs::write(recording(), out).unwrap();
    }
    assert_eq!(describe_all(&live), recorded().1);
}

#[test]
fn the_recording_is_decoded_as_recorded() {
    let (messages, words) = recorded();
    assert_eq!(describe_all(&messages), words);
    for kind in [
        "begin", "commit", "origin", "type", "relation", "insert", "update", "delete", "truncate",
        "message",
    ] {
        assert!(words.iter().any(|w| w.starts_with(kind)), "no {kind} was recorded");
    }
}

#[test]
fn every_truncated_or_lengthened_message_is_an_error() {
    for message in recorded().0 {
        for cut in 0..message.len() {
            assert!(decode(&message[..cut]).is_err(), "{cut} of {message:?}");
        }
        let longer = [&message[..], &[0]].concat();
        assert!(decode(&longer).is_err(), "{longer:?}");
    }
}

proptest! {
    #[test]
    fn damaged_messages_never_panic(which in any::<prop::sample::Index>(), at in any::<prop::sample::Index>(), byte in any::<u8>()) {
        let (messages, _) = recorded();
        let mut message = messages[which.index(messages.len())].clone();
        let at = at.index(message.len());
        message[at] = byte;
        if let Ok(PgOutput::Insert { new, .. } | PgOutput::Update { new, .. }) = decode(&message) {
            prop_assert_eq!(new.columns().count(), new.len());
        }
    }
}
