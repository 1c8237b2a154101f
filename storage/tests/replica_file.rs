//! A new replica file is what the original writes, reads back as the schema that clients see, and
//! is there wholly or not at all.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod kit;

use kit::*;
use zeroring_core::change::message::LiteValue;
use zeroring_core::change::published::PublishedSchema;
use zeroring_core::schema::{Unsyncable, ValueType};
use zeroring_core::value::Value;
use zeroring_core::version::StateVersion;
use zeroring_storage::replica::initial::{InitialSpec, InitialSync, RowBatch, copy_columns};
use zeroring_storage::replica::reader::{ReaderOptions, ReplicaReader};
use zeroring_storage::replica::schema::TableIds;
use zeroring_storage::replica::startup::{Found, find};
use zeroring_storage::replica::{ReplicaError, ResetReason};

/// The schema of a reference run of zero-cache 1.9.0, whose `sqlite_master` the tests compare.
fn reference_schema() -> PublishedSchema {
    let columns = [
        ("id", "text!"),
        ("n", "int4!"),
        ("j", "jsonb"),
        ("a", "text[]"),
        ("u", "uuid"),
        ("b", "bool"),
    ];
    PublishedSchema {
        tables: vec![
            table("public", "Foo-t", &columns),
            table(
                "zero",
                "permissions",
                &[("permissions", "jsonb"), ("hash", "text"), ("lock", "bool!")],
            ),
        ],
        indexes: vec![
            index("public", "Foo-t", "Foo-t_pkey", true, &["id"]),
            index("public", "Foo-t", "Foo-t_u_key", true, &["u"]),
            index("public", "Foo-t", "i", true, &["n DESC", "id"]),
            index("zero", "permissions", "permissions_pkey", true, &["lock"]),
        ],
    }
}

#[test]
fn the_file_is_the_originals() {
    let (_dir, path) = place();
    let row = vec![text("a"), int(1), text("1.50"), text("[\"x\"]"), LiteValue::Null, int(1)];
    create(&path, &reference_schema(), &[vec![row], vec![]]);

    let sql =
        dump(&path, "SELECT sql FROM sqlite_master WHERE name NOT LIKE 'sqlite%' ORDER BY rowid");
    let expected = [
        "CREATE TABLE \"_zero.versionHistory\" (\n      dataVersion INTEGER NOT NULL,\n      schemaVersion INTEGER NOT NULL,\n      minSafeVersion INTEGER NOT NULL,\n\n      lock INTEGER PRIMARY KEY DEFAULT 1 CHECK (lock=1)\n    )",
        "CREATE TABLE \"_zero.replicationConfig\" (\n    replicaVersion TEXT NOT NULL,\n    publications TEXT NOT NULL,\n    initialSyncContext TEXT DEFAULT '{}',\n    lock INTEGER PRIMARY KEY DEFAULT 1 CHECK (lock=1)\n  )",
        "CREATE TABLE \"_zero.replicationState\" (\n    stateVersion TEXT NOT NULL,\n    writeTimeMs INTEGER,\n    lock INTEGER PRIMARY KEY DEFAULT 1 CHECK (lock=1)\n  )",
        "CREATE TABLE \"_zero.changeLog2\" (\n    \"stateVersion\"              TEXT NOT NULL,\n    \"pos\"                       INT  NOT NULL,\n    \"table\"                     TEXT NOT NULL,\n    \"rowKey\"                    TEXT NOT NULL,\n    \"op\"                        TEXT NOT NULL,\n    \"backfillingColumnVersions\" TEXT DEFAULT '{}',\n    PRIMARY KEY(\"stateVersion\", \"pos\"),\n    UNIQUE(\"table\", \"rowKey\")\n  )",
        "CREATE TABLE \"_zero.runtimeEvents\" (\n    event TEXT PRIMARY KEY ON CONFLICT REPLACE,\n    timestamp TEXT NOT NULL DEFAULT (current_timestamp)\n  )",
        "CREATE TABLE \"_zero.column_metadata\" (\n    table_name TEXT NOT NULL,\n    column_name TEXT NOT NULL,\n    upstream_type TEXT NOT NULL,\n    is_not_null INTEGER NOT NULL,\n    is_enum INTEGER NOT NULL,\n    is_array INTEGER NOT NULL,\n    character_max_length INTEGER,\n    backfill TEXT,\n    PRIMARY KEY (table_name, column_name)\n  )",
        "CREATE TABLE \"_zero.tableMetadata\" (\n    \"schema\"           TEXT NOT NULL,\n    \"table\"            TEXT NOT NULL,\n    \"minRowVersion\"    TEXT NOT NULL DEFAULT \"00\",\n    \"upstreamMetadata\" TEXT,\n    \"metadata\"         TEXT,  -- deprecated\n    PRIMARY KEY (\"schema\", \"table\")\n  )",
        "CREATE TABLE \"Foo-t\" (\n\"id\" \"text|NOT_NULL\",\n\"n\" \"int4|NOT_NULL\",\n\"j\" \"jsonb\",\n\"a\" \"text[]|TEXT_ARRAY\",\n\"u\" \"uuid\",\n\"b\" \"bool\",\n\"_0_version\" \"text\" DEFAULT '4dhwg0'\n)",
        "CREATE TABLE \"zero.permissions\" (\n\"permissions\" \"jsonb\",\n\"hash\" \"text\",\n\"lock\" \"bool|NOT_NULL\",\n\"_0_version\" \"text\" DEFAULT '4dhwg0'\n)",
        "CREATE UNIQUE INDEX \"Foo-t_pkey\" ON \"Foo-t\" (\"id\" ASC)",
        "CREATE UNIQUE INDEX \"Foo-t_u_key\" ON \"Foo-t\" (\"u\" ASC)",
        "CREATE UNIQUE INDEX \"i\" ON \"Foo-t\" (\"n\" DESC,\"id\" ASC)",
        "CREATE UNIQUE INDEX \"zero.permissions_pkey\" ON \"zero.permissions\" (\"lock\" ASC)",
    ];
    assert_eq!(sql, expected);
    assert_eq!(dump(&path, "SELECT * FROM \"_zero.versionHistory\""), ["13|13|1|1"]);
    assert_eq!(
        dump(&path, "SELECT * FROM \"_zero.replicationConfig\""),
        ["4dhwg0|[\"_zero_metadata_0\",\"_zero_public_0\"]|{}|1"]
    );
    assert_eq!(
        dump(
            &path,
            "SELECT stateVersion, typeof(writeTimeMs), lock FROM \"_zero.replicationState\""
        ),
        ["4dhwg0|integer|1"]
    );
    assert_eq!(dump(&path, "SELECT event FROM \"_zero.runtimeEvents\""), ["sync"]);
    assert_eq!(
        dump(
            &path,
            "SELECT * FROM \"_zero.column_metadata\" WHERE table_name = 'Foo-t' ORDER BY 2"
        ),
        [
            "Foo-t|a|text[]|0|0|1|null|null",
            "Foo-t|b|bool|0|0|0|null|null",
            "Foo-t|id|text|1|0|0|null|null",
            "Foo-t|j|jsonb|0|0|0|null|null",
            "Foo-t|n|int4|1|0|0|null|null",
            "Foo-t|u|uuid|0|0|0|null|null",
        ]
    );
    assert_eq!(dump(&path, "SELECT * FROM \"Foo-t\""), ["a|1|1.5r|[\"x\"]|null|1|4dhwg0"]);
    for empty in ["_zero.changeLog2", "_zero.tableMetadata"] {
        assert!(dump(&path, &format!("SELECT * FROM \"{empty}\"")).is_empty());
    }
    assert_eq!(dump(&path, "SELECT count(*) > 0 FROM sqlite_stat1"), ["1"]);
    assert_eq!(dump(&path, "PRAGMA journal_mode"), ["wal"]);
    assert_eq!(dump(&path, "PRAGMA integrity_check"), ["ok"]);
}

#[test]
fn clients_see_typed_columns_and_the_shortest_key() {
    let (_dir, path) = place();
    let schema = PublishedSchema {
        tables: vec![
            table(
                "public",
                "enums",
                &[("k", "~mood!"), ("m", "~mood[]"), ("x", "xml"), ("v", "varchar")],
            ),
            table("public", "two", &[("b", "int8!"), ("a", "int4!"), ("c", "text!")]),
            table("s", "nokey", &[("a", "int4")]),
            table("s", "nullable", &[("a", "int4")]),
            table("s", "oddkey", &[("a", "bytea!"), ("b", "int4!")]),
        ],
        indexes: vec![
            index("public", "enums", "enums_pkey", true, &["k"]),
            index("public", "enums", "enums_v", false, &["v", "k"]),
            index("public", "two", "a_wide", true, &["b", "a"]),
            index("public", "two", "b_short", true, &["c"]),
            index("public", "two", "c_short", true, &["a"]),
            index("s", "nullable", "n", true, &["a"]),
            index("s", "oddkey", "o", true, &["b", "a"]),
        ],
    };
    create(&path, &schema, &[]);
    let reader = ReplicaReader::open(&path, &ReaderOptions::default()).unwrap();
    let ids = TableIds::default();
    let stored = reader.schema(&ids).unwrap();
    let seen = &stored.visible;

    let enums = seen.table("enums").unwrap();
    let columns: Vec<_> = enums
        .columns
        .iter()
        .map(|c| (&*c.name, c.value_type, c.nullable, &*c.upstream_type))
        .collect();
    assert_eq!(
        columns,
        [
            ("k", ValueType::String, false, "mood"),
            ("m", ValueType::Json, true, "mood[]"),
            ("v", ValueType::String, true, "varchar"),
        ]
    );
    assert_eq!(enums.primary_key, [0]);
    assert_eq!(enums.indexes, [vec![0], vec![2, 0]]);
    assert_eq!(seen.invisible_columns.len(), 2, "xml and bytea: {:?}", seen.invisible_columns);

    let two = seen.table("two").unwrap();
    assert_eq!(two.primary_key, [1], "fewest columns, then by name");
    let unique: Vec<_> = two.unique_keys.iter().map(|k| (k.columns.clone(), k.not_null)).collect();
    assert_eq!(unique, [(vec![0, 1], true), (vec![2], true), (vec![1], true)]);
    assert_eq!(two.min_row_version, StateVersion::zero());

    assert_eq!(seen.unsyncable["s.nokey"], Unsyncable::NoKey);
    assert_eq!(seen.unsyncable["s.nullable"], Unsyncable::NoKey);
    assert_eq!(
        seen.unsyncable["s.oddkey"],
        Unsyncable::UnsupportedKeyColumns(vec![("a".into(), "bytea".into())])
    );

    let again = reader.schema(&ids).unwrap();
    assert_eq!(again.visible, stored.visible, "table numbers are stable");
}

#[test]
fn nobody_sees_an_unfinished_initial_sync() {
    let (_dir, path) = place();
    let schema = reference_schema();
    let version = StateVersion::parse(INITIAL).unwrap();
    let spec =
        InitialSpec { schema: &schema, version: &version, publications: &[], context_json: "{}" };
    let fill = |sync: &mut InitialSync| {
        let mut batch = RowBatch::new();
        for i in 0..1000 {
            let t = i.to_string();
            [text(&t), int(i), text("{}"), LiteValue::Null, LiteValue::Null, int(0)]
                .iter()
                .for_each(|v| batch.push(v));
        }
        sync.insert(0, &batch).unwrap();
    };
    assert_eq!(copy_columns(&schema.tables[0]), ["id", "n", "j", "a", "u", "b"]);

    // Given up: nothing is left.
    let mut sync = InitialSync::create(&path, &spec).unwrap();
    fill(&mut sync);
    drop(sync);
    assert_eq!(std::fs::read_dir(path.parent().unwrap()).unwrap().count(), 0);

    // Killed: the destructor never runs.
    let mut sync = InitialSync::create(&path, &spec).unwrap();
    fill(&mut sync);
    sync.create_indexes(&mut |_| {}).unwrap();
    std::mem::forget(sync);
    assert_eq!(find(&path).unwrap(), Found::Nothing);
    assert_eq!(std::fs::read_dir(path.parent().unwrap()).unwrap().count(), 0);

    // A new one replaces the old one, and an orphaned WAL is not played into it.
    create(&path, &schema, &[]);
    let mut w = writer(&path);
    transact(&mut w, 1, vec![]);
    std::mem::forget(w);
    assert!(path.with_file_name("replica.db-wal").exists());
    create(&path, &schema, &[]);
    match find(&path).unwrap() {
        Found::Replica(info) => {
            assert_eq!(info.state_version.as_str(), INITIAL);
            assert_eq!(info.replica_version.as_str(), INITIAL);
            assert_eq!(info.publications, ["_zero_metadata_0", "_zero_public_0"]);
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn unusable_files_are_named_with_their_reason() {
    let reason = |prepare: &dyn Fn(&std::path::Path)| {
        let (_dir, path) = place();
        create(&path, &reference_schema(), &[]);
        prepare(&path);
        match find(&path).unwrap() {
            Found::Unusable(reason) => reason,
            other => panic!("{other:?}"),
        }
    };
    let sql = |sql: &'static str| {
        move |path: &std::path::Path| {
            rusqlite::Connection::open(path).unwrap().execute_batch(sql).unwrap();
        }
    };
    assert_eq!(reason(&|p| std::fs::write(p, b"").unwrap()), ResetReason::Unfinished);
    assert_eq!(reason(&|p| std::fs::write(p, b"short").unwrap()), ResetReason::NotADatabase);
    assert_eq!(reason(&|p| std::fs::write(p, [b'x'; 8192]).unwrap()), ResetReason::NotADatabase);
    assert_eq!(
        reason(&|p| {
            let mut bytes = std::fs::read(p).unwrap();
            (bytes[18], bytes[19]) = (3, 3);
            std::fs::write(p, bytes).unwrap();
        }),
        ResetReason::Wal2
    );
    assert!(matches!(
        reason(&|p| {
            let mut bytes = std::fs::read(p).unwrap();
            bytes[100..4096].fill(0xff);
            std::fs::write(p, bytes).unwrap();
        }),
        ResetReason::Corrupt(_)
    ));
    assert_eq!(reason(&sql("DELETE FROM \"_zero.versionHistory\"")), ResetReason::Unfinished);
    assert_eq!(reason(&sql("DROP TABLE \"_zero.versionHistory\"")), ResetReason::Unfinished);
    assert_eq!(
        reason(&sql("UPDATE \"_zero.versionHistory\" SET dataVersion = 3")),
        ResetReason::TooOld(3)
    );
    assert_eq!(
        reason(&sql("UPDATE \"_zero.versionHistory\" SET dataVersion = 40, minSafeVersion = 40")),
        ResetReason::TooNew(40)
    );
    assert!(matches!(
        reason(&sql("DELETE FROM \"_zero.replicationState\"")),
        ResetReason::Malformed(_)
    ));
    assert!(matches!(
        reason(&sql("UPDATE \"_zero.replicationState\" SET stateVersion = 'zz'")),
        ResetReason::Malformed(_)
    ));
    assert!(matches!(reason(&sql("DROP TABLE \"_zero.changeLog2\"")), ResetReason::Malformed(_)));
}

#[test]
fn older_and_newer_schema_versions_are_taken_over() {
    for (setup, expected) in [
        (
            "ALTER TABLE \"_zero.replicationState\" DROP COLUMN writeTimeMs;
             UPDATE \"_zero.versionHistory\" SET dataVersion = 12, schemaVersion = 12",
            "13|13|1",
        ),
        (
            "CREATE TABLE \"_zero.backfilling\" (schema TEXT);
             UPDATE \"_zero.versionHistory\" SET dataVersion = 17, schemaVersion = 17",
            "13|17|1",
        ),
    ] {
        let (_dir, path) = place();
        create(&path, &reference_schema(), &[]);
        rusqlite::Connection::open(&path).unwrap().execute_batch(setup).unwrap();
        assert!(matches!(find(&path).unwrap(), Found::Replica(_)));
        assert_eq!(
            dump(
                &path,
                "SELECT dataVersion, schemaVersion, minSafeVersion FROM \"_zero.versionHistory\""
            ),
            [expected]
        );
        assert_eq!(
            dump(&path, "SELECT typeof(writeTimeMs) FROM \"_zero.replicationState\""),
            ["integer"]
        );
        transact(&mut writer(&path), 1, vec![]);
    }
}

#[test]
fn a_batch_that_does_not_fit_its_table_is_refused() {
    let (_dir, path) = place();
    let schema = reference_schema();
    let version = StateVersion::parse(INITIAL).unwrap();
    let spec =
        InitialSpec { schema: &schema, version: &version, publications: &[], context_json: "{}" };
    let mut sync = InitialSync::create(&path, &spec).unwrap();
    let mut batch = RowBatch::new();
    batch.integer(1);
    assert!(matches!(sync.insert(0, &batch), Err(ReplicaError::SchemaMismatch { .. })));
    assert!(matches!(sync.insert(9, &batch), Err(ReplicaError::SchemaMismatch { .. })));
}

#[test]
fn values_read_by_their_type_whatever_affinity_stored() {
    let (_dir, path) = place();
    let columns = [
        ("id", "int4!"),
        ("j", "jsonb"),
        ("u", "uuid"),
        ("t", "text"),
        ("n", "numeric"),
        ("f", "float8"),
        ("b", "bool"),
        ("big", "int8"),
        ("ts", "timestamptz"),
        ("k", "~point_kind"),
    ];
    let schema = PublishedSchema {
        tables: vec![table("public", "t", &columns)],
        indexes: vec![index("public", "t", "t_pkey", true, &["id"])],
    };
    let rows = vec![
        vec![
            int(1),
            text("1.50"),
            text("7000"),
            text("1.50"),
            LiteValue::Real(3.0),
            int(2),
            int(1),
            int(i64::MAX),
            LiteValue::Real(1704067200123.456),
            text("12"),
        ],
        vec![
            int(2),
            text("{\"a\": [1,  \"\\ud800\"]}"),
            text("e3d4c2f0-0000-0000-0000-000000000001"),
            int(5),
            text("0.1"),
            LiteValue::Real(f64::INFINITY),
            int(0),
            LiteValue::Null,
            LiteValue::Real(f64::NAN),
            text("a"),
        ],
        vec![
            int(3),
            text("12345678901234567890"),
            LiteValue::Null,
            text(""),
            int(0),
            LiteValue::Real(-0.0),
            LiteValue::Null,
            int(9007199254740991),
            int(0),
            LiteValue::Null,
        ],
    ];
    create(&path, &schema, &[rows]);
    let mut reader = ReplicaReader::open(&path, &ReaderOptions::default()).unwrap();
    reader.refresh().unwrap();
    let seen = reader.schema(&TableIds::default()).unwrap().visible;
    let t = seen.table("t").unwrap();
    let get = |id: f64| {
        reader.get(t, &t.primary_key, &[Value::Number(id)]).unwrap().unwrap().values.to_vec()
    };
    let json = |s: &str| Value::Json(s.into());
    assert_eq!(
        get(1.0),
        [
            Value::Number(1.0),
            json("1.5"),
            Value::string("7000"),
            Value::string("1.50"),
            Value::Number(3.0),
            Value::Number(2.0),
            Value::Bool(true),
            Value::UnsafeInt(i64::MAX),
            Value::Number(1704067200123.456),
            Value::string("12")
        ]
    );
    assert_eq!(
        get(2.0),
        [
            Value::Number(2.0),
            json("{\"a\": [1,  \"\\ud800\"]}"),
            Value::string("e3d4c2f0-0000-0000-0000-000000000001"),
            Value::string("5"),
            Value::Number(0.1),
            Value::Number(f64::INFINITY),
            Value::Bool(false),
            Value::Null,
            Value::Null,
            Value::string("a")
        ]
    );
    assert_eq!(get(3.0)[1], json("12345678901234567000"));
    assert!(reader.get(t, &t.primary_key, &[Value::Number(4.0)]).unwrap().is_none());
}

#[test]
fn what_cannot_be_read_fails_with_table_and_column() {
    let (_dir, path) = place();
    let schema = PublishedSchema {
        tables: vec![table(
            "public",
            "t",
            &[("id", "int4!"), ("j", "json"), ("n", "numeric"), ("b", "bool")],
        )],
        indexes: vec![index("public", "t", "t_pkey", true, &["id"])],
    };
    let rows = vec![
        vec![int(1), text("{nope"), int(1), int(1)],
        vec![int(2), text("1e400"), int(1), int(1)],
        vec![int(3), text("1"), text("abc"), int(1)],
        vec![int(4), text("1"), int(1), text("yes")],
    ];
    create(&path, &schema, &[rows]);
    let mut reader = ReplicaReader::open(&path, &ReaderOptions::default()).unwrap();
    reader.refresh().unwrap();
    let seen = reader.schema(&TableIds::default()).unwrap().visible;
    let t = seen.table("t").unwrap();
    for (id, part) in
        [(1.0, "Failed to parse JSON for t.j"), (2.0, "t.j"), (3.0, "t.n"), (4.0, "t.b")]
    {
        let error = reader.get(t, &t.primary_key, &[Value::Number(id)]).unwrap_err();
        assert!(error.to_string().contains(part), "{error}");
    }
}

#[test]
fn declared_types_of_all_ages_are_understood() {
    use zeroring_storage::replica::schema::{Affinity, LiteType};
    for (declared, upstream, not_null, is_enum, is_array, value_type) in [
        ("int8|NOT_NULL", "int8", true, false, false, Some(ValueType::Number)),
        ("int8|TEXT_ARRAY[]", "int8[]", false, false, true, Some(ValueType::Json)),
        ("int8|NOT_NULL[]", "int8[]", true, false, true, Some(ValueType::Json)),
        ("nomz|TEXT_ENUM[]", "nomz[]", false, true, true, Some(ValueType::Json)),
        ("mood[]|TEXT_ENUM|TEXT_ARRAY", "mood[]", false, true, true, Some(ValueType::Json)),
        ("mood|NOT_NULL|TEXT_ENUM", "mood", true, true, false, Some(ValueType::String)),
        ("TEXT", "TEXT", false, false, false, Some(ValueType::String)),
        ("varchar(180)", "varchar(180)", false, false, false, Some(ValueType::String)),
        (
            "timestamp(3) with time zone",
            "timestamp(3) with time zone",
            false,
            false,
            false,
            Some(ValueType::Number),
        ),
        ("bytea", "bytea", false, false, false, None),
        ("dom_int", "dom_int", false, false, false, None),
    ] {
        let t = LiteType::parse(declared);
        let found = (t.upstream_type.as_str(), t.not_null, t.is_enum, t.is_array, t.value_type());
        assert_eq!(found, (upstream, not_null, is_enum, is_array, value_type), "{declared}");
        assert_eq!(LiteType::parse(&t.declared()), t, "{declared}");
    }
    for (declared, affinity) in [
        ("int8|NOT_NULL", Affinity::Integer),
        ("point_kind|TEXT_ENUM", Affinity::Integer),
        ("mood|TEXT_ENUM", Affinity::Text),
        ("jsonb", Affinity::Numeric),
        ("uuid", Affinity::Numeric),
        ("timestamptz", Affinity::Numeric),
        ("int4[]|TEXT_ARRAY", Affinity::Integer),
        ("float8", Affinity::Real),
        ("BLOB", Affinity::Blob),
    ] {
        assert_eq!(Affinity::of_declared(declared), affinity, "{declared}");
    }
}
