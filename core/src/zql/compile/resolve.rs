//! First pass: names to positions, types checked, constants folded.

use std::cmp::Ordering;
use std::collections::HashMap;
use std::sync::Arc;

use serde_json::Value as Json;

use super::{
    CompileError, IdentityKeys, MAX_CONDITION_DEPTH, MAX_CONDITIONS, MAX_DEPTH, MAX_LIST, MAX_NODES,
};
use crate::ivm::plan::{Direction, Op, Param};
use crate::schema::{Schema, TableSpec, ValueType};
use crate::value::Value;
use crate::zql::ast::{self, Anchor, Ast, CorrelatedSubquery, ExistsOp, Literal, Operand, System};
use crate::zql::like::LikePattern;
use crate::zql::{js, order};

/// A resolved query node.
pub(super) struct Draft {
    pub table: Arc<TableSpec>,
    pub condition: DraftCondition,
    pub order: Vec<(usize, Direction)>,
    pub start: Option<DraftStart>,
    pub limit: Option<u64>,
    pub related: Vec<DraftEdge>,
}

impl Draft {
    /// No row can ever qualify.
    fn is_empty(&self) -> bool {
        matches!(self.condition, DraftCondition::Const(false)) || self.limit == Some(0)
    }
}

pub(super) struct DraftStart {
    pub order: Vec<(usize, Direction)>,
    pub position: Vec<Value>,
    pub exclusive: bool,
}

pub(super) struct DraftEdge {
    pub parent_columns: Vec<usize>,
    pub child_columns: Vec<usize>,
    pub child: Draft,
}

pub(super) enum DraftCondition {
    Const(bool),
    And(Vec<DraftCondition>),
    Or(Vec<DraftCondition>),
    Simple { column: usize, op: Op, param: Param },
    Exists { negated: bool, permissions: bool, edge: Box<DraftEdge> },
}

/// How a node is reached: decides its order and what of it matters.
#[derive(Clone, Copy, PartialEq)]
enum Place {
    /// The root or a related child: windows in the query's order.
    Rows,
    /// An EXISTS body: evidence in key order. `silent`: its rows are never sent.
    Body { silent: bool },
}

pub(super) struct Resolver<'a> {
    schema: &'a Schema,
    keys: &'a IdentityKeys,
    /// Tables with the client schema's key, made once per query.
    tables: HashMap<Arc<str>, Arc<TableSpec>>,
    nodes: usize,
    conditions: usize,
}

impl<'a> Resolver<'a> {
    pub fn new(schema: &'a Schema, keys: &'a IdentityKeys) -> Self {
        Resolver { schema, keys, tables: HashMap::new(), nodes: 0, conditions: 0 }
    }

    pub fn root(mut self, ast: &Ast) -> Result<Draft, CompileError> {
        self.node(ast, Place::Rows, 0)
    }

    fn node(&mut self, ast: &Ast, place: Place, depth: usize) -> Result<Draft, CompileError> {
        self.nodes += 1;
        if depth > MAX_DEPTH {
            return Err(too_large("levels of nested queries", MAX_DEPTH));
        }
        if self.nodes > MAX_NODES {
            return Err(too_large("related queries and subqueries", MAX_NODES));
        }
        let table = self.table(&ast.table)?;
        let own_order = self.order(ast, &table)?;
        let start = self.start(ast, &table, &own_order)?;
        let condition = match &ast.condition {
            None => DraftCondition::Const(true),
            Some(c) => self.condition(c, &table, place, depth, 0)?,
        };
        let limit = limit(ast)?;
        let (order, limit) = match place {
            Place::Rows => (own_order, limit),
            Place::Body { .. } => {
                let mut by_key = Vec::new();
                order::complete(&mut by_key, &table.primary_key);
                // 0 stays, for the caller to fold; any other limit does not change the truth.
                (by_key, limit.filter(|l| *l == 0))
            }
        };
        let related = match place {
            Place::Body { silent: true } => Vec::new(),
            _ => self.related(ast, &table, depth)?,
        };
        Ok(Draft { table, condition, order, start, limit, related })
    }

    fn count_conditions(&mut self, n: usize) -> Result<(), CompileError> {
        self.conditions += n;
        if self.conditions > MAX_CONDITIONS {
            return Err(too_large("conditions and cursor columns", MAX_CONDITIONS));
        }
        Ok(())
    }

    fn table(&mut self, name: &str) -> Result<Arc<TableSpec>, CompileError> {
        if let Some(t) = self.tables.get(name) {
            return Ok(Arc::clone(t));
        }
        let plain =
            self.schema.table(name).ok_or_else(|| CompileError::table(self.schema, name))?;
        let table = match self.keys.0.get(name) {
            None => Arc::clone(plain),
            Some(key) => {
                let columns =
                    key.iter().map(|c| self.column(plain, c)).collect::<Result<Vec<usize>, _>>()?;
                if columns == plain.primary_key {
                    Arc::clone(plain)
                } else {
                    Arc::new(plain.with_key(&columns).ok_or_else(|| CompileError::BadKey {
                        table: name.to_owned(),
                        columns: key.join(", "),
                    })?)
                }
            }
        };
        self.tables.insert(Arc::clone(&table.name), Arc::clone(&table));
        Ok(table)
    }

    fn column(&self, table: &TableSpec, name: &str) -> Result<usize, CompileError> {
        table.column(name).ok_or_else(|| CompileError::column(self.schema, &table.name, name))
    }

    fn columns(&self, table: &TableSpec, names: &[String]) -> Result<Vec<usize>, CompileError> {
        names.iter().map(|n| self.column(table, n)).collect()
    }

    fn order(&self, ast: &Ast, table: &TableSpec) -> Result<Vec<(usize, Direction)>, CompileError> {
        let mut completed = Vec::new();
        for (name, direction) in ast.order_by.iter().flatten() {
            let column = self.column(table, name)?;
            if table.columns[column].value_type == ValueType::Json {
                return Err(type_error(table, column, "json values have no order"));
            }
            completed.push((
                column,
                match direction {
                    ast::Direction::Asc => Direction::Asc,
                    ast::Direction::Desc => Direction::Desc,
                },
            ));
        }
        order::complete(&mut completed, &table.primary_key);
        Ok(completed)
    }

    fn start(
        &mut self,
        ast: &Ast,
        table: &TableSpec,
        order: &[(usize, Direction)],
    ) -> Result<Option<DraftStart>, CompileError> {
        let Some(start) = &ast.start else { return Ok(None) };
        self.count_conditions(order.len())?;
        let position = order
            .iter()
            .map(|&(c, _)| {
                let column = &table.columns[c];
                let literal = match start.row.get(&*column.name) {
                    None | Some(Json::Null) => return Ok(Value::Null),
                    Some(v) => Literal::from_json(v).ok(),
                };
                literal.and_then(|l| value(&l, column.value_type)).ok_or_else(|| {
                    type_error(table, c, "the start cursor has a value of another type")
                })
            })
            .collect::<Result<_, _>>()?;
        Ok(Some(DraftStart { order: order.to_vec(), position, exclusive: start.exclusive }))
    }

    fn related(
        &mut self,
        ast: &Ast,
        table: &Arc<TableSpec>,
        depth: usize,
    ) -> Result<Vec<DraftEdge>, CompileError> {
        // The last definition of an alias wins, at the place of the first.
        let mut by_alias: Vec<(&str, &CorrelatedSubquery)> = Vec::new();
        for r in ast.related.iter().flatten() {
            let alias = r.subquery.alias.as_deref().ok_or_else(|| CompileError::MissingAlias {
                table: ast.table.clone(),
                child: r.subquery.table.clone(),
            })?;
            match by_alias.iter_mut().find(|(a, _)| *a == alias) {
                Some(slot) => slot.1 = r,
                None => by_alias.push((alias, r)),
            }
        }
        let mut edges = Vec::new();
        for (_, r) in by_alias {
            // Nothing of a permissions edge is sent, and a related edge filters nothing.
            if r.system == Some(System::Permissions) {
                continue;
            }
            let edge = self.edge(r, table, Place::Rows, depth)?;
            if !edge.child.is_empty() {
                edges.push(edge);
            }
        }
        Ok(edges)
    }

    fn edge(
        &mut self,
        r: &CorrelatedSubquery,
        parent: &Arc<TableSpec>,
        place: Place,
        depth: usize,
    ) -> Result<DraftEdge, CompileError> {
        let child = self.node(&r.subquery, place, depth + 1)?;
        let (p, c) = (&r.correlation.parent_field, &r.correlation.child_field);
        if p.is_empty() || p.len() != c.len() {
            return Err(CompileError::BadCorrelation {
                table: parent.name.to_string(),
                child: r.subquery.table.clone(),
            });
        }
        let parent_columns = self.columns(parent, p)?;
        let child_columns = self.columns(&child.table, c)?;
        for (&p, &c) in parent_columns.iter().zip(&child_columns) {
            let (pt, ct) = (parent.columns[p].value_type, child.table.columns[c].value_type);
            if pt != ct || pt == ValueType::Json {
                return Err(type_error(
                    parent,
                    p,
                    &format!(
                        "it cannot be joined with {ct} column \"{}\" of table \"{}\"",
                        child.table.columns[c].name, child.table.name
                    ),
                ));
            }
        }
        Ok(DraftEdge { parent_columns, child_columns, child })
    }

    fn condition(
        &mut self,
        c: &ast::Condition,
        table: &Arc<TableSpec>,
        place: Place,
        depth: usize,
        nesting: usize,
    ) -> Result<DraftCondition, CompileError> {
        if nesting > MAX_CONDITION_DEPTH {
            return Err(too_large("levels of nested conditions", MAX_CONDITION_DEPTH));
        }
        self.count_conditions(1)?;
        let mut each = |list: &[ast::Condition]| {
            list.iter()
                .map(|c| self.condition(c, table, place, depth, nesting + 1))
                .collect::<Result<Vec<_>, _>>()
        };
        match c {
            ast::Condition::And { conditions } => Ok(fold(each(conditions)?, true)),
            ast::Condition::Or { conditions } => Ok(fold(each(conditions)?, false)),
            ast::Condition::Simple(s) => self.simple(s, table),
            ast::Condition::CorrelatedSubquery(e) => self.exists(e, table, place, depth),
        }
    }

    fn exists(
        &mut self,
        e: &ast::Exists,
        table: &Arc<TableSpec>,
        place: Place,
        depth: usize,
    ) -> Result<DraftCondition, CompileError> {
        let negated = e.op == ExistsOp::NotExists;
        let permissions = e.related.system == Some(System::Permissions);
        let silent = negated || permissions || place == Place::Body { silent: true };
        let edge = self.edge(&e.related, table, Place::Body { silent }, depth)?;
        Ok(if edge.child.is_empty() {
            DraftCondition::Const(negated)
        } else {
            DraftCondition::Exists { negated, permissions, edge: Box::new(edge) }
        })
    }

    fn simple(
        &self,
        s: &ast::Simple,
        table: &Arc<TableSpec>,
    ) -> Result<DraftCondition, CompileError> {
        let right = match &s.right {
            Operand::Literal { value } => value,
            Operand::Static { anchor, field } => return Err(unbound(table, *anchor, field)),
            Operand::Column { name } => {
                return Err(CompileError::Type {
                    table: table.name.to_string(),
                    cause: format!(
                        "column \"{name}\" cannot stand on the right of {}",
                        s.op.text()
                    ),
                });
            }
        };
        match &s.left {
            Operand::Static { anchor, field } => Err(unbound(table, *anchor, field)),
            Operand::Literal { value } => constant(s.op, value, right)
                .map(DraftCondition::Const)
                .map_err(|cause| CompileError::Type { table: table.name.to_string(), cause }),
            Operand::Column { name } => {
                let column = self.column(table, name)?;
                comparison(table, column, s.op, right)
            }
        }
    }
}

/// Flattens nested operands of the same kind, drops neutral constants, and lets a deciding
/// constant decide. `and`: TRUE is neutral; otherwise FALSE is.
fn fold(operands: Vec<DraftCondition>, and: bool) -> DraftCondition {
    let mut kept = Vec::with_capacity(operands.len());
    for c in operands {
        match c {
            DraftCondition::Const(b) if b == and => {}
            DraftCondition::Const(b) => return DraftCondition::Const(b),
            DraftCondition::And(inner) if and => kept.extend(inner),
            DraftCondition::Or(inner) if !and => kept.extend(inner),
            other => kept.push(other),
        }
    }
    match (kept.len(), and) {
        (0, _) => DraftCondition::Const(and),
        (1, _) => kept.swap_remove(0),
        (_, true) => DraftCondition::And(kept),
        (_, false) => DraftCondition::Or(kept),
    }
}

/// `column op right`.
fn comparison(
    table: &TableSpec,
    column: usize,
    op: ast::Op,
    right: &Literal,
) -> Result<DraftCondition, CompileError> {
    use ast::Op as A;
    let simple = |op, param| Ok(DraftCondition::Simple { column, op, param });
    let null = || Param::Value(Value::Null);
    let t = table.columns[column].value_type;
    if *right == Literal::Null {
        return match op {
            A::Is => simple(Op::IsNull, null()),
            A::IsNot => simple(Op::IsNotNull, null()),
            _ => Ok(DraftCondition::Const(false)),
        };
    }
    if t == ValueType::Json {
        return Err(type_error(table, column, "json columns can only be compared with null"));
    }
    let compared = match op {
        A::Like | A::NotLike | A::ILike | A::NotILike => {
            return like(table, column, op, right);
        }
        A::In | A::NotIn => {
            let list = list(table, column, op, right)?;
            return match (op, list.is_empty()) {
                (A::In, true) => Ok(DraftCondition::Const(false)),
                (A::In, false) => simple(Op::In, Param::List(list)),
                (_, true) => simple(Op::IsNotNull, null()),
                (_, false) => simple(Op::NotIn, Param::List(list)),
            };
        }
        A::Eq | A::Is => Op::Eq,
        A::Ne => Op::Ne,
        A::IsNot => Op::IsNot,
        A::Lt => Op::Lt,
        A::Gt => Op::Gt,
        A::Le => Op::Le,
        A::Ge => Op::Ge,
    };
    match (value(right, t), compared) {
        (Some(v), op) => simple(op, Param::Value(v)),
        // A value of another type is never equal.
        (None, Op::Eq) => Ok(DraftCondition::Const(false)),
        (None, Op::IsNot) => Ok(DraftCondition::Const(true)),
        (None, Op::Ne) => simple(Op::IsNotNull, null()),
        (None, _) => Err(type_error(
            table,
            column,
            &format!("{} compares it with a value of another type", op.text()),
        )),
    }
}

fn like(
    table: &TableSpec,
    column: usize,
    op: ast::Op,
    right: &Literal,
) -> Result<DraftCondition, CompileError> {
    let pattern = match right {
        Literal::String(s) => s.clone(),
        Literal::Number(_) | Literal::Bool(_) => literal_text(right),
        Literal::Null | Literal::Array(_) => {
            return Err(type_error(table, column, "a LIKE pattern must be a string"));
        }
    };
    if table.columns[column].value_type != ValueType::String {
        return Err(type_error(table, column, &format!("{} works on strings only", op.text())));
    }
    let ignore_case = matches!(op, ast::Op::ILike | ast::Op::NotILike);
    let compiled = LikePattern::new(pattern.clone(), ignore_case).map_err(|cause| {
        CompileError::BadPattern {
            table: table.name.to_string(),
            column: table.columns[column].name.to_string(),
            pattern,
            cause,
        }
    })?;
    let op = match op {
        ast::Op::Like | ast::Op::ILike => Op::Like,
        _ => Op::NotLike,
    };
    Ok(DraftCondition::Simple { column, op, param: Param::Like(Arc::new(compiled)) })
}

/// The members of an IN list that a column of this type can equal, sorted, without duplicates.
fn list(
    table: &TableSpec,
    column: usize,
    op: ast::Op,
    right: &Literal,
) -> Result<Arc<[Value]>, CompileError> {
    let Literal::Array(items) = right else {
        return Err(type_error(
            table,
            column,
            &format!("Expected rhs to be an array for {} operator", op.text()),
        ));
    };
    if items.len() > MAX_LIST {
        return Err(too_large("elements in an IN list", MAX_LIST));
    }
    let t = table.columns[column].value_type;
    let mut values: Vec<Value> = items.iter().filter_map(|i| value(i, t)).collect();
    values.sort();
    values.dedup();
    Ok(values.into())
}

/// A scalar literal as a value of a column's type; `None` if it is of another type.
fn value(literal: &Literal, t: ValueType) -> Option<Value> {
    match (literal, t) {
        (Literal::Bool(b), ValueType::Boolean) => Some(Value::Bool(*b)),
        (Literal::Number(n), ValueType::Number) => Some(Value::Number(*n)),
        (Literal::String(s), ValueType::String) => Some(Value::string(s)),
        _ => None,
    }
}

fn literal_text(l: &Literal) -> String {
    js::to_string(&serde_json::to_value(l).unwrap_or_default())
}

/// `left op right` of two literals, as the client's predicate answers it.
fn constant(op: ast::Op, left: &Literal, right: &Literal) -> Result<bool, String> {
    use ast::Op as A;
    let null = *left == Literal::Null || *right == Literal::Null;
    // Arrays are compared by identity: never equal.
    let equal = !matches!(left, Literal::Array(_)) && left == right;
    match op {
        A::Is => return Ok(equal),
        A::IsNot => return Ok(!equal),
        _ if null => return Ok(false),
        A::Eq => return Ok(equal),
        A::Ne => return Ok(!equal),
        A::In | A::NotIn => {
            let Literal::Array(items) = right else {
                return Err(format!("Expected rhs to be an array for {} operator", op.text()));
            };
            let member = !matches!(left, Literal::Array(_)) && items.contains(left);
            return Ok(member == (op == A::In));
        }
        A::Like | A::NotLike | A::ILike | A::NotILike => {
            let Literal::String(text) = left else {
                return Err(format!("{} works on strings only", op.text()));
            };
            let ignore_case = matches!(op, A::ILike | A::NotILike);
            let pattern = LikePattern::new(literal_text(right), ignore_case)
                .map_err(|e| format!("{e}: {:?}", literal_text(right)))?;
            return Ok(pattern.matches(text) == matches!(op, A::Like | A::ILike));
        }
        A::Lt | A::Gt | A::Le | A::Ge => {}
    }
    let order: Ordering = match (left, right) {
        (Literal::Bool(a), Literal::Bool(b)) => a.cmp(b),
        (Literal::Number(a), Literal::Number(b)) => Value::Number(*a).compare(&Value::Number(*b)),
        (Literal::String(a), Literal::String(b)) => a.as_bytes().cmp(b.as_bytes()),
        _ => return Err(format!("{} compares two literals of different types", op.text())),
    };
    Ok(match op {
        A::Lt => order.is_lt(),
        A::Gt => order.is_gt(),
        A::Le => order.is_le(),
        _ => order.is_ge(),
    })
}

fn limit(ast: &Ast) -> Result<Option<u64>, CompileError> {
    match ast.limit {
        None => Ok(None),
        Some(l) if l >= 0.0 && l.fract() == 0.0 => {
            // Beyond 2^53 nothing is cut off.
            Ok((l <= Value::MAX_SAFE_INTEGER as f64).then_some(l as u64))
        }
        Some(l) => Err(CompileError::BadLimit { table: ast.table.clone(), limit: l.to_string() }),
    }
}

fn unbound(table: &TableSpec, anchor: Anchor, field: &ast::FieldPath) -> CompileError {
    let anchor = match anchor {
        Anchor::AuthData => "authData",
        Anchor::PreMutationRow => "preMutationRow",
    };
    CompileError::UnboundParameter {
        table: table.name.to_string(),
        parameter: format!("{anchor}.{}", field.steps().join(".")),
    }
}

fn type_error(table: &TableSpec, column: usize, cause: &str) -> CompileError {
    let c = &table.columns[column];
    CompileError::Type {
        table: table.name.to_string(),
        cause: format!("{} column \"{}\": {cause}", c.value_type, c.name),
    }
}

fn too_large(what: &'static str, bound: usize) -> CompileError {
    CompileError::TooLarge { what, bound }
}
