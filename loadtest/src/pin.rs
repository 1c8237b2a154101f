//! Which CPUs belong to whom.
//!
//! With at least four CPUs they are shared out: half for the server, a quarter each for Postgres
//! and for the load generator. With fewer, everybody may use all of them: a server that is held
//! to one CPU of two would be measured at half of its machine, and a generator that is held to
//! one CPU with Postgres would be the limit of every search.

use std::io;

use rustix::process::Pid;
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

use crate::process;

/// From so many CPUs on they are shared out.
const MIN_CPUS: usize = 4;

/// CPUs of each party.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Seats {
    pub(crate) server: Vec<usize>,
    pub(crate) postgres: Vec<usize>,
    pub(crate) generator: Vec<usize>,
}

impl Seats {
    /// Shares `cpus` out; none with too few.
    pub(crate) fn of(cpus: &[usize]) -> Option<Seats> {
        if cpus.len() < MIN_CPUS {
            return None;
        }
        let (server, rest) = cpus.split_at(cpus.len() / 2);
        let (postgres, generator) = rest.split_at(rest.len() / 2);
        Some(Seats {
            server: server.to_vec(),
            postgres: postgres.to_vec(),
            generator: generator.to_vec(),
        })
    }

    /// For the result.
    pub(crate) fn describe(seats: Option<&Seats>, cpus: usize) -> String {
        let Some(seats) = seats else {
            return format!("none: server, Postgres and generator share {cpus} CPUs");
        };
        let list =
            |cpus: &[usize]| cpus.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
        format!(
            "server on CPUs {}, Postgres on {}, generator on {}",
            list(&seats.server),
            list(&seats.postgres),
            list(&seats.generator)
        )
    }
}

/// The CPUs that this process may use.
pub(crate) fn allowed() -> Vec<usize> {
    zeroring_net::rt::allowed_cpus()
}

fn set(cpus: &[usize]) -> CpuSet {
    let mut set = CpuSet::new();
    cpus.iter().for_each(|cpu| set.set(*cpu));
    set
}

/// Does `start` with this thread on `cpus`, so that what it starts is born there.
pub(crate) fn born_on<T>(cpus: Option<&[usize]>, start: impl FnOnce() -> T) -> io::Result<T> {
    let Some(cpus) = cpus else { return Ok(start()) };
    let before = sched_getaffinity(None)?;
    sched_setaffinity(None, &set(cpus))?;
    let started = start();
    sched_setaffinity(None, &before)?;
    Ok(started)
}

/// Moves all threads of a process and of its descendants to `cpus`; later ones are born there.
pub(crate) fn move_tree(root: u32, cpus: &[usize]) -> io::Result<()> {
    for (_, thread) in process::thread_ids(root) {
        let pid = Pid::from_raw(thread as i32);
        match sched_setaffinity(pid, &set(cpus)) {
            // It ended meanwhile.
            Ok(()) | Err(rustix::io::Errno::SRCH) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpus_are_shared_out_without_overlap_or_not_at_all() {
        assert_eq!(Seats::of(&[0, 1]), None);
        assert!(Seats::describe(None, 2).contains("share 2 CPUs"));
        let cpus: Vec<usize> = (0..9).collect();
        let seats = Seats::of(&cpus).unwrap();
        let all = [seats.server.clone(), seats.postgres.clone(), seats.generator.clone()].concat();
        assert_eq!(all, cpus);
        assert!(all.len() == 9 && seats.server.len() == 4 && !seats.generator.is_empty());
    }

    #[test]
    fn a_child_is_born_on_the_given_cpu_and_this_thread_stays_where_it_was() {
        let before = allowed();
        let one = [before[0]];
        let seen = born_on(Some(&one), || {
            std::process::Command::new("nproc").env_remove("OMP_NUM_THREADS").output()
        });
        let text = String::from_utf8(seen.unwrap().unwrap().stdout).unwrap();
        assert_eq!(text.trim(), "1");
        assert_eq!(allowed(), before);
    }
}
