//! Proof of the engine: random histories against the brute-force oracle, worked examples of the
//! specification, wrong variants that must be caught.

mod examples;
mod generator;
mod history;
mod kit;
mod lifecycle;
mod mutants;
mod random;
mod sharing;
mod slicing;
