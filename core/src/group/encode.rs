//! The end of an update: its patches become a poke, slice by slice; then it is written
//! (spec: view-syncer-cvr §5.6).

use std::sync::Arc;

use super::compute::{SLICE_ROWS, row_of};
use super::config::bug;
use super::interface::Effect;
use super::machine::{Cx, Group};
use super::op::{Flushing, Stage, Step, StepResult, Sync};
use super::poke::{EncodeError, Encoder, Poke};
use crate::cvr::{PreparedFlush, RowIdentity, VersionedPatch};
use crate::ivm::shards::ShardMap;
use crate::schema::Schema;
use crate::waste::Waste;

/// An update that is computed; its patches are being encoded.
#[derive(Debug)]
pub(super) struct Encoding {
    sync: Box<Sync>,
    schema: Arc<Schema>,
    /// Older than what happens now: they go first, but for rows that the update has patches for.
    missed: std::vec::IntoIter<Vec<VersionedPatch>>,
    rewritten: ShardMap<Arc<RowIdentity>, ()>,
    patches: std::vec::IntoIter<Vec<VersionedPatch>>,
    poke: Poke,
    /// The end of the open poke.
    ends: std::vec::IntoIter<Vec<VersionedPatch>>,
    end: Poke,
    /// `None`: nothing is to be written.
    pub(super) prepared: Option<PreparedFlush>,
}

/// What is to be encoded, in slices.
#[derive(Debug, Default)]
pub(super) struct Patches {
    /// What late clients missed.
    pub(super) missed: Vec<Vec<VersionedPatch>>,
    /// Rows of it that the update has patches for.
    pub(super) rewritten: ShardMap<Arc<RowIdentity>, ()>,
    /// Of the update.
    pub(super) patches: Vec<Vec<VersionedPatch>>,
    /// Of the update, for clients to whom rows went out early.
    pub(super) end: Vec<Vec<VersionedPatch>>,
}

impl Encoding {
    /// With nothing to be written yet.
    pub(super) fn of(sync: Box<Sync>, schema: Arc<Schema>, patches: Patches) -> Encoding {
        let Patches { missed, rewritten, patches, end } = patches;
        Encoding {
            sync,
            schema,
            missed: missed.into_iter(),
            rewritten,
            patches: patches.into_iter(),
            poke: Poke::default(),
            ends: end.into_iter(),
            end: Poke::default(),
            prepared: None,
        }
    }

    /// All of it is left behind.
    pub(super) fn discard(self, waste: &mut Waste) {
        let Encoding { sync, missed, rewritten, patches, poke, ends, end, prepared, .. } = self;
        sync.discard(waste);
        for slices in [missed, patches, ends] {
            waste.pieces(slices, Vec::len);
        }
        waste.rows(rewritten);
        poke.discard(waste);
        end.discard(waste);
        if let Some(PreparedFlush { flush, .. }) = prepared {
            waste.rows(flush.rows);
        }
    }
}

impl Group {
    /// Encodes what late clients missed; nothing is to be written.
    pub(super) fn encode_missed(
        &mut self,
        sync: Box<Sync>,
        missed: Vec<Vec<VersionedPatch>>,
        cx: &mut Cx<'_>,
    ) -> StepResult {
        let patches = Patches { missed, ..Patches::default() };
        let encoding = Encoding::of(sync, cx.world.schema().clone(), patches);
        self.encode_slice(Box::new(encoding), cx)
    }

    /// Encodes a slice of patches; after the last one the update is written.
    pub(super) fn encode_slice(&mut self, mut e: Box<Encoding>, cx: &mut Cx<'_>) -> StepResult {
        if let Err(error) = self.encode_some(&mut e) {
            return Stage::Encoding(e).failed(bug(&error.to_string()), cx);
        }
        if e.patches.len() > 0 || e.missed.len() > 0 || e.ends.len() > 0 {
            cx.emit(Effect::Continue);
            return Ok(Step::Wait(Stage::Encoding(e)));
        }
        cx.leave(|waste| waste.rows(std::mem::take(&mut e.rewritten)));
        let Encoding { sync, poke, end, prepared, .. } = *e;
        let Sync { ack, bring_up, recipients, .. } = *sync;
        let flushing = |cvr| Flushing { cvr, poke, end, recipients, ack, bring_up };
        match prepared {
            Some(prepared) => {
                cx.emit(Effect::Flush(Box::new(prepared.flush)));
                Ok(Step::Wait(Stage::Flushing(Box::new(flushing(Some(prepared.cvr))))))
            }
            None => self.results_flushed(flushing(None), cx),
        }
    }

    fn encode_some(&self, e: &mut Encoding) -> Result<(), EncodeError> {
        let (mut slice, mut ends, mut looked_at) = (Vec::new(), Vec::new(), 0);
        let rewritten = &e.rewritten;
        let stays =
            |p: &VersionedPatch| row_of(&p.patch).is_none_or(|id| !rewritten.contains_key(id));
        while looked_at < SLICE_ROWS
            && let Some(next) = e.missed.next()
        {
            looked_at += next.len();
            slice.extend(next.into_iter().filter(stays));
        }
        while looked_at < SLICE_ROWS
            && let Some(next) = e.patches.next()
        {
            looked_at += next.len();
            slice.extend(next);
        }
        while looked_at < SLICE_ROWS
            && let Some(next) = e.ends.next()
        {
            looked_at += next.len();
            ends.extend(next);
        }
        let encoder =
            Encoder { tables: &self.settings.tables, group: self.id.as_str(), schema: &e.schema };
        e.poke.extend(&encoder, &slice)?;
        e.end.extend(&encoder, &ends)
    }
}
