//! The store on Postgres: the common contract, and what is its own.

mod cost;
mod follow;
mod held;
mod interop;
mod lab;
mod migrations;
mod outage;
mod plans;
mod pooler;
mod proxy;
mod round_trips;
mod schema;
mod settings;
mod shared;

use lab::{PostgresLab, fast_server, server};

use crate::{contract, simulation, suite};

/// Each property in a schema of its own, on one Postgres; a failure names its property.
#[test]
fn the_contract_holds() {
    let postgres = server();
    macro_rules! run_each {
        ($($module:ident :: $property:ident),* $(,)?) => {
            std::thread::scope(|scope| {
                let runs = [$((stringify!($property), scope.spawn(|| {
                    $module::$property(&PostgresLab::new(&postgres, stringify!($property)));
                }))),*];
                let failed: Vec<_> =
                    runs.into_iter().filter_map(|(name, run)| run.join().err().map(|_| name)).collect();
                assert!(failed.is_empty(), "{failed:?}");
            });
        };
    }
    contract!(run_each);
}

/// Versions sort otherwise there than their texts do in C, and groups do so, too.
#[test]
fn another_collation_changes_nothing() {
    let postgres = server();
    let lab = PostgresLab::new(&postgres, "zero");
    let create = "CREATE DATABASE sorted TEMPLATE template0 LOCALE_PROVIDER icu ICU_LOCALE 'en-US'";
    lab.client().batch_execute(create).unwrap();
    let in_it = |app: &str| {
        let mut lab = PostgresLab::new(&postgres, app);
        lab.config.connection = zeroring_net::pg::PgConfig::parse(&postgres.url("sorted")).unwrap();
        lab
    };
    let order = "SELECT '3abc:01' < '3abc.01', 'a' < 'B'";
    assert_eq!(in_it("order").values(order), [["t", "t"]], "not as in C");
    suite::catch_up_compares_versions_structurally(&in_it("structure"));
    suite::row_catch_up_pages_filters_and_includes_tombstones(&in_it("rows"));
    suite::config_catch_up_returns_all_clients_in_range(&in_it("config"));
    suite::row_lookups_find_live_records_only(&in_it("lookups"));
    suite::rows_of_a_large_flush_follow_in_order(&in_it("large"));
    suite::purging_leaves_tombstones_and_forgets_old_ones(&in_it("purge"));
}

#[test]
fn clients_converge_on_the_model() {
    let postgres = fast_server();
    let mut lab = PostgresLab::new(&postgres, "simulation");
    lab.config.max_connections = 8;
    simulation::clients_converge_on_the_model(&lab);
}
