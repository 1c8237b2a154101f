//! Conformance on the wire: a client that speaks the sync protocol by hand, against the real
//! server on a real PostgreSQL. What is checked are frames, byte for byte where clients can tell.
//!
//! `ZERORING_E2E_SERVER=original` runs the same tests against the original `zero-cache`: the
//! expectations are facts about it. Where we differ on purpose, a test states both.

// A failed unwrap is a failed test.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

// Shared with the end-to-end tests; not everything of it is needed here.
#[allow(dead_code)]
#[path = "../e2e/support/mod.rs"]
mod support;

mod api;
mod socket;
mod world;

mod client_schema;
mod cookies;
mod early;
mod fuzz;
mod groups;
mod handshake;
mod lifecycle;
mod messages;
mod mutation_ids;
mod named_queries;
mod order;
mod other_servers;
mod pokes;
mod push;
mod records;
mod schema_changes;
mod slow_queries;
mod ttl;
mod values;
mod view_records;
