//! Making room: instances give their rows up, the largest first, when there are more than the
//! bound allows. What the subscribers of one know is noted first, as anybody reads it
//! ([`super::reading`]): piece by piece, while it may advance. Then its state is taken apart.

use super::emit::Snapshot;
use super::engine::{Budget, InstanceId};
use super::garbage::Garbage;
use super::instance::{Instance, Phase};
use super::mutant::{self, Mutant};
use super::reading::{ReadProgress, Reading};
use super::registry::Registry;

/// Instances that are chosen at a time: choosing looks at all.
const CHOSEN: usize = if cfg!(test) { 2 } else { 64 };

/// Who makes room.
#[derive(Debug, Default)]
pub(super) struct Parking {
    /// Chosen instances, the largest last.
    chosen: Vec<InstanceId>,
    current: Option<Current>,
    /// Somebody is about to read this one.
    spared: Option<InstanceId>,
}

/// The instance that is being parked.
#[derive(Debug)]
enum Current {
    /// It is read; what was read so far.
    Read(Reading, Snapshot),
    /// It is parked, and its state is taken apart.
    TakeApart(InstanceId),
}

impl Parking {
    /// Spares an instance that somebody is about to read, until another one is spared.
    pub(super) fn spare(&mut self, id: InstanceId) {
        self.spared = Some(id);
    }
}

fn may_park(instance: &Instance, spared: Option<InstanceId>) -> bool {
    matches!(instance.phase, Phase::Ready)
        && instance.resident > 0
        && instance.known.is_none()
        && instance.remains.is_none()
        && instance.readers.is_empty()
        && !instance.unbound
        && Some(instance.id) != spared
}

impl Registry {
    /// Parks instances until no more than `max_rows` distinct rows are in memory (true), or the
    /// budget is spent.
    pub(super) fn make_room(&mut self, max_rows: usize, budget: &mut Budget) -> bool {
        loop {
            if self.parking.current.is_none() {
                if self.interner.len() <= max_rows {
                    self.parking.chosen.clear();
                    return true;
                }
                if !self.release(budget) {
                    return false;
                }
                if self.interner.len() <= max_rows {
                    continue;
                }
                if !self.begin_parking(budget) {
                    return true;
                }
            }
            if !self.park(budget) {
                return false;
            }
        }
    }

    /// Begins to park the largest instance; false if there is none.
    fn begin_parking(&mut self, budget: &mut Budget) -> bool {
        let spared = self.parking.spared;
        if self.parking.chosen.is_empty() {
            let all = self.instances().filter(|i| may_park(i, spared)).map(|i| (i.resident, i.id));
            let mut all: Vec<(usize, InstanceId)> = all.collect();
            let first = all.len().saturating_sub(CHOSEN);
            if first > 0 {
                all.select_nth_unstable(first);
            }
            let mut chosen = all.split_off(first);
            chosen.sort_unstable();
            self.parking.chosen = chosen.into_iter().map(|(_, id)| id).collect();
            budget.spend(self.live() as u64 / 64);
        }
        while let Some(id) = self.parking.chosen.pop() {
            if self.get(id).is_some_and(|i| may_park(i, spared)) {
                let reading = Reading::of(id);
                self.parking.current = Some(Current::Read(reading, Snapshot::default()));
                return true;
            }
        }
        self.instances().any(|i| may_park(i, spared)) && self.begin_parking(budget)
    }

    /// Goes on parking the current instance. True if that has ended.
    fn park(&mut self, budget: &mut Budget) -> bool {
        let (reading, mut known) = match self.parking.current.take() {
            None => return true,
            Some(Current::Read(reading, known)) => (reading, known),
            Some(Current::TakeApart(id)) => {
                let ends = self.get(id).is_none() || self.take_apart(id, budget).is_some();
                if !ends {
                    self.parking.current = Some(Current::TakeApart(id));
                }
                return ends;
            }
        };
        let id = reading.instance();
        let Ok(mut reader) = self.take_reader(&reading) else {
            self.forget(Some(known));
            return true;
        };
        // Somebody else reads it, or it is gone, or it starts over in this advance and holds nothing.
        let may_go_on = |i: &&Instance| match mutant::is(Mutant::ParkedWhileStartingOver) {
            false => may_park(i, None),
            true => i.readers.is_empty(),
        };
        let instance = self.get(id).filter(may_go_on);
        let shape = instance.and_then(|i| self.plan(i.plan)).map(|p| &p.shape);
        let (Some(instance), Some(shape)) = (instance, shape) else {
            let mut garbage = Garbage::default();
            reader.discard(&mut garbage);
            self.discard(garbage);
            self.forget(Some(known));
            return true;
        };
        let progress = reader.step(instance, shape, budget, &mut |row| known.take_note(row));
        match progress {
            ReadProgress::Done => {
                self.give_up(id, known);
                self.parking.current = Some(Current::TakeApart(id));
                self.park(budget)
            }
            // It failed, or starts over.
            ReadProgress::Waits => {
                self.forget(Some(known));
                true
            }
            ReadProgress::More | ReadProgress::Void => {
                if progress == ReadProgress::Void {
                    self.forget(Some(std::mem::take(&mut known)));
                }
                self.put_reader(id, reader);
                self.parking.current = Some(Current::Read(reading, known));
                !budget.is_spent() && progress == ReadProgress::Void && self.park(budget)
            }
        }
    }

    /// Gives the rows of an instance up; what its subscribers know stays.
    fn give_up(&mut self, id: InstanceId, known: Snapshot) {
        let Some(instance) = self.get(id) else { return };
        let (plan, signature) = (instance.plan, instance.signature);
        self.start_over(id, false);
        if let Some(instance) = self.get_mut(id) {
            instance.known = Some(known);
            instance.parked = Some(signature);
            self.parked.insert(id);
            self.counters(plan).parkings += 1;
        }
    }
}
