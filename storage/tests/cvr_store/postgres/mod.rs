//! The store on Postgres: the common contract, and what is its own.

mod cost;
mod follow;
mod held;
mod interop;
mod lab;
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

#[test]
fn clients_converge_on_the_model() {
    let postgres = fast_server();
    let mut lab = PostgresLab::new(&postgres, "simulation");
    lab.config.max_connections = 8;
    simulation::clients_converge_on_the_model(&lab);
}
