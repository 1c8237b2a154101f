//! The server under test, as a process of its own.

use std::fs::File;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use zeroring_net::pg::local_server::free_port;

use super::eventually;

/// Marks that client view records go where they do by default: to the upstream database. (The
/// variable itself means nothing to a server.)
pub const CVR_IN_POSTGRES: (&str, &str) = ("TEST_CVR", "postgres");

/// Which server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The binary that was just built.
    Ours,
    /// The `zero-cache` of the npm package that the test client is of.
    Original,
}

/// A server process with its own directory; killed and cleaned up when dropped.
pub struct Server {
    kind: Kind,
    dir: tempfile::TempDir,
    port: u16,
    env: Vec<(String, String)>,
    child: Option<Child>,
}

impl Server {
    /// Starts a server on the database at `upstream` and waits until it is ready.
    pub fn start(upstream: &str, env: &[(&str, &str)]) -> Server {
        Server::start_as(if is_original() { Kind::Original } else { Kind::Ours }, upstream, env)
    }

    /// The same, of a certain kind whatever the run tests.
    pub fn start_as(kind: Kind, upstream: &str, env: &[(&str, &str)]) -> Server {
        let dir = tempfile::tempdir().unwrap();
        let env = env.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        // The next one is the change-streamer's, by default.
        let port = free_port(1).unwrap();
        let mut server = Server { kind, port, dir, env, child: None };
        server.set("ZERO_UPSTREAM_DB", upstream);
        server.set("ZERO_REPLICA_FILE", &server.path("replica.db"));
        server.set("ZERO_PORT", &server.port.to_string());
        server.set("ZERO_ADMIN_PASSWORD", "secret");
        server.set("ZERO_LOG_LEVEL", "info");
        server.set("ZERO_NUM_SYNC_WORKERS", "2");
        server.set("ZERO_ENABLE_TELEMETRY", "false");
        if kind == Kind::Ours && !server.env.iter().any(|(k, _)| k == CVR_IN_POSTGRES.0) {
            server.set("ZERO_CVR_DB", &format!("file:{}", server.path("cvr.db")));
        }
        server.launch();
        server
    }

    fn set(&mut self, key: &str, value: &str) {
        if !self.env.iter().any(|(k, _)| k == key) {
            self.env.push((key.to_owned(), value.to_owned()));
        }
    }

    pub fn path(&self, file: &str) -> String {
        self.dir.path().join(file).to_string_lossy().into_owned()
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    pub fn pid(&self) -> u32 {
        self.child.as_ref().unwrap().id()
    }

    /// `kill -9` of all its processes: the original has several.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let mut all = vec![child.id()];
            let mut at = 0;
            while let Some(parent) = all.get(at) {
                all.extend(children(*parent));
                at += 1;
            }
            let _ = Command::new("kill").arg("-9").args(all.iter().map(u32::to_string)).status();
            let _ = child.wait();
        }
    }

    /// SIGTERM, and the exit code.
    pub fn terminate(&mut self) -> Option<i32> {
        self.ask_to_terminate();
        self.terminated()
    }

    /// SIGTERM.
    pub fn ask_to_terminate(&mut self) {
        if let Some(child) = &self.child {
            let _ = Command::new("kill").arg(child.id().to_string()).status();
        }
    }

    /// The exit code, as soon as the process has ended.
    pub fn terminated(&mut self) -> Option<i32> {
        let mut child = self.child.take()?;
        let mut waiting = || child.try_wait().unwrap().ok_or("still running".to_owned());
        let status = eventually("the server stops on SIGTERM", &mut waiting);
        status.code()
    }

    /// Starts the process, on the same directory and port, and waits until it serves.
    pub fn launch(&mut self) {
        self.spawn();
        eventually("the server becomes ready", || {
            if let Some(status) = self.child.as_mut().unwrap().try_wait().unwrap() {
                panic!("the server ended with {status}:\n{}", self.log());
            }
            self.get("/keepalive").map_err(|e| format!("{e}\n{}", self.log()))
        });
    }

    /// Starts the process without waiting.
    pub fn spawn(&mut self) {
        let log = File::options().create(true).append(true).open(self.path("log")).unwrap();
        let mut command = if self.kind == Kind::Original {
            let modules =
                PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/client/node_modules"));
            let mut c = Command::new(modules.join("node/bin/node"));
            c.arg(modules.join("@rocicorp/zero/out/zero/src/cli.js"));
            let path = std::env::var("PATH").unwrap_or_default();
            c.env("PATH", format!("{}:{path}", modules.join("node/bin").display()));
            c
        } else {
            Command::new(env!("CARGO_BIN_EXE_zeroring"))
        };
        for (key, _) in std::env::vars().filter(|(k, _)| k.starts_with("ZERO_")) {
            command.env_remove(key);
        }
        let child = command
            .envs(self.env.iter().map(|(k, v)| (k, v)))
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        self.child = Some(child);
    }

    /// The body of a GET answered with 200.
    pub fn get(&self, path: &str) -> Result<String, String> {
        let fail = |e: std::io::Error| e.to_string();
        let mut socket = TcpStream::connect(("127.0.0.1", self.port)).map_err(fail)?;
        let head = format!(
            "GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nAuthorization: Basic YTpzZWNyZXQ=\r\n\r\n"
        );
        socket.write_all(head.as_bytes()).map_err(fail)?;
        let mut answer = String::new();
        socket.read_to_string(&mut answer).map_err(fail)?;
        let (head, body) = answer.split_once("\r\n\r\n").ok_or("no head")?;
        if head.starts_with("HTTP/1.1 200") { Ok(body.to_owned()) } else { Err(head.to_owned()) }
    }

    /// Everything that the process and its predecessors wrote.
    pub fn whole_log(&self) -> String {
        std::fs::read_to_string(self.path("log")).unwrap_or_default()
    }

    pub fn log(&self) -> String {
        let text = self.whole_log();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(60)..].join("\n")
    }

    /// Resident memory of the process, bytes.
    pub fn resident_bytes(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap();
        let line = status.lines().find(|l| l.starts_with("VmRSS:")).unwrap();
        let kib: u64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
        kib * 1024
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- the server's log ends with:\n{}", self.log());
        }
        // The original has children: let it end them.
        if self.kind == Kind::Original {
            let _ = self.terminate();
        }
        self.kill();
    }
}

/// The processes that a process started, while it runs.
fn children(parent: u32) -> Vec<u32> {
    let tasks = std::fs::read_dir(format!("/proc/{parent}/task")).into_iter().flatten().flatten();
    let lists = tasks.filter_map(|task| std::fs::read_to_string(task.path().join("children")).ok());
    lists
        .flat_map(|l| l.split_whitespace().map(|id| id.parse().unwrap()).collect::<Vec<_>>())
        .collect()
}

/// True when the tests are run against the original, to check the harness.
pub fn is_original() -> bool {
    std::env::var("ZERORING_E2E_SERVER").is_ok_and(|v| v == "original")
}
