//! A world of plain data: rows in vectors, queries answered by brute force.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;
use std::sync::{Arc, Weak};

use super::super::{
    Credentials, EarlyRows, Hydrate, Shared, SharedDelta, Transformed, VisitRow, World,
};
use crate::change::{Commit, RowChange, TableChange};
use crate::cvr::RowIdentity;
use crate::cvr::internal::ShardTables;
use crate::ivm::brute::{self, Multiset};
use crate::ivm::delta::{InstanceDelta, RowDelta};
use crate::ivm::engine::{Budget, HeldRow, InstanceId};
use crate::ivm::memory_source::Database;
use crate::ivm::plan::{Occurrence, Param, Plan};
use crate::ivm::reading::{ReadProgress, ReadRow, Reading};
use crate::json::RawJson;
use crate::row::{Key, Row, RowId, RowRef};
use crate::schema::{ColumnSpec, Schema, TableId, TableSpec, UniqueKey, ValueType};
use crate::value::Value;
use crate::version::StateVersion;
use crate::zql::ast::Ast;
use crate::zql::compile::{IdentityKeys, compile};

struct Instance {
    key: String,
    plan: Plan,
    params: Vec<Param>,
    result: Multiset,
    readers: Vec<Reader>,
    subscribers: usize,
}

/// Who reads an instance.
#[derive(Default)]
struct Reader {
    of: Weak<()>,
    last: Option<RowId>,
    changed: BTreeSet<RowId>,
    void: bool,
}

/// An instance of which more rows change at once starts over for its readers.
const STARTS_OVER: usize = 3;

/// A change of a row: its table, its key, its new values (none: delete).
pub type Change = (Arc<TableSpec>, Key, Option<Vec<Value>>);

/// The stand-in for an executor's engine and replica.
pub struct SimWorld {
    pub db: Database,
    pub version: StateVersion,
    pub replica_version: StateVersion,
    pub schema: Arc<Schema>,
    pub tables: ShardTables,
    instances: BTreeMap<InstanceId, Instance>,
    next: u64,
    lsn: u64,
    shared: Shared,
    /// Rows read one by one.
    pub reads: usize,
    /// Rows told to who reads an instance.
    pub told: usize,
    /// The next query cannot be hydrated.
    pub hydration_fault: Option<String>,
    /// The next instance whose rows are visited has failed.
    pub rows_fault: Option<String>,
}

/// A table: its columns with types; the first `key` columns are its key.
fn table(id: u32, name: &str, key: usize, columns: &[(&str, ValueType)]) -> Arc<TableSpec> {
    let keys: Vec<usize> = (0..key).collect();
    Arc::new(TableSpec {
        id: TableId(id),
        name: name.into(),
        columns: columns
            .iter()
            .map(|(n, t)| ColumnSpec {
                name: (*n).into(),
                value_type: *t,
                nullable: !columns[..key].iter().any(|(k, _)| k == n),
                upstream_type: "text".into(),
            })
            .collect(),
        primary_key: keys.clone(),
        replica_key: keys.clone(),
        unique_keys: vec![UniqueKey { columns: keys, not_null: true }],
        min_row_version: StateVersion::zero(),
        indexes: vec![],
    })
}

pub fn schema() -> Schema {
    use ValueType::{Json, Number, String};
    let tables = [
        table(1, "issue", 1, &[("id", String), ("owner", String), ("n", Number)]),
        table(2, "comment", 1, &[("id", String), ("issue", String), ("text", String)]),
        table(
            3,
            "zero_0.clients",
            2,
            &[
                ("clientGroupID", String),
                ("clientID", String),
                ("lastMutationID", Number),
                ("userID", String),
            ],
        ),
        table(
            4,
            "zero_0.mutations",
            3,
            &[
                ("clientGroupID", String),
                ("clientID", String),
                ("mutationID", Number),
                ("result", Json),
            ],
        ),
    ];
    Schema {
        tables: tables.into_iter().map(|t| (t.name.clone(), t)).collect(),
        ..Schema::default()
    }
}

impl SimWorld {
    pub fn new() -> SimWorld {
        SimWorld {
            db: Database::default(),
            version: StateVersion::from_lsn(1_000),
            replica_version: StateVersion::from_lsn(10),
            schema: Arc::new(schema()),
            tables: ShardTables::new("zero", 0),
            instances: BTreeMap::new(),
            next: 0,
            lsn: 1_000,
            shared: Shared::default(),
            reads: 0,
            told: 0,
            hydration_fault: None,
            rows_fault: None,
        }
    }

    pub fn table(&self, name: &str) -> Arc<TableSpec> {
        self.schema.tables[name].clone()
    }

    /// Everything in memory is gone.
    pub fn forget_instances(&mut self) {
        self.instances.clear();
    }

    pub fn instances(&self) -> usize {
        self.instances.len()
    }

    /// Readings that go on.
    pub fn readings(&self) -> usize {
        let readers = self.instances.values().flat_map(|instance| &instance.readers);
        readers.filter(|reader| reader.of.strong_count() > 0).count()
    }

    pub fn subscriptions(&self) -> usize {
        self.instances.values().map(|instance| instance.subscribers).sum()
    }

    /// Subscribes and hydrates at once.
    pub fn hydrate(&mut self, wanted: &Hydrate) -> Result<InstanceId, String> {
        self.hydration_fault.take().map_or(Ok(()), Err)?;
        let key = wanted.transformed.hash.to_string();
        if let Some((id, instance)) = self.instances.iter_mut().find(|(_, i)| i.key == key) {
            instance.subscribers += 1;
            return Ok(*id);
        }
        let (plan, params) =
            compile(&wanted.transformed.ast, &self.schema, &IdentityKeys::default())
                .map_err(|e| e.to_string())?;
        let result = brute::sync(&plan, &params, &self.db);
        self.next += 1;
        let id = InstanceId::for_tests(self.next);
        self.instances.insert(
            id,
            Instance { key, plan, params, result, readers: Vec::new(), subscribers: 1 },
        );
        Ok(id)
    }

    /// The rows of a query as they are now.
    pub fn rows_of(&self, wanted: &Hydrate) -> EarlyRows {
        let compiled = compile(&wanted.transformed.ast, &self.schema, &IdentityKeys::default());
        let Ok((plan, params)) = compiled else { return Vec::new() };
        let rows = brute::sync(&plan, &params, &self.db).into_iter();
        rows.map(|(id, (_, row))| (spec_of(&plan, id.table), row)).collect()
    }

    pub fn release(&mut self, id: InstanceId) {
        let instance = self.instances.get_mut(&id).expect("released once per subscription");
        instance.subscribers -= 1;
        if instance.subscribers == 0 {
            self.instances.remove(&id);
        }
    }

    /// Applies changes (table, old row by key, new values) as one transaction; the deltas.
    pub fn commit(&mut self, changes: Vec<Change>) -> Vec<Arc<SharedDelta>> {
        self.lsn += 1;
        let version = StateVersion::from_lsn(self.lsn);
        let mut tables: BTreeMap<TableId, TableChange> = BTreeMap::new();
        for (table, key, values) in changes {
            let old = self.db.get(table.id, &key).cloned();
            let new = values.map(|v| Row::new(version.clone(), v));
            let change = tables.entry(table.id).or_insert_with(|| TableChange {
                table: table.clone(),
                rows: Vec::new(),
                truncated: false,
            });
            change.rows.push(RowChange { old, new });
        }
        let commit = Commit {
            version: version.clone(),
            previous: self.version.clone(),
            tables: tables.into_values().collect(),
            schema: None,
            upstream_commit_ms: 0.0,
            permissions_changed: false,
        };
        self.db.apply(&commit);
        self.version = version;
        let mut deltas = Vec::new();
        for (id, instance) in &mut self.instances {
            let new = brute::sync(&instance.plan, &instance.params, &self.db);
            let old = std::mem::replace(&mut instance.result, new);
            let rows = diff(&instance.plan, &old, &instance.result);
            if !rows.is_empty() {
                instance.readers.retain(|reader| reader.of.strong_count() > 0);
                for reader in &mut instance.readers {
                    reader.changed.extend(rows.iter().map(|delta| delta.id.clone()));
                    if rows.len() > STARTS_OVER {
                        *reader = Reader { void: true, of: reader.of.clone(), ..Reader::default() };
                    }
                }
                let delta = InstanceDelta { instance: *id, rows: rows.into() };
                deltas.push(Arc::new(SharedDelta::of(&delta, &self.tables).expect("deliverable")));
            }
        }
        deltas
    }

    /// What a query syncs now: identity → (count, table, row).
    pub fn expected(&self, ast: &Ast) -> BTreeMap<String, (u64, Arc<TableSpec>, RowRef)> {
        let (plan, params) =
            compile(ast, &self.schema, &IdentityKeys::default()).expect("compiles");
        brute::sync(&plan, &params, &self.db)
            .into_iter()
            .map(|(id, (count, row))| {
                let table = spec_of(&plan, id.table);
                (RowIdentity::of(&table, &row).text().to_owned(), (count, table, row))
            })
            .collect()
    }
}

fn spec_of(plan: &Plan, table: TableId) -> Arc<TableSpec> {
    plan.nodes.iter().find(|n| n.table.id == table).expect("of the plan").table.clone()
}

fn diff(plan: &Plan, old: &Multiset, new: &Multiset) -> Vec<RowDelta> {
    let mut deltas = Vec::new();
    let ids: std::collections::BTreeSet<_> = old.keys().chain(new.keys()).cloned().collect();
    for id in ids {
        let (before, after) = (old.get(&id), new.get(&id));
        let content_changed =
            matches!((before, after), (Some((_, a)), Some((_, b))) if a.version != b.version);
        let (count_before, count_after) =
            (before.map_or(0, |(n, _)| *n), after.map_or(0, |(n, _)| *n));
        if count_before != count_after || content_changed {
            deltas.push(RowDelta {
                table: spec_of(plan, id.table),
                id,
                count_before,
                count_after,
                row: after.map(|(_, r)| r.clone()),
                content_changed,
            });
        }
    }
    deltas
}

fn hash(ast: &Ast) -> Arc<str> {
    serde_json::to_string(ast).expect("serializes").into()
}

impl World for SimWorld {
    fn version(&self) -> &StateVersion {
        &self.version
    }

    fn replica_version(&self) -> &StateVersion {
        &self.replica_version
    }

    fn schema(&self) -> &Arc<Schema> {
        &self.schema
    }

    fn transform(
        &self,
        ast: &crate::cvr::Ast,
        _internal: bool,
        _credentials: Option<&Credentials>,
    ) -> Result<Transformed, String> {
        Ok(Transformed { ast: ast.clone(), hash: hash(ast) })
    }

    fn custom(&self, ast: &RawJson) -> Result<Transformed, String> {
        let ast: Ast = ast.decode().map_err(|e| e.to_string())?;
        let hash = hash(&ast);
        Ok(Transformed { ast: Arc::new(ast), hash })
    }

    fn read(
        &mut self,
        reading: &Reading,
        budget: &mut Budget,
        visit: &mut VisitRow<'_>,
    ) -> Result<ReadProgress, String> {
        self.rows_fault.take().map_or(Ok(()), Err)?;
        let instance = self.instances.get_mut(&reading.instance()).ok_or("unknown instance")?;
        let told = &mut self.told;
        let Instance { plan, result, readers, .. } = instance;
        let of = reading.reader();
        let at = readers.iter().position(|reader| reader.of.ptr_eq(&of)).unwrap_or_else(|| {
            readers.push(Reader { of, ..Reader::default() });
            readers.len() - 1
        });
        let Reader { last, changed, void, .. } = &mut readers[at];
        if std::mem::take(void) {
            return Ok(ReadProgress::Void);
        }
        let from = last.clone().map_or(Bound::Unbounded, Bound::Excluded);
        for (id, (count, row)) in result.range((from, Bound::Unbounded)) {
            if budget.is_spent() {
                return Ok(ReadProgress::More);
            }
            *last = Some(id.clone());
            budget.spend(1);
            *told += 1;
            if !changed.contains(id) {
                let table = &spec_of(plan, id.table);
                visit(ReadRow::Held(HeldRow { table, row, count: *count }));
            }
        }
        while !changed.is_empty() {
            if budget.is_spent() {
                return Ok(ReadProgress::More);
            }
            let Some(id) = changed.pop_first() else { break };
            budget.spend(1);
            *told += 1;
            let held = result.get(&id).map(|(count, row)| (row, *count));
            visit(ReadRow::Changed { table: &spec_of(plan, id.table), id: &id, held });
        }
        Ok(ReadProgress::Done)
    }

    fn count(&self, instance: InstanceId, id: &RowIdentity, row: &Row) -> Result<u64, String> {
        let instance = self.instances.get(&instance).ok_or("unknown instance")?;
        let table = self.schema.table(id.table()).ok_or("unknown table")?;
        let id = crate::row::RowId::of(table, row);
        Ok(instance.result.get(&id).map_or(0, |(n, _)| *n))
    }

    fn reads(&self, instance: InstanceId, table: &str) -> bool {
        let instance = self.instances.get(&instance);
        instance.is_some_and(|i| i.plan.nodes.iter().any(|n| &*n.table.name == table))
    }

    fn shared(&mut self) -> &mut Shared {
        &mut self.shared
    }

    fn signature(&self, instance: InstanceId) -> Result<u64, String> {
        let instance = self.instances.get(&instance).ok_or("unknown instance")?;
        let mut signature = 0;
        for (id, (count, row)) in &instance.result {
            if count % 2 == 1 {
                let table = spec_of(&instance.plan, id.table);
                signature ^= RowIdentity::of(&table, row).signature_unit();
            }
        }
        Ok(signature)
    }

    fn occurrence(&self, instance: InstanceId) -> Occurrence {
        let instance = self.instances.get(&instance);
        instance.map_or(Occurrence::Many, |instance| instance.plan.occurrence())
    }

    fn read_row(&mut self, id: &RowIdentity) -> Result<Option<RowRef>, String> {
        self.reads += 1;
        let table = self.schema.table(id.table()).ok_or("unknown table")?;
        let key: Key = table
            .primary_key
            .iter()
            .map(|&c| id.key_value(&table.columns[c].name).cloned().unwrap_or(Value::Null))
            .collect();
        Ok(self.db.get(table.id, &key).cloned())
    }
}
