//! Endpoints for operators: `/`, `/keepalive`, `/statz` (spec: operations §3).
//!
//! - [`endpoints`]: request in, response out; no I/O but what `/statz` reads.
//! - [`statz`]: the statistics, by group.
//! - [`registry`]: numbers that executors publish, merged when somebody asks.
//! - [`server`]: the accept loop of an executor; upgrades are passed on.
//! - [`admin`]: the rules of the admin password.
//! - [`heartbeat`]: when `/keepalive` was last called.
//!
//! Invariants: health is answered while the process is up, whatever Postgres does; statistics
//! need the admin password; nothing here takes a lock that the data path takes.

pub mod admin;
pub mod endpoints;
pub mod heartbeat;
pub mod registry;
pub mod server;
pub mod statz;

pub use endpoints::{OpsRequest, OpsResponse, OpsState};
pub use heartbeat::Heartbeat;
pub use registry::{ExecutorStats, Registry};
