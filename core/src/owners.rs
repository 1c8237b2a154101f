//! Counting the owners of an allocation, as `Arc` does, in four bytes and without weak owners.

use std::sync::atomic::{AtomicU32, Ordering, fence};

/// Owners beyond this are a leak: the process ends, as it does for `Arc`, before the count could
/// wrap around and free what is in use.
const MOST: u32 = u32::MAX / 2;

/// How many owners an allocation has.
pub(crate) struct Owners(AtomicU32);

impl Owners {
    /// Of a new allocation.
    pub(crate) fn one() -> Owners {
        Owners(AtomicU32::new(1))
    }

    /// How many there are.
    pub(crate) fn count(&self) -> u32 {
        self.0.load(Ordering::Acquire)
    }

    /// One more.
    pub(crate) fn join(&self) {
        if self.0.fetch_add(1, Ordering::Relaxed) > MOST {
            std::process::abort();
        }
    }

    /// One less. True if it was the last one, who frees the allocation: what others did with it
    /// happens before.
    pub(crate) fn leave(&self) -> bool {
        let is_last = self.0.fetch_sub(1, Ordering::Release) == 1;
        if is_last {
            fence(Ordering::Acquire);
        }
        is_last
    }
}

/// What tests of bounded work count, per thread.
#[cfg(test)]
pub(crate) mod tally {
    use std::cell::Cell;

    thread_local! {
        /// How often a row was looked at, taken or given back.
        pub(crate) static ROWS_TOUCHED: Cell<u64> = const { Cell::new(0) };
        /// How often a text was given back: those of keys.
        pub(crate) static TEXTS_GIVEN_BACK: Cell<u64> = const { Cell::new(0) };
    }

    /// A row is touched.
    pub(crate) fn row() {
        ROWS_TOUCHED.set(ROWS_TOUCHED.get() + 1);
    }

    /// A text is given back.
    pub(crate) fn text() {
        TEXTS_GIVEN_BACK.set(TEXTS_GIVEN_BACK.get() + 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_of_many_owners_is_told_so() {
        let owners = Owners::one();
        (0..3).for_each(|_| owners.join());
        assert_eq!(owners.count(), 4);
        let last = std::thread::scope(|s| {
            let leaving = [(); 4].map(|()| s.spawn(|| owners.leave()));
            leaving.map(|thread| usize::from(thread.join().unwrap())).iter().sum::<usize>()
        });
        assert_eq!((last, owners.count()), (1, 0));
    }
}
