//! Proof of the engine: random histories against the brute-force oracle, every query shape with
//! every change of one row, rewritten queries, small applications, worked examples of the
//! specification, wrong variants that must be caught.
//!
//! Which test holds which item of the conformance checklist: `docs/conformance.md`, "Queries".

mod bounded_steps;
mod checklist;
mod datasets;
mod examples;
mod kit;
mod lifecycle;
mod metamorphic;
mod mutants;
mod parking;
mod random;
mod reading;
mod sharing;
mod skeletons;
mod slicing;
mod watching;
