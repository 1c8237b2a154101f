//! Row order: the one comparison of rows and positions for windows, cursors and evidence.

use std::cmp::Ordering;

use crate::ivm::plan::{Direction, Node, Param, Params, Start};
use crate::row::{Key, Row};
use crate::value::Value;

/// Completes an order with the identity-key columns that it lacks, ascending, in key order: the
/// result is total (spec: zql-ivm §2.6).
pub fn complete(order: &mut Vec<(usize, Direction)>, key: &[usize]) {
    // A column named twice orders by its first mention.
    let mut seen = Vec::with_capacity(order.len() + key.len());
    order.retain(|(c, _)| {
        let first = !seen.contains(c);
        seen.push(*c);
        first
    });
    for &c in key {
        if !seen.contains(&c) {
            order.push((c, Direction::Asc));
        }
    }
}

fn directed(a: &Value, b: &Value, direction: Direction) -> Ordering {
    match direction {
        Direction::Asc => a.compare(b),
        Direction::Desc => b.compare(a),
    }
}

/// Compares two rows.
pub fn compare_rows(order: &[(usize, Direction)], a: &Row, b: &Row) -> Ordering {
    order
        .iter()
        .map(|&(c, d)| directed(&a.values[c], &b.values[c], d))
        .find(|o| o.is_ne())
        .unwrap_or(Ordering::Equal)
}

/// Compares a row with a position: one value per element of the order.
pub fn compare_to_position(
    order: &[(usize, Direction)],
    row: &Row,
    position: &[Value],
) -> Ordering {
    order
        .iter()
        .zip(position)
        .map(|(&(c, d), v)| directed(&row.values[c], v, d))
        .find(|o| o.is_ne())
        .unwrap_or(Ordering::Equal)
}

/// Compares two positions of one order.
pub fn compare_positions(order: &[(usize, Direction)], a: &[Value], b: &[Value]) -> Ordering {
    order
        .iter()
        .zip(a.iter().zip(b))
        .map(|(&(_, d), (a, b))| directed(a, b, d))
        .find(|o| o.is_ne())
        .unwrap_or(Ordering::Equal)
}

/// The position of a row.
pub fn position(order: &[(usize, Direction)], row: &Row) -> Key {
    order.iter().map(|&(c, _)| row.values[c].clone()).collect()
}

/// Whether a row is at or after a start cursor.
pub fn passes_start(start: &Start, row: &Row, params: &Params) -> bool {
    for (&(c, d), p) in start.order.iter().zip(&start.position) {
        let Some(Param::Value(v)) = params.get(usize::from(p.0)) else { return false };
        match directed(&row.values[c], v, d) {
            Ordering::Less => return false,
            Ordering::Greater => return true,
            Ordering::Equal => {}
        }
    }
    !start.exclusive
}

/// Whether a row passes the node's start cursor, if it has one.
pub fn in_start(node: &Node, row: &Row, params: &Params) -> bool {
    node.start.as_ref().is_none_or(|s| passes_start(s, row, params))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ivm::plan::ParamId;
    use crate::row::RowRef;
    use crate::version::StateVersion;

    fn row(values: &[Option<f64>]) -> RowRef {
        Row::new(
            StateVersion::zero(),
            values.iter().map(|v| v.map_or(Value::Null, Value::Number)).collect::<Vec<_>>(),
        )
    }

    #[test]
    fn the_key_completes_an_order_ascending_whatever_its_direction() {
        let mut order = vec![(2, Direction::Desc), (1, Direction::Desc), (2, Direction::Asc)];
        complete(&mut order, &[0, 1]);
        assert_eq!(order, [(2, Direction::Desc), (1, Direction::Desc), (0, Direction::Asc)]);
    }

    #[test]
    fn nulls_are_first_ascending_and_last_descending() {
        let (null, one) = (row(&[None]), row(&[Some(1.0)]));
        assert_eq!(compare_rows(&[(0, Direction::Asc)], &null, &one), Ordering::Less);
        assert_eq!(compare_rows(&[(0, Direction::Desc)], &null, &one), Ordering::Greater);
    }

    #[test]
    fn paging_over_nulls_with_pages_of_one_loses_and_repeats_nothing() {
        let mut rows: Vec<_> = [None, Some(1.0), None, Some(2.0), Some(1.0)]
            .iter()
            .enumerate()
            .map(|(i, n)| row(&[*n, Some(i as f64)]))
            .collect();
        for d in [Direction::Asc, Direction::Desc] {
            let order = vec![(0, d), (1, Direction::Asc)];
            rows.sort_by(|a, b| compare_rows(&order, a, b));
            for (i, at) in rows.iter().enumerate() {
                let params: Vec<Param> =
                    position(&order, at).into_iter().map(Param::Value).collect();
                for exclusive in [true, false] {
                    let start = Start {
                        order: order.clone(),
                        position: vec![ParamId(0), ParamId(1)],
                        exclusive,
                    };
                    let left = rows.iter().filter(|r| passes_start(&start, r, &params)).count();
                    assert_eq!(left, rows.len() - i - usize::from(exclusive));
                }
            }
        }
    }
}
