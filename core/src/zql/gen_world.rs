//! Random schemas, data, queries and commits for property tests and fuzzers: all a function of a
//! seed. Domains are tiny (0–3 and null), tables have 0–9 rows, so that keys collide, windows
//! overflow and EXISTS toggle (engine.md §8).
//!
//! Every generated query compiles; a test that meets a `CompileError` has found a bug.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde_json::{Map, Value as Json};

use super::ast::{
    Ast, Condition, CorrelatedSubquery, Correlation, Direction, Exists, ExistsOp, Literal, Op,
    Operand, Simple, Start, System,
};
use super::compile::IdentityKeys;
use crate::change::{Commit, RowChange, TableChange};
use crate::ivm::memory_source::Database;
use crate::row::{Row, RowRef};
use crate::schema::{ColumnSpec, Schema, TableId, TableSpec, UniqueKey, ValueType};
use crate::value::Value;
use crate::version::StateVersion;

/// A deterministic generator of choices (SplitMix64). Print its seed when a test fails.
#[derive(Debug, Clone)]
pub struct Choices(u64);

impl Choices {
    /// All choices that follow from a seed.
    pub fn new(seed: u64) -> Choices {
        Choices(seed)
    }

    /// The next 64 bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `n` (0 if `n` is 0).
    pub fn below(&mut self, n: usize) -> usize {
        ((u128::from(self.bits()) * n as u128) >> 64) as usize
    }

    /// True in `percent` of 100 cases.
    pub fn chance(&mut self, percent: usize) -> bool {
        self.below(100) < percent
    }

    /// One of `items`, which must not be empty.
    pub fn pick<T: Clone>(&mut self, items: &[T]) -> T {
        items[self.below(items.len())].clone()
    }
}

/// What may occur.
#[derive(Debug, Clone)]
pub struct Shape {
    /// Most tables.
    pub tables: usize,
    /// Most rows of a table.
    pub rows: usize,
    /// Deepest nesting of queries.
    pub depth: usize,
    /// Related edges.
    pub related: bool,
    /// NOT EXISTS (the original's client cannot evaluate it).
    pub not_exists: bool,
    /// `system: permissions` edges.
    pub permissions: bool,
    /// Columns of json type, and of types that only a replica without Postgres can have.
    pub json: bool,
    /// Types whose replica column has numeric affinity although they are text (`uuid`, `upc`).
    pub exotic: bool,
}

impl Default for Shape {
    fn default() -> Self {
        Shape {
            tables: 4,
            rows: 9,
            depth: 3,
            related: true,
            not_exists: true,
            permissions: true,
            json: true,
            exotic: true,
        }
    }
}

const NUMBER_TYPES: [&str; 4] = ["int4", "int8", "float8", "numeric"];
const TEXTS: [&str; 6] = ["", "a", "Ab", "é", "\u{FFFD}", "😀"];
const UUIDS: [&str; 3] = [
    "00000000-0000-0000-0000-000000000001",
    "0a000000-0000-0000-0000-000000000001",
    "a0000000-0000-0000-0000-000000000000",
];
/// As a NUMERIC column keeps them: text that is no canonical number cannot be stored.
const UPCS: [&str; 4] = ["2", "10", "9", "x"];
const JSONS: [&str; 7] =
    ["{\"a\":1}", "[1,2]", "\"x\"", "null", "7", "true", "{\"b\":[null,\"é\"]}"];
const PATTERNS: [&str; 10] = ["%", "a%", "%b", "%\u{FFFD}%", "_", "A_", "\\a", "é", "", "__%"];

/// A random schema. Every table `t<i>` has the NOT NULL columns `id` (a key), and `u` (unique),
/// and a few nullable ones.
pub fn schema(c: &mut Choices, shape: &Shape) -> Schema {
    let mut schema = Schema::default();
    for i in 0..1 + c.below(shape.tables) {
        let table = Arc::new(table(c, shape, i));
        schema.tables.insert(Arc::clone(&table.name), table);
    }
    schema
}

fn table(c: &mut Choices, shape: &Shape, number: usize) -> TableSpec {
    let column = |name: &str, value_type, nullable, upstream: &str| ColumnSpec {
        name: name.into(),
        value_type,
        nullable,
        upstream_type: upstream.into(),
    };
    let id = if c.chance(70) {
        column("id", ValueType::Number, false, "int4")
    } else {
        column("id", ValueType::String, false, "text")
    };
    let mut columns = vec![id, column("u", ValueType::Number, false, "int8")];
    // Most columns are small numbers: they join with everything.
    for name in ["a", "b"] {
        columns.push(column(name, ValueType::Number, true, c.pick(&NUMBER_TYPES)));
    }
    if c.chance(60) {
        columns.push(column("s", ValueType::String, true, c.pick(&["text", "varchar"])));
    }
    if c.chance(40) {
        columns.push(column("f", ValueType::Boolean, true, "bool"));
    }
    if shape.exotic && c.chance(40) {
        columns.push(column("x", ValueType::String, true, c.pick(&["uuid", "upc"])));
    }
    if shape.json && c.chance(40) {
        columns.push(column("j", ValueType::Json, true, c.pick(&["json", "jsonb", "int4[]"])));
    }
    let primary_key = if c.chance(70) { vec![0] } else { vec![0, 1] };
    let unique_keys = [primary_key.clone(), vec![1]]
        .into_iter()
        .map(|columns| UniqueKey { columns, not_null: true })
        .collect();
    TableSpec {
        id: TableId(number as u32),
        name: format!("t{number}").into(),
        columns,
        replica_key: primary_key.clone(),
        primary_key,
        unique_keys,
        min_row_version: StateVersion::zero(),
        indexes: vec![vec![0], vec![1], vec![2]],
    }
}

/// Identity keys that a client schema could name: nothing, or the unique column `u`.
pub fn identity_keys(c: &mut Choices, schema: &Schema) -> IdentityKeys {
    let mut keys = BTreeMap::new();
    for name in schema.tables.keys() {
        if c.chance(20) {
            keys.insert(Arc::clone(name), vec![Arc::from("u")]);
        }
    }
    IdentityKeys(keys)
}

/// A random value of a column.
pub fn value(c: &mut Choices, column: &ColumnSpec) -> Value {
    if column.nullable && c.chance(20) {
        return Value::Null;
    }
    match (column.value_type, &*column.upstream_type) {
        (ValueType::Boolean, _) => Value::Bool(c.chance(50)),
        (ValueType::Number, "float8") => {
            Value::Number(c.pick(&[0.0, -0.0, 1.0, 1.5, 2.0, 3.0, 1e300]))
        }
        (ValueType::Number, _) => Value::Number(c.below(4) as f64),
        (ValueType::String, "uuid") => Value::string(c.pick(&UUIDS)),
        (ValueType::String, "upc") => Value::string(c.pick(&UPCS)),
        (ValueType::String, _) => Value::string(c.pick(&TEXTS)),
        (ValueType::Json, "int4[]") => Value::Json((c.pick(&["[]", "[1]", "[2,1]"])).into()),
        (ValueType::Json, _) => Value::Json((c.pick(&JSONS)).into()),
    }
}

/// Values of the key columns come from a domain that is a little larger than a table.
fn key_value(c: &mut Choices, column: &ColumnSpec, rows: usize) -> Value {
    let n = c.below(rows + 2);
    match column.value_type {
        ValueType::String => Value::string(format!("k{n}")),
        _ => Value::Number(n as f64),
    }
}

fn row(c: &mut Choices, table: &TableSpec, rows: usize, version: &StateVersion) -> RowRef {
    let values: Vec<Value> = table
        .columns
        .iter()
        .enumerate()
        .map(|(i, col)| if i < 2 { key_value(c, col, rows) } else { value(c, col) })
        .collect();
    Row::new(version.clone(), values)
}

/// Whether no other row has the new row's value of a unique key.
fn is_free(db: &Database, table: &TableSpec, row: &Row, but: Option<&Row>) -> bool {
    let but = but.map(|r| r.project(&table.replica_key));
    table.unique_keys.iter().all(|k| {
        let key = row.project(&k.columns);
        db.rows(table.id).all(|r| {
            but.as_ref() == Some(&r.project(&table.replica_key)) || r.project(&k.columns) != key
        })
    })
}

/// A random database.
pub fn database(
    c: &mut Choices,
    schema: &Schema,
    shape: &Shape,
    version: &StateVersion,
) -> Database {
    let mut db = Database::default();
    for table in schema.tables.values() {
        for _ in 0..c.below(shape.rows + 1) {
            let row = row(c, table, shape.rows, version);
            if is_free(&db, table, &row, None) {
                db.put(table, row);
            }
        }
    }
    db
}

/// Changes 1–8 rows of `db` and returns the net change, from `previous` to `version`.
pub fn commit(
    c: &mut Choices,
    schema: &Schema,
    shape: &Shape,
    db: &mut Database,
    previous: &StateVersion,
    version: &StateVersion,
) -> Commit {
    let before = db.clone();
    let tables: Vec<&Arc<TableSpec>> = schema.tables.values().collect();
    for _ in 0..1 + c.below(8) {
        let table = c.pick(&tables);
        change(c, table, shape, db, version);
    }
    net_change(schema, &before, db, previous, version)
}

fn change(
    c: &mut Choices,
    table: &TableSpec,
    shape: &Shape,
    db: &mut Database,
    version: &StateVersion,
) {
    let rows: Vec<RowRef> = db.rows(table.id).cloned().collect();
    if rows.is_empty() || c.chance(25) {
        let new = row(c, table, shape.rows, version);
        if rows.len() < shape.rows && is_free(db, table, &new, None) {
            db.put(table, new);
        }
        return;
    }
    let old = c.pick(&rows);
    match c.below(10) {
        0..=2 => {
            db.remove(table, &old);
        }
        // Deleted and inserted again under the same key.
        3 => {
            let mut values: Vec<Value> = row(c, table, shape.rows, version).values.to_vec();
            for &k in &table.replica_key {
                values[k] = old.values[k].clone();
            }
            let new = Row::new(version.clone(), values);
            if is_free(db, table, &new, Some(&old)) {
                db.remove(table, &old);
                db.put(table, new);
            }
        }
        // Two rows exchange the unique value.
        4 => {
            let other = c.pick(&rows);
            let swap = |r: &Row, u: &Value| {
                let mut values = r.values.to_vec();
                values[1] = u.clone();
                Row::new(version.clone(), values)
            };
            let (a, b) = (swap(&old, &other.values[1]), swap(&other, &old.values[1]));
            db.remove(table, &old);
            db.remove(table, &other);
            db.put(table, a);
            db.put(table, b);
        }
        // The row moves to another key, or changes in place.
        n => {
            let mut values = old.values.to_vec();
            let at = if n == 5 { c.below(2) } else { 2 + c.below(values.len() - 2) };
            values[at] = if at < 2 {
                key_value(c, &table.columns[at], shape.rows)
            } else {
                value(c, &table.columns[at])
            };
            let new = Row::new(version.clone(), values);
            if is_free(db, table, &new, Some(&old)) {
                db.remove(table, &old);
                db.put(table, new);
            }
        }
    }
}

/// The net change between two databases: rows whose version differs, by replica key.
pub fn net_change(
    schema: &Schema,
    before: &Database,
    after: &Database,
    previous: &StateVersion,
    version: &StateVersion,
) -> Commit {
    let mut tables = Vec::new();
    for table in schema.tables.values() {
        let mut rows = Vec::new();
        for old in before.rows(table.id) {
            let new = after.get(table.id, &old.project(&table.replica_key));
            if new.is_none_or(|n| n.version != old.version) {
                rows.push(RowChange { old: Some(old.clone()), new: new.cloned() });
            }
        }
        for new in after.rows(table.id) {
            if before.get(table.id, &new.project(&table.replica_key)).is_none() {
                rows.push(RowChange { old: None, new: Some(new.clone()) });
            }
        }
        if !rows.is_empty() {
            tables.push(TableChange { table: Arc::clone(table), rows, truncated: false });
        }
    }
    Commit {
        version: version.clone(),
        previous: previous.clone(),
        tables,
        schema: None,
        upstream_commit_ms: 0.0,
        permissions_changed: false,
    }
}

/// A random query over a schema.
pub fn ast(c: &mut Choices, schema: &Schema, shape: &Shape) -> Ast {
    let tables: Vec<&Arc<TableSpec>> = schema.tables.values().collect();
    let table = Arc::clone(c.pick(&tables));
    Queries { schema: tables, shape }.query(c, &table, shape.depth, true)
}

struct Queries<'a> {
    schema: Vec<&'a Arc<TableSpec>>,
    shape: &'a Shape,
}

impl Queries<'_> {
    /// `rows`: a root or related query, which has windows; otherwise an EXISTS body.
    fn query(&self, c: &mut Choices, table: &Arc<TableSpec>, depth: usize, rows: bool) -> Ast {
        let mut ast = Ast::table(&*table.name);
        if c.chance(75) {
            ast.condition = Some(self.condition(c, table, depth, 2));
        }
        if rows && c.chance(60) || c.chance(10) {
            ast.order_by = Some(
                (0..1 + c.below(2))
                    .map(|_| (ordered_column(c, table), c.pick(&[Direction::Asc, Direction::Desc])))
                    .collect(),
            );
        }
        if rows && c.chance(50) {
            ast.limit = Some(c.below(5) as f64);
        } else if c.chance(10) {
            ast.limit = Some(c.below(2) as f64);
        }
        if c.chance(20) {
            ast.start = Some(self.start(c, table, &ast));
        }
        if rows && self.shape.related && depth > 0 {
            let edges = c.below(3);
            if edges > 0 {
                ast.related =
                    Some((0..edges).filter_map(|i| self.related(c, table, depth - 1, i)).collect());
            }
        }
        ast
    }

    fn start(&self, c: &mut Choices, table: &TableSpec, ast: &Ast) -> Start {
        let mut row = Map::new();
        let ordered = ast.order_by.iter().flatten().map(|(n, _)| n.as_str());
        let names: Vec<String> = ordered.chain(["id"]).map(str::to_owned).collect();
        for name in names {
            let column = &table.columns[table.column(&name).unwrap_or(0)];
            if c.chance(80) {
                let v = if column.nullable {
                    value(c, column)
                } else {
                    key_value(c, column, self.shape.rows)
                };
                row.insert(name, json(&v));
            }
        }
        Start { row, exclusive: c.chance(50) }
    }

    fn related(
        &self,
        c: &mut Choices,
        table: &Arc<TableSpec>,
        depth: usize,
        number: usize,
    ) -> Option<CorrelatedSubquery> {
        let mut edge = self.edge(c, table, depth, true)?;
        edge.subquery.alias = Some(format!("r{number}"));
        edge.hidden = c.chance(20).then_some(true);
        Some(edge)
    }

    fn edge(
        &self,
        c: &mut Choices,
        table: &Arc<TableSpec>,
        depth: usize,
        rows: bool,
    ) -> Option<CorrelatedSubquery> {
        let child = c.pick(&self.schema);
        let mut correlation = Correlation { parent_field: vec![], child_field: vec![] };
        for _ in 0..if c.chance(85) { 1 } else { 2 } {
            let (p, ch) = join_columns(c, table, child);
            if !correlation.parent_field.contains(&p) && !correlation.child_field.contains(&ch) {
                correlation.parent_field.push(p);
                correlation.child_field.push(ch);
            }
        }
        if correlation.parent_field.is_empty() {
            return None;
        }
        let system = match c.below(10) {
            0 | 1 if self.shape.permissions => Some(System::Permissions),
            0..=4 => Some(System::Client),
            _ => None,
        };
        let mut subquery = Box::new(self.query(c, child, depth, rows));
        subquery.alias = Some("zsubq".into());
        Some(CorrelatedSubquery { correlation, hidden: None, subquery, system })
    }

    fn condition(
        &self,
        c: &mut Choices,
        table: &Arc<TableSpec>,
        depth: usize,
        nesting: usize,
    ) -> Condition {
        match c.below(10) {
            0..=3 if nesting > 0 => {
                let conditions = (0..if c.chance(10) { 0 } else { 1 + c.below(3) })
                    .map(|_| self.condition(c, table, depth, nesting - 1))
                    .collect();
                if c.chance(50) {
                    Condition::And { conditions }
                } else {
                    Condition::Or { conditions }
                }
            }
            0..=6 if depth > 0 => match self.edge(c, table, depth - 1, false) {
                None => simple(c, table),
                Some(related) => {
                    let not = self.shape.not_exists && c.chance(50);
                    Condition::CorrelatedSubquery(Exists {
                        related,
                        op: if not { ExistsOp::NotExists } else { ExistsOp::Exists },
                        flip: c.pick(&[None, Some(false), Some(true)]),
                        scalar: None,
                    })
                }
            },
            _ => simple(c, table),
        }
    }
}

fn ordered_column(c: &mut Choices, table: &TableSpec) -> String {
    let columns: Vec<&ColumnSpec> =
        table.columns.iter().filter(|c| c.value_type != ValueType::Json).collect();
    c.pick(&columns).name.to_string()
}

/// Two columns of one type, mostly the small numbers.
fn join_columns(c: &mut Choices, parent: &TableSpec, child: &TableSpec) -> (String, String) {
    let pairs: Vec<(String, String)> = parent
        .columns
        .iter()
        .flat_map(|p| child.columns.iter().map(move |ch| (p, ch)))
        .filter(|(p, ch)| p.value_type == ch.value_type && p.value_type != ValueType::Json)
        .map(|(p, ch)| (p.name.to_string(), ch.name.to_string()))
        .collect();
    c.pick(&pairs)
}

fn simple(c: &mut Choices, table: &TableSpec) -> Condition {
    let at = c.below(table.columns.len());
    let column = &table.columns[at];
    let of_column = |c: &mut Choices| {
        if at < 2 { key_value(c, column, 6) } else { value(c, column) }
    };
    let (op, right) = match column.value_type {
        ValueType::Json => (c.pick(&[Op::Is, Op::IsNot]), Literal::Null),
        _ => match c.below(12) {
            0..=6 => {
                let ops = [Op::Eq, Op::Ne, Op::Is, Op::IsNot, Op::Lt, Op::Gt, Op::Le, Op::Ge];
                (c.pick(&ops), literal(&of_column(c)))
            }
            7 => (c.pick(&[Op::Is, Op::IsNot, Op::Eq, Op::Ne]), Literal::Null),
            8 | 9 => {
                let list = (0..c.below(4)).map(|_| literal(&of_column(c)));
                let list = list.filter(|l| *l != Literal::Null).collect();
                (c.pick(&[Op::In, Op::NotIn]), Literal::Array(list))
            }
            // A value of another type: never equal.
            10 if column.value_type == ValueType::Number => {
                (c.pick(&[Op::Eq, Op::Ne, Op::IsNot, Op::Is]), Literal::String("1".into()))
            }
            _ if column.value_type == ValueType::String => (
                c.pick(&[Op::Like, Op::NotLike, Op::ILike, Op::NotILike]),
                Literal::String((c.pick(&PATTERNS)).into()),
            ),
            _ => (Op::Eq, literal(&of_column(c))),
        },
    };
    Condition::Simple(Simple {
        op,
        left: Operand::Column { name: column.name.to_string() },
        right: Operand::Literal { value: right },
    })
}

fn literal(v: &Value) -> Literal {
    match v {
        Value::Null | Value::Json(_) | Value::UnsafeInt(_) => Literal::Null,
        Value::Bool(b) => Literal::Bool(*b),
        Value::Number(n) => Literal::Number(*n),
        Value::String(s) => Literal::String(s.to_string()),
    }
}

fn json(v: &Value) -> Json {
    serde_json::to_value(literal(v)).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ivm::brute;
    use crate::ivm::memory_source::MemorySource;
    use crate::ivm::plan::Plan;
    use crate::ivm::source::{Fetch, Filter, Source};
    use crate::zql::compile::compile;
    use std::ops::ControlFlow;

    /// One world per seed: everything that a test needs.
    fn world(seed: u64) -> (Schema, Database, Ast) {
        let mut c = Choices::new(seed);
        let shape = Shape::default();
        let s = schema(&mut c, &shape);
        let db = database(&mut c, &s, &shape, &StateVersion::from_lsn(1));
        let a = ast(&mut c, &s, &shape);
        (s, db, a)
    }

    #[test]
    fn every_generated_query_compiles_and_survives_json() {
        for seed in 0..5_000 {
            let (s, _, a) = world(seed);
            let keys = identity_keys(&mut Choices::new(seed), &s);
            if let Err(e) = compile(&a, &s, &keys) {
                panic!("seed {seed}: {e}: {}", serde_json::to_string(&a).unwrap());
            }
            let text = serde_json::to_string(&a).unwrap();
            assert_eq!(serde_json::from_str::<Ast>(&text).unwrap(), a, "seed {seed}");
        }
    }

    #[test]
    fn the_generator_reaches_the_rare_cases() {
        let (mut nonempty, mut nested_not, mut windows, mut counted_twice) = (0, 0, 0, 0);
        for seed in 0..5_000 {
            let (s, db, a) = world(seed);
            let (plan, params) = compile(&a, &s, &IdentityKeys::default()).unwrap();
            let rows = brute::sync(&plan, &params, &db);
            nonempty += usize::from(!rows.is_empty());
            counted_twice += usize::from(rows.values().any(|(n, _)| *n > 1));
            windows += usize::from(plan.nodes.iter().skip(1).any(|n| n.limit.is_some()));
            nested_not += usize::from(plan.nodes.iter().any(|n| {
                n.below_not_exists
                    && matches!(n.role, crate::ivm::plan::Role::Exists { parent, .. }
                        if plan.node(parent).below_not_exists)
            }));
        }
        for (what, n) in [
            ("results", nonempty),
            ("nested NOT EXISTS", nested_not),
            ("related windows", windows),
            ("multiplicities", counted_twice),
        ] {
            assert!(n > 150, "{what}: {n}");
        }
    }

    #[test]
    fn a_commit_is_the_difference_of_two_databases() {
        for seed in 0..500 {
            let (s, mut db, _) = world(seed);
            let mut c = Choices::new(seed);
            for n in 2..6 {
                let (from, to) = (StateVersion::from_lsn(n - 1), StateVersion::from_lsn(n));
                let mut replayed = db.clone();
                let commit = commit(&mut c, &s, &Shape::default(), &mut db, &from, &to);
                replayed.apply(&commit);
                for t in s.tables.values() {
                    assert!(
                        replayed.rows(t.id).map(|r| &r.values).eq(db.rows(t.id).map(|r| &r.values))
                    );
                    for k in &t.unique_keys {
                        let mut keys: Vec<_> =
                            db.rows(t.id).map(|r| r.project(&k.columns)).collect();
                        keys.sort();
                        keys.dedup();
                        assert_eq!(keys.len(), db.rows(t.id).count(), "seed {seed}");
                    }
                }
            }
        }
    }

    #[test]
    fn a_whole_fetch_of_the_root_is_the_root_of_the_oracle() {
        for seed in 0..1_000 {
            let (s, db, a) = world(seed);
            let (plan, params) = compile(&a, &s, &IdentityKeys::default()).unwrap();
            let want = brute::rows(&plan, Plan::ROOT, &params, &db, None);
            let mut source = MemorySource::new(db, StateVersion::from_lsn(1));
            let mut got = Vec::new();
            let fetch = Fetch {
                plan: &plan,
                node: Plan::ROOT,
                params: &params,
                keys: None,
                filter: Filter::Whole,
                from: None,
                before: None,
                limit: plan.nodes[0].limit.map(|l| l as usize),
                ordered: true,
            };
            source
                .fetch(&fetch, &mut |r| {
                    got.push(r);
                    ControlFlow::Continue(())
                })
                .unwrap();
            assert!(
                want.iter().map(|r| &r.values).eq(got.iter().map(|r| &r.values)),
                "seed {seed}"
            );
        }
    }
}
