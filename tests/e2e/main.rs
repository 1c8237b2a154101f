//! End to end: a private PostgreSQL, the real server binary, and the real Zero client from npm.
//!
//! `make test` installs the client (`tests/client`). With `ZERORING_E2E_SERVER=original` the same
//! tests run against the original `zero-cache` of that package: that is how the harness itself
//! is checked, and how a doubt about behaviour is settled.

// A failed unwrap is a failed test.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod support;

mod crash;
mod demo;
mod early;
mod fleet;
mod fuzz;
mod generate;
mod groups;
mod hydrate;
mod interop;
mod mutators;
mod owed;
mod soak;
