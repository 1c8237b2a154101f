//! Start-up, life and end of the process: who starts whom.

pub mod logging;
