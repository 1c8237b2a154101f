//! Texts on which implementations disagree: wildcards and escapes as content, empty, blanks and
//! line ends, code points beyond 16 bits, composed and decomposed letters, prefixes of each other.
//! Only ASCII has capitals here, because Postgres folds no other letters under `COLLATE "C"`; the
//! LIKE table of `zql::like` has them.

use serde_json::json;

use super::DataSet;
use super::query::{cmp, exists, filter, or, related, table, with};

const TABLES: &str = "
    doc 26: *id body:text? tag:text?
    note 14: *id doc_id>doc body:text
";

const TEXTS: &[&str] = &[
    "", "a", "A", "aa", "ab", "AB", "a b", " a", "a ", "100%", "100", "a_c", "abc", "axc", "a\\c",
    "a\nc", "\n", "%", "_", "\\", "é", "e\u{301}", "ß", "ss", "\u{FFFD}", "😀", "😀a", "中文", "'",
    "\"",
];

pub(super) fn data_set() -> Result<DataSet, String> {
    let body = |op: &str, value: serde_json::Value| filter(table("doc"), cmp("body", op, value));
    let by_body = |direction: &str| json!({"orderBy": [["body", direction]], "limit": 7});
    let queries = vec![
        ("equal to the empty text", body("=", json!(""))),
        ("equal to a composed letter, not the decomposed", body("=", json!("é"))),
        (
            "above the replacement character: beyond 16 bits sorts last",
            body(">", json!("\u{FFFD}")),
        ),
        ("between by bytes", body("<=", json!("a b"))),
        ("one of some", body("IN", json!(["A", "😀", "a\\c", "'"]))),
        ("none of some", body("NOT IN", json!(["a", "", "é"]))),
        ("IS NOT lets nulls in", body("IS NOT", json!("a"))),
        ("prefix", body("LIKE", json!("a%"))),
        ("suffix", body("LIKE", json!("%c"))),
        ("one character: an emoji is one", body("LIKE", json!("_"))),
        ("a line end is a character", body("LIKE", json!("a_c"))),
        ("escaped wildcards", body("LIKE", json!("%\\%"))),
        ("escaped escape", body("LIKE", json!("a\\\\c"))),
        ("no pattern at all", body("LIKE", json!("ab"))),
        ("any case", body("ILIKE", json!("A%"))),
        ("any case, negated", body("NOT ILIKE", json!("%A%"))),
        ("negated", body("NOT LIKE", json!("%a%"))),
        ("by body, nulls first", with(table("doc"), by_body("asc"))),
        ("by body, nulls last", with(table("doc"), by_body("desc"))),
        (
            "after a body",
            with(
                with(table("doc"), by_body("asc")),
                json!({"start": {"row": {"body": "a", "id": 1}, "exclusive": true}}),
            ),
        ),
        ("docs of notes of the same text, by tag", {
            let noted = exists("body=body", filter(table("note"), cmp("body", "!=", "")));
            let docs = filter(table("doc"), or(vec![noted, cmp("tag", "LIKE", "%\n%")]));
            related(
                with(docs, json!({"orderBy": [["tag", "desc"]], "limit": 4})),
                "notes",
                "id=doc_id",
                table("note"),
            )
        }),
    ];
    let mut set = DataSet::new("texts", TABLES, queries)?;
    set.texts = TEXTS;
    Ok(set)
}
