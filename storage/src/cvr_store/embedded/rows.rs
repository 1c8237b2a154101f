//! Rows that follow, written in slices between batches (spec: view-syncer-cvr §2.7).
//!
//! Slices are transactions of their own. Until the last one, `groups.rows_version` says that the
//! rows are not those of the group's version, so nobody takes them; a crash leaves them so. Only
//! slices that end a group are synced, with all before them.

use std::collections::VecDeque;
use std::sync::Arc;

use zeroring_core::cvr::store::CvrStoreError;
use zeroring_core::cvr::{ClientGroupId, GroupFlush};

use super::super::Answer;
use super::super::owed::{Owed, Part, RowsPlan};
use super::ReaderMessage;
use super::write::Writer;

/// Rows of one slice: a few milliseconds that a batch of flushes may have to wait.
const SLICE_ROWS: usize = 1_000;

/// A group whose rows are being written.
struct Writing {
    group: ClientGroupId,
    parts: VecDeque<Part>,
    /// Rows of the first part that are written.
    written: usize,
}

/// What is owed, and how far it is written.
pub(super) struct RowsToWrite {
    owed: Arc<Owed<ReaderMessage>>,
    /// Takes requests that waited for rows.
    ready: Box<dyn Fn(ReaderMessage)>,
    turns: VecDeque<ClientGroupId>,
    current: Option<Writing>,
}

impl RowsToWrite {
    pub(super) fn new(
        owed: Arc<Owed<ReaderMessage>>,
        ready: Box<dyn Fn(ReaderMessage)>,
    ) -> RowsToWrite {
        RowsToWrite { owed, ready, turns: VecDeque::new(), current: None }
    }

    /// Nothing is owed.
    pub(super) fn is_empty(&self) -> bool {
        self.current.is_none() && self.turns.is_empty()
    }

    /// What becomes of a flush's rows.
    pub(super) fn plan(&self, flush: &GroupFlush) -> RowsPlan {
        // There is room ([`RowsToWrite::make_room`]); one batch may go beyond it.
        let plan = self.owed.plan(&flush.group, flush.rows.len(), 0);
        plan.unwrap_or(RowsPlan::FollowOwed)
    }

    /// Rows of a flush that is committed.
    pub(super) fn add(&mut self, group: &ClientGroupId, part: Part) {
        if self.owed.add(group, part) {
            self.turns.push_back(group.clone());
        }
        self.owed.coalesce(group);
    }

    /// Writes until more may be owed.
    pub(super) fn make_room(&mut self, writer: &mut Writer) {
        while self.owed.is_full() && !self.is_empty() {
            self.write_slice(writer);
        }
    }

    /// Writes some rows, of several groups if they have few.
    pub(super) fn write_slice(&mut self, writer: &mut Writer) {
        if self.is_empty() {
            return;
        }
        let mut ended: Vec<(ClientGroupId, Answer<()>)> = Vec::new();
        // A slice in the middle of a large flush ends nothing.
        let ends = self.current.as_ref().is_none_or(|w| w.left() <= SLICE_ROWS);
        let done = writer
            .set_synced(ends)
            .and_then(|()| writer.begin())
            .and_then(|()| self.write_some(writer, &mut ended))
            .and_then(|()| writer.commit())
            .inspect_err(|_| writer.roll_back());
        let done = if ends { done } else { done.and(writer.set_synced(true)) };
        if let Err(error) = &done {
            // Neither what was written in this slice nor what comes after it can be kept.
            ended.iter_mut().for_each(|(_, result)| *result = Err(error.clone()));
            ended.extend(self.current.take().map(|w| (w.group, Err(error.clone()))));
        }
        for (group, result) in ended {
            self.end(group, &result);
        }
    }

    fn write_some(
        &mut self,
        writer: &mut Writer,
        ended: &mut Vec<(ClientGroupId, Answer<()>)>,
    ) -> Answer<()> {
        let mut budget = SLICE_ROWS;
        while budget > 0 {
            let mut now = match self.current.take() {
                Some(writing) => writing,
                None => {
                    let Some(group) = self.turns.pop_front() else { return Ok(()) };
                    let parts = self.owed.take(&group).into();
                    Writing { group, parts, written: 0 }
                }
            };
            // A group without rows takes time, too.
            budget -= 1;
            match now.write(writer, &mut budget) {
                Ok(None) => self.current = Some(now),
                Ok(Some(())) => ended.push((now.group, Ok(()))),
                Err(error @ CvrStoreError::Damaged { .. }) => ended.push((now.group, Err(error))),
                Err(error) => {
                    self.current = Some(now);
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    fn end(&mut self, group: ClientGroupId, result: &Answer<()>) {
        if let Err(error) = result {
            tracing::warn!(%group, %error, "rows of a CVR are lost: its clients will start afresh");
        }
        let released = self.owed.done(&group, result);
        released.ready.into_iter().for_each(&self.ready);
        if released.more {
            self.turns.push_back(group);
        }
    }
}

impl Writing {
    fn left(&self) -> usize {
        self.parts.iter().map(|part| part.rows.len()).sum::<usize>() - self.written
    }

    /// Writes at most `budget` rows; `Some` when all are written.
    fn write(&mut self, writer: &mut Writer, budget: &mut usize) -> Answer<Option<()>> {
        while let Some(part) = self.parts.front() {
            let now = (part.rows.len() - self.written).min(*budget);
            let slice = &part.rows[self.written..self.written + now];
            writer.write_owed_rows(&self.group, slice)?;
            *budget -= now;
            self.written += now;
            if self.written < part.rows.len() {
                return Ok(None);
            }
            if self.parts.len() == 1 {
                writer.set_rows_version(&self.group, &part.version)?;
            }
            self.parts.pop_front();
            self.written = 0;
        }
        Ok(Some(()))
    }
}
