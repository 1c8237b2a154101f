//! LIKE and ILIKE over texts that are not ASCII: the predicate, SQLite and Postgres agree.

#![allow(clippy::unwrap_used, clippy::panic)]

mod sqlite_world;

use std::collections::BTreeSet;
use std::ops::ControlFlow;
use std::sync::Arc;

use zeroring_core::ivm::memory_source::Database;
use zeroring_core::ivm::plan::Plan;
use zeroring_core::ivm::source::{Fetch, Filter, Source};
use zeroring_core::row::Row;
use zeroring_core::schema::{ColumnSpec, Schema, TableId, TableSpec, UniqueKey, ValueType};
use zeroring_core::value::Value;
use zeroring_core::version::StateVersion;
use zeroring_core::zql::compile::{IdentityKeys, compile};
use zeroring_core::zql::like::LikePattern;
use zeroring_net::pg::local_server::LocalServer;
use zeroring_net::pg::{Client, PgConfig};

/// Letters that fold in other ways than ASCII's: two code points for one, one for two forms, a
/// sign that is a letter; composed and decomposed; beyond 16 bits; the ends of the code space.
const TEXTS: &[&str] = &[
    "straße",
    "STRASSE",
    "STRAßE",
    "Straße",
    "москва",
    "МОСКВА",
    "Москва",
    "é",
    "É",
    "e\u{301}",
    "E\u{301}",
    "ñandú",
    "ÑANDÚ",
    "k",
    "K",
    "\u{212A}",
    "x\u{212A}y",
    "å",
    "\u{212B}",
    "Å",
    "ω",
    "Ω",
    "\u{2126}",
    "ǅ",
    "ǆ",
    "Ǆ",
    "ﬀ",
    "ff",
    "İ",
    "i",
    "ı",
    "I",
    "i\u{307}",
    "😀",
    "😀x",
    "𐐀",
    "𐐨",
    "中文",
    "中",
    "\u{D7FF}a",
    "\u{E000}a",
    "\u{FFFD}",
    "\u{10FFFF}",
    "\u{10FFFF}z",
    "100 €",
    "100 €%",
    "",
    "%",
    "_é",
];

const PATTERNS: &[&str] = &[
    "straße",
    "STRASSE",
    "straß%",
    "%SSE",
    "STRA_E",
    "МОСКВА",
    "москва",
    "Мос%",
    "%ВА",
    "%ОСК%",
    "м_____",
    "é",
    "É%",
    "e_",
    "_",
    "__",
    "k",
    "K",
    "\u{212A}",
    "%\u{212A}%",
    "x_y",
    "å",
    "Å%",
    "\u{212B}",
    "ω",
    "Ω%",
    "\u{2126}",
    "ǆ",
    "Ǆ%",
    "FF",
    "ﬀ",
    "İ",
    "i",
    "I%",
    "ı",
    "i_",
    "😀",
    "😀%",
    "😀_",
    "%x",
    "𐐨",
    "𐐀%",
    "中%",
    "_文",
    "\u{D7FF}%",
    "\u{E000}%",
    "\u{FFFD}%",
    "\u{10FFFF}%",
    "%€",
    "%€\\%",
    "100 €%",
    "ñ%",
    "%DÚ",
    "\\é",
    "\\_é",
    "%",
];

const OPERATORS: [&str; 4] = ["LIKE", "NOT LIKE", "ILIKE", "NOT ILIKE"];

type Ids = BTreeSet<usize>;

fn predicate(op: &str, pattern: &str) -> Ids {
    let compiled = LikePattern::new(pattern, op.ends_with("ILIKE")).unwrap();
    let wanted = |text: &&str| compiled.matches(text) != op.starts_with("NOT");
    (0..).zip(TEXTS).filter(|(_, text)| wanted(text)).map(|(id, _)| id).collect()
}

fn table() -> (Schema, Database) {
    let column = |name: &str, value_type, upstream_type: &str| ColumnSpec {
        name: name.into(),
        value_type,
        nullable: false,
        upstream_type: upstream_type.into(),
    };
    let spec = Arc::new(TableSpec {
        id: TableId(0),
        name: "t".into(),
        columns: vec![
            column("id", ValueType::Number, "int4"),
            column("v", ValueType::String, "text"),
        ],
        primary_key: vec![0],
        replica_key: vec![0],
        unique_keys: vec![UniqueKey { columns: vec![0], not_null: true }],
        min_row_version: StateVersion::zero(),
        // Prefixes are looked up in it.
        indexes: vec![vec![1]],
    });
    let mut db = Database::default();
    for (id, text) in TEXTS.iter().enumerate() {
        let values = vec![Value::Number(id as f64), Value::string(*text)];
        db.put(&spec, Row::new(StateVersion::from_lsn(1), values));
    }
    let schema = Schema { tables: [("t".into(), spec)].into(), ..Schema::default() };
    (schema, db)
}

fn sqlite(source: &mut dyn Source, schema: &Schema, op: &str, pattern: &str) -> Ids {
    let ast = serde_json::json!({"table": "t", "where": {"type": "simple", "op": op,
        "left": {"type": "column", "name": "v"}, "right": {"type": "literal", "value": pattern}}});
    let ast = serde_json::from_value(ast).unwrap();
    let (plan, params) = compile(&ast, schema, &IdentityKeys::default()).unwrap();
    let fetch = Fetch {
        plan: &plan,
        node: Plan::ROOT,
        params: &params,
        keys: None,
        filter: Filter::Whole,
        from: None,
        before: None,
        limit: None,
        ordered: false,
    };
    let mut ids = Ids::new();
    source
        .fetch(&fetch, &mut |row| {
            let Value::Number(id) = row.values[0] else { panic!("{row:?}") };
            ids.insert(id as usize);
            ControlFlow::Continue(())
        })
        .unwrap();
    ids
}

/// All patterns at once: the ids that each finds.
fn postgres(sql: &mut Client, op: &str) -> Vec<Ids> {
    // Unicode's own case, whatever the machine's locales are.
    let text = format!(
        "SELECT coalesce(string_agg(t.id::text, ','), '') FROM p \
         LEFT JOIN t ON t.v {op} p.v COLLATE \"und-x-icu\" GROUP BY p.id ORDER BY p.id"
    );
    let rows = sql.query(&text, &[]).unwrap();
    let ids = |list: &str| list.split(',').filter_map(|id| id.parse().ok()).collect();
    rows.iter().map(|row| ids(row.get::<&str>(0).unwrap())).collect()
}

#[test]
fn like_means_the_same_in_the_predicate_in_sqlite_and_in_postgres() {
    let (schema, db) = table();
    let mut world = sqlite_world::sqlite(&schema, &db, &StateVersion::from_lsn(1));
    let server = LocalServer::start(&["fsync=off"]).unwrap();
    let mut sql = Client::connect(&PgConfig::parse(&server.url("postgres")).unwrap()).unwrap();
    let values = |texts: &[&str]| {
        let row = |(id, text): (usize, &&str)| format!("({id}, '{text}')");
        texts.iter().enumerate().map(row).collect::<Vec<_>>().join(",")
    };
    sql.batch_execute(&format!(
        "CREATE TABLE t (id int, v text); CREATE TABLE p (id int, v text); \
         INSERT INTO t VALUES {}; INSERT INTO p VALUES {}",
        values(TEXTS),
        values(PATTERNS)
    ))
    .unwrap();
    let mut found = 0;
    for op in OPERATORS {
        let answers = postgres(&mut sql, op);
        assert_eq!(answers.len(), PATTERNS.len());
        for (pattern, postgres) in PATTERNS.iter().zip(answers) {
            let want = predicate(op, pattern);
            let texts = |ids: &Ids| ids.iter().map(|&id| TEXTS[id]).collect::<Vec<_>>();
            let got = sqlite(&mut world, &schema, op, pattern);
            assert_eq!(texts(&got), texts(&want), "{op} {pattern:?} in SQLite");
            assert_eq!(texts(&postgres), texts(&want), "{op} {pattern:?} in Postgres");
            found += want.len();
        }
    }
    assert_eq!(found, TEXTS.len() * PATTERNS.len() * 2, "each text matches or does not");
}
