//! JSON as JavaScript writes it.
//!
//! - [`write`]: numbers and strings, byte for byte what `JSON.stringify` prints.
//! - [`row`]: a row as the object of a `rowsPatch` put, made at most once per row; row keys.
//! - [`RawJson`]: a JSON value kept as its text, for everything that is only passed on.
//!
//! Data comes in as [`crate::value::Value`]s or as text that a parser has already checked, and
//! goes out appended to byte buffers. Nothing here allocates per value but the row cache.

mod raw;
pub mod row;
pub mod write;

#[cfg(test)]
mod tests;

pub use raw::RawJson;
