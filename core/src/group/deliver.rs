//! What goes out to clients: pokes, catch-up patches, errors of single queries
//! (spec: view-syncer-cvr §4).

use super::config::bug;
use super::interface::{Effect, Missed, ResetReason};
use super::machine::{Cx, Group};
use super::op::{Failure, Recipients};
use super::poke::{Encoder, Frame, Poke};
use crate::cvr::{Patch, QueryHash, VersionedPatch, catchup};
use crate::protocol::custom_query::ErroredQuery;
use crate::protocol::down;
use crate::version::CvrVersion;

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
