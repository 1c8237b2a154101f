//! A limit on the work of one statement: SQLite asks every so many instructions whether to go on.
//!
//! Without an index a statement may look at millions of rows before it returns one, and it cannot
//! be left and resumed: when it has used up what it was given it is interrupted, and whoever ran
//! it asks for less of the table at a time ([`super::parts`], `Source::reach`).

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};

use super::ReplicaError;
use super::reader::ReplicaReader;

/// Instructions of SQLite's machine per unit of an engine's budget (about a microsecond).
const INSTRUCTIONS_PER_UNIT: u64 = 50;

/// Instructions between two questions.
const ASK_EVERY: i32 = 1_000;

/// What the statements of a connection may still do.
#[derive(Debug)]
pub(super) struct Patience {
    /// Instructions that are left; [`Patience::ENDLESS`] without a limit.
    left: Arc<AtomicI64>,
    /// Instructions so far, as far as they were counted.
    spent: Arc<AtomicU64>,
}

impl Patience {
    const ENDLESS: i64 = i64::MAX;

    /// Watches over the statements of a reader; no limit yet.
    pub(super) fn over(reader: &mut ReplicaReader) -> Result<Patience, ReplicaError> {
        let left = Arc::new(AtomicI64::new(Self::ENDLESS));
        let patience = Patience { left, spent: Arc::default() };
        patience.ask_every(reader, ASK_EVERY)?;
        Ok(patience)
    }

    /// Asks every so many instructions.
    pub(super) fn ask_every(
        &self,
        reader: &mut ReplicaReader,
        instructions: i32,
    ) -> Result<(), ReplicaError> {
        let (left, spent) = (Arc::clone(&self.left), Arc::clone(&self.spent));
        reader.interrupt_if(instructions, move || {
            spent.fetch_add(u64::try_from(instructions).unwrap_or(0), Ordering::Relaxed);
            let before = left.load(Ordering::Relaxed);
            if before == Patience::ENDLESS {
                return false;
            }
            left.store(before.saturating_sub(i64::from(instructions)), Ordering::Relaxed);
            before <= i64::from(instructions)
        })
    }

    /// Instructions so far: of statements that were asked, whole thousands.
    pub(super) fn spent(&self) -> u64 {
        self.spent.load(Ordering::Relaxed)
    }

    /// Limits what follows; [`u64::MAX`]: not at all.
    pub(super) fn limit(&self, units: u64) {
        let left = i64::try_from(units.saturating_mul(INSTRUCTIONS_PER_UNIT));
        self.left.store(left.unwrap_or(Self::ENDLESS), Ordering::Relaxed);
    }

    /// Ends the limit; the units that were left.
    pub(super) fn end(&self) -> u64 {
        let left = self.left.swap(Self::ENDLESS, Ordering::Relaxed);
        u64::try_from(left).unwrap_or(0) / INSTRUCTIONS_PER_UNIT
    }
}
