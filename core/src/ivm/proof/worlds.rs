//! Random schemas, rows, plans and changes. Two worlds: one made of plans, for the rare cases of
//! the engine; one made of queries, through the compiler, with all types and composite keys.
//!
//! The plans reach the rare cases by tiny value domains, so that
//! keys collide; few rows; several changes per commit; nesting with many NOT EXISTS; two leaves in
//! one AND/OR on tables that change together; the same table at every level; windows of 0–4.

use std::sync::Arc;

use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};

use crate::change::{Commit, RowChange, TableChange};
use crate::ivm::memory_source::Database;
use crate::ivm::plan::{
    Condition, Direction, ExistsEdge, Node, NodeId, Op, Param, ParamId, Plan, RelatedEdge, Role,
    Simple, Start,
};
use crate::row::{Row, RowRef};
use crate::schema::{ColumnSpec, Schema, TableId, TableSpec, UniqueKey, ValueType};
use crate::value::Value;
use crate::version::StateVersion;
use crate::zql::compile::{IdentityKeys, compile};
use crate::zql::gen_world::{self, Choices, Shape};
use crate::zql::order;

/// Columns of every table: the replica's key, a unique value that rows exchange, and three
/// nullable ones.
const COLUMNS: [&str; 5] = ["id", "u", "k", "m", "n"];
const ID: usize = 0;
const UNIQUE: usize = 1;
const FREE: [usize; 3] = [2, 3, 4];

/// Where a history takes its data and queries from.
pub trait World {
    /// The tables.
    fn schema(&self) -> Arc<Schema>;
    /// The rows at the start.
    fn database(&mut self) -> Database;
    /// A transaction; `db` moves on.
    fn commit(&mut self, db: &mut Database, previous: &StateVersion) -> Arc<Commit>;
    /// A plan and the parameters of its first instance.
    fn query(&mut self) -> (Arc<Plan>, Vec<Param>);
    /// Other parameters for the same plan.
    fn vary(&mut self, params: &[Param]) -> Vec<Param>;
    /// A table whose columns may change.
    fn alterable(&mut self) -> Option<TableId>;
}

/// Queries, through the compiler.
pub struct QueryWorld {
    choices: Choices,
    shape: Shape,
    schema: Arc<Schema>,
    keys: IdentityKeys,
    next_version: u64,
}

impl QueryWorld {
    /// The world of a seed.
    pub fn new(seed: u64) -> QueryWorld {
        let mut choices = Choices::new(seed);
        let shape = Shape { json: false, ..Shape::default() };
        let schema = Arc::new(gen_world::schema(&mut choices, &shape));
        let keys = gen_world::identity_keys(&mut choices, &schema);
        QueryWorld { choices, shape, schema, keys, next_version: 1 }
    }
}

impl World for QueryWorld {
    fn schema(&self) -> Arc<Schema> {
        self.schema.clone()
    }

    fn database(&mut self) -> Database {
        let version = StateVersion::from_lsn(1);
        gen_world::database(&mut self.choices, &self.schema, &self.shape, &version)
    }

    fn commit(&mut self, db: &mut Database, previous: &StateVersion) -> Arc<Commit> {
        self.next_version += 1;
        let version = StateVersion::from_lsn(self.next_version);
        let c = &mut self.choices;
        Arc::new(gen_world::commit(c, &self.schema, &self.shape, db, previous, &version))
    }

    fn query(&mut self) -> (Arc<Plan>, Vec<Param>) {
        let ast = gen_world::ast(&mut self.choices, &self.schema, &self.shape);
        match compile(&ast, &self.schema, &self.keys) {
            Ok((plan, params)) => (Arc::new(plan), params),
            Err(error) => panic!("{error}: {ast:?}"),
        }
    }

    fn vary(&mut self, params: &[Param]) -> Vec<Param> {
        // Any two values of a type may stand for each other.
        let mut out = params.to_vec();
        for i in 0..out.len() {
            let j = self.choices.below(out.len());
            if let (Param::Value(a), Param::Value(b)) = (&out[i], &params[j])
                && std::mem::discriminant(a) == std::mem::discriminant(b)
            {
                out[i] = Param::Value(b.clone());
            }
        }
        out
    }

    fn alterable(&mut self) -> Option<TableId> {
        // Values are made for the columns of the start.
        None
    }
}

/// Plans, made directly.
pub struct PlanWorld {
    rng: StdRng,
    tables: Vec<Arc<TableSpec>>,
    next_version: u64,
    next_unique: u32,
    size: Size,
}

/// How large a [`PlanWorld`] is.
#[derive(Debug, Clone, Copy)]
struct Size {
    /// Ids are below it.
    ids: u32,
    /// Values of the free columns are below it.
    values: u32,
    /// Deepest nesting of queries.
    depth: u32,
    /// Most changes of a transaction.
    changes: u32,
}

/// Everything collides.
const TINY: Size = Size { ids: 10, values: 4, depth: 3, changes: 8 };
/// Transactions of up to 1,000 changes have something to change.
const LARGE: Size = Size { ids: 300, values: 60, depth: 2, changes: 1_000 };

/// A query shape, before it is numbered.
struct Draft {
    nodes: Vec<Option<Node>>,
    params: Vec<Param>,
}

impl PlanWorld {
    /// The world of a seed: few rows.
    pub fn new(seed: u64) -> PlanWorld {
        PlanWorld::sized(seed, TINY)
    }

    /// The world of a seed: hundreds of rows, transactions of up to 1,000 changes.
    pub fn large(seed: u64) -> PlanWorld {
        PlanWorld::sized(seed, LARGE)
    }

    fn sized(seed: u64, size: Size) -> PlanWorld {
        let mut rng = StdRng::seed_from_u64(seed);
        let tables = (0..3).map(|i| Arc::new(table(&mut rng, i))).collect();
        PlanWorld { rng, tables, next_version: 1, next_unique: 0, size }
    }

    fn chance(&mut self, percent: u32) -> bool {
        self.rng.random_range(0..100) < percent
    }

    fn value(&mut self, null_percent: u32) -> Value {
        if self.chance(null_percent) {
            Value::Null
        } else {
            Value::Number(f64::from(self.rng.random_range(0..self.size.values)))
        }
    }

    fn version(&mut self) -> StateVersion {
        self.next_version += 1;
        StateVersion::from_lsn(self.next_version)
    }

    fn row(&mut self, id: u32, version: &StateVersion) -> RowRef {
        self.next_unique += 1;
        let unique = Value::Number(f64::from(self.next_unique));
        let mut values = vec![Value::Number(f64::from(id)), unique];
        values.extend(FREE.map(|_| self.value(12)));
        Row::new(version.clone(), values)
    }

    fn change(&mut self, db: &mut Database, version: &StateVersion) {
        let table = self.tables[self.rng.random_range(0..self.tables.len())].clone();
        let existing: Vec<RowRef> = db.rows(table.id).cloned().collect();
        let kind = self.rng.random_range(0..100);
        let Some(row) = existing.choose(&mut self.rng).cloned() else {
            let row = self.row(0, version);
            db.put(&table, row);
            return;
        };
        let with = |row: &Row, column: usize, value: Value| {
            let mut values = row.values.to_vec();
            values[column] = value;
            Row::new(version.clone(), values)
        };
        if kind < 28 {
            let id = self.rng.random_range(0..self.size.ids);
            let row = self.row(id, version);
            db.put(&table, row);
        } else if kind < 55 {
            db.remove(&table, &row);
        } else if kind < 65 {
            // Two rows exchange their unique value.
            let other = existing.choose(&mut self.rng).unwrap_or(&row).clone();
            let (a, b) = (row.values[UNIQUE].clone(), other.values[UNIQUE].clone());
            db.put(&table, with(&row, UNIQUE, b));
            if other.values[ID] != row.values[ID] {
                db.put(&table, with(&other, UNIQUE, a));
            }
        } else {
            let column = *FREE.choose(&mut self.rng).unwrap_or(&FREE[0]);
            let value = self.value(10);
            db.put(&table, with(&row, column, value));
        }
    }

    fn list(&mut self) -> Arc<[Value]> {
        let mut list: Vec<Value> = Vec::new();
        for _ in 0..self.rng.random_range(0..3) {
            list.push(self.value(0));
        }
        list.sort();
        list.dedup();
        list.into()
    }

    fn param(&mut self, draft: &mut Draft, param: Param) -> ParamId {
        draft.params.push(param);
        ParamId(draft.params.len() as u16 - 1)
    }

    fn node(
        &mut self,
        draft: &mut Draft,
        depth: u32,
        role: Role,
        silent: bool,
        below_not_exists: bool,
    ) -> NodeId {
        let id = NodeId(draft.nodes.len() as u16);
        draft.nodes.push(None);
        let table = self.tables[self.rng.random_range(0..self.tables.len())].clone();
        let exists = matches!(role, Role::Exists { .. });
        let mut own = Vec::new();
        let mut columns = FREE.to_vec();
        for _ in 0..self.rng.random_range(0..3) {
            let column = columns.remove(self.rng.random_range(0..columns.len()));
            let direction = if self.chance(50) { Direction::Asc } else { Direction::Desc };
            own.push((column, direction));
        }
        order::complete(&mut own, &table.primary_key);
        let start = (!exists || self.chance(10)) && self.chance(25);
        let start = start.then(|| Start {
            position: own
                .iter()
                .map(|_| {
                    let value = self.value(25);
                    self.param(draft, Param::Value(value))
                })
                .collect(),
            order: own.clone(),
            exclusive: self.chance(50),
        });
        let mut order = own;
        if exists {
            order.clear();
            order::complete(&mut order, &table.primary_key);
        }
        let limit = (!exists && self.chance(60))
            .then(|| *[0, 1, 1, 2, 3, 4].choose(&mut self.rng).unwrap_or(&1));
        let condition = if self.chance(80) {
            self.condition(draft, depth, 0, id, silent, below_not_exists)
        } else {
            Condition::And(vec![])
        };
        let mut related = Vec::new();
        if depth > 0 && (!exists || self.chance(8)) {
            for _ in 0..*[0, 0, 1, 2].choose(&mut self.rng).unwrap_or(&0) {
                let (parent_columns, child_columns) = self.join();
                let role = Role::Related { parent: id };
                let child = self.node(draft, depth - 1, role, silent, below_not_exists);
                related.push(RelatedEdge { parent_columns, child_columns, child });
            }
        }
        draft.nodes[usize::from(id.0)] = Some(Node {
            table,
            condition,
            order,
            start,
            limit,
            related,
            role,
            silent,
            below_not_exists,
        });
        id
    }

    fn join(&mut self) -> (Vec<usize>, Vec<usize>) {
        let columns = [ID, FREE[0], FREE[1], FREE[2]];
        let mut pick = || *columns.choose(&mut self.rng).unwrap_or(&ID);
        let (mut parent, mut child) = (vec![pick()], vec![pick()]);
        if self.chance(15) && parent != [FREE[2]] && child != [FREE[1]] {
            parent.push(FREE[2]);
            child.push(FREE[1]);
        }
        (parent, child)
    }

    fn condition(
        &mut self,
        draft: &mut Draft,
        depth: u32,
        level: u32,
        parent: NodeId,
        silent: bool,
        below_not_exists: bool,
    ) -> Condition {
        let kind = self.rng.random_range(0..100);
        if level < 2 && kind < 40 {
            let count = if self.chance(5) { 0 } else { self.rng.random_range(1..4) };
            let all = (0..count)
                .map(|_| self.condition(draft, depth, level + 1, parent, silent, below_not_exists))
                .collect();
            return if self.chance(55) { Condition::And(all) } else { Condition::Or(all) };
        }
        if depth > 0 && kind < 80 {
            // A body with limit 0 is a constant.
            if self.chance(4) {
                return Condition::Const(self.chance(50));
            }
            let negated = self.chance(38);
            let permissions = self.chance(15);
            let (parent_columns, child_columns) = self.join();
            let child = self.node(
                draft,
                depth - 1,
                Role::Exists { parent, negated },
                silent || negated || permissions,
                below_not_exists || negated,
            );
            return Condition::Exists(ExistsEdge {
                negated,
                parent_columns,
                child_columns,
                child,
                permissions,
            });
        }
        let ops = [
            Op::Eq,
            Op::Eq,
            Op::Eq,
            Op::Ne,
            Op::Is,
            Op::IsNot,
            Op::IsNull,
            Op::IsNotNull,
            Op::Lt,
            Op::Gt,
            Op::Le,
            Op::Ge,
            Op::In,
            Op::NotIn,
        ];
        let op = *ops.choose(&mut self.rng).unwrap_or(&Op::Eq);
        let param = match op {
            Op::IsNull | Op::IsNotNull => Param::Value(Value::Null),
            Op::In | Op::NotIn => Param::List(self.list()),
            _ => Param::Value(self.value(0)),
        };
        let column = *FREE.choose(&mut self.rng).unwrap_or(&FREE[0]);
        Condition::Simple(Simple { column, op, param: self.param(draft, param) })
    }
}

impl World for PlanWorld {
    fn schema(&self) -> Arc<Schema> {
        let tables = self.tables.iter().map(|t| (t.name.clone(), t.clone())).collect();
        Arc::new(Schema { tables, ..Schema::default() })
    }

    fn database(&mut self) -> Database {
        let mut db = Database::default();
        let version = StateVersion::from_lsn(1);
        for table in self.tables.clone() {
            for id in 0..self.rng.random_range(1..self.size.ids - 1) {
                let row = self.row(id, &version);
                db.put(&table, row);
            }
        }
        db
    }

    /// A transaction of 1–8 changes; `db` moves on.
    fn commit(&mut self, db: &mut Database, previous: &StateVersion) -> Arc<Commit> {
        let version = self.version();
        let before = db.clone();
        let most = self.size.changes;
        let count = *[1, 1, 1, 2, 3, 5, most].choose(&mut self.rng).unwrap_or(&1);
        for _ in 0..count {
            self.change(db, &version);
        }
        let truncated = self.rng.random_range(0..self.tables.len() * 60);
        let mut tables = Vec::new();
        for (i, table) in self.tables.clone().iter().enumerate() {
            if i == truncated {
                for row in db.rows(table.id).cloned().collect::<Vec<_>>() {
                    db.remove(table, &row);
                }
                tables.push(TableChange { table: table.clone(), rows: vec![], truncated: true });
                continue;
            }
            let rows = difference(&before, db, table);
            if !rows.is_empty() {
                tables.push(TableChange { table: table.clone(), rows, truncated: false });
            }
        }
        Arc::new(Commit {
            version,
            previous: previous.clone(),
            tables,
            schema: None,
            upstream_commit_ms: 0.0,
            permissions_changed: false,
        })
    }

    /// A plan and the parameters of its first instance.
    fn query(&mut self) -> (Arc<Plan>, Vec<Param>) {
        let mut draft = Draft { nodes: Vec::new(), params: Vec::new() };
        let depth = self.rng.random_range(1..=self.size.depth);
        self.node(&mut draft, depth, Role::Root, false, false);
        let plan = Plan {
            nodes: draft.nodes.into_iter().flatten().collect(),
            params: draft.params.len() as u16,
        };
        (Arc::new(plan), draft.params)
    }

    /// Other parameters for the same plan.
    fn vary(&mut self, params: &[Param]) -> Vec<Param> {
        let mut out = params.to_vec();
        for param in &mut out {
            match param {
                Param::Value(Value::Number(n)) if self.chance(40) => {
                    *n = f64::from(self.rng.random_range(0..self.size.values));
                }
                Param::List(l) if self.chance(40) => *l = self.list(),
                _ => {}
            }
        }
        out
    }

    fn alterable(&mut self) -> Option<TableId> {
        self.tables.choose(&mut self.rng).map(|t| t.id)
    }
}

fn table(rng: &mut StdRng, number: u32) -> TableSpec {
    let column = |name: &str| ColumnSpec {
        name: Arc::from(name),
        value_type: ValueType::Number,
        nullable: !matches!(name, "id" | "u"),
        upstream_type: Arc::from("int4"),
    };
    let key = |columns: &[usize]| UniqueKey { columns: columns.to_vec(), not_null: true };
    TableSpec {
        id: TableId(number),
        name: Arc::from(["a", "b", "c"][number as usize]),
        columns: COLUMNS.iter().map(|n| column(n)).collect(),
        // Sometimes the client names another key than the replica.
        primary_key: vec![if rng.random_range(0..4) == 0 { UNIQUE } else { ID }],
        replica_key: vec![ID],
        unique_keys: vec![key(&[ID]), key(&[UNIQUE])],
        min_row_version: StateVersion::zero(),
        indexes: Vec::new(),
    }
}

fn difference(before: &Database, after: &Database, table: &TableSpec) -> Vec<RowChange> {
    let mut rows = Vec::new();
    for old in before.rows(table.id) {
        let new = after.get(table.id, &old.project(&table.replica_key));
        if new.is_none_or(|new| !RowRef::ptr_eq(new, old)) {
            rows.push(RowChange { old: Some(old.clone()), new: new.cloned() });
        }
    }
    for new in after.rows(table.id) {
        if before.get(table.id, &new.project(&table.replica_key)).is_none() {
            rows.push(RowChange { old: None, new: Some(new.clone()) });
        }
    }
    rows
}
