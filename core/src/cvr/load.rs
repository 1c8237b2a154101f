//! A snapshot from what a store read (spec: view-syncer-cvr §2.5 steps 5–8): the same for every
//! store.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::{
    Client, ClientId, ClientState, Cvr, DEFAULT_TTL_MS, Query, QueryHash, TtlClock, clamp_ttl,
};
use crate::version::CvrVersion;

/// A stored desire, whatever its state.
#[derive(Debug, Clone, PartialEq)]
pub struct StoredDesire {
    /// Who.
    pub client: ClientId,
    /// What.
    pub query: QueryHash,
    /// When it last changed.
    pub patch_version: CvrVersion,
    /// No longer desired.
    pub deleted: bool,
    /// TTL, ms.
    pub ttl_ms: Option<f64>,
    /// When the client let go of it.
    pub inactivated_at: Option<TtlClock>,
}

/// Completes `cvr` (its own fields set) with its clients, its queries that are not deleted
/// (without client states) and all its desires. A desire of a client that left keeps its query
/// alive; a desire of a query that was removed stays desired.
pub fn assemble(
    mut cvr: Cvr,
    clients: impl IntoIterator<Item = ClientId>,
    queries: impl IntoIterator<Item = Query>,
    desires: impl IntoIterator<Item = StoredDesire>,
) -> Cvr {
    let mut clients: BTreeMap<_, _> =
        clients.into_iter().map(|id| (id, Client::default())).collect();
    let mut queries: BTreeMap<_, _> = queries.into_iter().map(|q| (q.id.clone(), q)).collect();
    for desire in desires {
        let inactive = desire.inactivated_at.is_some();
        if !desire.deleted
            && !inactive
            && let Some(client) = clients.get_mut(&desire.client)
        {
            client.desired.insert(desire.query.clone());
        }
        if desire.deleted && !inactive {
            continue; // cleared
        }
        if let Some(query) = queries.get_mut(&desire.query).filter(|q| !q.is_internal()) {
            let state = ClientState {
                inactivated_at: desire.inactivated_at,
                ttl_ms: clamp_ttl(desire.ttl_ms.unwrap_or(DEFAULT_TTL_MS)),
                version: desire.patch_version,
            };
            query.client_state.insert(desire.client, Box::new(state));
        }
    }
    cvr.clients = Arc::new(clients);
    cvr.queries = Arc::new(queries.into_iter().map(|(id, q)| (id, Arc::new(q))).collect());
    cvr
}
