//! What each message of the stream does to the rows and to the change log, case by case.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod kit;

use std::path::Path;
use std::sync::Arc;

use kit::*;
use zeroring_core::change::message::{
    ChangeMessage, LiteValue, Relation, ReplicaIdentity, TupleValue,
};
use zeroring_core::change::published::{PublishedSchema, PublishedTable};
use zeroring_core::value::Value;
use zeroring_storage::replica::ReplicaError;
use zeroring_storage::replica::reader::{ReaderOptions, ReplicaReader};
use zeroring_storage::replica::startup::{Found, find};
use zeroring_storage::replica::writer::{Applied, ReplicaWriter};

const LOG: &str =
    "SELECT pos, \"table\", rowKey, op FROM \"_zero.changeLog2\" ORDER BY stateVersion, pos";

fn absent() -> TupleValue {
    TupleValue::Absent
}

fn one_table(columns: &[(&str, &str)], keys: &[&[&str]]) -> (PublishedSchema, PublishedTable) {
    let t = table("public", "t", columns);
    let indexes = keys
        .iter()
        .enumerate()
        .map(|(i, k)| index("public", "t", &format!("k{i}"), true, k))
        .collect();
    (PublishedSchema { tables: vec![t.clone()], indexes }, t)
}

struct Lab {
    _dir: tempfile::TempDir,
    path: std::path::PathBuf,
    w: ReplicaWriter,
    r: Arc<Relation>,
    n: u64,
}

impl Lab {
    fn new(
        columns: &[(&str, &str)],
        keys: &[&[&str]],
        identity: ReplicaIdentity,
        id: &[&str],
    ) -> Lab {
        let (_dir, path) = place();
        let (schema, t) = one_table(columns, keys);
        create(&path, &schema, &[]);
        Lab { w: writer(&path), r: relation(&t, identity, id), _dir, path, n: 0 }
    }

    fn run(&mut self, changes: Vec<ChangeMessage>) -> Arc<zeroring_core::change::Commit> {
        self.n += 1;
        transact(&mut self.w, self.n, changes)
    }

    fn insert(&self, values: impl IntoIterator<Item = LiteValue>) -> ChangeMessage {
        ChangeMessage::Insert { relation: self.r.clone(), new: tuple(values) }
    }
    fn update(&self, old: Option<Vec<TupleValue>>, new: Vec<TupleValue>) -> ChangeMessage {
        ChangeMessage::Update { relation: self.r.clone(), old, new }
    }
    fn delete(&self, old: Vec<TupleValue>) -> ChangeMessage {
        ChangeMessage::Delete { relation: self.r.clone(), old }
    }
    fn rows(&self) -> Vec<String> {
        dump(&self.path, "SELECT * FROM t ORDER BY 1, 2")
    }
    fn log(&self) -> Vec<String> {
        dump(&self.path, LOG)
    }
}

const PLAIN: &[(&str, &str)] = &[("id", "int4!"), ("a", "text"), ("b", "text")];

#[test]
fn log_keys_are_the_originals_bytes() {
    // The vector of the spec, columns given out of order.
    let columns = [
        ("ts", "timestamptz!"),
        ("b", "bool!"),
        ("i8", "int8!"),
        ("f", "float8!"),
        ("t", "text!"),
        ("x", "text"),
    ];
    let keys: &[&str] = &["b", "f", "i8", "t", "ts"];
    let mut lab = Lab::new(&columns, &[keys], ReplicaIdentity::Default, keys);
    let row = |t: &str, f: f64| {
        [
            LiteValue::Real(1704067200123.456),
            int(1),
            int(9007199254740993),
            LiteValue::Real(f),
            text(t),
            text("x"),
        ]
    };
    let changes = vec![
        lab.insert(row("q\"\\é", 1.5)),
        lab.insert(row("\u{1}\n\u{7f}\u{2028}/", 1e21)),
        lab.insert(row("", 1e-7)),
        lab.insert(row("", -0.0)),
    ];
    lab.run(changes);
    assert_eq!(
        lab.log(),
        [
            "0|t|{\"b\":1,\"f\":1.5,\"i8\":9007199254740993,\"t\":\"q\\\"\\\\é\",\"ts\":1704067200123.456}|s",
            "1|t|{\"b\":1,\"f\":1e+21,\"i8\":9007199254740993,\"t\":\"\\u0001\\n\u{7f}\u{2028}/\",\"ts\":1704067200123.456}|s",
            "2|t|{\"b\":1,\"f\":1e-7,\"i8\":9007199254740993,\"t\":\"\",\"ts\":1704067200123.456}|s",
            "3|t|{\"b\":1,\"f\":0,\"i8\":9007199254740993,\"t\":\"\",\"ts\":1704067200123.456}|s",
        ]
    );
    // The original passes keys through JSON(): ours are in that form already.
    let normal = "SELECT count(*) FROM \"_zero.changeLog2\" WHERE rowKey <> json(rowKey)";
    assert_eq!(dump(&lab.path, normal), ["0"]);
}

#[test]
fn positions_and_operations_follow_the_original() {
    let mut lab = Lab::new(PLAIN, &[&["id"]], ReplicaIdentity::Default, &["id"]);
    let key = |n: i64| vec![some(int(n)), absent(), absent()];
    let full = |n: i64, s: &str| tuple([int(n), text(s), text(s)]);
    let changes = vec![
        lab.insert([int(1), text("a"), text("a")]), // 0
        lab.insert([int(2), text("a"), text("a")]), // 1
        lab.update(None, full(1, "b")),             // 2
        lab.update(Some(key(2)), full(3, "b")),     // delete 3, set 4
        lab.delete(key(1)),                         // 5
    ];
    let commit = lab.run(changes);
    assert_eq!(lab.log(), ["3|t|{\"id\":2}|d", "4|t|{\"id\":3}|s", "5|t|{\"id\":1}|d"]);
    assert_eq!(lab.rows(), [format!("3|b|b|{}", version(1))]);
    assert_eq!(commit.tables[0].rows.len(), 1, "one row is there that was not");
    assert_eq!(commit.upstream_commit_ms, 1.5);

    // Entries of a row move on with it; one table-wide entry per version, at -1.
    let update = lab.update(None, full(3, "c"));
    lab.run(vec![update]);
    let truncate = ChangeMessage::Truncate { relations: vec![lab.r.clone(), lab.r.clone()] };
    let again = lab.insert([int(9), text("z"), text("z")]);
    let commit = lab.run(vec![truncate, again]);
    assert!(commit.tables[0].truncated);
    let log = "SELECT stateVersion, pos, \"table\", rowKey, op, backfillingColumnVersions FROM \"_zero.changeLog2\" ORDER BY 1, 2";
    let v = |n: u64| version(n).to_string();
    assert_eq!(
        dump(&lab.path, log),
        [
            format!("{}|3|t|{{\"id\":2}}|d|{{}}", v(1)),
            format!("{}|5|t|{{\"id\":1}}|d|{{}}", v(1)),
            format!("{}|0|t|{{\"id\":3}}|s|{{}}", v(2)),
            format!("{}|-1|t|{}|t|{{}}", v(3), v(3)),
            format!("{}|0|t|{{\"id\":9}}|s|{{}}", v(3)),
        ]
    );
    assert_eq!(lab.rows(), [format!("9|z|z|{}", v(3))]);
    assert_eq!(
        dump(&lab.path, "SELECT stateVersion, typeof(writeTimeMs) FROM \"_zero.replicationState\""),
        [format!("{}|integer", v(3))]
    );
}

#[test]
fn identity_full_names_rows_by_the_clients_key() {
    let mut lab = Lab::new(PLAIN, &[&["id"]], ReplicaIdentity::Full, &[]);
    let full = |n: i64, s: &str| tuple([int(n), text(s), text(s)]);
    let insert = lab.insert([int(1), text("a"), text("a")]);
    let update = lab.update(Some(full(1, "a")), full(1, "b"));
    lab.run(vec![insert, update]);
    // Delete and set of the same key: the set wins at the later place.
    assert_eq!(lab.log(), ["2|t|{\"id\":1}|s"]);
    let delete = lab.delete(full(1, "b"));
    lab.run(vec![delete]);
    assert_eq!(lab.log(), ["0|t|{\"id\":1}|d"]);
    assert!(lab.rows().is_empty());
}

#[test]
fn identity_full_without_a_key_matches_whole_rows() {
    let mut lab = Lab::new(PLAIN, &[], ReplicaIdentity::Full, &[]);
    let row = |n: i64, s: LiteValue| [int(n), s.clone(), s];
    let changes = vec![
        lab.insert(row(1, text("a"))),
        lab.insert(row(1, text("a"))),
        lab.insert(row(1, LiteValue::Null)),
        lab.update(Some(tuple(row(1, text("a")))), tuple(row(2, text("b")))),
        lab.delete(tuple(row(1, LiteValue::Null))),
    ];
    let commit = lab.run(changes);
    let v = version(1);
    assert_eq!(
        lab.rows(),
        [format!("1|a|a|{v}"), format!("2|b|b|{v}")],
        "one of the twins changed"
    );
    assert!(lab.log().is_empty() && commit.tables.is_empty(), "clients cannot have the table");
}

#[test]
fn updates_without_any_key_name_the_cure() {
    let mut lab = Lab::new(PLAIN, &[], ReplicaIdentity::Default, &[]);
    let insert = lab.insert([int(1), text("a"), text("a")]);
    lab.run(vec![insert]);
    lab.w.apply(&ChangeMessage::Begin { watermark: version(2), commit_time_ms: 0.0 }).unwrap();
    let update = lab.update(None, tuple([int(1), text("b"), text("b")]));
    let error = lab.w.apply(&update).unwrap_err();
    assert!(
        matches!(&error, ReplicaError::NoKey { table, op: "update" } if table == "t"),
        "{error}"
    );
    assert!(!error.needs_resync());
    assert!(!lab.w.in_transaction(), "rolled back");
}

#[test]
fn unchanged_toasted_values_stay() {
    let mut lab = Lab::new(PLAIN, &[&["id"]], ReplicaIdentity::Default, &["id"]);
    let insert = lab.insert([int(1), text("long"), text("b")]);
    lab.run(vec![insert]);
    let update = lab.update(None, vec![some(int(1)), absent(), some(text("c"))]);
    let commit = lab.run(vec![update]);
    assert_eq!(lab.rows(), [format!("1|long|c|{}", version(2))]);
    let change = &commit.tables[0].rows[0];
    assert_eq!(
        change.new.as_ref().unwrap().values[..],
        [Value::Number(1.0), Value::string("long"), Value::string("c")]
    );
    // A row that is not there: what is given becomes a row.
    let update = lab.update(None, vec![some(int(7)), absent(), some(text("c"))]);
    let commit = lab.run(vec![update]);
    assert_eq!(lab.rows()[1], format!("7|null|c|{}", version(3)));
    assert!(commit.tables[0].rows[0].old.is_none());
}

#[test]
fn a_toasted_key_is_taken_from_the_old_key() {
    let columns = [("k", "text!"), ("a", "text")];
    let mut lab = Lab::new(&columns, &[&["k"]], ReplicaIdentity::Default, &["k"]);
    let insert = lab.insert([text("big"), text("1")]);
    lab.run(vec![insert]);
    let update =
        lab.update(Some(vec![some(text("big")), absent()]), vec![absent(), some(text("2"))]);
    lab.run(vec![update]);
    assert_eq!(lab.rows(), [format!("big|2|{}", version(2))]);
    assert_eq!(lab.log(), ["1|t|{\"k\":\"big\"}|s"]);
    // The same for a row that is missing.
    let update =
        lab.update(Some(vec![some(text("gone")), absent()]), vec![absent(), some(text("3"))]);
    lab.run(vec![update]);
    assert_eq!(lab.rows()[1], format!("gone|3|{}", version(3)));
}

#[test]
fn rows_that_swap_a_unique_value_keep_their_toasted_columns() {
    let mut lab = Lab::new(PLAIN, &[&["id"], &["a"]], ReplicaIdentity::Default, &["id"]);
    let inserts = vec![
        lab.insert([int(1), text("x"), text("long one")]),
        lab.insert([int(2), text("y"), text("long two")]),
    ];
    lab.run(inserts);
    let swap = vec![
        lab.update(None, vec![some(int(1)), some(text("y")), absent()]),
        lab.update(None, vec![some(int(2)), some(text("x")), absent()]),
    ];
    let commit = lab.run(swap);
    let v = version(2);
    assert_eq!(lab.rows(), [format!("1|y|long one|{v}"), format!("2|x|long two|{v}")]);
    assert_eq!(lab.log(), ["0|t|{\"id\":1}|s", "1|t|{\"id\":2}|s"]);
    assert_eq!(commit.tables[0].rows.len(), 2);
    assert!(commit.tables[0].rows.iter().all(|r| r.old.is_some() && r.new.is_some()));

    // One whose change never comes is gone, and the log says so.
    let commit = {
        let u = lab.update(None, vec![some(int(1)), some(text("x")), absent()]);
        lab.run(vec![u])
    };
    assert_eq!(lab.rows(), [format!("1|x|long one|{}", version(3))]);
    assert_eq!(lab.log(), ["0|t|{\"id\":1}|s", "1|t|{\"id\":2}|d"]);
    assert_eq!(commit.tables[0].rows.len(), 2);
}

#[test]
fn an_insert_replaces_whatever_is_in_its_way() {
    let mut lab = Lab::new(PLAIN, &[&["id"], &["a"]], ReplicaIdentity::Default, &["id"]);
    let inserts = vec![
        lab.insert([int(1), text("x"), text("1")]),
        lab.insert([int(2), text("y"), text("2")]),
    ];
    lab.run(inserts);
    // Its key and its unique value belong to two other rows.
    let insert = lab.insert([int(1), text("y"), text("3")]);
    let commit = lab.run(vec![insert]);
    assert_eq!(lab.rows(), [format!("1|y|3|{}", version(2))]);
    let mut sides: Vec<_> =
        commit.tables[0].rows.iter().map(|r| (r.old.is_some(), r.new.is_some())).collect();
    sides.sort_unstable();
    assert_eq!(sides, [(true, false), (true, true)]);
}

#[test]
fn commits_show_values_as_they_will_be_read() {
    let columns = [
        ("id", "int4!"),
        ("j", "jsonb"),
        ("u", "uuid"),
        ("k", "~point_kind"),
        ("n", "numeric"),
        ("f", "float4"),
        ("hidden", "xml"),
        ("ts", "timestamp"),
    ];
    let mut lab = Lab::new(&columns, &[&["id"]], ReplicaIdentity::Default, &["id"]);
    let tricky = [
        "1.50", "7e3", "0x10", " 12 ", "+5", "1e400", "-0", "007", ".5", "5.", "e", "", "12abc",
        "Infinity",
    ];
    for (i, s) in tricky.iter().enumerate() {
        let i = i as i64;
        let json = serde_json::Value::from(*s).to_string();
        let json = if serde_json::from_str::<f64>(s).is_ok() { (*s).to_owned() } else { json };
        let insert = lab.insert([
            int(i),
            text(&json),
            text(s),
            text(s),
            LiteValue::Real(3.0),
            int(16_777_217),
            text(s),
            LiteValue::Real(-0.0009765625),
        ]);
        lab.run(vec![insert]);
        let update = lab.update(
            None,
            tuple([
                int(i),
                text(&json),
                text(s),
                text(s),
                LiteValue::Real(f64::NAN),
                LiteValue::Real(0.1),
                text("h"),
                int(5),
            ]),
        );
        let commit = lab.run(vec![update]);
        let mut reader = ReplicaReader::open(&lab.path, &ReaderOptions::default()).unwrap();
        reader.refresh().unwrap();
        let spec = &commit.tables[0].table;
        let new = commit.tables[0].rows[0].new.as_ref().unwrap();
        let read =
            reader.get(spec, &spec.primary_key, &[Value::Number(i as f64)]).unwrap().unwrap();
        // Debug tells 1 and 1.0 of different variants apart, equality alone would not.
        assert_eq!(format!("{:?}", &read.values), format!("{:?}", &new.values), "{s}");
        assert_eq!(read.version, new.version);
    }
}

#[test]
fn a_value_that_cannot_be_read_does_not_stop_replication() {
    let columns = [("id", "int4!"), ("j", "json"), ("a", "text")];
    let mut lab = Lab::new(&columns, &[&["id"]], ReplicaIdentity::Default, &["id"]);
    let insert = lab.insert([int(1), text("1e400"), text("a")]);
    let commit = lab.run(vec![insert]);
    assert!(commit.tables[0].truncated, "readers of the table start over, and tell who asks");
    let update = lab.update(None, vec![some(int(1)), absent(), some(text("b"))]);
    assert!(lab.run(vec![update]).tables[0].truncated);
    let update = lab.update(None, tuple([int(1), text("{}"), text("b")]));
    assert!(lab.run(vec![update]).tables[0].truncated, "the old row is unknown");
    let update = lab.update(None, tuple([int(1), text("[]"), text("b")]));
    assert!(!lab.run(vec![update]).tables[0].truncated);
}

#[test]
fn a_transaction_is_applied_once_and_whole() {
    let mut lab = Lab::new(PLAIN, &[&["id"]], ReplicaIdentity::Default, &["id"]);
    let insert = |lab: &Lab, n: i64| lab.insert([int(n), text("a"), text("a")]);
    let first = insert(&lab, 1);
    lab.run(vec![first]);

    // Repeated by the upstream: skipped, whatever it holds.
    for n in [0, 1] {
        let watermark = version(n);
        let begin = ChangeMessage::Begin { watermark: watermark.clone(), commit_time_ms: 0.0 };
        for m in [begin, insert(&lab, 99), ChangeMessage::Commit { watermark }] {
            assert!(matches!(lab.w.apply(&m).unwrap(), Applied::Skipped));
        }
    }
    assert_eq!(lab.rows().len(), 1);

    // Killed in the middle: the destructor never runs, a new process opens the file.
    let begin = |n: u64| ChangeMessage::Begin { watermark: version(n), commit_time_ms: 0.0 };
    lab.w.apply(&begin(2)).unwrap();
    lab.w.apply(&insert(&lab, 2)).unwrap();
    assert_eq!(lab.rows().len(), 1, "nobody sees it before the commit");
    let copy = lab.path.with_file_name("copy.db");
    copy_replica(&lab.path, &copy);
    match find(&copy).unwrap() {
        Found::Replica(info) => assert_eq!(info.state_version, version(1)),
        other => panic!("{other:?}"),
    }
    let mut resumed = writer(&copy);
    assert_eq!(resumed.version(), &version(1));
    let commit = transact(&mut resumed, 2, vec![insert(&lab, 2)]);
    assert_eq!((&commit.previous, &commit.version), (&version(1), &version(2)));
    assert_eq!(resumed.sync().unwrap(), version(2));

    // The stream is lost.
    assert!(matches!(lab.w.apply(&ChangeMessage::Rollback).unwrap(), Applied::RolledBack));
    assert!(matches!(lab.w.apply(&ChangeMessage::Rollback).unwrap(), Applied::RolledBack));

    // A broken source is an error that leaves the replica as it was.
    for wrong in [
        vec![insert(&lab, 3)],
        vec![ChangeMessage::Commit { watermark: version(3) }],
        vec![begin(3), begin(4)],
        vec![begin(3), insert(&lab, 3), ChangeMessage::Commit { watermark: version(4) }],
    ] {
        let result = wrong.iter().map(|m| lab.w.apply(m)).find(Result::is_err);
        assert!(matches!(result, Some(Err(ReplicaError::OutOfOrder(_)))), "{result:?}");
        assert!(!lab.w.in_transaction());
    }
    assert_eq!(lab.rows().len(), 1);
    let next = insert(&lab, 4);
    lab.run(vec![]);
    lab.run(vec![next]);
    assert_eq!(lab.rows().len(), 2);
}

/// The bytes that a killed process leaves behind.
fn copy_replica(from: &Path, to: &Path) {
    for suffix in ["", "-wal"] {
        let name = |p: &Path| format!("{}{suffix}", p.display());
        std::fs::copy(name(from), name(to)).unwrap();
    }
}

#[test]
fn a_changed_schema_is_told_and_changes_nothing() {
    let mut lab = Lab::new(PLAIN, &[&["id"]], ReplicaIdentity::Default, &["id"]);
    let other = table("public", "t", &[("id", "int4!"), ("new", "text")]);
    let unknown = table("s", "u", &[("id", "int4!")]);
    for (t, values) in [(other, vec![int(1), text("a")]), (unknown, vec![int(1)])] {
        let r = relation(&t, ReplicaIdentity::Default, &["id"]);
        lab.w.apply(&ChangeMessage::Begin { watermark: version(1), commit_time_ms: 0.0 }).unwrap();
        let error =
            lab.w.apply(&ChangeMessage::Insert { relation: r, new: tuple(values) }).unwrap_err();
        assert!(error.needs_resync(), "{error}");
    }
    assert_eq!(lab.w.version().as_str(), INITIAL);
    lab.run(vec![]);
}

#[test]
fn only_a_changed_value_of_the_permissions_is_flagged() {
    let (_dir, path) = place();
    let t = table(
        "zero",
        "permissions",
        &[("permissions", "jsonb"), ("hash", "text"), ("lock", "bool!")],
    );
    let schema = PublishedSchema {
        tables: vec![t.clone()],
        indexes: vec![index("zero", "permissions", "permissions_pkey", true, &["lock"])],
    };
    create(&path, &schema, &[vec![vec![LiteValue::Null, LiteValue::Null, int(1)]]]);
    let mut w = writer(&path);
    let r = relation(&t, ReplicaIdentity::Default, &["lock"]);
    let mut set = |n: u64, p: LiteValue, hash: &str| {
        let new = tuple([p, text(hash), int(1)]);
        transact(&mut w, n, vec![ChangeMessage::Update { relation: r.clone(), old: None, new }])
            .permissions_changed
    };
    assert!(!set(1, LiteValue::Null, "x"));
    assert!(set(2, text("{\"tables\":{}}"), "y"));
    assert!(!set(3, text("{\"tables\":{}}"), "z"));
    assert!(set(4, LiteValue::Null, "z"));
    let truncate = ChangeMessage::Truncate { relations: vec![r.clone()] };
    assert!(transact(&mut w, 5, vec![truncate]).permissions_changed);
}

#[test]
fn columns_named_like_the_rowid_do_not_confuse() {
    let columns = [("rowid", "int4!"), ("oid", "text"), ("a", "text")];
    let mut lab = Lab::new(&columns, &[&["rowid"]], ReplicaIdentity::Default, &["rowid"]);
    let changes = vec![
        lab.insert([int(5), text("o"), text("1")]),
        lab.insert([int(1), text("o"), text("2")]),
        lab.update(None, tuple([int(1), text("p"), text("3")])),
        lab.delete(vec![some(int(5)), absent(), absent()]),
    ];
    lab.run(changes);
    assert_eq!(lab.rows(), [format!("1|p|3|{}", version(1))]);
}

#[test]
fn the_log_can_be_read_from_any_version() {
    use zeroring_storage::changelog::{Changes, LogOp, changes_since};
    let mut lab = Lab::new(PLAIN, &[&["id"]], ReplicaIdentity::Default, &["id"]);
    for n in 1..=3 {
        let insert = lab.insert([int(n), text("a"), text("a")]);
        lab.run(vec![insert]);
    }
    let delete = lab.delete(vec![some(int(1)), absent(), absent()]);
    lab.run(vec![delete]);
    let c = rusqlite::Connection::open(&lab.path).unwrap();
    let since = |n: u64, limit| changes_since(&c, &version(n), limit).unwrap();
    let Changes::Rows(rows) = since(1, 10) else { panic!("rows") };
    let found: Vec<_> =
        rows.iter().map(|r| (r.version.clone(), r.key["id"].as_i64(), r.op)).collect();
    assert_eq!(
        found,
        [
            (version(2), Some(2), LogOp::Set),
            (version(3), Some(3), LogOp::Set),
            (version(4), Some(1), LogOp::Delete),
        ]
    );
    assert_eq!(since(4, 10), Changes::Rows(vec![]));
    assert_eq!(since(1, 2), Changes::TooMany);
    let truncate = ChangeMessage::Truncate { relations: vec![lab.r.clone()] };
    lab.run(vec![truncate]);
    assert_eq!(since(4, 10), Changes::Everything { table: "t".into(), version: version(5) });
    for (broken, part) in [("op = 'q'", "operation q"), ("rowKey = '[]'", "key []")] {
        let log = "UPDATE \"_zero.changeLog2\" SET op = 's'";
        c.execute_batch(&format!("{log}; UPDATE \"_zero.changeLog2\" SET {broken} WHERE pos = -1"))
            .unwrap();
        let error = changes_since(&c, &version(4), 10).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    }
}
