//! Patches for clients that come back with an older cookie (spec: view-syncer-cvr §2.8, §5.6).
//!
//! A late client misses what changed in `(its version, the version before this update]`. The store
//! scans that range ([`super::store::CatchupRange`]); here its answers become patches. Order in the
//! poke: rows, then got queries, then desires.

use std::sync::Arc;

use super::store::ConfigChange;
use super::{Patch, RowIdentity, RowRecord, VersionedPatch};
use crate::row::RowRef;

/// A row record references a row that the replica does not have: the CVR is inconsistent, the
/// group's queries must be executed anew.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("row {0} of the CVR is missing in the replica: the group's queries must be executed anew")]
pub struct MissingRow(pub String);

/// The patch for a row that changed in the range. `contents` reads the row at the engine's
/// snapshot; it is asked only for rows that are still referenced.
///
/// # Errors
/// [`MissingRow`].
pub fn row_patch(
    record: &RowRecord,
    contents: impl FnOnce(&Arc<RowIdentity>) -> Option<RowRef>,
) -> Result<VersionedPatch, MissingRow> {
    let patch = match &record.ref_counts {
        None => Patch::RowDel(record.id.clone()),
        Some(_) => match contents(&record.id) {
            Some(row) => Patch::RowPut(record.id.clone(), row),
            None => return Err(MissingRow(record.id.to_string())),
        },
    };
    Ok(VersionedPatch { patch, to_version: record.patch_version.clone() })
}

/// The patches for configuration changes: got queries first, then every client's desires.
pub fn config_patches(changes: impl IntoIterator<Item = ConfigChange>) -> Vec<VersionedPatch> {
    let mut got = Vec::new();
    let mut desired = Vec::new();
    for change in changes {
        match change {
            ConfigChange::Got { query, deleted, patch_version } => got.push(VersionedPatch {
                patch: if deleted { Patch::GotDel(query) } else { Patch::GotPut(query) },
                to_version: patch_version,
            }),
            ConfigChange::Desire { client, query, deleted, patch_version } => {
                desired.push(VersionedPatch {
                    patch: if deleted {
                        Patch::DesiredDel(client, query)
                    } else {
                        Patch::DesiredPut(client, query)
                    },
                    to_version: patch_version,
                });
            }
        }
    }
    got.append(&mut desired);
    got
}
