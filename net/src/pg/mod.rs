//! Postgres: the wire client, COPY, the replication stream, and private servers for demo and tests.

pub mod local_server;
