//! Checks of publications and tables, and replica identities (spec: replication §1.4, §1.5).

use std::collections::{BTreeMap, BTreeSet};

use tracing::{info, warn};
use zeroring_core::change::published::{PublishedSchema, PublishedTable};
use zeroring_net::pg::{Client, quote_ident};

use super::UpstreamError;
use crate::replication::published::{indexes_of, not_null, read_published_schema};
use crate::replication::types::TypeCatalog;

/// A column that the replica adds to every table.
const VERSION_COLUMN: &str = "_0_version";

/// Every publication must publish all kinds of changes, and a table that is in several must have
/// the same columns in all.
///
/// # Errors
/// [`UpstreamError::Invalid`] naming the publication.
pub fn check_publications(
    client: &mut Client,
    publications: &[String],
) -> Result<(), UpstreamError> {
    let rows = client.query(
        "SELECT pubname::text, pubinsert AND pubupdate AND pubdelete AND pubtruncate
         FROM pg_catalog.pg_publication WHERE pubname = ANY($1::text[])",
        &[publications.into()],
    )?;
    for row in rows {
        if !row.get::<bool>(1)? {
            return Err(UpstreamError::Invalid(format!(
                "publication {} must publish insert, update, delete and truncate. Run: ALTER \
                 PUBLICATION {} SET (publish = 'insert, update, delete, truncate')",
                row.get::<&str>(0)?,
                quote_ident(row.get(0)?)
            )));
        }
    }
    let rows = client.query(
        "SELECT schemaname::text, tablename::text, pubname::text, attnames::text[]
         FROM pg_catalog.pg_publication_tables WHERE pubname = ANY($1::text[])
         ORDER BY pubname",
        &[publications.into()],
    )?;
    let mut seen: BTreeMap<(String, String), (String, BTreeSet<String>)> = BTreeMap::new();
    for row in rows {
        let table = (row.get(0)?, row.get(1)?);
        let publication: String = row.get(2)?;
        let columns: BTreeSet<String> = row.get::<Vec<String>>(3)?.into_iter().collect();
        match seen.get(&table) {
            Some((other, known)) if *known != columns => {
                return Err(UpstreamError::Invalid(format!(
                    "table {}.{} is published with different columns by {other} and {publication}. \
                     Make the column lists equal",
                    table.0, table.1
                )));
            }
            Some(_) => {}
            None => {
                seen.insert(table, (publication, columns));
            }
        }
    }
    Ok(())
}

fn is_name(name: &str, also: &str) -> bool {
    let mut bytes = name.bytes();
    // Digits may not come first, nor may "-" or ".".
    bytes.next().is_some_and(|b| b.is_ascii_alphabetic() || b == b'_')
        && bytes.all(|b| b.is_ascii_alphanumeric() || b == b'_' || also.as_bytes().contains(&b))
}

/// Checks every table of a schema.
///
/// # Errors
/// [`UpstreamError::Invalid`] naming the first table that cannot be replicated, and the fix.
pub fn check_tables(schema: &PublishedSchema) -> Result<(), UpstreamError> {
    for table in &schema.tables {
        if let Err(problem) = check_table(table, schema) {
            return Err(UpstreamError::Invalid(format!(
                "table {}.{} cannot be replicated: {problem}",
                table.schema, table.name
            )));
        }
        if table.primary_key.is_empty() && table.replica_identity == "d" {
            warn!(
                "table {}.{} has no primary key: its inserts are replicated, but clients cannot \
                 have it, and updates and deletes fail upstream. Add a primary key, or a unique \
                 index on NOT NULL columns",
                table.schema, table.name
            );
        }
    }
    Ok(())
}

fn check_table(table: &PublishedTable, schema: &PublishedSchema) -> Result<(), String> {
    if table.columns.contains_key(VERSION_COLUMN) {
        return Err(format!("its column {VERSION_COLUMN:?} has a reserved name. Rename it"));
    }
    match table.replica_identity.as_str() {
        "n" => {
            return Err("its REPLICA IDENTITY is NOTHING. Run: ALTER TABLE … REPLICA IDENTITY \
                        DEFAULT"
                .into());
        }
        "i" if !indexes_of(table, schema).any(|i| i.is_replica_identity == Some(true)) => {
            return Err(
                "its REPLICA IDENTITY index is not published. Publish all its columns, or \
                        choose another identity"
                    .into(),
            );
        }
        _ => {}
    }
    if !is_name(&table.name, "-") {
        return Err("its name must consist of letters, digits, \"_\" and \"-\", and begin with a \
                    letter or \"_\""
            .into());
    }
    match table.columns.keys().find(|c| !is_name(c, ".-")) {
        None => Ok(()),
        Some(column) => Err(format!(
            "the name of its column {column:?} must consist of letters, digits, \"_\", \".\" and \
             \"-\", and begin with a letter or \"_\""
        )),
    }
}

/// Gives tables without a primary key, but with a usable unique index, that index as identity, so
/// that their updates and deletes can be replicated. Returns how many were changed.
///
/// # Errors
/// The server refused.
pub fn set_replica_identities(
    client: &mut Client,
    publications: &[String],
    server_version: u32,
) -> Result<usize, UpstreamError> {
    let mut catalog = TypeCatalog::default();
    let schema = read_published_schema(client, &mut catalog, publications, server_version)?;
    let mut changed = 0;
    for table in &schema.tables {
        let Some(index) = identity_index(table, &schema) else { continue };
        info!("using index {index} as the replica identity of {}.{}", table.schema, table.name);
        client.batch_execute(&format!(
            "ALTER TABLE {}.{} REPLICA IDENTITY USING INDEX {}",
            quote_ident(&table.schema),
            quote_ident(&table.name),
            quote_ident(index)
        ))?;
        changed += 1;
    }
    Ok(changed)
}

/// The index that should become the identity of a table; `None` if it has one or there is none.
fn identity_index<'s>(table: &'s PublishedTable, schema: &'s PublishedSchema) -> Option<&'s str> {
    if !table.primary_key.is_empty() || table.replica_identity != "d" {
        return None;
    }
    indexes_of(table, schema)
        .find(|i| i.unique && i.is_immediate != Some(false) && not_null(table, i))
        .map(|i| i.name.as_str())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        for (name, also, good) in [
            ("a", "-", true),
            ("_a-1", "-", true),
            ("-a", "-", false),
            ("10", "-", false),
            ("a.b", "-", false),
            ("a.b", ".-", true),
            ("ä", ".-", false),
            ("", "-", false),
            ("a b", ".-", false),
        ] {
            assert_eq!(is_name(name, also), good, "{name}");
        }
    }
}
