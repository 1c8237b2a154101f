//! A history as data: what an engine starts from and what happens to it. A script can be run
//! again, and made smaller: operations that make no sense (any more) have no effect.

use std::fmt::Write as _;
use std::sync::Arc;

use crate::change::Commit;
use crate::ivm::engine::EngineConfig;
use crate::ivm::plan::{Condition, NodeId, Param, Plan};
use crate::row::Key;
use crate::schema::{Schema, TableId};
use crate::value::Value;

/// What a history starts from, and its operations.
#[derive(Debug, Clone)]
pub struct Script {
    /// The engine's configuration.
    pub config: EngineConfig,
    /// The schema at the start.
    pub schema: Arc<Schema>,
    /// The rows at the start.
    pub rows: Vec<(TableId, Box<[Value]>)>,
    /// Queries that [`Operation::Subscribe`] names by position.
    pub queries: Vec<(Arc<Plan>, Arc<[Param]>)>,
    /// What happens.
    pub operations: Vec<Operation>,
}

/// One thing that happens to an engine or its database.
#[derive(Debug, Clone)]
pub enum Operation {
    /// A subscription of a query.
    Subscribe(usize),
    /// The end of a subscription.
    Unsubscribe(usize),
    /// One step of a subscriber's hydration, with that many units (`None`: no limit).
    Hydrate(usize, Option<u64>),
    /// A transaction in the database, which the engine has not seen yet.
    Commit(Vec<Edit>),
    /// A column comes to a table, or goes again; all its rows are written anew.
    Alter(TableId),
    /// The engine starts to follow the commits since its version.
    Advance,
    /// The engine starts over at the newest version.
    Reset,
    /// One step of an advance, with that many units (`None`: no limit).
    Step(Option<u64>),
}

/// A change of one row, or of all rows of a table.
#[derive(Debug, Clone)]
pub enum Edit {
    /// Inserts or replaces a row.
    Put(TableId, Box<[Value]>),
    /// Removes the row with a replica key, if there is one.
    Remove(TableId, Key),
    /// Truncates a table; edits of it in the same transaction have no effect.
    Truncate(TableId),
}

/// The edits that a commit consists of.
pub fn edits(commit: &Commit) -> Vec<Edit> {
    let mut out = Vec::new();
    for change in &commit.tables {
        let id = change.table.id;
        if change.truncated {
            out.push(Edit::Truncate(id));
        }
        for row in &change.rows {
            match (&row.old, &row.new) {
                (_, Some(new)) => out.push(Edit::Put(id, new.values.into())),
                (Some(old), None) => {
                    out.push(Edit::Remove(id, old.project(&change.table.replica_key)));
                }
                (None, None) => {}
            }
        }
    }
    out
}

impl std::fmt::Display for Script {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(f, "{:?}", self.config)?;
        for table in self.schema.tables.values() {
            let columns: Vec<&str> = table.columns.iter().map(|c| &*c.name).collect();
            writeln!(f, "{:?} {} {columns:?} by {:?}", table.id, table.name, table.primary_key)?;
        }
        for (table, values) in &self.rows {
            writeln!(f, "  {table:?} {values:?}")?;
        }
        for (plan, params) in &self.queries {
            writeln!(f, "query {}", shown(plan, Plan::ROOT, params))?;
        }
        self.operations.iter().try_for_each(|o| writeln!(f, "{o:?}"))
    }
}

/// A plan's node with its subtree, on one line.
fn shown(plan: &Plan, node: NodeId, params: &[Param]) -> String {
    let n = plan.node(node);
    let mut out = format!("{}#{}[{}", n.table.name, node.0, condition(plan, &n.condition, params));
    let param = |p: &crate::ivm::plan::ParamId| format!("{:?}", params[usize::from(p.0)]);
    if let Some(start) = &n.start {
        let at: Vec<String> = start.position.iter().map(param).collect();
        let _ = write!(out, " start{}{at:?}", if start.exclusive { "" } else { "=" });
    }
    let _ = write!(out, " order {:?} limit {:?}]", n.order, n.limit);
    for e in &n.related {
        let child = shown(plan, e.child, params);
        let _ = write!(out, " {:?}->{:?} {{{child}}}", e.parent_columns, e.child_columns);
    }
    out
}

fn condition(plan: &Plan, c: &Condition, params: &[Param]) -> String {
    let list = |all: &[Condition]| {
        all.iter().map(|c| condition(plan, c, params)).collect::<Vec<_>>().join(", ")
    };
    match c {
        Condition::Const(b) => b.to_string(),
        Condition::And(all) => format!("all({})", list(all)),
        Condition::Or(all) => format!("any({})", list(all)),
        Condition::Simple(s) => {
            format!("c{} {:?} {:?}", s.column, s.op, params[usize::from(s.param.0)])
        }
        Condition::Exists(e) => format!(
            "{}{}exists({:?}->{:?} {})",
            if e.negated { "not " } else { "" },
            if e.permissions { "permissions " } else { "" },
            e.parent_columns,
            e.child_columns,
            shown(plan, e.child, params)
        ),
    }
}
