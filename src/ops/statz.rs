//! `/statz`: statistics by group, as text or JSON (spec: operations §3.3).
//!
//! Groups of the original that are here: `replica`, `replication`, `os`, with its keys and some
//! more; `server`, `sync`, `plans`, `stages` and `threads` are ours. Its groups with figures from
//! Postgres (`upstream`, `cvr`, `changeLog`) come with the Postgres CVR store. A group that fails
//! is an object with `error`.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Instant, UNIX_EPOCH};

use serde_json::{Map, Value, json};
use zeroring_core::version::StateVersion;
use zeroring_storage::replica::reader::{ReaderOptions, ReplicaReader};

use super::registry::Registry;
use crate::replication::SharedStatus;
use crate::replication::status::format_lsn;
use crate::stages::{Stage, StageClocks};

/// Where the statistics come from.
#[derive(Debug)]
pub struct StatzSources {
    /// Version of the server.
    pub version: String,
    /// Name of the node.
    pub task_id: String,
    /// When the process started.
    pub started: Instant,
    /// Numbers of the executors.
    pub registry: Registry,
    /// State of replication.
    pub replication: SharedStatus,
    /// The replica.
    pub replica_file: PathBuf,
}

impl Default for StatzSources {
    fn default() -> Self {
        StatzSources {
            version: String::new(),
            task_id: String::new(),
            started: Instant::now(),
            registry: Registry::default(),
            replication: SharedStatus::default(),
            replica_file: PathBuf::new(),
        }
    }
}

/// A group's name and how it is made.
type Group = (&'static str, fn(&StatzSources) -> Result<Map<String, Value>, String>);

const GROUPS: [Group; 8] = [
    ("server", server),
    ("sync", sync),
    ("plans", plans),
    ("stages", stages),
    ("threads", threads),
    ("replica", replica),
    ("replication", replication),
    ("os", os),
];

/// What a request asks for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Asked {
    /// Groups in the order asked; `None`: all.
    pub groups: Option<Vec<String>>,
    /// JSON instead of text.
    pub json: bool,
    /// Indented JSON.
    pub pretty: bool,
}

impl Asked {
    /// Reads `group=a,b`, `group=a&group=b`, `format=json` and `pretty`.
    pub fn parse(query: &str) -> Asked {
        let mut asked = Asked::default();
        for pair in query.split('&') {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            match key {
                "group" => {
                    let names = value.split(',').flat_map(|v| v.split("%2C")).map(str::to_owned);
                    asked.groups.get_or_insert_default().extend(names);
                }
                "format" => asked.json = value == "json",
                "pretty" => asked.pretty = true,
                _ => {}
            }
        }
        asked
    }
}

/// The statistics as text or JSON.
pub fn render(sources: &StatzSources, asked: &Asked) -> String {
    let wanted: Vec<Group> = match &asked.groups {
        None => GROUPS.to_vec(),
        Some(names) => {
            let find = |name: &String| GROUPS.iter().find(|(known, _)| known == name);
            let mut found: Vec<Group> = names.iter().filter_map(find).copied().collect();
            found.dedup_by_key(|(name, _)| *name);
            found
        }
    };
    let groups: Vec<(&str, Map<String, Value>)> = wanted
        .into_iter()
        .map(|(name, make)| {
            let values = make(sources);
            (name, values.unwrap_or_else(|error| Map::from_iter([("error".into(), error.into())])))
        })
        .collect();
    if asked.json {
        let all: Map<String, Value> = groups
            .into_iter()
            .map(|(name, values)| (name.to_owned(), Value::from(values)))
            .collect();
        let text = if asked.pretty {
            serde_json::to_string_pretty(&all)
        } else {
            serde_json::to_string(&all)
        };
        return text.unwrap_or_default();
    }
    let mut out = String::new();
    for (name, values) in groups {
        out.push_str(&format!("\n=== {name} ===\n"));
        for (key, value) in values {
            let value = serde_json::to_string_pretty(&value).unwrap_or_default();
            out.push_str(&format!("\n{key}: {value}"));
        }
        out.push('\n');
    }
    out
}

fn object(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(map) => map,
        other => Map::from_iter([("value".to_owned(), other)]),
    }
}

fn server(sources: &StatzSources) -> Result<Map<String, Value>, String> {
    let backends: Vec<&str> = sources.registry.executors().iter().map(|e| e.backend()).collect();
    Ok(object(json!({
        "version": sources.version,
        "taskID": sources.task_id,
        "uptime seconds": sources.started.elapsed().as_secs(),
        "executors": backends.len(),
        "io backends": backends,
        "rss bytes": status_bytes("VmRSS:"),
        "rss anon bytes": status_bytes("RssAnon:"),
        "pid": std::process::id(),
        "open files": open_files(),
        "open files limit": rustix::process::getrlimit(rustix::process::Resource::Nofile).current,
    })))
}

/// Descriptors of this process. The size of the directory, where the kernel tells it.
fn open_files() -> Option<u64> {
    let size = fs::metadata("/proc/self/fd").ok()?.len();
    if size > 0 { Some(size) } else { Some(fs::read_dir("/proc/self/fd").ok()?.count() as u64) }
}

/// Time in each stage since the start, all threads together and each executor: `seconds` and
/// `count`. Stages of one executor exclude each other, but for `flush`, which goes on beside them.
fn stages(sources: &StatzSources) -> Result<Map<String, Value>, String> {
    let executors = sources.registry.executors();
    let shown = |clocks: &[&StageClocks], which: &[Stage]| -> Map<String, Value> {
        let show = |stage: &Stage| {
            let times = clocks.iter().map(|c| c.time(*stage));
            let (seconds, count) = times.fold((0.0, 0), |(seconds, count), t| {
                (seconds + t.total.as_secs_f64(), count + t.count)
            });
            (stage.name().to_owned(), json!({ "seconds": seconds, "count": count }))
        };
        which.iter().map(show).collect()
    };
    let of_core = [Stage::Apply, Stage::Publish];
    let of_executors: Vec<Stage> =
        Stage::ALL.into_iter().filter(|stage| !of_core.contains(stage)).collect();
    let all: Vec<&StageClocks> = executors.iter().map(|e| &e.stages).collect();
    let mut group = shown(&[&sources.replication.stages], &of_core);
    group.append(&mut shown(&all, &of_executors));
    let each: Vec<Value> =
        all.iter().map(|clocks| shown(&[clocks], &of_executors).into()).collect();
    group.insert("executors".to_owned(), each.into());
    Ok(group)
}

/// CPU seconds of every thread, by name; threads of one name together.
fn threads(_: &StatzSources) -> Result<Map<String, Value>, String> {
    /// The unit of times in `/proc`: the same on all architectures of Linux that matter.
    const TICKS_PER_SECOND: f64 = 100.0;
    let tasks = fs::read_dir("/proc/self/task").map_err(|e| e.to_string())?;
    let mut found: std::collections::BTreeMap<String, u64> = Default::default();
    for task in tasks.flatten() {
        // A thread may end while we look.
        let Ok(text) = fs::read_to_string(task.path().join("stat")) else { continue };
        // The name is in parentheses and may contain anything.
        let Some((head, rest)) = text.rsplit_once(')') else { continue };
        let name = head.split_once('(').map_or("", |(_, name)| name);
        let ticks = rest.split_whitespace().skip(11).take(2).filter_map(|n| n.parse::<u64>().ok());
        *found.entry(name.to_owned()).or_default() += ticks.sum::<u64>();
    }
    let seconds = |(name, ticks)| (name, Value::from(ticks as f64 / TICKS_PER_SECOND));
    Ok(found.into_iter().map(seconds).collect())
}

fn sync(sources: &StatzSources) -> Result<Map<String, Value>, String> {
    let executors = sources.registry.executors();
    let each: Vec<Value> = executors.iter().map(|e| json!(e.numbers())).collect();
    Ok(object(json!({ "total": sources.registry.total(), "executors": each })))
}

fn plans(sources: &StatzSources) -> Result<Map<String, Value>, String> {
    Ok(sources.registry.plans().into_iter().map(|(plan, n)| (plan, json!(n))).collect())
}

fn replication(sources: &StatzSources) -> Result<Map<String, Value>, String> {
    let status = sources.replication.snapshot();
    let watermark = StateVersion::parse(&status.watermark).and_then(|version| version.lsn());
    let mut group = Map::new();
    let lsn = watermark.map_err(|e| e.to_string()).map(format_lsn)?;
    group.insert("lsn".to_owned(), lsn.into());
    group.append(&mut object(serde_json::to_value(status).map_err(|e| e.to_string())?));
    Ok(group)
}

fn replica(sources: &StatzSources) -> Result<Map<String, Value>, String> {
    let path = &sources.replica_file;
    let describe = |e: std::io::Error| format!("{}: {e}", path.display());
    let stat = fs::metadata(path).map_err(describe)?;
    let mut group = pragmas(path)?;
    group.insert("wal file bytes".to_owned(), wal_bytes(path).into());
    let ms = |seconds: i64, nanos: i64| seconds as f64 * 1e3 + nanos as f64 / 1e6;
    let born = stat.created().ok().and_then(|t| t.duration_since(UNIX_EPOCH).ok());
    group.insert(
        "db file stats".to_owned(),
        json!({
            "dev": stat.dev(), "mode": stat.mode(), "nlink": stat.nlink(), "uid": stat.uid(),
            "gid": stat.gid(), "rdev": stat.rdev(), "blksize": stat.blksize(), "ino": stat.ino(),
            "size": stat.size(), "blocks": stat.blocks(),
            "atimeMs": ms(stat.atime(), stat.atime_nsec()),
            "mtimeMs": ms(stat.mtime(), stat.mtime_nsec()),
            "ctimeMs": ms(stat.ctime(), stat.ctime_nsec()),
            "birthtimeMs": born.map_or(0.0, |t| t.as_secs_f64() * 1e3),
        }),
    );
    Ok(group)
}

/// Settings of the replica, by the names of the original. `wal checkpoint` is left out: asking
/// SQLite for it starts one.
fn pragmas(path: &Path) -> Result<Map<String, Value>, String> {
    let options = ReaderOptions { cached_statements: 0, cache_kib: 64, mmap_bytes: 0 };
    let reader = ReplicaReader::open(path, &options).map_err(|e| e.to_string())?;
    let number = |pragma: &str| -> Result<Value, String> {
        let row = reader.connection().query_row(pragma, [], |row| row.get::<_, i64>(0));
        row.map(Value::from).map_err(|e| format!("{pragma}: {e}"))
    };
    let text = |pragma: &str| -> Result<Value, String> {
        let row = reader.connection().query_row(pragma, [], |row| row.get::<_, String>(0));
        row.map(Value::from).map_err(|e| format!("{pragma}: {e}"))
    };
    Ok(object(json!({
        "page count": number("PRAGMA page_count")?,
        "page size": number("PRAGMA page_size")?,
        "journal mode": text("PRAGMA journal_mode")?,
        "synchronous": number("PRAGMA synchronous")?,
        "cache size": number("PRAGMA cache_size")?,
        "auto vacuum": number("PRAGMA auto_vacuum")?,
        "freelist count": number("PRAGMA freelist_count")?,
        "wal autocheckpoint": number("PRAGMA wal_autocheckpoint")?,
    })))
}

fn wal_bytes(path: &Path) -> u64 {
    let mut wal = path.as_os_str().to_owned();
    wal.push("-wal");
    fs::metadata(wal).map_or(0, |m| m.len())
}

fn os(_: &StatzSources) -> Result<Map<String, Value>, String> {
    let read = |path: &str| fs::read_to_string(path).map_err(|e| format!("{path}: {e}"));
    let numbers = |text: &str| -> Vec<f64> {
        text.split_whitespace().map_while(|word| word.parse().ok()).collect()
    };
    let memory = read("/proc/meminfo")?;
    let bytes = |key: &str| {
        let line = memory.lines().find_map(|line| line.strip_prefix(key));
        line.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok())
            .map(|kib| kib * 1024)
    };
    let cpus = read("/proc/cpuinfo")?.lines().filter(|line| line.starts_with("processor")).count();
    let arch = match std::env::consts::ARCH {
        "x86_64" => "x64",
        "aarch64" => "arm64",
        other => other,
    };
    Ok(object(json!({
        "load avg": numbers(&read("/proc/loadavg")?).into_iter().take(3).collect::<Vec<_>>(),
        "uptime": numbers(&read("/proc/uptime")?).first(),
        "total mem": bytes("MemTotal:"),
        "free mem": bytes("MemAvailable:"),
        "cpus": cpus,
        "cpu busy seconds": busy_seconds(&read("/proc/stat")?),
        "available parallelism": process_cpus(),
        "platform": std::env::consts::OS,
        "arch": arch,
        "release": read("/proc/sys/kernel/osrelease")?.trim(),
    })))
}

/// Seconds for which CPUs of the machine were busy, all together, since it started.
fn busy_seconds(stat: &str) -> f64 {
    let line = stat.lines().next().unwrap_or_default();
    let fields: Vec<f64> = line.split_whitespace().skip(1).filter_map(|n| n.parse().ok()).collect();
    // user nice system idle iowait irq softirq steal, in hundredths: all but idle and iowait.
    let busy = fields.iter().take(8).enumerate().filter(|(i, _)| !(3..=4).contains(i));
    busy.map(|(_, ticks)| ticks).sum::<f64>() / 100.0
}

/// CPUs that the process may use. The thread that asks may be pinned to one.
fn process_cpus() -> usize {
    use rustix::thread::{CpuSet, sched_getaffinity};
    let main_thread = rustix::process::getpid();
    let set = sched_getaffinity(Some(main_thread));
    set.map_or(1, |set| (0..CpuSet::MAX_CPU).filter(|&cpu| set.is_set(cpu)).count())
}

fn status_bytes(key: &str) -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(key))?;
    Some(line.split_whitespace().next()?.parse::<u64>().ok()? * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sources() -> StatzSources {
        let registry = Registry::new(2);
        for index in 0..2 {
            let stats = registry.executor(index).unwrap();
            stats.set_backend("epoll");
            stats.publish([("connections", 3 + index as u64), ("groups", 1)]);
        }
        StatzSources { version: "1.2.3".into(), registry, ..StatzSources::default() }
    }

    fn json(query: &str) -> Map<String, Value> {
        let asked = Asked::parse(query);
        assert!(asked.json);
        serde_json::from_str(&render(&sources(), &asked)).unwrap()
    }

    #[test]
    fn all_groups_by_default_and_a_broken_one_says_so() {
        let all = json("format=json");
        let names: Vec<&str> = all.keys().map(String::as_str).collect();
        let want = ["server", "sync", "plans", "stages", "threads", "replica", "replication", "os"];
        assert_eq!(names, want);
        assert_eq!(all["server"]["io backends"], json!(["epoll", "epoll"]));
        assert_eq!(all["sync"]["total"], json!({"connections": 7, "groups": 2}));
        assert_eq!(all["sync"]["executors"][1]["connections"], 4);
        assert!(all["replica"]["error"].is_string(), "there is no file");
        assert_eq!(all["replication"]["lsn"], "0/0");
        assert_eq!(all["os"]["load avg"].as_array().unwrap().len(), 3);
        assert!(all["os"]["total mem"].as_u64().unwrap() > 0);
    }

    #[test]
    fn stages_add_up_over_executors_and_threads_are_named() {
        let sources = sources();
        let ms = std::time::Duration::from_millis;
        for (executor, time) in sources.registry.executors().iter().zip([ms(250), ms(500)]) {
            executor.stages.add(Stage::Advance, time);
        }
        sources.replication.stages.add(Stage::Apply, ms(125));
        let asked = Asked::parse("group=stages,threads,server&format=json");
        let all: Value = serde_json::from_str(&render(&sources, &asked)).unwrap();
        assert_eq!(all["stages"]["advance"], json!({"seconds": 0.75, "count": 2}));
        assert_eq!(all["stages"]["apply"], json!({"seconds": 0.125, "count": 1}));
        assert_eq!(all["stages"]["executors"][1]["advance"]["seconds"], 0.5);
        assert!(all["threads"].as_object().unwrap().values().all(Value::is_number));
        assert!(all["server"]["open files"].as_u64().unwrap() > 2);
        assert!(all["server"]["open files limit"].as_u64().unwrap() > 2);
        assert!(all["server"]["rss anon bytes"].as_u64().unwrap() > 0);
    }

    #[test]
    fn a_pinned_thread_tells_the_cpus_of_the_process() {
        use rustix::thread::{CpuSet, sched_setaffinity};
        let all = process_cpus();
        let first = (0..CpuSet::MAX_CPU)
            .find(|&cpu| rustix::thread::sched_getaffinity(None).unwrap().is_set(cpu));
        let pinned = std::thread::spawn(move || {
            let mut one = CpuSet::new();
            one.set(first.unwrap());
            sched_setaffinity(None, &one).unwrap();
            process_cpus()
        });
        assert_eq!(pinned.join().unwrap(), all);
    }

    #[test]
    fn groups_are_given_in_the_order_asked_without_unknown_ones() {
        let names = |query: &str| json(query).keys().cloned().collect::<Vec<_>>();
        assert_eq!(names("format=json&group=os,bogus"), ["os"]);
        assert_eq!(names("group=os&group=server&format=json"), ["os", "server"]);
        assert!(names("format=json&group=").is_empty());
    }

    #[test]
    fn text_and_pretty_json() {
        let text = render(&sources(), &Asked::parse("group=sync"));
        assert!(text.starts_with("\n=== sync ===\n\ntotal: {\n  \"connections\": 7,"), "{text}");
        assert!(text.ends_with("]\n"));
        let pretty = render(&sources(), &Asked::parse("group=sync&format=json&pretty"));
        assert!(pretty.starts_with("{\n  \"sync\": {\n    \"total\""), "{pretty}");
    }
}
