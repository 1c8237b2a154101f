//! Load generator for sync servers: ours or the original, on the same terms.
//!
//! ```text
//!  scenario (TOML) ─▶ run ─┬─ data_set ─▶ private Postgres ◀─ writer (open loop)
//!                          ├─ server   ─▶ process under test
//!                          ├─ client   ─▶ thousands of protocol-level clients
//!                          └─ check    ─▶ clients' rows = Postgres' rows, or the run is void
//!  result (JSON) ─▶ report (HTML)
//! ```
//!
//! Invariants: a write carries its *intended* time, so a late write is a slow one (no coordinated
//! omission); clients check every rule of the poke protocol that they can see; a run whose clients
//! diverge or whose server breaks the protocol does not count; both servers get the same Postgres
//! with the same settings.

mod api;
mod budget;
mod check;
pub mod cli;
mod client;
mod data_set;
mod error;
mod limits;
mod models;
mod null;
mod pin;
mod process;
mod progress;
mod report;
mod result;
mod run;
mod scenario;
mod search;
mod server;
mod steps;
mod svg;
mod table;
mod upstream;
mod writer;

pub use error::LoadError;
