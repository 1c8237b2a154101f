//! Incremental view maintenance: plan → shared instance → subscription (design §4).

pub mod plan;
pub mod source;
