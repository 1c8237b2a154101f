//! What goes out to clients: pokes, catch-up patches, errors of single queries
//! (spec: view-syncer-cvr §4).

use std::sync::Arc;

use super::config::bug;
use super::interface::{Effect, ResetReason};
use super::machine::{Cx, Group};
use super::op::{Failure, Recipients, Stage, Step, StepResult, Sync, Trigger};
use super::poke::{Encoder, Frame, Poke};
use crate::cvr::store::{CatchupPage, CatchupRange, ConfigChange, RowCursor};
use crate::cvr::{Patch, QueryHash, RowIdentity, RowRecord, VersionedPatch, catchup};
use crate::protocol::custom_query::ErroredQuery;
use crate::protocol::down;
use crate::version::CvrVersion;
use crate::waste::Waste;

/// Rows whose contents are read at once: about a millisecond.
const SLICE_READS: usize = if cfg!(test) { 3 } else { 200 };

/// What late clients missed: read page by page, the rows as they are when their page comes.
///
/// The engine may go on meanwhile. That does no harm: of a row that changes later, the deltas that
/// wait say so, and what the update makes of them takes the place of what was read here.
#[derive(Debug, Default)]
pub(super) struct Missed {
    scan: Option<(CatchupRange, Vec<QueryHash>)>,
    next: Option<RowCursor>,
    /// Records whose contents are still to be read.
    records: std::vec::IntoIter<RowRecord>,
    /// In slices.
    rows: Vec<Vec<VersionedPatch>>,
    config: Vec<ConfigChange>,
    /// Rows that should be there and are not, and why.
    lost: LostRows,
}

/// Rows that are not there, and why.
pub(super) type LostRows = Vec<(Arc<RowIdentity>, String)>;

impl Missed {
    /// What a scan of this range will find.
    pub(super) fn of(range: CatchupRange, except: Vec<QueryHash>) -> Missed {
        Missed { scan: Some((range, except)), ..Missed::default() }
    }

    /// The next page; the one before must have been read.
    pub(super) fn take_page(&mut self, page: CatchupPage) {
        self.records = page.rows.into_iter();
        self.next = page.next;
        self.config.extend(page.config);
    }

    /// Rows of it were not there when they were read.
    pub(super) fn has_lost(&self) -> bool {
        !self.lost.is_empty()
    }

    /// The patches in slices, rows before configuration, and the rows that are lost.
    pub(super) fn into_patches(self) -> (Vec<Vec<VersionedPatch>>, LostRows) {
        let mut patches = self.rows;
        let config = catchup::config_patches(self.config);
        if !config.is_empty() {
            patches.push(config);
        }
        (patches, self.lost)
    }

    /// All of it is left behind.
    pub(super) fn discard(self, waste: &mut Waste) {
        waste.rows(self.records);
        waste.pieces(self.rows, Vec::len);
        waste.rows(self.lost);
    }
}

impl Group {
    /// Reads a slice of the rows of a page, then asks for the next page.
    pub(super) fn read_missed(
        &mut self,
        trigger: Trigger,
        mut sync: Box<Sync>,
        cx: &mut Cx<'_>,
    ) -> StepResult {
        let missed = &mut sync.missed;
        let mut rows = Vec::with_capacity(SLICE_READS.min(missed.records.len()));
        for record in missed.records.by_ref().take(SLICE_READS) {
            let mut failed = None;
            let patch = catchup::row_patch(&record, |id| {
                cx.read_row(id).unwrap_or_else(|why| {
                    failed = Some(why);
                    None
                })
            });
            rows.push(patch.unwrap_or_else(|missing| {
                // The clients cannot have what the replica does not have.
                let why = failed.unwrap_or_else(|| missing.to_string());
                missed.lost.push((record.id.clone(), why));
                VersionedPatch {
                    patch: Patch::RowDel(record.id.clone()),
                    to_version: record.patch_version,
                }
            }));
        }
        if !rows.is_empty() {
            missed.rows.push(rows);
        }
        if missed.records.len() > 0 {
            cx.emit(Effect::Continue);
            return Ok(Step::Wait(Stage::ReadingMissed(sync)));
        }
        match (missed.next.take(), &missed.scan) {
            (Some(from), Some((range, except))) => {
                let (range, except) = (range.clone(), except.clone());
                cx.emit(Effect::CatchUp { range, except, from: Some(from) });
                Ok(Step::Wait(Stage::CatchingUp(sync)))
            }
            _ => self.sync_hydrate(trigger, sync, cx),
        }
    }

    /// A record says that a row is there, and nothing has said that it went: the records are put
    /// right next.
    pub(super) fn lost_rows(&mut self, (_, why): &(Arc<RowIdentity>, String), cx: &mut Cx<'_>) {
        if !self.compare_all {
            self.reset.get_or_insert(ResetReason::LostRow);
        }
        cx.warn(format!("group {}: {why}", self.id));
    }

    pub(super) fn encoder<'a>(&'a self, cx: &'a Cx<'_>) -> Encoder<'a> {
        Encoder {
            tables: &self.settings.tables,
            group: self.id.as_str(),
            schema: cx.world.schema(),
        }
    }

    pub(super) fn encode(&self, patches: &[VersionedPatch], cx: &Cx<'_>) -> Result<Poke, Failure> {
        let mut poke = Poke::default();
        poke.extend(&self.encoder(cx), patches).map_err(|e| bug(&e.to_string()))?;
        Ok(poke)
    }

    /// Sends a poke that ends at the CVR's version.
    pub(super) fn poke(
        &mut self,
        poke: &Poke,
        before: &CvrVersion,
        recipients: Recipients,
        cx: &mut Cx<'_>,
    ) {
        let Some(version) = self.cvr.as_ref().map(|cvr| cvr.version.clone()) else { return };
        let large = poke.is_large();
        let mut frames = poke.frames(&version);
        let shared = &mut cx.world.shared().frames;
        for (conn, client) in self.clients.iter_mut().filter(|(_, c)| c.active) {
            let base = client.base.as_ref();
            let (taken, forced) = match recipients {
                Recipients::All => (true, !client.ever_poked),
                // A new client counts as being at `00`.
                Recipients::AtHead => (base.unwrap_or(&CvrVersion::empty()) == before, false),
            };
            let needs = base.is_none_or(|base| *base < version || (forced && *base == version));
            if !taken || !needs {
                continue;
            }
            let effect = if large {
                let poke = poke.large(base, &version, client.binary);
                Effect::SendLarge(conn, Box::new(poke))
            } else {
                let frames = frames.of(base, client.binary, shared);
                Effect::Send(conn, frames)
            };
            client.base = Some(version.clone());
            client.ever_poked = true;
            cx.out.push(effect);
        }
    }

    /// Tells the clients that have these queries why they failed.
    pub(super) fn tell_errored(&mut self, errored: &[ErroredQuery], cx: &mut Cx<'_>) {
        let Some(cvr) = self.cvr.as_ref().filter(|_| !errored.is_empty()) else { return };
        let mut sends = Vec::new();
        for (conn, client) in self.clients.iter().filter(|(_, c)| c.active) {
            let theirs: Vec<ErroredQuery> = errored
                .iter()
                .filter(|e| {
                    cvr.query(&QueryHash::from(e.id.as_str()))
                        .is_some_and(|q| q.client_state.contains_key(&client.id))
                })
                .cloned()
                .collect();
            if !theirs.is_empty() {
                sends.push((conn, Frame::text(down::transform_error(&theirs))));
            }
        }
        for error in errored {
            let text = error.message.as_deref().unwrap_or("refused by the app");
            cx.warn(format!("group {}: query {} ({}): {text}", self.id, error.id, error.name));
        }
        for (conn, frame) in sends {
            self.send(conn, vec![frame], cx);
        }
    }
}
