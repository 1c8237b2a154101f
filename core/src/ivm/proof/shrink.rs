//! Makes a failing script small: greedy removal of operations, edits, rows, queries and parts of
//! queries, as long as it fails.

use std::sync::Arc;

use super::script::{Edit, Operation, Script};
use crate::ivm::plan::{Condition, ExistsEdge, Node, NodeId, Plan, RelatedEdge, Role};

/// Most candidates tried: a bound on the time that a failure costs.
const MOST: u32 = 20_000;

/// A small script that still `fails`.
pub fn shrink(script: &Script, fails: &mut dyn FnMut(&Script) -> bool) -> Script {
    let mut s = Shrinker { best: script.clone(), fails, left: MOST };
    loop {
        let before = s.left;
        let mut smaller = s.list(|s| &mut s.operations);
        smaller |= s.edits();
        smaller |= s.list(|s| &mut s.rows);
        smaller |= s.best.queries.len() > 1 && s.list(|s| &mut s.queries);
        smaller |= s.plans();
        if !smaller || s.left == 0 || s.left == before {
            return s.best;
        }
    }
}

struct Shrinker<'a> {
    best: Script,
    fails: &'a mut dyn FnMut(&Script) -> bool,
    left: u32,
}

impl Shrinker<'_> {
    /// Keeps a candidate that fails too.
    fn try_it(&mut self, candidate: Script) -> bool {
        if self.left == 0 || candidate.queries.is_empty() {
            return false;
        }
        self.left -= 1;
        let fails = (self.fails)(&candidate);
        if fails {
            self.best = candidate;
        }
        fails
    }

    /// Drops runs of elements, long ones first.
    fn list<T>(&mut self, of: fn(&mut Script) -> &mut Vec<T>) -> bool {
        let mut smaller = false;
        let mut run = of(&mut self.best).len().max(1);
        loop {
            let mut at = 0;
            while at < of(&mut self.best).len() {
                let mut candidate = self.best.clone();
                let list = of(&mut candidate);
                let end = (at + run).min(list.len());
                list.drain(at..end);
                if self.try_it(candidate) { smaller = true } else { at += run }
            }
            if run == 1 {
                return smaller;
            }
            run /= 2;
        }
    }

    /// Drops single edits of transactions.
    fn edits(&mut self) -> bool {
        let mut smaller = false;
        for i in 0..self.best.operations.len() {
            let mut at = 0;
            loop {
                let mut candidate = self.best.clone();
                let Operation::Commit(edits) = &mut candidate.operations[i] else { break };
                let edits: &mut Vec<Edit> = edits;
                if at >= edits.len() {
                    break;
                }
                edits.remove(at);
                if self.try_it(candidate) { smaller = true } else { at += 1 }
            }
        }
        smaller
    }

    /// Drops parts of queries.
    fn plans(&mut self) -> bool {
        let mut smaller = false;
        for q in 0..self.best.queries.len() {
            let mut at = 0;
            loop {
                let (plan, params) = self.best.queries[q].clone();
                let Some(simpler) = simplified(&plan, at) else { break };
                let mut candidate = self.best.clone();
                // Instances of the same plan stay instances of the same plan.
                let simpler = Arc::new(simpler);
                for (other, _) in &mut candidate.queries {
                    if *other == plan {
                        *other = Arc::clone(&simpler);
                    }
                }
                candidate.queries[q] = (simpler, params);
                if self.try_it(candidate) { smaller = true } else { at += 1 }
            }
        }
        smaller
    }
}

/// The `n`th plan that is this one with a part left out.
fn simplified(plan: &Plan, n: usize) -> Option<Plan> {
    let mut nodes: Vec<Node> = plan.nodes.iter().map(copy).collect();
    let mut left = n;
    let mut hit = || {
        left = left.wrapping_sub(1);
        left == usize::MAX
    };
    let mut done = false;
    'all: for node in &mut nodes {
        if node.limit.is_some() && hit() {
            node.limit = None;
            done = true;
            break;
        }
        if node.start.is_some() && hit() {
            node.start = None;
            done = true;
            break;
        }
        for i in 0..node.related.len() {
            if hit() {
                node.related.remove(i);
                done = true;
                break 'all;
            }
        }
        if let Some(simpler) = simpler(&node.condition, &mut hit) {
            node.condition = simpler;
            done = true;
            break;
        }
    }
    done.then(|| renumbered(&nodes, plan.params))
}

/// A condition with one part left out: the one at which `hit` says so.
fn simpler(c: &Condition, hit: &mut dyn FnMut() -> bool) -> Option<Condition> {
    match c {
        Condition::And(all) if all.is_empty() => return None,
        Condition::Const(_) => return None,
        _ => {}
    }
    if hit() {
        return Some(Condition::And(Vec::new()));
    }
    if hit() {
        return Some(Condition::Const(false));
    }
    let (Condition::And(all) | Condition::Or(all)) = c else { return None };
    for (i, part) in all.iter().enumerate() {
        if hit() {
            return Some(part.clone());
        }
        if let Some(part) = simpler(part, hit) {
            let mut all = all.clone();
            all[i] = part;
            return Some(match c {
                Condition::And(_) => Condition::And(all),
                _ => Condition::Or(all),
            });
        }
    }
    None
}

/// The nodes that the root reaches, numbered anew.
fn renumbered(nodes: &[Node], params: u16) -> Plan {
    let mut out: Vec<Option<Node>> = Vec::new();
    visit(nodes, 0, Role::Root, [false; 2], &mut out);
    Plan { nodes: out.into_iter().flatten().collect(), params }
}

/// `above`: whether the parent is silent, and below a NOT EXISTS.
fn visit(
    nodes: &[Node],
    at: usize,
    role: Role,
    above: [bool; 2],
    out: &mut Vec<Option<Node>>,
) -> NodeId {
    let id = NodeId(out.len() as u16);
    out.push(None);
    let mut node = copy(&nodes[at]);
    node.role = role;
    [node.silent, node.below_not_exists] = above;
    leaves(&mut node.condition, &mut |e| {
        let role = Role::Exists { parent: id, negated: e.negated };
        let above = [above[0] || e.negated || e.permissions, above[1] || e.negated];
        e.child = visit(nodes, usize::from(e.child.0), role, above, out);
    });
    for e in &mut node.related {
        e.child = visit(nodes, usize::from(e.child.0), Role::Related { parent: id }, above, out);
    }
    out[usize::from(id.0)] = Some(node);
    id
}

fn leaves(c: &mut Condition, visit: &mut dyn FnMut(&mut ExistsEdge)) {
    match c {
        Condition::Const(_) | Condition::Simple(_) => {}
        Condition::And(all) | Condition::Or(all) => all.iter_mut().for_each(|c| leaves(c, visit)),
        Condition::Exists(e) => visit(e),
    }
}

/// A copy of a node.
pub(super) fn copy(n: &Node) -> Node {
    Node {
        table: Arc::clone(&n.table),
        condition: n.condition.clone(),
        order: n.order.clone(),
        start: n.start.clone(),
        limit: n.limit,
        related: n.related.iter().map(RelatedEdge::clone).collect(),
        role: n.role,
        silent: n.silent,
        below_not_exists: n.below_not_exists,
    }
}
