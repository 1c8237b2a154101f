//! What hydrating a row from SQLite costs.

use zeroring_core::ivm::engine::{Engine, EngineConfig};
use zeroring_core::ivm::source::Source;
use zeroring_storage::replica::reader::{ReaderOptions, ReplicaReader, visible_schema};
use zeroring_storage::replica::schema::TableIds;
use zeroring_storage::replica::source::ReplicaSource;

use crate::engine::{of_project, subscribe};
use crate::fixture::ITEMS;
use crate::{Batch, Failure, storage};

/// Queries, each of another project.
const PROJECTS: usize = 200;

/// A query over 50 rows of a replica of 10,000, hydrated and given up again.
pub(crate) fn hydrate() -> Result<Batch, Failure> {
    let (dir, path) = storage::replica(PROJECTS * ITEMS)?;
    let ids = TableIds::default();
    let reader = ReplicaReader::open(&path, &ReaderOptions::default())?;
    let mut source = ReplicaSource::new(reader)?;
    source.refresh()?;
    let schema = visible_schema(source.reader(), &ids)?;
    let version = source.version().clone();
    let mut engine = Engine::new(EngineConfig::default(), version, schema.clone());
    let mut project = 0;
    Ok(Box::new(move || {
        let _keep = &dir;
        project = (project + 1) % PROJECTS;
        let id = subscribe(&mut engine, &mut source, &schema, &of_project(project))?;
        let rows = engine.rows(id)?.count() as u64;
        engine.unsubscribe(id);
        Ok(rows)
    }))
}
