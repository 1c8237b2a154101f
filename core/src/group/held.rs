//! The rows of queries that come or go, taken at one version of the engine: references, a slice at
//! a time. The engine may go on between two slices; if that reaches a query of which some rows were
//! taken, they are taken anew.

use std::collections::VecDeque;
use std::sync::Arc;

use super::compute::Course;
use super::interface::World;
use crate::cvr::QueryHash;
use crate::ivm::engine::InstanceId;
use crate::ivm::scan::{RowsAt, Visited};
use crate::row::RowRef;
use crate::schema::TableSpec;
use crate::version::StateVersion;

/// Rows that are taken at once: about a millisecond.
const SLICE_REFS: usize = if cfg!(test) { 4 } else { 10_000 };
/// A query that changes all the time is taken in one go after so many attempts.
const MOST_ATTEMPTS: u32 = 4;

/// The rows of a query that comes or goes.
#[derive(Debug)]
pub(super) struct HeldQuery {
    pub(super) query: QueryHash,
    pub(super) course: Course,
    pub(super) tables: Vec<Arc<TableSpec>>,
    /// Index of the table, row, count.
    pub(super) rows: VecDeque<(usize, RowRef, i64)>,
    instance: InstanceId,
    at: RowsAt,
}

/// Rows on their way; see the [module](self).
#[derive(Debug)]
pub(super) struct Taking {
    pub(super) held: VecDeque<HeldQuery>,
    known_at: Option<StateVersion>,
    /// Rows that were taken in vain.
    void: VecDeque<(usize, RowRef, i64)>,
    attempts: u32,
}

impl Taking {
    /// Of these queries: which, their instances, and what becomes of them. With `known_at`: only
    /// rows that changed since.
    pub(super) fn of<'q>(
        queries: impl Iterator<Item = (&'q QueryHash, InstanceId, Course)>,
        known_at: Option<StateVersion>,
    ) -> Taking {
        let held = queries.map(|(query, instance, course)| HeldQuery {
            query: query.clone(),
            course,
            tables: Vec::new(),
            rows: VecDeque::new(),
            instance,
            at: RowsAt::default(),
        });
        Taking { held: held.collect(), known_at, void: VecDeque::new(), attempts: 1 }
    }

    /// Takes a slice; true when all rows are taken, and are those of the world's version.
    ///
    /// # Errors
    /// Why a query's rows cannot be taken.
    pub(super) fn step(&mut self, world: &mut dyn World) -> Result<bool, String> {
        let mut left = SLICE_REFS;
        let known_at = self.known_at.as_ref();
        let gone = self.void.len().min(left);
        self.void.drain(..gone);
        left -= gone;
        for of in &mut self.held {
            loop {
                if self.attempts > MOST_ATTEMPTS {
                    left = usize::MAX;
                }
                let before = of.rows.len();
                match of
                    .step(world, left, known_at)
                    .map_err(|why| format!("query {}: {why}", of.query))?
                {
                    Visited::All => {
                        left = left.saturating_sub(of.rows.len() - before);
                        break;
                    }
                    Visited::Part => return Ok(false),
                    Visited::Void => {
                        self.attempts += 1;
                        self.void.append(&mut of.rows);
                        of.tables.clear();
                        of.at = RowsAt::default();
                    }
                }
            }
        }
        Ok(true)
    }
}

impl HeldQuery {
    fn step(
        &mut self,
        world: &mut dyn World,
        most: usize,
        known_at: Option<&StateVersion>,
    ) -> Result<Visited, String> {
        let HeldQuery { tables, rows, instance, at, .. } = self;
        // Also of one that is through: whether it is still what it was.
        world.rows(*instance, at, most, &mut |table, row, count| {
            if known_at.is_some_and(|at| row.version <= *at) {
                return;
            }
            // Few tables, and rows of one come together.
            let known = tables.iter().rposition(|known| Arc::ptr_eq(known, table));
            let table = known.unwrap_or_else(|| {
                tables.push(table.clone());
                tables.len() - 1
            });
            rows.push_back((table, row.clone(), i64::try_from(count).unwrap_or(i64::MAX)));
        })
    }
}
