//! Why a query has no plan.

use crate::schema::{Schema, Unsyncable};
use crate::zql::like::LikeError;

/// Why a query has no plan. The query fails alone (decision 5); the text goes to the client.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CompileError {
    /// A table that cannot be queried.
    #[error("table \"{table}\" cannot be queried: {cause}")]
    UnknownTable {
        /// The table.
        table: String,
        /// Why, and what to do.
        cause: String,
    },
    /// A column that cannot be used.
    #[error("column \"{column}\" of table \"{table}\" cannot be used: {cause}")]
    UnknownColumn {
        /// The table.
        table: String,
        /// The column.
        column: String,
        /// Why, and what to do.
        cause: String,
    },
    /// A comparison that no client can evaluate.
    #[error("table \"{table}\": {cause}")]
    Type {
        /// The table.
        table: String,
        /// What is compared with what, naming the column.
        cause: String,
    },
    /// The identity key of the client schema is no unique key.
    #[error(
        "table \"{table}\": primary key ({columns}) of the client schema does not have a UNIQUE \
         index over NOT NULL columns. Add one upstream, or correct the schema."
    )]
    BadKey {
        /// The table.
        table: String,
        /// The key's columns.
        columns: String,
    },
    /// A parameter that was not bound before.
    #[error(
        "table \"{table}\": the condition on {parameter} is not bound to a value. Parameters \
         work in queries made by clients and in permission rules only."
    )]
    UnboundParameter {
        /// The table.
        table: String,
        /// Anchor and path.
        parameter: String,
    },
    /// A LIKE pattern that can never be matched against.
    #[error("table \"{table}\", column \"{column}\": {cause}: {pattern:?}")]
    BadPattern {
        /// The table.
        table: String,
        /// The column.
        column: String,
        /// The pattern.
        pattern: String,
        /// Why.
        cause: LikeError,
    },
    /// A limit that is no whole number ≥ 0.
    #[error("table \"{table}\": limit {limit} must be a whole number, 0 or more")]
    BadLimit {
        /// The table.
        table: String,
        /// The limit as text.
        limit: String,
    },
    /// A related subquery without a name.
    #[error("table \"{table}\": a related query of table \"{child}\" has no alias")]
    MissingAlias {
        /// The parent table.
        table: String,
        /// The child table.
        child: String,
    },
    /// A correlation of unequal or no columns.
    #[error(
        "table \"{table}\": the correlation with \"{child}\" needs as many columns on both sides, at least one"
    )]
    BadCorrelation {
        /// The parent table.
        table: String,
        /// The child table.
        child: String,
    },
    /// The query is larger than the server accepts.
    #[error("the query has more than {bound} {what}. Split it, or make it smaller.")]
    TooLarge {
        /// Of what.
        what: &'static str,
        /// The bound.
        bound: usize,
    },
}

impl CompileError {
    pub(super) fn table(schema: &Schema, table: &str) -> CompileError {
        let cause = match schema.unsyncable.get(table) {
            None => "the replica has no such table. Is it part of the publication, and the name \
                     the server's?"
                .to_owned(),
            Some(Unsyncable::NoKey) => "it has no primary key. Add one, or a unique index on NOT \
                                        NULL columns."
                .to_owned(),
            Some(Unsyncable::UnsupportedKeyColumns(columns)) => {
                let list: Vec<String> =
                    columns.iter().map(|(c, t)| format!("\"{c}\" ({t})")).collect();
                format!("its primary key uses types that cannot be synced: {}", list.join(", "))
            }
        };
        CompileError::UnknownTable { table: table.to_owned(), cause }
    }

    pub(super) fn column(schema: &Schema, table: &str, column: &str) -> CompileError {
        let cause = match schema.invisible_columns.get(&(table.into(), column.into())) {
            None => "the table has no such column".to_owned(),
            Some(upstream_type) => format!("its type {upstream_type} cannot be synced"),
        };
        CompileError::UnknownColumn { table: table.to_owned(), column: column.to_owned(), cause }
    }
}
