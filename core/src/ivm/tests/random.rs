//! Random histories. `ZERORING_HISTORIES` and `ZERORING_SEED` make a fuzzer of it: `make fuzz`.

use crate::ivm::proof::history;
use crate::ivm::proof::runner::memory;

/// Histories of the normal test run, over all slices.
const HISTORIES: u64 = 16_384;
/// Tests that share them, so that a test runner can run them side by side.
const SLICES: u64 = 4;

fn env(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

fn slice(number: u64) {
    let count = env("ZERORING_HISTORIES").unwrap_or(HISTORIES) / SLICES;
    let first = env("ZERORING_SEED").unwrap_or(0) + number * count;
    let mut steps = 0;
    for seed in first..first + count {
        match history::run(seed, &memory) {
            Ok(n) => steps += n,
            Err(error) => panic!("{error}"),
        }
    }
    println!("histories {first}..{}: {steps} steps agree", first + count);
}

#[test]
fn histories_agree_with_the_oracle_0() {
    slice(0);
}

#[test]
fn histories_agree_with_the_oracle_1() {
    slice(1);
}

#[test]
fn histories_agree_with_the_oracle_2() {
    slice(2);
}

#[test]
fn histories_agree_with_the_oracle_3() {
    slice(3);
}

/// Seeds of histories that found an error once.
#[test]
fn histories_that_were_wrong_once_agree() {
    for seed in [1_757, 910_001_853] {
        history::run(seed, &memory).unwrap_or_else(|error| panic!("{error}"));
    }
}
