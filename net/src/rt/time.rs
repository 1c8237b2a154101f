//! Monotonic time and timers of an executor (1 ms resolution, rounded up).

use std::future::Future;
use std::time::Duration;

/// A point of the monotonic clock.
pub type Instant = std::time::Instant;

/// The deadline of [`timeout`] passed first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("deadline elapsed")]
pub struct Elapsed;

/// The monotonic clock's reading.
pub fn now() -> Instant {
    Instant::now()
}

/// Completes when `duration` has passed.
pub async fn sleep(duration: Duration) {
    monoio::time::sleep(duration).await;
}

/// Completes when `deadline` has passed.
pub async fn sleep_until(deadline: Instant) {
    monoio::time::sleep(deadline.saturating_duration_since(now())).await;
}

/// `future`'s output, or [`Elapsed`] when `duration` passes first; the future is dropped then.
///
/// # Errors
/// The deadline passed.
pub async fn timeout<F: Future>(duration: Duration, future: F) -> Result<F::Output, Elapsed> {
    monoio::time::timeout(duration, future).await.map_err(|_| Elapsed)
}
