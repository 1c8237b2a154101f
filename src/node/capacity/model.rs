//! The reckoning behind `zeroring capacity`: two samples in, headroom by resource out. Pure.

use serde_json::Value;

/// A CPU that is busy beyond this share answers late.
const CPU_LIMIT: f64 = 0.8;

/// Memory beyond this share of the machine is for the page cache and for peaks.
const MEMORY_LIMIT: f64 = 0.85;

/// With fewer groups than this, memory per group is not told apart from the process's own.
const MIN_GROUPS: f64 = 20.0;

/// A group's memory when it cannot be told: a few queries of a hundred rows, with its sockets.
const ASSUMED_GROUP_BYTES: f64 = 256e3;

/// With fewer transactions than this, the cost of one is not told.
const MIN_TRANSACTIONS: f64 = 20.0;

/// Descriptors that are not sockets of clients: files, connections, pipes.
const OWN_FILES: f64 = 200.0;

/// What one look at a node shows.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Sample {
    pub(super) version: String,
    pub(super) uptime_seconds: f64,
    pub(super) cpus: f64,
    pub(super) machine_busy_seconds: f64,
    /// CPU seconds of each executor, and of the replication core.
    pub(super) executors: Vec<f64>,
    pub(super) replication: f64,
    /// Seconds in which each executor had a batch at the CVR store.
    pub(super) flush: Vec<f64>,
    pub(super) flushes: f64,
    pub(super) batches: f64,
    pub(super) apply_seconds: f64,
    pub(super) transactions: f64,
    pub(super) groups: f64,
    pub(super) connections: f64,
    pub(super) subscriptions: f64,
    pub(super) anon_bytes: f64,
    pub(super) total_memory: f64,
    pub(super) free_memory: f64,
    pub(super) open_files: f64,
    pub(super) file_limit: f64,
}

impl Sample {
    /// Reads the JSON of `/statz`; the name of what is missing otherwise.
    pub(super) fn of(statz: &Value) -> Result<Sample, String> {
        let number =
            |path: &str| statz.pointer(path).and_then(Value::as_f64).ok_or_else(|| path.to_owned());
        let total = |name: &str| number(&format!("/sync/total/{name}"));
        let threads = statz.pointer("/threads").and_then(Value::as_object).ok_or("/threads")?;
        let executors: Vec<f64> = (0..)
            .map_while(|i| threads.get(&format!("zr-exec-{i}")).and_then(Value::as_f64))
            .collect();
        if executors.is_empty() {
            return Err("/threads/zr-exec-0".to_owned());
        }
        let clocks = statz.pointer("/stages/executors").and_then(Value::as_array);
        let flush = clocks.into_iter().flatten();
        Ok(Sample {
            version: statz
                .pointer("/server/version")
                .and_then(Value::as_str)
                .unwrap_or_default()
                .to_owned(),
            uptime_seconds: number("/server/uptime seconds")?,
            cpus: number("/os/available parallelism")?,
            machine_busy_seconds: number("/os/cpu busy seconds")?,
            executors,
            replication: number("/threads/replication")?,
            flush: flush
                .filter_map(|c| c.pointer("/flush/seconds").and_then(Value::as_f64))
                .collect(),
            // These appear with the first publication, a second after the start.
            flushes: total("cvrFlushes").unwrap_or(0.0),
            batches: total("cvrFlushBatches").unwrap_or(0.0),
            apply_seconds: number("/stages/apply/seconds")?,
            transactions: number("/replication/transactions")?,
            groups: total("clientGroups").unwrap_or(0.0),
            connections: total("connections").unwrap_or(0.0),
            subscriptions: total("subscriptions").unwrap_or(0.0),
            anon_bytes: number("/server/rss anon bytes")?,
            total_memory: number("/os/total mem")?,
            free_memory: number("/os/free mem")?,
            open_files: number("/server/open files")?,
            // Without a limit there is none to run into.
            file_limit: number("/server/open files limit").unwrap_or(f64::INFINITY),
        })
    }
}

/// One resource: what of it is used, and what the rest is good for. `None`: this resource does
/// not bound it, or nothing is known.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Resource {
    pub(super) name: String,
    /// Share of what may be used.
    pub(super) used: f64,
    pub(super) more_groups: Option<f64>,
    pub(super) more_queries: Option<f64>,
    pub(super) more_writes: Option<f64>,
    pub(super) reasoning: String,
}

/// What a node holds.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Estimate {
    pub(super) groups: f64,
    pub(super) connections: f64,
    pub(super) queries: f64,
    pub(super) writes_per_second: f64,
    pub(super) resources: Vec<Resource>,
}

/// The resource that bounds something first, and how much more there is until then.
pub(super) fn first(
    resources: &[Resource],
    of: impl Fn(&Resource) -> Option<f64>,
) -> Option<(&Resource, f64)> {
    let known = resources.iter().filter_map(|r| Some((r, of(r)?)));
    known.min_by(|a, b| a.1.total_cmp(&b.1))
}

fn percent(share: f64) -> String {
    format!("{:.0} %", share * 100.0)
}

/// Reckons from two samples, `seconds` apart.
pub(super) fn estimate(before: &Sample, after: &Sample, seconds: f64) -> Estimate {
    let seconds = seconds.max(0.001);
    let writes = ((after.transactions - before.transactions) / seconds).max(0.0);
    let load = Load { groups: after.groups, queries: after.subscriptions, writes };
    let rate = |later: f64, earlier: f64| ((later - earlier) / seconds).max(0.0);
    let pairs = after.executors.iter().zip(&before.executors);
    let executors: Vec<f64> = pairs.map(|(later, earlier)| rate(*later, *earlier)).collect();
    let busiest = executors.iter().copied().fold(0.0, f64::max);
    let list: Vec<String> = executors.iter().map(|e| percent(*e)).collect();
    let mut resources = vec![load.busy(
        "executors (CPU)",
        busiest / CPU_LIMIT,
        format!(
            "busy {}; the busiest may reach {}; load is taken to grow with groups and writes alike",
            list.join(", "),
            percent(CPU_LIMIT)
        ),
    )];
    resources.push(replication(before, after, rate(after.replication, before.replication), &load));
    let machine = rate(after.machine_busy_seconds, before.machine_busy_seconds) / after.cpus;
    resources.push(load.busy(
        "machine (CPU, all programs)",
        machine / CPU_LIMIT,
        format!(
            "{} of {} CPUs busy, may reach {}",
            percent(machine),
            after.cpus,
            percent(CPU_LIMIT)
        ),
    ));
    let pairs = after.flush.iter().zip(&before.flush);
    let flush = pairs.map(|(later, earlier)| rate(*later, *earlier)).fold(0.0, f64::max);
    let batches = after.batches - before.batches;
    let each = if batches > 0.0 { (after.flushes - before.flushes) / batches } else { 0.0 };
    resources.push(load.busy(
        "CVR flush",
        flush.min(1.0),
        format!(
            "a batch is under way {} of the time, {each:.1} groups in each; batches grow before \
             clients wait, so this is cautious",
            percent(flush)
        ),
    ));
    resources.push(memory(after));
    resources.push(files(after));
    Estimate {
        groups: after.groups,
        connections: after.connections,
        queries: after.subscriptions,
        writes_per_second: writes,
        resources,
    }
}

struct Load {
    groups: f64,
    queries: f64,
    writes: f64,
}

impl Load {
    /// A resource whose use is taken to grow in proportion to what there is now.
    fn busy(&self, name: &str, used: f64, reasoning: String) -> Resource {
        // Too little to be told from rest: nothing follows from it.
        let room = (used > 0.02).then(|| (1.0 / used - 1.0).max(0.0));
        let more = |now: f64| room.filter(|_| now > 0.0).map(|room| now * room);
        Resource {
            name: name.to_owned(),
            used,
            more_groups: more(self.groups),
            more_queries: more(self.queries),
            more_writes: more(self.writes),
            reasoning,
        }
    }
}

/// One thread applies all writes. What one costs in CPU is known from those that were watched;
/// without enough of them, how long it took is known from all since the start.
fn replication(before: &Sample, after: &Sample, busy: f64, load: &Load) -> Resource {
    let watched = after.transactions - before.transactions;
    let by_cpu = watched >= MIN_TRANSACTIONS && busy > 0.0;
    let by_clock = after.transactions >= MIN_TRANSACTIONS && after.apply_seconds > 0.0;
    let known = by_cpu || by_clock;
    let each =
        if by_cpu { busy / load.writes } else { after.apply_seconds / after.transactions.max(1.0) };
    let more = known.then(|| (CPU_LIMIT / each - load.writes).max(0.0));
    let cost = if by_cpu {
        format!("a transaction cost {:.0} µs of CPU ({watched:.0} were watched)", each * 1e6)
    } else if by_clock {
        format!(
            "a transaction took {:.0} µs to apply on average since the start ({:.0} of them)",
            each * 1e6,
            after.transactions
        )
    } else {
        "too few transactions so far to know what one costs".to_owned()
    };
    Resource {
        name: "replication core (one thread)".to_owned(),
        used: busy / CPU_LIMIT,
        more_groups: None,
        more_queries: None,
        more_writes: more,
        reasoning: format!("busy {}, may reach {}; {cost}", percent(busy), percent(CPU_LIMIT)),
    }
}

fn memory(after: &Sample) -> Resource {
    let reserve = after.total_memory * (1.0 - MEMORY_LIMIT);
    let room = (after.free_memory - reserve).max(0.0);
    let measured = after.groups >= MIN_GROUPS;
    let each = if measured { after.anon_bytes / after.groups } else { ASSUMED_GROUP_BYTES };
    let from = if measured {
        "all of the process's own memory, divided by its groups"
    } else {
        "assumed: too few groups to measure"
    };
    let per_query = after.subscriptions / after.groups.max(1.0);
    let groups = room / each;
    Resource {
        name: "memory".to_owned(),
        used: 1.0 - room / (after.total_memory - reserve).max(1.0),
        more_groups: Some(groups),
        more_queries: (measured && per_query > 0.0).then_some(groups * per_query),
        more_writes: None,
        reasoning: format!(
            "{:.0} MB free above a reserve of {:.0} MB; {:.0} kB per group ({from})",
            room / 1e6,
            reserve / 1e6,
            each / 1e3
        ),
    }
}

fn files(after: &Sample) -> Resource {
    let limit = after.file_limit;
    let sockets = (after.connections / after.groups.max(1.0)).max(1.0);
    let room = (limit - after.open_files.max(OWN_FILES)).max(0.0);
    let (used, more) = if limit.is_finite() {
        (after.open_files / limit.max(1.0), Some(room / sockets))
    } else {
        (0.0, None)
    };
    Resource {
        name: "open files".to_owned(),
        used,
        more_groups: more,
        more_queries: None,
        more_writes: None,
        reasoning: format!(
            "{:.0} of {limit} open (`ulimit -n`), {sockets:.1} sockets per group",
            after.open_files
        ),
    }
}

/// The estimate as a page of text.
pub(super) fn text(estimate: &Estimate, version: &str, seconds: f64) -> String {
    let mut out = format!(
        "zeroring {version}, watched for {seconds:.0} s: {:.0} groups ({:.0} connections), {:.0} \
         queries, {:.0} writes/s\n\n",
        estimate.groups, estimate.connections, estimate.queries, estimate.writes_per_second
    );
    out.push_str(&format!(
        "{:<30} {:>6} {:>12} {:>12} {:>12}\n",
        "", "used", "more groups", "queries", "writes/s"
    ));
    for resource in &estimate.resources {
        let cell = |n: Option<f64>| n.map_or("–".to_owned(), |n| format!("{n:.0}"));
        out.push_str(&format!(
            "{:<30} {:>6} {:>12} {:>12} {:>12}\n    {}\n",
            resource.name,
            percent(resource.used),
            cell(resource.more_groups),
            cell(resource.more_queries),
            cell(resource.more_writes),
            resource.reasoning
        ));
    }
    out.push('\n');
    let all = &estimate.resources;
    let verdicts = [
        ("groups", first(all, |r| r.more_groups)),
        ("queries", first(all, |r| r.more_queries)),
        ("writes/s", first(all, |r| r.more_writes)),
    ];
    for (what, verdict) in verdicts {
        let line = match verdict {
            Some((resource, more)) => {
                format!("About {more:.0} more {what}; runs out first: {}.\n", resource.name)
            }
            None => format!("Nothing can be said about {what}: watch the node while it works.\n"),
        };
        out.push_str(&line);
    }
    out.push_str(
        "\nThese are straight lines through what the node does now. What users do changes them: \
         measure the real thing with `zeroring loadtest`.\n",
    );
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(seconds: f64, busy: f64, writes: f64) -> Sample {
        Sample {
            version: "1".into(),
            uptime_seconds: seconds,
            cpus: 4.0,
            machine_busy_seconds: seconds * busy * 2.0,
            executors: vec![seconds * busy, seconds * busy / 2.0],
            replication: seconds * 0.1,
            flush: vec![seconds * 0.05, 0.0],
            flushes: seconds * 100.0,
            batches: seconds * 10.0,
            apply_seconds: seconds * writes * 100e-6,
            transactions: seconds * writes,
            groups: 1000.0,
            connections: 2000.0,
            subscriptions: 4000.0,
            anon_bytes: 200e6,
            total_memory: 8e9,
            free_memory: 6e9,
            open_files: 2300.0,
            file_limit: 20_000.0,
        }
    }

    fn of(estimate: &Estimate, name: &str) -> Resource {
        estimate.resources.iter().find(|r| r.name.starts_with(name)).unwrap().clone()
    }

    #[test]
    fn headroom_is_what_is_left_divided_by_what_one_costs() {
        let e = estimate(&sample(100.0, 0.4, 1000.0), &sample(110.0, 0.4, 1000.0), 10.0);
        assert_eq!(e.writes_per_second.round(), 1000.0);
        // 40 % busy, may reach 80 %: as much again.
        let executors = of(&e, "executors");
        assert_eq!(executors.more_groups.unwrap().round(), 1000.0);
        assert_eq!(executors.more_writes.unwrap().round(), 1000.0);
        // 100 µs each, 80 % of a second: 8,000/s, of which 1,000 are there.
        assert_eq!(of(&e, "replication").more_writes.unwrap().round(), 7000.0);
        // 6 GB free less 1.2 GB reserve, 200 kB per group.
        assert_eq!(of(&e, "memory").more_groups.unwrap().round(), 24_000.0);
        // 17,700 descriptors at two per group.
        assert_eq!(of(&e, "open files").more_groups.unwrap().round(), 8850.0);
        let (bottleneck, more) = first(&e.resources, |r| r.more_groups).unwrap();
        assert_eq!((bottleneck.name.as_str(), more.round()), ("executors (CPU)", 1000.0));
        let page = text(&e, "1", 10.0);
        assert!(page.contains("About 1000 more groups; runs out first: executors (CPU)"), "{page}");
        assert!(page.contains("10.0 groups in each"), "{page}");
    }

    #[test]
    fn an_idle_node_is_not_said_to_hold_infinitely_much() {
        let idle = Sample { transactions: 0.0, apply_seconds: 0.0, ..sample(100.0, 0.0, 0.0) };
        let e = estimate(&idle, &idle, 10.0);
        assert_eq!(of(&e, "executors").more_groups, None);
        // Not watched, but known from before: what was written takes 100 µs.
        let before = sample(100.0, 0.0, 1000.0);
        let quiet = estimate(&before, &before, 10.0);
        assert_eq!(of(&quiet, "replication").more_writes.unwrap().round(), 8000.0);
        assert_eq!(first(&e.resources, |r| r.more_writes).map(|(_, n)| n), None);
        assert_eq!(first(&e.resources, |r| r.more_groups).unwrap().0.name, "open files");
        let page = text(&e, "1", 10.0);
        assert!(page.contains("Nothing can be said about writes/s"), "{page}");
    }

    #[test]
    fn a_full_resource_leaves_nothing() {
        let full = |s| Sample { free_memory: 1e9, replication: s * 0.9, ..sample(s, 0.9, 9000.0) };
        let e = estimate(&full(100.0), &full(110.0), 10.0);
        assert_eq!(of(&e, "executors").more_groups, Some(0.0));
        assert_eq!(of(&e, "memory").more_groups, Some(0.0));
        assert_eq!(of(&e, "replication").more_writes, Some(0.0));
    }
}
