//! Wrong variants of statements that look right. Tests switch one on and must notice; outside of
//! tests none exists.

/// A variant that the oracle must catch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mutant {
    /// Child-first: the children's own conditions are forgotten.
    ChildrenUnfiltered,
    /// Child-first: a NOT EXISTS begins with the child like any other.
    NotExistsByChild,
    /// Child-first: the start of the children is forgotten.
    ChildrenWithoutStart,
    /// Descending, null is before everything.
    NullIsHighest,
    /// A position itself is left out where it was asked for.
    PositionExcluded,
    /// A row between two parts of a table is in neither.
    RowBetweenParts,
    /// The whole table is said to be read when the first part of it was.
    OnePartRead,
}

/// Whether a wrong variant is switched on: never.
#[cfg(not(test))]
pub(super) const fn is(_: Mutant) -> bool {
    false
}

#[cfg(test)]
pub(super) use active::is;

#[cfg(test)]
#[path = "../../tests/sqlite_world/mod.rs"]
mod sqlite_world;

#[cfg(test)]
mod active {
    use std::cell::Cell;

    use zeroring_core::ivm::proof::history;

    use super::Mutant;
    use super::sqlite_world::child_first;

    /// Histories tried when the remembered seed does not catch a variant any more.
    const MOST: u64 = 20_000;

    /// Each variant with a seed that catches it. A change of the generator makes the seeds stale:
    /// the test then searches (and says what it found).
    const CAUGHT_BY: [(Mutant, u64); 7] = [
        (Mutant::ChildrenUnfiltered, 1),
        (Mutant::NotExistsByChild, 0),
        (Mutant::ChildrenWithoutStart, 116),
        (Mutant::NullIsHighest, 15),
        (Mutant::PositionExcluded, 0),
        (Mutant::RowBetweenParts, 275),
        (Mutant::OnePartRead, 114),
    ];

    thread_local! {
        static ACTIVE: Cell<Option<Mutant>> = const { Cell::new(None) };
    }

    /// Whether a wrong variant is switched on.
    pub(in crate::replica) fn is(mutant: Mutant) -> bool {
        ACTIVE.get() == Some(mutant)
    }

    #[test]
    fn every_wrong_statement_is_caught() {
        let wrong = |mutant, seed| {
            ACTIVE.set(mutant);
            let result = history::is_wrong(seed, &child_first);
            ACTIVE.set(None);
            result
        };
        for (mutant, seed) in CAUGHT_BY {
            let found = match wrong(Some(mutant), seed) {
                true => Some(seed),
                false => (0..MOST).find(|&seed| wrong(Some(mutant), seed)),
            };
            if found != Some(seed) {
                println!("(Mutant::{mutant:?}, {found:?}),");
            }
            let Some(found) = found else { panic!("{mutant:?} survives {MOST} histories") };
            assert!(!wrong(None, found), "seed {found} is wrong without {mutant:?} too");
        }
    }
}
