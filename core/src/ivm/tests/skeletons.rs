//! Every query shape within bounds with every change of one row. The normal run takes a part of
//! them; `ZERORING_SKELETONS=1` takes all, `ZERORING_SKELETON_EDGES` widens the bounds,
//! `ZERORING_SHARD=i/n` takes a share: `make fuzz`.

use crate::ivm::proof::history::check;
use crate::ivm::proof::runner::memory;
use crate::ivm::proof::skeleton::{Bounds, for_each_case};

/// The normal test run takes one case of this many (a prime: no axis is left out).
const EVERY: u64 = 97;
/// Tests that share them, so that a test runner can run them side by side.
const SLICES: u64 = 2;

fn env(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// This process' share of the work: number and count.
fn shard() -> (u64, u64) {
    let text = std::env::var("ZERORING_SHARD").unwrap_or_default();
    let mut parts = text.split('/').map(str::parse);
    match (parts.next(), parts.next()) {
        (Some(Ok(i)), Some(Ok(n))) if i < n => (i, n),
        _ => (0, 1),
    }
}

fn slice(slice: u64) {
    let edges = env("ZERORING_SKELETON_EDGES").unwrap_or(3) as usize;
    let every = env("ZERORING_SKELETONS").unwrap_or(EVERY).max(1);
    let (share, shares) = shard();
    let (share, shares) = (share * SLICES + slice, shares * SLICES);
    let (mut run, mut steps) = (0u64, 0u64);
    let all = for_each_case(Bounds { depth: 3, edges }, &mut |number, case| {
        if number % every != 0 || (number / every) % shares != share {
            return;
        }
        let script = case.script(number).unwrap_or_else(|e| panic!("{e}: {}", case.query()));
        match check(&script, &memory) {
            Ok(n) => steps += n,
            Err(error) => panic!("case {number}, {}: {error}", case.query()),
        }
        run += 1;
    });
    println!("skeletons, share {share} of {shares}: {run} of {all} cases, {steps} steps agree");
    assert!(run > 0 && steps > run * 50, "{run} cases, {steps} steps");
}

#[test]
fn every_shape_agrees_after_every_change_of_a_row_0() {
    slice(0);
}

#[test]
fn every_shape_agrees_after_every_change_of_a_row_1() {
    slice(1);
}
