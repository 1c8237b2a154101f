//! The engine over a replica file, as an executor runs it: the replication core's writer applies
//! a transaction to the file, the executor's reader moves to the new version, and the engine
//! advances, reading from the file what it lacks. The writer's part is left out of the time (it
//! is the benches `replica/…`).

use std::collections::HashMap;
use std::sync::Arc;

use serde_json::{Value as Json, json};
use tempfile::TempDir;
use zeroring_core::change::message::{ChangeMessage, Relation, TupleValue};
use zeroring_core::ivm::engine::{Budget, Engine, EngineConfig, InstanceId};
use zeroring_core::ivm::source::Source;
use zeroring_core::schema::Schema;
use zeroring_core::version::StateVersion;
use zeroring_storage::replica::checkpoint::{Checkpointer, ReaderBarrier};
use zeroring_storage::replica::reader::{ReaderOptions, ReplicaReader};
use zeroring_storage::replica::schema::TableIds;
use zeroring_storage::replica::source::ReplicaSource;
use zeroring_storage::replica::writer::{Applied, ReplicaWriter, WriterOptions};

use crate::engine::{self, of_project, of_shapes};
use crate::fixture::{self, ITEMS};
use crate::{Batch, Failure, clock, storage};

struct World {
    _dir: TempDir,
    writer: ReplicaWriter,
    checkpointer: Checkpointer,
    relation: Arc<Relation>,
    source: ReplicaSource,
    engine: Engine,
    schema: Arc<Schema>,
    lsn: u64,
}

/// The only reader.
struct Reader<'a>(&'a mut ReplicaSource);

impl ReaderBarrier for Reader<'_> {
    fn release_all(&mut self, _timeout: std::time::Duration) -> bool {
        self.0.release().is_ok()
    }

    // It moves on after every transaction in any case.
    fn resume(&mut self) {}
}

impl World {
    /// `rows` items, ranked by their number.
    fn new(rows: usize, queries: &[Json]) -> Result<World, Failure> {
        let (dir, path) = storage::replica(rows, &fixture::published_by_rank())?;
        let ids = TableIds::default();
        let writer = ReplicaWriter::open(&path, &WriterOptions::new("zero", ids))?;
        let reader = ReplicaReader::open(&path, &ReaderOptions::default())?;
        let mut source = ReplicaSource::new(reader)?;
        source.refresh()?;
        let schema = writer.schema().clone();
        let version = source.version().clone();
        let mut world = World {
            engine: Engine::new(EngineConfig::default(), version, schema.clone()),
            _dir: dir,
            writer,
            checkpointer: Checkpointer::default(),
            relation: storage::relation(),
            source,
            schema,
            lsn: storage::FIRST_LSN,
        };
        for query in queries {
            world.subscribe(query)?;
        }
        Ok(world)
    }

    fn subscribe(&mut self, query: &Json) -> Result<InstanceId, Failure> {
        engine::subscribe(&mut self.engine, &mut self.source, &self.schema, query)
    }

    /// Gives items ranks in one transaction; the number of row deltas.
    fn commit(&mut self, ranks: &[(usize, i32)]) -> Result<u64, Failure> {
        let commit = clock::leave_out(|| self.apply(ranks))?;
        self.source.refresh()?;
        self.engine.begin_advance(&[commit])?;
        loop {
            let mut budget = Budget::unlimited();
            if let Some(advanced) = self.engine.advance_step(&mut self.source, &mut budget)? {
                if let Some((_, error)) = advanced.failed.into_iter().next() {
                    return Err(error.into());
                }
                return Ok(advanced.deltas.iter().map(|d| d.rows.len() as u64).sum());
            }
        }
    }

    fn apply(
        &mut self,
        ranks: &[(usize, i32)],
    ) -> Result<Arc<zeroring_core::change::Commit>, Failure> {
        self.lsn += 1;
        let watermark = StateVersion::from_lsn(self.lsn);
        let begin = ChangeMessage::Begin { watermark: watermark.clone(), commit_time_ms: 0.0 };
        self.writer.apply(&begin)?;
        for &(n, rank) in ranks {
            let new = fixture::cells(n, rank).into_iter().map(TupleValue::Value).collect();
            let relation = self.relation.clone();
            self.writer.apply(&ChangeMessage::Update { relation, old: None, new })?;
        }
        let Applied::Committed(commit) = self.writer.apply(&ChangeMessage::Commit { watermark })?
        else {
            return Err("the transaction was not committed".into());
        };
        self.checkpointer.maintain(&self.writer, &mut Reader(&mut self.source))?;
        Ok(commit)
    }
}

/// Makes these transactions over and over and takes them back in between, `batch` at a time. They
/// must reach queries (or, with `reach` false, none).
fn replay(mut world: World, mut cycle: Vec<Vec<(usize, i32)>>, batch: u64, reach: bool) -> Batch {
    let mut now: HashMap<usize, i32> = HashMap::new();
    let mut undo: Vec<Vec<(usize, i32)>> = Vec::new();
    for commit in &cycle {
        let before = |&(n, rank): &(usize, i32)| (n, now.insert(n, rank).unwrap_or(n as i32));
        undo.push(commit.iter().map(before).collect());
    }
    cycle.extend(undo.into_iter().rev());
    let (mut at, mut reached) = (0_usize, false);
    Box::new(move || {
        for _ in 0..batch {
            reached |= world.commit(&cycle[at % cycle.len()])? > 0;
            at += 1;
        }
        if at > cycle.len() && reached != reach {
            return Err("commits that reach queries, or not, and should not, or should".into());
        }
        Ok(batch)
    })
}

fn commits(queries: &[Json], reach: bool) -> Result<Batch, Failure> {
    const ROWS: usize = 20_000;
    let world = World::new(ROWS, queries)?;
    Ok(replay(world, engine::single_writes(ROWS, 100_000), 100, reach))
}

/// What the others cost without an engine's work: moving to another version, and no query.
pub(crate) fn idle() -> Result<Batch, Failure> {
    commits(&[], false)
}

/// See `engine::route`, with 1,000 queries.
pub(crate) fn route_1k() -> Result<Batch, Failure> {
    commits(&(0..1000).map(of_project).collect::<Vec<_>>(), true)
}

/// See `engine::route`.
pub(crate) fn route() -> Result<Batch, Failure> {
    commits(&(0..10_000).map(of_project).collect::<Vec<_>>(), true)
}

/// See `engine::route_plans`.
pub(crate) fn route_plans() -> Result<Batch, Failure> {
    commits(&of_shapes(), true)
}

/// See `engine::window`.
pub(crate) fn window() -> Result<Batch, Failure> {
    let order = json!([["rank", "desc"], ["id", "asc"]]);
    let world = World::new(
        engine::WINDOW_ROWS,
        &[json!({"table": "item", "orderBy": order, "limit": 100})],
    )?;
    Ok(replay(world, engine::window_writes(), 100, true))
}

/// See `engine::transaction`.
pub(crate) fn transaction() -> Result<Batch, Failure> {
    const QUERIES: usize = 1000;
    let world = World::new(QUERIES * ITEMS, &(0..QUERIES).map(of_project).collect::<Vec<_>>())?;
    Ok(replay(world, engine::transaction_writes(), 1, true))
}
