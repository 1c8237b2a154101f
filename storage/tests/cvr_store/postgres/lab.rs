//! A private Postgres, and stores on it.

use zeroring_net::pg::local_server::LocalServer;
use zeroring_net::pg::{Client, PgConfig};
use zeroring_storage::cvr_store::postgres::{PostgresCvrConfig, PostgresCvrStore};

use zeroring_storage::cvr_store::RowOptions;

use crate::lab::{Lab, Server};

/// Commits need not reach the disk: only [`LocalServer::kill`] happens, not a power cut.
pub fn server() -> LocalServer {
    LocalServer::start(&["fsync=off"]).unwrap()
}

/// One that is not killed: commits need not even reach the system.
pub fn fast_server() -> LocalServer {
    let settings = [
        "fsync=off",
        "synchronous_commit=off",
        "full_page_writes=off",
        "shared_buffers=256MB",
        "max_wal_size=4GB",
    ];
    LocalServer::start(&settings).unwrap()
}

/// Servers of one app: its name makes the schema.
pub struct PostgresLab {
    pub config: PostgresCvrConfig,
}

impl PostgresLab {
    pub fn new(server: &LocalServer, app: &str) -> PostgresLab {
        let connection = PgConfig::parse(&server.url("postgres")).unwrap();
        let mut config = PostgresCvrConfig::new(connection);
        config.app = app.to_owned();
        config.max_connections = 3;
        PostgresLab { config }
    }

    pub fn connect(&self, task_id: &str) -> PostgresCvrStore {
        PostgresCvrStore::connect(&self.config, task_id).unwrap()
    }

    /// A session of the test's own.
    pub fn client(&self) -> Client {
        Client::connect(&self.config.connection).unwrap()
    }

    /// A statement in which `@.` stands for the schema.
    pub fn sql(&self, text: &str) -> String {
        text.replace("@.", &format!("\"{}_{}/cvr\".", self.config.app, self.config.shard))
    }

    /// All values of a query as text, NULL as `-`.
    pub fn values(&self, text: &str) -> Vec<Vec<String>> {
        self.values_by(&mut self.client(), text)
    }

    /// Asks until the answer is as wanted.
    pub fn until(&self, text: &str, wanted: impl Fn(&[Vec<String>]) -> bool) {
        let mut client = self.client();
        while !wanted(&self.values_by(&mut client, text)) {
            client.batch_execute("SELECT pg_sleep(0.005)").unwrap();
        }
    }

    fn values_by(&self, client: &mut Client, text: &str) -> Vec<Vec<String>> {
        let results = client.simple_query(&self.sql(text)).unwrap();
        let rows = results.into_iter().flat_map(|r| r.rows);
        rows.map(|row| {
            (0..row.columns().len())
                .map(|c| row.get::<Option<String>>(c).unwrap().unwrap_or_else(|| "-".to_owned()))
                .collect()
        })
        .collect()
    }
}

impl Lab for PostgresLab {
    fn open(&self, task_id: &str) -> Server {
        self.open_with(task_id, self.config.rows)
    }

    fn open_with(&self, task_id: &str, rows: RowOptions) -> Server {
        let config = PostgresCvrConfig { rows, ..self.config.clone() };
        Server(Box::new(PostgresCvrStore::connect(&config, task_id).unwrap()))
    }

    fn steps(&self) -> u64 {
        800
    }
}
