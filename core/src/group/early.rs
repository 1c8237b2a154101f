//! Rows that go out while their queries are still being hydrated: an open poke.
//!
//! A large result does not wait for its end. When the executor has a good number of rows of a
//! query ([`Event::Early`](super::Event::Early)), a poke begins to the clients that are at the
//! head, and goes on with every row that follows. It ends when the update that the rows belong to
//! is durable; what the clients then hold is decided by that update alone. So rows that went out
//! are compared with it at the end: those that are in it as they went out are not sent again,
//! those that a commit changed meanwhile come in their new form, those that nobody references any
//! more are taken back by a `del`. To clients all of it is one poke, at the version of its end.
//!
//! - Only queries that were never executed: their rows are new to the clients. A query that is
//!   executed anew is compared with its records first, and mostly little of it is sent.
//! - Only clients at the head: a late one gets everything it missed in one poke, as ever.
//! - Whatever happens to the operation, the poke ends with it: at its version, or cancelled
//!   ([`Group::cancel_open_poke`]); what follows begins at the clients' old cookies. Once rows of
//!   the update were left out because they had gone out, only the end of the operation cancels it.

use std::collections::{VecDeque, hash_map};
use std::sync::Arc;

use rustc_hash::FxHashMap;
use smallvec::SmallVec;

use super::ConnId;
use super::interface::Effect;
use super::machine::{Cx, Group};
use super::op::Stage;
use super::pending::SharedDelta;
use super::poke::{Growth, LargePoke, Poke};
use crate::cvr::advance::AdvancedRow;
use crate::cvr::{Patch, QueryHash, RowIdentity, VersionedPatch};
use crate::row::RowRef;
use crate::schema::TableSpec;
use crate::version::CvrVersion;
use crate::waste::Waste;

/// Rows of a query that is being hydrated, each with its table under the identity key.
pub type EarlyRows = Vec<(Arc<TableSpec>, RowRef)>;

/// A poke whose end is not known yet.
#[derive(Debug)]
pub(super) struct OpenPoke {
    conns: SmallVec<[ConnId; 1]>,
    /// Other clients get the update as a whole.
    pub(super) others: bool,
    /// Rows that went out, and were not found in the update yet.
    sent: Sent,
}

/// Rows by where they are in memory: they stay there as long as they are in here.
#[derive(Debug, Default)]
pub(super) struct Sent {
    tables: VecDeque<(Arc<TableSpec>, Places)>,
}

/// Several small tables: one that has to hash a million rows anew would take long.
#[derive(Debug)]
struct Places(VecDeque<FxHashMap<usize, RowRef>>);

const PLACES_BITS: u32 = 8;

/// Where a row is in memory.
fn place(row: &RowRef) -> usize {
    std::ptr::from_ref(&**row).cast::<()>().addr()
}

impl Places {
    fn of(&mut self, place: usize) -> Option<&mut FxHashMap<usize, RowRef>> {
        let mixed = (place as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0.get_mut((mixed >> (u64::BITS - PLACES_BITS)) as usize)
    }
}

impl Sent {
    fn insert(&mut self, table: &Arc<TableSpec>, row: &RowRef) -> bool {
        let known = self.tables.iter().position(|(known, _)| Arc::ptr_eq(known, table));
        let at = known.unwrap_or_else(|| {
            let empty = (0..1 << PLACES_BITS).map(|_| FxHashMap::default()).collect();
            self.tables.push_back((table.clone(), Places(empty)));
            self.tables.len() - 1
        });
        let place = place(row);
        let of = self.tables.get_mut(at).and_then(|(_, places)| places.of(place));
        of.is_some_and(|of| match of.entry(place) {
            hash_map::Entry::Occupied(_) => false,
            hash_map::Entry::Vacant(free) => {
                free.insert(row.clone());
                true
            }
        })
    }

    /// Takes a row out; false if it was not in here.
    fn take(&mut self, table: &str, row: &RowRef) -> bool {
        let place = place(row);
        let of = self.tables.iter_mut().filter(|(known, _)| *known.name == *table);
        of.filter_map(|(_, places)| places.of(place)).any(|of| of.remove(&place).is_some())
    }

    /// Nothing is left.
    pub(super) fn is_empty(&self) -> bool {
        self.tables.is_empty()
    }

    /// All of it is left behind.
    pub(super) fn discard(mut self, waste: &mut Waste) {
        let some = move || Some(self.take_some(1)).filter(|rows| !rows.is_empty());
        waste.pieces(std::iter::from_fn(some), Vec::len);
    }

    /// Takes some rows out, about as many as asked for at least; none if nothing is left.
    pub(super) fn take_some(&mut self, rows: usize) -> EarlyRows {
        let mut taken = Vec::new();
        while taken.len() < rows
            && let Some((table, places)) = self.tables.front_mut()
        {
            match places.0.pop_front() {
                Some(some) => taken.extend(some.into_values().map(|row| (table.clone(), row))),
                None => drop(self.tables.pop_front()),
            }
        }
        taken
    }
}

impl OpenPoke {
    /// Sorts patches of the update: returns those for the end of this poke, without what its
    /// clients have got. The others' stay.
    pub(super) fn sort(&mut self, patches: &mut Vec<VersionedPatch>) -> Vec<VersionedPatch> {
        let mut is_news = |patch: &VersionedPatch| match &patch.patch {
            Patch::RowPut(id, row) => !self.sent.take(id.table(), row),
            _ => true,
        };
        if self.others {
            patches.iter().filter(|patch| is_news(patch)).cloned().collect()
        } else {
            patches.drain(..).filter(is_news).collect()
        }
    }

    /// Rows that went out and were not found in the update.
    pub(super) fn take_unfound(&mut self) -> Sent {
        std::mem::take(&mut self.sent)
    }
}

impl Group {
    /// Rows of a query that is being hydrated.
    pub(super) fn early(&mut self, query: &QueryHash, rows: EarlyRows, cx: &mut Cx<'_>) {
        let waits = match self.stage() {
            Some(Stage::Hydrating(sync)) => {
                sync.early && sync.additions.iter().any(|(id, _)| id == query)
            }
            _ => false,
        };
        if !waits || self.reset.is_some() || self.pending.has_failed() {
            return;
        }
        if !self.pending.merge_slice() {
            // Too much has changed meanwhile to say which rows the clients have. They come later.
            return;
        }
        let Some(rows) = self.new_rows(rows, cx) else { return self.refuse_early(cx) };
        if rows.is_empty() {
            return;
        }
        let Some(open) = self.open_poke(cx) else { return self.refuse_early(cx) };
        let mut rows = rows.into_iter().filter(|(table, row)| open.sent.insert(table, row));
        let mut next = rows.next();
        let mut growths: SmallVec<[Growth; 4]> = SmallVec::new();
        while let Some((table, row)) = next {
            let mut run = vec![row];
            next = None;
            for (of, row) in rows.by_ref() {
                if !Arc::ptr_eq(&of, &table) {
                    next = Some((of, row));
                    break;
                }
                run.push(row);
            }
            growths.push(Growth::rows(table.name.clone(), run));
        }
        for growth in growths {
            for conn in &open.conns {
                cx.out.push(Effect::GrowLarge(*conn, growth.clone()));
            }
        }
    }

    /// The rows that the clients do not have yet, ready to be sent; `None` if one cannot be.
    fn new_rows(&mut self, rows: EarlyRows, cx: &mut Cx<'_>) -> Option<EarlyRows> {
        let settings = self.settings.clone();
        let tables = &settings.tables;
        let mut new = Vec::with_capacity(rows.len());
        let mut looked_at = Vec::new();
        // Rows of one table come together.
        let mut of: Option<(Arc<TableSpec>, bool)> = None;
        for (table, row) in rows {
            // What these mean is for the end to say.
            if table.name == tables.clients || table.name == tables.mutations {
                continue;
            }
            SharedDelta::check(tables, &table, &row).ok()?;
            let known = of.as_ref().filter(|(known, _)| Arc::ptr_eq(known, &table));
            let others = known.map(|(_, others)| *others).unwrap_or_else(|| {
                self.pipelines.values().any(|p| cx.world.reads(p.instance, &table.name))
            });
            of = Some((table.clone(), others));
            if others {
                let id = Arc::new(RowIdentity::of(&table, &row));
                looked_at.push(AdvancedRow { row: Some(row), ..AdvancedRow::of(id) });
                new.push((table, None));
            } else {
                new.push((table, Some(row)));
            }
        }
        self.look_for_others(&mut looked_at, cx).ok()?;
        let mut looked_at = looked_at.into_iter();
        let is_new = |(table, row): (Arc<TableSpec>, Option<RowRef>)| match row {
            Some(row) => Some((table, row)),
            None => looked_at.next().filter(|r| !r.others).and_then(|r| Some((table, r.row?))),
        };
        Some(new.into_iter().filter_map(is_new).collect())
    }

    /// The open poke, begun if there is none; `None` if there is nobody to get it.
    fn open_poke(&mut self, cx: &mut Cx<'_>) -> Option<&mut OpenPoke> {
        if self.open.is_none() {
            let cvr = self.cvr.as_ref()?;
            let version = match cx.world.version() {
                state if *state > cvr.version.state => {
                    CvrVersion { state: state.clone(), config: 0 }
                }
                _ => cvr.version.one_after(),
            };
            let id = version.cookie();
            let mut conns = SmallVec::new();
            let mut others = false;
            for (conn, client) in self.clients.iter().filter(|(_, c)| c.active) {
                if client.base.as_ref() == Some(&cvr.version) {
                    let poke = LargePoke::open(&id, client.base.as_ref(), client.binary);
                    cx.out.push(Effect::SendLarge(conn, Box::new(poke)));
                    conns.push(conn);
                } else {
                    others = true;
                }
            }
            if conns.is_empty() {
                return None;
            }
            self.open = Some(Box::new(OpenPoke { conns, others, sent: Sent::default() }));
        }
        self.open.as_deref_mut()
    }

    /// No more early rows in this operation.
    fn refuse_early(&mut self, cx: &mut Cx<'_>) {
        if let Some(Stage::Hydrating(sync)) = self.stage_mut() {
            sync.early = false;
        }
        self.cancel_open_poke(cx);
    }

    /// Takes an open poke back, if there is one: its clients stay where they were.
    pub(super) fn cancel_open_poke(&mut self, cx: &mut Cx<'_>) {
        let Some(open) = self.open.take() else { return };
        for conn in &open.conns {
            cx.emit(Effect::GrowLarge(*conn, Growth::cancel()));
        }
        cx.leave(|waste| open.sent.discard(waste));
    }

    /// The update is durable: ends the open poke, if there is one, at the CVR's version.
    pub(super) fn end_open_poke(&mut self, end: &Poke, cx: &mut Cx<'_>) {
        let Some(version) = self.cvr.as_ref().map(|cvr| cvr.version.clone()) else { return };
        let Some(open) = self.open.take() else { return };
        let end = end.end(&version);
        for conn in open.conns {
            let Some(client) = self.clients.get_mut(conn) else { continue };
            client.base = Some(version.clone());
            client.ever_poked = true;
            cx.out.push(Effect::GrowLarge(conn, end.clone()));
        }
    }

    /// Rows that went out and that the update does not have, or not like that: those that no
    /// query has are taken back.
    ///
    /// # Errors
    /// As [`Group::look_for_others`].
    pub(super) fn take_back(
        &mut self,
        rows: EarlyRows,
        version: &CvrVersion,
        cx: &mut Cx<'_>,
    ) -> Result<Vec<VersionedPatch>, super::op::Failure> {
        let of = |(table, row): &(Arc<TableSpec>, RowRef)| {
            AdvancedRow::of(Arc::new(RowIdentity::of(table, row)))
        };
        let mut rows: Vec<AdvancedRow> = rows.iter().map(of).collect();
        self.look_for_others(&mut rows, cx)?;
        let gone = rows.into_iter().filter(|row| !row.others);
        let del = |row: AdvancedRow| VersionedPatch {
            patch: Patch::RowDel(row.id),
            to_version: version.clone(),
        };
        Ok(gone.map(del).collect())
    }
}
