//! What every CVR store must do, run against each of them: contract (`suite`), agreement of
//! updaters and store with a plain model under random operations (`simulation`), and, for the
//! embedded store, survival of `kill -9` (`kill`); for Postgres see `postgres`.

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
            suite::row_catch_up_pages_filters_and_includes_tombstones,
            suite::catch_up_compares_versions_structurally,
            suite::config_catch_up_returns_all_clients_in_range,
            suite::reads_at_another_version_are_refused,
            suite::the_clock_is_written_without_a_flush,
            suite::purging_leaves_tombstones_and_forgets_old_ones,
            suite::desires_of_a_deleted_client_keep_their_query,
            suite::a_removed_query_that_is_put_again_starts_anew,
            suite::the_inspector_counts_rows_per_query,
            simulation::clients_converge_on_the_model,
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
}
