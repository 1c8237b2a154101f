//! Coming up without reading row records.
//!
//! A group that comes back finds its queries as they were, most of the time: the same rows, some
//! of them with new contents. Row-set signatures tell (spec: view-syncer-cvr §1.6). A query whose
//! rows have the signature that was stored has the rows that its records are about; those that
//! changed since are newer than the CVR, and the others are as the clients have them. So nothing
//! has to be read, compared or written but what changed.
//!
//! The signature is an XOR: it says nothing of rows that are in a result an even number of times.
//! Plans in which a row can be there once only are known by their shape ([`Occurrence`]).
//! Originals leave the signature of a query alone whose result becomes empty (spec §1.6). Where a
//! row's presence depends on the row alone that misleads nobody: a row that was not there and has
//! not changed is not there now. Otherwise the view must have been this server's own.

use std::collections::BTreeMap;

use super::machine::{Cx, Group};
use super::op::Sync;
use crate::cvr::{Query, QueryHash};
use crate::ivm::engine::InstanceId;
use crate::ivm::plan::Occurrence;

impl Group {
    /// Whether signatures may show that the row records need not be read: everything that was
    /// ever executed is to run again as it was, nothing else changes, and nobody is late.
    pub(super) fn may_be_as_it_was(&self, sync: &Sync, cx: &Cx<'_>) -> bool {
        let Some(cvr) = self.cvr.as_ref() else { return false };
        let executed = |q: &Query| q.transformation_hash.is_some();
        let as_it_was = |id: &QueryHash, hash: &str| {
            cvr.query(id).is_some_and(|q| {
                q.signature.is_some() && q.transformation_hash.as_deref() == Some(hash)
            })
        };
        !self.synced
            && !self.compare_all
            && self.pipelines.is_empty()
            && self.pending.is_empty()
            && !self.pending.has_failed()
            && cvr.version.state < *cx.world.version()
            && cvr.replica_version.as_ref() == Some(cx.world.replica_version())
            && sync.removals.is_empty()
            && self.late_clients(cvr).is_none()
            && sync.additions.iter().all(|(id, transformed)| as_it_was(id, &transformed.hash))
            && cvr.queries.values().filter(|q| executed(q)).count() == sync.additions.len()
    }

    /// Whether they do show it, now that the queries are hydrated.
    pub(super) fn is_as_it_was(
        &self,
        sync: &Sync,
        instances: &BTreeMap<QueryHash, InstanceId>,
        cx: &Cx<'_>,
    ) -> bool {
        let Some(cvr) = self.cvr.as_ref() else { return false };
        let same = |(id, instance): (&QueryHash, &InstanceId)| {
            let stored = cvr.query(id).and_then(|q| q.signature);
            let decides = match cx.world.occurrence(*instance) {
                Occurrence::OfItself => true,
                Occurrence::Once => self.own_view,
                Occurrence::Many => false,
            };
            decides && stored.is_some() && stored == cx.world.signature(*instance).ok()
        };
        self.may_be_as_it_was(sync, cx)
            && instances.len() == sync.additions.len()
            && instances.iter().all(same)
    }
}
