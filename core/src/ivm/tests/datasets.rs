//! The queries of small applications, kept up through random transactions.

use crate::ivm::brute;
use crate::ivm::memory_source::Database;
use crate::ivm::proof::datasets;
use crate::ivm::proof::history::check;
use crate::ivm::proof::runner::{by_id, memory};
use crate::row::Row;
use crate::version::StateVersion;
use crate::zql::gen_world::Choices;

/// Transactions per data set and seed.
const COMMITS: usize = 60;

fn seeds() -> std::ops::Range<u64> {
    let env = |name| std::env::var(name).ok().and_then(|v| v.parse().ok());
    let first = env("ZERORING_SEED").unwrap_or(0);
    first..first + env("ZERORING_DATASETS").unwrap_or(4)
}

#[test]
fn the_queries_of_small_applications_agree_with_the_oracle() {
    let mut steps = 0;
    for set in datasets::all().unwrap() {
        for seed in seeds() {
            let script = set.script(seed, COMMITS).unwrap();
            match check(&script, &memory) {
                Ok(n) => steps += n,
                Err(error) => panic!("{}, seed {seed}: {error}", set.name),
            }
        }
    }
    println!("data sets: {steps} steps agree");
}

/// A query that never has rows proves nothing.
#[test]
fn most_queries_of_the_data_sets_have_rows() {
    for set in datasets::all().unwrap() {
        let mut hits = vec![0; set.queries.len()];
        for seed in 0..8 {
            let script = set.script(seed, 0).unwrap();
            let mut db = Database::default();
            for (table, values) in &set.rows(&mut Choices::new(seed)) {
                let table = by_id(&set.schema, *table).unwrap();
                db.put(table, Row::new(StateVersion::from_lsn(1), values.clone()));
            }
            for (i, (plan, params)) in script.queries.iter().enumerate() {
                hits[i] += usize::from(!brute::sync(plan, params, &db).is_empty());
            }
        }
        for ((what, _), hits) in set.queries.iter().zip(hits) {
            let denied = what.starts_with("nothing");
            assert_eq!(hits == 0, denied, "{}: {what}: rows in {hits} of 8", set.name);
        }
    }
}
