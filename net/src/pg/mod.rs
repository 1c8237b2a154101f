//! Postgres: the wire client, COPY, the replication stream, and private servers for demo and tests.
//!
//! [`config`] says where to connect; [`error`] is what may go wrong.

pub mod config;
pub mod error;
pub mod local_server;

pub use config::{PgConfig, SslMode};
pub use error::{PgError, ServerError, SqlState};
