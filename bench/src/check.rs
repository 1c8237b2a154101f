//! Regressions without a clock: what a batch of each bench counts, against committed figures.
//!
//! Two counts are independent of what else the machine does:
//!
//! - **allocations** of Rust code (calls and bytes), by a counting allocator in this program.
//!   Needs nothing; what SQLite allocates is its own and not counted. Checked by `make test`.
//! - **instructions**, by running each bench under `valgrind --tool=callgrind` twice, with
//!   different numbers of batches; the difference is free of the set-up. Needs valgrind, but no
//!   hardware counters and no permission, which virtual machines and CI do not give.
//!
//! A count above its base by more than the tolerance fails; one below asks for a new base.

use std::alloc::{GlobalAlloc, Layout, System};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::{BENCHES, Batch, Bench, Failure, run};

/// Batches before counting: caches and tables have their sizes then.
const WARM_UP: u64 = 3;

/// Batches that are counted.
const BATCHES: u64 = 4;

/// A count may exceed its base by this share: hash tables and vectors grow in leaps.
const ALLOCATIONS_TOLERANCE: f64 = 0.15;

/// Code is laid out differently by other compilers and processors.
const INSTRUCTIONS_TOLERANCE: f64 = 0.10;

/// The committed figures: lines of `name allocations bytes instructions`, per unit of work.
const BASE: &str = include_str!("../base.txt");

/// Counts allocations of all threads while it is switched on.
pub(crate) struct Counting;

static ON: AtomicBool = AtomicBool::new(false);
static CALLS: AtomicU64 = AtomicU64::new(0);
static BYTES: AtomicU64 = AtomicU64::new(0);

impl Counting {
    fn note(bytes: usize) {
        if ON.load(Ordering::Relaxed) {
            CALLS.fetch_add(1, Ordering::Relaxed);
            BYTES.fetch_add(bytes as u64, Ordering::Relaxed);
        }
    }
}

// SAFETY: everything is passed on to the system's allocator unchanged; counting touches no memory
// but two atomics.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        Counting::note(layout.size());
        // SAFETY: the caller's promise about `layout` is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: `at` came from `System` with this layout.
        unsafe { System.dealloc(at, layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        Counting::note(size);
        // SAFETY: `at` came from `System` with this layout; `size` is the caller's promise.
        unsafe { System.realloc(at, layout, size) }
    }
}

/// Does something whose allocations do not count.
pub(crate) fn uncounted<T>(work: impl FnOnce() -> T) -> T {
    let counting = ON.swap(false, Ordering::SeqCst);
    let result = work();
    ON.store(counting, Ordering::SeqCst);
    result
}

/// What one unit of a bench's work counts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Counts {
    pub(crate) allocations: f64,
    pub(crate) bytes: f64,
    /// None: not counted.
    pub(crate) instructions: Option<f64>,
}

/// Allocations per unit of work. The counter is the process's: one bench at a time.
pub(crate) fn allocations(bench: &Bench) -> Result<Counts, Failure> {
    let mut batch: Batch = (bench.make)()?;
    for _ in 0..WARM_UP {
        run(bench, &mut batch)?;
    }
    let before = (CALLS.load(Ordering::SeqCst), BYTES.load(Ordering::SeqCst));
    ON.store(true, Ordering::SeqCst);
    let mut units = 0;
    for _ in 0..BATCHES {
        units += run(bench, &mut batch)?;
    }
    ON.store(false, Ordering::SeqCst);
    let per_unit = |now: u64, before: u64| (now - before) as f64 / units as f64;
    Ok(Counts {
        allocations: per_unit(CALLS.load(Ordering::SeqCst), before.0),
        bytes: per_unit(BYTES.load(Ordering::SeqCst), before.1),
        instructions: None,
    })
}

/// Instructions per unit of work, by valgrind.
fn instructions(bench: &Bench) -> Result<f64, Failure> {
    let counted = |batches: u64| -> Result<(f64, f64), Failure> {
        let me = std::env::current_exe()?;
        let output = Command::new("valgrind")
            .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
            .arg(me)
            .args(["--count", bench.name, &batches.to_string()])
            .output()
            .map_err(|e| format!("valgrind: {e}. Install it (Debian: apt-get install valgrind)"))?;
        let text = String::from_utf8_lossy(&output.stderr);
        let events = text.lines().find_map(|l| l.split_once("Collected : "));
        let events = events.and_then(|(_, n)| n.split_whitespace().next()?.parse::<f64>().ok());
        let events = events.ok_or_else(|| format!("{}: valgrind said {text}", bench.name))?;
        let units = String::from_utf8_lossy(&output.stdout);
        let units = units.split(' ').next().and_then(|n| n.parse::<f64>().ok());
        Ok((events, units.ok_or("no units were printed")?))
    };
    let (few, many) = (counted(WARM_UP)?, counted(WARM_UP + BATCHES)?);
    Ok((many.0 - few.0) / (many.1 - few.1))
}

fn base() -> Result<BTreeMap<&'static str, Counts>, Failure> {
    let mut all = BTreeMap::new();
    for line in BASE.lines().filter(|l| !l.starts_with('#') && !l.trim().is_empty()) {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let [name, allocations, bytes, instructions] = fields.as_slice() else {
            return Err(format!("base.txt: {line:?} has not four fields").into());
        };
        let counts = Counts {
            allocations: allocations.parse()?,
            bytes: bytes.parse()?,
            instructions: instructions.parse().ok(),
        };
        all.insert(*name, counts);
    }
    Ok(all)
}

/// What is wrong with `found`, if it is more than `base` by more than the tolerance. Half a unit
/// is never a regression: counts near zero jump.
fn excess(what: &str, found: f64, base: f64, tolerance: f64) -> Option<String> {
    (found > base * (1.0 + tolerance) + 0.5)
        .then(|| format!("{found:.1} {what}, the base is {base:.1}"))
}

fn complaints(name: &str, found: Counts, base: Counts) -> Vec<String> {
    let allocations =
        excess("allocations", found.allocations, base.allocations, ALLOCATIONS_TOLERANCE);
    let instructions = found
        .instructions
        .zip(base.instructions)
        .and_then(|(found, base)| excess("instructions", found, base, INSTRUCTIONS_TOLERANCE));
    let bytes = excess("bytes", found.bytes, base.bytes, ALLOCATIONS_TOLERANCE);
    let all = [allocations, bytes, instructions].into_iter().flatten();
    all.map(|what| format!("{name}: {what} per unit of work")).collect()
}

/// Compares every bench whose name contains `filter`; prints the lines of a new `base.txt`.
pub(crate) fn check(filter: &str, with_instructions: bool) -> Result<(), Failure> {
    let base = base()?;
    let mut failed = String::new();
    println!("# per unit of work: name allocations bytes instructions");
    for bench in BENCHES.iter().filter(|b| b.steady && b.name.contains(filter)) {
        let mut counts = allocations(bench)?;
        if with_instructions {
            counts.instructions = Some(instructions(bench)?);
        }
        let shown = counts.instructions.map_or("-".to_owned(), |n| format!("{n:.0}"));
        println!("{} {:.2} {:.1} {shown}", bench.name, counts.allocations, counts.bytes);
        match base.get(bench.name) {
            Some(base) => complaints(bench.name, counts, *base).iter().for_each(|c| {
                let _ = writeln!(failed, "{c}");
            }),
            None => {
                let _ = writeln!(failed, "{}: has no line in bench/base.txt", bench.name);
            }
        }
    }
    if failed.is_empty() {
        return Ok(());
    }
    failed.push_str("If that is meant, put the lines above into bench/base.txt.");
    Err(failed.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_than_the_tolerance_fails_and_less_does_not() {
        let base = Counts { allocations: 100.0, bytes: 1000.0, instructions: Some(5000.0) };
        assert!(complaints("x", base, base).is_empty());
        let less = Counts { allocations: 10.0, bytes: 10.0, instructions: None };
        assert!(complaints("x", less, base).is_empty());
        let more = Counts { allocations: 117.0, bytes: 1010.0, instructions: Some(6000.0) };
        let found = complaints("x", more, base);
        assert_eq!(found.len(), 2, "{found:?}");
        assert!(found[0].contains("117.0 allocations, the base is 100.0"), "{found:?}");
        let none = Counts { allocations: 0.0, bytes: 0.0, instructions: None };
        assert!(complaints("x", Counts { allocations: 0.4, ..none }, none).is_empty());
    }
}
