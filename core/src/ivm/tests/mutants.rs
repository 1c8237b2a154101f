//! The oracle is only worth something if it notices wrong engines: each variant of
//! [`Mutant`] must be caught.

use crate::ivm::mutant::{self, Mutant};
use crate::ivm::proof::history::{self, is_wrong};
use crate::ivm::proof::runner::memory;

/// Histories tried when the remembered seed does not catch a variant any more.
const MOST: u64 = 100_000;

/// Each variant with a seed that catches it. A change of the generator makes the seeds stale:
/// the tests then search (and say what they found).
const CAUGHT_BY: [(Mutant, u64); 26] = [
    (Mutant::WholeEverywhere, 6),
    (Mutant::WeakForOneLeaf, 8538),
    (Mutant::WeakByParity, 251),
    (Mutant::EvidenceForVisible, 251),
    (Mutant::RefillEarly, 43),
    (Mutant::CountOvershoot, 17),
    (Mutant::CutKeepsBound, 33),
    (Mutant::ResidentForgotten, 5),
    (Mutant::OldNotRouted, 1),
    (Mutant::LastOldRow, 20),
    (Mutant::SlideForgotten, 15),
    (Mutant::IncompleteIsEmpty, 3),
    (Mutant::HydratingLed, 1089),
    (Mutant::MovedParentForgotten, 28_695),
    (Mutant::StaleParents, 74_237),
    (Mutant::OneBranchRouted, 51),
    (Mutant::RangeWithoutBounds, 7),
    (Mutant::ParkedForgotten, 7),
    (Mutant::FilledWhileSettling, 96),
    (Mutant::CountedAnewForgotten, 1),
    (Mutant::NewRowKept, 20),
    (Mutant::MovedRowNotRead, 1161),
    (Mutant::ReadBeforeTakenApart, 1757),
    (Mutant::ParkedWhileStartingOver, 910_001_853),
    (Mutant::InterruptedIsWhole, 3),
    (Mutant::OnePartSearched, 42),
];

#[test]
fn every_wrong_variant_is_caught() {
    let wrong = |mutant, seed| mutant::with(mutant, || is_wrong(seed, &memory));
    for (mutant, seed) in CAUGHT_BY {
        if wrong(mutant, seed) {
            assert!(!is_wrong(seed, &memory), "seed {seed} is wrong without {mutant:?} too");
            continue;
        }
        let found = (0..MOST).find(|&seed| wrong(mutant, seed));
        println!("(Mutant::{mutant:?}, {}),", found.map_or("none".into(), |s| s.to_string()));
        assert!(found.is_some(), "{mutant:?} survives {MOST} histories");
    }
}

#[test]
fn a_failing_history_is_reported_small() {
    let run = || history::run(1, &memory);
    let error = mutant::with(Mutant::OldNotRouted, run).unwrap_err();
    let small = error.split("reduced to:").nth(1).unwrap();
    let commits = small.lines().filter(|l| l.starts_with("Commit(")).count();
    let rows = small.lines().filter(|l| l.starts_with("  TableId")).count();
    assert!(commits == 1 && rows <= 3, "{error}");
    assert!(small.contains("Wrong("), "the reduced history fails too: {error}");
}
