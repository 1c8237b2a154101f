//! Compiled query shapes. A plan is made once per AST shape; literals are lifted out to
//! parameter slots, so that queries which differ only in literals share it.
//!
//! A plan is a flat tree of [`Node`]s; [`Plan::ROOT`] is node 0 and children have larger numbers
//! than their parents. Column positions index [`TableSpec::columns`] of the node's table.
//! Everything that SQL and the predicate would answer differently is decided when the plan is
//! made (`crate::zql::compile`): a comparison in a plan is well typed.

use std::sync::Arc;

use smallvec::SmallVec;

use crate::schema::TableSpec;
use crate::zql::like::LikePattern;

/// Position of a node in [`Plan::nodes`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NodeId(pub u16);

/// Position of a literal in the parameters of an instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ParamId(pub u16);

/// The parameters of an instance: one per [`ParamId`].
pub type Params = [Param];

/// A lifted literal.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Param {
    /// One value.
    Value(crate::value::Value),
    /// The list of an IN / NOT IN, sorted and without duplicates.
    List(Arc<[crate::value::Value]>),
    /// A precompiled LIKE pattern.
    Like(Arc<LikePattern>),
}

/// A compiled query shape.
#[derive(Debug, PartialEq, Eq, Hash)]
pub struct Plan {
    /// Nodes; the root first, parents before children.
    pub nodes: Vec<Node>,
    /// Number of parameters.
    pub params: u16,
}

impl Plan {
    /// The root node.
    pub const ROOT: NodeId = NodeId(0);

    /// A node by number.
    pub fn node(&self, id: NodeId) -> &Node {
        &self.nodes[usize::from(id.0)]
    }

    /// How often a row can be in a result, and on what that depends.
    pub fn occurrence(&self) -> Occurrence {
        let root = self.node(Plan::ROOT);
        if self.nodes.len() == 1 && root.limit.is_none() {
            return Occurrence::OfItself;
        }
        let mut tables: SmallVec<[_; 8]> = SmallVec::new();
        for node in self.nodes.iter().filter(|node| !node.silent) {
            if tables.contains(&node.table.id) {
                return Occurrence::Many;
            }
            tables.push(node.table.id);
        }
        if self.nodes.iter().all(|node| self.children_have_one_parent(node)) {
            Occurrence::Once
        } else {
            Occurrence::Many
        }
    }

    /// No row below an edge of this node is below two of its rows.
    fn children_have_one_parent(&self, node: &Node) -> bool {
        let names_a_row = |columns: &[usize]| {
            node.table.primary_key.iter().all(|column| columns.contains(column))
        };
        node.related.iter().all(|edge| names_a_row(&edge.parent_columns))
            && node.condition.all_exists(&mut |leaf| {
                self.node(leaf.child).silent || names_a_row(&leaf.parent_columns)
            })
    }
}

/// What a plan says about how often a row is in its result.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Occurrence {
    /// At most once, and whether it is there depends on the row alone.
    OfItself,
    /// At most once; other rows decide too (a window, a parent, an EXISTS).
    Once,
    /// Perhaps several times.
    Many,
}

/// One query node: a table, what qualifies, its order and window, and its edges.
#[derive(Debug)]
pub struct Node {
    /// The table, with the identity key that this plan uses.
    pub table: Arc<TableSpec>,
    /// The whole `where`, EXISTS leaves included.
    pub condition: Condition,
    /// Order of the node's windows, completed by the identity key: total. For an EXISTS body:
    /// the identity key, ascending (the order of evidence).
    pub order: Vec<(usize, Direction)>,
    /// Start cursor.
    pub start: Option<Start>,
    /// Window size; `None` is unlimited. Always `None` for an EXISTS body: see [`ExistsEdge`].
    pub limit: Option<u64>,
    /// Related edges (down), last definition per alias.
    pub related: Vec<RelatedEdge>,
    /// How the node is reached.
    pub role: Role,
    /// The node, or one above it, is reached through a `system: permissions` edge or a NOT
    /// EXISTS: its rows are never emitted and do not count.
    pub silent: bool,
    /// A NOT EXISTS lies between the root and this node (or at the edge into it).
    pub below_not_exists: bool,
}

impl PartialEq for Node {
    fn eq(&self, o: &Self) -> bool {
        self.table == o.table
            && self.condition == o.condition
            && self.order == o.order
            && self.start == o.start
            && self.limit == o.limit
            && self.related == o.related
            && self.role == o.role
            && self.silent == o.silent
    }
}
impl Eq for Node {}
impl std::hash::Hash for Node {
    fn hash<H: std::hash::Hasher>(&self, h: &mut H) {
        self.table.name.hash(h);
        self.table.primary_key.hash(h);
        self.condition.hash(h);
        self.order.hash(h);
        self.start.hash(h);
        self.limit.hash(h);
        self.related.hash(h);
    }
}

/// How a node is reached from its parent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Role {
    /// The root.
    Root,
    /// Child of a related edge of `parent`.
    Related {
        /// Parent node.
        parent: NodeId,
    },
    /// Body of an EXISTS or NOT EXISTS leaf of `parent`.
    Exists {
        /// Parent node.
        parent: NodeId,
        /// NOT EXISTS.
        negated: bool,
    },
}

/// Sort direction. Nulls come first ascending, last descending.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Direction {
    /// Ascending.
    Asc,
    /// Descending.
    Desc,
}

/// A start cursor: rows before it do not exist for the query.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Start {
    /// The order that the cursor is a position of: the query's own, completed. It is
    /// [`Node::order`] except in an EXISTS body, whose `order` is that of its evidence.
    pub order: Vec<(usize, Direction)>,
    /// One parameter per element of `order` (missing columns are null).
    pub position: Vec<ParamId>,
    /// The cursor row itself is excluded.
    pub exclusive: bool,
}

/// A monotone boolean expression over simple conditions and EXISTS leaves. There is no NOT node.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Condition {
    /// Constant.
    Const(bool),
    /// All of them.
    And(Vec<Condition>),
    /// Any of them.
    Or(Vec<Condition>),
    /// A comparison of a column with a parameter.
    Simple(Simple),
    /// An EXISTS / NOT EXISTS leaf.
    Exists(ExistsEdge),
}

impl Condition {
    /// Whether something holds for every EXISTS and NOT EXISTS leaf.
    fn all_exists(&self, holds: &mut dyn FnMut(&ExistsEdge) -> bool) -> bool {
        match self {
            Condition::Const(_) | Condition::Simple(_) => true,
            Condition::And(all) | Condition::Or(all) => all.iter().all(|c| c.all_exists(holds)),
            Condition::Exists(leaf) => holds(leaf),
        }
    }
}

/// `column op parameter`, well typed: a null column is decided by `op` (spec: zql-ivm §2.4).
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Simple {
    /// The column.
    pub column: usize,
    /// The operator.
    pub op: Op,
    /// Its right side.
    pub param: ParamId,
}

/// Operators after compilation. A null literal was folded: `IS null` is [`Op::IsNull`] (its
/// parameter is `Param::Value(Null)`), every other operator with null is `Const(false)`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum Op {
    Eq,
    Ne,
    /// `IS v`, v not null.
    Is,
    /// `IS NOT v`, v not null: true for a null column.
    IsNot,
    IsNull,
    IsNotNull,
    Lt,
    Gt,
    Le,
    Ge,
    In,
    NotIn,
    /// LIKE and ILIKE; the pattern knows which.
    Like,
    NotLike,
}

/// An EXISTS or NOT EXISTS leaf. A leaf whose body limit is 0 was folded to a constant; any
/// other limit, the order and `related` of the body do not change its truth.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ExistsEdge {
    /// NOT EXISTS.
    pub negated: bool,
    /// Parent columns, matched by position.
    pub parent_columns: Vec<usize>,
    /// Child columns.
    pub child_columns: Vec<usize>,
    /// The body.
    pub child: NodeId,
    /// `system: permissions`: nothing at or below is ever emitted.
    pub permissions: bool,
}

/// A related edge.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct RelatedEdge {
    /// Parent columns, matched by position.
    pub parent_columns: Vec<usize>,
    /// Child columns.
    pub child_columns: Vec<usize>,
    /// The child.
    pub child: NodeId,
}
