//! Reading a result piece by piece, while the instance advances.

use std::collections::BTreeMap;

use serde_json::{Value as Json, json};

use super::kit::{Change, Kit, table};
use crate::ivm::engine::{Budget, Engine, EngineConfig, HeldRow, InstanceId, Reset};
use crate::ivm::error::EngineError;
use crate::ivm::reading::{ReadProgress, ReadRow, Reading};
use crate::row::{RowId, RowRef};
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
    reading: Reading,
    rows: BTreeMap<RowId, (Value, u64)>,
    told: usize,
}

impl Reader {
    fn new(instance: InstanceId) -> Reader {
        Reader { reading: Reading::of(instance), rows: BTreeMap::new(), told: 0 }
    }

    fn step(&mut self, kit: &mut Kit, units: u64) -> ReadProgress {
        let Reader { reading, rows, told } = self;
        let last = |row: &RowRef| row.values.last().unwrap().clone();
        let mut visit = |row: ReadRow<'_>| {
            *told += 1;
            match row {
                ReadRow::Held(HeldRow { table, row, count }) => {
                    let known = rows.insert(RowId::of(table, row), (last(row), count));
                    assert!(known.is_none(), "{row:?} is told twice");
                }
                ReadRow::Changed { id, held: Some((row, count)), .. } => {
                    rows.insert(id.clone(), (last(row), count));
                }
                ReadRow::Changed { id, held: None, .. } => drop(rows.remove(id)),
            }
        };
        let mut budget = Budget::units(units);
        let progress = kit.engine.read(reading, &mut kit.source, &mut budget, &mut visit).unwrap();
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
        let mut reader = Reader::new(id);
        let mut steps = 1;
        while reader.step(&mut kit, 2) != ReadProgress::Done {
            steps += 1;
        }
        assert!(steps > 3, "{steps}");
        assert_eq!(reader.told, reader.rows.len());
        reader.check(&kit, id);
        assert_eq!(reader.step(&mut kit, 2), ReadProgress::Done, "nothing has happened");
        assert_eq!(reader.told, reader.rows.len());
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
                let mut reader = Reader::new(id);
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
fn a_reader_that_is_through_is_told_what_happens_and_nothing_else() {
    let mut kit = kit();
    let id = kit.subscribe(&tree());
    let mut reader = Reader::new(id);
    assert_eq!(reader.step(&mut kit, 4), ReadProgress::Waits, "it is not hydrated");
    kit.hydrate(id);
    reader.finish(&mut kit);
    let told = reader.told;
    kit.change(&[("a", json!(["a00"])), ("a", json!(["a01", "x", 7])), ("b", json!(["z", "a02"]))]);
    reader.finish(&mut kit);
    reader.check(&kit, id);
    // Without its parent, "a00", three children leave.
    assert_eq!(reader.told - told, 3 + 3);
}

#[test]
fn a_reader_of_an_instance_that_starts_over_forgets() {
    let mut kit = kit();
    let id = kit.subscribe(&tree());
    kit.hydrate(id);
    let mut reader = Reader::new(id);
    reader.step(&mut kit, 5);
    let (version, schema) = (kit.engine.version().clone(), kit.schema.clone());
    kit.engine.begin_reset(version, schema, &Reset::All).unwrap();
    assert_eq!(reader.step(&mut kit, 5), ReadProgress::Waits);
    kit.finish();
    assert_eq!(reader.step(&mut kit, 5), ReadProgress::Void);
    reader.finish(&mut kit);
    reader.check(&kit, id);
}

#[test]
fn an_instance_that_is_read_keeps_its_rows() {
    let mut kit = kit();
    kit.engine = Engine::new(
        EngineConfig { max_rows: 5, ..EngineConfig::default() },
        kit.engine.version().clone(),
        kit.schema.clone(),
    );
    let (first, second) = (kit.subscribe(&json!({"table": "a"})), kit.subscribe(&tree()));
    kit.hydrate(first);
    let mut reader = Reader::new(first);
    reader.step(&mut kit, 5);
    kit.hydrate(second);
    assert!(!kit.engine.is_parked(first));
    reader.finish(&mut kit);
    reader.check(&kit, first);
    drop(reader);
    assert!(kit.engine.release(&mut Budget::unlimited()));
    assert!(kit.engine.is_parked(first));
    // A parked one is read anew for whoever reads it, piece by piece.
    let (mut reader, fetches) = (Reader::new(first), kit.source.fetches);
    let mut steps = 0;
    while kit.engine.is_parked(first) {
        assert_eq!((reader.step(&mut kit, 5), reader.told), (ReadProgress::More, 0));
        steps += 1;
    }
    assert!(steps > 3 && kit.source.fetches > fetches, "{steps}");
    kit.hydrate(second);
    assert!(!kit.engine.is_parked(first), "it is read");
    reader.finish(&mut kit);
    reader.check(&kit, first);
}

fn none() -> Budget {
    Budget::units(0)
}

/// Nobody takes notes for a reading that was given up.
#[test]
fn a_reading_that_is_dropped_is_forgotten() {
    let mut kit = kit();
    let id = kit.subscribe(&tree());
    kit.hydrate(id);
    let mut readers = [Reader::new(id), Reader::new(id)];
    for reader in &mut readers {
        assert_eq!(reader.step(&mut kit, 5), ReadProgress::More);
    }
    assert_eq!(kit.engine.open_readings(), 2);
    let [mut reader, gone] = readers;
    drop(gone);
    kit.change(&[("a", json!(["a19"])), ("a", json!(["a18"])), ("a", json!(["a17"]))]);
    while !kit.engine.release(&mut Budget::units(1)) {}
    assert_eq!(kit.engine.open_readings(), 1);
    reader.finish(&mut kit);
    reader.check(&kit, id);
    kit.engine.unsubscribe(id);
    let gone = kit.engine.read(&reader.reading, &mut kit.source, &mut none(), &mut |_| {});
    assert!(matches!(gone, Err(EngineError::UnknownInstance)));
}
