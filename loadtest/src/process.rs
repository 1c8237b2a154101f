//! What processes use, from `/proc`.

use std::collections::HashMap;
use std::fs;

use crate::limits::Busiest;

/// The unit of times in `/proc`: the same on all architectures of Linux that matter.
const TICKS_PER_SECOND: f64 = 100.0;

struct Stat {
    parent: u32,
    /// Clock ticks of its own.
    own: u64,
    /// Of children that ended and were waited for.
    children: u64,
}

fn stat(pid: u32) -> Option<Stat> {
    named_stat(&format!("/proc/{pid}/stat")).map(|(_, stat)| stat)
}

fn named_stat(path: &str) -> Option<(String, Stat)> {
    let text = fs::read_to_string(path).ok()?;
    // The name is in parentheses and may contain anything.
    let (head, rest) = text.rsplit_once(')')?;
    let name = head.split_once('(')?.1.to_owned();
    let fields: Vec<&str> = rest.split_whitespace().collect();
    let number = |i: usize| fields.get(i)?.parse::<u64>().ok();
    let stat = Stat {
        parent: u32::try_from(number(1)?).ok()?,
        own: number(11)? + number(12)?,
        children: number(13)? + number(14)?,
    };
    Some((name, stat))
}

fn all() -> HashMap<u32, Stat> {
    let Ok(entries) = fs::read_dir("/proc") else { return HashMap::new() };
    entries
        .filter_map(|e| e.ok()?.file_name().to_str()?.parse().ok())
        .filter_map(|pid| Some((pid, stat(pid)?)))
        .collect()
}

/// `root` and its descendants.
pub(crate) fn tree(root: u32) -> Vec<u32> {
    members(&all(), root)
}

fn members(processes: &HashMap<u32, Stat>, root: u32) -> Vec<u32> {
    let mut found = vec![root];
    let mut next = 0;
    while let Some(&parent) = found.get(next) {
        found.extend(processes.iter().filter(|(_, s)| s.parent == parent).map(|(pid, _)| *pid));
        next += 1;
    }
    found.retain(|pid| processes.contains_key(pid));
    found
}

/// CPU time of `root` and everything below it. Children that ended are counted with the parent
/// that waited for them.
pub(crate) fn cpu_seconds(root: u32) -> f64 {
    let processes = all();
    let members = members(&processes, root);
    let ticks: u64 =
        members.iter().filter_map(|pid| processes.get(pid)).map(|s| s.own + s.children).sum();
    ticks as f64 / TICKS_PER_SECOND
}

/// CPU time of this process alone.
pub(crate) fn own_cpu_seconds() -> f64 {
    stat(std::process::id()).map_or(0.0, |s| s.own as f64 / TICKS_PER_SECOND)
}

/// CPU time of threads, by (process, thread).
#[derive(Debug, Default)]
pub(crate) struct ThreadTimes(HashMap<(u32, u32), (String, u64)>);

impl ThreadTimes {
    /// What was used since `earlier`, as shares of one CPU: all together, and the busiest.
    /// Threads that ended in between are not seen.
    pub(crate) fn since(&self, earlier: &ThreadTimes, seconds: f64) -> (f64, Busiest) {
        let mut total = 0;
        let mut busiest = Busiest::default();
        for (id, (name, ticks)) in &self.0 {
            let used = ticks.saturating_sub(earlier.0.get(id).map_or(0, |(_, before)| *before));
            total += used;
            let share = used as f64 / TICKS_PER_SECOND / seconds;
            if share > busiest.share {
                busiest = Busiest { name: name.clone(), share };
            }
        }
        (total as f64 / TICKS_PER_SECOND / seconds, busiest)
    }
}

/// CPU time of every thread of `root` and everything below it.
pub(crate) fn thread_times(root: u32) -> ThreadTimes {
    threads_of(&tree(root))
}

/// CPU time of every thread of this process, without its children.
pub(crate) fn own_thread_times() -> ThreadTimes {
    threads_of(&[std::process::id()])
}

/// (process, thread) of `root` and everything below it.
pub(crate) fn thread_ids(root: u32) -> Vec<(u32, u32)> {
    thread_times(root).0.into_keys().collect()
}

fn threads_of(pids: &[u32]) -> ThreadTimes {
    let mut times = HashMap::new();
    for &pid in pids {
        let Ok(entries) = fs::read_dir(format!("/proc/{pid}/task")) else { continue };
        let program = program(pid);
        for tid in entries.filter_map(|e| e.ok()?.file_name().to_str()?.parse::<u32>().ok()) {
            let Some((name, stat)) = named_stat(&format!("/proc/{pid}/task/{tid}/stat")) else {
                continue;
            };
            let name = match &program {
                Some(program) if tid == pid => program.clone(),
                Some(program) => format!("{program}, {name}"),
                None => name,
            };
            times.insert((pid, tid), (name, stat.own));
        }
    }
    ThreadTimes(times)
}

/// What a process is, where the name of its main thread does not tell: Node runs scripts, and
/// Postgres writes what a process does into its command line.
fn program(pid: u32) -> Option<String> {
    let line = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    let words: Vec<String> =
        line.split(|b| *b == 0).map(|word| String::from_utf8_lossy(word).into_owned()).collect();
    let script = words.iter().find(|word| word.ends_with(".js") || word.ends_with(".ts"));
    if let Some(script) = script {
        return script.rsplit('/').next().map(str::to_owned);
    }
    words.first().filter(|word| word.starts_with("postgres: ")).map(|word| {
        // "postgres: postgres postgres 127.0.0.1(1234) UPDATE": without what changes.
        let plain = word.split('(').next().unwrap_or(word);
        plain.trim_start_matches("postgres: ").trim().chars().take(40).collect()
    })
}

/// CPUs of the machine, whether this process may use them or not.
pub(crate) fn machine_cpus() -> usize {
    let text = fs::read_to_string("/proc/stat").unwrap_or_default();
    let is_cpu = |line: &&str| {
        line.strip_prefix("cpu").is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()))
    };
    text.lines().filter(is_cpu).count().max(1)
}

/// Seconds for which CPUs of the machine were busy, all together.
pub(crate) fn machine_busy_seconds() -> f64 {
    let text = fs::read_to_string("/proc/stat").unwrap_or_default();
    let fields: Vec<u64> = text
        .lines()
        .next()
        .map(|line| line.split_whitespace().skip(1).filter_map(|n| n.parse().ok()).collect())
        .unwrap_or_default();
    // user nice system idle iowait irq softirq steal: all but idle and iowait.
    let busy: u64 = fields
        .iter()
        .take(8)
        .enumerate()
        .filter(|(i, _)| !(3..=4).contains(i))
        .map(|(_, n)| n)
        .sum();
    busy as f64 / TICKS_PER_SECOND
}

/// Memory of `root` and everything below it, pages shared with others in proportion (PSS).
pub(crate) fn pss_bytes(root: u32) -> u64 {
    tree(root).iter().filter_map(|pid| pss(*pid)).sum()
}

/// Memory of this process alone.
pub(crate) fn own_pss_bytes() -> u64 {
    pss(std::process::id()).unwrap_or(0)
}

fn pss(pid: u32) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?;
    let line = text.lines().find(|l| l.starts_with("Pss:"))?;
    Some(line.split_whitespace().nth(1)?.parse::<u64>().ok()? * 1024)
}

/// The child of this process whose command line contains `text`.
pub(crate) fn child_with_argument(text: &str) -> Option<u32> {
    let me = std::process::id();
    let processes = all();
    processes.iter().filter(|(_, s)| s.parent == me).map(|(pid, _)| *pid).find(|pid| {
        fs::read(format!("/proc/{pid}/cmdline"))
            .is_ok_and(|line| line.split(|b| *b == 0).any(|arg| arg == text.as_bytes()))
    })
}

/// CPU model and count, and memory: what the figures depend on.
pub(crate) fn hardware() -> String {
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let field = |text: &str, name: &str| {
        let line = text.lines().find(|l| l.starts_with(name))?;
        Some(line.split_once(':')?.1.trim().to_owned())
    };
    let model = field(&info, "model name").unwrap_or_else(|| "unknown CPU".to_owned());
    let cpus = machine_cpus();
    let memory = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kib: u64 = field(&memory, "MemTotal")
        .and_then(|m| m.split_whitespace().next()?.parse().ok())
        .unwrap_or(0);
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let gib = kib as f64 / f64::from(1 << 20);
    format!("{cpus} × {model}, {gib:.0} GiB, Linux {}", kernel.trim())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_busy_child_is_found_and_counted() {
        let me = std::process::id();
        let before = cpu_seconds(me);
        let mut child = std::process::Command::new("sh")
            .args(["-c", "i=0; while [ $i -lt 300000 ]; do i=$((i+1)); done; read x", "marker-arg"])
            .stdin(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        assert_eq!(child_with_argument("marker-arg"), Some(child.id()));
        assert!(tree(me).contains(&child.id()));
        assert!(pss_bytes(child.id()) > 10_000);
        drop(child.stdin.take());
        child.wait().unwrap();
        // The work of a child that ended stays on the account.
        assert!(cpu_seconds(me) > before);
    }
}
