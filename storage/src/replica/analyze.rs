//! Keeps SQLite's statistics true while tables grow.
//!
//! ANALYZE runs over the whole file when a replica is made; after that, tables change. The writer's
//! owner tells an [`Analyzer`] what was committed ([`Analyzer::note`]) and asks it between two
//! transactions, best when the stream is quiet, to do what is due ([`Analyzer::maintain`]): a table
//! of which as many rows changed as half of it has is looked at anew. The cost is bounded: one
//! table at a time, not more often than every [`AnalyzeLimits::pause`], and SQLite reads at most
//! `analysis_limit` rows of each index (1,000, set by the writer): some milliseconds.
//!
//! Readers see the new figures only if they matter. Connections read statistics together with the
//! schema, so the schema's version is raised, which makes each prepare its statements again; it is
//! left alone while no figure changed by more than [`MATTERS`], and such a table has to change
//! twice as much before it is looked at again. What the engine estimates by itself
//! ([`super::estimate`]) follows the same version.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rusqlite::{Connection, OptionalExtension, TransactionBehavior, params};
use zeroring_core::change::Commit;

use super::ReplicaError;
use super::schema::quote_ident;
use super::writer::ReplicaWriter;

/// A figure that changed by this factor may change a plan: `estimate` asks for an advantage of 4.
const MATTERS: f64 = 2.0;

/// When statistics are gathered anew.
#[derive(Debug, Clone)]
pub struct AnalyzeLimits {
    /// Changed rows below which a table is left alone, however small it is.
    pub least_changes: u64,
    /// Share of a table's rows that must have changed.
    pub share: f64,
    /// Between two tables.
    pub pause: Duration,
    /// How long a table may wait for a quiet moment.
    pub patience: Duration,
}

impl Default for AnalyzeLimits {
    fn default() -> Self {
        AnalyzeLimits {
            least_changes: 1_000,
            share: 0.5,
            pause: Duration::from_secs(10),
            patience: Duration::from_secs(60),
        }
    }
}

/// What was done so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct AnalyzeCounters {
    /// Tables looked at.
    pub analyzed: u64,
    /// Of these, those whose figures had changed so much that readers were told.
    pub told: u64,
}

/// What is known of a table.
#[derive(Debug)]
struct Table {
    name: Arc<str>,
    /// Rows that changed since it was last looked at.
    changed: u64,
    /// Rows that must change before it is looked at.
    due: u64,
    /// Grows while looking changes nothing that matters.
    times: u64,
    /// Since when it is due.
    since: Option<Instant>,
}

/// Decides when to gather statistics. One per writer.
#[derive(Debug, Default)]
pub struct Analyzer {
    limits: AnalyzeLimits,
    tables: HashMap<Arc<str>, Table>,
    /// How many are due.
    waiting: usize,
    last: Option<Instant>,
    counters: AnalyzeCounters,
}

impl Analyzer {
    /// An analyzer with these limits.
    pub fn new(limits: AnalyzeLimits) -> Analyzer {
        Analyzer { limits, ..Analyzer::default() }
    }

    /// What was done so far.
    pub fn counters(&self) -> AnalyzeCounters {
        self.counters
    }

    /// Takes note of what a commit changed.
    pub fn note(&mut self, commit: &Commit, writer: &ReplicaWriter) {
        for change in &commit.tables {
            let name = &change.table.name;
            if !self.tables.contains_key(name) {
                let known = rows_known(writer.connection(), name).unwrap_or(0);
                let table = Table {
                    name: name.clone(),
                    changed: 0,
                    due: self.limits.due(known, 1),
                    times: 1,
                    since: None,
                };
                self.tables.insert(name.clone(), table);
            }
            let Some(table) = self.tables.get_mut(name) else { continue };
            table.changed += change.rows.len() as u64;
            if change.truncated {
                table.changed = table.changed.max(table.due);
            }
            if table.changed >= table.due && table.since.is_none() {
                table.since = Some(Instant::now());
                self.waiting += 1;
            }
        }
    }

    /// Looks at one table, if one is due and the moment allows it: `quiet` says that nothing else
    /// is to be done. True if a table was looked at.
    ///
    /// # Errors
    /// [`ReplicaError`] if SQLite fails.
    pub fn maintain(&mut self, writer: &ReplicaWriter, quiet: bool) -> Result<bool, ReplicaError> {
        if self.waiting == 0 || writer.in_transaction() {
            return Ok(false);
        }
        let now = Instant::now();
        if self.last.is_some_and(|last| now - last < self.limits.pause) {
            return Ok(false);
        }
        let longest =
            self.tables.values_mut().filter(|t| t.since.is_some()).min_by_key(|t| t.since);
        let Some(table) = longest else { return Ok(false) };
        if !quiet && table.since.is_some_and(|since| now - since < self.limits.patience) {
            return Ok(false);
        }
        let told = analyze(writer.connection(), &table.name)
            .map_err(ReplicaError::sqlite(writer.path(), "gathering statistics"))?;
        table.times = if told { 1 } else { table.times.saturating_mul(2) };
        let known = rows_known(writer.connection(), &table.name).unwrap_or(0);
        table.due = self.limits.due(known, table.times);
        table.changed = 0;
        table.since = None;
        self.waiting -= 1;
        self.last = Some(now);
        self.counters.analyzed += 1;
        self.counters.told += u64::from(told);
        tracing::debug!(table = %table.name, told, elapsed = ?now.elapsed(), "statistics gathered");
        Ok(true)
    }
}

impl AnalyzeLimits {
    fn due(&self, rows: u64, times: u64) -> u64 {
        let share = (rows as f64 * self.share) as u64;
        share.max(self.least_changes).saturating_mul(times)
    }
}

/// Rows of a table when it was last looked at.
fn rows_known(connection: &Connection, table: &str) -> Option<u64> {
    let of = "SELECT stat FROM sqlite_stat1 WHERE tbl = ? LIMIT 1";
    let stat: String = connection.query_row(of, [table], |r| r.get(0)).optional().ok()??;
    stat.split(' ').next()?.parse().ok()
}

/// Gathers a table's statistics; true if they changed so much that readers were told.
fn analyze(connection: &Connection, table: &str) -> rusqlite::Result<bool> {
    let before = figures(connection, table)?;
    let tx = rusqlite::Transaction::new_unchecked(connection, TransactionBehavior::Immediate)?;
    tx.execute_batch(&format!("ANALYZE main.{}", quote_ident(table)))?;
    let told = differ(&before, &figures(&tx, table)?);
    if told {
        let version: i64 = tx.query_row("PRAGMA schema_version", [], |r| r.get(0))?;
        tx.pragma_update(None, "schema_version", version + 1)?;
    }
    tx.commit()?;
    Ok(told)
}

/// The numbers of each index of a table, and of the table.
fn figures(connection: &Connection, table: &str) -> rusqlite::Result<HashMap<String, Vec<f64>>> {
    // A file without statistics has no table of them either.
    let made = "SELECT 1 FROM sqlite_master WHERE name = 'sqlite_stat1'";
    if connection.query_row(made, [], |_| Ok(())).optional()?.is_none() {
        return Ok(HashMap::new());
    }
    let mut statement =
        connection.prepare("SELECT ifnull(idx, ''), stat FROM sqlite_stat1 WHERE tbl = ?")?;
    let rows = statement.query_map(params![table], |r| {
        let stat: String = r.get(1)?;
        Ok((r.get(0)?, stat.split(' ').map_while(|n| n.parse().ok()).collect()))
    })?;
    rows.collect()
}

fn differ(before: &HashMap<String, Vec<f64>>, after: &HashMap<String, Vec<f64>>) -> bool {
    let far = |a: f64, b: f64| a.max(b).max(1.0) > a.min(b).max(1.0) * MATTERS;
    before.len() != after.len()
        || after.iter().any(|(index, after)| {
            before.get(index).is_none_or(|before| {
                before.len() != after.len() || before.iter().zip(after).any(|(a, b)| far(*a, *b))
            })
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_differ_from_twice_as_much_on() {
        let of = |numbers: &[f64]| HashMap::from([("i".to_owned(), numbers.to_vec())]);
        assert!(!differ(&of(&[100.0, 1.0]), &of(&[200.0, 2.0])));
        assert!(differ(&of(&[100.0, 1.0]), &of(&[201.0, 1.0])));
        assert!(differ(&of(&[100.0, 3.0]), &of(&[100.0, 1.0])));
        assert!(!differ(&of(&[0.0, 1.0]), &of(&[1.0, 1.0])));
        assert!(differ(&HashMap::new(), &of(&[1.0])));
    }
}
