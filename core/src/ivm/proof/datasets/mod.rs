//! Small data sets shaped like applications, each with queries as an application asks them: a
//! music shop, a film rental, a school with access rules, a corpus of awkward texts. Tables are
//! described by one line each, rows and changes are a function of a seed.

mod film_rental;
mod music_shop;
mod query;
mod school;
mod texts;

use std::sync::Arc;

use serde_json::Value as Json;

use super::script::{Edit, Operation, Script};
use crate::ivm::engine::{EngineConfig, Overshoot};
use crate::row::Key;
use crate::schema::{ColumnSpec, Schema, TableId, TableSpec, UniqueKey, ValueType};
use crate::value::Value;
use crate::version::StateVersion;
use crate::zql::ast::Ast;
use crate::zql::compile::{IdentityKeys, compile};
use crate::zql::gen_world::Choices;

/// Tables, rows and queries of an application.
#[derive(Debug)]
pub struct DataSet {
    /// What it is.
    pub name: &'static str,
    /// Its tables.
    pub schema: Arc<Schema>,
    /// Its queries, by what they ask.
    pub queries: Vec<(&'static str, Ast)>,
    tables: Vec<Table>,
    texts: &'static [&'static str],
}

/// A table and how its rows are made.
#[derive(Debug)]
struct Table {
    spec: Arc<TableSpec>,
    rows: usize,
    columns: Vec<Column>,
}

/// Where the values of a column come from.
#[derive(Debug, Clone, PartialEq)]
enum Column {
    /// The number of the row.
    Number,
    /// The number of a row of a table; now and then of none.
    Reference(String),
    Int,
    Real,
    Bool,
    Text,
}

/// All data sets.
///
/// # Errors
/// A data set that contradicts itself.
pub fn all() -> Result<Vec<DataSet>, String> {
    Ok(vec![
        music_shop::data_set()?,
        film_rental::data_set()?,
        school::data_set()?,
        texts::data_set()?,
    ])
}

/// Words with which names collide, differ in case only, and contain wildcards.
const WORDS: &[&str] = &["amber", "Amber", "birch", "cedar 10%", "d_l", "elm", ""];

impl DataSet {
    /// `tables`: one line per table, `name rows: column …`. A column is `*id` (the key: the row's
    /// number), `name>table` (a reference) or `name:int|real|bool|text`; `*` in front makes it
    /// part of the key, `?` at the end nullable.
    fn new(
        name: &'static str,
        tables: &str,
        queries: Vec<(&'static str, Json)>,
    ) -> Result<DataSet, String> {
        let lines = tables.lines().map(str::trim).filter(|l| !l.is_empty());
        let tables: Vec<Table> =
            lines.enumerate().map(|(i, l)| parse(i as u32, l)).collect::<Result<_, _>>()?;
        let mut schema = Schema::default();
        for t in &tables {
            schema.tables.insert(t.spec.name.clone(), t.spec.clone());
        }
        let ast = |(what, json): (&'static str, Json)| {
            serde_json::from_value(json).map(|ast| (what, ast)).map_err(|e| format!("{what}: {e}"))
        };
        let queries = queries.into_iter().map(ast).collect::<Result<_, _>>()?;
        Ok(DataSet { name, schema: Arc::new(schema), queries, tables, texts: WORDS })
    }

    /// The rows at the start.
    pub fn rows(&self, c: &mut Choices) -> Vec<(TableId, Box<[Value]>)> {
        let mut out: Vec<(TableId, Box<[Value]>)> = Vec::new();
        for t in &self.tables {
            let mut keys: Vec<Key> = Vec::new();
            for i in 0..t.rows {
                let row = self.row(c, t, i);
                let key: Key = t.spec.replica_key.iter().map(|&k| row[k].clone()).collect();
                if !keys.contains(&key) {
                    keys.push(key);
                    out.push((t.spec.id, row));
                }
            }
        }
        out
    }

    fn row(&self, c: &mut Choices, t: &Table, number: usize) -> Box<[Value]> {
        (0..t.columns.len()).map(|i| self.value(c, t, i, number)).collect()
    }

    fn value(&self, c: &mut Choices, t: &Table, column: usize, number: usize) -> Value {
        if t.spec.columns[column].nullable && c.chance(20) {
            return Value::Null;
        }
        match &t.columns[column] {
            Column::Number => Value::Number(number as f64),
            Column::Reference(to) => {
                let rows = self.tables.iter().find(|t| *t.spec.name == **to).map_or(0, |t| t.rows);
                Value::Number(c.below(rows + 1) as f64)
            }
            Column::Int => Value::Number(c.below(6) as f64),
            Column::Real => Value::Number(c.below(8) as f64 / 2.0),
            Column::Bool => Value::Bool(c.chance(50)),
            Column::Text if t.rows >= self.texts.len() && number < self.texts.len() => {
                Value::string(self.texts[number])
            }
            Column::Text => Value::string(c.pick(self.texts)),
        }
    }

    /// A transaction of one to six changes of `rows`, which move on.
    pub fn edits(&self, c: &mut Choices, rows: &mut Vec<(TableId, Box<[Value]>)>) -> Vec<Edit> {
        let mut out = Vec::new();
        for _ in 0..1 + c.below(6) {
            let table = &self.tables[c.below(self.tables.len())];
            let id = table.spec.id;
            let key = |row: &[Value]| -> Key {
                table.spec.replica_key.iter().map(|&k| row[k].clone()).collect()
            };
            let of_table: Vec<usize> =
                rows.iter().enumerate().filter(|(_, r)| r.0 == id).map(|(i, _)| i).collect();
            if of_table.is_empty() || c.chance(25) {
                let number = c.below(table.rows + 2);
                let new = self.row(c, table, number);
                rows.retain(|r| r.0 != id || key(&r.1) != key(&new));
                out.push(Edit::Put(id, new.clone()));
                rows.push((id, new));
                continue;
            }
            let at = c.pick(&of_table);
            if c.chance(30) {
                let (_, gone) = rows.swap_remove(at);
                out.push(Edit::Remove(id, key(&gone)));
                continue;
            }
            let column = c.below(table.columns.len());
            let old = rows.swap_remove(at).1;
            let mut new = old.clone();
            new[column] = self.value(c, table, column, c.clone().below(table.rows + 2));
            if key(&new) != key(&old) {
                out.push(Edit::Remove(id, key(&old)));
                rows.retain(|r| r.0 != id || key(&r.1) != key(&new));
            }
            out.push(Edit::Put(id, new.clone()));
            rows.push((id, new));
        }
        out
    }

    /// All queries hydrated, then `commits` transactions, now and then two in one advance.
    ///
    /// # Errors
    /// A query does not compile.
    pub fn script(&self, seed: u64, commits: usize) -> Result<Script, String> {
        let mut c = Choices::new(seed);
        let rows = self.rows(&mut c);
        let mut queries = Vec::new();
        let mut operations = Vec::new();
        for (i, (what, ast)) in self.queries.iter().enumerate() {
            let compiled = compile(ast, &self.schema, &IdentityKeys::default());
            let (plan, params) = compiled.map_err(|e| format!("{what}: {e}"))?;
            queries.push((Arc::new(plan), params.into()));
            operations.extend([Operation::Subscribe(i), Operation::Hydrate(i, None)]);
        }
        let mut current = rows.clone();
        for _ in 0..commits {
            operations.push(Operation::Commit(self.edits(&mut c, &mut current)));
            if c.chance(75) {
                operations.extend([Operation::Advance, Operation::Step(None)]);
            }
        }
        let config =
            EngineConfig { overshoot: Overshoot::Fixed(seed % 3), ..EngineConfig::default() };
        Ok(Script { config, schema: Arc::clone(&self.schema), rows, queries, operations })
    }
}

fn parse(number: u32, line: &str) -> Result<Table, String> {
    let wrong = || format!("not a table: {line}");
    let (head, columns) = line.split_once(':').ok_or_else(wrong)?;
    let (name, rows) = head.split_once(' ').ok_or_else(wrong)?;
    let mut spec = TableSpec {
        id: TableId(number),
        name: name.into(),
        columns: Vec::new(),
        primary_key: Vec::new(),
        replica_key: Vec::new(),
        unique_keys: Vec::new(),
        min_row_version: StateVersion::zero(),
        indexes: Vec::new(),
    };
    let mut kinds = Vec::new();
    for (at, word) in columns.split_whitespace().enumerate() {
        let (word, is_key) = word.strip_prefix('*').map_or((word, false), |w| (w, true));
        let (word, nullable) = word.strip_suffix('?').map_or((word, false), |w| (w, true));
        let (column, kind, value_type, upstream) = match word.split_once([':', '>']) {
            None => (word, Column::Number, ValueType::Number, "int4"),
            Some((c, "int")) => (c, Column::Int, ValueType::Number, "int8"),
            Some((c, "real")) => (c, Column::Real, ValueType::Number, "float8"),
            Some((c, "bool")) => (c, Column::Bool, ValueType::Boolean, "bool"),
            Some((c, "text")) => (c, Column::Text, ValueType::String, "text"),
            Some((c, table)) => (c, Column::Reference(table.into()), ValueType::Number, "int4"),
        };
        if is_key {
            spec.replica_key.push(at);
        }
        if is_key || matches!(kind, Column::Reference(_)) {
            spec.indexes.push(vec![at]);
        }
        spec.columns.push(ColumnSpec {
            name: column.into(),
            value_type,
            nullable,
            upstream_type: upstream.into(),
        });
        kinds.push(kind);
    }
    spec.primary_key = spec.replica_key.clone();
    spec.unique_keys = vec![UniqueKey { columns: spec.replica_key.clone(), not_null: true }];
    let rows = rows.parse().map_err(|_| wrong())?;
    Ok(Table { spec: Arc::new(spec), rows, columns: kinds })
}
