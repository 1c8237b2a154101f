//! The data that scenarios are made of: projects, their items, the items' comments. Every table
//! has the key `id` and a column `sent_us`, in which a write carries its intended time.

use std::collections::BTreeMap;

use postgres::Client;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::client::connection::Ask;
use crate::error::LoadError;
use crate::models::{Model, SHAPES, Tables};

const TABLES: Tables = &[
    ("project", &[("id", "string"), ("name", "string"), ("sent_us", "number")]),
    (
        "item",
        &[
            ("id", "string"),
            ("project_id", "string"),
            ("owner", "string"),
            ("status", "string"),
            ("rank", "number"),
            ("title", "string"),
            ("body", "string"),
            ("sent_us", "number"),
        ],
    ),
    (
        "comment",
        &[
            ("id", "string"),
            ("item_id", "string"),
            ("author", "string"),
            ("body", "string"),
            ("sent_us", "number"),
        ],
    ),
];

/// How many people own items and write comments.
pub(crate) const PEOPLE: usize = 50;

/// How much data there is.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct DataSize {
    pub(crate) projects: usize,
    /// In each project.
    pub(crate) items: usize,
    /// On each item.
    #[serde(default)]
    pub(crate) comments: usize,
    /// Length of an item's text.
    #[serde(default = "default_body")]
    pub(crate) body_bytes: usize,
    /// What it is of. For other models, `projects` are their partitions, `items` the parents in
    /// each, `comments` the children of each parent.
    #[serde(default)]
    pub(crate) model: Model,
    /// Partitions that groups watch; all if absent. The others get writes that nobody sees.
    #[serde(default)]
    pub(crate) watched: Option<usize>,
}

impl DataSize {
    /// Partitions that groups are spread over.
    pub(crate) fn watched(&self) -> usize {
        self.watched.unwrap_or(self.projects).clamp(1, self.projects.max(1))
    }

    fn tables(&self) -> Tables {
        self.model.tables().unwrap_or(TABLES)
    }
}

fn default_body() -> usize {
    100
}

/// What a client sees as its schema.
pub(crate) fn client_schema(size: &DataSize) -> Value {
    let tables: serde_json::Map<String, Value> = size
        .tables()
        .iter()
        .map(|(table, columns)| {
            let columns: serde_json::Map<String, Value> = columns
                .iter()
                .map(|(c, kind)| ((*c).to_owned(), json!({ "type": kind })))
                .collect();
            ((*table).to_owned(), json!({"columns": columns, "primaryKey": ["id"]}))
        })
        .collect();
    json!({ "tables": tables })
}

/// Creates and fills the tables, and lets every client read them (spec: operations §6.2).
pub(crate) fn seed(sql: &mut Client, size: &DataSize) -> Result<(), LoadError> {
    let text = match size.model {
        Model::Projects => projects(size),
        other => other.seed(size),
    };
    sql.batch_execute(&format!(
        "{text}
         ANALYZE;
         CREATE SCHEMA zero;
         CREATE TABLE zero.permissions (permissions JSONB, hash TEXT,
           lock BOOL PRIMARY KEY DEFAULT true CHECK (lock));"
    ))
    .map_err(LoadError::sql("seeding"))?;
    let always = json!({"row": {"select": [["allow", {"type": "and", "conditions": []}]]}});
    let rules: BTreeMap<&str, &Value> = size.tables().iter().map(|(t, _)| (*t, &always)).collect();
    let text = json!({ "tables": rules }).to_string();
    sql.execute(
        "INSERT INTO zero.permissions (permissions, hash) VALUES ($1::text::jsonb, md5($1::text))",
        &[&text],
    )
    .map_err(LoadError::sql("deploying permissions"))?;
    Ok(())
}

fn projects(size: &DataSize) -> String {
    format!(
        "CREATE TABLE project (id TEXT PRIMARY KEY, name TEXT NOT NULL, sent_us BIGINT NOT NULL);
         CREATE TABLE item (id TEXT PRIMARY KEY, project_id TEXT NOT NULL, owner TEXT NOT NULL,
           status TEXT NOT NULL, rank INT NOT NULL, title TEXT NOT NULL, body TEXT NOT NULL,
           sent_us BIGINT NOT NULL);
         CREATE TABLE comment (id TEXT PRIMARY KEY, item_id TEXT NOT NULL, author TEXT NOT NULL,
           body TEXT NOT NULL, sent_us BIGINT NOT NULL);
         INSERT INTO project SELECT 'p' || p, 'Project ' || p, 0
           FROM generate_series(0, {projects} - 1) p;
         INSERT INTO item SELECT 'p' || p || '-i' || i, 'p' || p, 'u' || (p * 7 + i) % {PEOPLE},
             CASE WHEN i % 3 = 0 THEN 'done' ELSE 'open' END, (i * 7919 + p) % 100000,
             'Item ' || i || ' of project ' || p, repeat('x', {body}), 0
           FROM generate_series(0, {projects} - 1) p, generate_series(0, {items} - 1) i;
         INSERT INTO comment SELECT 'p' || p || '-i' || i || '-c' || c, 'p' || p || '-i' || i,
             'u' || (p + i * 3 + c * 11) % {PEOPLE}, 'Comment ' || c, 0
           FROM generate_series(0, {projects} - 1) p, generate_series(0, {items} - 1) i,
                generate_series(0, {comments} - 1) c;
         CREATE INDEX ON item (project_id);
         CREATE INDEX ON comment (item_id);",
        projects = size.projects,
        items = size.items,
        comments = size.comments,
        body = size.body_bytes,
    )
}

/// The shape of a query.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum QueryKind {
    /// The project's row alone.
    Project,
    /// All items of a project.
    Items,
    /// The `limit` items of the highest rank.
    Window,
    /// The items with their comments.
    Related,
    /// The items on which a certain person commented.
    Exists,
    /// Query `shape` of the data's model, with `limit` rows at its top.
    Model,
}

/// Which project a query is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Whose {
    /// Each group has its own (counting on by `offset`).
    Own,
    /// Project `offset`, the same for all groups: one query shared by all.
    Shared,
}

/// One line of a scenario's query mix: every client asks for it.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct QuerySpec {
    pub(crate) kind: QueryKind,
    pub(crate) project: Whose,
    #[serde(default)]
    pub(crate) offset: usize,
    #[serde(default)]
    pub(crate) limit: Option<u32>,
    #[serde(default)]
    pub(crate) shape: usize,
}

/// A query with everything filled in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Query {
    kind: QueryKind,
    project: usize,
    limit: Option<u32>,
    model: Model,
    shape: usize,
}

/// Rows of a table that a query brings: all of them, as SQL.
pub(crate) struct ExpectedRows {
    pub(crate) table: &'static str,
    pub(crate) sql: String,
}

fn equals(column: &str, value: &str) -> Value {
    json!({"type": "simple", "op": "=", "left": {"type": "column", "name": column},
        "right": {"type": "literal", "value": value}})
}

impl QuerySpec {
    /// The query of group `group`.
    pub(crate) fn for_group(&self, group: usize, size: &DataSize) -> Query {
        let project = match self.project {
            Whose::Own => group + self.offset,
            Whose::Shared => self.offset,
        };
        Query {
            kind: self.kind,
            project: project % size.watched(),
            limit: self.limit,
            model: size.model,
            shape: self.shape,
        }
    }

    /// A query of one row or a few, for a first look.
    pub(crate) fn probe(size: &DataSize) -> QuerySpec {
        let plain = size.model == Model::Projects;
        let (kind, limit) =
            if plain { (QueryKind::Project, None) } else { (QueryKind::Model, Some(1)) };
        QuerySpec { kind, project: Whose::Shared, offset: 0, limit, shape: SHAPES - 1 }
    }
}

impl Query {
    /// The same query of another project.
    pub(crate) fn moved_to(&self, project: usize) -> Query {
        Query { project, ..self.clone() }
    }

    /// The key that a client gives it. Opaque to servers (spec: sync-protocol §3.5).
    pub(crate) fn hash(&self) -> String {
        let (kind, limit) = (self.kind, self.limit.unwrap_or(0));
        format!("{kind:?}{}s{}l{limit}", self.project, self.shape).to_lowercase()
    }

    fn author(&self) -> String {
        format!("u{}", self.project % PEOPLE)
    }

    /// Whether the rows of `table` are fully told by [`Query::expected`]. What `EXISTS` rests
    /// upon is up to the server: some of the matching rows.
    pub(crate) fn determines(&self, table: &str) -> bool {
        !(self.kind == QueryKind::Exists && table == "comment")
    }

    pub(crate) fn ask(&self) -> Ask {
        let project = format!("p{}", self.project);
        let comments = |alias: &str| {
            json!({"correlation": {"parentField": ["id"], "childField": ["item_id"]},
                "system": "client",
                "subquery": {"table": "comment", "alias": alias, "orderBy": [["id", "asc"]]}})
        };
        let mut ast = json!({"table": "item", "where": equals("project_id", &project),
            "orderBy": [["id", "asc"]]});
        match self.kind {
            QueryKind::Model => ast = self.model.ast(self.shape, self.project, self.limit),
            QueryKind::Items => {}
            QueryKind::Project => {
                ast = json!({"table": "project", "where": equals("id", &project),
                    "orderBy": [["id", "asc"]]});
            }
            QueryKind::Window => ast["orderBy"] = json!([["rank", "desc"], ["id", "asc"]]),
            QueryKind::Related => ast["related"] = json!([comments("comments")]),
            QueryKind::Exists => {
                let mut related = comments("zsubq_comments");
                related["subquery"]["where"] = equals("author", &self.author());
                let exists =
                    json!({"type": "correlatedSubquery", "op": "EXISTS", "related": related});
                ast["where"] = json!({"type": "and", "conditions": [ast["where"], exists]});
            }
        }
        if let Some(limit) = self.limit.filter(|_| self.kind != QueryKind::Model) {
            ast["limit"] = json!(limit);
        }
        Ask { hash: self.hash(), ast }
    }

    /// The rows that a client with this query holds, as statements that return JSON text.
    pub(crate) fn expected(&self) -> Vec<ExpectedRows> {
        let limit = self.limit.map(|n| format!(" LIMIT {n}")).unwrap_or_default();
        let project = self.project;
        let items = |condition: &str, order: &str| {
            format!(
                "SELECT * FROM item i WHERE project_id = 'p{project}'{condition} \
                 ORDER BY {order}{limit}"
            )
        };
        let rows = |table, inner: String| ExpectedRows {
            table,
            sql: format!("SELECT to_jsonb(t)::text FROM ({inner}) t"),
        };
        match self.kind {
            QueryKind::Model => self.model.expected(self.shape, self.project, self.limit),
            QueryKind::Project => vec![rows(
                "project",
                format!("SELECT * FROM project WHERE id = 'p{project}' ORDER BY id{limit}"),
            )],
            QueryKind::Items => vec![rows("item", items("", "id"))],
            QueryKind::Window => vec![rows("item", items("", "rank DESC, id"))],
            QueryKind::Related => {
                let inner = items("", "id");
                let comments =
                    format!("SELECT * FROM comment WHERE item_id IN (SELECT id FROM ({inner}) x)");
                vec![rows("item", inner), rows("comment", comments)]
            }
            QueryKind::Exists => {
                let condition = format!(
                    " AND EXISTS (SELECT 1 FROM comment c WHERE c.item_id = i.id AND author = '{}')",
                    self.author()
                );
                vec![rows("item", items(&condition, "id"))]
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use zeroring_net::pg::local_server::LocalServer;

    fn of_ten() -> DataSize {
        DataSize {
            projects: 10,
            items: 1,
            comments: 0,
            body_bytes: 1,
            model: Model::Projects,
            watched: None,
        }
    }

    #[test]
    fn the_seeded_data_answers_every_kind_of_query() {
        let server = LocalServer::start(&["fsync=off"]).unwrap();
        let mut sql = Client::connect(&server.url("postgres"), postgres::NoTls).unwrap();
        let size = DataSize { projects: 4, items: 12, comments: 3, body_bytes: 10, ..of_ten() };
        seed(&mut sql, &size).unwrap();
        let mut rows = |kind, limit| -> Vec<usize> {
            let spec = QuerySpec { kind, project: Whose::Own, offset: 1, limit, shape: 0 };
            let query = spec.for_group(2, &size);
            let expected = query.expected();
            expected.iter().map(|e| sql.query(&e.sql, &[]).unwrap().len()).collect()
        };
        assert_eq!(rows(QueryKind::Project, None), [1]);
        assert_eq!(rows(QueryKind::Items, None), [12]);
        assert_eq!(rows(QueryKind::Window, Some(5)), [5]);
        assert_eq!(rows(QueryKind::Related, Some(2)), [2, 6]);
        let some = rows(QueryKind::Exists, None)[0];
        assert!(some > 0 && some < 12, "EXISTS selects {some} of 12");
        let rules = "SELECT permissions->'tables' ? 'comment' FROM zero.permissions";
        assert!(sql.query_one(rules, &[]).unwrap().get::<_, bool>(0));
    }

    #[test]
    fn queries_of_one_project_share_a_hash_and_others_do_not() {
        let spec = |project| QuerySpec {
            kind: QueryKind::Items,
            project,
            offset: 0,
            limit: None,
            shape: 0,
        };
        let hash = |whose, group| spec(whose).for_group(group, &of_ten()).hash();
        assert_eq!(hash(Whose::Shared, 1), hash(Whose::Shared, 2));
        assert_ne!(hash(Whose::Own, 1), hash(Whose::Own, 2));
        assert_eq!(hash(Whose::Own, 1), hash(Whose::Own, 11));
    }
}
