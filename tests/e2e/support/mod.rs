//! What the end-to-end tests stand on: database, server process, client process, oracle,
//! and a proxy for trouble on the way.

pub mod client;
pub mod database;
pub mod oracle;
// Each test binary uses a part of it.
#[allow(dead_code)]
pub mod proxy;
pub mod server;

use std::time::{Duration, Instant};

/// How long anything may take before a test fails: a machine that is ten times slower than most, and
/// shared, passes all the same.
pub const PATIENCE: Duration = Duration::from_secs(180);

/// Polls until `check` returns `Ok`, or panics with its last complaint.
pub fn eventually<T>(what: &str, mut check: impl FnMut() -> Result<T, String>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match check() {
            Ok(value) => return value,
            Err(why) if Instant::now() > deadline => panic!("{what}: {why}"),
            Err(_) => std::thread::sleep(Duration::from_millis(5)),
        }
    }
}
