//! LIKE and ILIKE patterns, precompiled.

/// A compiled pattern.
#[derive(Debug, PartialEq, Eq, Hash)]
pub struct LikePattern {
    /// The pattern text, for SQL.
    pub pattern: String,
    /// ILIKE.
    pub ignore_case: bool,
}
