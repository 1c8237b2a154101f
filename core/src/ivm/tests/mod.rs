//! Proof of the engine: random histories against the brute-force oracle, worked examples of the
//! specification, wrong variants that must be caught.

mod datasets;
mod examples;
mod kit;
mod lifecycle;
mod metamorphic;
mod mutants;
mod random;
mod sharing;
mod skeletons;
mod slicing;
