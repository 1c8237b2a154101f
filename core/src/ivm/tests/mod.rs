//! Proof of the engine: random histories against the brute-force oracle, every query shape with
//! every change of one row, rewritten queries, small applications, worked examples of the
//! specification, wrong variants that must be caught.
//!
//! Where each item of the conformance checklist of spec zql-ivm is tested. *Random* is `random`,
//! `skeletons` and `datasets` here, and `engine_over_sqlite` in the storage crate; they compare
//! emitted rows, held rows, counts and signatures with the oracle after each advance.
//!
//! | Item | Tests |
//! |---|---|
//! | 1–3 hashes, normal form | `zql::hash`, `zql::normalize`; executing `or []`: `datasets` ("nothing: denied") |
//! | 4 missing claims | `auth::transform` |
//! | 5 names of the server, unknown columns | `tests/wire/pokes`, `tests/wire/client_schema` |
//! | 6 null and operators | `zql::predicate`; SQL: `sql_agrees_with_the_predicate` |
//! | 7 code points | `datasets` (texts); Postgres: `postgres_agrees` |
//! | 8 nulls in orders and pages | `zql::order`, `skeletons` |
//! | 9 LIKE | `zql::like` with its table; Postgres and SQL: `datasets` (texts) |
//! | 10 completed orders | `zql::order`, `zql::compile::tests` |
//! | 11 cursors | `skeletons`, `postgres_agrees` |
//! | 12 limit 0 | `checklist`, `examples` |
//! | 13 windows per parent | `examples::a_related_window_per_parent`, random |
//! | 14 null join keys | `checklist::null_joins_with_nothing` |
//! | 15 limits of bodies | `metamorphic`, `zql::compile::tests` |
//! | 16 alias twice | `zql::compile::tests::the_last_related_of_an_alias_wins…` |
//! | 17 NOT EXISTS anywhere | random, `checklist` (in a scalar) |
//! | 18 numbers beyond 2^53 | `lifecycle::an_undeliverable_value…`, `tests/wire/values` |
//! | 19 json, arrays, booleans, times | `tests/wire/values`, `tests/replication/values` |
//! | 20 sum of deltas = hydration | random |
//! | 21 no count below zero | random (`proof::runner` refuses such a delta) |
//! | 22 one content update | random (as 21), `examples` |
//! | 23 join keys move | `examples`, `skeletons` |
//! | 24 in and out of a window | `examples::rows_enter_and_leave_a_window` |
//! | 25 evidence replaced | `examples::exists_keeps_three_rows_of_evidence` |
//! | 26 OR of two EXISTS | `examples::each_branch_of_an_or_has_its_evidence` |
//! | 27 self-joins | `examples::a_row_is_its_own_evidence`, `…forbids_its_twins`, `skeletons` (one table) |
//! | 28 exchanged unique values | `checklist::rows_that_exchange_the_clients_key…`, random |
//! | 29 several transactions at once | `lifecycle::several_commits_are_one_change`, random |
//! | 30 rows of rules | `examples::permission_rows_stay_on_the_server`, `datasets` (school) |
//! | 31 junctions | `datasets` (music shop, film rental) |
//! | 32 scalars | `checklist::a_scalar_subquery_follows_its_row` |
//! | 33 hints | `metamorphic::every_assignment_of_hints_is_the_same_plan` |
//! | 34 truncate, schema, permissions | random (truncate, schema), `tests/wire/lifecycle` |
//! | 35 aborted advance | `lifecycle`, `group::tests::simulation` |
//! | 36 minimum row version | `lifecycle::a_schema_change_rebinds…`, storage `readers_and_wal` |
//! | 37 two paths to a row | `examples::evidence_and_related_rows_add_up` |
//! | 38 two queries with a row | `core/tests/cvr_updaters`, `group::tests::simulation` |
//! | 39 reconnect | `group::tests::scenarios`, `core/tests/cvr_updaters` |
//! | 40 unknown tables | `zql::compile::tests::errors_name_table_column_and_cause` |
//! | 41 slices | `slicing`, random (budgets) |
//! | 42 mutation results | `tests/wire/mutation_ids` |
//! | 43, 44 rows that nobody holds | `examples`, random |
//! | 45 exchanged client keys | `checklist::rows_that_exchange_the_clients_key…`, random |
//! | 46 scalars of rules, below scalars | `checklist::scalars_of_rules_are_silent…` |

mod bounded_steps;
mod checklist;
mod datasets;
mod examples;
mod kit;
mod lifecycle;
mod metamorphic;
mod mutants;
mod random;
mod sharing;
mod skeletons;
mod slicing;
