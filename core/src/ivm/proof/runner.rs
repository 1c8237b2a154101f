//! Executes the operations of a script and compares: what was emitted, what is held, what is
//! answered, with the brute-force oracle.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::script::{Edit, Operation, Script};
use crate::change::{Commit, RowChange, TableChange};
use crate::ivm::brute::{self, Multiset};
use crate::ivm::delta::{Advanced, RowDelta};
use crate::ivm::engine::{AdvanceStart, Budget, Engine, InstanceId, Progress, Reset, Status};
use crate::ivm::memory_source::{Database, MemorySource};
use crate::ivm::plan::{Node, Param, Plan};
use crate::ivm::reading::{ReadProgress, ReadRow, Reading};
use crate::ivm::signature::RowName;
use crate::ivm::source::Source;
use crate::row::{Key, Row, RowId, RowRef};
use crate::schema::{ColumnSpec, Schema, TableId, TableSpec, ValueType};
use crate::value::Value;
use crate::version::StateVersion;

/// A source that follows commits.
pub trait Replayed: Source {
    /// Moves to a commit's version. `after` is the database then; a commit with a schema says
    /// nothing about the rows of the tables that it changed.
    ///
    /// # Errors
    /// The store failed.
    fn follow(&mut self, commit: &Commit, after: &Database) -> Result<(), String>;
}

impl Replayed for MemorySource {
    fn follow(&mut self, commit: &Commit, after: &Database) -> Result<(), String> {
        if commit.schema.is_some() {
            self.db = after.clone();
        }
        self.advance(commit);
        Ok(())
    }
}

/// Makes a source of a database at a version.
pub type MakeSource<'a, S> = &'a dyn Fn(&Schema, &Database, &StateVersion) -> S;

/// A source over vectors.
pub fn memory(_: &Schema, db: &Database, version: &StateVersion) -> MemorySource {
    MemorySource::new(db.clone(), version.clone())
}

/// Why a script stopped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Failure {
    /// The engine is wrong.
    Wrong(String),
    /// The script contradicts itself, e.g. two rows with one unique value.
    Invalid,
}

impl From<String> for Failure {
    fn from(what: String) -> Self {
        Failure::Wrong(what)
    }
}

/// What a subscriber knows.
struct Subscriber {
    id: InstanceId,
    query: usize,
    /// Empty until hydrated.
    rows: Option<Multiset>,
    /// Every second one reads its instance piece by piece, from time to time.
    reads: bool,
    /// And what it was told.
    reading: Option<(Reading, Multiset)>,
}

/// An engine, its source, and everything that is known without them.
pub struct Runner<S> {
    engine: Engine,
    source: S,
    db: Database,
    /// The schema of `db`.
    schema: Arc<Schema>,
    /// Queries under the engine's schema, or the one that it is advancing to.
    queries: Vec<(Arc<Plan>, Arc<[Param]>)>,
    subscribers: Vec<Subscriber>,
    /// Commits that the source has seen and the engine has not.
    pending: Vec<Arc<Commit>>,
    lsn: u64,
    /// Advances that were compared with the oracle.
    pub steps: u64,
    /// Operations so far.
    operations: u64,
    /// Who reads an instance keeps it from being parked: not for long, where that matters.
    reads_on: bool,
}

/// The name of the column that [`Operation::Alter`] adds.
const EXTRA: &str = "extra";

impl<S: Replayed> Runner<S> {
    /// A runner at the start of a script.
    ///
    /// # Errors
    /// [`Failure::Invalid`] rows.
    pub fn new(script: &Script, make: MakeSource<'_, S>) -> Result<Runner<S>, Failure> {
        let version = StateVersion::from_lsn(1);
        let mut db = Database::default();
        for (table, values) in &script.rows {
            let table = by_id(&script.schema, *table).ok_or(Failure::Invalid)?;
            db.put(table, Row::new(version.clone(), values.clone()));
        }
        let tables: BTreeSet<TableId> = script.rows.iter().map(|r| r.0).collect();
        if !tables.iter().all(|&t| is_unique(&script.schema, &db, t)) {
            return Err(Failure::Invalid);
        }
        Ok(Runner {
            engine: Engine::new(script.config.clone(), version.clone(), script.schema.clone()),
            source: make(&script.schema, &db, &version),
            db,
            schema: script.schema.clone(),
            queries: script.queries.clone(),
            subscribers: Vec::new(),
            pending: Vec::new(),
            lsn: 1,
            steps: 0,
            operations: 0,
            reads_on: script.config.max_rows == usize::MAX,
        })
    }

    /// The database, as the source knows it.
    pub fn database(&self) -> &Database {
        &self.db
    }

    /// Its version.
    pub fn version(&self) -> &StateVersion {
        self.source.version()
    }

    /// The engine.
    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    /// Commits that the engine has not seen.
    pub fn is_behind(&self) -> bool {
        !self.pending.is_empty()
    }

    /// Number of subscribers.
    pub fn subscribers(&self) -> usize {
        self.subscribers.len()
    }

    /// Whether a subscriber has its rows.
    pub fn is_hydrated(&self, subscriber: usize) -> bool {
        self.subscribers[subscriber].rows.is_some()
    }

    /// Executes one operation; one that makes no sense now has no effect.
    ///
    /// # Errors
    /// [`Failure`].
    pub fn execute(&mut self, operation: &Operation) -> Result<(), Failure> {
        match operation {
            Operation::Subscribe(query) => self.subscribe(*query)?,
            Operation::Unsubscribe(i) if *i < self.subscribers.len() => {
                let gone = self.subscribers.swap_remove(*i);
                self.engine.unsubscribe(gone.id);
            }
            Operation::Unsubscribe(_) => {}
            Operation::Hydrate(i, units) => self.hydrate(*i, *units)?,
            // The source can only be at the version that the engine is advancing to.
            Operation::Commit(_) | Operation::Alter(_) if self.engine.is_advancing() => {}
            Operation::Commit(edits) => self.commit(edits)?,
            Operation::Alter(table) => self.alter(*table)?,
            Operation::Advance | Operation::Reset if self.engine.is_advancing() => {}
            Operation::Advance if self.pending.is_empty() => {}
            Operation::Advance => {
                let commits = std::mem::take(&mut self.pending);
                let start = self.engine.begin_advance(&commits).map_err(|e| e.to_string())?;
                self.rebind(&start)?;
            }
            Operation::Reset => {
                self.pending.clear();
                let version = self.source.version().clone();
                let start = self.engine.begin_reset(version, self.schema.clone(), &Reset::All);
                self.rebind(&start.map_err(|e| e.to_string())?)?;
            }
            Operation::Step(units) => self.step(*units)?,
        }
        self.operations += 1;
        self.engine.release(&mut Budget::units(self.operations % 7));
        for i in 0..self.subscribers.len() {
            let subscriber = &mut self.subscribers[i];
            let begins = subscriber.reads && (self.reads_on || self.operations.is_multiple_of(6));
            if subscriber.reading.is_none() && begins {
                subscriber.reading = Some((Reading::of(subscriber.id), Multiset::new()));
            }
            self.read(i, self.operations % 5 * 2 + 1)?;
        }
        Ok(())
    }

    /// Goes on reading the rows of a subscriber; compares them when all are told (true).
    fn read(&mut self, i: usize, units: u64) -> Result<bool, String> {
        let Subscriber { id, reading: known, .. } = &mut self.subscribers[i];
        let Some((reading, told)) = known else { return Ok(true) };
        let mut visit = |row: ReadRow<'_>| match row {
            ReadRow::Held(h) => {
                let id = RowId::of(h.table, h.row);
                match told.insert(id, (h.count, h.row.clone())) {
                    None => Ok(()),
                    Some(_) => Err(format!("{:?} is told twice", h.row)),
                }
            }
            ReadRow::Changed { id, held, .. } => {
                match held {
                    Some((row, count)) => told.insert(id.clone(), (count, row.clone())),
                    None => told.remove(id),
                };
                Ok(())
            }
        };
        let mut wrong = Ok(());
        let mut budget = Budget::units(units);
        let progress = self.engine.read(reading, &mut self.source, &mut budget, &mut |row| {
            let told = visit(row);
            wrong = wrong.clone().and(told);
        });
        wrong?;
        match progress.map_err(|e| format!("reading: {e}"))? {
            ReadProgress::More | ReadProgress::Waits => Ok(false),
            ReadProgress::Void => {
                told.clear();
                Ok(false)
            }
            ReadProgress::Done => {
                compare("what was read", told, &held(&self.engine, *id)?)?;
                // Mostly it goes on with what changes.
                if !self.reads_on || self.operations.is_multiple_of(3) {
                    *known = None;
                }
                Ok(true)
            }
        }
    }

    /// Brings everything to an end: all hydrated, compared, unsubscribed; no memory stays behind.
    ///
    /// # Errors
    /// [`Failure`].
    pub fn finish(mut self) -> Result<u64, Failure> {
        self.execute(&Operation::Advance)?;
        while self.engine.is_advancing() {
            self.step(None)?;
        }
        for i in 0..self.subscribers.len() {
            while !self.is_hydrated(i) {
                self.hydrate(i, None)?;
            }
            self.check(i)?;
            while !self.read(i, u64::MAX)? {}
        }
        let Runner { mut engine, source, db, subscribers, steps, .. } = self;
        subscribers.iter().for_each(|s| engine.unsubscribe(s.id));
        // The database holds rows too.
        drop((source, db, subscribers));
        engine.sweep(&mut Budget::unlimited());
        let s = engine.stats();
        let left = [s.plans, s.instances, s.subscriptions, s.partitions, s.interned_rows, s.routes];
        if left == [0; 6] {
            Ok(steps)
        } else {
            Err(Failure::Wrong(format!("memory stays behind: {s:?}")))
        }
    }

    fn subscribe(&mut self, query: usize) -> Result<(), String> {
        let query = query % self.queries.len();
        let (plan, params) = &self.queries[query];
        let id = self.engine.subscribe(plan, params.clone()).map_err(|e| e.to_string())?;
        let reads = self.operations.is_multiple_of(2);
        self.subscribers.push(Subscriber { id, query, rows: None, reads, reading: None });
        Ok(())
    }

    fn hydrate(&mut self, i: usize, units: Option<u64>) -> Result<(), String> {
        if i >= self.subscribers.len() || *self.source.version() != *self.engine.version() {
            return Ok(());
        }
        let id = self.subscribers[i].id;
        let mut budget = budget(units);
        let step = self.engine.hydrate_step(id, &mut self.source, &mut budget);
        match step.map_err(|e| format!("hydration: {e}"))? {
            Progress::More => Ok(()),
            Progress::Blocked if self.engine.is_advancing() => Ok(()),
            Progress::Blocked => Err("blocked without an advance".into()),
            Progress::Done if self.engine.is_advancing() => Ok(()),
            Progress::Done => {
                if self.subscribers[i].rows.is_none() {
                    self.subscribers[i].rows = Some(held(&self.engine, id)?);
                }
                self.check(i)
            }
        }
    }

    fn next_version(&mut self) -> StateVersion {
        self.lsn += 1;
        StateVersion::from_lsn(self.lsn)
    }

    fn commit(&mut self, edits: &[Edit]) -> Result<(), Failure> {
        let version = self.next_version();
        let mut truncated: BTreeSet<TableId> = BTreeSet::new();
        let mut olds: BTreeMap<TableId, BTreeMap<Key, Option<RowRef>>> = BTreeMap::new();
        for edit in edits {
            let (Edit::Put(id, _) | Edit::Remove(id, _) | Edit::Truncate(id)) = edit;
            let table = by_id(&self.schema, *id).ok_or(Failure::Invalid)?.clone();
            let (key, new) = match edit {
                _ if truncated.contains(id) => continue,
                Edit::Truncate(_) => {
                    truncated.insert(*id);
                    self.db.clear(*id);
                    continue;
                }
                Edit::Put(_, values) => {
                    let mut values = values.to_vec();
                    values.resize(table.columns.len(), Value::Null);
                    let row = Row::new(version.clone(), values);
                    (row.project(&table.replica_key), Some(row))
                }
                Edit::Remove(_, key) => (key.clone(), None),
            };
            let old = match new {
                Some(row) => self.db.put(&table, row),
                None => self.db.take(*id, &key),
            };
            olds.entry(*id).or_default().entry(key).or_insert(old);
        }
        let mut tables = Vec::new();
        for table in self.schema.tables.values() {
            let is_truncated = truncated.contains(&table.id);
            let touched = olds.remove(&table.id).filter(|_| !is_truncated).unwrap_or_default();
            let rows: Vec<RowChange> = touched
                .into_iter()
                .map(|(key, old)| RowChange { new: self.db.get(table.id, &key).cloned(), old })
                .filter(|c| c.old.is_some() || c.new.is_some())
                .collect();
            if !rows.is_empty() || is_truncated {
                if !is_unique(&self.schema, &self.db, table.id) {
                    return Err(Failure::Invalid);
                }
                let table = Arc::clone(table);
                tables.push(TableChange { table, rows, truncated: is_truncated });
            }
        }
        self.publish(version, tables, None)
    }

    fn publish(
        &mut self,
        version: StateVersion,
        tables: Vec<TableChange>,
        schema: Option<Arc<Schema>>,
    ) -> Result<(), Failure> {
        let commit = Arc::new(Commit {
            previous: self.source.version().clone(),
            version,
            tables,
            schema,
            upstream_commit_ms: 0.0,
            permissions_changed: false,
        });
        self.source.follow(&commit, &self.db)?;
        if self.source.version() != &commit.version {
            return Err(Failure::Wrong("the source is at another version".into()));
        }
        self.pending.push(commit);
        Ok(())
    }

    fn alter(&mut self, id: TableId) -> Result<(), Failure> {
        let version = self.next_version();
        let Some(old) = by_id(&self.schema, id).cloned() else { return Ok(()) };
        let mut spec = TableSpec::clone(&old);
        match spec.column(EXTRA) {
            Some(at) => drop(spec.columns.remove(at)),
            None => spec.columns.push(ColumnSpec {
                name: EXTRA.into(),
                value_type: ValueType::Number,
                nullable: true,
                upstream_type: "int4".into(),
            }),
        }
        spec.min_row_version = version.clone();
        let spec = Arc::new(spec);
        for row in self.db.rows(id).cloned().collect::<Vec<_>>() {
            let mut values = row.values.to_vec();
            values.resize(spec.columns.len(), Value::Number(7.0));
            self.db.put(&spec, Row::new(version.clone(), values));
        }
        let mut schema = Schema::clone(&self.schema);
        schema.tables.insert(spec.name.clone(), spec);
        self.schema = Arc::new(schema);
        self.publish(version, Vec::new(), Some(self.schema.clone()))
    }

    /// Gives the instances that an advance asks about the plans of the new schema.
    fn rebind(&mut self, start: &AdvanceStart) -> Result<(), String> {
        for (plan, _) in &mut self.queries {
            *plan = bind(plan, &self.schema);
        }
        for &id in &start.needs_rebind {
            let subscriber = self.subscribers.iter().find(|s| s.id == id);
            let query = subscriber.ok_or("an instance without subscribers")?.query;
            let plan = self.queries[query].clone();
            self.engine.rebind(id, Ok(plan)).map_err(|e| e.to_string())?;
        }
        Ok(())
    }

    fn step(&mut self, units: Option<u64>) -> Result<(), String> {
        if !self.engine.is_advancing() {
            return Ok(());
        }
        let mut budget = budget(units);
        let step = self.engine.advance_step(&mut self.source, &mut budget);
        if let Some(advanced) = step.map_err(|e| e.to_string())? {
            self.apply(&advanced)?;
            self.steps += 1;
            (0..self.subscribers.len()).try_for_each(|i| self.check(i))?;
        }
        Ok(())
    }

    fn apply(&mut self, advanced: &Advanced) -> Result<(), String> {
        if let Some((_, error)) = advanced.failed.first() {
            return Err(format!("an instance failed: {error}"));
        }
        if advanced.version != *self.source.version() {
            return Err("advanced to another version".into());
        }
        let mut seen = BTreeSet::new();
        for delta in &advanced.deltas {
            if delta.rows.is_empty() || !seen.insert(delta.instance) {
                return Err("an empty or second list of deltas".into());
            }
            for s in self.subscribers.iter_mut().filter(|s| s.id == delta.instance) {
                // Subscribed in the middle: reads the rows when it attaches.
                if let Some(rows) = &mut s.rows {
                    delta.rows.iter().try_for_each(|d| apply(rows, d))?;
                }
            }
        }
        Ok(())
    }

    /// The subscriber's rows, the engine's answers and the oracle agree.
    fn check(&mut self, i: usize) -> Result<(), String> {
        self.check_answers(i)?;
        let s = &self.subscribers[i];
        if s.rows.is_some() && self.engine.is_parked(s.id) {
            let mut budget = Budget::unlimited();
            let step = self.engine.hydrate_step(s.id, &mut self.source, &mut budget);
            step.map_err(|e| format!("reading a parked instance: {e}"))?;
            return self.check_answers(i);
        }
        Ok(())
    }

    fn check_answers(&self, i: usize) -> Result<(), String> {
        let s = &self.subscribers[i];
        let Some(known) = &s.rows else { return Ok(()) };
        let (plan, params) = &self.queries[s.query];
        let wanted = brute::sync(plan, params, &self.db);
        compare("what was emitted", known, &wanted)?;
        // Subscribers of one instance know the same: its answers are compared once.
        if self.subscribers[..i].iter().any(|o| o.id == s.id && o.rows.is_some()) {
            return Ok(());
        }
        if !self.engine.is_parked(s.id) {
            compare("what is held", &held(&self.engine, s.id)?, &wanted)?;
        }
        let status = self.engine.status(s.id).map_err(|e| e.to_string())?;
        if !matches!(status, Status::Ready) {
            return Err(format!("status {status:?}"));
        }
        let mut signature = 0;
        let specs: BTreeMap<_, _> = plan.nodes.iter().map(|n| (n.table.id, &n.table)).collect();
        for table in specs.into_values() {
            let name = RowName::new(table);
            for row in self.db.rows(table.id) {
                let id = RowId::of(table, row);
                let count = self.engine.count(s.id, table.id, row).map_err(|e| e.to_string())?;
                if count != wanted.get(&id).map_or(0, |w| w.0) {
                    return Err(format!("count of {id:?} is {count}"));
                }
                if count % 2 == 1 {
                    signature ^= name.hash(row);
                }
            }
        }
        if self.engine.signature(s.id).map_err(|e| e.to_string())? != signature {
            return Err("signature".into());
        }
        Ok(())
    }
}

fn budget(units: Option<u64>) -> Budget {
    units.map_or_else(Budget::unlimited, Budget::units)
}

/// A table by its number.
pub fn by_id(schema: &Schema, id: TableId) -> Option<&Arc<TableSpec>> {
    schema.tables.values().find(|t| t.id == id)
}

/// Whether no two rows of a table agree on a unique key.
fn is_unique(schema: &Schema, db: &Database, id: TableId) -> bool {
    by_id(schema, id).is_some_and(|table| {
        table.unique_keys.iter().filter(|k| k.columns != table.replica_key).all(|k| {
            let mut seen = BTreeSet::new();
            db.rows(id)
                .map(|r| r.project(&k.columns))
                .all(|key| key.iter().any(Value::is_null) || seen.insert(key))
        })
    })
}

/// The plan over the tables of another schema; identity keys stay as they are.
fn bind(plan: &Arc<Plan>, schema: &Schema) -> Arc<Plan> {
    let current = |n: &Node| {
        by_id(schema, n.table.id).is_some_and(|t| {
            t.columns == n.table.columns && t.min_row_version == n.table.min_row_version
        })
    };
    if plan.nodes.iter().all(current) {
        return Arc::clone(plan);
    }
    let nodes = plan.nodes.iter().map(|n| {
        let table = by_id(schema, n.table.id).map_or_else(
            || Arc::clone(&n.table),
            |t| {
                let primary_key = n.table.primary_key.clone();
                Arc::new(TableSpec { primary_key, ..TableSpec::clone(t) })
            },
        );
        Node { table, ..super::shrink::copy(n) }
    });
    Arc::new(Plan { nodes: nodes.collect(), params: plan.params })
}

fn held(engine: &Engine, id: InstanceId) -> Result<Multiset, String> {
    let mut rows = Multiset::new();
    for held in engine.rows(id).map_err(|e| e.to_string())? {
        let row_id = RowId::of(held.table, held.row);
        if rows.insert(row_id.clone(), (held.count, held.row.clone())).is_some() {
            return Err(format!("{row_id:?} is listed twice"));
        }
    }
    Ok(rows)
}

fn apply(rows: &mut Multiset, d: &RowDelta) -> Result<(), String> {
    let known = rows.get(&d.id);
    if known.map_or(0, |k| k.0) != d.count_before {
        return Err(format!("{d:?} for {known:?}"));
    }
    let (Some(row), true) = (&d.row, d.count_after > 0) else {
        rows.remove(&d.id);
        return if d.row.is_none() && d.count_before > 0 && d.count_after == 0 {
            Ok(())
        } else {
            Err(format!("{d:?}"))
        };
    };
    let changed = known.is_some_and(|k| k.1.version != row.version);
    if changed != d.content_changed || (!changed && d.count_before == d.count_after) {
        return Err(format!("{d:?} for {known:?}"));
    }
    rows.insert(d.id.clone(), (d.count_after, row.clone()));
    Ok(())
}

fn compare(what: &str, have: &Multiset, want: &Multiset) -> Result<(), String> {
    let equal = |h: (&RowId, &(u64, RowRef)), w: (&RowId, &(u64, RowRef))| {
        let (have, want) = (&h.1.1, &w.1.1);
        h.0 == w.0
            && h.1.0 == w.1.0
            && (RowRef::ptr_eq(have, want)
                || (have.version == want.version && have.values == want.values))
    };
    if have.len() == want.len() && have.iter().zip(want).all(|(h, w)| equal(h, w)) {
        return Ok(());
    }
    let mut text = format!("{what} differs from the oracle (id: have / want)\n");
    for id in have.keys().chain(want.keys()).collect::<BTreeSet<_>>() {
        let (h, w) = (have.get(id), want.get(id));
        if h.map(|h| (h.0, &h.1.version, &h.1.values))
            != w.map(|w| (w.0, &w.1.version, &w.1.values))
        {
            text += &format!("  {id:?}: {h:?} / {w:?}\n");
        }
    }
    Err(text)
}
