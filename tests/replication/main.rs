//! Replication from a real Postgres into a real replica file.

// A failed unwrap is a failed test.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod changes;
mod resets;
mod restarts;
mod support;
mod upstream;
mod values;
