//! The Postgres client against a real server: authentication, TLS, queries, pipelines, COPY, and
//! what happens to a session when something goes wrong.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test")]

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use zeroring_net::pg::copy::BinaryRows;
use zeroring_net::pg::local_server::LocalServer;
use zeroring_net::pg::{
    Client, Format, Param, PgConfig, PgError, SqlState, TlsMode, TransactionStatus,
};

fn connect(server: &LocalServer) -> Client {
    Client::connect(&PgConfig::parse(&server.url("postgres")).unwrap()).unwrap()
}

/// Replaces the server's access rules.
fn set_hba(admin: &mut Client, rules: &str) {
    let file: String = admin.query_one("SHOW hba_file", &[]).unwrap().get(0).unwrap();
    std::fs::write(file, rules).unwrap();
    admin.batch_execute("SELECT pg_reload_conf()").unwrap();
}

/// Connects until the reloaded rules are in effect: until `accept` likes the outcome.
fn eventually<T: std::fmt::Debug>(
    config: &PgConfig,
    accept: impl Fn(Result<Client, PgError>) -> Result<T, String>,
) -> T {
    let mut last = String::new();
    for _ in 0..200 {
        match accept(Client::connect(config)) {
            Ok(t) => return t,
            Err(e) => last = e,
        }
    }
    panic!("{last}");
}

#[test]
fn every_way_of_authentication() {
    let server = LocalServer::start(&[]).unwrap();
    let mut admin = connect(&server);
    admin
        .batch_execute(
            "SET password_encryption = 'scram-sha-256'; CREATE ROLE scram LOGIN PASSWORD 'pä ss';
             CREATE ROLE clear LOGIN PASSWORD 'c';
             SET password_encryption = 'md5'; CREATE ROLE md5 LOGIN PASSWORD 'geheim';",
        )
        .unwrap();
    set_hba(
        &mut admin,
        "host all scram all scram-sha-256\nhost all clear all password\nhost all md5 all md5\n\
         host all none all reject\nhost all postgres all trust\n",
    );
    let config = |user: &str, password: Option<&str>| PgConfig {
        user: user.into(),
        password: password.map(str::to_owned),
        ..PgConfig::parse(&server.url("postgres")).unwrap()
    };
    for (user, password) in [("scram", "pä ss"), ("clear", "c"), ("md5", "geheim")] {
        // Wrong first: this only fails once the new rules are in effect.
        eventually(&config(user, Some("wrong")), |r| match r {
            Err(PgError::Server(e)) if e.code == SqlState::new("28P01") => Ok(()),
            other => Err(format!("{user}: {other:?}")),
        });
        let mut client = Client::connect(&config(user, Some(password))).unwrap();
        let row = client.query_one("SELECT current_user::text", &[]).unwrap();
        assert_eq!(row.get::<&str>(0).unwrap(), user);
        let error = Client::connect(&config(user, None)).unwrap_err();
        assert!(error.to_string().contains("asks for a password"), "{error}");
    }
    let error = Client::connect(&config("none", None)).unwrap_err();
    assert!(error.is(SqlState::new("28000")), "{error}");
}

fn openssl(dir: &Path, args: &[&str]) {
    let out = Command::new("openssl").args(args).current_dir(dir).output().unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
}

/// A root certificate and a server certificate for `localhost` below it.
fn certificates(dir: &Path) {
    std::fs::write(
        dir.join("ext"),
        "subjectAltName=DNS:localhost\nbasicConstraints=CA:FALSE\nkeyUsage=digitalSignature\n\
         extendedKeyUsage=serverAuth\n",
    )
    .unwrap();
    let ec = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"];
    let root = ["req", "-x509", "-days", "2", "-subj", "/CN=root", "-sha384"];
    let root_out = ["-keyout", "root.key", "-out", "root.crt"];
    openssl(dir, &[&root[..], &ec, &root_out].concat());
    let request = ["req", "-subj", "/CN=localhost", "-keyout", "server.key", "-out", "server.csr"];
    openssl(dir, &[&request[..], &ec].concat());
    let sign = "x509 -req -in server.csr -CA root.crt -CAkey root.key -CAcreateserial -days 2 \
                -sha384 -extfile ext -out server.crt";
    openssl(dir, &sign.split_whitespace().collect::<Vec<_>>());
}

#[test]
fn tls_modes_and_channel_binding() {
    let dir = tempfile::tempdir().unwrap();
    certificates(dir.path());
    let server = LocalServer::start(&[]).unwrap();
    let mut admin = connect(&server);
    let plain = PgConfig::parse(&server.url("postgres")).unwrap();
    let mode = |ssl| PgConfig { ssl, ..plain.clone() };
    let encrypted = |config: &PgConfig| {
        let mut client = Client::connect(config)?;
        client
            .query_one("SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()", &[])?
            .get::<bool>(0)
    };
    // Without TLS on the server.
    assert!(!encrypted(&mode(TlsMode::Prefer)).unwrap());
    assert!(matches!(encrypted(&mode(TlsMode::Require)), Err(PgError::Tls { .. })));

    let data: String = admin.query_one("SHOW data_directory", &[]).unwrap().get(0).unwrap();
    let data = Path::new(&data);
    for name in ["server.crt", "server.key"] {
        std::fs::copy(dir.path().join(name), data.join(name)).unwrap();
        let owner = format!("--reference={}", data.display());
        let path = data.join(name).display().to_string();
        assert!(Command::new("chown").args([&owner, &path]).status().unwrap().success());
        assert!(Command::new("chmod").args(["600", &path]).status().unwrap().success());
    }
    admin.batch_execute("CREATE ROLE scram LOGIN PASSWORD 's'").unwrap();
    admin.batch_execute("ALTER SYSTEM SET ssl = on").unwrap();
    set_hba(&mut admin, "hostssl all scram all scram-sha-256\nhost all postgres all trust\n");
    eventually(&mode(TlsMode::Require), |r| r.map(drop).map_err(|e| e.to_string()));

    assert!(encrypted(&mode(TlsMode::Prefer)).unwrap());
    assert!(!encrypted(&mode(TlsMode::Disable)).unwrap());
    // Our root is not among the system's.
    assert!(matches!(encrypted(&mode(TlsMode::VerifyFull)), Err(PgError::Tls { .. })));
    let root = dir.path().join("root.crt").display().to_string();
    let trusted = |ssl, host: &str| PgConfig {
        ssl,
        host: host.into(),
        ssl_root_cert: Some(root.clone()),
        ..plain.clone()
    };
    assert!(encrypted(&trusted(TlsMode::VerifyFull, "localhost")).unwrap());
    // The certificate does not name the address.
    let error = encrypted(&trusted(TlsMode::VerifyFull, "127.0.0.1")).unwrap_err();
    assert!(matches!(error, PgError::Tls { .. }), "{error}");
    assert!(encrypted(&trusted(TlsMode::VerifyCa, "127.0.0.1")).unwrap());
    // SCRAM-SHA-256-PLUS: the server offers it over TLS and checks the binding.
    let scram = PgConfig {
        user: "scram".into(),
        password: Some("s".into()),
        ..trusted(TlsMode::VerifyFull, "localhost")
    };
    assert!(encrypted(&scram).unwrap());
    // … with the hash that the certificate's SHA-384 signature asks for.
    openssl(dir.path(), &["x509", "-in", "server.crt", "-outform", "der", "-out", "server.der"]);
    let digest = ["dgst", "-sha384", "-binary", "-out", "server.hash", "server.der"];
    openssl(dir.path(), &digest);
    let read = |name: &str| std::fs::read(dir.path().join(name)).unwrap();
    assert_eq!(
        zeroring_net::pg::login::tls_server_end_point(&read("server.der")),
        Some(read("server.hash"))
    );

    // Much data in both directions at once.
    let mut client = Client::connect(&scram).unwrap();
    let text = "x".repeat(3 << 20);
    let row = client.query_one("SELECT $1::text || 'y'", &[text.as_str().into()]).unwrap();
    assert_eq!(row.get::<&str>(0).unwrap().len(), text.len() + 1);
}

#[test]
fn queries_with_parameters_of_all_kinds() {
    let server = LocalServer::start(&[]).unwrap();
    let mut client = connect(&server);
    let row = client
        .query_one(
            "SELECT $1::int4, $2::text, $3::bool, $4::float8, $5::bytea, $6::text[], $7::jsonb, $8::int8",
            &[
                (-5).into(),
                "it's \\ \"x\" ü".into(),
                true.into(),
                1.5.into(),
                Param::binary([0u8, 1, 255]).of_type(17),
                Param::array([Some("a,b"), Some("\"")]),
                (&serde_json::json!({"k": [1, null]})).into(),
                None::<i64>.into(),
            ],
        )
        .unwrap();
    assert_eq!(row.get::<i32>(0).unwrap(), -5);
    assert_eq!(row.get::<&str>(1).unwrap(), "it's \\ \"x\" ü");
    assert!(row.get::<bool>(2).unwrap());
    assert_eq!(row.get::<f64>(3).unwrap(), 1.5);
    assert_eq!(row.get::<Vec<u8>>(4).unwrap(), [0, 1, 255]);
    assert_eq!(row.get::<Vec<String>>(5).unwrap(), ["a,b", "\""]);
    assert_eq!(row.get::<serde_json::Value>(6).unwrap(), serde_json::json!({"k": [1, null]}));
    assert_eq!(row.get::<Option<i64>>(7).unwrap(), None);
    assert!(matches!(row.get::<i64>(7), Err(PgError::Decode { .. })));

    let statement = client
        .prepare(
            "SELECT g::int4 AS n, g::int8 * 2 AS twice, (g % 2 = 0) AS even, g::text AS t
             FROM generate_series(1, $1::int4) g",
            Format::Binary,
        )
        .unwrap();
    let mut pipeline = client.pipeline().unwrap();
    pipeline.execute(&statement, &[3.into()]).unwrap();
    pipeline.execute(&statement, &[Param::binary(2i32.to_be_bytes())]).unwrap();
    let results = pipeline.run_one().unwrap();
    let all: Vec<(i32, i64, bool, String)> = results
        .iter()
        .flat_map(|r| &r.rows)
        .map(|r| {
            (
                r.by_name("n").unwrap(),
                r.by_name("twice").unwrap(),
                r.by_name("even").unwrap(),
                r.by_name("t").unwrap(),
            )
        })
        .collect();
    assert_eq!(
        all[..3],
        [(1, 2, false, "1".into()), (2, 4, true, "2".into()), (3, 6, false, "3".into())]
    );
    assert_eq!(all.len(), 5);
}

#[test]
fn cached_statements_are_parsed_once_and_outlive_failures() {
    let server = LocalServer::start(&[]).unwrap();
    let mut client = connect(&server);
    let run = |client: &mut Client, sqls: &[&str]| {
        let mut pipeline = client.pipeline().unwrap();
        for sql in sqls {
            pipeline.cached(sql, &[2.into()], Format::Text).unwrap();
        }
        let results = pipeline.run_one()?;
        results.iter().map(|r| r.rows[0].get::<i32>(0)).collect::<Result<Vec<_>, _>>()
    };
    let (add, divide) = ("SELECT 40 + $1::int4", "SELECT 1 / ($1::int4 - 2)");
    // Parsed, but what comes after the failure is skipped; nothing of it is taken for known.
    let failed = run(&mut client, &[divide, add]).unwrap_err();
    assert_eq!(failed.code().unwrap().as_str(), "22012");
    for _ in 0..3 {
        assert_eq!(run(&mut client, &[add, add]).unwrap(), [42, 42]);
    }
    let prepared = "SELECT count(*)::int4 FROM pg_prepared_statements WHERE statement = $1::text";
    let count = client.query_one(prepared, &[add.into()]).unwrap().get::<i32>(0).unwrap();
    assert_eq!(count, 1);
    // No other session gives a name to another text, if a pooler mixes them up.
    let names = "SELECT min(name) FROM pg_prepared_statements WHERE statement LIKE $1::text";
    let name = |client: &mut Client, text: &str| {
        client.query_one(names, &[text.into()]).unwrap().get::<String>(0).unwrap()
    };
    let mut other = connect(&server);
    run(&mut other, &[add]).unwrap();
    let mut third = connect(&server);
    assert_eq!(run(&mut third, &["SELECT 2 + $1::int4"]).unwrap(), [4]);
    assert_ne!(name(&mut other, "SELECT 40%"), name(&mut third, "SELECT 2 %"));
    client.batch_execute("DEALLOCATE ALL").unwrap();
    let lost = run(&mut client, &[add]).unwrap_err();
    assert_eq!(lost.code().unwrap().as_str(), "26000", "somebody else's session, say");
    // Many texts do not fill the server's memory.
    for n in 0..2 * zeroring_net::pg::MAX_CACHED {
        assert_eq!(run(&mut client, &[&format!("SELECT $1::int4 + {n}")]).unwrap(), [n as i32 + 2]);
    }
    let all = "SELECT count(*)::int4 FROM pg_prepared_statements";
    let count = client.query_one(all, &[]).unwrap().get::<i32>(0).unwrap();
    assert!(count as usize <= zeroring_net::pg::MAX_CACHED, "{count}");
}

#[test]
fn a_failed_segment_does_not_touch_the_others() {
    let server = LocalServer::start(&[]).unwrap();
    let mut client = connect(&server);
    client.batch_execute("CREATE TABLE t (a int PRIMARY KEY)").unwrap();
    let mut pipeline = client.pipeline().unwrap();
    let insert = "INSERT INTO t VALUES ($1)";
    pipeline.query(insert, &[1.into()], Format::Text).unwrap();
    pipeline.query(insert, &[2.into()], Format::Text).unwrap();
    pipeline.sync();
    pipeline.query(insert, &[3.into()], Format::Text).unwrap();
    pipeline.query(insert, &[1.into()], Format::Text).unwrap();
    pipeline.query(insert, &[4.into()], Format::Text).unwrap();
    pipeline.sync();
    pipeline.query(insert, &[5.into()], Format::Text).unwrap();
    let results = pipeline.run().unwrap();
    assert_eq!(results.len(), 3);
    assert_eq!(results[0].as_ref().unwrap().iter().map(|r| r.affected()).sum::<u64>(), 2);
    let error = results[1].as_ref().unwrap_err();
    assert!(error.is(SqlState::UNIQUE_VIOLATION), "{error}");
    assert_eq!(results[2].as_ref().unwrap()[0].affected(), 1);
    let rows = client.query("SELECT a FROM t ORDER BY a", &[]).unwrap();
    let rows: Vec<i32> = rows.iter().map(|r| r.get(0).unwrap()).collect();
    assert_eq!(rows, [1, 2, 5]);

    // Given up before it was sent.
    let mut pipeline = client.pipeline().unwrap();
    pipeline.query(insert, &[9.into()], Format::Text).unwrap();
    drop(pipeline);
    assert_eq!(client.execute("DELETE FROM t WHERE a = $1", &[9.into()]).unwrap(), 0);
}

#[test]
fn a_pipeline_larger_than_all_socket_buffers_does_not_deadlock() {
    let server = LocalServer::start(&[]).unwrap();
    let mut client = connect(&server);
    let mut pipeline = client.pipeline().unwrap();
    let text = "x".repeat(100_000);
    for _ in 0..200 {
        pipeline.query("SELECT $1::text", &[text.as_str().into()], Format::Text).unwrap();
    }
    let results = pipeline.run_one().unwrap();
    assert_eq!(results.len(), 200);
    assert!(results.iter().all(|r| r.rows[0].get::<&str>(0).unwrap().len() == 100_000));
}

#[test]
fn errors_leave_the_session_usable_and_tell_the_transaction_state() {
    let server = LocalServer::start(&[]).unwrap();
    let mut client = connect(&server);
    let error = client.query("SELECT * FROM missing", &[]).unwrap_err();
    assert!(error.is(SqlState::UNDEFINED_TABLE), "{error}");
    let error = client.simple_query("SELECT 1; SELECT 1/0").unwrap_err();
    assert!(error.is(SqlState::new("22012")), "{error}");
    client.batch_execute("BEGIN").unwrap();
    assert_eq!(client.transaction_status(), TransactionStatus::Open);
    client.batch_execute("nonsense").unwrap_err();
    assert_eq!(client.transaction_status(), TransactionStatus::Failed);
    client.batch_execute("ROLLBACK").unwrap();
    assert_eq!(client.transaction_status(), TransactionStatus::Idle);
    assert_eq!(client.simple_query("SELECT 1; SELECT 2").unwrap().len(), 2);
}

#[test]
fn silence_interruption_and_cancellation_end_a_wait() {
    let server = LocalServer::start(&[]).unwrap();
    let mut client = connect(&server);
    let token = client.cancel_token();
    let mut admin = connect(&server);
    let until_asleep = "SELECT 1 FROM pg_stat_activity WHERE wait_event = 'PgSleep'";
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| client.query("SELECT pg_sleep(600)", &[]).map(drop));
        while admin.query(until_asleep, &[]).unwrap().is_empty() {}
        token.cancel().unwrap();
        let error = waiting.join().unwrap().unwrap_err();
        assert!(error.is(SqlState::new("57014")), "{error}");
    });
    let interrupter = client.interrupter().unwrap();
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| client.query("SELECT pg_sleep(600)", &[]).map(drop));
        while admin.query(until_asleep, &[]).unwrap().is_empty() {}
        interrupter.interrupt();
        let error = waiting.join().unwrap().unwrap_err();
        assert!(matches!(error, PgError::Closed | PgError::Io(_)), "{error}");
    });
    assert!(matches!(client.query("SELECT 1", &[]), Err(PgError::Broken)));

    admin.set_read_timeout(Some(Duration::from_millis(50)));
    let error = admin.query("SELECT pg_sleep(600)", &[]).unwrap_err();
    assert!(matches!(error, PgError::Timeout(_)), "{error}");
    assert!(matches!(admin.query("SELECT 1", &[]), Err(PgError::Broken)));
}

#[test]
fn a_terminated_session_says_so() {
    let server = LocalServer::start(&[]).unwrap();
    let mut admin = connect(&server);
    let mut client = connect(&server);
    let pid = client.process_id();
    admin.query("SELECT pg_terminate_backend($1, 5000)", &[pid.into()]).unwrap();
    let error = client.query("SELECT 1", &[]).unwrap_err();
    assert!(error.is(SqlState::ADMIN_SHUTDOWN), "{error}");
    assert!(client.is_broken());
}

#[test]
fn copy_out_streams_and_an_unfinished_one_spoils_the_session() {
    let server = LocalServer::start(&[]).unwrap();
    let mut client = connect(&server);
    let mut copy = client
        .copy_out(
            "COPY (SELECT g, 'r' || g FROM generate_series(1, 50000) g) TO STDOUT (FORMAT binary)",
        )
        .unwrap();
    assert!(copy.is_binary());
    let (mut rows, mut count, mut sum) = (BinaryRows::default(), 0u64, 0i64);
    while let Some(chunk) = copy.next_chunk().unwrap() {
        rows.feed::<PgError>(chunk, |fields| {
            let g = i32::from_be_bytes(fields.get(0).unwrap().try_into().unwrap());
            assert_eq!(fields.get(1).unwrap(), format!("r{g}").as_bytes());
            count += 1;
            sum += i64::from(g);
            Ok(())
        })
        .unwrap();
    }
    rows.finish().unwrap();
    assert_eq!((count, sum), (50_000, 50_000 * 50_001 / 2));
    // In step afterwards.
    assert_eq!(client.query_one("SELECT 7", &[]).unwrap().get::<i32>(0).unwrap(), 7);
    // Errors before and in the middle.
    assert!(client.copy_out("COPY missing TO STDOUT").unwrap_err().is(SqlState::UNDEFINED_TABLE));
    let mut copy = client
        .copy_out("COPY (SELECT 1 / (1000 - g) FROM generate_series(1, 1000) g) TO STDOUT")
        .unwrap();
    let error = loop {
        match copy.next_chunk() {
            Ok(Some(_)) => {}
            Ok(None) => panic!("no error"),
            Err(e) => break e,
        }
    };
    assert!(error.is(SqlState::new("22012")), "{error}");
    assert_eq!(client.query_one("SELECT 8", &[]).unwrap().get::<i32>(0).unwrap(), 8);

    let mut copy = client.copy_out("COPY (SELECT generate_series(1, 9)) TO STDOUT").unwrap();
    copy.next_chunk().unwrap();
    assert!(matches!(client.query("SELECT 1", &[]), Err(PgError::Broken)));
}

#[test]
fn a_server_that_speaks_something_else_is_recognised() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let fake = std::thread::spawn(move || {
        use std::io::Write;
        let (mut socket, _) = listener.accept().unwrap();
        socket.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").unwrap();
    });
    let url = format!("postgres://u@127.0.0.1:{port}/d?sslmode=disable");
    let error = Client::connect(&PgConfig::parse(&url).unwrap()).unwrap_err();
    assert!(matches!(error, PgError::Protocol(_)), "{error}");
    fake.join().unwrap();

    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let url = format!("postgres://u@127.0.0.1:{port}/d?sslmode=disable");
    let mut config = PgConfig::parse(&url).unwrap();
    config.connect_timeout = Duration::from_millis(100);
    // Accepted by the kernel, never answered.
    let error = Client::connect(&config).unwrap_err();
    assert!(matches!(error, PgError::Timeout(_)), "{error}");
}
