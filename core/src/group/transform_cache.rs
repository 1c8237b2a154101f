//! Results of the query endpoint, kept for five seconds (spec: sync-protocol §8.3).
//!
//! The key holds everything that the endpoint could have looked at, so that a change of
//! credentials always asks again: re-authorisation on every connect is a security property.

use std::collections::HashMap;
use std::sync::Arc;

use super::context::Credentials;

/// How long a result may be used again, milliseconds.
pub(super) const TTL_MS: f64 = 5_000.0;
/// Results kept at most; emptied when it is full. A group has few queries, and few
/// credentials within five seconds.
const MAX_ENTRIES: usize = 4_096;

/// Successful transforms by query and credentials.
#[derive(Debug)]
pub(super) struct TransformCache<T> {
    entries: HashMap<(Arc<str>, Arc<Credentials>), (f64, T)>,
}

impl<T> Default for TransformCache<T> {
    fn default() -> Self {
        TransformCache { entries: HashMap::new() }
    }
}

impl<T: Clone> TransformCache<T> {
    pub(super) fn get(&self, query: &Arc<str>, with: &Arc<Credentials>, now_ms: f64) -> Option<T> {
        let (at, value) = self.entries.get(&(query.clone(), with.clone()))?;
        // A clock that stepped back must not keep a result alive.
        (*at <= now_ms && now_ms < at + TTL_MS).then(|| value.clone())
    }

    pub(super) fn put(&mut self, query: Arc<str>, with: Arc<Credentials>, now_ms: f64, value: T) {
        if self.entries.len() >= MAX_ENTRIES {
            self.entries.retain(|_, (at, _)| *at <= now_ms && now_ms < *at + TTL_MS);
            if self.entries.len() >= MAX_ENTRIES {
                self.entries.clear();
            }
        }
        self.entries.insert((query, with), (now_ms, value));
    }

    /// Drops what has expired.
    pub(super) fn sweep(&mut self, now_ms: f64) {
        self.entries.retain(|_, (at, _)| *at <= now_ms && now_ms < *at + TTL_MS);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_result_is_reused_for_the_same_credentials_only_and_not_for_long() {
        let mut cache = TransformCache::default();
        let one = Arc::new(Credentials { token: Some("t1".into()), ..Credentials::default() });
        let two = Arc::new(Credentials { token: Some("t2".into()), ..Credentials::default() });
        cache.put("q".into(), one.clone(), 10.0, 7);
        assert_eq!(cache.get(&"q".into(), &one, 5_009.0), Some(7));
        assert_eq!(cache.get(&"q".into(), &two, 11.0), None);
        assert_eq!(cache.get(&"p".into(), &one, 11.0), None);
        assert_eq!(cache.get(&"q".into(), &one, 5_010.0), None);
        assert_eq!(cache.get(&"q".into(), &one, 9.0), None, "clock stepped back");
    }
}
