//! The engine and the replica's snapshot, as client groups see them.
//!
//! Commits come in from the bus, snapshots from the replica's reader; instances, rows and counts
//! go out to the groups. Everything here is at one version between two advances.

use std::sync::Arc;
use std::time::Duration;

use rustc_hash::FxHashMap;
use zeroring_core::auth::{self, Permissions};
use zeroring_core::cvr::internal::{InternalHashes, ShardTables};
use zeroring_core::cvr::{self, ClientSchema, RowIdentity};
use zeroring_core::group::{self, Credentials, Hydrate, Shared, Transformed, VisitRow};
use zeroring_core::ivm::engine::{Budget, Engine, EngineConfig, InstanceId, Status};
use zeroring_core::ivm::plan::{Occurrence, Param, Plan};
use zeroring_core::ivm::reading::{ReadProgress, Reading};
use zeroring_core::json::RawJson;
use zeroring_core::row::{Row, RowRef};
use zeroring_core::schema::Schema;
use zeroring_core::version::StateVersion;
use zeroring_core::zql::compile::{IdentityKeys, compile};
use zeroring_core::zql::hash;
use zeroring_storage::replica::ReplicaError;
use zeroring_storage::replica::reader::{ReaderOptions, ReplicaReader};
use zeroring_storage::replica::schema::{TableIds, quote_ident};
use zeroring_storage::replica::source::ReplicaSource;

/// Engine, snapshot and permissions of one executor.
pub(super) struct World {
    pub(super) engine: Engine,
    pub(super) source: ReplicaSource,
    replica_version: StateVersion,
    permissions: Deployed,
    app_id: String,
    internal: InternalHashes,
    /// Keys of rows under the client schema that was asked for last: nearly always the same.
    keys: Option<(Arc<ClientSchema>, Arc<IdentityKeys>)>,
    table_ids: TableIds,
    /// What each live instance was made of, to make its plan anew after a schema change.
    pub(super) recipes: FxHashMap<InstanceId, Recipe>,
    /// Hydrations that take longer are logged, and counted.
    pub(super) slow_hydrate: Duration,
    pub(super) slow_hydrations: u64,
    pub(super) shared: Shared,
}

pub(super) struct Recipe {
    pub(super) transformed: Transformed,
    /// Names the keys of rows; kept rather than those, because the group has it anyway.
    client_schema: Option<Arc<ClientSchema>>,
    subscriptions: usize,
}

/// Read permissions as deployed upstream.
struct Deployed {
    /// The column's text; `None`: nothing is deployed, nothing is readable.
    text: Option<String>,
    /// Parsed; a document that cannot be read permits nothing.
    rules: Permissions,
}

impl Deployed {
    fn parse(text: Option<String>) -> Deployed {
        let rules = match text.as_deref().map(Permissions::parse) {
            None => Permissions::default(),
            Some(Ok(rules)) => rules,
            Some(Err(error)) => {
                tracing::error!(
                    "deployed permissions cannot be used, nothing is readable: {error}"
                );
                Permissions::default()
            }
        };
        Deployed { text, rules }
    }
}

impl World {
    /// Opens the replica at its newest version.
    ///
    /// # Errors
    /// [`ReplicaError`].
    pub(super) fn open(
        path: &std::path::Path,
        app_id: &str,
        tables: &ShardTables,
        replica_version: StateVersion,
        table_ids: TableIds,
        slow_hydrate: Duration,
    ) -> Result<World, ReplicaError> {
        let reader = ReplicaReader::open(path, &ReaderOptions::default())?;
        let mut source = ReplicaSource::new(reader)?;
        let version = source.refresh()?.clone();
        let schema = source.reader().schema(&table_ids)?.visible;
        let engine = Engine::new(EngineConfig::default(), version, schema);
        let permissions = Deployed::parse(read_permissions(&source, app_id));
        Ok(World {
            engine,
            source,
            replica_version,
            permissions,
            app_id: app_id.to_owned(),
            internal: InternalHashes::new(tables),
            keys: None,
            table_ids,
            recipes: FxHashMap::default(),
            shared: Shared::default(),
            slow_hydrate,
            slow_hydrations: 0,
        })
    }

    /// The schema of the open snapshot, where no commit brings it.
    ///
    /// # Errors
    /// [`ReplicaError`].
    pub(super) fn read_schema(&self) -> Result<Arc<Schema>, ReplicaError> {
        Ok(self.source.reader().schema(&self.table_ids)?.visible)
    }

    /// Reads the permissions of the open snapshot; true if they are others than before.
    pub(super) fn reload_permissions(&mut self) -> bool {
        let text = read_permissions(&self.source, &self.app_id);
        if text == self.permissions.text {
            return false;
        }
        self.permissions = Deployed::parse(text);
        true
    }

    /// Subscribes to the instance of a query. It is hydrated by and by.
    ///
    /// # Errors
    /// Why the query cannot be executed, for its clients.
    pub(super) fn subscribe(&mut self, wanted: &Hydrate) -> Result<InstanceId, String> {
        let keys = self.keys_of(wanted.client_schema.as_ref());
        let (plan, params) = plan(&wanted.transformed, self.engine.schema(), &keys)?;
        let id = self.engine.subscribe(&plan, params).map_err(|e| e.to_string())?;
        let transformed = &wanted.transformed;
        let recipe = self.recipes.entry(id).or_insert_with(|| Recipe {
            transformed: transformed.clone(),
            client_schema: wanted.client_schema.clone(),
            subscriptions: 0,
        });
        recipe.subscriptions += 1;
        Ok(id)
    }

    fn keys_of(&mut self, schema: Option<&Arc<ClientSchema>>) -> Arc<IdentityKeys> {
        let Some(schema) = schema else { return Arc::default() };
        if let Some((known, keys)) = &self.keys
            && Arc::ptr_eq(known, schema)
        {
            return keys.clone();
        }
        let keys = Arc::new(identity_keys(schema));
        self.keys = Some((schema.clone(), keys.clone()));
        keys
    }

    /// Takes a subscription back.
    pub(super) fn unsubscribe(&mut self, id: InstanceId) {
        self.engine.unsubscribe(id);
        if let Some(recipe) = self.recipes.get_mut(&id) {
            recipe.subscriptions -= 1;
            if recipe.subscriptions == 0 {
                self.recipes.remove(&id);
            }
        }
    }

    /// Why an instance has failed, if it has.
    pub(super) fn failure(&self, id: InstanceId) -> Option<String> {
        match self.engine.status(id) {
            Ok(Status::Failed(error)) => Some(error.to_string()),
            Err(error) => Some(error.to_string()),
            Ok(_) => None,
        }
    }

    /// Gives an instance its plan under a new schema.
    pub(super) fn rebind(&mut self, id: InstanceId, schema: &Schema) {
        let recipe = self.recipes.get(&id);
        let recipe = recipe.map(|r| (r.transformed.clone(), r.client_schema.clone()));
        let plan = match recipe {
            Some((transformed, client_schema)) => {
                let keys = self.keys_of(client_schema.as_ref());
                plan(&transformed, schema, &keys)
            }
            None => Err("its query is not known any more".to_owned()),
        };
        if let Err(error) = self.engine.rebind(id, plan) {
            tracing::error!(%error, "a query could not be bound to the new schema");
        }
    }
}

fn plan(
    transformed: &Transformed,
    schema: &Schema,
    keys: &IdentityKeys,
) -> Result<(Arc<Plan>, Arc<[Param]>), String> {
    let (plan, params) = compile(&transformed.ast, schema, keys).map_err(|e| e.to_string())?;
    Ok((Arc::new(plan), params.into()))
}

/// Rows are named by the client schema's keys.
fn identity_keys(schema: &ClientSchema) -> IdentityKeys {
    IdentityKeys(
        schema
            .tables()
            .iter()
            .filter_map(|t| Some((t.name.clone(), t.primary_key.clone()?)))
            .collect(),
    )
}

/// The deployed document, `None` if there is none. A replica without the table has none.
fn read_permissions(source: &ReplicaSource, app_id: &str) -> Option<String> {
    let sql = format!(
        "SELECT permissions FROM {} LIMIT 1",
        quote_ident(&format!("{app_id}.permissions"))
    );
    let text = source.reader().connection().query_row(&sql, [], |row| row.get(0));
    match text {
        Ok(text) => text,
        Err(error) => {
            tracing::debug!(%error, "no permissions in the replica");
            None
        }
    }
}

impl group::World for World {
    fn version(&self) -> &StateVersion {
        self.engine.version()
    }

    fn replica_version(&self) -> &StateVersion {
        &self.replica_version
    }

    fn schema(&self) -> &Arc<Schema> {
        self.engine.schema()
    }

    fn transform(
        &self,
        ast: &cvr::Ast,
        internal: bool,
        _credentials: Option<&Credentials>,
    ) -> Result<Transformed, String> {
        if internal {
            return Ok(Transformed { ast: ast.clone(), hash: self.internal.of(ast).into() });
        }
        // Tokens are opaque here: rules see no claims.
        let made =
            auth::transform(ast, &self.permissions.rules, None).map_err(|e| e.to_string())?;
        for table in &made.unreadable {
            tracing::warn!("{}", auth::transform::no_rules_warning(table));
        }
        Ok(Transformed { ast: Arc::new(made.ast), hash: made.hash.into() })
    }

    fn custom(&self, ast: &RawJson) -> Result<Transformed, String> {
        let json: serde_json::Value = ast.decode().map_err(|e| e.to_string())?;
        let hash = hash::received(&json).into();
        let ast = ast.decode().map_err(|e| e.to_string())?;
        Ok(Transformed { ast: Arc::new(ast), hash })
    }

    fn read(
        &mut self,
        reading: &Reading,
        budget: &mut Budget,
        visit: &mut VisitRow<'_>,
    ) -> Result<ReadProgress, String> {
        self.engine.read(reading, &mut self.source, budget, visit).map_err(|e| e.to_string())
    }

    fn count(&self, instance: InstanceId, id: &RowIdentity, row: &Row) -> Result<u64, String> {
        let Some(table) = self.engine.schema().table(id.table()) else { return Ok(0) };
        self.engine.count(instance, table.id, row).map_err(|e| e.to_string())
    }

    fn reads(&self, instance: InstanceId, table: &str) -> bool {
        let table = self.engine.schema().table(table);
        table.is_some_and(|table| self.engine.reads(instance, table.id))
    }

    fn shared(&mut self) -> &mut Shared {
        &mut self.shared
    }

    fn signature(&self, instance: InstanceId) -> Result<u64, String> {
        self.engine.signature(instance).map_err(|e| e.to_string())
    }

    fn occurrence(&self, instance: InstanceId) -> Occurrence {
        self.engine.occurrence(instance)
    }

    fn read_row(&mut self, id: &RowIdentity) -> Result<Option<RowRef>, String> {
        let table = self.engine.schema().table(id.table()).cloned();
        let table = table.ok_or_else(|| format!("table \"{}\" is gone", id.table()))?;
        let mut columns = Vec::with_capacity(id.key().len());
        let mut values = Vec::with_capacity(id.key().len());
        for (name, value) in id.key() {
            let column = table
                .column(name)
                .ok_or_else(|| format!("column \"{}\".\"{name}\" is gone", id.table()))?;
            columns.push(column);
            values.push(value.clone());
        }
        self.source.reader().get(&table, &columns, &values).map_err(|e| e.to_string())
    }
}
