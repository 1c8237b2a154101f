//! Numbers of the executors, for `/statz`.
//!
//! Each executor counts in plain integers of its own, and publishes copies about once a second;
//! nothing is shared on the data path. Readers get the sum, and each executor's own.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use crate::stages::StageClocks;

/// Numbers by name, e.g. `connections`, `instances`, `hydrations`.
pub type Numbers = BTreeMap<&'static str, u64>;

/// Where one executor publishes.
#[derive(Debug, Default)]
pub struct ExecutorStats {
    /// `io_uring` or `epoll`; empty before the start.
    backend: Mutex<&'static str>,
    numbers: Mutex<Numbers>,
    /// Where its time goes.
    pub stages: StageClocks,
    plans: Mutex<BTreeMap<String, Numbers>>,
}

impl ExecutorStats {
    /// Says how this executor serves its sockets.
    pub fn set_backend(&self, name: &'static str) {
        *lock(&self.backend) = name;
    }

    /// Replaces the published numbers.
    pub fn publish(&self, numbers: impl IntoIterator<Item = (&'static str, u64)>) {
        *lock(&self.numbers) = numbers.into_iter().collect();
    }

    /// Replaces the published plans: numbers by description.
    pub fn publish_plans(&self, plans: BTreeMap<String, Numbers>) {
        *lock(&self.plans) = plans;
    }

    /// The published plans.
    pub fn plans(&self) -> BTreeMap<String, Numbers> {
        lock(&self.plans).clone()
    }

    /// The backend's name.
    pub fn backend(&self) -> &'static str {
        *lock(&self.backend)
    }

    /// The published numbers.
    pub fn numbers(&self) -> Numbers {
        lock(&self.numbers).clone()
    }
}

/// Plain values: a panic elsewhere cannot leave them harmful.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// All executors.
#[derive(Debug, Clone, Default)]
pub struct Registry {
    executors: Vec<Arc<ExecutorStats>>,
}

impl Registry {
    /// A registry for this many executors.
    pub fn new(executors: usize) -> Registry {
        Registry { executors: (0..executors).map(|_| Arc::default()).collect() }
    }

    /// Where executor `index` publishes.
    pub fn executor(&self, index: usize) -> Option<&Arc<ExecutorStats>> {
        self.executors.get(index)
    }

    /// All executors, in order.
    pub fn executors(&self) -> &[Arc<ExecutorStats>] {
        &self.executors
    }

    /// Plans of all executors by description, with the sums of their numbers.
    pub fn plans(&self) -> BTreeMap<String, Numbers> {
        let mut total: BTreeMap<String, Numbers> = BTreeMap::new();
        for (plan, numbers) in self.executors.iter().flat_map(|e| e.plans()) {
            let sums = total.entry(plan).or_default();
            for (name, n) in numbers {
                let sum = sums.entry(name).or_default();
                *sum = sum.saturating_add(n);
            }
        }
        total
    }

    /// Sums over all executors; of a number whose name begins with `longest` or `most`, the largest.
    pub fn total(&self) -> Numbers {
        let mut total = Numbers::new();
        for (name, n) in self.executors.iter().flat_map(|e| e.numbers()) {
            let all = total.entry(name).or_default();
            let is_maximum = name.starts_with("longest") || name.starts_with("most");
            *all = if is_maximum { n.max(*all) } else { all.saturating_add(n) };
        }
        total
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn totals_are_sums_and_a_publication_replaces_the_former() {
        let registry = Registry::new(2);
        registry.executor(0).unwrap().publish([("a", 9), ("gone", 1)]);
        registry.executor(0).unwrap().publish([("a", 1), ("longestB", 7), ("mostC", 4)]);
        registry.executor(1).unwrap().publish([
            ("a", 2),
            ("b", u64::MAX),
            ("longestB", 5),
            ("mostC", 3),
        ]);
        let total = Numbers::from([("a", 3), ("b", u64::MAX), ("longestB", 7), ("mostC", 4)]);
        assert_eq!(registry.total(), total);
        assert!(registry.executor(2).is_none());
        let plans = |n| [("p".to_owned(), Numbers::from([("fills", n)]))].into_iter().collect();
        registry.executor(0).unwrap().publish_plans(plans(2));
        registry.executor(1).unwrap().publish_plans(plans(3));
        assert_eq!(registry.plans(), plans(5));
    }
}
