//! Wrong variants of the engine that look right. Tests switch one on and must notice; outside of
//! tests none exists.

/// A variant that the oracle must catch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mutant {
    /// Parents of a dirty leaf row are searched with the whole `where` everywhere.
    WholeEverywhere,
    /// Only the leaf that the dirty row belongs to is taken as true.
    WeakForOneLeaf,
    /// The weak predicate is used below an odd number of NOT EXISTS only.
    WeakByParity,
    /// EXISTS partitions for visible parents only, and the whole `where` outside NOT EXISTS.
    EvidenceForVisible,
    /// A window is refilled before all dirty rows are in.
    RefillEarly,
    /// Overshoot rows give multiplicity.
    CountOvershoot,
    /// A cut leaves the bound where it was.
    CutKeepsBound,
    /// Resident parents of a dirty leaf row are not judged anew.
    ResidentForgotten,
    /// A changed row is routed by its new version only.
    OldNotRouted,
    /// Merging commits keeps the last old row instead of the first.
    LastOldRow,
    /// Rows that slide over the limit without being dirty are not noticed.
    SlideForgotten,
    /// A leaf's truth is taken from an incomplete partition.
    IncompleteIsEmpty,
    /// A partition that filling passed over, because nobody wanted it then, stays unread.
    WantedAnewForgotten,
    /// Hydrating instances rely on what is found for a whole group.
    HydratingLed,
    /// A row that enters one partition before it leaves another falls out of the index of parents.
    MovedParentForgotten,
    /// The index of parents is used while it is behind the partitions.
    StaleParents,
    /// Of an OR of equalities, only the first branch is routed.
    OneBranchRouted,
    /// A row at the bound of a range is not routed.
    RangeWithoutBounds,
    /// A commit does not concern a query whose rows are not in memory.
    ParkedForgotten,
    /// Rows enter a large partition while what entered before is being worked off.
    FilledWhileSettling,
    /// The rows of a large partition do not learn that it counts otherwise now.
    CountedAnewForgotten,
    /// Merging commits keeps a new row that a later commit takes away.
    NewRowKept,
    /// Who reads an instance is not told of a row that moved from one node to another.
    MovedRowNotRead,
    /// A parked instance is read anew while the routes of its old state are being removed.
    ReadBeforeTakenApart,
    /// An instance goes on being parked although it starts over meanwhile.
    ParkedWhileStartingOver,
    /// A statement that was interrupted is taken for one that found all there is.
    InterruptedIsWhole,
    /// A search that goes part by part ends after the first one.
    OnePartSearched,
}

/// Whether a wrong variant is switched on: never.
#[cfg(not(test))]
pub(super) const fn is(_: Mutant) -> bool {
    false
}

#[cfg(test)]
pub(super) use active::{is, with};

#[cfg(test)]
mod active {
    use std::cell::Cell;

    use super::Mutant;

    thread_local! {
        static ACTIVE: Cell<Option<Mutant>> = const { Cell::new(None) };
    }

    /// Whether a wrong variant is switched on.
    pub(in crate::ivm) fn is(mutant: Mutant) -> bool {
        ACTIVE.get() == Some(mutant)
    }

    /// Runs with a wrong variant.
    pub(in crate::ivm) fn with<T>(mutant: Mutant, run: impl FnOnce() -> T) -> T {
        ACTIVE.set(Some(mutant));
        let result = run();
        ACTIVE.set(None);
        result
    }
}
