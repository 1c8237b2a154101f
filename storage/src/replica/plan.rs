//! How the writer reaches the rows of a table: statements and the mapping from a relation of the
//! stream to the columns of the file. Made once per relation, not per row.

use std::collections::BTreeMap;
use std::sync::Arc;

use zeroring_core::change::message::{Relation, ReplicaIdentity};
use zeroring_core::schema::TableSpec;

use super::ReplicaError;
use super::schema::{Affinity, StoredSchema, StoredTable, VERSION_COLUMN, quote_ident};

/// Names under which SQLite shows the rowid, unless a column takes them.
const ROWID_NAMES: [&str; 3] = ["rowid", "_rowid_", "oid"];

/// A table of the file: visible columns first, so that a row decodes from consecutive results.
/// "Position" below is a position in `columns`.
#[derive(Debug)]
pub(super) struct TablePlan {
    pub(super) name: Arc<str>,
    /// The table as clients see it.
    pub(super) spec: Option<Arc<TableSpec>>,
    pub(super) columns: Vec<PlanColumn>,
    /// Unique indexes, by position.
    pub(super) unique: Vec<UniqueIndex>,
    /// The name that reaches the rowid.
    pub(super) rowid: &'static str,
    pub(super) select_by_rowid: String,
    pub(super) delete_by_rowid: String,
    pub(super) delete_all: String,
}

#[derive(Debug)]
pub(super) struct PlanColumn {
    pub(super) name: Arc<str>,
    pub(super) affinity: Affinity,
}

#[derive(Debug)]
pub(super) struct UniqueIndex {
    pub(super) columns: Vec<usize>,
    pub(super) select: String,
}

impl TablePlan {
    pub(super) fn new(table: &StoredTable) -> Result<TablePlan, ReplicaError> {
        let rowid = ROWID_NAMES
            .into_iter()
            .find(|r| !table.columns.iter().any(|c| c.name.eq_ignore_ascii_case(r)))
            .ok_or_else(|| ReplicaError::SchemaMismatch {
                table: table.name.to_string(),
                problem: "columns named rowid, _rowid_ and oid together hide SQLite's row number"
                    .to_owned(),
            })?;
        // Visible columns in the order of the spec; it is a subsequence of the stored order.
        let visible = |name: &str| table.spec.as_ref().is_some_and(|s| s.column(name).is_some());
        let (shown, hidden): (Vec<usize>, Vec<usize>) =
            (0..table.columns.len()).partition(|&c| visible(&table.columns[c].name));
        let order: Vec<usize> = shown.into_iter().chain(hidden).collect();
        let columns: Vec<PlanColumn> = order
            .iter()
            .map(|&c| &table.columns[c])
            .map(|c| PlanColumn { name: c.name.clone(), affinity: c.affinity })
            .collect();
        let mut plan = TablePlan {
            name: table.name.clone(),
            spec: table.spec.clone(),
            columns,
            unique: Vec::new(),
            rowid,
            select_by_rowid: String::new(),
            delete_by_rowid: format!("DELETE FROM {} WHERE {rowid} = ?", quote_ident(&table.name)),
            delete_all: format!("DELETE FROM {}", quote_ident(&table.name)),
        };
        plan.select_by_rowid = format!("{} WHERE {rowid} = ?", plan.select_all());
        for index in &table.unique_indexes {
            let columns: Vec<usize> =
                index.iter().filter_map(|i| order.iter().position(|o| o == i)).collect();
            let select = plan.select_where(&columns, "=");
            plan.unique.push(UniqueIndex { columns, select });
        }
        Ok(plan)
    }

    /// `SELECT rowid, version, columns… FROM table`.
    fn select_all(&self) -> String {
        let mut sql = format!("SELECT {}, {}", self.rowid, quote_ident(VERSION_COLUMN));
        for column in &self.columns {
            sql.push(',');
            sql.push_str(&quote_ident(&column.name));
        }
        sql.push_str(" FROM ");
        sql.push_str(&quote_ident(&self.name));
        sql
    }

    /// [`TablePlan::select_all`] where `columns` compare with parameters in their order.
    fn select_where(&self, columns: &[usize], operator: &str) -> String {
        let conditions: Vec<String> = columns
            .iter()
            .map(|&c| format!("{} {operator} ?", quote_ident(&self.columns[c].name)))
            .collect();
        format!("{} WHERE {}", self.select_all(), conditions.join(" AND "))
    }

    /// `INSERT` of the given columns, then the version.
    pub(super) fn insert(&self, columns: &[usize]) -> String {
        let mut names: Vec<String> =
            columns.iter().map(|&c| quote_ident(&self.columns[c].name)).collect();
        names.push(quote_ident(VERSION_COLUMN));
        format!(
            "INSERT INTO {} ({}) VALUES ({})",
            quote_ident(&self.name),
            names.join(","),
            vec!["?"; names.len()].join(",")
        )
    }

    /// `UPDATE` of the given columns and the version, by rowid.
    pub(super) fn update(&self, columns: &[usize]) -> String {
        let mut sets: Vec<String> = columns
            .iter()
            .map(|&c| format!("{} = ?", quote_ident(&self.columns[c].name)))
            .collect();
        sets.push(format!("{} = ?", quote_ident(VERSION_COLUMN)));
        format!(
            "UPDATE {} SET {} WHERE {} = ?",
            quote_ident(&self.name),
            sets.join(","),
            self.rowid
        )
    }
}

/// How old rows of a relation are found.
#[derive(Debug)]
pub(super) enum RowKey {
    /// By these relation columns, in the order of their names (that of the change log's keys).
    Columns {
        relation_columns: Vec<usize>,
        select: String,
        /// The start of each `"name":` in the change log's JSON.
        json_names: Vec<String>,
    },
    /// The table has no usable key, but Postgres sends whole old rows: by all columns.
    WholeRow,
    /// Rows can only be inserted.
    None,
}

/// A relation of the stream, mapped to a table of the file.
#[derive(Debug)]
pub(super) struct RelationPlan {
    pub(super) relation: Arc<Relation>,
    pub(super) table: Arc<TablePlan>,
    /// Relation column → position.
    pub(super) positions: Vec<usize>,
    pub(super) key: RowKey,
    /// Finds a row by all columns of the relation.
    pub(super) select_whole_row: String,
    /// Inserts all columns of the relation.
    pub(super) insert_all: String,
}

impl RelationPlan {
    pub(super) fn new(
        relation: Arc<Relation>,
        table: Arc<TablePlan>,
    ) -> Result<RelationPlan, ReplicaError> {
        let mut positions = Vec::with_capacity(relation.columns.len());
        for column in &relation.columns {
            let found = table.columns.iter().position(|c| *c.name == column.name);
            positions.push(found.ok_or_else(|| ReplicaError::SchemaMismatch {
                table: table.name.to_string(),
                problem: format!("column \"{}\" is not in the replica", column.name),
            })?);
        }
        let mut keys: Vec<usize> = match relation.identity {
            // Postgres flags all columns of a FULL relation as key; its rows are named by the key
            // that clients use.
            ReplicaIdentity::Full => match &table.spec {
                Some(spec) => spec
                    .primary_key
                    .iter()
                    .filter_map(|p| positions.iter().position(|q| q == p))
                    .collect(),
                None => Vec::new(),
            },
            ReplicaIdentity::Nothing => Vec::new(),
            ReplicaIdentity::Default | ReplicaIdentity::Index => {
                (0..positions.len()).filter(|&c| relation.columns[c].is_key).collect()
            }
        };
        keys.sort_by(|a, b| relation.columns[*a].name.cmp(&relation.columns[*b].name));
        let key = if !keys.is_empty() {
            let at: Vec<usize> = keys.iter().map(|&k| positions[k]).collect();
            RowKey::Columns {
                select: table.select_where(&at, "="),
                json_names: keys.iter().map(|&k| json_text(&relation.columns[k].name)).collect(),
                relation_columns: keys,
            }
        } else if relation.identity == ReplicaIdentity::Full && !positions.is_empty() {
            RowKey::WholeRow
        } else {
            RowKey::None
        };
        let insert_all = table.insert(&positions);
        let select_whole_row = table.select_where(&positions, "IS") + " LIMIT 1";
        Ok(RelationPlan { relation, table, positions, key, select_whole_row, insert_all })
    }
}

/// JSON string literal, as JavaScript writes it.
pub(super) fn json_text(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

/// All plans of a replica. Tables are planned when they are first named.
#[derive(Debug, Default)]
pub(super) struct Plans {
    tables: BTreeMap<Arc<str>, Arc<TablePlan>>,
    /// By table OID.
    relations: hashbrown::HashMap<u32, Arc<RelationPlan>>,
}

impl Plans {
    /// The plan of a relation; a new description of it makes a new plan.
    pub(super) fn relation(
        &mut self,
        relation: &Arc<Relation>,
        schema: &StoredSchema,
    ) -> Result<Arc<RelationPlan>, ReplicaError> {
        if let Some(plan) = self.relations.get(&relation.oid)
            && (Arc::ptr_eq(&plan.relation, relation) || plan.relation == *relation)
        {
            return Ok(plan.clone());
        }
        let table = self.table(&relation.lite_name(), schema)?;
        let plan = Arc::new(RelationPlan::new(relation.clone(), table)?);
        self.relations.insert(relation.oid, plan.clone());
        Ok(plan)
    }

    fn table(&mut self, name: &str, schema: &StoredSchema) -> Result<Arc<TablePlan>, ReplicaError> {
        if let Some(plan) = self.tables.get(name) {
            return Ok(plan.clone());
        }
        let stored = schema.tables.get(name).ok_or_else(|| ReplicaError::SchemaMismatch {
            table: name.to_owned(),
            problem: "it is not in the replica".to_owned(),
        })?;
        let plan = Arc::new(TablePlan::new(stored)?);
        self.tables.insert(stored.name.clone(), plan.clone());
        Ok(plan)
    }
}
