//! Change-stream messages inside one process: what the upstream decoder (`net::pg::pgoutput` +
//! `replication`) hands to the replica's writer. Values are already *lite* values, i.e. what the
//! replica stores (spec: replication §2.4).

use std::sync::Arc;

use crate::version::StateVersion;

/// A value as SQLite stores it.
#[derive(Debug, Clone, PartialEq)]
pub enum LiteValue {
    /// NULL.
    Null,
    /// INTEGER (booleans are 0/1).
    Integer(i64),
    /// REAL.
    Real(f64),
    /// TEXT.
    Text(Box<str>),
    /// BLOB.
    Blob(Box<[u8]>),
}

/// How Postgres names the old row of an update or delete.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReplicaIdentity {
    /// The primary key.
    Default,
    /// A unique index.
    Index,
    /// The whole row.
    Full,
    /// Nothing.
    Nothing,
}

/// A published relation as the stream describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Relation {
    /// Table OID.
    pub oid: u32,
    /// Postgres schema.
    pub schema: String,
    /// Table name.
    pub name: String,
    /// How old rows are named.
    pub identity: ReplicaIdentity,
    /// Columns in attribute order.
    pub columns: Vec<RelationColumn>,
}

/// A column of a [`Relation`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RelationColumn {
    /// Column name.
    pub name: String,
    /// Part of the replica identity.
    pub is_key: bool,
    /// Type OID.
    pub type_oid: u32,
}

impl Relation {
    /// The table's name in the replica: `name`, or `schema.name` outside `public`.
    pub fn lite_name(&self) -> String {
        lite_name(&self.schema, &self.name)
    }
}

/// The replica's name for a Postgres table or index: `name`, or `schema.name` outside `public`.
pub fn lite_name(schema: &str, name: &str) -> String {
    if schema == "public" { name.to_owned() } else { format!("{schema}.{name}") }
}

/// One column of a tuple.
#[derive(Debug, Clone, PartialEq)]
pub enum TupleValue {
    /// A value.
    Value(LiteValue),
    /// An unchanged TOASTed value (the column keeps what it has), or a non-key column of a key
    /// tuple.
    Absent,
}

/// One entry per column of the relation, in attribute order.
pub type Tuple = Vec<TupleValue>;

/// One message of the change stream.
#[derive(Debug, Clone, PartialEq)]
pub enum ChangeMessage {
    /// A transaction begins; it will commit at `watermark`.
    Begin {
        /// Version that the commit produces.
        watermark: StateVersion,
        /// Upstream commit time, ms since the Unix epoch.
        commit_time_ms: f64,
    },
    /// A new row.
    Insert {
        /// Table.
        relation: Arc<Relation>,
        /// The row.
        new: Tuple,
    },
    /// A changed row.
    Update {
        /// Table.
        relation: Arc<Relation>,
        /// The old key (or the whole old row for identity FULL), if Postgres sent it.
        old: Option<Tuple>,
        /// The new row.
        new: Tuple,
    },
    /// A deleted row.
    Delete {
        /// Table.
        relation: Arc<Relation>,
        /// Key, or the whole row for identity FULL.
        old: Tuple,
    },
    /// Tables truncated together.
    Truncate {
        /// Tables.
        relations: Vec<Arc<Relation>>,
    },
    /// The transaction ends; its version is the watermark of its `Begin`.
    Commit {
        /// Must equal the begin's.
        watermark: StateVersion,
    },
    /// The transaction in progress is void (stream lost).
    Rollback,
}
