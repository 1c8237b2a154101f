//! Checklist 41–56: the query endpoint.

use std::time::Duration;

use serde_json::{Value, json};

use crate::support::*;

fn with(api: &QueryApi) -> Setup {
    Setup { query_url: Some(api.url.clone()), tokens: true, ..Setup::default() }
}

#[test]
fn credentials_are_validated_and_then_queries_asked_for() {
    let api = QueryApi::start(|call, _| (200, all_issues(call)));
    let server = Server::start(&with(&api));
    let mut dial = dial("g", "c").and("userID=u").with(&json!({"authToken": "tok"}));
    dial.headers = vec![("Cookie", "a=b"), ("Origin", "https://site.example"), ("X-Other", "no")];
    let mut client = Client::joined(&server, &dial, &named("q"));
    client.pokes_until(is_got);
    let calls = api.calls.lock().unwrap().clone();
    assert_eq!(calls[0].body, json!(["transform", []]));
    assert_eq!(calls[1].body, json!(["transform", [{"id": "q", "name": "q", "args": []}]]));
    for call in &calls {
        assert_eq!(call.target, "/query?schema=zero_0&appID=zero");
        assert_eq!(call.header("authorization"), Some("Bearer tok"));
        assert_eq!(call.header("cookie"), Some("a=b"));
        assert_eq!(call.header("origin"), Some("https://site.example"));
        assert_eq!(call.header("content-type"), Some("application/json"));
        assert_eq!(call.header("x-other"), None);
    }
}

#[test]
fn an_application_error_fails_one_query_only() {
    let api = QueryApi::start(|call, _| {
        let queries: Vec<Value> = call.body[1]
            .as_array()
            .unwrap()
            .iter()
            .map(|q| match q["id"].as_str().unwrap() {
                "bad" => json!({"error": "app", "id": "bad", "name": "bad", "message": "no",
                                "details": {"code": 7}}),
                id => json!({"id": id, "name": id,
                             "ast": serde_json::from_str::<Value>(ALL_ISSUES).unwrap()}),
            })
            .collect();
        (200, json!({"kind": "QueryResponse", "queries": queries}).to_string())
    });
    let server = Server::start(&with(&api));
    let patch = format!("{},{}", named("bad"), named("good"));
    let mut client = Client::joined(&server, &dial("g", "c"), &patch);
    client.poke();
    let (kind, body) = client.json();
    assert_eq!(kind, "transformError");
    assert_eq!(
        body,
        json!([{"error": "app", "id": "bad", "name": "bad", "message": "no", "details": {"code": 7}}])
    );
    let parts = client.pokes_until(is_got);
    assert!(parts.iter().any(|p| {
        p["gotQueriesPatch"]
            .as_array()
            .is_some_and(|g| g.contains(&json!({"op": "put", "hash": "good"})))
    }));
}

#[test]
fn failures_are_told_with_their_kind() {
    for (status, answer, reason) in [
        (401, "who are you", "http"),
        (200, "no json", "parse"),
        (
            200,
            r#"{"kind":"TransformFailed","origin":"server","reason":"internal","message":"m","queryIDs":[]}"#,
            "internal",
        ),
    ] {
        let api = QueryApi::start(move |_, _| (status, answer.to_owned()));
        let server = Server::start(&with(&api));
        let mut client = Client::joined(&server, &dial("g", "c"), &named("q"));
        let error = client.error();
        assert_eq!((&error["kind"], &error["reason"]), (&json!("TransformFailed"), &json!(reason)));
        if status == 401 {
            assert_eq!(error["status"], 401);
            assert_eq!(error["bodyPreview"], "who are you");
        }
        assert_eq!(client.end().code, None);
        assert_eq!(api.bodies().len(), 1, "not tried again");
    }
}

#[test]
fn trouble_of_the_endpoint_is_waited_out() {
    let api = QueryApi::start(
        |call, n| if n < 3 { (503, String::new()) } else { (200, all_issues(call)) },
    );
    let server = Server::start(&with(&api));
    let mut client = Client::joined(&server, &dial("g", "c"), &named("q"));
    client.pokes_until(is_got);
    assert_eq!(api.bodies().len(), 5, "three failures, the validation, the query");
}

#[test]
fn the_endpoint_says_who_the_user_is() {
    let api = QueryApi::start(|_, _| {
        (200, json!({"kind": "QueryResponse", "userID": "other", "queries": []}).to_string())
    });
    let server = Server::start(&with(&api));
    let mut client = Client::joined(&server, &dial("g", "c").and("userID=me"), "");
    assert_eq!(client.error()["kind"], "Unauthorized");
}

#[test]
fn an_url_that_is_not_allowed_is_not_asked() {
    let api = QueryApi::start(|call, _| (200, all_issues(call)));
    let server = Server::start(&with(&api));
    let mut client = Client::connect(&server, &dial("g", "c")).unwrap();
    let text = format!(
        r#"["initConnection",{{"desiredQueriesPatch":[],"clientSchema":{CLIENT_SCHEMA},"userQueryURL":"https://evil.example/"}}]"#
    );
    client.say(&text);
    let error = client.error();
    assert_eq!(error["kind"], "TransformFailed");
    assert!(error["message"].as_str().unwrap().contains("is not allowed by the ZERO_QUERY_URL"));
    assert!(api.bodies().is_empty());
}

#[test]
fn an_update_of_the_token_asks_for_everything_anew() {
    let api = QueryApi::start(|call, _| (200, all_issues(call)));
    let server = Server::start(&with(&api));
    let dial = dial("g", "c").and("userID=u").with(&json!({"authToken": "t1"}));
    let mut client = Client::joined(&server, &dial, &named("q"));
    client.pokes_until(is_got);
    let before = api.bodies().len();
    client.say(r#"["updateAuth",{"auth":"t1"}]"#);
    client.say(r#"["updateAuth",{"auth":"t2"}]"#);
    eventually("the new token is used", || {
        let calls = api.calls.lock().unwrap();
        calls.last().is_some_and(|c| {
            c.header("authorization") == Some("Bearer t2")
                && c.body[1].as_array().unwrap().len() == 1
        })
    });
    let calls = api.calls.lock().unwrap().clone();
    assert!(calls[before..].iter().all(|c| c.header("authorization") == Some("Bearer t2")));
    client.say(r#"["updateAuth",{"auth":""}]"#);
    assert_eq!(client.error()["kind"], "Unauthorized");
}

#[test]
fn credentials_are_checked_again_and_again() {
    let refuse = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let refusing = refuse.clone();
    let api = QueryApi::start(move |call, _| {
        if refusing.load(std::sync::atomic::Ordering::SeqCst) {
            (403, "gone".to_owned())
        } else {
            (200, all_issues(call))
        }
    });
    let setup = Setup { revalidate: Duration::from_millis(50), ..with(&api) };
    let server = Server::start(&setup);
    let mut client = Client::joined(&server, &dial("g", "c"), &named("q"));
    client.pokes_until(is_got);
    let before = api.bodies().len();
    eventually("revalidated", || api.bodies().len() >= before + 3);
    refuse.store(true, std::sync::atomic::Ordering::SeqCst);
    assert_eq!(client.error()["kind"], "TransformFailed");
}
