//! The query AST as it travels on the wire and rests in the CVR (spec: zql-ivm §1).
//!
//! One set of types serves client messages, stored queries and answers of the query endpoint.
//! Unknown keys are tolerated everywhere and dropped (decision 2); a missing field, a wrong type
//! or an unknown operator is an error that names it. Whoever needs the *text* of what was
//! received (the hash of a custom query) keeps the JSON value beside it, see
//! [`super::hash::received`].
//!
//! Numbers are doubles, as in every client. A JSON round trip keeps the meaning, and absent
//! fields absent.

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A query: one table, what qualifies, in which order, and its children.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Ast {
    /// Reserved; carried through and hashed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub schema: Option<String>,
    /// Server name of the table.
    pub table: String,
    /// Name of the relationship that this subquery fills.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub alias: Option<String>,
    /// Filter.
    #[serde(rename = "where", default, skip_serializing_if = "Option::is_none")]
    pub condition: Option<Condition>,
    /// Children returned with each row.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub related: Option<Vec<CorrelatedSubquery>>,
    /// Cursor.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start: Option<Start>,
    /// Window size: any JSON number on the wire; the compiler rejects what is no whole number.
    #[serde(default, skip_serializing_if = "Option::is_none", with = "optional_number")]
    pub limit: Option<f64>,
    /// Sort keys, most significant first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub order_by: Option<Vec<(String, Direction)>>,
}

impl Ast {
    /// A query of a whole table.
    pub fn table(name: impl Into<String>) -> Ast {
        Ast { table: name.into(), ..Ast::default() }
    }

    /// Every query node of the tree, this one first: related children and EXISTS bodies too.
    pub fn for_each_node(&self, visit: &mut dyn FnMut(&Ast)) {
        visit(self);
        if let Some(c) = &self.condition {
            c.for_each_subquery(&mut |s| s.subquery.for_each_node(visit));
        }
        for r in self.related.iter().flatten() {
            r.subquery.for_each_node(visit);
        }
    }
}

/// A cursor: rows before it do not exist for the query.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Start {
    /// Values by column; a missing column is null.
    pub row: serde_json::Map<String, serde_json::Value>,
    /// The cursor row itself is excluded.
    pub exclusive: bool,
}

/// Sort direction. Nulls come first ascending, last descending.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Direction {
    /// Ascending.
    Asc,
    /// Descending.
    Desc,
}

/// A child query and the columns that tie it to its parent.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CorrelatedSubquery {
    /// The columns.
    pub correlation: Correlation,
    /// Junction hop: the client's view leaves this level out. Its rows are synced all the same.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hidden: Option<bool>,
    /// The child.
    pub subquery: Box<Ast>,
    /// Who added it; absent means the client.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub system: Option<System>,
}

/// Columns of parent and child, matched by position. Both lists have the same length, ≥ 1.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Correlation {
    /// Columns of the parent.
    pub parent_field: Vec<String>,
    /// Columns of the child.
    pub child_field: Vec<String>,
}

impl<'de> Deserialize<'de> for Correlation {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Raw {
            parent_field: Vec<String>,
            child_field: Vec<String>,
        }
        let raw = Raw::deserialize(d)?;
        if raw.parent_field.is_empty() || raw.parent_field.len() != raw.child_field.len() {
            return Err(D::Error::custom(
                "correlation: parentField and childField must be non-empty and of equal length",
            ));
        }
        Ok(Correlation { parent_field: raw.parent_field, child_field: raw.child_field })
    }
}

/// Who added a subquery.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum System {
    /// A read permission rule: its rows are never sent.
    Permissions,
    /// The query's author.
    Client,
    /// Tests of the original.
    Test,
}

/// A filter. There is no NOT node: negation lives in the operators.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "camelCase")]
pub enum Condition {
    /// A comparison.
    Simple(Simple),
    /// All of them; empty is TRUE.
    And {
        /// The operands.
        conditions: Vec<Condition>,
    },
    /// Any of them; empty is FALSE.
    Or {
        /// The operands.
        conditions: Vec<Condition>,
    },
    /// EXISTS or NOT EXISTS.
    CorrelatedSubquery(Exists),
}

impl Condition {
    /// Always true.
    pub fn always() -> Condition {
        Condition::And { conditions: Vec::new() }
    }

    /// Never true.
    pub fn never() -> Condition {
        Condition::Or { conditions: Vec::new() }
    }

    /// Every EXISTS of this condition, in pre-order, bodies not entered.
    pub fn for_each_subquery(&self, visit: &mut dyn FnMut(&CorrelatedSubquery)) {
        match self {
            Condition::Simple(_) => {}
            Condition::And { conditions } | Condition::Or { conditions } => {
                conditions.iter().for_each(|c| c.for_each_subquery(visit));
            }
            Condition::CorrelatedSubquery(e) => visit(&e.related),
        }
    }
}

/// A comparison: `left op right`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Simple {
    /// The operator.
    pub op: Op,
    /// A column, literal or static.
    pub left: Operand,
    /// A literal or static, never a column.
    #[serde(deserialize_with = "right_side")]
    pub right: Operand,
}

fn right_side<'de, D: Deserializer<'de>>(d: D) -> Result<Operand, D::Error> {
    match Operand::deserialize(d)? {
        Operand::Column { name } => Err(D::Error::custom(format!(
            "the right side of a condition must be a literal or a parameter, not column {name:?}"
        ))),
        o => Ok(o),
    }
}

/// Comparison operators.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[allow(missing_docs)]
pub enum Op {
    #[serde(rename = "=")]
    Eq,
    #[serde(rename = "!=")]
    Ne,
    #[serde(rename = "IS")]
    Is,
    #[serde(rename = "IS NOT")]
    IsNot,
    #[serde(rename = "<")]
    Lt,
    #[serde(rename = ">")]
    Gt,
    #[serde(rename = "<=")]
    Le,
    #[serde(rename = ">=")]
    Ge,
    #[serde(rename = "LIKE")]
    Like,
    #[serde(rename = "NOT LIKE")]
    NotLike,
    #[serde(rename = "ILIKE")]
    ILike,
    #[serde(rename = "NOT ILIKE")]
    NotILike,
    #[serde(rename = "IN")]
    In,
    #[serde(rename = "NOT IN")]
    NotIn,
}

impl Op {
    /// The operator as written on the wire.
    pub fn text(self) -> &'static str {
        match self {
            Op::Eq => "=",
            Op::Ne => "!=",
            Op::Is => "IS",
            Op::IsNot => "IS NOT",
            Op::Lt => "<",
            Op::Gt => ">",
            Op::Le => "<=",
            Op::Ge => ">=",
            Op::Like => "LIKE",
            Op::NotLike => "NOT LIKE",
            Op::ILike => "ILIKE",
            Op::NotILike => "NOT ILIKE",
            Op::In => "IN",
            Op::NotIn => "NOT IN",
        }
    }
}

/// A value position.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "camelCase")]
pub enum Operand {
    /// A column of the query's own table.
    Column {
        /// Its server name.
        name: String,
    },
    /// A constant.
    Literal {
        /// Its value.
        value: Literal,
    },
    /// A parameter that the server binds before planning.
    Static {
        /// Where the value comes from.
        anchor: Anchor,
        /// A property, or a path of properties.
        field: FieldPath,
    },
}

/// The object that a static parameter is taken from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Anchor {
    /// The claims of the client's token.
    AuthData,
    /// The row before a mutation.
    PreMutationRow,
}

/// A property, or a path of properties.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(untagged)]
pub enum FieldPath {
    /// One property.
    One(String),
    /// A path.
    Path(Vec<String>),
}

impl FieldPath {
    /// The steps.
    pub fn steps(&self) -> &[String] {
        match self {
            FieldPath::One(s) => std::slice::from_ref(s),
            FieldPath::Path(p) => p,
        }
    }
}

/// A literal: null, a scalar, or the list of an IN.
#[derive(Debug, Clone, PartialEq)]
pub enum Literal {
    /// `null`.
    Null,
    /// A boolean.
    Bool(bool),
    /// A number.
    Number(f64),
    /// A string.
    String(String),
    /// A list of non-null scalars.
    Array(Vec<Literal>),
}

impl Literal {
    /// From JSON.
    ///
    /// # Errors
    /// Objects, nested arrays and nulls inside arrays are no literals.
    pub fn from_json(v: &serde_json::Value) -> Result<Literal, String> {
        use serde_json::Value as J;
        Ok(match v {
            J::Null => Literal::Null,
            J::Bool(b) => Literal::Bool(*b),
            J::Number(n) => Literal::Number(n.as_f64().ok_or("a number out of range")?),
            J::String(s) => Literal::String(s.clone()),
            J::Array(items) => Literal::Array(
                items
                    .iter()
                    .map(|i| match i {
                        J::Null | J::Array(_) | J::Object(_) => {
                            Err("a literal array may hold strings, numbers and booleans only"
                                .to_owned())
                        }
                        scalar => Literal::from_json(scalar),
                    })
                    .collect::<Result<_, _>>()?,
            ),
            J::Object(_) => return Err("an object is no literal".into()),
        })
    }
}

impl<'de> Deserialize<'de> for Literal {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        Literal::from_json(&serde_json::Value::deserialize(d)?).map_err(D::Error::custom)
    }
}

impl Serialize for Literal {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        match self {
            Literal::Null => s.serialize_unit(),
            Literal::Bool(b) => s.serialize_bool(*b),
            Literal::Number(n) => serialize_number(*n, s),
            Literal::String(t) => s.serialize_str(t),
            Literal::Array(items) => items.serialize(s),
        }
    }
}

/// Whole numbers are written without a fraction, as every JavaScript client writes them.
fn serialize_number<S: Serializer>(n: f64, s: S) -> Result<S::Ok, S::Error> {
    if n.fract() == 0.0 && n.abs() <= crate::value::Value::MAX_SAFE_INTEGER as f64 {
        s.serialize_i64(n as i64)
    } else {
        s.serialize_f64(n)
    }
}

mod optional_number {
    use serde::{Deserialize, Deserializer, Serializer};

    pub fn serialize<S: Serializer>(n: &Option<f64>, s: S) -> Result<S::Ok, S::Error> {
        match n {
            Some(n) => super::serialize_number(*n, s),
            None => s.serialize_none(),
        }
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<Option<f64>, D::Error> {
        Option::<f64>::deserialize(d)
    }
}

/// An EXISTS or NOT EXISTS condition.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Exists {
    /// Its body and correlation.
    pub related: CorrelatedSubquery,
    /// Which of the two.
    pub op: ExistsOp,
    /// Plan hint of the original; never changes a result.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub flip: Option<bool>,
    /// Plan hint: the body has at most one row. Never changes a result.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scalar: Option<bool>,
}

/// EXISTS or NOT EXISTS.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[allow(missing_docs)]
pub enum ExistsOp {
    #[serde(rename = "EXISTS")]
    Exists,
    #[serde(rename = "NOT EXISTS")]
    NotExists,
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn parse(v: serde_json::Value) -> Result<Ast, serde_json::Error> {
        serde_json::from_value(v)
    }

    #[test]
    fn a_full_ast_survives_a_json_round_trip() {
        let v = json!({"table":"issue","where":{"type":"and","conditions":[
            {"type":"simple","op":"IN","left":{"type":"column","name":"n"},
             "right":{"type":"literal","value":[1,2.5,"x",true]}},
            {"type":"simple","op":"=","left":{"type":"column","name":"u"},
             "right":{"type":"static","anchor":"authData","field":["a","b"]}},
            {"type":"correlatedSubquery","op":"NOT EXISTS","flip":false,"scalar":true,
             "related":{"system":"permissions","correlation":{"parentField":["id"],"childField":["iid"]},
               "subquery":{"table":"label","alias":"zsubq_l"}}}]},
            "related":[{"hidden":true,"correlation":{"parentField":["id"],"childField":["iid"]},
               "subquery":{"table":"il","alias":"l","limit":3}}],
            "start":{"row":{"n":null,"id":"i9"},"exclusive":true},
            "limit":20,"orderBy":[["n","desc"]]});
        let ast = parse(v.clone()).unwrap();
        assert_eq!(serde_json::to_value(&ast).unwrap(), v);
        let text = serde_json::to_string(&ast).unwrap();
        assert_eq!(serde_json::from_str::<Ast>(&text).unwrap(), ast);
        let mut tables = Vec::new();
        ast.for_each_node(&mut |n| tables.push(n.table.clone()));
        assert_eq!(tables, ["issue", "label", "il"]);
    }

    #[test]
    fn unknown_keys_are_tolerated_and_wrong_shapes_are_not() {
        assert!(parse(json!({"table":"t","future":1})).is_ok());
        let simple = |l: serde_json::Value, op: &str, r: serde_json::Value| {
            parse(json!({"table":"t","where":{"type":"simple","op":op,"left":l,"right":r,"x":0}}))
        };
        let col = json!({"type":"column","name":"a"});
        let lit = json!({"type":"literal","value":1});
        assert!(simple(col.clone(), "=", lit.clone()).is_ok());
        assert!(simple(col.clone(), "=", col.clone()).is_err());
        assert!(simple(col.clone(), "==", lit).is_err());
        assert!(simple(col.clone(), "IN", json!({"type":"literal","value":[null]})).is_err());
        assert!(simple(col.clone(), "=", json!({"type":"literal","value":{}})).is_err());
        assert!(simple(col, "=", json!({"type":"literal"})).is_err());
        assert!(parse(json!({"where":{"type":"and","conditions":[]}})).is_err());
        assert!(parse(json!({"table":"t","where":{"type":"scalarSubquery"}})).is_err());
        for (p, c) in [(json!([]), json!([])), (json!(["a"]), json!(["a", "b"]))] {
            assert!(
                parse(json!({"table":"t","related":[{"subquery":{"table":"u","alias":"u"},
                    "correlation":{"parentField":p,"childField":c}}]}))
                .is_err()
            );
        }
    }
}
