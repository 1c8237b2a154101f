//! Second pass: the folded tree becomes a flat plan; literals become parameters, in pre-order.

use super::resolve::{Draft, DraftCondition};
use crate::ivm::plan::{
    Condition, ExistsEdge, Node, NodeId, Param, ParamId, Plan, RelatedEdge, Role, Simple, Start,
};

#[derive(Default)]
struct Numbering {
    nodes: Vec<Option<Node>>,
    params: Vec<Param>,
}

/// Lays a tree out. The resolver's bounds keep nodes and parameters within 16 bits.
pub(super) fn number(root: Draft) -> (Plan, Vec<Param>) {
    let mut n = Numbering::default();
    n.node(root, Role::Root, false, false);
    let plan =
        Plan { nodes: n.nodes.into_iter().flatten().collect(), params: n.params.len() as u16 };
    (plan, n.params)
}

impl Numbering {
    fn param(&mut self, p: Param) -> ParamId {
        self.params.push(p);
        ParamId((self.params.len() - 1) as u16)
    }

    fn node(&mut self, d: Draft, role: Role, silent: bool, below_not_exists: bool) -> NodeId {
        let id = NodeId(self.nodes.len() as u16);
        self.nodes.push(None);
        let start = d.start.map(|s| Start {
            order: s.order,
            position: s.position.into_iter().map(|v| self.param(Param::Value(v))).collect(),
            exclusive: s.exclusive,
        });
        let condition = self.condition(d.condition, id, silent, below_not_exists);
        let related = d
            .related
            .into_iter()
            .map(|e| RelatedEdge {
                parent_columns: e.parent_columns,
                child_columns: e.child_columns,
                child: self.node(e.child, Role::Related { parent: id }, silent, below_not_exists),
            })
            .collect();
        self.nodes[usize::from(id.0)] = Some(Node {
            table: d.table,
            condition,
            order: d.order,
            start,
            limit: d.limit,
            related,
            role,
            silent,
            below_not_exists,
        });
        id
    }

    fn condition(
        &mut self,
        c: DraftCondition,
        parent: NodeId,
        silent: bool,
        below_not_exists: bool,
    ) -> Condition {
        let each = |n: &mut Self, list: Vec<DraftCondition>| {
            list.into_iter().map(|c| n.condition(c, parent, silent, below_not_exists)).collect()
        };
        match c {
            DraftCondition::Const(b) => Condition::Const(b),
            DraftCondition::And(all) => Condition::And(each(self, all)),
            DraftCondition::Or(any) => Condition::Or(each(self, any)),
            DraftCondition::Simple { column, op, param } => {
                Condition::Simple(Simple { column, op, param: self.param(param) })
            }
            DraftCondition::Exists { negated, permissions, edge } => {
                let child = self.node(
                    edge.child,
                    Role::Exists { parent, negated },
                    silent || permissions || negated,
                    below_not_exists || negated,
                );
                Condition::Exists(ExistsEdge {
                    negated,
                    parent_columns: edge.parent_columns,
                    child_columns: edge.child_columns,
                    child,
                    permissions,
                })
            }
        }
    }
}
