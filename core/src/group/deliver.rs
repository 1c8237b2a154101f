//! What goes out to clients: pokes, catch-up patches, errors of single queries
//! (spec: view-syncer-cvr §4).

use super::config::bug;
use super::interface::{Effect, Missed, ResetReason};
use super::machine::{Cx, Group};
use super::op::{Failure, Poking, Recipients, Stage, Step, StepResult};
use super::poke::{Encoder, Frame, Poke, SlicedPoke};
use crate::cvr::{Patch, QueryHash, VersionedPatch, catchup};
use crate::protocol::custom_query::ErroredQuery;
use crate::protocol::down;
use crate::version::CvrVersion;

/// Patches of a poke that are encoded at once; larger ones are sliced.
pub(super) const SLICE_PATCHES: usize = if cfg!(test) { 8 } else { 2_000 };

impl Group {
    /// What late clients missed, with rows as they are now.
    pub(super) fn missed_patches(
        &mut self,
        missed: Missed,
        cx: &mut Cx<'_>,
    ) -> Vec<VersionedPatch> {
        let mut patches = Vec::with_capacity(missed.rows.len());
        for record in &missed.rows {
            let mut failed = None;
            let patch = catchup::row_patch(record, |id| {
                cx.read_row(id).unwrap_or_else(|why| {
                    failed = Some(why);
                    None
                })
            });
            patches.push(patch.unwrap_or_else(|missing| {
                // The clients cannot have what the replica does not have, and the records that
                // say so are put right next.
                if !self.compare_all {
                    self.reset.get_or_insert(ResetReason::LostRow);
                }
                let why = failed.unwrap_or_else(|| missing.to_string());
                cx.warn(format!("group {}: {why}", self.id));
                VersionedPatch {
                    patch: Patch::RowDel(record.id.clone()),
                    to_version: record.patch_version.clone(),
                }
            }));
        }
        patches.extend(catchup::config_patches(missed.config));
        patches
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
        let mut frames = poke.frames(&version);
        let shared = &mut cx.world.shared().frames;
        for (conn, client) in self.clients.iter_mut().filter(|(_, c)| c.active) {
            let base = client.base.as_ref();
            let (taken, forced) = match recipients {
                Recipients::All => (true, !client.ever_poked),
                // A new client counts as being at `00`.
                Recipients::AtHead => (base.unwrap_or(&CvrVersion::empty()) == before, false),
            };
            if !taken || base.is_some_and(|base| *base > version) {
                continue;
            }
            let Some(frames) = frames.of(base, client.binary, forced, shared) else { continue };
            client.base = Some(version.clone());
            client.ever_poked = true;
            cx.out.push(Effect::Send(*conn, frames));
        }
    }

    /// Starts to send a poke that is too large to be encoded at once. It ends at the CVR's
    /// version, which is durable: nothing can fail any more.
    pub(super) fn begin_poking(
        &mut self,
        poke: Poke,
        ack: Option<Vec<String>>,
        cx: &mut Cx<'_>,
    ) -> StepResult {
        let Some(version) = self.cvr.as_ref().map(|cvr| cvr.version.clone()) else {
            return Ok(Step::Done);
        };
        let mut sliced = SlicedPoke::new(poke, &version);
        for (conn, client) in self.clients.iter_mut().filter(|(_, c)| c.active) {
            let at_head = client.base.as_ref() == Some(&version) && client.ever_poked;
            if at_head || client.base.as_ref().is_some_and(|base| *base > version) {
                continue;
            }
            let start = sliced.start(*conn, client.base.as_ref(), client.binary);
            client.base = Some(version.clone());
            client.ever_poked = true;
            cx.out.push(Effect::Send(*conn, [start].into()));
        }
        self.poke_slice(Box::new(Poking { poke: sliced, ack }), cx)
    }

    /// Sends a slice of a large poke.
    pub(super) fn poke_slice(&mut self, mut poking: Box<Poking>, cx: &mut Cx<'_>) -> StepResult {
        let clients = &self.clients;
        let more = poking.poke.step(SLICE_PATCHES, |conns, frames| {
            // Who left meanwhile has thrown away what it got of this poke.
            for conn in conns.iter().filter(|conn| clients.contains_key(conn)) {
                cx.out.push(Effect::SendMore(*conn, frames.clone()));
            }
        });
        if more {
            cx.emit(Effect::Continue);
            return Ok(Step::Wait(Stage::Poking(poking)));
        }
        self.acknowledge(poking.ack, cx);
        Ok(Step::Done)
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
                sends.push((*conn, Frame::text(down::transform_error(&theirs))));
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
