//! Exit codes (spec: operations §5.8). Restart policies and alerts depend on them.

use std::process::ExitCode;

/// How the process ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// Drained after SIGTERM or SIGINT; usage printed.
    Done,
    /// A bug: a panic where it could not be contained.
    Bug,
    /// On purpose, without drain: SIGQUIT, another node took over, a reset is due, or Postgres
    /// cannot be reached with this configuration.
    Intended,
    /// Anything else.
    Failed,
}

impl Exit {
    /// The code.
    pub fn code(self) -> u8 {
        match self {
            Exit::Done => 0,
            Exit::Bug => 13,
            Exit::Intended => 14,
            Exit::Failed => 255,
        }
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> ExitCode {
        ExitCode::from(exit.code())
    }
}
