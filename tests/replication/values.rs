//! Every type: the initial copy (binary and text) and the stream store the same value, and it is
//! Postgres' value.

use std::collections::BTreeMap;

use super::support::{Fixture, texts};

/// Column type, and literals of it.
const TYPES: &[(&str, &[&str])] = &[
    ("bool", &["true", "false"]),
    ("int2", &["-32768", "7"]),
    ("int4", &["-2147483648", "2147483647"]),
    ("int8", &["9223372036854775807", "-9007199254740993"]),
    (
        "float4",
        &["0.1", "1073741824", "33554448", "'NaN'", "'Infinity'", "-0.0", "1e-45", "3.4e38"],
    ),
    (
        "float8",
        &["0.1", "1e23", "'-Infinity'", "'NaN'", "'-0'", "5e-324", "1.7976931348623157e308"],
    ),
    (
        "numeric",
        &[
            "0.0012345678901234567",
            "0.000012345678901234567",
            "12345678901234567890.123",
            "-1.50",
            "0",
            "'NaN'",
            "'Infinity'",
            "1e-20",
            "9007199254740993",
            "100000000",
            "99999999.99999999",
        ],
    ),
    ("numeric(10,2)", &["1.5", "-99999999.99"]),
    ("text", &["'héllo \\ \"x\" '", "''", "E'a\\tb\\nc'", "'7e3'", "repeat('long', 5000)"]),
    ("varchar(20)", &["'v'"]),
    ("char(5)", &["'ab'"]),
    ("\"char\"", &["'x'"]),
    ("name", &["'some_name'"]),
    ("uuid", &["'A0EEBC99-9C0B-4EF8-BB6D-6BB9BD380A11'"]),
    ("json", &["'{\"b\" : 1, \"a\": [1.50, null]}'", "'1.50'", "'\"text\"'", "'null'"]),
    ("jsonb", &["'{\"b\" : 1, \"a\": [1.50, null]}'", "'1.50'", "'true'", "'[]'"]),
    (
        "date",
        &[
            "'2024-02-29'",
            "'1969-12-31'",
            "'0044-03-15 BC'",
            "'infinity'",
            "'5874897-12-31'",
            "'0001-01-01'",
        ],
    ),
    (
        "timestamp",
        &[
            "'2024-02-29 12:34:56.789012'",
            "'1969-12-31 23:59:59.999999'",
            "'0044-03-15 01:02:03 BC'",
            "'-infinity'",
            "'294276-12-31 23:59:59.999999'",
            "'1900-01-01 00:00:00.000001'",
        ],
    ),
    (
        "timestamptz",
        &[
            "'2024-02-29 12:34:56.789012+05:30'",
            "'1937-01-01 00:00:00+00:19:32'",
            "'infinity'",
            "'4713-01-01 00:00:00+00 BC'",
        ],
    ),
    ("time", &["'23:59:59.999999'", "'00:00'", "'24:00:00'", "'12:34:56.789'"]),
    ("timetz", &["'12:00:00+05:30:15'", "'00:30+01'", "'23:59:59.999-12'", "'24:00:00+00'"]),
    ("interval", &["'1 day 02:03:04'", "'-1 year'"]),
    ("bytea", &["'\\x00ff10'", "''"]),
    ("inet", &["'10.0.0.1'", "'10.0.0.0/8'", "'::1'", "'2001:db8::/32'"]),
    ("cidr", &["'10.0.0.0/8'"]),
    ("macaddr", &["'08:00:2b:01:02:03'"]),
    ("money", &["12.34"]),
    ("bit(3)", &["B'101'", "B'000'"]),
    ("varbit", &["B'1'"]),
    ("oid", &["4294967295"]),
    ("xml", &["'<a>b</a>'"]),
    ("tsvector", &["'a fat cat'"]),
    ("int4range", &["'[1,5)'"]),
    ("point", &["'(1,2.5)'"]),
    ("box", &["'(1,1),(0,0)'"]),
    ("int2vector", &["'1 2 3'"]),
    ("pg_lsn", &["'16/B374D848'"]),
    ("mood", &["'sad'", "'so \"so\"'"]),
    ("mood[]", &["ARRAY['sad', NULL, 'so \"so\"']::mood[]"]),
    ("pair", &["ROW(1, 'a b')::pair"]),
    ("dom_bool", &["true"]),
    ("dom_int", &["5"]),
    ("dom_char", &["'ab'"]),
    ("dom_ints", &["ARRAY[1,2]"]),
    ("bool[]", &["ARRAY[true, NULL, false]"]),
    ("int4[]", &["'{}'", "ARRAY[1, NULL, -3]", "'{{1,2},{3,4}}'", "'[0:1]={5,6}'"]),
    ("int8[]", &["ARRAY[9007199254740993, NULL]::int8[]"]),
    ("float4[]", &["ARRAY[0.1, NULL, 'NaN', 1073741824]::float4[]"]),
    ("float8[]", &["ARRAY[0.1, NULL, 'Infinity', 1e300]::float8[]"]),
    ("numeric[]", &["ARRAY[0.00001234567890123, NULL, 1.50]"]),
    ("text[]", &["ARRAY['a', 'NULL', NULL, 'x,y', '{}', 'q\"\\', '', E'\\n\\u0001']"]),
    ("varchar(10)[]", &["ARRAY['v']"]),
    ("char(3)[]", &["ARRAY['a', 'bc']"]),
    ("uuid[]", &["ARRAY['a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11']::uuid[]"]),
    ("json[]", &["ARRAY['{\"a\" : \"x y\"}', NULL, '1']::json[]"]),
    ("jsonb[]", &["ARRAY['{\"a\" : [12345678901234567890]}', NULL]::jsonb[]"]),
    ("date[]", &["ARRAY['2024-02-29', NULL, 'infinity']::date[]"]),
    ("timestamp[]", &["ARRAY['1969-12-31 23:59:59.999999', NULL]::timestamp[]"]),
    ("timestamptz[]", &["ARRAY['2024-02-29 12:34:56.789012+05:30']::timestamptz[]"]),
    ("time[]", &["ARRAY['12:34:56.789']::time[]"]),
    ("timetz[]", &["ARRAY['12:00:00+05:30:15']::timetz[]"]),
    ("bytea[]", &["ARRAY['\\x0102']::bytea[]"]),
    ("interval[]", &["ARRAY['1 day']::interval[]"]),
    ("inet[]", &["ARRAY['10.0.0.1']::inet[]"]),
    ("box[]", &["ARRAY['(1,1),(0,0)', '(3,3),(2,2)']::box[]"]),
    ("oid[]", &["ARRAY[1,2]::oid[]"]),
];

const USER_TYPES: &str = "CREATE TYPE mood AS ENUM ('sad', 'so \"so\"');
    CREATE TYPE pair AS (a int, b text);
    CREATE DOMAIN dom_bool AS bool; CREATE DOMAIN dom_int AS int; CREATE DOMAIN dom_char AS char(5);
    CREATE DOMAIN dom_ints AS int[];";

fn create(table: &str) -> String {
    let columns: Vec<String> =
        TYPES.iter().enumerate().map(|(i, (t, _))| format!("c{i} {t}")).collect();
    format!("CREATE TABLE {table} (id int PRIMARY KEY, {});", columns.join(", "))
}

/// One row per literal; the other columns are NULL.
fn inserts(table: &str) -> String {
    let mut sql = String::new();
    let mut id = 0;
    for (i, (_, literals)) in TYPES.iter().enumerate() {
        for literal in *literals {
            id += 1;
            sql.push_str(&format!("INSERT INTO {table} (id, c{i}) VALUES ({id}, {literal});\n"));
        }
    }
    sql
}

/// `type literal` → `storage class|value`.
fn stored(path: &std::path::PathBuf, table: &str) -> BTreeMap<String, String> {
    let mut out = BTreeMap::new();
    let mut id = 0;
    for (i, (name, literals)) in TYPES.iter().enumerate() {
        for literal in *literals {
            id += 1;
            let sql = format!("SELECT typeof(c{i}), c{i} FROM \"{table}\" WHERE id = {id}");
            let mut rows = texts(path, &sql);
            assert_eq!(rows.len(), 1, "{name} {literal}: {rows:?}");
            out.insert(format!("{name} {literal}"), rows.remove(0));
        }
    }
    out
}

#[test]
fn copy_and_stream_store_the_same_value_of_every_type() {
    let mut f = Fixture::new(USER_TYPES);
    // Output settings of a database must not shine through.
    f.exec(
        "ALTER DATABASE postgres SET DateStyle = 'German, DMY';
         ALTER DATABASE postgres SET TimeZone = 'Europe/Amsterdam';
         ALTER DATABASE postgres SET bytea_output = 'escape';
         ALTER DATABASE postgres SET IntervalStyle = 'sql_standard';
         ALTER DATABASE postgres SET extra_float_digits = 1;",
    );
    f.exec(&(create("copied") + &inserts("copied") + &create("streamed")));
    let running = f.start_ready();
    f.exec(&inserts("streamed"));
    f.catch_up(&running);
    let copied = stored(&f.config.replica_path, "copied");
    let streamed = stored(&f.config.replica_path, "streamed");
    let differ: Vec<_> = copied
        .iter()
        .filter(|(k, v)| streamed[*k] != **v)
        .map(|(k, v)| (k, v, &streamed[k]))
        .collect();
    assert!(differ.is_empty(), "copy and stream differ: {differ:#?}");
    running.stop();

    // The same by a text copy.
    let mut text = f.config.clone();
    text.text_copy = true;
    text.replica_path = f.dir.path().join("text.db");
    let running = super::support::Running::start(&text);
    running.ready();
    running.stop();
    let by_text = stored(&text.replica_path, "copied");
    let differ: Vec<_> = copied
        .iter()
        .filter(|(k, v)| by_text[*k] != **v)
        .map(|(k, v)| (k, v, &by_text[k]))
        .collect();
    assert!(differ.is_empty(), "binary and text copy differ: {differ:#?}");

    expect(&copied);
}

/// Values that are easily got wrong, as Postgres has them.
fn expect(stored: &BTreeMap<String, String>) {
    for (key, value) in [
        ("bool true", "integer|1"),
        ("int8 9223372036854775807", "integer|9223372036854775807"),
        ("float4 0.1", "real|0.1"),
        ("float8 'NaN'", "null|NULL"),
        ("float8 '-Infinity'", "real|-inf"),
        ("numeric 0.0012345678901234567", "real|0.0012345678901234567"),
        ("numeric 0.000012345678901234567", "real|1.2345678901234568e-5"),
        ("numeric -1.50", "real|-1.5"),
        ("numeric 100000000", "integer|100000000"),
        ("char(5) 'ab'", "text|ab   "),
        (
            "uuid 'A0EEBC99-9C0B-4EF8-BB6D-6BB9BD380A11'",
            "text|a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11",
        ),
        ("json '{\"b\" : 1, \"a\": [1.50, null]}'", "text|{\"b\" : 1, \"a\": [1.50, null]}"),
        ("jsonb '{\"b\" : 1, \"a\": [1.50, null]}'", "text|{\"a\": [1.50, null], \"b\": 1}"),
        ("date '2024-02-29'", "integer|1709164800000"),
        ("date '0044-03-15 BC'", "integer|-63517824000000"),
        ("timestamp '1969-12-31 23:59:59.999999'", "real|-0.001"),
        ("timestamp '2024-02-29 12:34:56.789012'", "real|1709210096789.012"),
        ("timestamptz '2024-02-29 12:34:56.789012+05:30'", "real|1709190296789.012"),
        ("timestamptz '1937-01-01 00:00:00+00:19:32'", "integer|-1041380372000"),
        ("time '24:00:00'", "integer|86400000"),
        ("timetz '12:00:00+05:30:15'", "integer|23385000"),
        ("inet '10.0.0.1'", "text|10.0.0.1"),
        ("inet '10.0.0.0/8'", "text|10.0.0.0/8"),
        ("bit(3) B'101'", "integer|101"),
        ("int4[] '[0:1]={5,6}'", "text|[5,6]"),
        ("int4[] ARRAY[1, NULL, -3]", "text|[1,null,-3]"),
        ("bool[] ARRAY[true, NULL, false]", "text|[true,null,false]"),
        ("int8[] ARRAY[9007199254740993, NULL]::int8[]", "text|[9007199254740993,null]"),
        (
            "float4[] ARRAY[0.1, NULL, 'NaN', 1073741824]::float4[]",
            "text|[0.1,null,null,1073741800]",
        ),
        ("json[] ARRAY['{\"a\" : \"x y\"}', NULL, '1']::json[]", "text|[{\"a\":\"x y\"},null,1]"),
        ("date[] ARRAY['2024-02-29', NULL, 'infinity']::date[]", "text|[1709164800000,null,null]"),
        ("mood[] ARRAY['sad', NULL, 'so \"so\"']::mood[]", "text|[\"sad\",null,\"so \\\"so\\\"\"]"),
    ] {
        assert_eq!(stored[key], value, "{key}");
    }
}

#[test]
fn arrays_without_dimensions_in_the_catalog_are_arrays() {
    let mut f = Fixture::new("");
    f.exec(
        "CREATE TABLE src (id int PRIMARY KEY, a int[]);
         INSERT INTO src VALUES (1, '{1,2}');
         CREATE TABLE t AS SELECT * FROM src; ALTER TABLE t ADD PRIMARY KEY (id);",
    );
    let running = f.start_ready();
    f.exec("INSERT INTO t VALUES (2, '{3,NULL}')");
    f.catch_up(&running);
    let sql = "SELECT id, a FROM t ORDER BY id";
    assert_eq!(texts(&f.config.replica_path, sql), ["1|[1,2]", "2|[3,null]"]);
    let declared = "SELECT type FROM pragma_table_info('t') WHERE name = 'a'";
    assert_eq!(texts(&f.config.replica_path, declared), ["int4[]|TEXT_ARRAY"]);
    running.stop();
}

#[test]
fn row_filters_column_lists_and_partitions_are_copied_as_published() {
    let mut f = Fixture::new("");
    f.exec(
        "CREATE TABLE filtered (id int, n int, PRIMARY KEY (id, n));
         INSERT INTO filtered SELECT g, g FROM generate_series(1, 10) g;
         CREATE TABLE both_pubs (id int PRIMARY KEY);
         INSERT INTO both_pubs SELECT generate_series(1, 5);
         CREATE TABLE listed (id int PRIMARY KEY, a int, secret int);
         INSERT INTO listed VALUES (1, 2, 3);
         CREATE TABLE parted (id int, k int, PRIMARY KEY (id, k)) PARTITION BY RANGE (k);
         CREATE TABLE parted_low PARTITION OF parted FOR VALUES FROM (0) TO (10);
         CREATE TABLE parted_high PARTITION OF parted FOR VALUES FROM (10) TO (20);
         INSERT INTO parted VALUES (1, 5), (2, 15);
         CREATE TABLE parent (id int PRIMARY KEY);
         CREATE TABLE child (PRIMARY KEY (id)) INHERITS (parent);
         INSERT INTO parent VALUES (1); INSERT INTO child VALUES (2);
         CREATE SCHEMA \"other one\";
         CREATE TABLE \"other one\".\"t-x\" (id int PRIMARY KEY, gen int GENERATED ALWAYS AS (1) STORED);
         INSERT INTO \"other one\".\"t-x\" VALUES (7);
         CREATE PUBLICATION p1 FOR TABLE marker, filtered WHERE (n > 8), both_pubs WHERE (id < 3),
           listed (id, a), parted, parent, \"other one\".\"t-x\"
           WITH (publish_via_partition_root = true);
         CREATE PUBLICATION \"P2\" FOR TABLE filtered WHERE (n < 2), both_pubs;",
    );
    f.config.publications = vec!["p1".into(), "P2".into()];
    let running = f.start_ready();
    let path = f.config.replica_path.clone();
    let ids = |table: &str| texts(&path, &format!("SELECT id FROM \"{table}\" ORDER BY id"));
    let check = |extra: &[&str]| {
        let with =
            |ids: &[&'static str]| ids.iter().copied().map(str::to_owned).collect::<Vec<_>>();
        assert_eq!(ids("filtered"), with(&["1", "9", "10"]));
        assert_eq!(ids("both_pubs").len(), 5);
        assert_eq!(ids("parent"), with(&["1"]));
        assert_eq!(ids("child"), with(&["2"]));
        assert_eq!(ids("other one.t-x"), with(&["7"]));
        assert_eq!(ids("parted"), [&["1", "2"][..], extra].concat());
        let columns = texts(&path, "SELECT name FROM pragma_table_info('listed')");
        assert_eq!(columns, ["id", "a", "_0_version"]);
    };
    check(&[]);
    // Moved into a filter and out of it, and between partitions.
    f.exec(
        "UPDATE filtered SET n = 9 WHERE id = 5; UPDATE filtered SET n = 5 WHERE id = 5;
         INSERT INTO parted VALUES (3, 5); UPDATE parted SET k = 16 WHERE id = 3;
         UPDATE listed SET a = 4;",
    );
    f.catch_up(&running);
    check(&["3"]);
    assert_eq!(texts(&path, "SELECT k FROM parted WHERE id = 3"), ["16"]);
    assert_eq!(texts(&path, "SELECT a FROM listed"), ["4"]);
    running.stop();
}
