//! Live progress on standard error: one line that is overwritten in a terminal, else a line now
//! and then.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

/// Between two lines when standard error is a file.
const LINE_EVERY: Duration = Duration::from_secs(10);

pub(crate) struct Progress {
    prefix: String,
    terminal: bool,
    last: Instant,
    /// When everything is expected to be done.
    end: Option<Instant>,
}

impl Progress {
    pub(crate) fn new(prefix: String, remaining: Option<Duration>) -> Progress {
        let terminal = std::io::stderr().is_terminal();
        let now = Instant::now();
        Progress { prefix, terminal, last: now, end: remaining.map(|left| now + left) }
    }

    fn head(&self) -> String {
        match self.end.map(|end| end.saturating_duration_since(Instant::now())) {
            Some(left) if left >= Duration::from_secs(60) => {
                format!("{} · {:.0} min left", self.prefix, (left.as_secs_f64() / 60.0).ceil())
            }
            Some(left) => format!("{} · {:.0} s left", self.prefix, left.as_secs_f64()),
            None => self.prefix.clone(),
        }
    }

    /// What is going on now.
    pub(crate) fn tell(&mut self, text: &str) {
        let mut out = std::io::stderr();
        // Progress that cannot be shown is no reason to stop.
        if self.terminal {
            let _ = write!(out, "\r\x1b[2K{} · {text}", self.head());
            let _ = out.flush();
        } else if self.last.elapsed() > LINE_EVERY {
            self.last = Instant::now();
            let _ = writeln!(out, "{} · {text}", self.head());
        }
    }

    /// A line that stays.
    pub(crate) fn line(&mut self, text: &str) {
        let mut out = std::io::stderr();
        let clear = if self.terminal { "\r\x1b[2K" } else { "" };
        let _ = writeln!(out, "{clear}{} · {text}", self.prefix);
    }
}
