//! Why a run could not be made.

use zeroring_net::pg::local_server::LocalServerError;
use zeroring_net::rt::RtError;

/// A run that could not be made, or not to its end. (A run that was made and whose clients
/// diverged is a result: a void one.)
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// Wrong arguments.
    #[error("{0}\nSee `zeroring-loadtest help`.")]
    Usage(String),
    /// A scenario that cannot be read.
    #[error("scenario {file}: {cause}")]
    Scenario {
        /// Which file.
        file: String,
        /// What is wrong with it.
        cause: String,
    },
    /// The private Postgres could not be started.
    #[error(transparent)]
    LocalServer(#[from] LocalServerError),
    /// Postgres refused a statement.
    #[error("Postgres, while {doing}: {cause}")]
    Postgres {
        /// What was being done.
        doing: &'static str,
        /// Its answer.
        cause: String,
    },
    /// The server under test did not start, or ended.
    #[error("{server}: {cause}")]
    Server {
        /// Its name.
        server: String,
        /// What happened, and the end of its log.
        cause: String,
    },
    /// The workers could not be started.
    #[error(transparent)]
    Runtime(#[from] RtError),
    /// Files, processes, sockets.
    #[error("{doing}: {cause}")]
    Io {
        /// What was being done.
        doing: String,
        /// The system's answer.
        cause: std::io::Error,
    },
}

impl LoadError {
    pub(crate) fn io(doing: impl Into<String>) -> impl FnOnce(std::io::Error) -> LoadError {
        let doing = doing.into();
        move |cause| LoadError::Io { doing, cause }
    }

    pub(crate) fn sql(doing: &'static str) -> impl FnOnce(postgres::Error) -> LoadError {
        move |e| {
            let cause = e.as_db_error().map_or_else(|| format!("{e:?}"), ToString::to_string);
            LoadError::Postgres { doing, cause }
        }
    }
}
