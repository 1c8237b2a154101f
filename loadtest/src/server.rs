//! The server under test, as a process of its own with a directory of its own.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::error::LoadError;

/// How long a server may take until it is ready, initial sync included.
const READY_TIMEOUT: Duration = Duration::from_secs(180);

/// How long it may take to end before it is killed.
const STOP_TIMEOUT: Duration = Duration::from_secs(20);

const LOG_LINES: usize = 25;

/// Which server, and where it is.
#[derive(Debug, Clone)]
pub(crate) enum ServerKind {
    /// Our binary, client views in Postgres: the durability of the original.
    Zeroring(PathBuf),
    /// Our binary, client views in a local file.
    ZeroringFile(PathBuf),
    /// The original, below a `node_modules` directory.
    Original(PathBuf),
}

impl ServerKind {
    /// `zeroring`, `zeroring-file` (`=PATH`), `original` or `original=NODE_MODULES`.
    pub(crate) fn parse(text: &str) -> Result<ServerKind, LoadError> {
        let (name, path) = text.split_once('=').unwrap_or((text, ""));
        let or = |default: &str| PathBuf::from(if path.is_empty() { default } else { path });
        let (kind, file) = match name {
            "zeroring" | "zeroring-file" => {
                let binary = or("target/release/zeroring");
                let kind = if name == "zeroring" {
                    ServerKind::Zeroring
                } else {
                    ServerKind::ZeroringFile
                };
                (kind(binary.clone()), binary)
            }
            "original" => {
                let modules = or("tests/client/node_modules");
                (ServerKind::Original(modules.clone()), modules.join("@rocicorp/zero"))
            }
            _ => {
                return Err(LoadError::Usage(format!(
                    "unknown server {text:?}: use zeroring, zeroring-file or original"
                )));
            }
        };
        if !file.exists() {
            return Err(LoadError::Usage(format!("{} does not exist", file.display())));
        }
        Ok(kind)
    }

    pub(crate) fn name(&self) -> &'static str {
        match self {
            ServerKind::Zeroring(_) => "zeroring",
            ServerKind::ZeroringFile(_) => "zeroring-file",
            ServerKind::Original(_) => "original",
        }
    }

    /// What it says about itself.
    pub(crate) fn version(&self) -> String {
        match self {
            ServerKind::Zeroring(binary) | ServerKind::ZeroringFile(binary) => {
                let output = Command::new(binary).arg("--version").output();
                output.map_or_else(
                    |e| e.to_string(),
                    |o| String::from_utf8_lossy(&o.stdout).trim().to_owned(),
                )
            }
            ServerKind::Original(modules) => {
                let file = modules.join("@rocicorp/zero/package.json");
                let text = std::fs::read_to_string(file).unwrap_or_default();
                let package: serde_json::Value = serde_json::from_str(&text).unwrap_or_default();
                format!("@rocicorp/zero {}", package["version"].as_str().unwrap_or("unknown"))
            }
        }
    }

    fn command(&self) -> Command {
        match self {
            ServerKind::Zeroring(binary) | ServerKind::ZeroringFile(binary) => Command::new(binary),
            ServerKind::Original(modules) => {
                let absolute = std::path::absolute(modules).unwrap_or_else(|_| modules.clone());
                let bin = absolute.join("node/bin");
                let own_node = bin.join("node");
                let node = if own_node.exists() { own_node } else { PathBuf::from("node") };
                let mut command = Command::new(node);
                command.arg(absolute.join("@rocicorp/zero/out/zero/src/cli.js"));
                let path = std::env::var("PATH").unwrap_or_default();
                command.env("PATH", format!("{}:{path}", bin.display()));
                command
            }
        }
    }
}

/// A running server.
pub(crate) struct Server {
    name: &'static str,
    dir: tempfile::TempDir,
    port: u16,
    child: Child,
    /// When the process was started.
    pub(crate) started: Instant,
}

impl Server {
    /// Starts a server on the database at `upstream`, with `settings` (`NAME=value`) added, and
    /// waits until it is ready.
    pub(crate) fn start(
        kind: &ServerKind,
        upstream: &str,
        settings: &[String],
        deadline: Instant,
    ) -> Result<Server, LoadError> {
        let dir = tempfile::tempdir().map_err(LoadError::io("creating a directory"))?;
        let port = free_port_pair().map_err(LoadError::io("looking for a free port"))?;
        let file = |name: &str| dir.path().join(name).to_string_lossy().into_owned();
        let log = File::create(file("log")).map_err(LoadError::io("creating a log"))?;
        let errors = log.try_clone().map_err(LoadError::io("creating a log"))?;
        let mut command = kind.command();
        for (key, _) in std::env::vars().filter(|(k, _)| k.starts_with("ZERO_")) {
            command.env_remove(key);
        }
        command
            .env("ZERO_UPSTREAM_DB", upstream)
            .env("ZERO_REPLICA_FILE", file("replica.db"))
            .env("ZERO_PORT", port.to_string())
            .env("ZERO_ADMIN_PASSWORD", "secret")
            .env("ZERO_LOG_LEVEL", "warn")
            .env("ZERO_ENABLE_TELEMETRY", "false");
        for setting in settings {
            let (name, value) = setting.split_once('=').unwrap_or((setting, ""));
            command.env(name, value.replace("{dir}", &dir.path().to_string_lossy()));
        }
        let started = Instant::now();
        let child = command
            .stdin(Stdio::null())
            .stdout(log)
            .stderr(errors)
            .spawn()
            .map_err(LoadError::io(format!("starting {}", kind.name())))?;
        let mut server = Server { name: kind.name(), dir, port, child, started };
        while server.get("/keepalive").is_none() {
            server.check_alive()?;
            if started.elapsed() > READY_TIMEOUT || Instant::now() > deadline {
                return Err(server.failure(&format!("not ready after {:?}", started.elapsed())));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(server)
    }

    pub(crate) fn address(&self) -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], self.port))
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// An error if the process has ended.
    pub(crate) fn check_alive(&mut self) -> Result<(), LoadError> {
        match self.child.try_wait() {
            Ok(None) => Ok(()),
            Ok(Some(status)) => Err(self.failure(&format!("ended with {status}"))),
            Err(e) => Err(self.failure(&e.to_string())),
        }
    }

    fn failure(&self, what: &str) -> LoadError {
        let cause = format!("{what}\n{}", self.log_tail());
        LoadError::Server { server: self.name.to_owned(), cause }
    }

    /// The last lines of its log.
    pub(crate) fn log_tail(&self) -> String {
        tail(&self.dir.path().join("log"))
    }

    /// Its own figures, if it tells them as JSON.
    pub(crate) fn statz(&self) -> Option<serde_json::Value> {
        serde_json::from_str(&self.get("/statz?format=json")?).ok()
    }

    /// The body of a GET answered with 200.
    fn get(&self, path: &str) -> Option<String> {
        let mut socket = TcpStream::connect(self.address()).ok()?;
        socket.set_read_timeout(Some(Duration::from_secs(5))).ok()?;
        let head = format!(
            "GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nAuthorization: Basic YTpzZWNyZXQ=\r\n\r\n"
        );
        socket.write_all(head.as_bytes()).ok()?;
        let mut answer = String::new();
        socket.read_to_string(&mut answer).ok()?;
        let (head, body) = answer.split_once("\r\n\r\n")?;
        head.starts_with("HTTP/1.1 200").then(|| body.to_owned())
    }
}

fn tail(file: &Path) -> String {
    let text = std::fs::read_to_string(file).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(LOG_LINES)..].join("\n")
}

impl Drop for Server {
    fn drop(&mut self) {
        // The original has children: SIGTERM lets it end them.
        let whole_tree = crate::process::tree(self.child.id());
        if let Some(pid) = rustix::process::Pid::from_raw(self.child.id() as i32) {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        }
        let deadline = Instant::now() + STOP_TIMEOUT;
        while matches!(self.child.try_wait(), Ok(None)) && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(20));
        }
        if matches!(self.child.try_wait(), Ok(None)) {
            for pid in whole_tree {
                if let Some(pid) = rustix::process::Pid::from_raw(pid as i32) {
                    let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
                }
            }
            let _ = self.child.wait();
        }
    }
}

/// A port that is free together with its successor (the change-streamer's default).
fn free_port_pair() -> std::io::Result<u16> {
    loop {
        let port = TcpListener::bind(("127.0.0.1", 0))?.local_addr()?.port();
        if port < 65_000 && TcpListener::bind(("127.0.0.1", port + 1)).is_ok() {
            return Ok(port);
        }
    }
}
