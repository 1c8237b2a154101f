//! Proof of the engine: random histories against the brute-force oracle, worked examples of the
//! specification, wrong variants that must be caught.

mod generator;
mod history;
mod mutants;
mod random;
