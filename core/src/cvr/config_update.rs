//! Changes of a group's configuration: clients, desires, schema, profile (spec: view-syncer-cvr
//! §3.1). Got queries and rows never change here, nor do state and replica version.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::internal::{self, LMIDS, MUTATION_RESULTS, ShardTables};
use super::store::{ClientWrite, DesireWrite, InstanceWrite, QueryWrite};
use super::{
    Client, ClientId, ClientSchema, ClientState, Cvr, DEFAULT_TTL_MS, FlushTimes, GroupFlush,
    Patch, PreparedFlush, Query, QueryBody, QueryHash, TtlClock, UpdateError, VersionedPatch,
    clamp_ttl, compare_ttl,
};
use crate::version::CvrVersion;

/// One `put` of a desired-queries patch.
#[derive(Debug, Clone)]
pub struct DesiredPut {
    /// The client's id for the query.
    pub query: QueryHash,
    /// [`QueryBody::Client`] or [`QueryBody::Custom`]. Ignored if the group has the query already.
    pub body: QueryBody,
    /// As the client gave it, ms; [`super::FOREVER`] or [`DEFAULT_TTL_MS`] included; not clamped.
    pub ttl_ms: f64,
}

/// Collects the configuration changes of one message. Drop it to undo everything; it leaves no
/// trace (spec trap T31).
#[derive(Debug)]
pub struct ConfigUpdater {
    orig: CvrVersion,
    cvr: Cvr,
    instance: bool,
    clients: Vec<ClientWrite>,
    queries: BTreeSet<QueryHash>,
    desires: BTreeMap<(ClientId, QueryHash), DesireWrite>,
}

impl ConfigUpdater {
    /// Starts from a snapshot.
    pub fn new(cvr: &Cvr) -> ConfigUpdater {
        ConfigUpdater {
            orig: cvr.version.clone(),
            cvr: cvr.clone(),
            instance: !cvr.stored,
            clients: Vec::new(),
            queries: BTreeSet::new(),
            desires: BTreeMap::new(),
        }
    }

    /// The snapshot as changed so far.
    pub fn cvr(&self) -> &Cvr {
        &self.cvr
    }

    /// Bumps the version, at most once.
    fn bump(&mut self) -> CvrVersion {
        if self.cvr.version == self.orig {
            self.cvr.version = self.orig.one_after();
        }
        self.cvr.version.clone()
    }

    /// Adds the client, and the internal queries with the first one. True if it is new.
    pub fn ensure_client(&mut self, id: &ClientId, shard: &ShardTables) -> bool {
        if self.cvr.clients.contains_key(id) {
            return false;
        }
        self.bump();
        Arc::make_mut(&mut self.cvr.clients).insert(id.clone(), Client::default());
        self.clients.push(ClientWrite::Insert(id.clone()));
        let group = &self.cvr.id;
        for (name, query) in [
            (LMIDS, internal::lmids(group, shard)),
            (MUTATION_RESULTS, internal::mutation_results(group, shard)),
        ] {
            let name = QueryHash::from(name);
            if !self.cvr.queries.contains_key(&name) {
                Arc::make_mut(&mut self.cvr.queries).insert(name.clone(), Arc::new(query));
                self.queries.insert(name);
            }
        }
        true
    }

    /// Sets the client schema of a group that has none, or checks that it is the same.
    ///
    /// # Errors
    /// [`UpdateError::ClientSchema`] if the group has another one.
    pub fn set_client_schema(&mut self, schema: &Arc<ClientSchema>) -> Result<(), UpdateError> {
        match &self.cvr.client_schema {
            None => {
                self.cvr.client_schema = Some(schema.clone());
                self.instance = true;
                Ok(())
            }
            Some(known) => Ok(known.require_same(schema)?),
        }
    }

    /// Sets the profile id. Returns the previous one if it was a real one, which is worth a
    /// warning: profiles do not change.
    pub fn set_profile_id(&mut self, profile: &str) -> Option<Arc<str>> {
        if self.cvr.profile_id.as_deref() == Some(profile) {
            return None;
        }
        self.instance = true;
        let previous = self.cvr.profile_id.replace(profile.into());
        previous.filter(|p| !p.starts_with("cg"))
    }

    /// Applies the puts of a client. Those that change nothing (desired already, with at least
    /// this TTL) are skipped.
    ///
    /// # Errors
    /// [`UpdateError::UnknownClient`], [`UpdateError::ReservedQuery`].
    pub fn put_desired(
        &mut self,
        client: &ClientId,
        puts: &[DesiredPut],
    ) -> Result<Vec<VersionedPatch>, UpdateError> {
        if !self.cvr.clients.contains_key(client) {
            return Err(UpdateError::UnknownClient(client.clone()));
        }
        let mut patches = Vec::new();
        for put in puts {
            if !self.is_needed(client, put)? {
                continue;
            }
            let version = self.bump();
            let ttl_ms = clamp_ttl(put.ttl_ms);
            let query = Arc::make_mut(&mut self.cvr.queries)
                .entry(put.query.clone())
                .or_insert_with(|| Arc::new(Query::new(put.query.clone(), put.body.clone())));
            let state = ClientState { inactivated_at: None, ttl_ms, version: version.clone() };
            Arc::make_mut(query).client_state.insert(client.clone(), Box::new(state));
            if let Some(client) = self.cvr.client_mut(client) {
                client.desired.insert(put.query.clone());
            }
            self.write_desire(client, &put.query, &version, Desire::Active { ttl_ms });
            patches.push(VersionedPatch {
                patch: Patch::DesiredPut(client.clone(), put.query.clone()),
                to_version: version,
            });
        }
        Ok(patches)
    }

    fn is_needed(&self, client: &ClientId, put: &DesiredPut) -> Result<bool, UpdateError> {
        let Some(query) = self.cvr.query(&put.query) else {
            let reserved = matches!(put.body, QueryBody::Internal { .. })
                || internal::is_internal_id(&put.query);
            return if reserved {
                Err(UpdateError::ReservedQuery(put.query.clone()))
            } else {
                Ok(true)
            };
        };
        if query.is_internal() {
            return Ok(false);
        }
        Ok(query.client_state.get(client).is_none_or(|state| {
            state.inactivated_at.is_some() || compare_ttl(put.ttl_ms, state.ttl_ms).is_gt()
        }))
    }

    /// The client lets go of these queries; their TTLs begin to run.
    pub fn inactivate_desired(
        &mut self,
        client: &ClientId,
        queries: &[QueryHash],
        clock: TtlClock,
    ) -> Vec<VersionedPatch> {
        self.undesire(client, queries, Some(clock))
    }

    /// The client lets go of these queries for good: no TTL.
    pub fn delete_desired(
        &mut self,
        client: &ClientId,
        queries: &[QueryHash],
    ) -> Vec<VersionedPatch> {
        self.undesire(client, queries, None)
    }

    /// The client lets go of everything for good.
    pub fn clear_desired(&mut self, client: &ClientId) -> Vec<VersionedPatch> {
        let all = self.desired_of(client);
        self.undesire(client, &all, None)
    }

    /// Forgets a client. Its desires end as if it had let go of them now; unknown clients are
    /// nothing to forget.
    pub fn delete_client(&mut self, client: &ClientId, clock: TtlClock) -> Vec<VersionedPatch> {
        if !self.cvr.clients.contains_key(client) {
            return Vec::new();
        }
        let all = self.desired_of(client);
        let patches = self.undesire(client, &all, Some(clock));
        Arc::make_mut(&mut self.cvr.clients).remove(client);
        self.clients.push(ClientWrite::Delete(client.clone()));
        patches
    }

    fn desired_of(&self, client: &ClientId) -> Vec<QueryHash> {
        self.cvr.clients.get(client).into_iter().flat_map(|c| c.desired.iter().cloned()).collect()
    }

    /// Ends a client's interest, with the TTL running from `clock` or without.
    fn undesire(
        &mut self,
        client: &ClientId,
        queries: &[QueryHash],
        clock: Option<TtlClock>,
    ) -> Vec<VersionedPatch> {
        let mut patches = Vec::new();
        for id in queries {
            if !self.cvr.clients.get(client).is_some_and(|c| c.desired.contains(id)) {
                continue;
            }
            if let Some(client) = self.cvr.client_mut(client) {
                client.desired.remove(id);
            }
            let version = self.bump();
            // A query that was removed after an error is still desired, but there is nothing to
            // write: the desire is re-created by the next put.
            let Some(query) = self.cvr.query_mut(id) else { continue };
            let desire = match clock {
                None => {
                    query.client_state.remove(client);
                    Desire::Cleared
                }
                Some(clock) => {
                    let mut ttl_ms = DEFAULT_TTL_MS;
                    if let Some(state) = query.client_state.get_mut(client) {
                        ttl_ms = clamp_ttl(state.ttl_ms);
                        **state = ClientState {
                            inactivated_at: Some(clock),
                            ttl_ms,
                            version: version.clone(),
                        };
                    }
                    Desire::Inactive { ttl_ms, clock }
                }
            };
            self.write_desire(client, id, &version, desire);
            patches.push(VersionedPatch {
                patch: Patch::DesiredDel(client.clone(), id.clone()),
                to_version: version,
            });
        }
        patches
    }

    fn write_desire(
        &mut self,
        client: &ClientId,
        query: &QueryHash,
        version: &CvrVersion,
        desire: Desire,
    ) {
        let (deleted, ttl_ms, inactivated_at) = match desire {
            Desire::Active { ttl_ms } => (false, ttl_ms, None),
            Desire::Inactive { ttl_ms, clock } => (true, ttl_ms, Some(clock)),
            Desire::Cleared => (true, DEFAULT_TTL_MS, None),
        };
        self.queries.insert(query.clone());
        self.desires.insert(
            (client.clone(), query.clone()),
            DesireWrite {
                client: client.clone(),
                query: query.clone(),
                patch_version: version.clone(),
                deleted,
                ttl_ms,
                inactivated_at,
            },
        );
    }

    /// The flush of what was collected; `None` if that is nothing, and the old snapshot (with the
    /// old version) stays.
    pub fn finish(mut self, times: FlushTimes) -> Option<PreparedFlush> {
        if !self.instance
            && self.clients.is_empty()
            && self.queries.is_empty()
            && self.desires.is_empty()
        {
            return None;
        }
        let instance = stamp(&mut self.cvr, times);
        let queries = self
            .queries
            .iter()
            .filter_map(|id| self.cvr.query(id).cloned().map(QueryWrite::Full))
            .collect();
        let flush = GroupFlush {
            group: self.cvr.id.clone(),
            expected: self.orig,
            connect_ms: times.connect_ms,
            instance,
            clients: self.clients,
            queries,
            desires: self.desires.into_values().collect(),
            rows: Vec::new(),
        };
        Some(PreparedFlush { flush, cvr: self.cvr })
    }
}

/// How an interest stands after a change.
enum Desire {
    Active { ttl_ms: f64 },
    Inactive { ttl_ms: f64, clock: TtlClock },
    Cleared,
}

/// Sets a snapshot's times and makes the write of the group's own record.
pub(super) fn stamp(cvr: &mut Cvr, times: FlushTimes) -> InstanceWrite {
    cvr.last_active_ms = times.now_ms;
    cvr.ttl_clock = times.ttl_clock;
    cvr.stored = true;
    InstanceWrite {
        version: cvr.version.clone(),
        last_active_ms: times.now_ms,
        ttl_clock: times.ttl_clock,
        replica_version: cvr.replica_version.clone(),
        client_schema: cvr.client_schema.clone(),
        profile_id: cvr.profile_id.clone(),
    }
}
