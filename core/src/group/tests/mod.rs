//! The machine against a world of plain data: scenarios of the spec, and a seeded simulation.

mod client;
mod harness;
mod pushes;
mod scenarios;
mod shared;
mod simulation;
mod store;
mod world;
