//! What a compiled condition means for a row. The truth of EXISTS leaves is an argument: the
//! engine answers it from partitions, the oracle by brute force; SQL has its own form of the whole.

use std::convert::Infallible;

use crate::ivm::plan::{Condition, ExistsEdge, Node, Op, Param, Params, Simple};
use crate::row::Row;
use crate::value::Value;

/// Whether a comparison holds. Two-valued: "unknown" is false at the leaf (spec: zql-ivm §2.4).
pub fn simple(s: &Simple, row: &Row, params: &Params) -> bool {
    let value = &row.values[s.column];
    match s.op {
        Op::IsNull => return is_null(value),
        Op::IsNotNull => return !is_null(value),
        Op::IsNot if value.is_null() => return true,
        _ if value.is_null() => return false,
        _ => {}
    }
    // A slot of another kind than the operator wants cannot come out of the compiler; it decides
    // nothing, hence false.
    match (s.op, params.get(usize::from(s.param.0))) {
        (Op::In, Some(Param::List(l))) => l.binary_search(value).is_ok(),
        (Op::NotIn, Some(Param::List(l))) => l.binary_search(value).is_err(),
        (Op::Like, Some(Param::Like(p))) => text(value).is_some_and(|t| p.matches(t)),
        (Op::NotLike, Some(Param::Like(p))) => text(value).is_some_and(|t| !p.matches(t)),
        (op, Some(Param::Value(v))) => compare(op, value, v),
        _ => false,
    }
}

/// A JSON `null` is null to every client, and only null tests compile for json columns.
fn is_null(v: &Value) -> bool {
    match v {
        Value::Json(text) => text.trim_matches([' ', '\t', '\n', '\r']) == "null",
        other => other.is_null(),
    }
}

fn text(v: &Value) -> Option<&str> {
    match v {
        Value::String(s) => Some(s),
        _ => None,
    }
}

fn compare(op: Op, a: &Value, b: &Value) -> bool {
    let order = a.compare(b);
    match op {
        Op::Eq | Op::Is => order.is_eq(),
        Op::Ne | Op::IsNot => order.is_ne(),
        Op::Lt => order.is_lt(),
        Op::Gt => order.is_gt(),
        Op::Le => order.is_le(),
        Op::Ge => order.is_ge(),
        Op::IsNull | Op::IsNotNull | Op::In | Op::NotIn | Op::Like | Op::NotLike => false,
    }
}

/// Evaluates a condition; `leaf` says whether an EXISTS or NOT EXISTS leaf is true (the negation
/// applied). Stops at the first operand that decides.
///
/// # Errors
/// The first error of `leaf`.
pub fn try_evaluate<E>(
    condition: &Condition,
    row: &Row,
    params: &Params,
    leaf: &mut dyn FnMut(&ExistsEdge) -> Result<bool, E>,
) -> Result<bool, E> {
    match condition {
        Condition::Const(b) => Ok(*b),
        Condition::Simple(s) => Ok(simple(s, row, params)),
        Condition::Exists(e) => leaf(e),
        Condition::And(all) => {
            for c in all {
                if !try_evaluate(c, row, params, leaf)? {
                    return Ok(false);
                }
            }
            Ok(true)
        }
        Condition::Or(any) => {
            for c in any {
                if try_evaluate(c, row, params, leaf)? {
                    return Ok(true);
                }
            }
            Ok(false)
        }
    }
}

/// [`try_evaluate`] with a leaf that cannot fail.
pub fn evaluate(
    condition: &Condition,
    row: &Row,
    params: &Params,
    leaf: &mut dyn FnMut(&ExistsEdge) -> bool,
) -> bool {
    match try_evaluate::<Infallible>(condition, row, params, &mut |e| Ok(leaf(e))) {
        Ok(b) => b,
    }
}

/// The weak predicate: start cursor AND `where` with every leaf taken as TRUE. Necessary for
/// membership, and needs only the row.
pub fn weak(node: &Node, row: &Row, params: &Params) -> bool {
    super::order::in_start(node, row, params)
        && evaluate(&node.condition, row, params, &mut |_| true)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ivm::plan::ParamId;
    use crate::version::StateVersion;
    use crate::zql::like::LikePattern;
    use std::sync::Arc;

    fn holds(value: Value, op: Op, param: Param) -> bool {
        let row = Row::new(StateVersion::zero(), vec![value]);
        simple(&Simple { column: 0, op, param: ParamId(0) }, &row, &[param])
    }

    #[test]
    fn only_the_is_family_looks_at_null() {
        let one = || Param::Value(Value::Number(1.0));
        for op in [Op::Eq, Op::Ne, Op::Is, Op::Lt, Op::Gt, Op::Le, Op::Ge] {
            assert!(!holds(Value::Null, op, one()), "{op:?}");
        }
        let list = |l: &[f64]| Param::List(l.iter().map(|n| Value::Number(*n)).collect());
        assert!(!holds(Value::Null, Op::In, list(&[1.0])));
        assert!(!holds(Value::Null, Op::NotIn, list(&[1.0])));
        assert!(!holds(Value::Null, Op::NotIn, list(&[])));
        let like = || Param::Like(Arc::new(LikePattern::new("%", false).unwrap()));
        assert!(!holds(Value::Null, Op::Like, like()));
        assert!(!holds(Value::Null, Op::NotLike, like()));
        assert!(holds(Value::Null, Op::IsNot, one()));
        assert!(holds(Value::Null, Op::IsNull, Param::Value(Value::Null)));
        assert!(!holds(Value::Null, Op::IsNotNull, Param::Value(Value::Null)));
        for (json, null) in [(" null\n", true), ("\"null\"", false), ("[null]", false)] {
            let value = || Value::Json(json.into());
            assert_eq!(holds(value(), Op::IsNull, Param::Value(Value::Null)), null, "{json}");
            assert_eq!(holds(value(), Op::IsNotNull, Param::Value(Value::Null)), !null, "{json}");
        }
    }

    #[test]
    fn comparisons_follow_the_total_order() {
        let s = |s: &str| Value::string(s);
        assert!(holds(s("😀"), Op::Gt, Param::Value(s("\u{FFFD}"))));
        assert!(!holds(Value::Bool(true), Op::Lt, Param::Value(Value::Bool(false))));
        assert!(holds(Value::Number(-0.0), Op::Eq, Param::Value(Value::Number(0.0))));
        let list = |l: &[f64]| Param::List(l.iter().map(|n| Value::Number(*n)).collect());
        assert!(holds(Value::Number(2.0), Op::In, list(&[0.0, 2.0])));
        assert!(holds(Value::Number(2.0), Op::NotIn, list(&[])));
        assert!(holds(Value::from_i64(i64::MAX), Op::Gt, Param::Value(Value::Number(9e15))));
    }
}
