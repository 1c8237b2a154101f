//! Postgres: the wire client, COPY, the replication stream, and private servers for demo and tests.
//!
//! The protocol is handled without I/O in [`frame`] (framing, errors), [`login`] (authentication),
//! [`row`] (values), [`copy`] (COPY formats) and [`pgoutput`] (the output plugin); [`wire`] is the
//! one place that reads and writes a socket. [`Client`] is what others use: connect with a
//! [`PgConfig`], query, pipeline, copy, or turn the session into a [`ReplicationStream`].
//!
//! Invariants: every wait has a deadline (if the caller sets one); a session whose answers are
//! out of step says [`PgError::Broken`] and is never reused; no message is trusted about its
//! length; errors never show a password.

pub mod backoff;
pub mod client;
pub mod config;
pub mod copy;
pub mod error;
pub mod frame;
pub mod local_server;
pub mod login;
pub mod pgoutput;
pub mod replication;
pub mod row;
pub mod wire;

pub use crate::tls::TlsMode;
pub use backoff::Backoff;
pub use client::{Client, MAX_CACHED, Pipeline, QueryResult, Statement, TransactionStatus};
pub use config::PgConfig;
pub use error::{PgError, ServerError, SqlState};
pub use replication::{ReplicationStream, StreamEvent};
pub use row::{Format, Param, Row, quote_ident, quote_literal};
