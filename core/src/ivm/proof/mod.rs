//! The machinery that proves the engine, for tests of this crate and of the sources in other
//! crates: random worlds, scripts of operations, and a runner that compares the engine with the
//! brute-force oracle at each stop.
//!
//! [`history`] invents a random script while a [`runner::Runner`] executes it; [`skeleton`]
//! enumerates query shapes and pushes every change of one row through each; [`shrink`] reduces a
//! script that fails to a small one. All of it is generic over the source of rows
//! ([`runner::Replayed`]), so that the same histories run over vectors and over SQLite.
#![allow(clippy::panic)] // A generator that contradicts itself has found a bug.

pub mod datasets;
pub mod history;
pub mod runner;
pub mod script;
pub mod shrink;
pub mod skeleton;
pub mod worlds;
