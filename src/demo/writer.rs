//! The demo's traffic: what people do with an issue tracker, a few times a second.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rand::Rng;
use zeroring_net::pg::Client;

/// Pause between two writes: about eight a second.
const PAUSE: Duration = Duration::from_millis(120);
/// Issues of the sample.
const ISSUES: u32 = 20_000;

/// Writes until `stop`, or until the database is gone.
pub fn run(mut client: Client, stop: &AtomicBool) {
    let mut next = ISSUES;
    while !stop.load(Ordering::Relaxed) {
        if let Err(error) = client.batch_execute(&statement(&mut next)) {
            if !stop.load(Ordering::Relaxed) {
                tracing::warn!(%error, "the demo stopped writing");
            }
            return;
        }
        std::thread::sleep(PAUSE);
    }
}

/// One random action. New issues are numbered on from `next`.
fn statement(next: &mut u32) -> String {
    let mut rng = rand::rng();
    // Most activity is on recent issues.
    let recent = next.saturating_sub(rng.random_range(0..60));
    let user = rng.random_range(1..=100);
    match rng.random_range(0..10) {
        0..4 => {
            const BODIES: [&str; 6] = [
                "Looking into it.",
                "Can you try the nightly build?",
                "Confirmed on my machine.",
                "A fix is up for review.",
                "This also happens offline.",
                "Thanks, that helps.",
            ];
            let body = BODIES[rng.random_range(0..BODIES.len())];
            format!(
                "WITH c AS (INSERT INTO comment VALUES (gen_random_uuid()::text, 'i{recent}', 'u{user}', '{body}', clock_timestamp()))
                 UPDATE issue SET updated_at = clock_timestamp() WHERE id = 'i{recent}'"
            )
        }
        4..7 => {
            let status = ["open", "in progress", "review", "closed"][rng.random_range(0..4)];
            format!(
                "UPDATE issue SET status = '{status}', updated_at = clock_timestamp() WHERE id = 'i{recent}'"
            )
        }
        7 => {
            let priority = rng.random_range(1..=4);
            format!(
                "UPDATE issue SET priority = {priority}, owner_id = 'u{user}', updated_at = clock_timestamp() WHERE id = 'i{recent}'"
            )
        }
        8 => {
            let label = rng.random_range(1..=12);
            format!(
                "INSERT INTO issue_label VALUES ('i{recent}', 'l{label}') ON CONFLICT DO NOTHING"
            )
        }
        _ => {
            *next += 1;
            let label = rng.random_range(1..=12);
            format!(
                "INSERT INTO issue VALUES ('i{next}', 'New report #{next}', 'open', {}, 'u{user}', clock_timestamp(), clock_timestamp());
                 INSERT INTO issue_label VALUES ('i{next}', 'l{label}')",
                rng.random_range(1..=4)
            )
        }
    }
}
