//! `zeroring demo`: a private PostgreSQL with a believable issue tracker, writes going on, the
//! server on top of it, and a page of live queries. Everything is below one temporary directory
//! and goes away with the process.
//!
//! `sample.sql` is the data, `page/` the page (plain JavaScript that speaks the sync protocol),
//! [`writer`] the traffic, [`page_server`] a few files over HTTP.

pub mod page_server;
pub mod writer;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use zeroring_net::pg::local_server::{LocalServer, LocalServerError};
use zeroring_net::pg::{Client, PgConfig, PgError};

/// The sample data.
const SAMPLE: &str = include_str!("sample.sql");

/// Why the demo could not start.
#[derive(Debug, thiserror::Error)]
pub enum DemoError {
    /// No PostgreSQL.
    #[error(transparent)]
    Server(#[from] LocalServerError),
    /// Loading the sample failed.
    #[error("loading the sample data failed: {0}")]
    Load(#[from] PgError),
    /// A file or socket.
    #[error("the demo could not {action}: {cause}")]
    Io {
        /// What was being done.
        action: &'static str,
        /// The OS error.
        cause: std::io::Error,
    },
}

/// A prepared demo: the database is loaded and written to. Dropping it stops the writes and the
/// database and removes every file.
pub struct Demo {
    postgres: LocalServer,
    directory: PathBuf,
    stop: Arc<AtomicBool>,
    writer: Option<std::thread::JoinHandle<()>>,
}

impl Demo {
    /// Starts PostgreSQL and loads the sample (a few seconds).
    ///
    /// # Errors
    /// [`DemoError`] naming what is missing or failed.
    pub fn prepare() -> Result<Demo, DemoError> {
        let postgres = LocalServer::start(&["fsync=off"])?;
        let config = PgConfig::parse(&postgres.url("postgres"))?;
        let mut client = Client::connect(&config)?;
        client.batch_execute(SAMPLE)?;
        let directory =
            std::env::temp_dir().join(format!("zeroring-demo-{:016x}", rand::random::<u64>()));
        std::fs::create_dir(&directory)
            .map_err(|cause| DemoError::Io { action: "create its directory", cause })?;
        Ok(Demo { postgres, directory, stop: Arc::default(), writer: None })
    }

    /// The database to replicate.
    pub fn database_url(&self) -> String {
        self.postgres.url("postgres")
    }

    /// Where the replica and the CVR store go.
    pub fn file(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// Starts the writes.
    ///
    /// # Errors
    /// [`DemoError`] if the database does not answer.
    pub fn start_writing(&mut self) -> Result<(), DemoError> {
        let client = Client::connect(&PgConfig::parse(&self.database_url())?)?;
        let stop = Arc::clone(&self.stop);
        self.writer = Some(std::thread::spawn(move || writer::run(client, &stop)));
        Ok(())
    }
}

impl Drop for Demo {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(writer) = self.writer.take() {
            let _ = writer.join();
        }
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}
