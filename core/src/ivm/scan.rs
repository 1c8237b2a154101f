//! The rows of an instance, some at a time: there may be a million, and taking a reference of each
//! takes a tenth of a second.

use std::sync::Arc;

use super::engine::{Engine, InstanceId};
use super::error::EngineError;
use super::instance::Instance;
use super::shape::Shape;
use crate::row::RowRef;
use crate::schema::TableSpec;

/// How far the rows of an instance were visited; the default is before the first one.
#[derive(Debug, Clone, Default)]
pub struct RowsAt {
    /// What the instance was then.
    pub(crate) generation: Option<u32>,
    pub(crate) node: usize,
    /// Table of the node's partitions, and how many of its partitions were visited.
    pub(crate) table: u64,
    pub(crate) partition: usize,
    /// And rows of the next one.
    pub(crate) rank: usize,
}

/// What a part of a visit came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Visited {
    /// There are more.
    Part,
    /// Those were the last ones.
    All,
    /// The instance is another one than before: what was visited is void. Begin again.
    Void,
}

impl Engine {
    /// Visits about `most` rows of the current result, from `at` on: every row once, with its
    /// table under the identity key and its count. An advance in between does not matter unless it
    /// reaches the instance.
    ///
    /// # Errors
    /// As [`Engine::rows`].
    pub fn rows_from(
        &self,
        id: InstanceId,
        at: &mut RowsAt,
        most: usize,
        visit: &mut dyn FnMut(&Arc<TableSpec>, &RowRef, u64),
    ) -> Result<Visited, EngineError> {
        let (instance, shape) = self.at_rest(id)?;
        if instance.parked.is_some() {
            return Err(EngineError::NotReady);
        }
        if *at.generation.get_or_insert(instance.generation) != instance.generation {
            return Ok(Visited::Void);
        }
        Ok(instance.visit(shape, at, most, visit))
    }
}

impl Instance {
    fn visit(
        &self,
        shape: &Shape,
        at: &mut RowsAt,
        most: usize,
        visit: &mut dyn FnMut(&Arc<TableSpec>, &RowRef, u64),
    ) -> Visited {
        let mut left = most.max(1);
        while let Some(node) = shape.nodes.get(at.node) {
            let state = self.nodes.get(at.node).filter(|_| node.is_held());
            let Some(state) = state else {
                *at = RowsAt { node: at.node + 1, generation: at.generation, ..RowsAt::default() };
                continue;
            };
            let (partitions, next) = state.partitions.table(at.table);
            for partition in partitions.skip(at.partition) {
                let mult = u64::try_from(partition.mult).unwrap_or(0);
                let end = match mult {
                    0 => 0,
                    _ => node.window.visible(partition.rows().len()),
                };
                let rows = partition.rows().iter_from(at.rank).take(end.saturating_sub(at.rank));
                for row in rows {
                    if left == 0 {
                        return Visited::Part;
                    }
                    left -= 1;
                    at.rank += 1;
                    if let Some(count) = self.told_at(shape, node, row, mult) {
                        visit(&node.table, row, count);
                    }
                }
                at.partition += 1;
                at.rank = 0;
                // An empty one takes time, too.
                left = left.saturating_sub(usize::from(end == 0));
            }
            let node = at.node + usize::from(next.is_none());
            let (generation, table) = (at.generation, next.unwrap_or(0));
            *at = RowsAt { generation, node, table, ..RowsAt::default() };
        }
        Visited::All
    }
}
