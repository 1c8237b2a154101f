//! Four kinds of applications, as the original's own throughput suite has them (`zero-throughput`:
//! a feed, mail, a forum, a customer list; three queries each, and one kind of write), with tables
//! and texts of our own.
//!
//! Each application is split into partitions: a feed, a mailbox's owner, a forum's category, a
//! company. In the *hot* variant all clients watch the first partition, and every write goes
//! there. In the *realistic* one clients watch a partition each of the first `watched`, and most
//! writes go to the others.

use rand::Rng;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::data_set::{DataSize, ExpectedRows};

/// What the data is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Model {
    /// Projects, items, comments.
    #[default]
    Projects,
    /// Events that are only appended.
    Feed,
    /// Threads and messages of owners.
    Mail,
    /// Categories, topics, posts, people.
    Forum,
    /// Companies, accounts, contacts, activities.
    Customers,
}

/// Queries of each model.
pub(crate) const SHAPES: usize = 3;

/// Other mailboxes, people and the like of a partition.
const ARCHIVED: usize = 32;
const MEMBERS: usize = 24;
const CONTACTS: usize = 4;

/// (table, its columns with their types)
pub(crate) type Tables = &'static [(&'static str, &'static [(&'static str, &'static str)])];

const FEED: Tables = &[(
    "event",
    &[
        ("id", "string"),
        ("part", "string"),
        ("seq", "number"),
        ("body", "string"),
        ("sent_us", "number"),
    ],
)];

const MAIL: Tables = &[
    (
        "thread",
        &[
            ("id", "string"),
            ("part", "string"),
            ("folder", "string"),
            ("subject", "string"),
            ("people", "number"),
            ("seq", "number"),
            ("sent_us", "number"),
        ],
    ),
    (
        "message",
        &[
            ("id", "string"),
            ("part", "string"),
            ("folder", "string"),
            ("thread_id", "string"),
            ("unread", "boolean"),
            ("body", "string"),
            ("seq", "number"),
            ("sent_us", "number"),
        ],
    ),
];

const FORUM: Tables = &[
    ("member", &[("id", "string"), ("name", "string"), ("sent_us", "number")]),
    (
        "category",
        &[("id", "string"), ("title", "string"), ("seq", "number"), ("sent_us", "number")],
    ),
    (
        "topic",
        &[
            ("id", "string"),
            ("part", "string"),
            ("author", "string"),
            ("title", "string"),
            ("seq", "number"),
            ("sent_us", "number"),
        ],
    ),
    (
        "post",
        &[
            ("id", "string"),
            ("part", "string"),
            ("topic_id", "string"),
            ("author", "string"),
            ("body", "string"),
            ("seq", "number"),
            ("sent_us", "number"),
        ],
    ),
];

const CUSTOMERS: Tables = &[
    ("company", &[("id", "string"), ("name", "string"), ("seq", "number"), ("sent_us", "number")]),
    (
        "account",
        &[
            ("id", "string"),
            ("part", "string"),
            ("name", "string"),
            ("seq", "number"),
            ("sent_us", "number"),
        ],
    ),
    (
        "contact",
        &[
            ("id", "string"),
            ("account_id", "string"),
            ("name", "string"),
            ("seq", "number"),
            ("sent_us", "number"),
        ],
    ),
    (
        "activity",
        &[
            ("id", "string"),
            ("part", "string"),
            ("account_id", "string"),
            ("contact_id", "string"),
            ("body", "string"),
            ("seq", "number"),
            ("sent_us", "number"),
        ],
    ),
];

/// A query as a tree: from it come the AST and, as SQL, the rows that it brings.
struct Node {
    table: &'static str,
    /// (column, value)
    filter: Vec<(&'static str, Value)>,
    /// The newest so many; all without.
    limit: Option<u32>,
    /// (field of this, field of the other, other)
    related: Vec<(&'static str, &'static str, Node)>,
}

fn node(table: &'static str, limit: Option<u32>) -> Node {
    Node { table, filter: Vec::new(), limit, related: Vec::new() }
}

impl Node {
    fn with(mut self, column: &'static str, value: impl Into<Value>) -> Node {
        self.filter.push((column, value.into()));
        self
    }

    fn related(mut self, parent: &'static str, child: &'static str, other: Node) -> Node {
        self.related.push((parent, child, other));
        self
    }

    fn ast(&self) -> Value {
        let mut ast = json!({"table": self.table, "orderBy": match self.limit {
            Some(_) => json!([["seq", "desc"], ["id", "asc"]]),
            None => json!([["id", "asc"]]),
        }});
        let conditions: Vec<Value> = self
            .filter
            .iter()
            .map(|(column, value)| {
                json!({"type": "simple", "op": "=", "left": {"type": "column", "name": column},
                    "right": {"type": "literal", "value": value}})
            })
            .collect();
        match conditions.as_slice() {
            [] => {}
            [one] => ast["where"] = one.clone(),
            all => ast["where"] = json!({"type": "and", "conditions": all}),
        }
        if let Some(limit) = self.limit {
            ast["limit"] = json!(limit);
        }
        let related: Vec<Value> = self
            .related
            .iter()
            .enumerate()
            .map(|(nth, (parent, child, other))| {
                let mut subquery = other.ast();
                subquery["alias"] = json!(format!("{}{nth}", other.table));
                json!({"correlation": {"parentField": [parent], "childField": [child]},
                    "system": "client", "subquery": subquery})
            })
            .collect();
        if !related.is_empty() {
            ast["related"] = json!(related);
        }
        ast
    }

    /// Statements for this node's rows and all below it. `scope` restricts the rows, as SQL.
    fn rows(&self, outer: Option<(&str, &str, &str)>, out: &mut Vec<ExpectedRows>) {
        let mut conditions: Vec<String> = self
            .filter
            .iter()
            .map(|(column, value)| match value {
                Value::String(text) => format!("c.{column} = '{text}'"),
                other => format!("c.{column} = {other}"),
            })
            .collect();
        let (from, end) = match outer {
            None => (String::new(), String::new()),
            Some((parents, parent, child)) => {
                conditions.push(format!("c.{child} = p.{parent}"));
                (format!("SELECT DISTINCT c.* FROM ({parents}) p, LATERAL ("), ") c".to_owned())
            }
        };
        let filter = conditions.join(" AND ");
        let filter = if filter.is_empty() { filter } else { format!(" WHERE {filter}") };
        let window =
            self.limit.map(|n| format!(" ORDER BY c.seq DESC, c.id LIMIT {n}")).unwrap_or_default();
        let sql = format!("{from}SELECT c.* FROM {} c{filter}{window}{end}", self.table);
        for (parent, child, other) in &self.related {
            other.rows(Some((&sql, parent, child)), out);
        }
        let text = format!("SELECT to_jsonb(t)::text FROM ({sql}) t");
        out.push(ExpectedRows { table: self.table, sql: text });
    }
}

fn partition(number: usize) -> String {
    format!("n{number}")
}

/// Statements of one logical write; each is one transaction.
pub(crate) struct Statements {
    /// A child is added, its parents are touched: id, partition, parent, text, seq, sent.
    pub(crate) add: String,
    /// A parent is touched alone: id, sent.
    pub(crate) touch: String,
}

/// One logical write.
pub(crate) enum ModelWrite {
    Add { part: String, parent: String },
    Touch { id: String },
}

impl Model {
    pub(crate) fn tables(self) -> Option<Tables> {
        match self {
            Model::Projects => None,
            Model::Feed => Some(FEED),
            Model::Mail => Some(MAIL),
            Model::Forum => Some(FORUM),
            Model::Customers => Some(CUSTOMERS),
        }
    }

    /// Only new rows tell when a write arrived: no row is changed.
    pub(crate) fn only_adds(self) -> bool {
        self == Model::Feed
    }

    fn node(self, shape: usize, number: usize, rows: Option<u32>) -> Node {
        let part = partition(number);
        let rows = rows.or(Some(50));
        let messages = |n| node("message", Some(n));
        let author = || node("member", None);
        let contact = || node("contact", None);
        let activities = |n| node("activity", Some(n)).related("contact_id", "id", contact());
        match (self, shape % SHAPES) {
            (Model::Projects | Model::Feed, _) => node("event", rows).with("part", part),
            (Model::Mail, 0) => node("thread", rows)
                .with("part", part)
                .with("folder", "inbox")
                .related("id", "thread_id", messages(5)),
            (Model::Mail, 1) => node("message", rows)
                .with("part", part)
                .with("folder", "inbox")
                .related("thread_id", "id", node("thread", None)),
            (Model::Mail, _) => node("thread", rows)
                .with("part", part)
                .with("folder", "inbox")
                .related("id", "thread_id", messages(10).with("unread", true)),
            (Model::Forum, 0) => {
                let posts = node("post", Some(3)).related("author", "id", author());
                let topics = node("topic", rows)
                    .related("author", "id", author())
                    .related("id", "topic_id", posts);
                node("category", None).with("id", part).related("id", "part", topics)
            }
            (Model::Forum, 1) => node("topic", rows)
                .with("part", part)
                .related("part", "id", node("category", None))
                .related("author", "id", author())
                .related("id", "topic_id", node("post", Some(5)).related("author", "id", author())),
            (Model::Forum, _) => node("post", rows)
                .with("part", part)
                .related(
                    "topic_id",
                    "id",
                    node("topic", None).related("author", "id", author()).related(
                        "part",
                        "id",
                        node("category", None),
                    ),
                )
                .related("author", "id", author()),
            (Model::Customers, 0) => {
                let accounts = node("account", rows)
                    .related("id", "account_id", contact())
                    .related("id", "account_id", activities(5));
                node("company", None).with("id", part).related("id", "part", accounts).related(
                    "id",
                    "part",
                    node("activity", rows),
                )
            }
            (Model::Customers, 1) => node("account", rows)
                .with("part", part)
                .related("part", "id", node("company", None))
                .related("id", "account_id", contact())
                .related("id", "account_id", activities(5)),
            (Model::Customers, _) => node("activity", rows)
                .with("part", part)
                .related("part", "id", node("company", None))
                .related(
                    "account_id",
                    "id",
                    node("account", None).related("id", "account_id", contact()),
                )
                .related("contact_id", "id", contact()),
        }
    }

    /// The AST of a query on a partition.
    pub(crate) fn ast(self, shape: usize, number: usize, rows: Option<u32>) -> Value {
        self.node(shape, number, rows).ast()
    }

    /// The rows that it brings.
    pub(crate) fn expected(
        self,
        shape: usize,
        number: usize,
        rows: Option<u32>,
    ) -> Vec<ExpectedRows> {
        let mut out = Vec::new();
        self.node(shape, number, rows).rows(None, &mut out);
        out
    }

    /// Creates and fills the tables: `projects` partitions of `items` parents with `comments`
    /// children each.
    pub(crate) fn seed(self, size: &DataSize) -> String {
        let DataSize { projects, items, comments, body_bytes, .. } = size;
        let parts = format!("generate_series(0, {projects} - 1) p");
        let parents = format!("{parts}, generate_series(0, {items} - 1) i");
        let children = format!("{parents}, generate_series(0, {comments} - 1) c");
        let body = format!("repeat('x', {body_bytes})");
        match self {
            Model::Projects => String::new(),
            Model::Feed => format!(
                "CREATE TABLE event (id TEXT PRIMARY KEY, part TEXT NOT NULL, seq BIGINT NOT NULL,
                   body TEXT NOT NULL, sent_us BIGINT NOT NULL);
                 INSERT INTO event SELECT 'n' || p || '-' || i, 'n' || p, i - {items}, {body}, 0
                   FROM {parents};
                 CREATE INDEX ON event (part, seq);"
            ),
            Model::Mail => format!(
                "CREATE TABLE thread (id TEXT PRIMARY KEY, part TEXT NOT NULL, folder TEXT NOT NULL,
                   subject TEXT NOT NULL, people INT NOT NULL, seq BIGINT NOT NULL,
                   sent_us BIGINT NOT NULL);
                 CREATE TABLE message (id TEXT PRIMARY KEY, part TEXT NOT NULL,
                   folder TEXT NOT NULL, thread_id TEXT NOT NULL, unread BOOL NOT NULL,
                   body TEXT NOT NULL, seq BIGINT NOT NULL, sent_us BIGINT NOT NULL);
                 INSERT INTO thread SELECT 'n' || p || '-t' || i, 'n' || p,
                   CASE WHEN i < {items} - {ARCHIVED} THEN 'inbox' ELSE 'archive' END,
                   'About ' || i, 2, i - {items}, 0 FROM {parents};
                 INSERT INTO message SELECT 'n' || p || '-t' || i || '-' || c, 'n' || p,
                   CASE WHEN i < {items} - {ARCHIVED} THEN 'inbox' ELSE 'archive' END,
                   'n' || p || '-t' || i, c % 2 = 0, {body}, i + c - {items} - {comments}, 0
                   FROM {children};
                 CREATE INDEX ON thread (part, folder, seq);
                 CREATE INDEX ON message (thread_id, seq);
                 CREATE INDEX ON message (part, folder, seq);"
            ),
            Model::Forum => format!(
                "CREATE TABLE member (id TEXT PRIMARY KEY, name TEXT NOT NULL,
                   sent_us BIGINT NOT NULL);
                 CREATE TABLE category (id TEXT PRIMARY KEY, title TEXT NOT NULL,
                   seq BIGINT NOT NULL, sent_us BIGINT NOT NULL);
                 CREATE TABLE topic (id TEXT PRIMARY KEY, part TEXT NOT NULL, author TEXT NOT NULL,
                   title TEXT NOT NULL, seq BIGINT NOT NULL, sent_us BIGINT NOT NULL);
                 CREATE TABLE post (id TEXT PRIMARY KEY, part TEXT NOT NULL,
                   topic_id TEXT NOT NULL, author TEXT NOT NULL, body TEXT NOT NULL,
                   seq BIGINT NOT NULL, sent_us BIGINT NOT NULL);
                 INSERT INTO member SELECT 'm' || m, 'Member ' || m, 0
                   FROM generate_series(0, {MEMBERS} - 1) m;
                 INSERT INTO category SELECT 'n' || p, 'Category ' || p, 0, 0 FROM {parts};
                 INSERT INTO topic SELECT 'n' || p || '-t' || i, 'n' || p, 'm' || i % {MEMBERS},
                   'Topic ' || i, i - {items}, 0 FROM {parents};
                 INSERT INTO post SELECT 'n' || p || '-t' || i || '-' || c, 'n' || p,
                   'n' || p || '-t' || i, 'm' || (i + c) % {MEMBERS}, {body},
                   i + c - {items} - {comments}, 0 FROM {children};
                 CREATE INDEX ON topic (part, seq);
                 CREATE INDEX ON post (topic_id, seq);
                 CREATE INDEX ON post (part, seq);"
            ),
            Model::Customers => format!(
                "CREATE TABLE company (id TEXT PRIMARY KEY, name TEXT NOT NULL,
                   seq BIGINT NOT NULL, sent_us BIGINT NOT NULL);
                 CREATE TABLE account (id TEXT PRIMARY KEY, part TEXT NOT NULL, name TEXT NOT NULL,
                   seq BIGINT NOT NULL, sent_us BIGINT NOT NULL);
                 CREATE TABLE contact (id TEXT PRIMARY KEY, account_id TEXT NOT NULL,
                   name TEXT NOT NULL, seq BIGINT NOT NULL, sent_us BIGINT NOT NULL);
                 CREATE TABLE activity (id TEXT PRIMARY KEY, part TEXT NOT NULL,
                   account_id TEXT NOT NULL, contact_id TEXT NOT NULL, body TEXT NOT NULL,
                   seq BIGINT NOT NULL, sent_us BIGINT NOT NULL);
                 INSERT INTO company SELECT 'n' || p, 'Company ' || p, 0, 0 FROM {parts};
                 INSERT INTO account SELECT 'n' || p || '-t' || i, 'n' || p, 'Account ' || i,
                   i - {items}, 0 FROM {parents};
                 INSERT INTO contact SELECT 'n' || p || '-t' || i || '-k' || k,
                   'n' || p || '-t' || i, 'Contact ' || k, k, 0
                   FROM {parents}, generate_series(0, {CONTACTS} - 1) k;
                 INSERT INTO activity SELECT 'n' || p || '-t' || i || '-' || c, 'n' || p,
                   'n' || p || '-t' || i, 'n' || p || '-t' || i || '-k' || c % {CONTACTS}, {body},
                   i + c - {items} - {comments}, 0 FROM {children};
                 CREATE INDEX ON account (part, seq);
                 CREATE INDEX ON contact (account_id);
                 CREATE INDEX ON activity (account_id, seq);
                 CREATE INDEX ON activity (part, seq);"
            ),
        }
    }

    /// What its writes do. `hot`: the top of the tree is touched by every write too.
    pub(crate) fn statements(self, hot: bool) -> Option<Statements> {
        let touch = |table: &str, set: &str| {
            format!("UPDATE {table} SET {set}, sent_us = $2 WHERE id = $1")
        };
        let top = |table: &str| {
            format!(
                ", top AS (UPDATE {table} SET seq = $5, sent_us = $6 WHERE id = $2 RETURNING 1)"
            )
        };
        Some(match self {
            Model::Projects => return None,
            Model::Feed => Statements {
                add: "INSERT INTO event SELECT $1::text, $2::text, $5::bigint, $4::text, $6::bigint
                      WHERE $3::text IS NOT NULL"
                    .into(),
                touch: touch("event", "seq = seq"),
            },
            Model::Mail => Statements {
                add: "WITH added AS (INSERT INTO message SELECT $1::text, $2::text, folder,
                        $3::text, true, $4::text, $5::bigint, $6::bigint FROM thread WHERE id = $3 RETURNING 1)
                      UPDATE thread SET seq = $5, sent_us = $6 WHERE id = $3"
                    .into(),
                touch: touch("thread", "people = people + 1"),
            },
            // A category's row is touched by every post in it, hot or not.
            Model::Forum => Statements {
                add: format!(
                    "WITH added AS (INSERT INTO post VALUES
                       ($1, $2, $3, 'm' || $5::bigint % {MEMBERS}, $4, $5, $6) RETURNING 1){}
                     UPDATE topic SET seq = $5, sent_us = $6 WHERE id = $3",
                    top("category")
                ),
                touch: touch("topic", "title = title || '.'"),
            },
            Model::Customers => Statements {
                add: format!(
                    "WITH added AS (INSERT INTO activity VALUES ($1, $2, $3,
                       $3 || '-k' || $5::bigint % {CONTACTS}, $4, $5, $6) RETURNING 1){}
                     UPDATE account SET seq = $5, sent_us = $6 WHERE id = $3",
                    if hot { top("company") } else { String::new() }
                ),
                touch: touch("company", "seq = seq + 1"),
            },
        })
    }

    /// The `k`-th write. Of the realistic ones, in a hundred: feed 30 to watched feeds; mail 20 to
    /// watched inboxes, 40 to others, 20 to watched archives, 20 to old threads; forum 25 to
    /// watched categories; customers 20 to watched companies, 70 to others, 10 to a company's row.
    pub(crate) fn write(
        self,
        hot: bool,
        k: u64,
        size: &DataSize,
        watched: usize,
        rng: &mut impl Rng,
    ) -> ModelWrite {
        let watched = watched.clamp(1, size.projects.max(1));
        let cold = watched.min(size.projects.saturating_sub(1))..size.projects.max(1);
        let inbox = size.items.saturating_sub(ARCHIVED).max(1);
        let mut pick = |watched_one: bool, parents: std::ops::Range<usize>| {
            let part = if watched_one {
                rng.random_range(0..watched)
            } else {
                rng.random_range(cold.clone())
            };
            let parent = rng.random_range(parents);
            (partition(part), format!("n{part}-t{parent}"))
        };
        let all = 0..size.items.max(1);
        let add = |(part, parent)| ModelWrite::Add { part, parent };
        if hot {
            let parents = if self == Model::Mail { 0..inbox } else { all };
            let (_, parent) = pick(true, parents);
            let parent = parent.split_once('-').map_or("t0", |(_, parent)| parent).to_owned();
            return add((partition(0), format!("n0-{parent}")));
        }
        let is_even = (k / 10).is_multiple_of(2);
        match (self, k % 20) {
            (Model::Projects | Model::Feed, n) => add(pick(n % 10 < 3, all)),
            (Model::Mail, n) => match n % 10 {
                0..=1 => add(pick(true, 0..inbox)),
                2..=5 => add(pick(false, 0..inbox)),
                6..=7 => add(pick(true, inbox.min(size.items - 1)..size.items)),
                // The seeded order of threads: the first are the oldest.
                _ => ModelWrite::Touch { id: pick(is_even, 0..inbox.div_ceil(2)).1 },
            },
            (Model::Forum, n) => add(pick(n % 4 == 0, all)),
            (Model::Customers, n) => match n % 10 {
                0..=1 => add(pick(true, all)),
                2..=8 => add(pick(false, all)),
                _ => ModelWrite::Touch { id: pick(is_even, all).0 },
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use postgres::{Client, NoTls};
    use rand::SeedableRng;
    use rand::rngs::StdRng;
    use zeroring_net::pg::local_server::LocalServer;

    const MODELS: [Model; 4] = [Model::Feed, Model::Mail, Model::Forum, Model::Customers];

    fn size(model: Model) -> DataSize {
        DataSize { projects: 4, items: 40, comments: 6, body_bytes: 10, model, watched: Some(2) }
    }

    #[test]
    fn every_model_seeds_answers_and_writes() {
        let server = LocalServer::start(&["fsync=off"]).unwrap();
        let mut admin = Client::connect(&server.url("postgres"), NoTls).unwrap();
        for model in MODELS {
            let name = format!("{model:?}").to_lowercase();
            admin.batch_execute(&format!("CREATE DATABASE {name}")).unwrap();
            let mut sql = Client::connect(&server.url(&name), NoTls).unwrap();
            let size = size(model);
            crate::data_set::seed(&mut sql, &size).unwrap();
            for shape in 0..SHAPES {
                let counts: Vec<usize> = model
                    .expected(shape, 1, Some(5))
                    .iter()
                    .map(|e| sql.query(&e.sql, &[]).unwrap().len())
                    .collect();
                assert!(counts.iter().all(|n| *n > 0), "{model:?} {shape}: {counts:?}");
            }
            for hot in [true, false] {
                let statements = model.statements(hot).unwrap();
                let mut rng = StdRng::seed_from_u64(7);
                let mut in_watched = 0;
                for k in 0..100_u64 {
                    match model.write(hot, k, &size, 2, &mut rng) {
                        ModelWrite::Add { part, parent } => {
                            in_watched += u64::from(part == "n0" || part == "n1");
                            let id = format!("{hot}{k}");
                            let (seq, sent) = (k as i64, 1_i64);
                            let n = sql
                                .execute(
                                    &statements.add,
                                    &[&id, &part, &parent, &"text", &seq, &sent],
                                )
                                .unwrap();
                            assert_eq!(n, 1, "{model:?}: {parent} was not there");
                        }
                        ModelWrite::Touch { id } => {
                            let n = sql.execute(&statements.touch, &[&id, &1_i64]).unwrap();
                            assert_eq!(n, 1, "{model:?}: {id} was not there");
                        }
                    }
                }
                let share = if hot { 100..=100 } else { 20..=45 };
                assert!(share.contains(&in_watched), "{model:?} hot={hot}: {in_watched}");
            }
        }
    }

    #[test]
    fn queries_of_different_partitions_and_shapes_differ() {
        for model in [Model::Mail, Model::Forum, Model::Customers] {
            let ast = |shape, part| model.ast(shape, part, Some(5)).to_string();
            assert_ne!(ast(0, 1), ast(1, 1));
            assert_ne!(ast(0, 1), ast(0, 2));
            assert!(ast(1, 1).contains("\"related\""));
        }
    }
}
