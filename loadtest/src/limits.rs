//! What ran out: which party used how much of the machine while a rate was tried, and which of
//! them was at its end when the rate was not sustained.

use std::time::Instant;

use serde::{Deserialize, Serialize};

use crate::process::{self, ThreadTimes};

/// A thread that runs for this share of the time is at its end: the rest is waking up.
const FULL: f64 = 0.85;

/// The machine is full when all its CPUs together are busy to this share.
const MACHINE_FULL: f64 = 0.92;

/// Below this share of a CPU, other programs on the machine are noise.
const OTHERS_NOISE: f64 = 0.1;

/// A thread (or process) and its share of one CPU.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Busiest {
    pub(crate) name: String,
    pub(crate) share: f64,
}

/// Shares of CPUs (1 = one whole CPU) over some time.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Usage {
    pub(crate) server: f64,
    pub(crate) postgres: f64,
    pub(crate) generator: f64,
    /// Everything else on the machine: should be next to nothing.
    pub(crate) others: f64,
    pub(crate) cpus: usize,
    pub(crate) server_thread: Busiest,
    pub(crate) postgres_process: Busiest,
    pub(crate) generator_thread: Busiest,
}

/// Who is looked at.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Parties {
    /// None where Postgres is alone.
    pub(crate) server: Option<u32>,
    pub(crate) postgres: u32,
}

/// The state of all clocks at a moment.
pub(crate) struct Meter {
    at: Instant,
    machine: f64,
    server: ThreadTimes,
    postgres: ThreadTimes,
    generator: ThreadTimes,
    /// CPU seconds with those of processes that have ended: Postgres' are gone with their client.
    server_total: f64,
    postgres_total: f64,
}

impl Meter {
    pub(crate) fn read(parties: Parties) -> Meter {
        Meter {
            at: Instant::now(),
            machine: process::machine_busy_seconds(),
            server: parties.server.map(process::thread_times).unwrap_or_default(),
            postgres: process::thread_times(parties.postgres),
            generator: process::own_thread_times(),
            server_total: parties.server.map_or(0.0, process::cpu_seconds),
            postgres_total: process::cpu_seconds(parties.postgres),
        }
    }

    /// What was used between `self` and `later`.
    pub(crate) fn until(&self, later: &Meter) -> Usage {
        let seconds = later.at.duration_since(self.at).as_secs_f64().max(0.001);
        let (_, server_thread) = later.server.since(&self.server, seconds);
        let (_, postgres_process) = later.postgres.since(&self.postgres, seconds);
        let server = (later.server_total - self.server_total) / seconds;
        let postgres = (later.postgres_total - self.postgres_total) / seconds;
        let (generator, generator_thread) = later.generator.since(&self.generator, seconds);
        let machine = (later.machine - self.machine) / seconds;
        Usage {
            server,
            postgres,
            generator,
            others: (machine - server - postgres - generator).max(0.0),
            cpus: process::machine_cpus(),
            server_thread,
            postgres_process,
            generator_thread,
        }
    }
}

impl Usage {
    /// What was at its end. `commits_late`: writes were late when Postgres confirmed them, before
    /// the server had anything to do with them.
    pub(crate) fn limit(&self, commits_late: bool) -> String {
        let total = self.server + self.postgres + self.generator + self.others;
        let full = |b: &Busiest| b.share >= FULL;
        let named = |who: &str, b: &Busiest| {
            format!("{who}: `{}` uses {:.0} % of a CPU", b.name, b.share * 100.0)
        };
        if total >= MACHINE_FULL * self.cpus as f64 {
            let mut parts = vec![
                ("server", self.server),
                ("Postgres", self.postgres),
                ("generator", self.generator),
            ];
            if self.others > OTHERS_NOISE {
                parts.push(("other programs", self.others));
            }
            parts.retain(|(_, share)| *share > 0.0);
            // Whoever takes most is the limit.
            parts.sort_by(|a, b| b.1.total_cmp(&a.1));
            let parts: Vec<String> =
                parts.iter().map(|(who, share)| format!("{who} {share:.2}")).collect();
            return format!(
                "all {} CPUs are busy, most with the first: {}",
                self.cpus,
                parts.join(", ")
            );
        }
        if full(&self.generator_thread) {
            return named("the load generator", &self.generator_thread);
        }
        if commits_late {
            if full(&self.postgres_process) {
                return named("Postgres", &self.postgres_process);
            }
            return "Postgres: commits wait for the disk".to_owned();
        }
        if full(&self.server_thread) {
            return named("the server", &self.server_thread);
        }
        if full(&self.postgres_process) {
            return named("Postgres", &self.postgres_process);
        }
        if self.server_thread.name.is_empty() {
            return "nobody lacks CPU: Postgres waits for locks or the disk".to_owned();
        }
        format!(
            "the server waits (busiest thread: `{}`, {:.0} % of a CPU): disk or round trips",
            self.server_thread.name,
            self.server_thread.share * 100.0
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn usage(server: f64, postgres: f64, generator: f64) -> Usage {
        let busiest = |name: &str, share| Busiest { name: name.to_owned(), share };
        Usage {
            server,
            postgres,
            generator,
            others: 0.0,
            cpus: 4,
            server_thread: busiest("replication", server),
            postgres_process: busiest("walsender", postgres),
            generator_thread: busiest("writer", generator),
        }
    }

    #[test]
    fn the_party_that_is_at_its_end_is_named() {
        let of = |u: Usage, late| u.limit(late);
        assert!(of(usage(0.95, 0.3, 0.2), false).contains("the server: `replication` uses 95 %"));
        assert!(of(usage(0.5, 0.3, 0.9), false).contains("load generator"));
        assert!(of(usage(0.5, 0.9, 0.2), true).contains("Postgres: `walsender`"));
        assert!(of(usage(0.5, 0.2, 0.2), true).contains("wait for the disk"));
        assert!(of(usage(0.5, 0.2, 0.2), false).contains("the server waits"));
        let alone = Usage { server_thread: Busiest::default(), ..usage(0.0, 0.2, 0.2) };
        assert!(of(alone, false).contains("nobody lacks CPU"));
        let crowded = Usage { others: 3.0, ..usage(0.5, 0.2, 0.2) };
        assert!(crowded.limit(false).contains("all 4 CPUs are busy"), "{}", crowded.limit(false));
        assert!(crowded.limit(false).contains("most with the first: other programs 3.00, server"));
        let alone = Usage { postgres: 3.5, generator: 0.4, ..usage(0.0, 0.0, 0.0) };
        assert!(alone.limit(true).ends_with("first: Postgres 3.50, generator 0.40"));
    }

    #[test]
    fn a_thread_that_spins_is_the_busiest() {
        let me = std::process::id();
        let parties = Parties { server: Some(me), postgres: me };
        let before = Meter::read(parties);
        let spinner = std::thread::Builder::new().name("spinner".to_owned());
        let begin = Instant::now();
        let handle = spinner
            .spawn(move || {
                let mut n = 0_u64;
                while process::own_cpu_seconds() < 0.3 && begin.elapsed().as_secs() < 30 {
                    n = std::hint::black_box(n + 1);
                }
                // Stays until it was looked at.
                std::thread::park();
            })
            .unwrap();
        while process::own_cpu_seconds() < 0.3 && begin.elapsed().as_secs() < 30 {
            std::thread::yield_now();
        }
        let usage = before.until(&Meter::read(parties));
        handle.thread().unpark();
        handle.join().unwrap();
        assert!(usage.server > 0.0 && !usage.server_thread.name.is_empty(), "{usage:?}");
    }
}
