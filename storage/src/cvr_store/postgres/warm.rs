//! Warm-up at start (spec: view-syncer-cvr §2.3): the connections that the first requests need are
//! there, and their plans are made. Otherwise all the clients that wait for a new server pay for
//! them, at the worst moment.

use std::time::{Duration, Instant};

use tracing::{debug, warn};
use zeroring_net::pg::{Client, Param, PgError};

use super::queue::Lane;
use super::session::{Session, Shared};
use super::sql::Sql;
use super::write::{snapshot, transaction};

/// Connections for reads that are made at start; with one for flushes and one for rows there are
/// five at most.
const WARM_READERS: usize = 3;

/// Timed round trips.
const PINGS: u32 = 5;

/// Above this, every change of a group costs its clients noticeable time.
const FAR: Duration = Duration::from_millis(10);

/// Whether the connection of the `n`th worker of these lanes is made at start; the others are when
/// they are needed.
pub(super) fn is_needed_at_start(lanes: &[Lane], n: usize) -> bool {
    match lanes {
        [Lane::Slow] => false,
        [Lane::Read] => n < WARM_READERS,
        _ => n == 0,
    }
}

/// Looks how far away the database is.
///
/// # Errors
/// The connection is lost.
pub(super) fn ping(client: &mut Client) -> Result<Duration, PgError> {
    let began = Instant::now();
    for _ in 0..PINGS {
        client.batch_execute("SELECT 1")?;
    }
    let average = began.elapsed() / PINGS;
    if average >= FAR {
        warn!(
            ms = average.as_millis(),
            "the CVR database is far away: every change of a client group waits for it"
        );
    }
    Ok(average)
}

/// Connects, and has the statements of these lanes planned by running them for no group. That it
/// failed is told to whoever asks something next.
pub(super) fn up(session: &mut Session, lanes: &[Lane]) {
    let shared = session.shared.clone();
    for lane in lanes {
        let done = session.run(|client, _| plan(client, &shared, *lane));
        if let Err(error) = done {
            debug!(?lane, %error, "a connection to the CVR database was not warmed up");
        }
    }
}

fn plan(client: &mut Client, shared: &Shared, lane: Lane) -> Result<(), PgError> {
    let statements = statements(&shared.sql, lane);
    let params: Vec<_> = statements.iter().map(|sql| for_nobody(sql)).collect();
    let all: Vec<(&str, &[Param])> =
        statements.iter().zip(&params).map(|(sql, params)| (*sql, &params[..])).collect();
    match lane {
        Lane::Read => snapshot(client, shared, &all).map(drop),
        Lane::Flush | Lane::Rows => transaction(client, shared, &all).map(drop),
        Lane::Slow => Ok(()),
    }
}

/// What a lane asks for most, in an order in which it could.
fn statements(sql: &Sql, lane: Lane) -> Vec<&str> {
    let Sql { put_rows, bury_rows, adjust_rows, delete_rows, rows_version, .. } = sql;
    let rows: [&str; 5] = [rows_version, put_rows, bury_rows, adjust_rows, delete_rows];
    let mut all: Vec<&str> = Vec::new();
    match lane {
        Lane::Flush => {
            all.extend([&*sql.stubs, &sql.gate_skip, &sql.instances, &sql.insert_clients]);
            all.extend([&*sql.queries, &sql.update_queries, &sql.desires]);
            all.extend(rows);
        }
        Lane::Rows => {
            all.push(&sql.rows_follow);
            all.extend(rows);
        }
        Lane::Read => {
            all.extend([&*sql.load_instances, &sql.load_clients, &sql.load_queries]);
            all.extend([&*sql.load_desires, &sql.versions, &sql.rows_of_queries, &sql.rows_by_key]);
            all.extend([&*sql.catchup_rows, &sql.catchup_queries, &sql.catchup_desires]);
        }
        Lane::Slow => {}
    }
    all
}

/// Parameters of a statement, all of which it casts, that mean no record.
fn for_nobody(sql: &str) -> Vec<Param> {
    let of_type = |ty: &str| match ty {
        "bool" => "f",
        "int8" | "float8" => "0",
        // Arrays, objects, and texts that are taken for either.
        _ => "{}",
    };
    let word = |c: char| !c.is_ascii_alphanumeric();
    let ty = |n: usize| {
        let (_, rest) = sql.split_once(&format!("${n}::"))?;
        let end = rest.find(word).unwrap_or(rest.len());
        Some(if rest[end..].starts_with("[]") { "[]" } else { &rest[..end] })
    };
    (1..).map_while(ty).map(|ty| Param::from(of_type(ty))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_parameter_has_a_value() {
        let sql = Sql::new("a_0/cvr");
        for lane in [Lane::Flush, Lane::Rows, Lane::Read] {
            for statement in statements(&sql, lane) {
                let params = for_nobody(statement);
                assert!(!params.is_empty(), "{statement}");
                let next = format!("${}", params.len() + 1);
                assert!(!statement.contains(&next), "{next} has no type in {statement}");
            }
        }
        let params = for_nobody("SELECT $1::text[], $3::int8, $2::bool, $1");
        let values: Vec<_> = params.iter().map(|p| p.value.as_deref().unwrap()).collect();
        assert_eq!(values, [&b"{}"[..], b"f", b"0"]);
    }
}
