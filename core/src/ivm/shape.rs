//! What the engine derives from a plan once: how each node is kept, searched and routed.

use std::sync::Arc;

use super::engine::Overshoot;
use super::mutant::{self, Mutant};
use super::partition::Window;
use super::plan::{Condition, Direction, Node, NodeId, Op, Param, ParamId, Plan, Role, Simple};
use super::ranges::Range;
use super::signature::RowName;
use crate::row::{Key, Row};
use crate::schema::TableSpec;
use crate::value::Value;
use crate::zql::order::complete;
use crate::zql::predicate;

/// Evidence rows per join key of an EXISTS leaf (decisions.md 6).
pub(super) const EVIDENCE: usize = 3;

/// Branches of an OR that are routed by their equalities, at most: each is an entry per instance.
const MAX_BRANCHES: usize = 64;

/// A plan with what the engine knows about it.
#[derive(Debug)]
pub(super) struct Shape {
    /// The plan as executed: nodes whose order nobody can observe are ordered by identity key,
    /// so that reading them in slices follows an index.
    pub(super) plan: Arc<Plan>,
    pub(super) nodes: Box<[NodeShape]>,
}

/// How a node is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// One partition, always wanted.
    Root,
    /// One partition per key of a visible parent.
    Related,
    /// EXISTS body: up to [`EVIDENCE`] rows per key of a resident parent.
    Evidence,
    /// Body of a NOT EXISTS or of a permissions EXISTS, or anything below one: nothing is kept,
    /// nothing emitted; truth comes from point queries.
    Bare,
    /// A related node below a bare one: decides nothing, is read by nobody.
    Dead,
}

/// An edge to a child node.
#[derive(Debug, Clone)]
pub(super) struct Edge {
    pub(super) child: NodeId,
    pub(super) parent_columns: Box<[usize]>,
    pub(super) child_columns: Box<[usize]>,
    /// Order of rows by the parent columns, made total by the identity key.
    pub(super) parent_order: Box<[(usize, Direction)]>,
}

impl Edge {
    fn new(child: NodeId, parent: &TableSpec, columns: &[usize], child_columns: &[usize]) -> Edge {
        let mut order: Vec<_> = columns.iter().map(|&c| (c, Direction::Asc)).collect();
        complete(&mut order, &parent.primary_key);
        Edge {
            child,
            parent_columns: columns.into(),
            child_columns: child_columns.into(),
            parent_order: order.into(),
        }
    }
}

/// A node.
#[derive(Debug)]
pub(super) struct NodeShape {
    pub(super) id: NodeId,
    pub(super) table: Arc<TableSpec>,
    pub(super) parent: Option<NodeId>,
    pub(super) kind: Kind,
    /// Child columns of the edge into this node; empty for the root.
    pub(super) join: Box<[usize]>,
    pub(super) order: Box<[(usize, Direction)]>,
    pub(super) window: Window,
    /// EXISTS and NOT EXISTS leaves of its condition.
    pub(super) leaves: Box<[Edge]>,
    pub(super) related: Box<[Edge]>,
    /// No other node keeps rows of this table.
    pub(super) alone: bool,
    /// Body of an EXISTS or NOT EXISTS: rows that nobody holds matter when they stop qualifying
    /// too, and are searched with the weak predicate.
    pub(super) below_leaf: bool,
    pub(super) access: Access,
    /// How the signature names a row of this node.
    pub(super) row_name: RowName,
    /// The node whose parameter groups this node is routed by: itself for the root, the topmost
    /// EXISTS or NOT EXISTS body above (or at) it for a body; `None` for related nodes.
    pub(super) owner: Option<NodeId>,
    /// Parameters that the weak predicates of the nodes it owns read, ascending: instances that
    /// agree on them are routed as one, and find the same dirty rows.
    pub(super) group_params: Box<[ParamId]>,
}

/// How a changed row finds the instances that may want it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Access {
    /// By the values of columns: one of these.
    Equal(Box<[Equal]>),
    /// By where the value of a column lies.
    Between(Between),
    /// Each instance must look at it.
    All,
}

/// Equality conjuncts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Equal {
    /// Columns, ascending; at least one.
    pub(super) columns: Box<[usize]>,
    parts: Box<[Part]>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    Null,
    Value(ParamId),
    List(ParamId),
}

/// Range conjuncts of one column.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Between {
    pub(super) column: usize,
    from: Option<ParamId>,
    to: Option<ParamId>,
}

impl NodeShape {
    /// Whether partitions of this node exist.
    pub(super) fn is_held(&self) -> bool {
        !matches!(self.kind, Kind::Bare | Kind::Dead)
    }
}

impl Shape {
    pub(super) fn new(plan: &Plan, overshoot: Overshoot) -> Shape {
        let nodes: Vec<Node> = plan.nodes.iter().map(executed).collect();
        let plan = Arc::new(Plan { nodes, params: plan.params });
        let mut shapes: Vec<NodeShape> = Vec::with_capacity(plan.nodes.len());
        for (i, node) in plan.nodes.iter().enumerate() {
            let id = NodeId(i as u16);
            let shape = NodeShape::new(id, node, overshoot, &shapes);
            shapes.push(shape);
        }
        for i in 0..shapes.len() {
            let Some(owner) = shapes[i].owner.filter(|o| usize::from(o.0) != i) else { continue };
            let theirs = std::mem::take(&mut shapes[i].group_params);
            let owner = &mut shapes[usize::from(owner.0)];
            let mut all: Vec<ParamId> = owner.group_params.iter().chain(&theirs).copied().collect();
            all.sort_unstable();
            all.dedup();
            owner.group_params = all.into();
        }
        for i in 0..shapes.len() {
            let table = shapes[i].table.id;
            let of_table = |n: &&NodeShape| n.is_held() && n.table.id == table;
            shapes[i].alone = shapes.iter().filter(of_table).count() == 1;
        }
        Shape { plan, nodes: shapes.into() }
    }

    /// Nodes that are routed by the groups of `owner`, itself first.
    pub(super) fn owned(&self, owner: NodeId) -> impl DoubleEndedIterator<Item = &NodeShape> {
        self.nodes.iter().filter(move |n| n.owner == Some(owner))
    }

    pub(super) fn node(&self, id: NodeId) -> &NodeShape {
        &self.nodes[usize::from(id.0)]
    }
}

/// The node as the engine executes it.
fn executed(node: &Node) -> Node {
    let identity = || node.table.primary_key.iter().map(|&c| (c, Direction::Asc)).collect();
    Node {
        table: Arc::clone(&node.table),
        condition: node.condition.clone(),
        order: if node.limit.is_none() { identity() } else { node.order.clone() },
        start: node.start.clone(),
        limit: node.limit,
        related: node.related.clone(),
        role: node.role,
        silent: node.silent,
        below_not_exists: node.below_not_exists,
    }
}

impl NodeShape {
    fn new(id: NodeId, node: &Node, overshoot: Overshoot, above: &[NodeShape]) -> NodeShape {
        let (parent, kind) = match node.role {
            Role::Root => (None, Kind::Root),
            Role::Related { parent } => (Some(parent), Kind::Related),
            Role::Exists { parent, negated: true } => (Some(parent), Kind::Bare),
            Role::Exists { parent, .. } => (Some(parent), Kind::Evidence),
        };
        let parent = parent.map(|p| &above[usize::from(p.0)]);
        let dead = parent.is_some_and(|p| p.kind == Kind::Dead);
        let bare = node.silent || parent.is_some_and(|p| p.kind == Kind::Bare);
        let kind = match kind {
            Kind::Root => Kind::Root,
            _ if dead => Kind::Dead,
            Kind::Related if bare => Kind::Dead,
            _ if bare => Kind::Bare,
            kind => kind,
        };
        let exists = matches!(node.role, Role::Exists { .. });
        let join = parent
            .and_then(|p| p.leaves.iter().chain(&*p.related).find(|e| e.child == id))
            .map(|e| e.child_columns.clone())
            .unwrap_or_default();
        let window = if exists {
            Window { limit: Some(EVIDENCE), overshoot: 0 }
        } else {
            window(node.limit, overshoot)
        };
        let mut leaves = Vec::new();
        collect_leaves(&node.condition, &node.table, &mut leaves);
        let related = node
            .related
            .iter()
            .map(|e| Edge::new(e.child, &node.table, &e.parent_columns, &e.child_columns));
        let mut params = Vec::new();
        collect_params(&node.condition, &mut params);
        params.extend(node.start.iter().flat_map(|s| &s.position));
        params.sort_unstable();
        params.dedup();
        let owner = match kind {
            Kind::Root => Some(id),
            Kind::Related | Kind::Dead => None,
            // Of a body below a body: the body above owns it.
            Kind::Evidence | Kind::Bare => {
                Some(parent.filter(|p| p.below_leaf).and_then(|p| p.owner).unwrap_or(id))
            }
        };
        NodeShape {
            id,
            table: Arc::clone(&node.table),
            kind,
            join,
            order: node.order.clone().into(),
            window,
            leaves: leaves.into(),
            related: related.collect(),
            alone: false,
            below_leaf: exists,
            access: Access::of(node),
            row_name: RowName::new(&node.table),
            parent: parent.map(|p| p.id),
            owner,
            group_params: params.into(),
        }
    }
}

fn window(limit: Option<u64>, overshoot: Overshoot) -> Window {
    let Some(limit) = limit else { return Window { limit: None, overshoot: 0 } };
    let overshoot = match overshoot {
        Overshoot::Fixed(n) => n,
        Overshoot::Proportional { min, divisor } => min.max(limit / divisor.max(1)),
    };
    let size = |n| usize::try_from(n).unwrap_or(usize::MAX);
    Window { limit: Some(size(limit)), overshoot: size(overshoot) }
}

fn collect_leaves(condition: &Condition, table: &TableSpec, out: &mut Vec<Edge>) {
    match condition {
        Condition::And(all) | Condition::Or(all) => {
            all.iter().for_each(|c| collect_leaves(c, table, out));
        }
        Condition::Exists(e) => {
            out.push(Edge::new(e.child, table, &e.parent_columns, &e.child_columns));
        }
        Condition::Const(_) | Condition::Simple(_) => {}
    }
}

fn collect_params(condition: &Condition, out: &mut Vec<ParamId>) {
    match condition {
        Condition::And(all) | Condition::Or(all) => {
            all.iter().for_each(|c| collect_params(c, out));
        }
        Condition::Simple(s) => out.push(s.param),
        Condition::Const(_) | Condition::Exists(_) => {}
    }
}

impl Access {
    /// Equalities, if there are any; without, the bounds of one column, both if there is such a
    /// column.
    fn of(node: &Node) -> Access {
        if let Some(mut any) = equalities(&node.condition) {
            if mutant::is(Mutant::OneBranchRouted) {
                any.truncate(1);
            }
            return Access::Equal(any.into());
        }
        let mut conjuncts = Vec::new();
        collect_conjuncts(&node.condition, &mut conjuncts);
        let simple: Vec<&Simple> = conjuncts.into_iter().filter_map(as_simple).collect();
        Between::of(node, &simple).map_or(Access::All, Access::Between)
    }
}

/// One of these holds whenever a condition does, all EXISTS taken as true: all equality conjuncts
/// together; without any, one IN list; without that, an OR of which each branch has such. `None`
/// if there is nothing of the kind; nothing, if the condition never holds.
fn equalities(condition: &Condition) -> Option<Vec<Equal>> {
    if let Condition::Const(false) = condition {
        return Some(Vec::new());
    }
    let mut conjuncts = Vec::new();
    collect_conjuncts(condition, &mut conjuncts);
    let simple = || conjuncts.iter().copied().filter_map(as_simple);
    let part = |c: &Simple| match c.op {
        Op::Eq | Op::Is => Some((c.column, Part::Value(c.param))),
        Op::IsNull => Some((c.column, Part::Null)),
        _ => None,
    };
    let mut parts: Vec<(usize, Part)> = Vec::new();
    for (column, part) in simple().filter_map(part) {
        if !parts.iter().any(|p| p.0 == column) {
            parts.push((column, part));
        }
    }
    if parts.is_empty() {
        let list = simple().find(|c| c.op == Op::In);
        parts.extend(list.map(|c| (c.column, Part::List(c.param))));
    }
    if !parts.is_empty() {
        parts.sort_unstable_by_key(|p| p.0);
        let (columns, parts): (Vec<usize>, Vec<Part>) = parts.into_iter().unzip();
        return Some(vec![Equal { columns: columns.into(), parts: parts.into() }]);
    }
    let branches = conjuncts.iter().filter_map(|c| match c {
        Condition::Or(any) => any.iter().map(equalities).collect::<Option<Vec<_>>>(),
        _ => None,
    });
    let any = branches.map(|any| any.concat()).min_by_key(Vec::len)?;
    (any.len() <= MAX_BRANCHES).then_some(any)
}

fn as_simple(condition: &Condition) -> Option<&Simple> {
    match condition {
        Condition::Simple(s) => Some(s),
        _ => None,
    }
}

impl Between {
    fn of(node: &Node, conjuncts: &[&Simple]) -> Option<Between> {
        let mut found: Vec<Between> = Vec::new();
        let mut bound = |column: usize, from: Option<ParamId>, to: Option<ParamId>| match found
            .iter_mut()
            .find(|b| b.column == column)
        {
            Some(b) => (b.from, b.to) = (b.from.or(from), b.to.or(to)),
            None => found.push(Between { column, from, to }),
        };
        for c in conjuncts {
            match c.op {
                Op::Gt | Op::Ge => bound(c.column, Some(c.param), None),
                Op::Lt | Op::Le => bound(c.column, None, Some(c.param)),
                _ => {}
            }
        }
        // A row is not before the cursor in its first column.
        let start = node.start.as_ref();
        if let Some((&(column, direction), &at)) =
            start.and_then(|s| s.order.first().zip(s.position.first()))
        {
            match direction {
                Direction::Asc => bound(column, Some(at), None),
                Direction::Desc => bound(column, None, Some(at)),
            }
        }
        let both = found.iter().find(|b| b.from.is_some() && b.to.is_some());
        both.or(found.first()).copied()
    }

    /// The values that an instance may want.
    pub(super) fn range(&self, params: &[Param]) -> Range {
        let value = |id: ParamId| match &params[usize::from(id.0)] {
            Param::Value(v) => Some(v.clone()),
            Param::List(_) | Param::Like(_) => None,
        };
        Range { from: self.from.and_then(value), to: self.to.and_then(value) }
    }
}

impl Equal {
    /// The values of [`Equal::columns`] that an instance wants.
    pub(super) fn keys(&self, params: &[Param]) -> Vec<Key> {
        let list = match &*self.parts {
            [Part::List(id)] => match &params[usize::from(id.0)] {
                Param::List(values) => Some(values),
                _ => None,
            },
            _ => None,
        };
        if let Some(values) = list {
            return values.iter().map(|v| Key::from_iter([v.clone()])).collect();
        }
        let value = |part: &Part| match part {
            Part::Null => Value::Null,
            Part::Value(id) | Part::List(id) => match &params[usize::from(id.0)] {
                Param::Value(v) => v.clone(),
                Param::List(_) | Param::Like(_) => Value::Null,
            },
        };
        vec![self.parts.iter().map(value).collect()]
    }
}

fn collect_conjuncts<'a>(condition: &'a Condition, out: &mut Vec<&'a Condition>) {
    match condition {
        Condition::And(all) => all.iter().for_each(|c| collect_conjuncts(c, out)),
        Condition::Or(one) if one.len() == 1 => collect_conjuncts(&one[0], out),
        other => out.push(other),
    }
}

/// Whether a condition can hold, as far as one can tell without parameters: the same for all
/// instances.
pub(super) fn possible(condition: &Condition, row: &Row) -> bool {
    match condition {
        Condition::Const(b) => *b,
        Condition::And(all) => all.iter().all(|c| possible(c, row)),
        Condition::Or(any) => any.iter().any(|c| possible(c, row)),
        Condition::Simple(s) if matches!(s.op, Op::IsNull | Op::IsNotNull) => {
            predicate::simple(s, row, &[])
        }
        Condition::Simple(_) | Condition::Exists(_) => true,
    }
}
