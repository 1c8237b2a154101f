//! What the groups of an executor share, so that a change that reaches thousands of them costs one
//! encoding and one read, and so that what they have in common is in memory once.
//!
//! Everything here is a cache: forgotten when it grows, and every few seconds
//! ([`Shared::sweep`]); a group that comes later makes its own. Only client schemas and queries
//! stay while a group has them.

use std::hash::{Hash, Hasher};
use std::sync::Arc;

use rustc_hash::{FxHashMap, FxHashSet, FxHasher};
use smallvec::SmallVec;

use super::poke::{Frame, WirePatch};
use crate::cvr::{Ast, ClientSchema, Cvr, QueryBody, QueryHash, RowIdentity};
use crate::row::RowRef;
use crate::version::{CvrVersion, StateVersion};

/// Bytes of frames that are kept.
const MAX_KEPT_BYTES: usize = 8 << 20;
/// Parts that are larger are kept when they come a second time: most large pokes are the rows of a
/// query of one group's own, and to keep each would touch new memory for every one.
const MAX_UNSEEN_BYTES: usize = 4 << 10;
/// A poke that is larger is not kept: nobody waits for one encoding more of it.
const MAX_POKE_BYTES: usize = 2 << 20;
/// Entries that are kept, whatever their size.
const MAX_ENTRIES: usize = 4_096;
/// Rows that are kept.
const MAX_ROWS: usize = 16_384;
/// Client schemas that are shared: one per build of the app that is in use.
const MAX_SCHEMAS: usize = 256;
/// Queries that are shared: a group with one that is not has its own.
const MAX_QUERIES: usize = 4_096;

/// See the [module](self).
#[derive(Debug, Default)]
pub struct Shared {
    /// Frames of pokes.
    pub frames: SharedFrames,
    /// Rows of the replica.
    pub rows: SharedRows,
    /// Client schemas.
    pub schemas: SharedSchemas,
    /// Queries that clients sent.
    pub queries: SharedQueries,
}

impl Shared {
    /// Forgets everything that nobody holds. To be called every few seconds.
    pub fn sweep(&mut self) {
        self.frames.clear();
        self.rows.clear();
        self.schemas.sweep();
        self.queries.sweep();
    }

    /// Replaces what a loaded CVR has in common with others.
    pub(super) fn share_loaded(&mut self, cvr: &mut Cvr) {
        if let Some(own) = cvr.client_schema.take() {
            cvr.client_schema = Some(self.schemas.share(own));
        }
        for query in Arc::make_mut(&mut cvr.queries).values_mut() {
            if let QueryBody::Client { ast } = &query.body {
                let ast = self.queries.share(&query.id, ast.clone());
                Arc::make_mut(query).body = QueryBody::Client { ast };
            }
        }
    }
}

/// Pokes made lately, by what they say.
#[derive(Debug, Default)]
pub struct SharedFrames {
    parts: FxHashMap<u64, SmallVec<[Parts; 1]>>,
    pokes: FxHashMap<u64, SmallVec<[Whole; 1]>>,
    /// Fingerprints of large parts that came once, and are not kept.
    seen: FxHashSet<u64>,
    entries: usize,
    bytes: usize,
    made: u64,
    reused: u64,
}

#[derive(Debug)]
struct Parts {
    cookie: Box<str>,
    binary: bool,
    patches: Box<[WirePatch]>,
    frames: Arc<[Frame]>,
}

#[derive(Debug)]
struct Whole {
    cookie: Box<str>,
    base: Option<CvrVersion>,
    /// Kept beside its address.
    parts: Arc<[Frame]>,
    frames: Arc<[Frame]>,
}

impl SharedFrames {
    /// How often the parts of a poke were encoded.
    pub fn made(&self) -> u64 {
        self.made
    }

    /// How often they were there already.
    pub fn reused(&self) -> u64 {
        self.reused
    }

    /// The parts of the poke `cookie` with these patches; `encode` makes them.
    pub(super) fn parts(
        &mut self,
        cookie: &str,
        patches: &[&WirePatch],
        binary: bool,
        encode: impl FnOnce() -> Arc<[Frame]>,
    ) -> Arc<[Frame]> {
        let mut hasher = FxHasher::default();
        (cookie, binary, patches.len()).hash(&mut hasher);
        patches.iter().for_each(|p| p.fingerprint(&mut hasher));
        let hash = hasher.finish();
        let alike = |k: &&Parts| {
            *k.cookie == *cookie
                && k.binary == binary
                && k.patches.len() == patches.len()
                && k.patches.iter().zip(patches).all(|(a, b)| a.is_same(b))
        };
        if let Some(known) = self.parts.get(&hash).and_then(|k| k.iter().find(alike)) {
            self.reused += 1;
            return known.frames.clone();
        }
        self.made += 1;
        let frames = encode();
        if self.is_worth_keeping(hash, &frames) && self.make_room(&frames) {
            self.parts.entry(hash).or_default().push(Parts {
                cookie: cookie.into(),
                binary,
                patches: patches.iter().map(|p| (*p).clone()).collect(),
                frames: frames.clone(),
            });
        }
        frames
    }

    /// The poke from `base` to `cookie` with these parts; `wrap` puts start and end around them.
    pub(super) fn poke(
        &mut self,
        cookie: &str,
        base: Option<&CvrVersion>,
        parts: &Arc<[Frame]>,
        wrap: impl FnOnce() -> Arc<[Frame]>,
    ) -> Arc<[Frame]> {
        let mut hasher = FxHasher::default();
        (cookie, base).hash(&mut hasher);
        if !parts.is_empty() {
            parts.as_ptr().hash(&mut hasher);
        }
        let hash = hasher.finish();
        let alike = |k: &&Whole| {
            *k.cookie == *cookie
                && k.base.as_ref() == base
                && (Arc::ptr_eq(&k.parts, parts) || (k.parts.is_empty() && parts.is_empty()))
        };
        if let Some(known) = self.pokes.get(&hash).and_then(|k| k.iter().find(alike)) {
            return known.frames.clone();
        }
        let frames = wrap();
        // Large parts that nobody else holds are not kept here either.
        let once = Arc::strong_count(parts) == 1 && length(parts) > MAX_UNSEEN_BYTES;
        if !once && self.make_room(parts) {
            self.pokes.entry(hash).or_default().push(Whole {
                cookie: cookie.into(),
                base: base.cloned(),
                parts: parts.clone(),
                frames: frames.clone(),
            });
        }
        frames
    }

    /// Whether somebody else may want these parts.
    fn is_worth_keeping(&mut self, hash: u64, parts: &[Frame]) -> bool {
        if length(parts) <= MAX_UNSEEN_BYTES {
            return true;
        }
        if self.seen.len() >= MAX_ENTRIES {
            self.seen.clear();
        }
        !self.seen.insert(hash)
    }

    /// Bytes of frames that are kept.
    pub fn kept_bytes(&self) -> usize {
        self.bytes
    }

    /// Whether frames are to be kept; counts them.
    fn make_room(&mut self, frames: &[Frame]) -> bool {
        let bytes = length(frames);
        if bytes > MAX_POKE_BYTES {
            return false;
        }
        if self.bytes + bytes > MAX_KEPT_BYTES || self.entries >= MAX_ENTRIES {
            self.clear();
        }
        self.bytes += bytes;
        self.entries += 1;
        true
    }

    fn clear(&mut self) {
        self.parts.clear();
        self.pokes.clear();
        self.seen.clear();
        self.bytes = 0;
        self.entries = 0;
    }
}

fn length(frames: &[Frame]) -> usize {
    frames.iter().map(|f| f.payload.len()).sum()
}

/// Rows of the replica at one version, as they were read.
#[derive(Debug, Default)]
pub struct SharedRows {
    version: StateVersion,
    rows: FxHashMap<Arc<RowIdentity>, Option<RowRef>>,
}

impl SharedRows {
    /// What is known of a row at `version`; forgets other versions.
    pub(super) fn get(
        &mut self,
        version: &StateVersion,
        id: &Arc<RowIdentity>,
    ) -> Option<Option<RowRef>> {
        if self.version != *version {
            self.version = version.clone();
            self.clear();
        }
        self.rows.get(id).cloned()
    }

    /// Keeps a row that was read at the version of the last [`SharedRows::get`].
    pub(super) fn put(&mut self, id: Arc<RowIdentity>, row: Option<RowRef>) {
        if self.rows.len() >= MAX_ROWS {
            self.clear();
        }
        self.rows.insert(id, row);
    }

    fn clear(&mut self) {
        self.rows.clear();
    }
}

/// Client schemas of the groups, one of each: all clients of one build of the app bring the same,
/// and it takes kilobytes.
#[derive(Debug, Default)]
pub struct SharedSchemas {
    by_text: FxHashMap<Box<str>, Arc<ClientSchema>>,
}

impl SharedSchemas {
    /// This schema, or the one that says the same in the same words.
    pub(super) fn share(&mut self, schema: Arc<ClientSchema>) -> Arc<ClientSchema> {
        if let Some(known) = self.by_text.get(schema.text()) {
            return known.clone();
        }
        if self.by_text.len() >= MAX_SCHEMAS {
            self.sweep();
        }
        if self.by_text.len() < MAX_SCHEMAS {
            self.by_text.insert(schema.text().into(), schema.clone());
        }
        schema
    }

    /// Forgets those that no group has any more.
    fn sweep(&mut self) {
        self.by_text.retain(|_, schema| Arc::strong_count(schema) > 1);
    }
}

/// Queries as clients sent them, one of each.
#[derive(Debug, Default)]
pub struct SharedQueries {
    by_hash: FxHashMap<QueryHash, Ast>,
}

impl SharedQueries {
    /// This query, or the one that is the same. The hash is the client's: it only finds.
    pub(super) fn share(&mut self, hash: &QueryHash, ast: Ast) -> Ast {
        if let Some(known) = self.by_hash.get(hash) {
            return if Arc::ptr_eq(known, &ast) || **known == *ast { known.clone() } else { ast };
        }
        if self.by_hash.len() < MAX_QUERIES {
            self.by_hash.insert(hash.clone(), ast.clone());
        }
        ast
    }

    /// Forgets those that no group has any more.
    fn sweep(&mut self) {
        self.by_hash.retain(|_, ast| Arc::strong_count(ast) > 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::row::Row;

    #[test]
    fn a_query_is_there_once_whatever_hash_a_client_claims() {
        let ast = |table: &str| Arc::new(crate::zql::ast::Ast::table(table));
        let mut shared = Shared::default();
        let (hash, other_hash) = (QueryHash::from("h"), QueryHash::from("i"));
        let one = shared.queries.share(&hash, ast("a"));
        assert!(Arc::ptr_eq(&one, &shared.queries.share(&hash, ast("a"))));
        let false_claim = shared.queries.share(&hash, ast("b"));
        assert_eq!(false_claim, ast("b"), "a query stays what it is");
        shared.queries.share(&other_hash, ast("a"));
        shared.sweep();
        assert_eq!(shared.queries.by_hash.len(), 1, "nobody has the other one");
        let mut cvr = Cvr::empty("g".into());
        let body = QueryBody::Client { ast: ast("a") };
        let query = crate::cvr::Query::new(hash.clone(), body);
        Arc::make_mut(&mut cvr.queries).insert(hash.clone(), Arc::new(query));
        shared.share_loaded(&mut cvr);
        let QueryBody::Client { ast } = &cvr.queries[&hash].body else { unreachable!() };
        assert!(Arc::ptr_eq(&one, ast));
    }

    fn schema(table: usize) -> Arc<ClientSchema> {
        let text =
            format!(r#"{{"tables":{{"t{table}":{{"columns":{{"a":{{"type":"json"}}}}}}}}}}"#);
        Arc::new(ClientSchema::parse(&text).unwrap())
    }

    #[test]
    fn a_client_schema_is_there_once_while_somebody_has_it() {
        let mut shared = Shared::default();
        let one = shared.schemas.share(schema(1));
        assert!(Arc::ptr_eq(&one, &shared.schemas.share(schema(1))));
        assert!(!Arc::ptr_eq(&one, &shared.schemas.share(schema(2))));
        shared.sweep();
        assert!(Arc::ptr_eq(&one, &shared.schemas.share(schema(1))));
        assert_eq!(shared.schemas.by_text.len(), 1, "nobody has the other one");
    }

    #[test]
    fn a_schema_beyond_those_that_are_shared_is_served_all_the_same() {
        let mut shared = SharedSchemas::default();
        let held: Vec<_> = (0..=MAX_SCHEMAS).map(|i| shared.share(schema(i))).collect();
        assert_eq!(shared.by_text.len(), MAX_SCHEMAS);
        assert_eq!(held[MAX_SCHEMAS], schema(MAX_SCHEMAS));
        drop(held);
        shared.share(schema(MAX_SCHEMAS));
        assert_eq!(shared.by_text.len(), 1, "room was made");
    }

    fn frames(text: &str) -> Arc<[Frame]> {
        [Frame::text(text.as_bytes())].into()
    }

    #[test]
    fn equal_patches_of_one_version_are_encoded_once() {
        let mut shared = SharedFrames::default();
        let row = Row::new(StateVersion::zero(), Vec::new());
        let put = |row: &RowRef| WirePatch::RowPut("t".into(), row.clone());
        let (one, same) = (put(&row), put(&row));
        let other = put(&Row::new(StateVersion::zero(), Vec::new()));
        let first = shared.parts("v1", &[&one], false, || frames("1"));
        let again = shared.parts("v1", &[&same], false, || unreachable!("made before"));
        assert!(Arc::ptr_eq(&first, &again));
        let different: [(&str, &[&WirePatch], bool); 4] = [
            ("v2", &[&one], false),
            ("v1", &[&one], true),
            ("v1", &[&other], false),
            ("v1", &[&one, &one], false),
        ];
        for (cookie, patches, binary) in different {
            let frames = shared.parts(cookie, patches, binary, || frames("2"));
            assert!(!Arc::ptr_eq(&first, &frames), "{cookie} {binary}");
        }
        assert_eq!((shared.made(), shared.reused()), (5, 1));
    }

    #[test]
    fn what_is_kept_is_bounded() {
        let mut shared = SharedFrames::default();
        for i in 0..3 * MAX_ENTRIES {
            shared.parts(&i.to_string(), &[], true, || frames("x"));
            assert!(shared.entries <= MAX_ENTRIES);
        }
        let large = "x".repeat(MAX_POKE_BYTES);
        for i in 0..9 {
            shared.parts(&format!("large {i}"), &[], true, || frames(&large));
            assert!(shared.bytes <= MAX_KEPT_BYTES);
        }
        let before = shared.entries;
        shared.parts("too large", &[], true, || frames(&format!("{large}x")));
        assert_eq!(shared.entries, before, "not kept");
    }
}
