//! A [`Fetch`] as one SQLite statement: the whole `where` with its nested EXISTS, cursor, keys,
//! bounds, order and limit. Literals are always bound, never part of the text, so equal shapes
//! share a prepared statement.
//!
//! The statement must answer exactly what `core::zql::predicate` and `order` answer. What would
//! come between them:
//! - LIKE is a function that calls the very matcher of the predicate ([`register`]);
//! - a string column whose declared type has numeric affinity may hold numbers (`upc`, an enum
//!   named `point`): it is read through `zr_text` (see `column`);
//! - JSON `null` is null;
//! - lists are bound as arrays of values, not as JSON text, so that no number is re-parsed.
//!
//! Everything else follows from plans being well typed (`core::zql::compile`).

use std::fmt::{Display, Write as _};

use rusqlite::Connection;
use rusqlite::functions::{Context, FunctionFlags};
use rusqlite::types::ValueRef;
use zeroring_core::ivm::plan::{
    Condition, Direction, ExistsEdge, Node, NodeId, Op, Param, ParamId, Params, Plan, Simple, Start,
};
use zeroring_core::ivm::source::{Fetch, Filter, SourceError};
use zeroring_core::row::Key;
use zeroring_core::schema::{TableSpec, ValueType};
use zeroring_core::value::Value;
use zeroring_core::zql::like::LikePattern;

use super::column::{Column, Expression, Ident};
use super::estimate::ExistsSide;
use super::mutant::{self, Mutant};
use super::parts::RowNumbers;
use super::schema::VERSION_COLUMN;
use super::types::number_text;

/// Most keys of several columns in one statement; more are read in several (SQLite takes 32,766
/// parameters). Keys of one column are bound as one array, any number of them.
pub const MAX_COMPOUND_KEYS: usize = 4_000;

/// A parameter of a [`Statement`], in the order of its text.
#[derive(Debug, Clone, Copy)]
pub enum Bind<'a> {
    /// A value.
    Value(&'a Value),
    /// Text.
    Text(&'a str),
    /// An integer.
    Integer(i64),
    /// The list of an IN.
    List(&'a [Value]),
    /// The keys of one column.
    Keys(&'a [Key]),
}

/// What a statement returns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Select {
    /// `_0_version` and all visible columns, for a `RowDecoder`.
    Rows,
    /// A row if there is any.
    Exists,
}

/// SQL text and its parameters.
#[derive(Debug)]
pub struct Statement<'a> {
    /// The text.
    pub text: String,
    /// The parameters.
    pub binds: Vec<Bind<'a>>,
    /// Texts made for this statement (prefix bounds of LIKE), by position in `binds`.
    pub owned: Vec<(usize, String)>,
}

/// Adds the functions and the table of arrays that statements use.
///
/// # Errors
/// SQLite refuses.
pub fn register(connection: &Connection) -> rusqlite::Result<()> {
    rusqlite::vtab::array::load_module(connection)?;
    let flags = FunctionFlags::SQLITE_UTF8
        | FunctionFlags::SQLITE_DETERMINISTIC
        | FunctionFlags::SQLITE_INNOCUOUS;
    connection.create_scalar_function("zr_like", 2, flags, |c| like(c, false))?;
    connection.create_scalar_function("zr_ilike", 2, flags, |c| like(c, true))?;
    connection.create_scalar_function("zr_text", 1, flags, |c| {
        Ok(match c.get_raw(0) {
            ValueRef::Integer(n) => rusqlite::types::Value::Text(n.to_string()),
            ValueRef::Real(n) => rusqlite::types::Value::Text(number_text(n)),
            other => other.try_into()?,
        })
    })
}

/// `zr_like(pattern, text)`: null for a null text; the pattern is compiled once per statement run.
fn like(c: &Context<'_>, ignore_case: bool) -> rusqlite::Result<Option<bool>> {
    let pattern = c.get_or_create_aux(
        0,
        |v| -> Result<LikePattern, Box<dyn std::error::Error + Send + Sync>> {
            Ok(LikePattern::new(v.as_str()?, ignore_case)?)
        },
    )?;
    Ok(match c.get_raw(1) {
        ValueRef::Null => None,
        ValueRef::Integer(n) => Some(pattern.matches(&n.to_string())),
        ValueRef::Real(n) => Some(pattern.matches(&number_text(n))),
        text => Some(pattern.matches(text.as_str()?)),
    })
}

/// The bodies of the EXISTS in a statement for a node, in the order of their aliases: `t1` first.
pub(super) fn bodies(plan: &Plan, node: NodeId, filter: Filter) -> Vec<NodeId> {
    fn collect(plan: &Plan, condition: &Condition, out: &mut Vec<NodeId>) {
        match condition {
            Condition::And(all) | Condition::Or(all) => {
                all.iter().for_each(|c| collect(plan, c, out));
            }
            Condition::Exists(e) => {
                out.push(e.child);
                collect(plan, &plan.node(e.child).condition, out);
            }
            Condition::Const(_) | Condition::Simple(_) => {}
        }
    }
    let mut out = Vec::new();
    if filter == Filter::Whole {
        collect(plan, &plan.node(node).condition, &mut out);
    }
    out
}

/// Whether a fetch has an EXISTS in its statement.
pub(super) fn has_bodies(fetch: &Fetch<'_>) -> bool {
    fn any(condition: &Condition) -> bool {
        match condition {
            Condition::And(all) | Condition::Or(all) => all.iter().any(any),
            Condition::Exists(_) => true,
            Condition::Const(_) | Condition::Simple(_) => false,
        }
    }
    fetch.filter == Filter::Whole && any(&fetch.plan.node(fetch.node).condition)
}

/// Compiles a fetch. `keys` replaces the fetch's own keys (a part of them); `side` decides with
/// which side of an EXISTS to begin where both are possible.
///
/// # Errors
/// [`SourceError::Store`] if a plan and its parameters do not fit together.
pub fn compile<'a>(
    fetch: &Fetch<'a>,
    keys: Option<&'a [Key]>,
    select: Select,
    side: ExistsSide<'a>,
) -> Result<Statement<'a>, SourceError> {
    compile_range(fetch, keys, None, select, side)
}

/// The same, of a range of row numbers only.
///
/// # Errors
/// As [`compile`].
pub fn compile_range<'a>(
    fetch: &Fetch<'a>,
    keys: Option<&'a [Key]>,
    range: Option<RowNumbers<'_>>,
    select: Select,
    side: ExistsSide<'a>,
) -> Result<Statement<'a>, SourceError> {
    let mut b = Builder {
        plan: fetch.plan,
        params: fetch.params,
        side,
        limit: fetch.limit,
        // What is read key by key, or on from a position, is run often with other values.
        peek: fetch.keys.is_none()
            && fetch.from.is_none()
            && fetch.before.is_none()
            && !asks_one_value(fetch),
        // Keys lead to few rows: nothing is gained by finding them from the other end.
        conjunct: fetch.keys.is_none() || matches!(side, ExistsSide::Child),
        statement: Statement { text: String::with_capacity(512), binds: vec![], owned: vec![] },
        aliases: 1,
    };
    b.statement(fetch, keys, range, select)?;
    Ok(b.statement)
}

/// Rows with a certain value in a column, all of them, in any order: there is nothing to choose
/// but that column's index, whatever the value. Every client of an application asks this of its
/// own rows.
fn asks_one_value(fetch: &Fetch<'_>) -> bool {
    let condition = match &fetch.plan.node(fetch.node).condition {
        Condition::And(all) if all.len() == 1 => &all[0],
        other => other,
    };
    let equal = matches!(condition, Condition::Simple(s) if matches!(s.op, Op::Eq | Op::Is));
    equal && fetch.limit.is_none() && !fetch.ordered
}

struct Builder<'a> {
    plan: &'a Plan,
    params: &'a Params,
    side: ExistsSide<'a>,
    /// Of the node being compiled.
    limit: Option<usize>,
    /// Whether SQLite may look at values that are compared to choose a plan (by its samples of
    /// skewed columns). It then prepares the statement anew for each run with other values, so
    /// this is for statements that read much. An operand `+?` has no value to it.
    peek: bool,
    /// What is being compiled is a conjunct of rows that are searched, not of a test of one row.
    conjunct: bool,
    statement: Statement<'a>,
    /// Table aliases given out; the outermost is `t0`.
    aliases: usize,
}

/// Which side of a position.
#[derive(Clone, Copy, PartialEq)]
enum Side {
    AtOrAfter,
    After,
    Before,
}

impl<'a> Builder<'a> {
    fn push(&mut self, text: &str) {
        self.statement.text.push_str(text);
    }

    fn put(&mut self, part: impl Display) {
        let _ = write!(self.statement.text, "{part}");
    }

    fn bind(&mut self, bind: Bind<'a>) {
        self.push("?");
        self.statement.binds.push(bind);
    }

    /// The operand of a comparison.
    fn operand(&mut self, value: &'a Value) {
        if !self.peek {
            self.push("+");
        }
        self.bind(Bind::Value(value));
    }

    /// The same, of a text that is made here.
    fn operand_owned(&mut self, text: String) {
        self.statement.owned.push((self.statement.binds.len(), text));
        self.push(if self.peek { "?" } else { "+?" });
        self.statement.binds.push(Bind::Integer(0));
    }

    fn statement(
        &mut self,
        fetch: &Fetch<'a>,
        keys: Option<&'a [Key]>,
        range: Option<RowNumbers<'_>>,
        select: Select,
    ) -> Result<(), SourceError> {
        let node = self.plan.node(fetch.node);
        let table = &*node.table;
        match select {
            Select::Exists => self.push("SELECT 1"),
            Select::Rows => {
                self.push("SELECT t0.");
                self.put(Ident(VERSION_COLUMN));
                for column in &table.columns {
                    self.push(",t0.");
                    self.put(Ident(&column.name));
                }
            }
        }
        self.push(" FROM ");
        self.put(Ident(&table.name));
        self.push(" AS t0 WHERE 1");
        if let Some(k) = &fetch.keys {
            self.push(" AND ");
            self.keys(table, k.columns, keys.unwrap_or(k.keys));
        }
        if let Some(range) = range {
            for (operator, number) in [(">=", range.from), ("<", range.to)] {
                self.put(format_args!(" AND t0.{}{operator}+", range.name));
                self.bind(Bind::Integer(number));
            }
        }
        self.node_filter(node, 0, fetch.filter)?;
        if let Some(bound) = &fetch.from {
            self.push(" AND ");
            let side = if bound.inclusive { Side::AtOrAfter } else { Side::After };
            self.position(table, 0, &node.order, bound.position, side);
        }
        if let Some(position) = fetch.before {
            self.push(" AND ");
            self.position(table, 0, &node.order, position, Side::Before);
        }
        match select {
            Select::Exists => self.push(" LIMIT 1"),
            Select::Rows => {
                if fetch.ordered || fetch.limit.is_some() {
                    self.order_by(table, &node.order);
                }
                if let Some(limit) = fetch.limit {
                    let limit = i64::try_from(limit).unwrap_or(i64::MAX);
                    // SQLite looks at a limit, too, and it is always the same for a partition
                    // that was not read before; when it is refilled it is not.
                    match (self.peek, fetch.from) {
                        (false, None) => self.put(format_args!(" LIMIT {limit}")),
                        (peek, _) => {
                            self.push(if peek { " LIMIT " } else { " LIMIT +" });
                            self.bind(Bind::Integer(limit));
                        }
                    }
                }
            }
        }
        Ok(())
    }

    /// ` AND condition AND start`, as far as the filter asks for.
    fn node_filter(
        &mut self,
        node: &'a Node,
        alias: usize,
        filter: Filter,
    ) -> Result<(), SourceError> {
        if filter == Filter::Any {
            return Ok(());
        }
        let skips_start = alias > 0 && mutant::is(Mutant::ChildrenWithoutStart);
        if let Some(start) = node.start.as_ref().filter(|_| !skips_start) {
            self.push(" AND ");
            self.start(&node.table, alias, start)?;
        }
        if node.condition != Condition::Const(true) {
            self.push(" AND ");
            self.condition(node, &node.condition, alias, filter)?;
        }
        Ok(())
    }

    fn keys(&mut self, table: &'a TableSpec, columns: &[usize], keys: &'a [Key]) {
        let column = |column: usize| Column { alias: 0, table, column };
        match (columns, keys) {
            (_, []) => self.push("0"),
            (columns, [key]) => {
                for (i, (&c, v)) in columns.iter().zip(key).enumerate() {
                    self.push(if i > 0 { " AND " } else { "(" });
                    self.equal(column(c), v);
                }
                self.push(")");
            }
            ([one], keys) => self.member(column(*one), Bind::Keys(keys)),
            (columns, keys) => {
                for (i, &c) in columns.iter().enumerate() {
                    self.push(if i > 0 { "," } else { "(" });
                    self.put(column(c).read());
                }
                self.push(") IN (VALUES ");
                // Padded with the last key, so that few texts are ever prepared.
                let padded = keys.len().next_power_of_two();
                let last = keys.last().into_iter().cycle();
                for (i, key) in keys.iter().chain(last).take(padded).enumerate() {
                    self.push(if i > 0 { ",(" } else { "(" });
                    for (j, v) in key.iter().enumerate() {
                        if j > 0 {
                            self.push(",");
                        }
                        self.bind(Bind::Value(v));
                    }
                    self.push(")");
                }
                self.push(")");
            }
        }
    }

    /// `column = value`, in a form that an index serves.
    fn equal(&mut self, c: Column<'_>, value: &'a Value) {
        if value.is_null() {
            self.put(c.stored());
            return self.push(" IS NULL");
        }
        self.push("(");
        self.put(c.stored());
        self.push("=");
        self.operand(value);
        if !c.is_kept() {
            self.push(" AND ");
            self.put(c.read());
            self.push("=");
            self.operand(value);
        }
        self.push(")");
    }

    /// `column IN list`, in a form that an index serves.
    fn member(&mut self, c: Column<'_>, list: Bind<'a>) {
        let one = |b: &mut Self, column: Expression<'_>| {
            b.put(column);
            b.push(" IN (SELECT value FROM rarray(");
            b.bind(list);
            b.push("))");
        };
        self.push("(");
        one(self, c.stored());
        if !c.is_kept() {
            self.push(" AND ");
            one(self, c.read());
        }
        self.push(")");
    }

    fn order_by(&mut self, table: &'a TableSpec, order: &[(usize, Direction)]) {
        for (i, &(column, direction)) in order.iter().enumerate() {
            self.push(if i > 0 { "," } else { " ORDER BY " });
            self.put(Column { alias: 0, table, column }.read());
            if direction == Direction::Desc {
                self.push(" DESC");
            }
        }
    }

    fn start(&mut self, table: &'a TableSpec, alias: usize, s: &Start) -> Result<(), SourceError> {
        let position = s.position.iter().map(|p| self.value(*p)).collect::<Result<Vec<_>, _>>()?;
        let side = if s.exclusive { Side::After } else { Side::AtOrAfter };
        self.position(table, alias, &s.order, position, side);
        Ok(())
    }

    /// Rows on one side of a position: for each element, equal up to it and beyond at it. A range
    /// on the first column stands in front for an index to use.
    fn position<I>(
        &mut self,
        table: &'a TableSpec,
        alias: usize,
        order: &[(usize, Direction)],
        position: I,
        side: Side,
    ) where
        I: IntoIterator<Item = &'a Value>,
    {
        let at: Vec<(Column<'a>, bool, &'a Value)> = order
            .iter()
            .zip(position)
            .map(|(&(column, d), v)| {
                let ascending = (d == Direction::Asc) != (side == Side::Before);
                (Column { alias, table, column }, ascending, v)
            })
            .collect();
        self.push("(");
        if let Some(&(c, ascending, v)) = at.first()
            && !v.is_null()
            && (ascending || !c.nullable())
        {
            self.put(c.read());
            self.push(if ascending { ">=" } else { "<=" });
            self.operand(v);
            self.push(" AND ");
        }
        self.push("(");
        for i in 0..at.len() {
            if i > 0 {
                self.push(" OR ");
            }
            for &(c, _, v) in &at[..i] {
                self.equal(c, v);
                self.push(" AND ");
            }
            let (c, ascending, v) = at[i];
            self.beyond(c, ascending, v);
        }
        if side == Side::AtOrAfter && !mutant::is(Mutant::PositionExcluded) {
            for (i, &(c, _, v)) in at.iter().enumerate() {
                self.push(if i > 0 { " AND " } else { " OR " });
                self.equal(c, v);
            }
        }
        self.push("))");
    }

    /// The column is greater (ascending) or less than the value; null is lowest.
    fn beyond(&mut self, c: Column<'_>, ascending: bool, value: &'a Value) {
        let column = c.read();
        match (value.is_null(), ascending) {
            (true, true) => {
                self.put(column);
                self.push(" IS NOT NULL");
            }
            (true, false) => self.push("0"),
            (false, true) => {
                self.put(column);
                self.push(">");
                self.operand(value);
            }
            (false, false) if c.nullable() && !mutant::is(Mutant::NullIsHighest) => {
                let _ = write!(self.statement.text, "({column} IS NULL OR {column}<");
                self.operand(value);
                self.push(")");
            }
            (false, false) => {
                self.put(column);
                self.push("<");
                self.operand(value);
            }
        }
    }

    fn condition(
        &mut self,
        node: &'a Node,
        c: &'a Condition,
        alias: usize,
        filter: Filter,
    ) -> Result<(), SourceError> {
        match c {
            Condition::Const(true) => self.push("1"),
            Condition::Const(false) => self.push("0"),
            Condition::And(all) => self.balanced(node, all, " AND ", "1", alias, filter)?,
            Condition::Or(any) => {
                let conjunct = self.conjunct;
                self.conjunct &= any.len() < 2;
                self.balanced(node, any, " OR ", "0", alias, filter)?;
                self.conjunct = conjunct;
            }
            Condition::Simple(s) => self.simple(&node.table, s, alias)?,
            Condition::Exists(_) if filter == Filter::Weak => self.push("1"),
            Condition::Exists(e) => {
                let (conjunct, limit) = (self.conjunct, self.limit);
                let by_child =
                    conjunct && self.side.is_child(self.plan, self.params, node, e, limit);
                self.conjunct = by_child;
                self.limit = None;
                if by_child {
                    self.by_child(&node.table, e, alias)?;
                } else {
                    self.exists(&node.table, e, alias)?;
                }
                self.conjunct = conjunct;
                self.limit = limit;
            }
        }
        Ok(())
    }

    /// Operands as a balanced tree: SQLite's expressions nest at most 1,000 deep, and a chain of
    /// n operands counts as n.
    fn balanced(
        &mut self,
        node: &'a Node,
        operands: &'a [Condition],
        operator: &str,
        empty: &str,
        alias: usize,
        filter: Filter,
    ) -> Result<(), SourceError> {
        match operands {
            [] => self.push(empty),
            [one] => self.condition(node, one, alias, filter)?,
            many => {
                let (left, right) = many.split_at(many.len() / 2);
                self.push("(");
                self.balanced(node, left, operator, empty, alias, filter)?;
                self.push(operator);
                self.balanced(node, right, operator, empty, alias, filter)?;
                self.push(")");
            }
        }
        Ok(())
    }

    fn exists(
        &mut self,
        parent: &'a TableSpec,
        e: &'a ExistsEdge,
        alias: usize,
    ) -> Result<(), SourceError> {
        let child = self.plan.node(e.child);
        let inner = self.aliases;
        self.aliases += 1;
        self.push(if e.negated { "NOT EXISTS(SELECT 1 FROM " } else { "EXISTS(SELECT 1 FROM " });
        self.put(Ident(&child.table.name));
        let _ = write!(self.statement.text, " AS t{inner} WHERE ");
        for (i, (&p, &c)) in e.parent_columns.iter().zip(&e.child_columns).enumerate() {
            if i > 0 {
                self.push(" AND ");
            }
            let child_column = Column { alias: inner, table: &child.table, column: c };
            self.joined(child_column, Column { alias, table: parent, column: p });
        }
        self.node_filter(child, inner, Filter::Whole)?;
        self.push(")");
        Ok(())
    }

    /// An EXISTS that begins with the child: its rows are read once, whatever the parents.
    fn by_child(
        &mut self,
        parent: &'a TableSpec,
        e: &'a ExistsEdge,
        alias: usize,
    ) -> Result<(), SourceError> {
        let child = self.plan.node(e.child);
        let inner = self.aliases;
        self.aliases += 1;
        let (Some(&p), Some(&c)) = (e.parent_columns.first(), e.child_columns.first()) else {
            return Err(SourceError::Store("a correlation has no columns".into()));
        };
        let child_column = Column { alias: inner, table: &child.table, column: c }.stored();
        let parent_column = Column { alias, table: parent, column: p }.stored();
        let table = Ident(&child.table.name);
        let _ = write!(
            self.statement.text,
            "{parent_column} IN (SELECT {child_column} FROM {table} AS t{inner} \
             WHERE {child_column} IS NOT NULL"
        );
        if !mutant::is(Mutant::ChildrenUnfiltered) {
            self.node_filter(child, inner, Filter::Whole)?;
        }
        self.push(")");
        Ok(())
    }

    /// `child = parent`, in a form that an index on the child column serves. Where the child may
    /// hold numbers, the comparison as stored is the index's and only necessary (`007` and `7` are
    /// one number); the one of texts decides. Equal texts always compare equal as stored: their
    /// numbers, if they are any, are the same.
    fn joined(&mut self, child: Column<'_>, parent: Column<'_>) {
        if child.is_kept() {
            let (child, parent) = (child.stored(), parent.read_for(child));
            let _ = write!(self.statement.text, "{child}={parent}");
        } else {
            let _ = write!(
                self.statement.text,
                "({}={} AND {}={})",
                child.stored(),
                parent.stored(),
                child.read(),
                parent.read()
            );
        }
    }

    fn simple(
        &mut self,
        table: &'a TableSpec,
        s: &'a Simple,
        alias: usize,
    ) -> Result<(), SourceError> {
        let c = Column { alias, table, column: s.column };
        let operator = match s.op {
            Op::Eq | Op::Is => {
                let value = self.value(s.param)?;
                self.equal(c, value);
                return Ok(());
            }
            Op::IsNull | Op::IsNotNull => {
                self.null_test(c, s.op == Op::IsNull);
                return Ok(());
            }
            Op::In => {
                match self.list(s.param)? {
                    [one] => self.equal(c, one),
                    list => self.member(c, Bind::List(list)),
                }
                return Ok(());
            }
            Op::NotIn => {
                let list = self.list(s.param)?;
                let column = c.read();
                let _ = write!(self.statement.text, "({0} IS NOT NULL AND {0}", column);
                self.push(" NOT IN (SELECT value FROM rarray(");
                self.bind(Bind::List(list));
                self.push(")))");
                return Ok(());
            }
            Op::Like | Op::NotLike => return self.like(c, s),
            Op::Ne => "<>",
            Op::IsNot => " IS NOT ",
            Op::Lt => "<",
            Op::Gt => ">",
            Op::Le => "<=",
            Op::Ge => ">=",
        };
        let value = self.value(s.param)?;
        self.put(c.read());
        self.push(operator);
        self.operand(value);
        Ok(())
    }

    fn null_test(&mut self, c: Column<'_>, null: bool) {
        let column = c.stored();
        let text = &mut self.statement.text;
        let json = c.table.columns[c.column].value_type == ValueType::Json;
        let _ = match (json, null) {
            (false, true) => write!(text, "{column} IS NULL"),
            (false, false) => write!(text, "{column} IS NOT NULL"),
            // The blanks of JSON: tab, line feed, carriage return, space.
            (true, true) => {
                write!(text, "ifnull(trim({column},char(9,10,13,32)),'null')='null'")
            }
            (true, false) => {
                write!(text, "ifnull(trim({column},char(9,10,13,32)),'null')<>'null'")
            }
        };
    }

    fn like(&mut self, c: Column<'_>, s: &'a Simple) -> Result<(), SourceError> {
        let Some(Param::Like(pattern)) = self.params.get(usize::from(s.param.0)) else {
            return Err(mismatch(s.param));
        };
        if s.op == Op::NotLike {
            self.push("NOT ");
        }
        self.push(if pattern.ignore_case() { "zr_ilike(" } else { "zr_like(" });
        self.bind(Bind::Text(pattern.pattern()));
        self.push(",");
        self.put(c.stored());
        self.push(")");
        // What has the pattern's prefix lies between the prefix and its successor.
        if let (Op::Like, Some(prefix), true) = (s.op, pattern.prefix(), c.is_kept()) {
            let _ = write!(self.statement.text, " AND {}>=", c.stored());
            self.operand_owned(prefix.to_owned());
            if let Some(end) = successor(prefix) {
                let _ = write!(self.statement.text, " AND {}<", c.stored());
                self.operand_owned(end);
            }
        }
        Ok(())
    }

    fn value(&self, p: ParamId) -> Result<&'a Value, SourceError> {
        match self.params.get(usize::from(p.0)) {
            Some(Param::Value(v)) => Ok(v),
            _ => Err(mismatch(p)),
        }
    }

    fn list(&self, p: ParamId) -> Result<&'a [Value], SourceError> {
        match self.params.get(usize::from(p.0)) {
            Some(Param::List(l)) => Ok(l),
            _ => Err(mismatch(p)),
        }
    }
}

fn mismatch(p: ParamId) -> SourceError {
    SourceError::Store(format!("parameter {} does not fit the plan", p.0))
}

/// The least text that is greater than every text with this prefix; `None` if there is none.
fn successor(prefix: &str) -> Option<String> {
    let mut text = prefix.to_owned();
    while let Some(last) = text.pop() {
        // The next code point; surrogates are none.
        let next = (u32::from(last) + 1..=u32::from(char::MAX)).find_map(char::from_u32);
        if let Some(next) = next {
            text.push(next);
            return Some(text);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_successor_bounds_a_prefix() {
        assert_eq!(successor("ab").as_deref(), Some("ac"));
        assert_eq!(successor("a\u{D7FF}").as_deref(), Some("a\u{E000}"));
        assert_eq!(successor("a\u{10FFFF}").as_deref(), Some("b"));
        assert_eq!(successor("\u{10FFFF}"), None);
    }
}
