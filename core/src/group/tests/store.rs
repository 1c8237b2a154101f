//! A CVR store of plain maps, with faults on demand.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::cvr::load::{StoredDesire, assemble};
use crate::cvr::store::{
    CatchupPage, CatchupRange, ClientWrite, ConfigChange, CvrStoreError, Flushed, GroupFlush,
    InstanceWrite, Loaded, QueryWrite, RowChange, RowCursor, RowPage, RowWrite,
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
    rows_version: CvrVersion,
    /// Rows that follow their metadata.
    owed: Vec<(CvrVersion, Vec<RowWrite>)>,
}

/// Records of a page: few, so that every page turn happens.
const PAGE: usize = 4;

pub struct MemStore {
    groups: BTreeMap<ClientGroupId, StoredGroup>,
    /// Rows of larger flushes follow.
    pub defer_above: usize,
    /// How many did.
    pub deferred: usize,
    pub flushes: usize,
    /// Row records that flushes wrote.
    pub rows_written: usize,
    pub anomalies: usize,
    /// Another server had the groups that are loaded.
    pub foreign: bool,
}

impl Default for MemStore {
    fn default() -> MemStore {
        MemStore {
            groups: BTreeMap::new(),
            defer_above: 100,
            deferred: 0,
            flushes: 0,
            rows_written: 0,
            anomalies: 0,
            foreign: false,
        }
    }
}

impl MemStore {
    /// Rows of the group are still to be written.
    pub fn owes(&self, group: &ClientGroupId) -> bool {
        self.groups.get(group).is_some_and(|g| !g.owed.is_empty())
    }

    /// Writes the rows that follow.
    pub fn write_owed(&mut self, group: &ClientGroupId) {
        let Some(group) = self.groups.get_mut(group) else { return };
        for (version, rows) in std::mem::take(&mut group.owed) {
            assert!(group.rows_version <= version, "rows are written in order");
            for write in &rows {
                self.anomalies += group.write_row(&write.id, &write.change);
            }
            group.rows_version = version;
        }
    }

    /// The server died, or gave up: rows that are owed are never written.
    pub fn lose_owed(&mut self, group: &ClientGroupId) {
        if let Some(group) = self.groups.get_mut(group) {
            group.owed.clear();
        }
    }

    pub fn lose_all_owed(&mut self) {
        self.groups.values_mut().for_each(|group| group.owed.clear());
    }

    /// The rows are not those of the metadata, and nobody will write them.
    pub fn is_lost(&self, group: &ClientGroupId) -> bool {
        self.groups.get(group).is_some_and(|g| {
            let version = g.instance.as_ref().map(|i| &i.version);
            g.owed.is_empty() && version.is_some_and(|v| *v != g.rows_version)
        })
    }

    /// Clients of a lost group come with another id: here, the same one is a new group.
    pub fn forget(&mut self, group: &ClientGroupId) {
        self.groups.remove(group);
    }

    pub fn version(&self, group: &ClientGroupId) -> CvrVersion {
        self.groups
            .get(group)
            .and_then(|g| g.instance.as_ref())
            .map(|i| i.version.clone())
            .unwrap_or_default()
    }

    /// Another server had the group and left it at a newer version.
    pub fn moved_on(&mut self, group: &ClientGroupId) -> CvrVersion {
        // It could take the group over only when its rows were there.
        assert!(!self.is_lost(group), "nobody takes over what is lost");
        self.write_owed(group);
        let stored = self.groups.get_mut(group).and_then(|g| g.instance.as_mut()).expect("known");
        stored.version.config += 5;
        let version = stored.version.clone();
        self.groups.get_mut(group).expect("known").rows_version = version.clone();
        version
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

    /// As another server would find it.
    pub fn try_load(&self, group: &ClientGroupId) -> Result<Loaded, CvrStoreError> {
        assert!(!self.owes(group), "a load waits for rows that follow");
        if self.is_lost(group) {
            return Err(CvrStoreError::ClientNotFound("rows are behind".into()));
        }
        Ok(self.load(group))
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
        Loaded { own: !self.foreign, ..Loaded::new(cvr) }
    }

    /// Another server stored this signature.
    pub fn sign(&mut self, group: &ClientGroupId, query: &QueryHash, signature: Option<u64>) {
        let group = self.groups.get_mut(group).expect("known");
        group.queries.get_mut(query).expect("known").0.signature = signature;
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
        if self.is_lost(&flush.group) {
            return Err(CvrStoreError::ConcurrentModification {
                expected: flush.expected.cookie(),
                actual: "the rows'".to_owned(),
            });
        }
        assert!(flush.instance.version >= flush.expected);
        self.flushes += 1;
        self.rows_written += flush.rows.len();
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
        let rows_follow = flush.rows.len() > self.defer_above || !group.owed.is_empty();
        group.owed.push((flush.instance.version.clone(), flush.rows.clone()));
        if rows_follow {
            self.deferred += 1;
        } else {
            self.write_owed(&flush.group);
        }
        Ok(Flushed { rows: flush.rows.len(), anomalies: 0, rows_follow })
    }

    pub fn page(
        &self,
        group: &ClientGroupId,
        current: &CvrVersion,
        from: Option<&RowCursor>,
    ) -> Result<RowPage, CvrStoreError> {
        assert!(!self.owes(group), "reads wait for rows that follow");
        let actual = self.version(group);
        if actual != *current || self.is_lost(group) {
            return Err(CvrStoreError::ConcurrentModification {
                expected: current.cookie(),
                actual: actual.cookie(),
            });
        }
        let (rows, next) = page_of(self.rows(group), from);
        Ok(RowPage { rows, next })
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
        from: Option<&RowCursor>,
    ) -> Result<CatchupPage, CvrStoreError> {
        assert!(!self.owes(&range.group), "reads wait for rows that follow");
        let actual = self.version(&range.group);
        if actual != range.current {
            return Err(CvrStoreError::ConcurrentModification {
                expected: range.current.cookie(),
                actual: actual.cookie(),
            });
        }
        let Some(group) = self.groups.get(&range.group) else {
            return Ok(CatchupPage::default());
        };
        let rows = group
            .rows
            .values()
            .filter(|r| range.contains(&r.patch_version))
            .filter(|r| r.ref_counts.as_ref().is_none_or(|c| !except.iter().any(|q| c.mentions(q))))
            .cloned()
            .collect();
        let (rows, next) = page_of(rows, from);
        let mut config = Vec::new();
        if from.is_some() {
            return Ok(CatchupPage { config, rows, next });
        }
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
        Ok(CatchupPage { config, rows, next })
    }
}

/// The records after the cursor, as many as a page has; they are sorted by identity.
fn page_of(rows: Vec<RowRecord>, from: Option<&RowCursor>) -> (Vec<RowRecord>, Option<RowCursor>) {
    let after = |r: &RowRecord| from.is_none_or(|from| r.id.text() > from.0.as_str());
    let mut rows: Vec<_> = rows.into_iter().filter(after).collect();
    rows.sort_by(|a, b| a.id.text().cmp(b.id.text()));
    let more = rows.len() > PAGE;
    rows.truncate(PAGE);
    let next = rows.last().filter(|_| more).map(|r| RowCursor(r.id.text().to_owned()));
    (rows, next)
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
