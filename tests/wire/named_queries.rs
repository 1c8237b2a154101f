//! Named queries: what the app is asked, and what becomes of its answers (spec: sync-protocol
//! §7.5, §8, checklist 41, 42, 43, 54–56; view-syncer-cvr 47, 48).

use serde_json::{Value, json};

use crate::api::{Api, Request, answer, with_headers};
use crate::socket::{Connect, Next, Socket};
use crate::world::{World, again, change, del, init, put_named};

const NO_ARGS: &str = "items";

fn world(api: &Api, env: &[(&str, &str)]) -> World {
    let url = api.url();
    // The original wants both for tokens.
    let mut all = vec![("ZERO_QUERY_URL", url.as_str()), ("ZERO_MUTATE_URL", &url)];
    all.retain(|(name, _)| !env.iter().any(|(n, _)| n == name));
    all.extend_from_slice(env);
    World::new(&all)
}

fn named(hash: &str, name: &str) -> Value {
    put_named(hash, name, json!([]))
}

/// `initConnection` and a token.
fn with_token(connect: Connect, token: &str, body: Value) -> Socket {
    connect
        .content(&json!({"initConnectionMessage": ["initConnection", body], "authToken": token}))
        .connected()
}

fn names(request: &Request) -> Vec<String> {
    request.queries().iter().map(|q| q["name"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn the_app_is_asked_with_what_the_connection_brought() {
    let api = Api::start();
    let url = format!("{}?own=1,http://127.0.0.1:*/other/*", api.url());
    let env = [
        ("ZERO_QUERY_URL", url.as_str()),
        ("ZERO_QUERY_API_KEY", "key-1"),
        ("ZERO_QUERY_FORWARD_COOKIES", "true"),
        ("ZERO_QUERY_ALLOWED_CLIENT_HEADERS", "X-App,x-too"),
        ("ZERO_QUERY_ALLOWED_REQUEST_HEADERS", "x-trace"),
    ];
    let world = world(&api, &env);
    let mut body = init(&[put_named("h1", "from", json!([2])), named("h2", "others")]);
    body["userQueryHeaders"] = json!({"x-app": "a", "X-TOO": "b", "x-not": "c"});
    let mut socket = with_token(with_headers(world.connect("g", "c")), "tok-é", body);
    let validation = api.request();
    assert_eq!(validation.body, json!(["transform", []]));
    let transform = api.request();
    assert_eq!(
        transform.body,
        json!(["transform", [
        {"id": "h1", "name": "from", "args": [2]}, {"id": "h2", "name": "others", "args": []}]])
    );
    for request in [&validation, &transform] {
        assert_eq!(request.target, "/query?own=1&schema=zero_0&appID=zero");
        request.expect_what_was_brought();
        request.expect_headers(&[("x-app", Some("a")), ("x-too", Some("b")), ("x-not", None)]);
    }
    let poke = socket.pokes_until(|p| p.got.len() == 2);
    assert_eq!(poke.desired["c"], ["+h1", "+h2"]);
    assert_eq!((poke.puts("item").len(), poke.puts("other").len()), (2, 1));

    // Another URL of the allow list.
    let other = format!("{}/other/q", api.url().trim_end_matches("/query"));
    let mut body = init(&[named("h3", "items")]);
    body["userQueryURL"] = json!(other);
    let mut socket = world.connect("g2", "c2").init(body.clone()).connected();
    socket.until_got("h3");
    let request = api.request();
    assert_eq!(request.target, "/other/q?schema=zero_0&appID=zero");
    assert_eq!((request.header("authorization"), request.header("cookie")), (None, None));
    // And one that is not in it.
    let bad = "http://127.0.0.1:9/query";
    body["userQueryURL"] = json!(bad);
    let mut socket = world.connect("g3", "c3").init(body).connected();
    let error = socket.error();
    assert_eq!(error["kind"], "TransformFailed");
    assert_eq!((&error["reason"], &error["queryIDs"]), (&json!("internal"), &json!([])));
    let text = error["message"].as_str().unwrap();
    let want = format!("URL \"{bad}\" is not allowed by the ZERO_QUERY_URL configuration");
    assert!(text.ends_with(&want), "{text}");
}

#[test]
fn queries_are_asked_for_again_when_credentials_may_have_changed() {
    let api = Api::start();
    let mut world = world(&api, &[]);
    let body = init(&[named("q", "items")]);
    let mut socket = with_token(world.connect("g", "c"), "t1", body);
    socket.until_got("q");
    for expected in [&[][..], &[NO_ARGS.to_owned()]] {
        let request = api.request();
        assert_eq!(names(&request), expected);
        assert_eq!(request.header("authorization"), Some("Bearer t1"));
        assert_eq!(request.header("cookie"), None, "not by default");
    }
    // The same token: nothing. (A new query shows that nothing came before it.)
    socket.send(&json!(["updateAuth", {"auth": "t1"}]));
    socket.send(&change(&[named("r", "others")]));
    socket.until_got("r");
    assert_eq!(names(&api.request()), ["others"], "only what does not run yet");
    // Another one: all of them, as the new user sees them.
    api.answer(|request| {
        let queries: Vec<Value> = request
            .queries()
            .iter()
            .map(|q| {
                let ast = if q["name"] == "items" {
                    crate::world::items_from(3)
                } else {
                    crate::world::others()
                };
                json!({"id": q["id"], "name": q["name"], "ast": ast})
            })
            .collect();
        // The older form of the answer.
        (200, json!(["transformed", queries]).to_string())
    });
    socket.send(&json!(["updateAuth", {"auth": "t2"}]));
    let poke = socket.poke();
    // The query is what it was for the client; its rows differ.
    assert_eq!((poke.got.len(), poke.desired.len()), (0, 0));
    let mut ids: Vec<String> = poke.dels("item").iter().map(|id| id["id"].to_string()).collect();
    ids.sort();
    assert_eq!(ids, ["\"i1\"", "\"i2\""]);
    let last = api.drain().pop().unwrap();
    assert_eq!(last.header("authorization"), Some("Bearer t2"));
    let mut asked = names(&last);
    asked.sort();
    assert_eq!(asked, ["items", "others"]);
    world.sql("UPDATE item SET n = 9 WHERE id = 'i2'");
    assert_eq!(socket.poke().puts("item")[0]["id"], "i2");
    // A new connection asks for all, too.
    let cookie = socket.cookie.clone().unwrap();
    socket.close();
    let mut socket = with_token(world.connect("g", "c").cookie(&cookie), "t3", again(&[]));
    assert!(socket.poke().is_empty());
    let asked: Vec<usize> = api.drain().iter().map(|r| r.queries().len()).collect();
    assert_eq!(asked, [0, 2]);
    // Who was logged in cannot be nobody.
    socket.send(&json!(["updateAuth", {"auth": ""}]));
    socket.fails(
        "Unauthorized",
        "No token provided. An unauthenticated client cannot connect to an authenticated client \
         group.",
    );
}

#[test]
fn answers_are_cached_for_the_same_credentials() {
    let api = Api::start();
    let world = world(&api, &[]);
    let wanted = json!({"op": "put", "hash": "q", "name": "items", "args": [], "ttl": 0});
    let mut socket = world.connect("g", "c").init(init(std::slice::from_ref(&wanted))).connected();
    socket.until_got("q");
    assert_eq!(api.drain().len(), 2);
    socket.send(&change(&[del("q")]));
    socket.pokes_until(|p| p.got == ["-q"]);
    socket.send(&change(&[wanted]));
    socket.until_got("q");
    assert_eq!(api.drain().len(), 0);
}

#[test]
fn one_bad_query_does_not_stop_the_others() {
    let api = Api::start();
    let world = world(&api, &[]);
    let mut other = world.connect("g", "other").init(init(&[named("x", "items")])).connected();
    other.until_got("x");
    let body = init(&[
        named("r", "refused"),
        named("b", "broken"),
        named("u", "unanswered"),
        named("q", "others"),
    ]);
    let mut socket = world.connect("g", "c").init(body).connected();
    let poke = socket.until_got("q");
    let told = socket.take_aside("transformError");
    let mut errors = told[1].as_array().unwrap().clone();
    errors.sort_by_key(|e| e["id"].to_string());
    let broken = json!({"error": "parse", "id": "b", "name": "broken", "message": "bad"});
    let refused = json!({"error": "app", "id": "r", "name": "refused", "message": "not allowed",
        "details": {"code": 7}});
    assert_eq!(errors, [broken, refused]);
    let mut got = poke.got.clone();
    got.sort();
    assert_eq!(got, ["+q", "+x", "-b", "-r"]);
    assert_eq!(poke.desired["c"].len(), 4, "they stay desired: {poke:?}");
    // Nobody else is told.
    other.until_got("q");
    assert!(other.aside.is_empty(), "{:?}", other.aside);
    // Put again, it is asked for again.
    api.drain();
    api.answer(|request| {
        let queries = request.queries();
        let ok = queries
            .iter()
            .map(|q| json!({"id": q["id"], "name": q["name"], "ast": crate::world::items()}));
        (200, json!({"kind": "QueryResponse", "queries": ok.collect::<Vec<_>>()}).to_string())
    });
    socket.send(&change(&[named("r", "refused")]));
    socket.until_got("r");
    let mut asked = names(&api.request());
    asked.sort();
    assert_eq!(asked, ["refused", "unanswered"], "what does not run");
}

#[test]
fn a_failed_request_fails_the_connection_that_made_it() {
    let api = Api::start();
    let world = world(&api, &[]);
    let mut other = world.connect("g", "other").init(init(&[named("x", "items")])).connected();
    other.until_got("x");
    api.drain();
    let app = json!({"kind": "TransformFailed", "origin": "server", "reason": "database",
        "message": "no database", "queryIDs": ["q"], "details": {"a": 1}});
    let cases: Vec<(u16, String, Value)> = vec![
        (
            400,
            "no".repeat(400),
            json!({"reason": "http", "status": 400, "origin": "zeroCache",
            "message": "Fetch from API server returned non-OK status 400",
            "bodyPreview": format!("{}...", "no".repeat(256)), "queryIDs": ["q"]}),
        ),
        (
            401,
            "who?".into(),
            json!({"reason": "http", "status": 401, "origin": "zeroCache",
            "message": "Fetch from API server returned non-OK status 401",
            "bodyPreview": "who?", "queryIDs": ["q"]}),
        ),
        (200, app.to_string(), app.clone()),
        (200, json!(["transformFailed", app]).to_string(), app),
    ];
    for (i, (status, body, want)) in cases.into_iter().enumerate() {
        api.answer(move |request| {
            if request.queries().is_empty() {
                answer(request, json!({}))
            } else {
                (status, body.clone())
            }
        });
        let connect = world.connect("g", &format!("c{i}"));
        let mut socket = connect.init(init(&[named("q", "items")])).connected();
        let mut error = socket.error();
        let mut want = want;
        want.as_object_mut().unwrap().remove("kind");
        assert_eq!(error.as_object_mut().unwrap().remove("kind"), Some(json!("TransformFailed")));
        let mut ids: Vec<Value> = error["queryIDs"].as_array().unwrap().clone();
        ids.retain(|id| id != "x");
        error["queryIDs"] = json!(ids);
        assert_eq!(error, want, "case {i}");
    }
    // What is no JSON, or not the right one.
    for text in ["<html>", "{}", r#"{"kind":"QueryResponse","queries":[{"id":"q"}]}"#] {
        api.answer(move |request| {
            if request.queries().is_empty() {
                answer(request, json!({}))
            } else {
                (200, text.to_owned())
            }
        });
        let mut socket = world.connect("g", "d").init(init(&[named("q", "items")])).connected();
        let error = socket.error();
        assert_eq!(
            (&error["kind"], &error["reason"]),
            (&json!("TransformFailed"), &json!("parse"))
        );
        let message = error["message"].as_str().unwrap();
        assert!(message.starts_with("Failed to parse response from API server: "), "{message}");
    }
    // 5xx are tried again, three times.
    api.drain();
    let mut failures = 0;
    api.answer(move |request| {
        if request.queries().is_empty() || failures == 3 {
            return answer(request, json!({}));
        }
        failures += 1;
        (503, "busy".to_owned())
    });
    let mut socket = world.connect("g", "e").init(init(&[named("q", "items")])).connected();
    socket.until_got("q");
    let asked: Vec<usize> = api.drain().iter().map(|r| r.queries().len().min(1)).collect();
    assert_eq!(asked, [0, 1, 1, 1, 1]);
    // The group was not disturbed.
    api.answer(|request| answer(request, json!({})));
    assert!(other.ping().iter().all(|m| m[0] != "error"));
}

#[test]
fn the_app_says_who_may_connect() {
    let api = Api::start();
    let world = world(&api, &[]);
    let open = |group: &str| {
        let connect = world.connect(group, &format!("client-of-{group}"));
        connect.init(init(&[named("q", "items")])).connected()
    };
    // The validation fails: nothing is poked, nothing is kept.
    for status in [401, 403, 400] {
        api.answer(move |_| (status, "no".to_owned()));
        let mut socket = open("refused");
        let frame = socket.frame();
        assert_eq!(frame[1]["kind"], "TransformFailed", "{frame}");
        assert_eq!((&frame[1]["status"], &frame[1]["queryIDs"]), (&json!(status), &json!([])));
        assert_eq!(socket.next(), Next::Closed(None, String::new()));
    }
    api.answer(|request| answer(request, json!({"userID": "someone else"})));
    open("other")
        .fails("Unauthorized", "Connection userID does not match validated server userID.");
    api.answer(|request| answer(request, json!({"userID": null})));
    open("nobody")
        .fails("Unauthorized", "Connection userID does not match validated server userID.");
    api.answer(|request| answer(request, json!({"userID": "u1"})));
    open("right").until_got("q");
    // The refused group is as new.
    let mut socket = open("refused");
    assert_eq!(socket.poke().cookie, "00:01");
    // The app changes its mind.
    socket.until_got("q");
    api.answer(|_| (403, "no more".to_owned()));
    socket.send(&change(&[named("r", "others")]));
    let error = socket.error();
    assert_eq!((&error["kind"], &error["status"]), (&json!("TransformFailed"), &json!(403)));
    assert_eq!(error["queryIDs"], json!(["r"]));
}

#[test]
fn without_endpoint_named_queries_are_never_got() {
    let world = World::new(&[]);
    let mut socket = world
        .connect("g", "c")
        .init(init(&[named("n", "items"), crate::world::put("q", &crate::world::items())]))
        .connected();
    let poke = socket.until_got("q");
    assert_eq!(poke.desired["c"], ["+n", "+q"]);
    assert_eq!(poke.got, ["+q"]);
    assert!(socket.aside.is_empty());
}

#[test]
fn credentials_are_looked_at_again_from_time_to_time() {
    let api = Api::start();
    let often = [
        ("ZERO_AUTH_REVALIDATE_INTERVAL_SECONDS", "1"),
        ("ZERO_AUTH_RETRANSFORM_INTERVAL_SECONDS", "1"),
    ];
    let world = world(&api, &often);
    let open = |client: &str, query: &str| {
        with_token(world.connect("g", client), client, init(&[named(query, "items")]))
    };
    let mut a = open("a", "q");
    a.until_got("q");
    let mut b = open("b", "r");
    b.until_got("r");
    api.drain();
    // Every connection is validated, and one of them asks for the queries.
    let mut seen = std::collections::BTreeSet::new();
    while seen.len() < 3 {
        let request = api.request();
        let who = request.header("authorization").unwrap().to_owned();
        seen.insert(if request.queries().is_empty() { who } else { "queries".to_owned() });
    }
    let all = ["Bearer a", "Bearer b", "queries"].map(str::to_owned);
    assert_eq!(seen, all.into());
    // A server in trouble costs nobody the connection; a refusal one connection.
    api.answer(|_| (500, "trouble".to_owned()));
    for _ in 0..5 {
        api.request();
    }
    a.ping();
    api.answer(|request| {
        if request.header("authorization") == Some("Bearer b") && request.queries().is_empty() {
            (403, "b is out".to_owned())
        } else {
            answer(request, json!({}))
        }
    });
    let error = b.error();
    assert_eq!((&error["kind"], &error["status"]), (&json!("TransformFailed"), &json!(403)));
    assert!(a.ping().iter().all(|m| m[0] != "error"));
}
