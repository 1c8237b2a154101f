//! Wall and CPU time of work, without what a bench must do beside it.

use std::cell::Cell;
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};

use crate::check;

/// Time on the wall, and time that this thread had a CPU (which does not depend on what else the
/// machine does).
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Spent {
    pub(crate) wall: Duration,
    pub(crate) cpu: Duration,
}

thread_local! {
    static LEFT_OUT: Cell<Spent> = const { Cell::new(Spent { wall: Duration::ZERO, cpu: Duration::ZERO }) };
}

/// Measures from here on.
pub(crate) struct Watch {
    begin: Instant,
    cpu: Duration,
    left_out: Spent,
}

impl Watch {
    pub(crate) fn start() -> Watch {
        Watch { left_out: LEFT_OUT.get(), cpu: cpu(), begin: Instant::now() }
    }

    pub(crate) fn spent(&self) -> Spent {
        let (wall, cpu) = (self.begin.elapsed(), cpu() - self.cpu);
        let left_out = LEFT_OUT.get();
        Spent {
            wall: wall.saturating_sub(left_out.wall - self.left_out.wall),
            cpu: cpu.saturating_sub(left_out.cpu - self.left_out.cpu),
        }
    }
}

/// Does what is no part of the work that is measured: neither its time nor its allocations count.
/// (Instructions do.)
pub(crate) fn leave_out<T>(work: impl FnOnce() -> T) -> T {
    let watch = Watch::start();
    let result = check::uncounted(work);
    let (spent, sum) = (watch.spent(), LEFT_OUT.get());
    LEFT_OUT.set(Spent { wall: sum.wall + spent.wall, cpu: sum.cpu + spent.cpu });
    result
}

fn cpu() -> Duration {
    let now = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(now.tv_sec.unsigned_abs(), u32::try_from(now.tv_nsec).unwrap_or(0))
}
