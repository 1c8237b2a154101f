//! The data of the benches: items of projects, as table spec, published table and rows.

use std::sync::Arc;

use serde_json::json;
use zeroring_core::change::message::LiteValue;
use zeroring_core::change::published::{
    PublishedColumn, PublishedIndex, PublishedSchema, PublishedTable,
};
use zeroring_core::row::{Row, RowRef};
use zeroring_core::schema::{ColumnSpec, TableId, TableSpec, UniqueKey, ValueType};
use zeroring_core::value::Value;
use zeroring_core::version::StateVersion;

/// Items of each project.
pub(crate) const ITEMS: usize = 50;

/// (name, Postgres type, ZQL type)
pub(crate) const COLUMNS: [(&str, &str, ValueType); 5] = [
    ("id", "text", ValueType::String),
    ("project_id", "text", ValueType::String),
    ("rank", "int4", ValueType::Number),
    ("title", "text", ValueType::String),
    ("body", "text", ValueType::String),
];

/// The table, as the engine knows it.
pub(crate) fn table() -> Arc<TableSpec> {
    Arc::new(TableSpec {
        id: TableId(0),
        name: "item".into(),
        columns: COLUMNS
            .iter()
            .map(|(name, upstream, kind)| ColumnSpec {
                name: (*name).into(),
                value_type: *kind,
                nullable: false,
                upstream_type: (*upstream).into(),
            })
            .collect(),
        primary_key: vec![0],
        replica_key: vec![0],
        unique_keys: vec![UniqueKey { columns: vec![0], not_null: true }],
        min_row_version: StateVersion::zero(),
        indexes: vec![],
    })
}

/// Item `n`: of project `n / ITEMS`.
pub(crate) fn row(n: usize, rank: i32, version: &StateVersion) -> RowRef {
    let values = [
        Value::string(format!("item-{n}")),
        Value::string(format!("p{}", n / ITEMS)),
        Value::Number(f64::from(rank)),
        Value::string(format!("Item \"{n}\" of a project")),
        Value::string("some text of an item, as long as such texts are on the average of them"),
    ];
    Row::new(version.clone(), values)
}

/// The same as cells of the replica.
pub(crate) fn cells(n: usize, rank: i32) -> Vec<LiteValue> {
    vec![
        LiteValue::Text(format!("item-{n}").into()),
        LiteValue::Text(format!("p{}", n / ITEMS).into()),
        LiteValue::Integer(i64::from(rank)),
        LiteValue::Text(format!("Item \"{n}\" of a project").into()),
        LiteValue::Text("some text of an item, as long as such texts are on the average".into()),
    ]
}

/// The table, as Postgres publishes it.
pub(crate) fn published() -> PublishedSchema {
    let columns = COLUMNS.iter().enumerate().map(|(i, (name, data_type, _))| {
        let column = PublishedColumn {
            pos: i as i32 + 1,
            pg_type_class: Some("b".to_owned()),
            elem_pg_type_class: None,
            type_oid: 0,
            character_maximum_length: None,
            not_null: Some(true),
            dflt: None,
            data_type: (*data_type).to_owned(),
        };
        ((*name).to_owned(), column)
    });
    let table = PublishedTable {
        oid: 16_384,
        schema: "public".to_owned(),
        schema_oid: 2200,
        name: "item".to_owned(),
        replica_identity: "d".to_owned(),
        columns: columns.collect(),
        primary_key: vec!["id".to_owned()],
        publications: Default::default(),
    };
    let index = |name: &str, unique: bool, column: &str| PublishedIndex {
        schema: "public".to_owned(),
        table_name: "item".to_owned(),
        name: name.to_owned(),
        unique,
        is_primary_key: Some(unique),
        is_replica_identity: None,
        is_immediate: Some(true),
        columns: [(column.to_owned(), json!("ASC"))].into_iter().collect(),
    };
    let indexes = vec![index("item_pkey", true, "id"), index("item_project", false, "project_id")];
    PublishedSchema { tables: vec![table], indexes }
}

/// The same with an index for windows: the highest ranks first.
pub(crate) fn published_by_rank() -> PublishedSchema {
    let mut schema = published();
    let mut index = schema.indexes[1].clone();
    index.name = "item_rank".to_owned();
    index.columns =
        [("rank".to_owned(), json!("DESC")), ("id".to_owned(), json!("ASC"))].into_iter().collect();
    schema.indexes.push(index);
    schema
}
