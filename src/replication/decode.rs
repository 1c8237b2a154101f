//! From the output plugin's messages to [`ChangeMessage`]s (spec: replication §3.3).

use std::sync::Arc;

use rustc_hash::FxHashMap;
use serde::Deserialize;
use zeroring_core::change::message::{
    ChangeMessage, LiteValue, Relation, RelationColumn, ReplicaIdentity, Tuple, TupleValue,
};
use zeroring_core::change::published::PublishedSchema;
use zeroring_core::version::StateVersion;
use zeroring_net::pg::pgoutput::{self, OldTuple, PgOutput, RelationBody, TupleColumn, TupleData};
use zeroring_net::pg::replication::PG_EPOCH_US;

use super::config::ShardId;
use super::error::ReplicationError;
use super::published::first_difference;
use super::types::{BadValue, Codec, TypeCatalog};
use super::upstream::UpstreamError;

/// What a message of the stream means.
#[derive(Debug, PartialEq)]
pub enum Decoded {
    /// For the replica.
    Change(ChangeMessage),
    /// A relation was described: look its types up ([`Decoder::unknown_types`]) and
    /// [`Decoder::add_relation`] before going on.
    Relation(Relation),
    /// The published schema changed, in words.
    SchemaChange(String),
    /// A lag report came back; its JSON.
    LagReport,
    /// Nothing of interest.
    Nothing,
}

/// A relation of the stream with its columns' codecs.
#[derive(Debug)]
struct Known {
    relation: Arc<Relation>,
    codecs: Vec<Codec>,
}

/// Decodes the messages of one session of the stream.
#[derive(Debug)]
pub struct Decoder {
    relations: FxHashMap<u32, Known>,
    watermark: Option<StateVersion>,
    ddl_prefix: String,
    lag_report_prefix: String,
}

/// The fields of a schema-change message that matter here.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct DdlMessage {
    #[serde(rename = "type")]
    kind: String,
    version: u32,
    #[serde(default)]
    previous_schema: Option<PublishedSchema>,
    #[serde(default)]
    schema: Option<PublishedSchema>,
    #[serde(default)]
    event: Option<DdlEvent>,
}

#[derive(Debug, Deserialize)]
struct DdlEvent {
    #[serde(default)]
    tag: Option<String>,
}

impl Decoder {
    /// A decoder for a new session.
    pub fn new(shard: &ShardId) -> Decoder {
        Decoder {
            relations: FxHashMap::default(),
            watermark: None,
            ddl_prefix: shard.ddl_prefix(),
            lag_report_prefix: shard.lag_report_prefix(),
        }
    }

    /// Between BEGIN and COMMIT.
    pub fn in_transaction(&self) -> bool {
        self.watermark.is_some()
    }

    /// Decodes a message.
    ///
    /// # Errors
    /// The message or one of its values cannot be read.
    pub fn decode(&mut self, payload: &[u8]) -> Result<Decoded, ReplicationError> {
        Ok(match pgoutput::decode(payload)? {
            PgOutput::Begin { final_lsn, commit_time_us, .. } => {
                let watermark = StateVersion::from_lsn(final_lsn);
                self.watermark = Some(watermark.clone());
                let commit_time_ms = (commit_time_us.saturating_add(PG_EPOCH_US)) as f64 / 1000.0;
                Decoded::Change(ChangeMessage::Begin { watermark, commit_time_ms })
            }
            PgOutput::Commit { commit_lsn, .. } => {
                self.watermark = None;
                Decoded::Change(ChangeMessage::Commit {
                    watermark: StateVersion::from_lsn(commit_lsn),
                })
            }
            PgOutput::Insert { relation, new } => {
                let known = self.known(relation)?;
                let new = known.tuple(new, false)?;
                Decoded::Change(ChangeMessage::Insert { relation: known.relation.clone(), new })
            }
            PgOutput::Update { relation, old, new } => {
                let known = self.known(relation)?;
                let old = old.map(|old| known.old(old)).transpose()?;
                let new = known.tuple(new, false)?;
                let relation = known.relation.clone();
                Decoded::Change(ChangeMessage::Update { relation, old, new })
            }
            PgOutput::Delete { relation, old } => {
                let known = self.known(relation)?;
                let old = known.old(old)?;
                Decoded::Change(ChangeMessage::Delete { relation: known.relation.clone(), old })
            }
            PgOutput::Truncate { relations, .. } => {
                let relations = relations
                    .into_iter()
                    .map(|oid| Ok(self.known(oid)?.relation.clone()))
                    .collect::<Result<_, ReplicationError>>()?;
                Decoded::Change(ChangeMessage::Truncate { relations })
            }
            PgOutput::Relation(body) => Decoded::Relation(relation(&body)),
            PgOutput::Message { prefix, content, .. } if prefix == self.ddl_prefix => {
                match schema_change(content)? {
                    Some(what) => Decoded::SchemaChange(what),
                    None => Decoded::Nothing,
                }
            }
            PgOutput::Message { prefix, .. } if prefix == self.lag_report_prefix => {
                Decoded::LagReport
            }
            PgOutput::Message { .. }
            | PgOutput::Origin { .. }
            | PgOutput::Type { .. }
            | PgOutput::Unknown(_) => Decoded::Nothing,
        })
    }

    /// Types of a relation that the catalog does not know yet.
    pub fn unknown_types(relation: &Relation, catalog: &TypeCatalog) -> Vec<u32> {
        let oids = relation.columns.iter().map(|c| c.type_oid);
        oids.filter(|oid| catalog.codec(*oid).is_none()).collect()
    }

    /// Notes a relation, whose types the catalog knows.
    pub fn add_relation(&mut self, relation: Relation, catalog: &TypeCatalog) {
        let text = Codec::Scalar(super::types::Scalar::Other);
        let codecs =
            relation.columns.iter().map(|c| catalog.codec(c.type_oid).unwrap_or(text)).collect();
        self.relations.insert(relation.oid, Known { relation: Arc::new(relation), codecs });
    }

    fn known(&self, oid: u32) -> Result<&Known, ReplicationError> {
        self.relations.get(&oid).ok_or_else(|| {
            ReplicationError::Upstream(UpstreamError::Malformed {
                what: "the replication stream",
                cause: format!("it changes relation {oid}, which it has not described"),
            })
        })
    }
}

impl Known {
    fn old(&self, old: OldTuple<'_>) -> Result<Tuple, ReplicationError> {
        self.tuple(old.tuple(), matches!(old, OldTuple::Key(_)))
    }

    /// In a key tuple, only key columns have values.
    fn tuple(&self, data: TupleData<'_>, key_only: bool) -> Result<Tuple, ReplicationError> {
        let columns = &self.relation.columns;
        if data.len() != columns.len() {
            return Err(ReplicationError::Upstream(UpstreamError::Malformed {
                what: "the replication stream",
                cause: format!(
                    "a row of table {} has {} values instead of {}",
                    self.relation.lite_name(),
                    data.len(),
                    columns.len()
                ),
            }));
        }
        let mut tuple = Vec::with_capacity(columns.len());
        for ((value, column), codec) in data.columns().zip(columns).zip(&self.codecs) {
            let bad = |cause: BadValue| ReplicationError::Value {
                table: format!("{}.{}", self.relation.schema, self.relation.name),
                column: column.name.clone(),
                cause,
            };
            tuple.push(match value {
                _ if key_only && !column.is_key => TupleValue::Absent,
                TupleColumn::Unchanged => TupleValue::Absent,
                TupleColumn::Null => TupleValue::Value(LiteValue::Null),
                TupleColumn::Text(raw) => {
                    let mut value = LiteValue::Null;
                    codec.decode_text(raw, &mut value).map_err(bad)?;
                    TupleValue::Value(value)
                }
                TupleColumn::Binary(raw) => {
                    let mut value = LiteValue::Null;
                    codec.decode_binary(raw, &mut value).map_err(bad)?;
                    TupleValue::Value(value)
                }
            });
        }
        Ok(tuple)
    }
}

fn relation(body: &RelationBody<'_>) -> Relation {
    Relation {
        oid: body.oid,
        schema: if body.namespace.is_empty() { "pg_catalog" } else { body.namespace }.to_owned(),
        name: body.name.to_owned(),
        identity: match body.identity {
            b'f' => ReplicaIdentity::Full,
            b'i' => ReplicaIdentity::Index,
            b'n' => ReplicaIdentity::Nothing,
            _ => ReplicaIdentity::Default,
        },
        columns: body
            .columns
            .iter()
            .map(|c| RelationColumn {
                name: c.name.to_owned(),
                is_key: c.is_key,
                type_oid: c.type_oid,
            })
            .collect(),
    }
}

/// What a schema-change message says changed; `None` if nothing that is replicated did.
fn schema_change(content: &[u8]) -> Result<Option<String>, ReplicationError> {
    let malformed = |cause: String| {
        ReplicationError::Upstream(UpstreamError::Malformed {
            what: "a schema-change message",
            cause,
        })
    };
    let message: DdlMessage =
        serde_json::from_slice(content).map_err(|e| malformed(e.to_string()))?;
    if !(1..=2).contains(&message.version) {
        return Err(malformed(format!("version {} is unknown", message.version)));
    }
    if !matches!(message.kind.as_str(), "ddlStart" | "ddlUpdate" | "schemaSnapshot") {
        return Ok(None);
    }
    let (Some(before), Some(after)) = (message.previous_schema, message.schema) else {
        return Ok(None);
    };
    let difference = first_difference(&before, &after, false);
    let tag = message.event.and_then(|e| e.tag).unwrap_or_else(|| "UNKNOWN".into());
    Ok(difference.map(|what| format!("{what} ({tag})")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shard() -> ShardId {
        ShardId { app: "zero".into(), num: 0 }
    }

    fn message(prefix: &str, content: &str) -> Vec<u8> {
        let mut out = vec![b'M', 1];
        out.extend([0; 8]);
        out.extend(prefix.as_bytes());
        out.push(0);
        out.extend((content.len() as u32).to_be_bytes());
        out.extend(content.as_bytes());
        out
    }

    const TABLE: &str = r#"{"oid":1,"schema":"public","schemaOID":2,"name":"t","replicaIdentity":"d",
        "columns":{"a":{"pos":1,"dataType":"int4","typeOID":23,"pgTypeClass":"b",
        "elemPgTypeClass":null,"characterMaximumLength":null,"notNull":true,"dflt":null}},
        "primaryKey":["a"],"publications":{"p":{"rowFilter":null}}}"#;

    fn ddl(kind: &str, previous: &str, next: &str) -> Result<Decoded, ReplicationError> {
        let json = format!(
            r#"{{"type":"{kind}","version":1,"previousSchema":{previous},"schema":{next},
                "event":{{"tag":"ALTER TABLE"}},"context":{{"query":"…"}}}}"#
        );
        Decoder::new(&shard()).decode(&message("zero/0/ddl", &json))
    }

    #[test]
    fn schema_changes_are_told_from_mere_events() {
        let with = |tables: &str| format!(r#"{{"tables":[{tables}],"indexes":[]}}"#);
        let same = ddl("ddlUpdate", &with(TABLE), &with(TABLE)).unwrap();
        assert_eq!(same, Decoded::Nothing);
        assert_eq!(ddl("ddlStart", "null", &with(TABLE)).unwrap(), Decoded::Nothing);
        let added = ddl("ddlUpdate", &with(""), &with(TABLE)).unwrap();
        assert_eq!(added, Decoded::SchemaChange("table public.t was added (ALTER TABLE)".into()));
        let renamed = TABLE.replace("\"a\":{", "\"b\":{");
        let renamed = ddl("ddlStart", &with(TABLE), &with(&renamed)).unwrap();
        assert!(matches!(renamed, Decoded::SchemaChange(s) if s.contains("column b")));
        let dflt = TABLE.replace("\"dflt\":null", "\"dflt\":\"1\"");
        assert_eq!(ddl("ddlUpdate", &with(TABLE), &with(&dflt)).unwrap(), Decoded::Nothing);
        // Unknown kinds of events are for later versions.
        assert_eq!(ddl("later", &with(""), &with(TABLE)).unwrap(), Decoded::Nothing);
        assert!(ddl("ddlUpdate", "3", "4").is_err());
    }

    #[test]
    fn messages_of_other_shards_are_none_of_ours() {
        for prefix in ["zero/1/ddl", "other", ""] {
            let decoded = Decoder::new(&shard()).decode(&message(prefix, "{")).unwrap();
            assert_eq!(decoded, Decoded::Nothing);
        }
        let report = message("zero/0/lag-report/v1", "{}");
        assert_eq!(Decoder::new(&shard()).decode(&report).unwrap(), Decoded::LagReport);
    }

    #[test]
    fn changes_of_relations_that_were_not_described_are_errors() {
        let mut insert = vec![b'I', 0, 0, 0, 9, b'N', 0, 1, b'n'];
        let error = Decoder::new(&shard()).decode(&insert).unwrap_err();
        assert!(error.to_string().contains("relation 9"), "{error}");
        insert.pop();
        assert!(matches!(Decoder::new(&shard()).decode(&insert), Err(ReplicationError::Stream(_))));
    }
}
