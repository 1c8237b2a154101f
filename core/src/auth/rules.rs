//! The permission rules document.

use std::collections::BTreeMap;

use serde::Deserialize;

use crate::zql::ast::Condition;

/// How much of an unusable document an error quotes.
const QUOTED_CHARS: usize = 100;

/// A document that cannot be used. Nothing is readable while it is deployed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "Could not parse upstream permissions: '{start}'. {cause}. Deploy them again with a \
     zero-deploy-permissions of a version that this server knows."
)]
pub struct PermissionsError {
    /// Its beginning.
    pub start: String,
    /// What is wrong.
    pub cause: String,
}

/// Rules per table (server names). The default has none: nothing is readable or writable.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Permissions {
    /// Rules by table.
    #[serde(default)]
    pub tables: BTreeMap<String, TableRules>,
}

/// Rules of a table.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TableRules {
    /// For whole rows.
    #[serde(default)]
    pub row: Option<Asset>,
    /// For single columns.
    #[serde(default)]
    pub cell: Option<BTreeMap<String, Asset>>,
}

/// Policies per operation.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Asset {
    /// Reading.
    #[serde(default)]
    pub select: Option<Policy>,
    /// Inserting; checked against the new row.
    #[serde(default)]
    pub insert: Option<Policy>,
    /// Updating.
    #[serde(default)]
    pub update: Option<UpdatePolicies>,
    /// Deleting.
    #[serde(default)]
    pub delete: Option<Policy>,
}

/// Policies of an update.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct UpdatePolicies {
    /// Checked against the row before.
    #[serde(default)]
    pub pre_mutation: Option<Policy>,
    /// Checked against the row after.
    #[serde(default)]
    pub post_mutation: Option<Policy>,
}

/// Rules of which one must hold; none is "never".
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
pub struct Policy(pub Vec<Rule>);

/// `["allow", condition]`
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct Rule(Allow, pub Condition);

#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Allow {
    Allow,
}

impl Policy {
    /// The rules as one condition: their OR.
    pub fn condition(&self) -> Condition {
        Condition::Or { conditions: self.0.iter().map(|r| r.1.clone()).collect() }
    }
}

impl Permissions {
    /// Parses the `permissions` column.
    ///
    /// # Errors
    /// [`PermissionsError`].
    pub fn parse(text: &str) -> Result<Permissions, PermissionsError> {
        serde_json::from_str(text).map_err(|e| PermissionsError {
            start: text.chars().take(QUOTED_CHARS).collect(),
            cause: e.to_string(),
        })
    }

    /// The rules under which rows of a table can be read; `None` if there are none.
    pub fn select(&self, table: &str) -> Option<&Policy> {
        let policy = self.tables.get(table)?.row.as_ref()?.select.as_ref()?;
        (!policy.0.is_empty()).then_some(policy)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_document_of_the_spec_parses_and_unknown_keys_do_not() {
        let p = Permissions::parse(
            r#"{"tables":{"issue":{"row":{
              "select":[["allow",{"type":"simple","op":"=","left":{"type":"column","name":"owner_id"},
                "right":{"type":"static","anchor":"authData","field":"sub"}}]],
              "update":{"preMutation":[["allow",{"type":"and","conditions":[]}]],
                        "postMutation":[["allow",{"type":"and","conditions":[]}]]}},
              "cell":{"a":{"insert":[]}}}}}"#,
        )
        .unwrap();
        assert!(p.select("issue").is_some() && p.select("other").is_none());
        assert!(Permissions::parse("{}").unwrap().select("issue").is_none());
        for bad in [
            r#"{"table":{}}"#,
            r#"{"tables":{"t":{"rows":{}}}}"#,
            r#"{"tables":{"t":{"row":{"select":[["deny",{"type":"and","conditions":[]}]]}}}}"#,
            r#"{"tables":{"t":{"row":{"select":[["allow",{"type":"not"}]]}}}}"#,
            "null",
            "",
        ] {
            assert!(Permissions::parse(bad).is_err(), "{bad}");
        }
    }
}
