//! What every CVR store must do, run against each of them: contract (`suite`), agreement of
//! updaters and store with a plain model under random operations (`simulation`), and, for the
//! embedded store, survival of `kill -9` (`kill`); for Postgres see `postgres`.
//!
//! The conformance checklist of view-syncer-cvr, and where each item is held. What is no path from
//! the root is a module of this test; `scenarios` and `simulation` of groups are in
//! `core/src/group/tests`.
//!
//! | Items | Held by |
//! |---|---|
//! | 1–4 versions, cookies | `core/src/version.rs` |
//! | 5 row identity, signature units | `core/src/cvr/row_id.rs` |
//! | 6 which executor owns a group | `src/sync/connection.rs` |
//! | 7–9 tables, versions, migration from 6 on, several servers at once | `postgres::schema` |
//! | 10 an original's CVR and ours | `postgres::interop`; running: `tests/e2e/interop.rs` |
//! | 11–13 what is stored, column by column | `postgres::shared::records_are_encoded_as_the_original_does` |
//! | 14 nothing to write | `suite::a_second_flush_without_changes_is_none` |
//! | 15 more than 100 rows | `suite::rows_of_a_large_flush_follow_in_order`, `postgres::shared::{rows_follow_their_metadata_whatever_happens_to_the_group, rows_that_cannot_be_written_lose_their_group_only}`, `postgres::follow`; killed in between: `kill`, group `simulation` |
//! | 16 `rowsVersion` moves with every flush | `postgres::shared::records_are_encoded…`, `tests/sync/takeover.rs` |
//! | 17 rows behind | `postgres::shared::a_load_waits_for_the_rows_of_the_former_owner` |
//! | 18, 19 takeover | `suite::{a_later_connection_elsewhere_owns_the_group, an_earlier_connection_elsewhere_is_taken_over, ownership_is_looked_at_before_the_version}`; rows that follow it: `postgres::shared::rows_follow_their_metadata_whatever_happens_to_the_group`; over sockets `tests/sync/takeover.rs` |
//! | 20 one base, two flushes | `suite::of_two_flushes_from_one_base_one_commits`, `postgres::shared::{an_original_that_commits_while_we_wait_wins, of_two_servers_exactly_one_commits_and_none_deadlocks}` |
//! | 21–23 catch-up scans | `suite::{reads_at_another_version_are_refused, row_catch_up_pages_filters_and_includes_tombstones, catch_up_compares_versions_structurally, config_catch_up_returns_all_clients_in_range}` |
//! | 24, 25 purging, tombstones | `suite::purging_leaves_tombstones_and_forgets_old_ones`, `postgres::shared::a_purge_leaves_alone…`; pace: `src/node/purge.rs` |
//! | 26 desires of a deleted client | `suite::desires_of_a_deleted_client_keep_their_query` |
//! | 27, 28 put, del, clear | `scenarios::{repeating_a_put_changes_nothing_unless_its_ttl_grows, clear_evicts_without_grace}`, `tests/wire/ttl.rs` |
//! | 29–38 updaters and signatures | `simulation` (against a model, both stores), `suite::{adjusted_rows_keep_what_the_flush_did_not_name, a_removed_query_that_is_put_again_starts_anew}` |
//! | 39–43 joining, cookies, late clients | `scenarios`, `tests/wire/cookies.rs` |
//! | 44 replica behind or older | group `simulation`; `tests/sync/replica.rs` |
//! | 45 schema problems | `core/src/client_schema.rs`, `tests/wire/client_schema.rs` |
//! | 46 schema, truncation, permissions | `tests/wire/lifecycle.rs`, `tests/replication/resets.rs`, `tests/sync/replica.rs` |
//! | 47–49 custom queries, users | `scenarios`, `tests/wire/named_queries.rs`, `tests/sync/queries.rs` |
//! | 50, 52, 53 replaced sockets, idle groups, drain | `scenarios`, `tests/wire/{groups,lifecycle}.rs` |
//! | 51 TTL in connected time | `scenarios::desired_queries_come_and_go_with_their_ttl_in_connected_time`, `tests/wire/ttl.rs` |
//! | 54 a commit that does not touch a group | `postgres::round_trips`, `tests/wire/pokes.rs` |
//! | 55–58 mutation ids, large integers, parts, deletions | `tests/wire/{mutation_ids,values,pokes,groups}.rs` |
//! | 59 a row that leaves one window of two | `suite::adjusted_rows_keep_what_the_flush_did_not_name`, `simulation` |
//! | 60 a message that fails leaves no trace | `scenarios::the_client_schema_is_needed_kept_and_compared`, `suite::a_poisoned_flush_leaves_no_trace` |
//! | 61 hash of `lmids` | `core/src/cvr/internal.rs` |
//! | 62 tokens nobody judges | `tests/wire/handshake.rs` |
//! | 63 group commit | `postgres::shared::troubles_of_one_group_leave_the_batch_alone`, `postgres::round_trips` |

// All of this is test code; clippy sees tests only in functions marked as such.
#![allow(clippy::unwrap_used, clippy::panic)]

mod kill;
mod lab;
mod postgres;
mod simulation;
mod suite;

use lab::EmbeddedLab;

/// Every property, for `$each!`.
macro_rules! contract {
    ($each:ident) => {
        $each! {
            suite::an_unknown_group_loads_empty,
            suite::the_first_flush_is_never_a_no_op_and_loads_back,
            suite::a_second_flush_without_changes_is_none,
            suite::all_kinds_of_queries_and_desires_load_back,
            suite::of_two_flushes_from_one_base_one_commits,
            suite::a_later_connection_elsewhere_owns_the_group,
            suite::an_earlier_connection_elsewhere_is_taken_over,
            suite::ownership_is_looked_at_before_the_version,
            suite::a_refused_flush_leaves_the_rest_of_its_batch_alone,
            suite::a_poisoned_flush_leaves_no_trace,
            suite::row_lookups_find_live_records_only,
            suite::adjusted_rows_keep_what_the_flush_did_not_name,
            suite::rows_of_a_large_flush_follow_in_order,
            suite::row_catch_up_pages_filters_and_includes_tombstones,
            suite::catch_up_compares_versions_structurally,
            suite::config_catch_up_returns_all_clients_in_range,
            suite::reads_at_another_version_are_refused,
            suite::the_clock_is_written_without_a_flush,
            suite::purging_leaves_tombstones_and_forgets_old_ones,
            suite::desires_of_a_deleted_client_keep_their_query,
            suite::a_removed_query_that_is_put_again_starts_anew,
            suite::the_inspector_counts_rows_per_query,
        }
    };
}
pub(crate) use contract;

mod embedded {
    use super::*;

    macro_rules! test_each {
        ($($module:ident :: $property:ident),* $(,)?) => {
            $(#[test]
            fn $property() {
                $module::$property(&EmbeddedLab::new());
            })*
        };
    }

    contract!(test_each);

    #[test]
    fn clients_converge_on_the_model() {
        simulation::clients_converge_on_the_model(&EmbeddedLab::new());
    }
}
