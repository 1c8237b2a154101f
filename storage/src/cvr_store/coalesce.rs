//! Two changes of a row record as one: what rows that follow their metadata become when a later
//! change overtakes an earlier one that is not yet written.

use zeroring_core::cvr::RefCounts;
use zeroring_core::cvr::store::RowChange;

/// Puts `newer` on top of `older`, if one change can say what both do one after the other; gives it
/// back otherwise. Holds for records that are as the changes expect them: those that are adjusted
/// or buried are live.
pub(super) fn coalesce(older: &mut RowChange, newer: RowChange) -> Result<(), RowChange> {
    use RowChange::{Adjust, Delete, Put, Tombstone};
    let merged = match (&mut *older, newer) {
        (_, newer @ (Put { .. } | Delete)) => newer,
        // Nothing is live that could be buried.
        (Delete | Tombstone { .. }, Tombstone { .. }) => return Ok(()),
        (Put { ref_counts, .. }, Tombstone { .. }) if ref_counts.is_empty() => return Ok(()),
        (Put { row_version: known, .. }, Tombstone { row_version, patch_version }) => Put {
            row_version: row_version.unwrap_or_else(|| known.clone()),
            patch_version,
            ref_counts: RefCounts::new(),
        },
        (Adjust { row_version: known, .. }, Tombstone { row_version, patch_version }) => {
            Tombstone { row_version: row_version.or(known.take()), patch_version }
        }
        // Nothing is live that could be adjusted: a record is made of what is known, if it is
        // enough for one.
        (Delete | Tombstone { .. }, newer @ Adjust { .. }) => return put_anew(older, newer),
        (Put { ref_counts, .. }, newer @ Adjust { .. }) if ref_counts.is_empty() => {
            return put_anew(older, newer);
        }
        (
            Put { row_version: known, patch_version: since, ref_counts },
            Adjust { counts, row_version, patch_version, keep_patch_version },
        ) => {
            let mut ref_counts = std::mem::take(ref_counts);
            counts.iter().for_each(|(query, n)| ref_counts.set(query, n));
            let keep = keep_patch_version && row_version.as_ref() == Some(known);
            Put {
                row_version: row_version.unwrap_or_else(|| known.clone()),
                patch_version: if keep { since.clone() } else { patch_version },
                ref_counts,
            }
        }
        (
            Adjust { row_version: None, .. },
            // Whether the patch version stays depends on a row version that only the store knows.
            newer @ Adjust { row_version: Some(_), keep_patch_version: true, .. },
        ) => return Err(newer),
        (
            Adjust {
                counts: before,
                row_version: known,
                patch_version: since,
                keep_patch_version: kept,
            },
            Adjust { counts, row_version, patch_version, keep_patch_version },
        ) => {
            let rest = before.iter().filter(|(query, _)| !counts.mentions(query));
            let all = rest.chain(counts.iter()).map(|(query, n)| (query.clone(), n)).collect();
            let keep = keep_patch_version && row_version.is_some() && row_version == *known;
            let (patch_version, keep_patch_version) =
                if keep { (since.clone(), *kept) } else { (patch_version, false) };
            let row_version = row_version.or(known.take());
            Adjust { counts: all, row_version, patch_version, keep_patch_version }
        }
    };
    *older = merged;
    Ok(())
}

/// An adjustment where no record is live.
fn put_anew(older: &mut RowChange, newer: RowChange) -> Result<(), RowChange> {
    if let RowChange::Adjust { counts, row_version: Some(row_version), patch_version, .. } = newer {
        let live = counts.iter().filter(|(_, n)| *n != 0);
        let ref_counts = live.map(|(query, n)| (query.clone(), n)).collect();
        *older = RowChange::Put { row_version, patch_version, ref_counts };
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};
    use zeroring_core::version::{CvrVersion, StateVersion};

    use super::*;

    type Record = (StateVersion, CvrVersion, RefCounts);

    fn patch(n: u64) -> CvrVersion {
        CvrVersion { state: StateVersion::from_lsn(n), config: 0 }
    }

    /// What a store does; `None` if the record is not what the change expects.
    fn apply(record: &mut Option<Record>, change: &RowChange) -> Option<()> {
        let live = record.as_mut().filter(|r| !r.2.is_empty());
        match change.clone() {
            RowChange::Put { row_version, patch_version, ref_counts } => {
                *record = Some((row_version, patch_version, ref_counts));
            }
            RowChange::Delete => *record = None,
            RowChange::Tombstone { row_version, patch_version } => {
                let live = live?;
                live.0 = row_version.unwrap_or_else(|| live.0.clone());
                live.1 = patch_version;
                live.2 = RefCounts::new();
            }
            RowChange::Adjust { counts, row_version, patch_version, keep_patch_version } => {
                let live = live?;
                counts.iter().for_each(|(q, n)| live.2.set(q, n));
                if !(keep_patch_version && row_version.as_ref() == Some(&live.0)) {
                    live.1 = patch_version;
                }
                live.0 = row_version.unwrap_or_else(|| live.0.clone());
            }
        }
        Some(())
    }

    fn change(rng: &mut StdRng, at: u64) -> RowChange {
        let version = |rng: &mut StdRng| StateVersion::from_lsn(rng.random_range(1..4));
        let some = |rng: &mut StdRng| rng.random_bool(0.6).then(|| version(rng));
        let counts = |rng: &mut StdRng, least| {
            let mut counts = RefCounts::of("always".into(), 1);
            for query in ["p", "q", "r"] {
                if rng.random_bool(0.5) {
                    counts.add(&query.into(), rng.random_range(least..3));
                }
            }
            counts
        };
        match rng.random_range(0..10) {
            0..=1 => RowChange::Put {
                row_version: version(rng),
                patch_version: patch(at),
                ref_counts: counts(rng, 1),
            },
            2 => RowChange::Delete,
            3 => RowChange::Tombstone { row_version: some(rng), patch_version: patch(at) },
            _ => RowChange::Adjust {
                counts: counts(rng, 0),
                row_version: some(rng),
                patch_version: patch(at),
                keep_patch_version: rng.random_bool(0.5),
            },
        }
    }

    #[test]
    fn coalesced_changes_do_what_they_do_one_after_the_other() {
        let seed: u64 = rand::random();
        eprintln!("seed {seed}");
        let mut rng = StdRng::seed_from_u64(seed);
        let (mut compared, mut coalesced, mut not) = (0, 0, 0);
        for _ in 0..100_000 {
            let mut stored: Option<Record> = None;
            if rng.random_bool(0.8) {
                let _ = apply(&mut stored, &change(&mut rng, 1));
            }
            let mut one_by_one = stored.clone();
            let mut layers: Vec<RowChange> = Vec::new();
            let count = rng.random_range(2..6);
            let as_expected = (0..count).all(|n| {
                let newer = change(&mut rng, 10 + n);
                let fits = apply(&mut one_by_one, &newer).is_some();
                match layers.last_mut().map(|older| coalesce(older, newer.clone())) {
                    Some(Ok(())) => coalesced += 1,
                    Some(Err(newer)) => {
                        not += 1;
                        layers.push(newer);
                    }
                    None => layers.push(newer),
                }
                fits
            });
            if as_expected {
                compared += 1;
                for layer in &layers {
                    apply(&mut stored, layer);
                }
                assert_eq!(stored, one_by_one, "{layers:?}");
            }
        }
        assert!(
            compared > 10_000 && coalesced > 50 * not && not > 0,
            "{compared} {coalesced} {not}"
        );
    }

    #[test]
    fn a_record_that_is_not_live_is_made_of_what_is_known() {
        let adjust = |row_version| RowChange::Adjust {
            counts: [("p".into(), 0), ("q".into(), 2)].into_iter().collect(),
            row_version,
            patch_version: patch(7),
            keep_patch_version: true,
        };
        let two = StateVersion::from_lsn(2);
        let put = RowChange::Put {
            row_version: two.clone(),
            patch_version: patch(7),
            ref_counts: RefCounts::of("q".into(), 2),
        };
        let buried = RowChange::Tombstone { row_version: None, patch_version: patch(5) };
        for dead in [RowChange::Delete, buried] {
            let mut change = dead.clone();
            coalesce(&mut change, adjust(None)).unwrap();
            assert_eq!(change, dead);
            coalesce(&mut change, adjust(Some(two.clone()))).unwrap();
            assert_eq!(change, put);
        }
    }
}
