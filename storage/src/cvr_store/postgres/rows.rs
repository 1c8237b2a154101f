//! Rows that follow: one transaction for several groups, unconditional (spec: view-syncer-cvr §2.7).
//!
//! Of a large flush, only a few megabytes of statements exist at a time. Running it twice does what
//! running it once does.

use zeroring_core::cvr::ClientGroupId;
use zeroring_net::pg::{Client, Param, PgError};

use super::super::owed::Part;
use super::batch::{CHUNK_ROWS, RowTables, Statement, live_rows, send};
use super::params::Records;
use super::session::Shared;

/// Statements that are made before they are sent: some 8 MB with full chunks.
const STATEMENTS: usize = 8;

/// Writes what is owed of these groups; returns how many rows should have been live and were not.
///
/// # Errors
/// Nothing was written, or (a lost connection) perhaps all of it.
pub(super) fn write(
    client: &mut Client,
    shared: &Shared,
    owed: &[(ClientGroupId, Vec<Part>)],
) -> Result<usize, PgError> {
    let sql = &shared.sql;
    let ids = Param::array(owed.iter().map(|(group, _)| Some(group.as_str())));
    let mut versions = Records::<2>::new();
    for (group, parts) in owed {
        if let Some(last) = parts.last() {
            versions.push([group.as_str().into(), last.version.cookie().into()]);
        }
    }
    let limits = vec![shared.idle_in_transaction.as_str().into(), "10s".into()];
    // First of all the groups' `rowsVersion`: whoever holds it writes their rows.
    let mut out = vec![
        Statement::plain("BEGIN ISOLATION LEVEL READ COMMITTED", Vec::new()),
        Statement::plain(&sql.limits, limits),
        Statement::plain(&sql.rows_follow, vec![ids]),
        Statement::plain(&sql.rows_version, versions.take().collect()),
    ];
    let (mut expected, mut found) = (0, 0);
    let mut tables = RowTables::default();
    // A row may be in several flushes of a group, but only once in each.
    let turns = owed.iter().map(|(_, parts)| parts.len()).max().unwrap_or(0);
    for turn in 0..turns {
        for (group, parts) in owed {
            for row in parts.get(turn).map_or(&[][..], |part| &part.rows) {
                expected += tables.add(group.as_str(), row);
                tables.emit(shared, CHUNK_ROWS, &mut out);
                if out.len() >= STATEMENTS {
                    found += live_rows(&out, &send(client, shared, &out)?)?;
                    out.clear();
                }
            }
        }
        tables.emit(shared, 1, &mut out);
    }
    out.push(Statement::plain("COMMIT", Vec::new()));
    found += live_rows(&out, &send(client, shared, &out)?)?;
    Ok(usize::saturating_sub(expected, found))
}
