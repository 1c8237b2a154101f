//! The life of the server process: readiness, restart, signals, exit codes, heartbeat
//! (spec: operations checklist 46, 48, 50).

// A failed unwrap is a failed test.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::fs::File;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use zeroring_net::pg::local_server::{LocalServer, free_port};
use zeroring_net::pg::{Client, PgConfig};

/// How long anything may take before a test fails.
const PATIENCE: Duration = Duration::from_secs(180);

fn eventually<T>(what: &str, mut check: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(value) = check() {
            return value;
        }
        assert!(Instant::now() < deadline, "{what}: not within {PATIENCE:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A database with one small table.
fn database() -> LocalServer {
    let postgres = LocalServer::start(&["fsync=off"]).unwrap();
    let config = PgConfig::parse(&postgres.url("postgres")).unwrap();
    let mut client = Client::connect(&config).unwrap();
    client
        .batch_execute("CREATE TABLE t (id int PRIMARY KEY, v text); INSERT INTO t VALUES (1, 'a')")
        .unwrap();
    postgres
}

struct Process {
    directory: PathBuf,
    child: Child,
    port: u16,
}

impl Process {
    fn start(directory: &tempfile::TempDir, upstream: &str, env: &[(&str, &str)]) -> Process {
        Process::start_on(free_port(1).unwrap(), directory, upstream, env)
    }

    fn start_on(
        port: u16,
        directory: &tempfile::TempDir,
        upstream: &str,
        env: &[(&str, &str)],
    ) -> Process {
        let directory = directory.path().to_owned();
        let log = File::options().create(true).append(true).open(directory.join("log")).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_zeroring"));
        for (key, _) in std::env::vars().filter(|(key, _)| key.starts_with("ZERO_")) {
            command.env_remove(key);
        }
        let child = command
            .current_dir(&directory)
            .env("ZERO_UPSTREAM_DB", upstream)
            .env("ZERO_ADMIN_PASSWORD", "secret")
            .env("ZERO_CVR_DB", "embedded")
            .env("ZERO_REPLICA_FILE", directory.join("replica.db"))
            .env("ZERO_PORT", port.to_string())
            .env("ZERO_NUM_SYNC_WORKERS", "2")
            .envs(env.iter().copied())
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        Process { directory, child, port }
    }

    fn get(&self, path: &str) -> Option<String> {
        let mut socket = TcpStream::connect(("127.0.0.1", self.port)).ok()?;
        // "a:secret"
        let auth = "Authorization: Basic YTpzZWNyZXQ=";
        write!(socket, "GET {path} HTTP/1.1\r\nHost: x\r\n{auth}\r\n\r\n").ok()?;
        let mut answer = String::new();
        socket.read_to_string(&mut answer).ok()?;
        let (head, body) = answer.split_once("\r\n\r\n")?;
        head.starts_with("HTTP/1.1 200").then(|| body.to_owned())
    }

    fn statz(&self, group: &str) -> serde_json::Value {
        let body = self.get(&format!("/statz?format=json&group={group}")).unwrap();
        serde_json::from_str::<serde_json::Value>(&body).unwrap()[group].take()
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.directory.join("log")).unwrap_or_default()
    }

    fn await_ready(&mut self) {
        eventually("the server becomes ready", || {
            if let Some(status) = self.child.try_wait().unwrap() {
                panic!("the server ended with {status}:\n{}", self.log());
            }
            self.get("/")
        });
    }

    fn signal(&self, name: &str) {
        let status = Command::new("kill").args(["-s", name, &self.child.id().to_string()]).status();
        assert!(status.unwrap().success());
    }

    fn exit_code(&mut self) -> Option<i32> {
        eventually("the server ends", || self.child.try_wait().unwrap()).code()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("--- the server's log:\n{}", self.log());
        }
    }
}

#[test]
fn sigterm_drains_and_a_restart_continues_with_the_replica() {
    let postgres = database();
    let directory = tempfile::tempdir().unwrap();
    let mut server = Process::start(&directory, &postgres.url("postgres"), &[]);
    server.await_ready();
    assert_eq!(server.statz("replication")["initialSyncs"], 1);
    let backends = server.statz("server")["io backends"].clone();
    assert_eq!(backends.as_array().unwrap().len(), 2, "{backends}");
    assert!(server.statz("replica")["page count"].as_u64().unwrap() > 1);
    server.signal("TERM");
    assert_eq!(server.exit_code(), Some(0));
    let log = server.log();
    let mut at = 0;
    for line in [
        "starting server@",
        "starting zero-cache",
        "waiting for workers to be ready ...",
        "zero-dispatcher listening at [::]:",
        "zero-cache ready (",
        "initiating drain (SIGTERM)",
        "all user-facing workers drained (",
        "exiting with code 0",
    ] {
        let found = log[at..].find(line);
        at += found.unwrap_or_else(|| panic!("no {line:?} in order:\n{log}"));
    }
    assert!(!log.contains("secret"), "{log}");

    let mut server = Process::start(&directory, &postgres.url("postgres"), &[]);
    server.await_ready();
    assert_eq!(server.statz("replication")["initialSyncs"], 0);
    server.signal("INT");
    assert_eq!(server.exit_code(), Some(0));
}

#[test]
fn sigquit_ends_at_once_with_14() {
    let postgres = database();
    let directory = tempfile::tempdir().unwrap();
    let mut server = Process::start(&directory, &postgres.url("postgres"), &[]);
    server.await_ready();
    server.signal("QUIT");
    assert_eq!(server.exit_code(), Some(14));
    assert!(!server.log().contains("initiating drain"));
}

#[test]
fn heartbeats_that_stop_drain_the_server() {
    let postgres = database();
    let directory = tempfile::tempdir().unwrap();
    let env = [("ZERO_KEEPALIVE_TIMEOUT_MS", "400")];
    let mut server = Process::start(&directory, &postgres.url("postgres"), &env);
    // `/` is no heartbeat: nothing happens before the first `/keepalive`.
    server.await_ready();
    assert_eq!(server.get("/keepalive").as_deref(), Some("OK"));
    assert_eq!(server.exit_code(), Some(0));
    assert!(server.log().contains("initiating drain (heartbeat)"), "{}", server.log());
}

#[test]
fn a_port_in_use_is_told_not_shared() {
    let postgres = database();
    let directory = tempfile::tempdir().unwrap();
    let taken = TcpListener::bind(("::", 0)).unwrap();
    let port = taken.local_addr().unwrap().port();
    let mut server = Process::start_on(port, &directory, &postgres.url("postgres"), &[]);
    assert_eq!(server.exit_code(), Some(255));
    let log = server.log();
    assert!(log.contains(&format!("port {port} is in use")), "{log}");
    assert!(log.contains("ZERO_PORT"), "{log}");
}
