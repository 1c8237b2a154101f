//! The CVR snapshot, and the record of a row (spec: view-syncer-cvr §1).

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use smallvec::SmallVec;

use super::{ClientGroupId, ClientId, ClientSchema, QueryHash, RowIdentity, TtlClock};
use crate::version::{CvrVersion, StateVersion};

/// A query's AST as it is stored: server names, no permissions. Shared: groups never change it.
pub type Ast = Arc<crate::zql::ast::Ast>;

/// One client group at one version. Row records are not part of it. Cheap to clone.
#[derive(Debug, Clone, PartialEq)]
pub struct Cvr {
    /// The group.
    pub id: ClientGroupId,
    /// The version that the cookies of clients at the head name.
    pub version: CvrVersion,
    /// The store holds this group: false only for a group that was never flushed. The first flush
    /// is never a no-op.
    pub stored: bool,
    /// Wall time of the last flush or TTL-clock write, ms since the Unix epoch.
    pub last_active_ms: f64,
    /// The group's clock at the time of the snapshot.
    pub ttl_clock: TtlClock,
    /// The initial sync that the rows come from; never goes down.
    pub replica_version: Option<StateVersion>,
    /// Live clients.
    pub clients: Arc<BTreeMap<ClientId, Client>>,
    /// Desired, got and internal queries.
    pub queries: Arc<BTreeMap<QueryHash, Arc<Query>>>,
    /// Set once, by the first client.
    pub client_schema: Option<Arc<ClientSchema>>,
    /// For counting active users only.
    pub profile_id: Option<Arc<str>>,
}

impl Cvr {
    /// The CVR of a group that the store does not know.
    pub fn empty(id: ClientGroupId) -> Cvr {
        Cvr {
            id,
            version: CvrVersion::empty(),
            stored: false,
            last_active_ms: 0.0,
            ttl_clock: TtlClock::ZERO,
            replica_version: None,
            clients: Arc::default(),
            queries: Arc::default(),
            client_schema: None,
            profile_id: None,
        }
    }

    /// A query by its id.
    pub fn query(&self, id: &QueryHash) -> Option<&Arc<Query>> {
        self.queries.get(id)
    }

    /// True if the store may hold live row records: some query was executed. Otherwise nothing has
    /// to be looked up there before rows are received.
    pub fn may_have_rows(&self) -> bool {
        self.queries.values().any(|q| q.transformation_hash.is_some())
    }

    /// The query for writing; the map and the query are copied if shared.
    pub(super) fn query_mut(&mut self, id: &QueryHash) -> Option<&mut Query> {
        Arc::make_mut(&mut self.queries).get_mut(id).map(Arc::make_mut)
    }

    /// The client for writing; the map is copied if shared.
    pub(super) fn client_mut(&mut self, id: &ClientId) -> Option<&mut Client> {
        Arc::make_mut(&mut self.clients).get_mut(id)
    }
}

/// A client of the group.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Client {
    /// Queries that it wants now. May name queries that the CVR does not hold (removed after an
    /// error or expiry).
    pub desired: BTreeSet<QueryHash>,
}

/// A query of the group.
#[derive(Debug, Clone, PartialEq)]
pub struct Query {
    /// The hash that the client sent, or the name of an internal query.
    pub id: QueryHash,
    /// What is to be executed.
    pub body: QueryBody,
    /// Per client that wants it, or wanted it and may come back before its TTL ends.
    /// Boxed: most queries have one, and a node of the map has places for eleven.
    pub client_state: BTreeMap<ClientId, Box<ClientState>>,
    /// When it entered the got set; always absent for internal queries.
    pub patch_version: Option<CvrVersion>,
    /// Hash of the AST as executed (with permissions, or as the app's endpoint answered).
    pub transformation_hash: Option<Arc<str>>,
    /// When that transformation was first executed.
    pub transformation_version: Option<CvrVersion>,
    /// Row-set signature (spec §1.6); absent in records of servers that did not write it.
    pub signature: Option<u64>,
}

/// The three kinds of queries.
#[derive(Debug, Clone, PartialEq)]
pub enum QueryBody {
    /// An AST supplied by a client; read permissions are added when it is transformed.
    Client {
        /// As received, server names.
        ast: Ast,
    },
    /// A named query; its AST comes from the app's query endpoint and is never stored.
    Custom {
        /// Name.
        name: Arc<str>,
        /// The arguments: compact JSON text of an array, key order as received.
        args: Arc<str>,
    },
    /// A query of the server's own: never desired or got, no patches, never expires.
    Internal {
        /// Fixed (see [`super::internal`]).
        ast: Ast,
    },
}

/// A client's interest in a query.
#[derive(Debug, Clone, PartialEq)]
pub struct ClientState {
    /// Clock value at which the client let go of it; absent = wanted now.
    pub inactivated_at: Option<TtlClock>,
    /// How long it stays after that, ms; already clamped.
    pub ttl_ms: f64,
    /// When this interest last changed.
    pub version: CvrVersion,
}

impl Query {
    /// A query that was never executed.
    pub fn new(id: QueryHash, body: QueryBody) -> Query {
        Query {
            id,
            body,
            client_state: BTreeMap::new(),
            patch_version: None,
            transformation_hash: None,
            transformation_version: None,
            signature: None,
        }
    }

    /// One of the server's own.
    pub fn is_internal(&self) -> bool {
        matches!(self.body, QueryBody::Internal { .. })
    }

    /// In the got set.
    pub fn is_got(&self) -> bool {
        self.patch_version.is_some()
    }

    /// Some client wants it now.
    pub fn is_active(&self) -> bool {
        self.client_state.values().any(|s| s.inactivated_at.is_none())
    }
}

/// How often a row occurs in the result trees of the group's queries, by query; sorted.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RefCounts(SmallVec<[(QueryHash, i64); 1]>);

impl RefCounts {
    /// No reference.
    pub fn new() -> RefCounts {
        RefCounts::default()
    }

    /// References of one query.
    pub fn of(query: QueryHash, count: i64) -> RefCounts {
        RefCounts(smallvec::smallvec![(query, count)])
    }

    /// The count of a query; 0 if it has none.
    pub fn get(&self, query: &QueryHash) -> i64 {
        self.find(query).map_or(0, |at| self.0[at].1)
    }

    /// Adds to a query's count; the entry stays even at 0.
    pub fn add(&mut self, query: &QueryHash, count: i64) {
        match self.find(query) {
            Ok(at) => self.0[at].1 += count,
            Err(at) => self.0.insert(at, (query.clone(), count)),
        }
    }

    /// Sets a query's count; 0 removes the entry.
    pub fn set(&mut self, query: &QueryHash, count: i64) {
        match (self.find(query), count) {
            (Ok(at), 0) => {
                self.0.remove(at);
            }
            (Ok(at), n) => self.0[at].1 = n,
            (Err(_), 0) => {}
            (Err(at), n) => self.0.insert(at, (query.clone(), n)),
        }
    }

    /// Entries in hash order.
    pub fn iter(&self) -> impl Iterator<Item = (&QueryHash, i64)> {
        self.0.iter().map(|(q, n)| (q, *n))
    }

    /// A query has an entry, whatever its count.
    pub fn mentions(&self, query: &QueryHash) -> bool {
        self.find(query).is_ok()
    }

    /// Some query references the row.
    pub fn is_referenced(&self) -> bool {
        self.0.iter().any(|(_, n)| *n > 0)
    }

    /// No entry at all.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Number of entries.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    fn find(&self, query: &QueryHash) -> Result<usize, usize> {
        self.0.binary_search_by(|(q, _)| q.cmp(query))
    }
}

impl FromIterator<(QueryHash, i64)> for RefCounts {
    fn from_iter<I: IntoIterator<Item = (QueryHash, i64)>>(entries: I) -> RefCounts {
        let mut counts = RefCounts::new();
        for (query, n) in entries {
            counts.add(&query, n);
        }
        counts
    }
}

/// What a group knows of one row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RowRecord {
    /// The row.
    pub id: Arc<RowIdentity>,
    /// Version that last wrote it.
    pub row_version: StateVersion,
    /// When the record last changed in a way that clients see.
    pub patch_version: CvrVersion,
    /// References by query; `None` is a tombstone, kept so that late clients get a `del`.
    pub ref_counts: Option<RefCounts>,
}

/// The references of a record after an update, `None` if none is left (spec §1.5).
///
/// Entries of `remove` in `existing` are dropped first: those queries were executed anew (their
/// counts come in `received`) or removed. Without `existing`, `received` is taken as it is.
pub fn merge_ref_counts(
    existing: Option<&RefCounts>,
    received: Option<&RefCounts>,
    remove: impl Fn(&QueryHash) -> bool,
) -> Option<RefCounts> {
    let merged = match existing {
        None => received.cloned().unwrap_or_default(),
        Some(existing) => {
            let kept = existing.iter().filter(|(q, _)| !remove(q));
            let added = received.into_iter().flat_map(RefCounts::iter);
            let mut merged = RefCounts::new();
            for (query, n) in kept.chain(added) {
                let sum = merged.get(query) + n;
                merged.set(query, sum);
            }
            merged
        }
    };
    merged.is_referenced().then_some(merged)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(entries: &[(&str, i64)]) -> RefCounts {
        entries.iter().map(|(q, n)| (QueryHash::from(*q), *n)).collect()
    }

    #[test]
    fn merging_into_nothing_takes_the_counts_as_they_are() {
        let received = counts(&[("a", 1), ("b", 0), ("c", -1)]);
        assert_eq!(merge_ref_counts(None, Some(&received), |_| false), Some(received));
        assert_eq!(merge_ref_counts(None, Some(&counts(&[("a", 0)])), |_| false), None);
        assert_eq!(merge_ref_counts(None, None, |_| false), None);
    }

    #[test]
    fn merging_drops_zeroes_and_removed_queries() {
        let existing = counts(&[("a", 2), ("b", 1), ("x", 7)]);
        let received = counts(&[("a", -1), ("b", -1), ("c", 3)]);
        let merged = merge_ref_counts(Some(&existing), Some(&received), |q| q.as_str() == "x");
        assert_eq!(merged, Some(counts(&[("a", 1), ("c", 3)])));
        assert_eq!(merge_ref_counts(Some(&counts(&[("x", 7)])), None, |_| true), None);
    }

    #[test]
    fn clones_of_a_snapshot_share_until_written() {
        let mut a = Cvr::empty("g".into());
        let q = Query::new("q".into(), QueryBody::Custom { name: "n".into(), args: "[]".into() });
        Arc::make_mut(&mut a.queries).insert(q.id.clone(), Arc::new(q));
        let mut b = a.clone();
        assert!(Arc::ptr_eq(&a.queries, &b.queries));
        b.query_mut(&"q".into()).unwrap().signature = Some(1);
        assert_eq!(a.query(&"q".into()).unwrap().signature, None);
    }
}
