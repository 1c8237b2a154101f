//! Group commit: what waits is written in as few transactions as its failures allow.
//!
//! A batch is one transaction. If Postgres refuses a record, the batch is halved until only the
//! group that it belongs to fails. Groups that are locked by others go to the slow lane, where each
//! is taken alone and waits.
//!
//! *A lost connection* leaves in doubt whether the transaction was committed. It is run again, with
//! a gate that also recognises its own work: version, owner, connection, activity, clock and
//! profile of the stored group are exactly ours, and its version is not the one we started from.
//! Nobody else writes that, so the group was committed; otherwise it is committed now or refused.
//! (If the lost transaction is still to come, it finds another version than it expects.)

use std::collections::HashSet;

use tracing::warn;
use zeroring_core::cvr::store::{CvrStoreError, Flushed, Purged};
use zeroring_core::cvr::{ClientGroupId, GroupFlush, TtlClock};
use zeroring_core::version::CvrVersion;
use zeroring_net::pg::{Client, Param, PgError, SqlState};

use super::super::owed::Part;
use super::super::{Answer, PurgeLimits};
use super::batch::{Batch, Item, Locked, Outcome};
use super::params::{Records, wall};
use super::rows;
use super::session::{Session, Shared};
use super::sql::purge_delete;

/// Groups of which it is remembered that their client schema is stored. Beyond it, all are
/// forgotten: their schemas are sent once more.
const MAX_KNOWN_SCHEMAS: usize = 200_000;
/// Attempts of a single group that deadlocks with others.
const ATTEMPTS: usize = 4;
/// Attempts to write a group that somebody holds, of ten seconds each. If the rows that are owed of
/// it are given up, it is lost.
pub(super) const HELD_ATTEMPTS: usize = 30;

pub(super) fn failed(error: PgError) -> CvrStoreError {
    CvrStoreError::Storage(error.to_string())
}

/// Writes through a worker's connection.
#[derive(Debug)]
pub(super) struct Writer<'w> {
    pub(super) session: &'w mut Session,
    /// Groups whose client schema, which never changes, is stored: it is not sent again.
    pub(super) known_schemas: &'w mut HashSet<ClientGroupId>,
}

impl Writer<'_> {
    /// Commits groups, each at most once among them; waits for nobody's locks.
    pub(super) fn commit(&mut self, items: &[Item<'_>]) -> Vec<Settled> {
        let mut settled: Vec<_> = items.iter().map(|_| None).collect();
        let at: Vec<usize> = (0..items.len()).collect();
        self.commit_some(items, &at, false, &mut settled);
        let lost = || Settled::Verdict(Err(CvrStoreError::Storage("no verdict".to_owned())));
        settled.into_iter().map(|v| v.unwrap_or_else(lost)).collect()
    }

    /// Commits the flushes at these positions, all at once if possible.
    fn commit_some(
        &mut self,
        items: &[Item<'_>],
        at: &[usize],
        mut maybe_done: bool,
        settled: &mut [Option<Settled>],
    ) {
        if let [one] = at {
            settled[*one] = Some(self.commit_one(items[*one], Locked::Skip, maybe_done));
            return;
        }
        let chosen: Vec<_> = at.iter().map(|n| items[*n]).collect();
        match self.attempt(&chosen, Locked::Skip, &mut maybe_done) {
            Ok(outcomes) => {
                for (n, outcome) in at.iter().zip(outcomes) {
                    settled[*n] = Some(Settled::of(outcome, maybe_done));
                }
            }
            // One of them is to blame, or the database: find out which.
            Err(CommitError::Malformed(_) | CommitError::Refused(_)) => {
                let (first, second) = at.split_at(at.len() / 2);
                self.commit_some(items, first, maybe_done, settled);
                self.commit_some(items, second, maybe_done, settled);
            }
            Err(CommitError::Unreachable(error)) => {
                for n in at {
                    settled[*n] = Some(Settled::Verdict(Err(error.clone())));
                }
            }
        }
    }

    /// Commits a group that [`Writer::commit`] found locked; waits for its lock, but not so long
    /// that nobody else has a turn.
    pub(super) fn commit_waiting(&mut self, item: Item<'_>, maybe_done: bool) -> Settled {
        self.commit_one(item, Locked::Wait, maybe_done)
    }

    fn commit_one(&mut self, item: Item<'_>, locked: Locked, mut maybe_done: bool) -> Settled {
        let mut attempt = 1;
        loop {
            let refused = match self.attempt(&[item], locked, &mut maybe_done) {
                Ok(outcomes) => {
                    let outcome = outcomes.into_iter().next().unwrap_or(Outcome::Locked);
                    if locked == Locked::Wait && matches!(outcome, Outcome::Locked) {
                        // It came into being, or went, while we waited.
                        return Settled::Verdict(Err(CvrStoreError::ConcurrentModification {
                            expected: item.flush.expected.cookie(),
                            actual: CvrVersion::empty().cookie(),
                        }));
                    }
                    return Settled::of(outcome, maybe_done);
                }
                Err(CommitError::Malformed(error) | CommitError::Unreachable(error)) => {
                    return Settled::Verdict(Err(error));
                }
                Err(CommitError::Refused(error)) => error,
            };
            let Some(code) = refused.code() else {
                return Settled::Verdict(Err(failed(refused)));
            };
            // Somebody else flushes it for the first time, or holds it for long.
            if code == SqlState::LOCK_NOT_AVAILABLE {
                return Settled::Locked { maybe_done };
            }
            if is_transient(code) && attempt < ATTEMPTS {
                attempt += 1;
                continue;
            }
            return Settled::Verdict(Err(refusal(&item.flush.group, refused)));
        }
    }

    /// Writes rows that follow, each group's at once; what became of each.
    pub(super) fn write_rows(&mut self, owed: &[(ClientGroupId, Vec<Part>)]) -> Vec<Answer<()>> {
        let error = match self.write_rows_of(owed) {
            Ok(()) => return owed.iter().map(|_| Ok(())).collect(),
            Err(error) => error,
        };
        match (owed, error) {
            ([(group, _)], error) => vec![Err(refusal(group, error))],
            // One of them is to blame: find out which.
            (owed, PgError::Server(_)) => {
                let (first, second) = owed.split_at(owed.len() / 2);
                let mut results = self.write_rows(first);
                results.extend(self.write_rows(second));
                results
            }
            (owed, error) => {
                let error = failed(error);
                owed.iter().map(|_| Err(error.clone())).collect()
            }
        }
    }

    fn write_rows_of(&mut self, owed: &[(ClientGroupId, Vec<Part>)]) -> Result<(), PgError> {
        let shared = self.session.shared.clone();
        let mut attempt = 1;
        loop {
            let written =
                self.session.run(|client, again| Ok((rows::write(client, &shared, owed)?, again)));
            match written {
                // Twice written rows are not found as they were.
                Ok((missing, false)) if missing > 0 => {
                    warn!(
                        groups = owed.len(),
                        rows = missing,
                        "rows changed that the CVR did not hold as live"
                    );
                    return Ok(());
                }
                Ok(_) => return Ok(()),
                Err(error) => {
                    let attempts = match error.code() {
                        Some(code) if is_transient(code) => ATTEMPTS,
                        // Of several groups it is found out first which one it is.
                        Some(SqlState::LOCK_NOT_AVAILABLE) if owed.len() == 1 => HELD_ATTEMPTS,
                        _ => 0,
                    };
                    if attempt >= attempts {
                        return Err(error);
                    }
                    attempt += 1;
                }
            }
        }
    }

    fn attempt(
        &mut self,
        items: &[Item<'_>],
        locked: Locked,
        maybe_done: &mut bool,
    ) -> Result<Vec<Outcome>, CommitError> {
        let known = &*self.known_schemas;
        let sends_schema = |flush: &GroupFlush| {
            flush.expected == CvrVersion::empty() || !known.contains(&flush.group)
        };
        let shared = self.session.shared.clone();
        let mut batch =
            Batch::new(&shared, items, locked, sends_schema).map_err(CommitError::Malformed)?;
        let outcomes = self.session.run(|client, again| {
            *maybe_done |= again;
            batch.run(client, &shared, *maybe_done)
        });
        let outcomes = outcomes.map_err(CommitError::of)?;
        for (Item { flush, .. }, outcome) in items.iter().zip(&outcomes) {
            if flush.instance.client_schema.is_some() && matches!(outcome, Outcome::Done(Ok(_))) {
                if self.known_schemas.len() >= MAX_KNOWN_SCHEMAS {
                    self.known_schemas.clear();
                }
                self.known_schemas.insert(flush.group.clone());
            }
        }
        Ok(outcomes)
    }

    /// Notes groups' clocks. Groups that are unknown, or being flushed, are left alone.
    pub(super) fn ttl_clocks(&mut self, clocks: &[(ClientGroupId, TtlClock, f64)]) {
        let mut records = Records::<3>::new();
        let mut seen = HashSet::new();
        // The last one of a group counts.
        for (group, clock, now_ms) in clocks.iter().rev().filter(|c| seen.insert(&c.0)) {
            records.push([group.as_str().into(), clock.0.into(), wall(*now_ms).into()]);
        }
        let params: Vec<_> = records.take().collect();
        let shared = self.session.shared.clone();
        let done = self.session.run(|client, _| {
            transaction(client, &shared, &[(shared.sql.ttl_clocks.as_str(), &params)]).map(drop)
        });
        if let Err(error) = done {
            warn!(groups = clocks.len(), %error, "TTL clocks were not written");
        }
    }

    /// One round of purging.
    pub(super) fn purge(&mut self, limits: &PurgeLimits, schema: &str) -> Answer<Purged> {
        let since = Param::from(limits.now_ms - limits.inactive_ms);
        let find = [since.clone(), Param::from(limits.batch as i64)];
        let forget = [Param::from(limits.now_ms - limits.tombstone_ms())];
        let shared = self.session.shared.clone();
        let deletes = ["desires", "queries", "clients", "rows", "rowsVersion"]
            .map(|t| purge_delete(t, schema));
        let sql = &shared.sql;
        let mut statements: Vec<(&str, &[Param])> = vec![(&sql.purge_find, &find)];
        statements.extend(deletes.iter().map(|d| (d.as_str(), &[][..])));
        statements.push((&sql.purge_bury, &[]));
        statements.push((&sql.purge_forget, &forget));
        statements.push((&sql.purge_rest, std::slice::from_ref(&since)));
        let last = statements.len() - 1;
        self.session
            .run(|client, _| {
                let results = transaction(client, &shared, &statements)?;
                let count = |at: usize| -> Result<usize, PgError> {
                    Ok(results[at].rows.first().map_or(Ok(0), |r| r.get::<i64>(0))? as usize)
                };
                Ok(Purged {
                    groups: count(0)?,
                    tombstones: results[last - 1].affected() as usize,
                    remaining: count(last)?,
                })
            })
            .map_err(failed)
    }
}

/// It may go well the next time.
fn is_transient(code: SqlState) -> bool {
    matches!(code, SqlState::DEADLOCK_DETECTED | SqlState::SERIALIZATION_FAILURE)
}

/// What Postgres' refusal of a single group's records means.
fn refusal(group: &ClientGroupId, refused: PgError) -> CvrStoreError {
    // Classes 22 and 23: a value, or what it refers to.
    match refused.code().as_ref().map(SqlState::as_str) {
        Some(code) if code.starts_with("22") || code.starts_with("23") => CvrStoreError::Damaged {
            group: group.clone(),
            what: format!("a record of a flush is refused: {refused}"),
        },
        _ => failed(refused),
    }
}

/// Why a batch was not committed.
enum CommitError {
    /// A flush contradicts itself.
    Malformed(CvrStoreError),
    /// Postgres does not take it.
    Refused(PgError),
    /// Nothing more can be tried.
    Unreachable(CvrStoreError),
}

impl CommitError {
    fn of(error: PgError) -> CommitError {
        match error {
            PgError::Server(_) => CommitError::Refused(error),
            error => CommitError::Unreachable(failed(error)),
        }
    }
}

/// What became of a flush.
#[derive(Debug)]
pub(super) enum Settled {
    Verdict(Answer<Flushed>),
    /// Another transaction holds the group's lock. An earlier attempt may have committed.
    Locked {
        maybe_done: bool,
    },
}

impl Settled {
    fn of(outcome: Outcome, maybe_done: bool) -> Settled {
        match outcome {
            Outcome::Done(result) => Settled::Verdict(result),
            Outcome::Locked => Settled::Locked { maybe_done },
        }
    }
}

/// Runs statements as one transaction; waits for locks as a single flush does.
pub(super) fn transaction(
    client: &mut Client,
    shared: &Shared,
    statements: &[(&str, &[Param])],
) -> Result<Vec<zeroring_net::pg::QueryResult>, PgError> {
    let limits = [shared.idle_in_transaction.as_str().into(), "10s".into()];
    in_transaction(client, "BEGIN ISOLATION LEVEL READ COMMITTED", shared, &limits, statements)
}

/// Runs reads as one transaction: all they read is of one moment.
pub(super) fn snapshot(
    client: &mut Client,
    shared: &Shared,
    statements: &[(&str, &[Param])],
) -> Result<Vec<zeroring_net::pg::QueryResult>, PgError> {
    let limits = [shared.idle_in_transaction.as_str().into(), "0".into()];
    let begin = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY";
    in_transaction(client, begin, shared, &limits, statements)
}

fn in_transaction(
    client: &mut Client,
    begin: &str,
    shared: &Shared,
    limits: &[Param],
    statements: &[(&str, &[Param])],
) -> Result<Vec<zeroring_net::pg::QueryResult>, PgError> {
    let mut pipeline = client.pipeline()?;
    shared.add(&mut pipeline, begin, &[])?;
    shared.add(&mut pipeline, &shared.sql.limits, limits)?;
    for (sql, params) in statements {
        shared.add(&mut pipeline, sql, params)?;
    }
    shared.add(&mut pipeline, "COMMIT", &[])?;
    match pipeline.run_one() {
        Ok(mut results) => {
            results.pop();
            results.drain(..2);
            Ok(results)
        }
        Err(error) => {
            if !client.is_broken() {
                client.batch_execute("ROLLBACK")?;
            }
            Err(error)
        }
    }
}
