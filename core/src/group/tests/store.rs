//! A CVR store of plain maps, with faults on demand.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::super::Missed;
use crate::cvr::load::{StoredDesire, assemble};
use crate::cvr::store::{
    CatchupRange, ClientWrite, ConfigChange, CvrStoreError, Flushed, GroupFlush, InstanceWrite,
    Loaded, QueryWrite, RowChange,
};
use crate::cvr::{
    ClientGroupId, ClientId, Cvr, Query, QueryHash, RefCounts, RowIdentity, RowRecord, TtlClock,
};
use crate::version::CvrVersion;

#[derive(Default)]
struct StoredGroup {
    instance: Option<InstanceWrite>,
    clients: Vec<ClientId>,
    /// The query, its got patch version, deleted.
    queries: BTreeMap<QueryHash, (Query, Option<CvrVersion>, bool)>,
    desires: BTreeMap<(ClientId, QueryHash), StoredDesire>,
    rows: BTreeMap<Arc<RowIdentity>, RowRecord>,
}

#[derive(Default)]
pub struct MemStore {
    groups: BTreeMap<ClientGroupId, StoredGroup>,
    pub flushes: usize,
    pub anomalies: usize,
}

impl MemStore {
    pub fn version(&self, group: &ClientGroupId) -> CvrVersion {
        self.groups
            .get(group)
            .and_then(|g| g.instance.as_ref())
            .map(|i| i.version.clone())
            .unwrap_or_default()
    }

    /// Another server had the group and left it at a newer version.
    pub fn moved_on(&mut self, group: &ClientGroupId) -> CvrVersion {
        let stored = self.groups.get_mut(group).and_then(|g| g.instance.as_mut()).expect("known");
        stored.version.config += 5;
        stored.version.clone()
    }

    pub fn got(&self, group: &ClientGroupId) -> Vec<QueryHash> {
        let queries = self.groups.get(group).map(|g| &g.queries);
        queries
            .into_iter()
            .flatten()
            .filter(|(_, (_, patch, deleted))| patch.is_some() && !deleted)
            .map(|(id, _)| id.clone())
            .collect()
    }

    pub fn desired(&self, group: &ClientGroupId, client: &ClientId) -> Vec<QueryHash> {
        let desires = self.groups.get(group).map(|g| &g.desires);
        desires
            .into_iter()
            .flatten()
            .filter(|((c, _), d)| c == client && !d.deleted)
            .map(|((_, q), _)| q.clone())
            .collect()
    }

    pub fn load(&self, group: &ClientGroupId) -> Loaded {
        let cvr = match self.groups.get(group) {
            Some(StoredGroup { instance: Some(i), clients, queries, desires, .. }) => {
                let mut cvr = Cvr::empty(group.clone());
                cvr.version = i.version.clone();
                cvr.stored = true;
                cvr.ttl_clock = i.ttl_clock;
                cvr.replica_version = i.replica_version.clone();
                cvr.client_schema = i.client_schema.clone();
                cvr.profile_id = i.profile_id.clone();
                let queries = queries.values().filter(|(_, _, deleted)| !deleted).map(
                    |(query, patch_version, _)| Query {
                        patch_version: patch_version.clone(),
                        client_state: BTreeMap::new(),
                        ..query.clone()
                    },
                );
                assemble(cvr, clients.iter().cloned(), queries, desires.values().cloned())
            }
            _ => Cvr::empty(group.clone()),
        };
        Loaded { cvr, taken_over_from: None }
    }

    pub fn store_clock(&mut self, group: &ClientGroupId, clock: TtlClock) {
        if let Some(i) = self.groups.get_mut(group).and_then(|g| g.instance.as_mut()) {
            i.ttl_clock = clock;
        }
    }

    pub fn flush(&mut self, flush: &GroupFlush) -> Result<Flushed, CvrStoreError> {
        let actual = self.version(&flush.group);
        if actual != flush.expected {
            return Err(CvrStoreError::ConcurrentModification {
                expected: flush.expected.cookie(),
                actual: actual.cookie(),
            });
        }
        assert!(flush.instance.version >= flush.expected);
        self.flushes += 1;
        let group = self.groups.entry(flush.group.clone()).or_default();
        group.instance = Some(flush.instance.clone());
        for write in &flush.clients {
            match write {
                ClientWrite::Insert(id) => {
                    assert!(!group.clients.contains(id), "a client joins once");
                    group.clients.push(id.clone());
                }
                ClientWrite::Delete(id) => group.clients.retain(|c| c != id),
            }
        }
        for write in &flush.queries {
            group.write_query(write);
        }
        for d in &flush.desires {
            let stored = StoredDesire {
                client: d.client.clone(),
                query: d.query.clone(),
                patch_version: d.patch_version.clone(),
                deleted: d.deleted,
                ttl_ms: Some(d.ttl_ms),
                inactivated_at: d.inactivated_at,
            };
            group.desires.insert((d.client.clone(), d.query.clone()), stored);
        }
        let mut anomalies = 0;
        for write in &flush.rows {
            anomalies += group.write_row(&write.id, &write.change);
        }
        self.anomalies += anomalies;
        Ok(Flushed { rows: flush.rows.len(), anomalies })
    }

    pub fn rows(&self, group: &ClientGroupId) -> Vec<RowRecord> {
        let rows = self.groups.get(group).map(|g| &g.rows);
        rows.into_iter()
            .flatten()
            .map(|(_, r)| r)
            .filter(|r| r.ref_counts.is_some())
            .cloned()
            .collect()
    }

    /// The live records, if the group is at this version.
    pub fn rows_at(
        &self,
        group: &ClientGroupId,
        current: &CvrVersion,
    ) -> Result<Vec<RowRecord>, CvrStoreError> {
        let actual = self.version(group);
        if actual != *current {
            return Err(CvrStoreError::ConcurrentModification {
                expected: current.cookie(),
                actual: actual.cookie(),
            });
        }
        Ok(self.rows(group))
    }

    /// Groups that were written.
    pub fn knows(&self, group: &ClientGroupId) -> bool {
        self.groups.get(group).is_some_and(|g| g.instance.is_some())
    }

    /// A record that nothing in the replica stands behind.
    pub fn invent_row(&mut self, group: &ClientGroupId, record: RowRecord) {
        self.groups.entry(group.clone()).or_default().rows.insert(record.id.clone(), record);
    }

    pub fn catch_up(
        &self,
        range: &CatchupRange,
        except: &[QueryHash],
    ) -> Result<Missed, CvrStoreError> {
        let actual = self.version(&range.group);
        if actual != range.current {
            return Err(CvrStoreError::ConcurrentModification {
                expected: range.current.cookie(),
                actual: actual.cookie(),
            });
        }
        let Some(group) = self.groups.get(&range.group) else { return Ok(Missed::default()) };
        let rows = group
            .rows
            .values()
            .filter(|r| range.contains(&r.patch_version))
            .filter(|r| r.ref_counts.as_ref().is_none_or(|c| !except.iter().any(|q| c.mentions(q))))
            .cloned()
            .collect();
        let mut config = Vec::new();
        for (query, (_, patch, deleted)) in &group.queries {
            if let Some(patch_version) = patch.clone().filter(|v| range.contains(v)) {
                let deleted = *deleted;
                config.push(ConfigChange::Got { query: query.clone(), deleted, patch_version });
            }
        }
        for d in group.desires.values().filter(|d| range.contains(&d.patch_version)) {
            config.push(ConfigChange::Desire {
                client: d.client.clone(),
                query: d.query.clone(),
                deleted: d.deleted,
                patch_version: d.patch_version.clone(),
            });
        }
        Ok(Missed { rows, config })
    }
}

impl StoredGroup {
    fn write_query(&mut self, write: &QueryWrite) {
        match write {
            QueryWrite::Full(query) => {
                let patch = query.patch_version.clone();
                self.queries.insert(query.id.clone(), ((**query).clone(), patch, false));
            }
            QueryWrite::Partial { id, executed, signature } => {
                let (query, patch, deleted) = self.queries.get_mut(id).expect("known");
                if let Some(executed) = executed {
                    *patch = executed.patch_version.clone();
                    *deleted = false;
                    query.transformation_hash = Some(executed.transformation_hash.clone());
                    query.transformation_version = Some(executed.transformation_version.clone());
                }
                if signature.is_some() {
                    query.signature = *signature;
                }
            }
            QueryWrite::Removed { id, patch_version } => {
                let (query, patch, deleted) = self.queries.get_mut(id).expect("known");
                *patch = Some(patch_version.clone());
                *deleted = true;
                query.transformation_hash = None;
                query.transformation_version = None;
            }
        }
    }

    fn write_row(&mut self, id: &Arc<RowIdentity>, change: &RowChange) -> usize {
        let known = self.rows.get(id).cloned();
        let live = known.as_ref().filter(|r| r.ref_counts.is_some());
        let mut anomalies = 0;
        let record = match change.clone() {
            RowChange::Put { row_version, patch_version, ref_counts } => {
                assert!(ref_counts.is_referenced(), "{id}: a live record is referenced");
                Some((row_version, patch_version, Some(ref_counts)))
            }
            RowChange::Tombstone { row_version, patch_version } => known.as_ref().map(|k| {
                (row_version.unwrap_or_else(|| k.row_version.clone()), patch_version, None)
            }),
            RowChange::Delete => None,
            RowChange::Adjust { counts, row_version, patch_version, keep_patch_version } => {
                anomalies += usize::from(live.is_none());
                let mut refs = live.and_then(|r| r.ref_counts.clone()).unwrap_or_default();
                for (query, n) in counts.iter() {
                    refs.set(query, n);
                }
                let old = live.map(|r| r.row_version.clone()).unwrap_or_default();
                let keep = keep_patch_version && row_version.as_ref() == Some(&old);
                let patch = match live.filter(|_| keep) {
                    Some(r) => r.patch_version.clone(),
                    None => patch_version,
                };
                assert!(refs.is_referenced(), "{id}: an adjusted record stays referenced");
                Some((row_version.unwrap_or(old), patch, Some::<RefCounts>(refs)))
            }
        };
        match record {
            Some((row_version, patch_version, ref_counts)) => {
                let record = RowRecord { id: id.clone(), row_version, patch_version, ref_counts };
                self.rows.insert(id.clone(), record);
            }
            None => {
                self.rows.remove(id);
            }
        }
        anomalies
    }
}
