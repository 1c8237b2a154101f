//! Reading a result piece by piece, while the instance is hydrated and advances.

use std::collections::BTreeMap;

use serde_json::{Value as Json, json};

use super::kit::{Change, Kit, table};
use crate::ivm::engine::{Budget, EngineConfig, InstanceId, Progress};
use crate::ivm::error::EngineError;
use crate::ivm::reading::{ReadProgress, ReadRow, ReadingId};
use crate::row::RowId;
use crate::schema::ValueType::{Number, String as Text};
use crate::value::Value;

const ROWS: usize = 20;

fn kit() -> Kit {
    let tables = vec![
        table(0, "a", &[("id", Text), ("up", Text), ("n", Number)]),
        table(1, "b", &[("id", Text), ("a", Text)]),
    ];
    let mut rows: Vec<Change> = Vec::new();
    for n in 0..ROWS {
        rows.push(("a", json!([format!("a{n:02}"), format!("a{:02}", n / 2), n])));
        rows.push(("b", json!([format!("b{n:02}"), format!("a{:02}", n / 3)])));
    }
    Kit::new(EngineConfig::default(), tables, &rows)
}

/// A reader, and what it was told: contents by the column `n`, and the count.
struct Reader {
    id: ReadingId,
    rows: BTreeMap<RowId, (Value, u64)>,
    told: usize,
}

impl Reader {
    fn new(kit: &mut Kit, instance: InstanceId) -> Reader {
        let id = kit.engine.begin_reading(instance).unwrap();
        Reader { id, rows: BTreeMap::new(), told: 0 }
    }

    fn step(&mut self, kit: &mut Kit, units: u64) -> ReadProgress {
        let Reader { id, rows, told } = self;
        let mut visit = |row: ReadRow<'_>| {
            *told += 1;
            match row {
                ReadRow::Held(h) => {
                    let last = h.row.values.last().unwrap().clone();
                    rows.insert(RowId::of(h.table, h.row), (last, h.count));
                }
                ReadRow::Gone { id, .. } => drop(rows.remove(id)),
            }
        };
        let progress = kit.engine.read(*id, &mut Budget::units(units), &mut visit).unwrap();
        if progress == ReadProgress::Void {
            rows.clear();
        }
        progress
    }

    fn finish(&mut self, kit: &mut Kit) {
        while self.step(kit, 3) != ReadProgress::Done {}
    }

    fn check(&self, kit: &Kit, instance: InstanceId) {
        let rows = kit.engine.rows(instance).unwrap();
        let held = rows
            .map(|h| (RowId::of(h.table, h.row), (h.row.values.last().unwrap().clone(), h.count)));
        assert_eq!(self.rows, held.collect());
    }
}

fn tree() -> Json {
    json!({"table": "a", "related": [{
        "correlation": {"parentField": ["id"], "childField": ["a"]},
        "subquery": {"table": "b", "alias": "b"}}]})
}

/// Its rows are in two nodes of one table.
fn self_join() -> Json {
    json!({"table": "a", "orderBy": [["n", "asc"]], "limit": 6, "related": [{
        "correlation": {"parentField": ["id"], "childField": ["up"]},
        "subquery": {"table": "a", "alias": "down"}}]})
}

#[test]
fn a_reader_is_told_every_row_once_if_nothing_happens() {
    for query in [tree(), self_join()] {
        let mut kit = kit();
        let id = kit.subscribe(&query);
        kit.hydrate(id);
        let mut reader = Reader::new(&mut kit, id);
        let mut steps = 1;
        while reader.step(&mut kit, 2) != ReadProgress::Done {
            steps += 1;
        }
        assert!(steps > 3, "{steps}");
        assert_eq!(reader.told, reader.rows.len());
        reader.check(&kit, id);
        let ended = kit.engine.read(reader.id, &mut Budget::unlimited(), &mut |_| {});
        assert!(matches!(ended, Err(EngineError::UnknownInstance)));
    }
}

/// At every place of the reading, a commit: rows that leave, enter, move and change, before and
/// behind the place.
#[test]
fn a_reader_ends_at_the_newest_version_whenever_a_commit_comes() {
    let changes: &[&[Change]] = &[
        &[("a", json!(["a00"])), ("a", json!(["a19"]))],
        &[("a", json!(["a005", "a01", 0])), ("a", json!(["z", "a02", 30]))],
        &[("a", json!(["a03", "a09", 40])), ("a", json!(["a12", "a00", -1]))],
        &[("b", json!(["b00", "a07"])), ("b", json!(["b19", "a00"])), ("b", json!(["b07"]))],
    ];
    for query in [tree(), self_join()] {
        for change in changes {
            for before in 0..24 {
                let mut kit = kit();
                let id = kit.subscribe(&query);
                kit.hydrate(id);
                let mut reader = Reader::new(&mut kit, id);
                let mut progress = ReadProgress::More;
                for _ in 0..before {
                    progress = reader.step(&mut kit, 1);
                }
                if progress == ReadProgress::Done {
                    break;
                }
                kit.change(change);
                reader.finish(&mut kit);
                reader.check(&kit, id);
            }
        }
    }
}

#[test]
fn rows_of_the_root_are_told_while_it_is_hydrated() {
    let mut kit = kit();
    let id = kit.subscribe(&tree());
    let mut reader = Reader::new(&mut kit, id);
    let mut told = Vec::new();
    loop {
        let step = kit.engine.hydrate_step(id, &mut kit.source, &mut Budget::units(12)).unwrap();
        if step == Progress::Done {
            break;
        }
        while reader.step(&mut kit, 4) == ReadProgress::More {}
        told.push(reader.told);
        if told.len() == 2 {
            // Before and behind what was read.
            kit.change(&[("a", json!(["a00"])), ("a", json!(["a01", "x", 7]))]);
            kit.change(&[("a", json!(["a000", "x", 1])), ("a", json!(["a18"]))]);
        }
    }
    assert!(told[0] > 0 && told[0] < told[1] && told[1] < ROWS, "{told:?}");
    reader.finish(&mut kit);
    reader.check(&kit, id);
}

#[test]
fn a_reader_of_an_instance_that_starts_over_forgets() {
    let mut kit = kit();
    let id = kit.subscribe(&tree());
    kit.hydrate(id);
    let mut reader = Reader::new(&mut kit, id);
    reader.step(&mut kit, 5);
    let (version, schema) = (kit.engine.version().clone(), kit.schema.clone());
    let all = crate::ivm::engine::Reset::All;
    kit.engine.begin_reset(version, schema, &all).unwrap();
    assert_eq!(reader.step(&mut kit, 5), ReadProgress::Waits);
    kit.finish();
    assert_eq!(reader.step(&mut kit, 5), ReadProgress::Void);
    reader.finish(&mut kit);
    reader.check(&kit, id);
}

#[test]
fn an_instance_that_is_read_keeps_its_rows() {
    let mut kit = kit();
    kit.engine = crate::ivm::engine::Engine::new(
        EngineConfig { max_rows: 5, ..EngineConfig::default() },
        kit.engine.version().clone(),
        kit.schema.clone(),
    );
    let (first, second) = (kit.subscribe(&json!({"table": "a"})), kit.subscribe(&tree()));
    kit.hydrate(first);
    let mut reader = Reader::new(&mut kit, first);
    reader.step(&mut kit, 5);
    kit.hydrate(second);
    assert!(!kit.engine.is_parked(first));
    reader.finish(&mut kit);
    reader.check(&kit, first);
    assert!(kit.engine.release(&mut Budget::unlimited()));
    assert!(kit.engine.is_parked(first));
    // A parked one is read anew for whoever reads it.
    let mut reader = Reader::new(&mut kit, first);
    assert_eq!(reader.step(&mut kit, 5), ReadProgress::Waits);
    kit.hydrate(first);
    reader.finish(&mut kit);
    reader.check(&kit, first);
}

#[test]
fn a_reading_that_is_given_up_is_forgotten() {
    let mut kit = kit();
    let id = kit.subscribe(&tree());
    let reader = Reader::new(&mut kit, id);
    kit.engine.end_reading(reader.id);
    kit.engine.end_reading(reader.id);
    assert!(kit.engine.read(reader.id, &mut Budget::unlimited(), &mut |_| {}).is_err());
    kit.engine.unsubscribe(id);
    assert!(kit.engine.begin_reading(id).is_err());
}
