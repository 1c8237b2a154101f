//! Rows of an instance that is being hydrated, for a subscriber who does not wait for the end
//! (an open poke, say): each row is passed on when it first counts.
//!
//! They are a hint, not a result. A commit in between may take a row back, and it is not told;
//! [`Engine::rows`] says what the result is. Nothing is passed on any more after the instance
//! started over, or once nobody took rows for too long.

use std::sync::Arc;

use super::engine::{Engine, InstanceId};
use super::instance::Phase;
use super::plan::NodeId;
use crate::row::RowRef;
use crate::schema::TableSpec;

/// Rows that wait to be taken; nobody wants them if they become more.
const MAX_WAITING: usize = 1 << 17;

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Watch(Vec<(NodeId, RowRef)>);

/// A row counts so much more than before.
pub(super) fn shown(watch: &mut Option<Box<Watch>>, node: NodeId, row: &RowRef, more: i64) {
    if more <= 0 {
        return;
    }
    let Some(Watch(rows)) = watch.as_deref_mut() else { return };
    if rows.len() < MAX_WAITING {
        rows.push((node, row.clone()));
    } else {
        *watch = None;
    }
}

impl Engine {
    /// Starts to keep rows for [`Engine::take_watched`] while the instance is hydrated. False if
    /// that has begun already, or somebody else watches.
    pub fn watch(&mut self, id: InstanceId) -> bool {
        let Some(instance) = self.registry.get_mut(id) else { return false };
        let is_new = matches!(instance.phase, Phase::Hydrating) && !instance.is_started();
        let watches = is_new && instance.watch.is_none();
        if watches {
            instance.watch = Some(Box::default());
        }
        watches
    }

    /// Stops keeping rows.
    pub fn unwatch(&mut self, id: InstanceId) {
        if let Some(instance) = self.registry.get_mut(id) {
            instance.watch = None;
        }
    }

    /// Takes the rows that were read since the last time, if there are `least` of them: each with
    /// its table under the identity key. A row may come twice.
    pub fn take_watched(&mut self, id: InstanceId, least: usize) -> Vec<(Arc<TableSpec>, RowRef)> {
        let Some(instance) = self.registry.get_mut(id) else { return Vec::new() };
        let plan = instance.plan;
        let waiting = instance.watch.as_deref_mut().filter(|w| w.0.len() >= least.max(1));
        let Some(Watch(rows)) = waiting.map(std::mem::take) else { return Vec::new() };
        let Some(entry) = self.registry.plan(plan) else { return Vec::new() };
        let table = |node| entry.shape.node(node).table.clone();
        rows.into_iter().map(|(node, row)| (table(node), row)).collect()
    }
}
