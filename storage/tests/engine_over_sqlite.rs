//! The engine over SQLite, in the same random histories as over vectors: after every advance it
//! has emitted, holds and answers what the brute-force oracle says.
//!
//! `ZERORING_SQLITE_HISTORIES`, `ZERORING_SEED` and `ZERORING_SQLITE_SKELETONS` make a fuzzer of
//! it: `make fuzz`.

#![allow(clippy::unwrap_used, clippy::panic)]

mod sqlite_world;

use sqlite_world::{child_first, sqlite};
use zeroring_core::ivm::proof::skeleton::{Bounds, for_each_case};
use zeroring_core::ivm::proof::{datasets, history};

/// Histories of the normal test run; one in 512 is a large one.
const HISTORIES: u64 = 520;
/// The normal test run takes one skeleton of this many (a prime).
const EVERY: u64 = 1_999;

fn env(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

#[test]
fn histories_over_sqlite_agree_with_the_oracle() {
    let count = env("ZERORING_SQLITE_HISTORIES").unwrap_or(HISTORIES);
    let first = env("ZERORING_SEED").unwrap_or(0);
    let mut steps = 0;
    for seed in first..first + count {
        let ran = match seed % 2 {
            0 => history::run(seed, &sqlite),
            _ => history::run(seed, &child_first),
        };
        match ran {
            Ok(n) => steps += n,
            Err(error) => panic!("{error}"),
        }
    }
    println!("histories over SQLite {first}..{}: {steps} steps agree", first + count);
}

#[test]
fn every_shape_over_sqlite_agrees_after_every_change_of_a_row() {
    let every = env("ZERORING_SQLITE_SKELETONS").unwrap_or(EVERY).max(1);
    let (mut run, mut steps) = (0u64, 0u64);
    let all = for_each_case(Bounds { depth: 3, edges: 3 }, &mut |number, case| {
        if number % every == 0 {
            let script = case.script(number).unwrap_or_else(|e| panic!("{e}: {}", case.query()));
            let ran = match run % 2 {
                0 => history::check(&script, &sqlite),
                _ => history::check(&script, &child_first),
            };
            match ran {
                Ok(n) => steps += n,
                Err(error) => panic!("case {number}, {}: {error}", case.query()),
            }
            run += 1;
        }
    });
    println!("skeletons over SQLite: {run} of {all} cases, {steps} steps agree");
    assert!(run > 0 && steps > run * 50, "{run} cases, {steps} steps");
}

#[test]
fn the_queries_of_small_applications_over_sqlite_agree_with_the_oracle() {
    let first = env("ZERORING_SEED").unwrap_or(0);
    let mut steps = 0;
    for set in datasets::all().unwrap() {
        for seed in first..first + env("ZERORING_DATASETS").unwrap_or(2) {
            match history::check(&set.script(seed, 30).unwrap(), &sqlite) {
                Ok(n) => steps += n,
                Err(error) => panic!("{}, seed {seed}: {error}", set.name),
            }
        }
    }
    println!("data sets over SQLite: {steps} steps agree");
}
