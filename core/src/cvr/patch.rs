//! What updaters tell the clients.

use std::sync::Arc;

use super::{ClientId, QueryHash, RowIdentity};
use crate::row::RowRef;
use crate::version::CvrVersion;

/// One change of what clients have (spec: view-syncer-cvr §3; wire form: §4.4).
#[derive(Debug, Clone)]
pub enum Patch {
    /// A client desires a query from now on.
    DesiredPut(ClientId, QueryHash),
    /// A client does not desire it any more.
    DesiredDel(ClientId, QueryHash),
    /// The query's result is with the clients.
    GotPut(QueryHash),
    /// The query's result is gone.
    GotDel(QueryHash),
    /// A row, new or changed.
    RowPut(Arc<RowIdentity>, RowRef),
    /// A row that no query references any more.
    RowDel(Arc<RowIdentity>),
}

/// A patch and the version at which it took place: clients at or above it do not get it.
#[derive(Debug, Clone)]
pub struct VersionedPatch {
    /// The change.
    pub patch: Patch,
    /// Only for clients whose base version is lower.
    pub to_version: CvrVersion,
}
