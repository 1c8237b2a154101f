//! The oracle is only worth something if it notices wrong engines: each variant of
//! [`Mutant`] must be caught.

use super::history;
use crate::ivm::mutant::{self, Mutant};

/// Histories tried when the remembered seed does not catch a variant any more.
const MOST: u64 = 100_000;

/// Each variant with a seed that catches it. A change of the generator makes the seeds stale:
/// the tests then search (and say what they found).
const CAUGHT_BY: [(Mutant, u64); 12] = [
    (Mutant::WholeEverywhere, 25),
    (Mutant::WeakForOneLeaf, 38459),
    (Mutant::WeakByParity, 842),
    (Mutant::EvidenceForVisible, 842),
    (Mutant::RefillEarly, 12),
    (Mutant::CountOvershoot, 17),
    (Mutant::CutKeepsBound, 12),
    (Mutant::ResidentForgotten, 1),
    (Mutant::OldNotRouted, 3),
    (Mutant::LastOldRow, 1),
    (Mutant::SlideForgotten, 10),
    (Mutant::IncompleteIsEmpty, 371),
];

#[test]
fn every_wrong_variant_is_caught() {
    let wrong = |mutant, seed| mutant::with(mutant, || history::run(seed)).is_err();
    for (mutant, seed) in CAUGHT_BY {
        if wrong(mutant, seed) {
            assert!(history::run(seed).is_ok(), "seed {seed} is wrong without {mutant:?} too");
            continue;
        }
        let found = (0..MOST).find(|&seed| wrong(mutant, seed));
        println!("(Mutant::{mutant:?}, {}),", found.map_or("none".into(), |s| s.to_string()));
        assert!(found.is_some(), "{mutant:?} survives {MOST} histories");
    }
}
