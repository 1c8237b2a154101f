//! The convergence check: a sample of clients holds exactly the rows that Postgres has.

use std::collections::{BTreeMap, HashMap};

use postgres::Client;
use serde_json::Value;

use crate::client::fleet::{Fleet, Rows};
use crate::data_set::Query;
use crate::error::LoadError;

/// Clients that are compared, spread evenly over all.
const SAMPLE: usize = 40;

type Expected = BTreeMap<(String, String), Value>;

struct Candidate {
    client: usize,
    queries: Vec<Query>,
    rows: Expected,
}

/// What a sample of clients must hold, as of now. No writes may be under way.
pub(crate) struct Comparison {
    candidates: Vec<Candidate>,
    equal: usize,
}

impl Comparison {
    /// Asks Postgres. `queries` are each client's; a client holds the rows of its whole group's.
    pub(crate) fn with_postgres(
        sql: &mut Client,
        queries: &[Vec<Query>],
        tabs: usize,
    ) -> Result<Comparison, LoadError> {
        let step = queries.len().div_ceil(SAMPLE).max(1);
        let mut answers = HashMap::new();
        let mut candidates = Vec::new();
        for client in (0..queries.len()).step_by(step) {
            let first = client / tabs * tabs;
            let group = &queries[first..(first + tabs).min(queries.len())];
            let queries: Vec<Query> = group.iter().flatten().cloned().collect();
            let rows = expected_rows(sql, &queries, &mut answers)?;
            candidates.push(Candidate { client, queries, rows });
        }
        Ok(Comparison { candidates, equal: 0 })
    }

    /// The first difference that is left. Clients found equal are not looked at again.
    pub(crate) fn difference(&mut self, fleet: &mut Fleet) -> Result<Option<String>, LoadError> {
        while let Some(candidate) = self.candidates.get(self.equal) {
            let rows = fleet
                .rows(candidate.client)
                .map_err(LoadError::io("asking a worker for a client's rows"))?;
            if let Err(found) = compare(&rows, &candidate.rows, &candidate.queries) {
                return Ok(Some(format!("client {}: {found}", candidate.client)));
            }
            self.equal += 1;
        }
        Ok(None)
    }

    pub(crate) fn clients(&self) -> usize {
        self.candidates.len()
    }

    pub(crate) fn rows(&self) -> usize {
        self.candidates.iter().map(|c| c.rows.len()).sum()
    }
}

fn expected_rows(
    sql: &mut Client,
    queries: &[Query],
    answers: &mut HashMap<String, Vec<Value>>,
) -> Result<Expected, LoadError> {
    let mut all = Expected::new();
    for part in queries.iter().flat_map(Query::expected) {
        if !answers.contains_key(&part.sql) {
            let rows = sql.query(&part.sql, &[]).map_err(LoadError::sql("comparing"))?;
            let parsed = rows
                .iter()
                .filter_map(|row| serde_json::from_str(row.get::<_, &str>(0)).ok())
                .collect();
            answers.insert(part.sql.clone(), parsed);
        }
        for row in &answers[&part.sql] {
            let id = row["id"].as_str().unwrap_or_default().to_owned();
            all.insert((part.table.to_owned(), id), row.clone());
        }
    }
    Ok(all)
}

fn compare(rows: &Rows, expected: &Expected, queries: &[Query]) -> Result<(), String> {
    let mut missing = expected.len();
    for ((table, id), text) in rows {
        let row: Value = serde_json::from_str(text).map_err(|e| format!("{table} {id}: {e}"))?;
        match expected.get(&(table.to_string(), id.to_string())) {
            Some(want) if *want == row => missing -= 1,
            Some(want) => return Err(format!("{table} {id} is {row}, Postgres has {want}")),
            None if queries.iter().all(|q| q.determines(table)) => {
                return Err(format!("{table} {id} should not be there: {row}"));
            }
            None => {}
        }
    }
    if missing == 0 { Ok(()) } else { Err(format!("{missing} rows are missing")) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::model::RowId;

    fn row(id: &str, text: &str) -> (RowId, Box<str>) {
        (("item".into(), id.into()), text.into())
    }

    #[test]
    fn missing_surplus_and_differing_rows_are_told() {
        let mut expected = Expected::new();
        for id in ["a", "b"] {
            let want = serde_json::json!({"id": id, "n": 1});
            expected.insert(("item".to_owned(), id.to_owned()), want);
        }
        let (a, b) = (row("a", r#"{"n":1,"id":"a"}"#), row("b", r#"{"id":"b","n":1}"#));
        assert!(compare(&vec![a.clone(), b.clone()], &expected, &[]).is_ok());
        assert!(compare(&vec![a.clone()], &expected, &[]).unwrap_err().contains("1 rows"));
        let other = row("b", r#"{"id":"b","n":2}"#);
        assert!(compare(&vec![a.clone(), other], &expected, &[]).unwrap_err().contains("item b"));
        let surplus = row("c", r#"{"id":"c"}"#);
        let found = compare(&vec![a, b, surplus], &expected, &[]);
        assert!(found.unwrap_err().contains("should not be there"));
    }
}
