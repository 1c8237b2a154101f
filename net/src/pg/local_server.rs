//! A private, throw-away PostgreSQL server for the demo and for tests: its own data directory,
//! a free port, loopback only, gone when dropped.
//!
//! PostgreSQL refuses to run as root; as root it is started as user `postgres`.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Why a private server could not be started.
#[derive(Debug, thiserror::Error)]
pub enum LocalServerError {
    /// No PostgreSQL binaries.
    #[error(
        "PostgreSQL's `{0}` was not found. Install it (Debian: `apt-get install postgresql`) or put it on the PATH."
    )]
    NotInstalled(&'static str),
    /// A step failed.
    #[error("{step} failed: {cause}")]
    Step {
        /// What was being done.
        step: &'static str,
        /// Output or OS error.
        cause: String,
    },
    /// It did not accept connections in time.
    #[error("PostgreSQL did not become ready within {0:?}; its log ends with:\n{1}")]
    NotReady(Duration, String),
}

/// The environment variable that names a directory for templates: what `initdb` makes is kept there
/// and copied from then on, at less than half its cost. For tests, which start hundreds of servers.
pub const TEMPLATES: &str = "ZERORING_PG_TEMPLATES";

/// How long a new server may take to accept connections.
const READY_TIMEOUT: Duration = Duration::from_secs(120);

/// A running private server. Stopped, and its directory removed, when dropped.
#[derive(Debug)]
pub struct LocalServer {
    dir: PathBuf,
    bin: PathBuf,
    port: u16,
    child: Option<Child>,
    settings: Vec<String>,
}

impl LocalServer {
    /// Initialises and starts a server in a new directory below the system's temporary one.
    /// `settings` are extra `name=value` server settings; logical replication is on.
    ///
    /// # Errors
    /// [`LocalServerError`] naming the step.
    pub fn start(settings: &[&str]) -> Result<LocalServer, LocalServerError> {
        let bin = find_bin_dir()?;
        let step = |step: &'static str| {
            move |e: io::Error| LocalServerError::Step { step, cause: e.to_string() }
        };
        let dir = unique_dir().map_err(step("creating a directory for PostgreSQL"))?;
        let mut server = LocalServer {
            dir,
            bin,
            port: 0,
            child: None,
            settings: settings.iter().map(|s| (*s).to_owned()).collect(),
        };
        if is_root() {
            run(Command::new("chown").arg("postgres:").arg(&server.dir), "chown")?;
        }
        server.init()?;
        server.launch()?;
        Ok(server)
    }

    /// Makes the data directory.
    fn init(&self) -> Result<(), LocalServerError> {
        let template = self.template();
        if let Some(template) = template.as_ref().filter(|template| template.is_dir()) {
            if copy(template, &self.data_dir()).is_ok() {
                return Ok(());
            }
            let _ = fs::remove_dir_all(self.data_dir());
        }
        let mut initdb = self.command("initdb");
        initdb.arg("-D").arg(self.data_dir()).args([
            "-U",
            "postgres",
            "-A",
            "trust",
            "-E",
            "UTF8",
            "--locale=C.UTF-8",
            "--no-sync",
        ]);
        run(&mut initdb, "initdb")?;
        if let Some(template) = template {
            let new = template.with_extension(format!("{:016x}", rand::random::<u64>()));
            // Somebody else may have been faster.
            if copy(&self.data_dir(), &new).and_then(|()| rename(&new, &template)).is_err() {
                let _ = fs::remove_dir_all(&new);
            }
        }
        Ok(())
    }

    /// Where this PostgreSQL's template is, or is to be.
    fn template(&self) -> Option<PathBuf> {
        let dir = PathBuf::from(std::env::var_os(TEMPLATES)?);
        fs::create_dir_all(&dir).ok()?;
        let made = fs::metadata(self.bin.join("initdb")).ok()?.modified().ok()?;
        let made = made.duration_since(std::time::UNIX_EPOCH).ok()?.as_nanos();
        let bin = self.bin.to_string_lossy().replace(['/', '.'], "-");
        Some(dir.join(format!("data{bin}-{made:x}")))
    }

    /// The TCP port on 127.0.0.1.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// A connection URL for a database of this server.
    pub fn url(&self, database: &str) -> String {
        format!("postgresql://postgres@127.0.0.1:{}/{database}", self.port)
    }

    /// Stops the server at once, as a crash would, and keeps its data.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            self.signal(&child, "QUIT");
            let _ = child.wait();
        }
    }

    /// Starts the server again on the same port and data, after [`LocalServer::kill`].
    ///
    /// # Errors
    /// [`LocalServerError`] if it does not come up.
    pub fn restart(&mut self) -> Result<(), LocalServerError> {
        self.kill();
        self.launch()
    }

    fn data_dir(&self) -> PathBuf {
        self.dir.join("data")
    }

    fn log_tail(&self) -> String {
        let log = fs::read_to_string(self.dir.join("log")).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(15)..].join("\n")
    }

    fn launch(&mut self) -> Result<(), LocalServerError> {
        // Another process may take a free port between looking and binding: try a few.
        let keep = self.port != 0;
        for attempt in 0..5 {
            if !keep {
                self.port = free_port(0).map_err(|e| LocalServerError::Step {
                    step: "finding a free port",
                    cause: e.to_string(),
                })?;
            }
            match self.launch_once() {
                Err(LocalServerError::NotReady(_, log))
                    if !keep && attempt < 4 && log.contains("could not bind") => {}
                other => return other,
            }
        }
        Ok(())
    }

    fn launch_once(&mut self) -> Result<(), LocalServerError> {
        let log = fs::File::create(self.dir.join("log"))
            .map_err(|e| LocalServerError::Step { step: "creating a log", cause: e.to_string() })?;
        let err = log
            .try_clone()
            .map_err(|e| LocalServerError::Step { step: "creating a log", cause: e.to_string() })?;
        let mut command = self.command("postgres");
        command.arg("-D").arg(self.data_dir());
        let defaults = [
            "listen_addresses=127.0.0.1".to_owned(),
            format!("port={}", self.port),
            "unix_socket_directories=".to_owned(),
            "wal_level=logical".to_owned(),
            "max_wal_senders=40".to_owned(),
            "max_replication_slots=40".to_owned(),
            "max_connections=200".to_owned(),
        ];
        for setting in defaults.iter().chain(&self.settings) {
            command.arg("-c").arg(setting);
        }
        let mut child =
            command.stdin(Stdio::null()).stdout(log).stderr(err).spawn().map_err(|e| {
                LocalServerError::Step { step: "starting postgres", cause: e.to_string() }
            })?;
        let deadline = Instant::now() + READY_TIMEOUT;
        loop {
            let mut ready = self.command("pg_isready");
            ready.args(["-q", "-h", "127.0.0.1", "-U", "postgres", "-p", &self.port.to_string()]);
            if ready.status().is_ok_and(|s| s.success()) {
                self.child = Some(child);
                return Ok(());
            }
            let died = child.try_wait().ok().flatten().is_some();
            if died || Instant::now() > deadline {
                let _ = child.kill();
                let _ = child.wait();
                return Err(LocalServerError::NotReady(READY_TIMEOUT, self.log_tail()));
            }
            std::thread::sleep(Duration::from_millis(30));
        }
    }

    /// A command of PostgreSQL's, run as a user that it accepts.
    fn command(&self, program: &str) -> Command {
        let path = self.bin.join(program);
        let mut command = if is_root() {
            // setpriv replaces itself, so that signals reach the server.
            let mut c = Command::new("setpriv");
            c.args(["--reuid=postgres", "--regid=postgres", "--init-groups"]).arg(path);
            c
        } else {
            Command::new(path)
        };
        // Its own process group: Ctrl-C of the terminal must not reach it before we stop it.
        std::os::unix::process::CommandExt::process_group(&mut command, 0);
        command.current_dir(&self.dir).env_remove("PGDATA");
        command
    }

    fn signal(&self, child: &Child, signal: &str) {
        let _ = Command::new("kill").args(["-s", signal, &child.id().to_string()]).status();
    }
}

impl Drop for LocalServer {
    fn drop(&mut self) {
        self.kill();
        let _ = fs::remove_dir_all(&self.dir);
    }
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

fn run(command: &mut Command, step: &'static str) -> Result<(), LocalServerError> {
    let out =
        command.output().map_err(|e| LocalServerError::Step { step, cause: e.to_string() })?;
    if out.status.success() {
        return Ok(());
    }
    Err(LocalServerError::Step { step, cause: String::from_utf8_lossy(&out.stderr).into_owned() })
}

/// Copies a directory, with the owners of its files.
fn copy(from: &Path, to: &Path) -> Result<(), LocalServerError> {
    run(Command::new("cp").arg("-a").arg(from).arg(to), "copying a data directory")
}

fn rename(from: &Path, to: &Path) -> Result<(), LocalServerError> {
    fs::rename(from, to).map_err(|e| LocalServerError::Step {
        step: "keeping a template of a data directory",
        cause: e.to_string(),
    })
}

fn unique_dir() -> io::Result<PathBuf> {
    let dir = std::env::temp_dir().join(format!("zeroring-pg-{:016x}", rand::random::<u64>()));
    fs::create_dir(&dir)?;
    fs::set_permissions(&dir, fs::Permissions::from_mode(0o755))?;
    Ok(dir)
}

/// Ports that systems do not use for outgoing connections (Linux takes those from 32768 on).
const PORTS: std::ops::Range<u16> = 10_240..32_000;

/// A TCP port that is free on this machine, and so are the `more` that follow it.
///
/// Nobody gets it by accident between looking and binding, or while its server restarts: that is
/// what happens with a port that the system chose, for it may choose it again for a connection.
///
/// # Errors
/// If no free port is found.
pub fn free_port(more: u16) -> io::Result<u16> {
    let mut failure = io::Error::from(io::ErrorKind::AddrInUse);
    for _ in 0..100 {
        let port = rand::random_range(PORTS);
        let taken = (port..=port + more)
            .find_map(|port| TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).err());
        match taken {
            None => return Ok(port),
            Some(error) => failure = error,
        }
    }
    Err(failure)
}

/// Where the server's binaries are: Debian keeps them off the PATH.
fn find_bin_dir() -> Result<PathBuf, LocalServerError> {
    let on_path = std::env::var_os("PATH")
        .map(|p| std::env::split_paths(&p).collect::<Vec<_>>())
        .unwrap_or_default();
    let mut debian: Vec<PathBuf> = fs::read_dir("/usr/lib/postgresql")
        .map(|dirs| dirs.flatten().map(|d| d.path().join("bin")).collect())
        .unwrap_or_default();
    debian.sort_by_key(|p| std::cmp::Reverse(version_of(p)));
    debian
        .into_iter()
        .chain(on_path)
        .find(|dir| ["initdb", "postgres", "pg_isready"].iter().all(|b| dir.join(b).is_file()))
        .ok_or(LocalServerError::NotInstalled("initdb"))
}

fn version_of(bin: &Path) -> u32 {
    bin.parent()
        .and_then(Path::file_name)
        .and_then(OsStr::to_str)
        .and_then(|v| v.parse().ok())
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn starts_restarts_and_leaves_nothing_behind() {
        let mut server = LocalServer::start(&[]).unwrap();
        let (dir, port) = (server.dir.clone(), server.port());
        server.restart().unwrap();
        assert_eq!(server.port(), port);
        drop(server);
        assert!(!dir.exists());
    }
}
