//! What is created upstream equals what the original creates.

use zeroring_net::pg::{Client, PgConfig};

use super::support::{Fixture, eventually};

/// Objects of a schema, one a line.
const OBJECTS: &str = "
SELECT string_agg(line, E'\\n' ORDER BY line) FROM (
  SELECT 'table ' || c.oid::regclass || ': ' || string_agg(
    a.attname || ' ' || format_type(a.atttypid, a.atttypmod) ||
    CASE WHEN a.attnotnull THEN ' NOT NULL' ELSE '' END ||
    coalesce(' DEFAULT ' || pg_get_expr(d.adbin, d.adrelid), ''), ', ' ORDER BY a.attnum) AS line
  FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0
  LEFT JOIN pg_attrdef d ON d.adrelid = c.oid AND d.adnum = a.attnum
  WHERE c.relnamespace::regnamespace::text IN ('zero', 'zero_0') AND c.relkind = 'r'
  GROUP BY c.oid
  UNION ALL
  SELECT 'constraint ' || conrelid::regclass || ' ' || conname || ' ' || pg_get_constraintdef(oid)
  FROM pg_constraint WHERE connamespace::regnamespace::text IN ('zero', 'zero_0')
  UNION ALL
  SELECT 'function ' || oid::regprocedure || ' ' || pg_get_function_result(oid) || ' ' ||
    provolatile::text || ' ' || (SELECT lanname FROM pg_language WHERE oid = prolang)
  FROM pg_proc WHERE pronamespace::regnamespace::text IN ('zero', 'zero_0')
  UNION ALL
  SELECT 'event trigger ' || evtname || ' ' || evtevent || ' ' || evtfoid::regproc || ' ' ||
    evttags::text || ' ' || evtenabled::text FROM pg_event_trigger
  UNION ALL
  SELECT 'trigger ' || pg_get_triggerdef(oid) FROM pg_trigger WHERE NOT tgisinternal
  UNION ALL
  SELECT 'publication ' || pubname || ' ' || pubinsert::text || pubupdate || pubdelete || pubtruncate ||
    ' ' || pubviaroot || ' ' || puballtables || ' ' ||
    coalesce((SELECT string_agg(r.prrelid::regclass::text, ',' ORDER BY r.prrelid::regclass::text)
      FROM pg_publication_rel r WHERE r.prpubid = p.oid), '') || ' ' ||
    coalesce((SELECT string_agg(n.pnnspid::regnamespace::text, ',')
      FROM pg_publication_namespace n WHERE n.pnpubid = p.oid), '')
  FROM pg_publication p
) lines";

/// The same query on a database that zero-cache 1.9.0 set up.
const ORIGINAL: &str = include_str!("original_objects.txt");

#[test]
fn an_empty_database_gets_exactly_the_objects_of_the_original() {
    let mut f = Fixture::new("");
    let running = f.start_ready();
    running.stop();
    let ours = f.scalar(OBJECTS).unwrap();
    let ours: Vec<&str> = ours.lines().collect();
    let original: Vec<&str> = ORIGINAL.lines().collect();
    assert_eq!(ours, original);
    let config = "SELECT publications::text || ' ' || \"ddlDetection\" FROM zero_0.\"shardConfig\"";
    assert_eq!(f.scalar(config).unwrap(), "{_zero_metadata_0,_zero_public_0} true");
    let history = "SELECT \"dataVersion\" || ' ' || \"schemaVersion\" || ' ' || \"minSafeVersion\"
        FROM zero_0.\"versionHistory\"";
    assert_eq!(f.scalar(history).unwrap(), "23 23 1");
    let replica = "SELECT slot || ' ' || (\"initialSchema\" IS NOT NULL) || ' ' ||
        (\"initialSyncContext\"->>'appID') FROM zero_0.replicas";
    assert_eq!(f.scalar(replica).unwrap(), "zero_0_a true zero");
    let permissions = "SELECT count(*) || ' ' || count(permissions) FROM zero.permissions";
    assert_eq!(f.scalar(permissions).unwrap(), "1 0");
    f.exec("UPDATE zero.permissions SET permissions = '{\"a\": 1}'");
    let hash = "SELECT (hash = md5(permissions::text))::text FROM zero.permissions";
    assert_eq!(f.scalar(hash).unwrap(), "true");
}

/// Tables and indexes of all kinds, and what the original's query says of them (object ids are
/// replaced by names).
const SCHEMA: &str = include_str!("schema.sql");
const ORIGINAL_SCHEMA: &str = include_str!("original_schema.json");

/// Without the object ids of one database.
fn without_oids(json: &str) -> serde_json::Value {
    fn strip(value: &mut serde_json::Value) {
        match value {
            serde_json::Value::Object(map) => {
                map.retain(|k, _| !matches!(k.as_str(), "oid" | "schemaOID"));
                if map.get("typeOID").and_then(serde_json::Value::as_u64) >= Some(16384) {
                    map.remove("typeOID");
                }
                map.values_mut().for_each(strip);
            }
            serde_json::Value::Array(items) => items.iter_mut().for_each(strip),
            _ => {}
        }
    }
    let mut value = serde_json::from_str(json).unwrap();
    strip(&mut value);
    value
}

#[test]
fn the_published_schema_is_the_originals_field_by_field_and_in_order() {
    let mut f = Fixture::new("DROP TABLE marker");
    f.exec(SCHEMA);
    let running = f.start_ready();
    running.stop();
    let ours = f.scalar("SELECT current::text FROM zero_0.\"publishedSchema\"").unwrap();
    let (ours, original) = (without_oids(&ours), without_oids(ORIGINAL_SCHEMA));
    // Text, not value: the order of keys is data.
    let lines = |v: &serde_json::Value| serde_json::to_string_pretty(v).unwrap();
    let (ours, original) = (lines(&ours), lines(&original));
    for (i, (a, b)) in ours.lines().zip(original.lines()).enumerate() {
        assert_eq!(a, b, "line {i}");
    }
    assert_eq!(ours.lines().count(), original.lines().count());
    let specs = "SELECT (zero_0.schema_specs()::text = current::text)::text
        FROM zero_0.\"publishedSchema\"";
    assert_eq!(f.scalar(specs).unwrap(), "true");
}

/// DDL messages between two positions, as (type, tag, has a previous schema).
fn messages(f: &mut Fixture, sql: &str) -> Vec<(String, String, bool)> {
    f.exec("SELECT pg_create_logical_replication_slot('peek', 'pgoutput')");
    f.exec(sql);
    let rows = f
        .sql
        .query(
            "SELECT data FROM pg_logical_slot_get_binary_changes('peek', NULL, NULL,
               'proto_version', '1', 'publication_names', '_zero_metadata_0', 'messages', 'true')",
            &[],
        )
        .unwrap();
    f.exec("SELECT pg_drop_replication_slot('peek')");
    let mut out = vec![];
    for row in rows {
        let data: Vec<u8> = row.get(0).unwrap();
        let Ok(zeroring_net::pg::pgoutput::PgOutput::Message {
            prefix,
            content,
            transactional,
            ..
        }) = zeroring_net::pg::pgoutput::decode(&data)
        else {
            continue;
        };
        assert!(transactional);
        assert_eq!(prefix, "zero/0/ddl");
        let json: serde_json::Value = serde_json::from_slice(content).unwrap();
        let keys: Vec<&String> = json.as_object().unwrap().keys().collect();
        assert_eq!(keys, ["type", "version", "previousSchema", "schema", "event", "context"]);
        assert_eq!(json["version"], 1);
        assert!(json["schema"]["tables"].is_array());
        assert!(json["context"]["query"].is_string());
        out.push((
            json["type"].as_str().unwrap().to_owned(),
            json["event"]["tag"].as_str().unwrap().to_owned(),
            !json["previousSchema"].is_null(),
        ));
    }
    out
}

#[test]
fn schema_changes_emit_the_messages_of_the_original() {
    let mut f = Fixture::new("CREATE TABLE t (id int PRIMARY KEY, a text)");
    f.exec("CREATE SCHEMA private; CREATE PUBLICATION mine FOR TABLE t");
    f.config.publications = vec!["mine".into()];
    let running = f.start();
    running.ready();
    running.stop();
    let start = |tag: &str| ("ddlStart".to_owned(), tag.to_owned(), false);
    let update = |tag: &str| ("ddlUpdate".to_owned(), tag.to_owned(), true);
    let snapshot = |tag: &str| ("schemaSnapshot".to_owned(), tag.to_owned(), true);
    for (sql, expected) in [
        ("ALTER TABLE t ADD b int", vec![start("ALTER TABLE"), update("ALTER TABLE")]),
        ("CREATE INDEX i ON t (a)", vec![start("CREATE INDEX"), update("CREATE INDEX")]),
        ("DROP INDEX i", vec![start("DROP INDEX"), update("DROP INDEX")]),
        ("CREATE TABLE u (id int PRIMARY KEY)", vec![start("CREATE TABLE")]),
        ("CREATE TABLE IF NOT EXISTS t (x int)", vec![start("CREATE TABLE")]),
        (
            "ALTER PUBLICATION mine ADD TABLE u",
            vec![start("ALTER PUBLICATION"), update("ALTER PUBLICATION")],
        ),
        (
            "ALTER PUBLICATION mine DROP TABLE u",
            vec![start("ALTER PUBLICATION"), update("ALTER PUBLICATION")],
        ),
        ("ALTER TABLE u ADD z int", vec![start("ALTER TABLE")]),
        ("DROP TABLE u", vec![start("DROP TABLE")]),
        ("COMMENT ON PUBLICATION mine IS 'x'", vec![snapshot("COMMENT")]),
        ("COMMENT ON TABLE t IS 'x'", vec![]),
        ("SELECT zero_0.update_schemas()", vec![snapshot("MANUAL")]),
        ("ALTER SCHEMA private RENAME TO privat", vec![start("ALTER SCHEMA")]),
        ("CREATE FUNCTION f() RETURNS int LANGUAGE sql AS 'SELECT 1'", vec![]),
        (
            "ALTER SCHEMA public RENAME TO published; ALTER SCHEMA published RENAME TO public",
            vec![
                start("ALTER SCHEMA"),
                update("ALTER SCHEMA"),
                start("ALTER SCHEMA"),
                update("ALTER SCHEMA"),
            ],
        ),
        ("DROP TABLE t", vec![start("DROP TABLE"), update("DROP TABLE")]),
    ] {
        assert_eq!(messages(&mut f, sql), expected, "{sql}");
    }
}

#[test]
fn a_newer_shard_schema_is_accepted_and_set_back() {
    let mut f = Fixture::new("");
    f.start_ready().stop();
    f.exec(
        "ALTER TABLE zero_0.replicas ADD generation text, ADD \"backupPath\" text,
           ADD \"backupV5\" bool DEFAULT false;
         UPDATE zero_0.\"versionHistory\" SET \"dataVersion\" = 25, \"schemaVersion\" = 25;",
    );
    let running = f.start_ready();
    f.catch_up(&running);
    assert_eq!(running.handle.status().snapshot().initial_syncs, 0);
    running.stop();
    let history =
        "SELECT \"dataVersion\" || ' ' || \"schemaVersion\" FROM zero_0.\"versionHistory\"";
    assert_eq!(f.scalar(history).unwrap(), "23 25");
    f.exec("UPDATE zero_0.\"versionHistory\" SET \"dataVersion\" = 30, \"minSafeVersion\" = 24");
    let failure = f.start().failure();
    assert!(failure.contains("newer server"), "{failure}");
}

#[test]
fn a_table_without_a_primary_key_gets_an_identity_from_the_first_usable_index() {
    let mut f = Fixture::new(
        "CREATE TABLE t (a int NOT NULL, b int NOT NULL, c int);
         CREATE UNIQUE INDEX t_0_nullable ON t (c);
         CREATE UNIQUE INDEX t_1_partial ON t (a) WHERE a > 0;
         CREATE UNIQUE INDEX t_2_expression ON t ((a + 1));
         ALTER TABLE t ADD CONSTRAINT t_3_deferrable UNIQUE (a) DEFERRABLE;
         CREATE INDEX t_4_not_unique ON t (a);
         CREATE UNIQUE INDEX t_5_first ON t (b, a);
         CREATE UNIQUE INDEX t_6_second ON t (a);
         CREATE TABLE u (a int NOT NULL UNIQUE); ALTER TABLE u REPLICA IDENTITY FULL;",
    );
    let running = f.start_ready();
    let identity = "SELECT string_agg(relname || ':' || relreplident::text, ',' ORDER BY relname)
        FROM pg_class WHERE relname IN ('t', 'u')";
    assert_eq!(f.scalar(identity).unwrap(), "t:i,u:f");
    let index = "SELECT indexrelid::regclass::text FROM pg_index WHERE indisreplident";
    assert_eq!(f.scalar(index).unwrap(), "t_5_first");
    f.exec("INSERT INTO t VALUES (1, 2, 3); UPDATE t SET c = 4; DELETE FROM t");
    f.catch_up(&running);
    eventually("all is well", || Some(()));
    running.stop();
}

/// Only superusers publish whole schemas and have event triggers.
#[test]
fn a_role_that_is_no_superuser_needs_a_publication_of_its_own() {
    let mut f = Fixture::new("");
    f.exec("CREATE ROLE app LOGIN REPLICATION");
    f.exec("CREATE DATABASE db OWNER app");
    let url = f.server.url("db").replace("postgres@", "app@");
    f.config.upstream = PgConfig::parse(&url).unwrap();
    f.sql = Client::connect(&f.config.upstream).unwrap();
    f.exec("CREATE TABLE marker (n int PRIMARY KEY)");
    let why = f.start().failure();
    assert!(why.contains("ZERO_APP_PUBLICATIONS") && why.contains("superuser"), "{why}");
    f.exec("CREATE PUBLICATION app_data FOR TABLE marker");
    f.config.publications = vec!["app_data".to_owned()];
    let running = f.start_ready();
    f.catch_up(&running);
    running.stop();
}
