//! Custom mutators: what the app is sent, and what becomes of its answers (spec: sync-protocol
//! §7, checklist 46–52).

use std::sync::Mutex;
use std::sync::mpsc::{Receiver, Sender, channel};

use serde_json::{Value, json};
use tungstenite::Message;

use crate::api::{Api, Request, with_headers};
use crate::socket::{Connect, PATIENCE, Socket};
use crate::support::server::is_original;
use crate::world::{World, init, items, put};

/// A server whose mutate endpoint is `api`, at `/push`.
fn world(api: &Api, env: &[(&str, &str)]) -> World {
    let url = url(api, "/push");
    let mut all = vec![("ZERO_MUTATE_URL", url.as_str())];
    all.retain(|(name, _)| !env.iter().any(|(n, _)| n == name));
    all.extend_from_slice(env);
    World::new(&all)
}

fn url(api: &Api, path: &str) -> String {
    api.url().replace("/query", path)
}

fn mutation(client: &str, id: i64, name: &str, arg: &Value) -> Value {
    json!({"type": "custom", "id": id, "clientID": client, "name": name, "args": [arg],
        "timestamp": 1_765_000_000_100u64})
}

/// The body of a push.
fn body(group: &str, request: &str, mutations: &[Value]) -> Value {
    json!({"timestamp": 1_765_000_000_123u64, "clientGroupID": group, "pushVersion": 1,
        "requestID": request, "mutations": mutations})
}

fn push(group: &str, request: &str, mutations: &[Value]) -> Value {
    json!(["push", body(group, request, mutations)])
}

/// A push of one mutation that means nothing.
fn small(client: &str, id: i64) -> Value {
    push("g", &format!("{client}-{id}"), &[mutation(client, id, "m", &Value::Null)])
}

fn mutation_ids(request: &Request) -> Vec<(String, i64)> {
    let list = request.body["mutations"].as_array().unwrap();
    let id = |m: &Value| (m["clientID"].as_str().unwrap().to_owned(), m["id"].as_i64().unwrap());
    list.iter().map(id).collect()
}

/// "Everything worked", in the current shape.
fn done(request: &Request) -> (u16, String) {
    let list = request.body["mutations"].as_array().unwrap();
    let results: Vec<Value> = list
        .iter()
        .map(|m| json!({"id": {"id": m["id"], "clientID": m["clientID"]}, "result": {}}))
        .collect();
    (200, json!({"kind": "MutateResponse", "mutations": results}).to_string())
}

fn joined(world: &World, client: &str) -> Socket {
    let mut socket = world.connect("g", client).init(init(&[])).connected();
    socket.poke();
    socket
}

/// What an app does with mutations (spec: sync-protocol §7.7): `label` sets a label, `refuse` is
/// an application error.
struct App(postgres::Client);

impl App {
    fn answer(&mut self, request: &Request) -> (u16, String) {
        let group = request.body["clientGroupID"].as_str().unwrap();
        for mutation in request.body["mutations"].as_array().unwrap() {
            let arg = &mutation["args"][0];
            let client = mutation["clientID"].as_str().unwrap();
            let id = mutation["id"].as_i64().unwrap();
            match mutation["name"].as_str().unwrap() {
                "_zero_cleanupResults" => self.clean_up(arg),
                name => self.mutate(group, client, id, name, arg),
            }
        }
        done(request)
    }

    fn mutate(&mut self, group: &str, client: &str, id: i64, name: &str, arg: &Value) {
        let mut tx = self.0.transaction().unwrap();
        let last: i64 = tx
            .query_one(
                "INSERT INTO zero_0.clients AS c (\"clientGroupID\", \"clientID\", \
                 \"lastMutationID\") VALUES ($1, $2, 1) ON CONFLICT (\"clientGroupID\", \
                 \"clientID\") DO UPDATE SET \"lastMutationID\" = c.\"lastMutationID\" + 1 \
                 RETURNING \"lastMutationID\"",
                &[&group, &client],
            )
            .unwrap()
            .get(0);
        assert_eq!(last, id, "every mutation once and in order");
        if name == "label" {
            let args: [&(dyn postgres::types::ToSql + Sync); 2] =
                [&arg["label"].as_str(), &arg["id"].as_str()];
            tx.execute("UPDATE item SET label = $1 WHERE id = $2", &args).unwrap();
        } else {
            let result = json!({"error": "app", "message": "refused", "details": arg}).to_string();
            tx.execute(
                "INSERT INTO zero_0.mutations (\"clientGroupID\", \"clientID\", \"mutationID\", \
                 result) VALUES ($1, $2, $3, $4::text::json)",
                &[&group, &client, &id, &result],
            )
            .unwrap();
        }
        tx.commit().unwrap();
    }

    fn clean_up(&mut self, arg: &Value) {
        let group = arg["clientGroupID"].as_str();
        if arg["type"] == "single" {
            self.0
                .execute(
                    "DELETE FROM zero_0.mutations WHERE \"clientGroupID\" = $1 AND \"clientID\" \
                     = $2 AND \"mutationID\" <= $3",
                    &[&group, &arg["clientID"].as_str(), &arg["upToMutationID"].as_i64()],
                )
                .unwrap();
        } else {
            for client in arg["clientIDs"].as_array().unwrap() {
                self.0
                    .execute(
                        "DELETE FROM zero_0.mutations WHERE \"clientGroupID\" = $1 AND \
                         \"clientID\" = $2",
                        &[&group, &client.as_str()],
                    )
                    .unwrap();
            }
        }
    }
}

/// Lets the endpoint do what an app does.
fn run_app(api: &Api, world: &World) {
    let mut app = App(postgres::Client::connect(&world.db.url(), postgres::NoTls).unwrap());
    api.answer(move |request| app.answer(request));
}

/// Makes the endpoint wait in each call: it says that it was called and goes on when told.
fn step_by_step(api: &Api) -> (Receiver<()>, Sender<()>) {
    let (arrived, arrivals) = channel();
    let (go_on, wait) = channel::<()>();
    let wait = Mutex::new(wait);
    api.answer(move |request| {
        arrived.send(()).unwrap();
        let _ = wait.lock().unwrap().recv_timeout(PATIENCE);
        done(request)
    });
    (arrivals, go_on)
}

/// A server whose app has a mutation of client `a` in hand and takes its time.
struct HeldUp {
    api: Api,
    world: World,
    a: Socket,
    arrivals: Receiver<()>,
    go_on: Sender<()>,
}

fn held_up() -> HeldUp {
    let api = Api::start();
    let world = world(&api, &[]);
    let (arrivals, go_on) = step_by_step(&api);
    let mut a = joined(&world, "a");
    a.send(&small("a", 1));
    arrivals.recv_timeout(PATIENCE).unwrap();
    HeldUp { api, world, a, arrivals, go_on }
}

#[test]
fn a_mutation_goes_to_the_app_and_comes_back_with_its_rows() {
    let api = Api::start();
    let world = world(&api, &[]);
    run_app(&api, &world);
    let mut a = world.connect("g", "a").init(init(&[put("q", &items())])).connected();
    a.until_got("q");
    let mut b = world.connect("g", "b").init(init(&[])).connected();
    b.pokes_until(|p| p.rows.len() == 3);
    a.catch_up_with(&b);

    let label = mutation("a", 1, "label", &json!({"id": "i1", "label": "new"}));
    let mut sent = body("g", "r1", &[label]);
    sent["traceparent"] = json!("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01");
    sent["auth"] = json!("ignored");
    a.send(&json!(["push", sent]));
    let request = api.request();
    assert_eq!(request.target, "/push?schema=zero_0&appID=zero");
    assert_eq!(request.body, sent);
    for socket in [&mut a, &mut b] {
        let poke = socket.poke();
        assert_eq!(poke.lmids, [("a".to_owned(), json!(1))].into());
        assert_eq!(poke.puts("item"), [json!({"id": "i1", "n": 1, "label": "new"})]);
        assert_eq!(poke.parts.len(), 1, "one transaction, one part");
    }
    // A tab may push for another one; a refused mutation is told by its result.
    b.send(&push("g", "r2", &[mutation("a", 2, "refuse", &json!([7]))]));
    assert_eq!(mutation_ids(&api.request()), [("a".to_owned(), 2)]);
    let result = json!({"error": "app", "message": "refused", "details": [7]});
    let id = json!({"clientID": "a", "id": 2});
    for socket in [&mut a, &mut b] {
        let poke = socket.poke();
        assert_eq!(poke.lmids["a"], 2);
        assert_eq!(
            poke.mutations,
            [json!({"op": "put", "mutation": {"id": id, "result": result}})]
        );
    }
    // It has been seen: the app may forget it.
    a.send(&json!(["ackMutationResponses", id]));
    let request = api.request();
    assert_eq!(request.target, "/push?schema=zero_0&appID=zero");
    let clean_up = &request.body["mutations"][0];
    let arg = json!({"type": "single", "clientGroupID": "g", "clientID": "a", "upToMutationID": 2});
    assert_eq!(clean_up["args"], json!([arg]));
    for (key, value) in [("type", "custom"), ("name", "_zero_cleanupResults"), ("clientID", "a")] {
        assert_eq!(clean_up[key], value);
    }
    assert_eq!(clean_up["id"], 0);
    assert_eq!(request.body["clientGroupID"], "g");
    assert_eq!(
        (&request.body["pushVersion"], &request.body["requestID"]),
        (&json!(1), &json!("cleanup-g-a-2"))
    );
    assert!(request.body["timestamp"].is_u64() && clean_up["timestamp"].is_u64());
    for socket in [&mut a, &mut b] {
        assert_eq!(socket.poke().mutations, [json!({"op": "del", "id": id})]);
    }
    // Results of a client that is gone go with it.
    b.send(&push("g", "r3", &[mutation("b", 1, "refuse", &json!(null))]));
    api.request();
    a.poke();
    b.poke();
    b.try_send(Message::Close(None));
    a.send(&json!(["deleteClients", {"clientIDs": ["b"]}]));
    let request = api.request();
    let arg = json!({"type": "bulk", "clientGroupID": "g", "clientIDs": ["b"]});
    assert_eq!(request.body["mutations"][0]["args"], json!([arg]));
    assert_eq!(request.body["mutations"][0]["clientID"], "b");
    let id = request.body["requestID"].as_str().unwrap();
    assert!(id.starts_with("cleanup-bulk-g-"), "{id}");
    let poke = a.pokes_until(|p| !p.mutations.is_empty());
    assert_eq!(poke.mutations, [json!({"op": "del", "id": {"clientID": "b", "id": 1}})]);
    assert_eq!(a.take_aside("deleteClients"), json!(["deleteClients", {"clientIDs": ["b"]}]));
    assert!(api.drain().is_empty());
}

#[test]
fn pushes_gather_while_a_call_is_under_way() {
    let HeldUp { api, world, mut a, arrivals, go_on } = held_up();
    let mut b = joined(&world, "b");
    // Pings show that the server has the pushes, and that nobody waits for the app.
    a.send(&small("a", 2));
    a.send(&small("a", 3));
    a.ping();
    b.send(&small("b", 1));
    b.ping();
    a.send(&small("a", 4));
    a.ping();
    b.send(&small("a", 5));
    b.ping();
    assert!(arrivals.try_recv().is_err(), "one request of a group at a time");
    for _ in 0..3 {
        go_on.send(()).unwrap();
    }
    let requests = [api.request(), api.request(), api.request()];
    let a_ids = |ids: &[i64]| ids.iter().map(|id| ("a".to_owned(), *id)).collect::<Vec<_>>();
    assert_eq!(mutation_ids(&requests[0]), a_ids(&[1]));
    assert_eq!(mutation_ids(&requests[1]), a_ids(&[2, 3, 4]), "of one sender, in order");
    assert_eq!(mutation_ids(&requests[2]), [("b".to_owned(), 1), ("a".to_owned(), 5)]);
    assert_eq!(requests[1].body["requestID"], "a-2", "the first one's frame");
    assert!(api.drain().is_empty());
}

#[test]
fn what_was_taken_is_sent_when_its_sender_has_left() {
    let HeldUp { api, world: _world, mut a, arrivals: _arrivals, go_on } = held_up();
    a.send(&small("a", 2));
    a.ping();
    a.close();
    for id in 1..=2 {
        go_on.send(()).unwrap();
        assert_eq!(mutation_ids(&api.request()), [("a".to_owned(), id)]);
    }
}

#[test]
fn other_credentials_are_another_request() {
    let api = Api::start();
    let query = Api::start();
    let query_url = query.url();
    let world = world(&api, &[("ZERO_QUERY_URL", &query_url)]);
    let (arrivals, go_on) = step_by_step(&api);
    let content =
        json!({"initConnectionMessage": ["initConnection", init(&[])], "authToken": "t1"});
    let mut a = world.connect("g", "a").content(&content).connected();
    a.poke();
    a.send(&small("a", 1));
    arrivals.recv_timeout(PATIENCE).unwrap();
    a.send(&small("a", 2));
    a.send(&json!(["updateAuth", {"auth": "t2"}]));
    a.send(&small("a", 3));
    a.send(&small("a", 4));
    for _ in 0..4 {
        go_on.send(()).unwrap();
    }
    let mut seen = Vec::new();
    while seen.len() < 4 {
        let request = api.request();
        let token = request.header("authorization").unwrap();
        seen.extend(mutation_ids(&request).into_iter().map(|(_, id)| (token.to_owned(), id)));
    }
    let want = [("t1", 1), ("t1", 2), ("t2", 3), ("t2", 4)];
    assert_eq!(seen, want.map(|(token, id)| (format!("Bearer {token}"), id)));
}

#[test]
fn the_app_is_called_with_what_the_connection_brought() {
    let api = Api::start();
    let url = format!("{}?own=1,http://127.0.0.1:*/other/*", url(&api, "/push"));
    let env = [
        ("ZERO_MUTATE_URL", url.as_str()),
        ("ZERO_QUERY_URL", "http://127.0.0.1:9/unused"),
        ("ZERO_MUTATE_API_KEY", "key-1"),
        ("ZERO_MUTATE_FORWARD_COOKIES", "true"),
        ("ZERO_MUTATE_ALLOWED_CLIENT_HEADERS", "X-App,x-too"),
        ("ZERO_MUTATE_ALLOWED_REQUEST_HEADERS", "x-trace"),
    ];
    let world = world(&api, &env);
    api.answer(done);
    // Before `initConnection`, too: with what the handshake brought.
    let connect = with_headers(world.connect("g", "a"));
    let mut early = connect.content(&json!({"authToken": "tok-é"})).connected();
    early.send(&small("a", 1));
    let request = api.request();
    assert_eq!(request.target, "/push?own=1&schema=zero_0&appID=zero");
    request.expect_what_was_brought();
}

fn with_target(connect: &Connect, url: Option<&str>, headers: Value) -> Socket {
    let mut body = init(&[]);
    if let Some(url) = url {
        body["userPushURL"] = json!(url);
    }
    body["userPushHeaders"] = headers;
    // Query headers are none of its business.
    body["userQueryHeaders"] = json!({"x-app": "query"});
    let mut socket = connect.clone().init(body).connected();
    socket.poke();
    socket
}

#[test]
fn clients_choose_among_the_urls_that_are_allowed() {
    let api = Api::start();
    let url = format!("{},http://127.0.0.1:*/other/*", url(&api, "/push"));
    let env =
        [("ZERO_MUTATE_URL", url.as_str()), ("ZERO_MUTATE_ALLOWED_CLIENT_HEADERS", "X-App,x-too")];
    let world = world(&api, &env);
    api.answer(done);
    let other = format!("{}/other/p?x=%20y", api.url().trim_end_matches("/query"));
    let headers = json!({"x-app": "a", "X-TOO": "b", "x-not": "c"});
    let connect = world.connect("g", "a").header("Cookie", "session=1");
    let mut a = with_target(&connect, Some(&other), headers);
    a.send(&small("a", 1));
    let request = api.request();
    let target = request.target.replace("x=+y", "x=%20y");
    assert_eq!(target, "/other/p?x=%20y&schema=zero_0&appID=zero");
    request.expect_headers(&[
        ("x-app", Some("a")),
        ("x-too", Some("b")),
        ("x-not", None),
        ("x-api-key", None),
        ("authorization", None),
        ("cookie", None),
    ]);
    // Results are cleaned up where they were made.
    a.send(&json!(["ackMutationResponses", {"clientID": "a", "id": 1}]));
    assert!(api.request().target.starts_with("/other/p?"));

    let failure = |url: &str| {
        let mut socket = with_target(&world.connect("g", "b"), Some(url), json!({}));
        socket.send(&small("b", 1));
        let error = socket.error();
        assert_eq!(error["kind"], "PushFailed");
        assert_eq!((&error["origin"], &error["reason"]), (&json!("zeroCache"), &json!("internal")));
        assert_eq!(error["mutationIDs"], json!([{"id": 1, "clientID": "b"}]));
        error["message"].as_str().unwrap().to_owned()
    };
    let bad = "http://127.0.0.1:9/push2";
    assert_eq!(
        failure(bad),
        format!("URL \"{bad}\" is not allowed by the ZERO_MUTATE_URL configuration")
    );
    for param in ["schema", "appID"] {
        let text = failure(&format!("{other}&{param}=1"));
        let want = format!(
            "Failed to push: The push URL cannot contain the reserved query param \"{param}\""
        );
        assert_eq!(text, want);
    }
    assert!(api.drain().is_empty(), "no request was made");
}

#[test]
fn what_may_pass_is_tried_again_and_nothing_else() {
    let api = Api::start();
    let world = world(&api, &[]);
    let mut a = joined(&world, "a");
    let mut left = 3;
    api.answer(move |request| {
        if left == 0 {
            return done(request);
        }
        left -= 1;
        (503, "later".to_owned())
    });
    a.send(&small("a", 1));
    for _ in 0..4 {
        assert_eq!(mutation_ids(&api.request()), [("a".to_owned(), 1)]);
    }
    a.ping();
    api.answer(|_| (502, "down".to_owned()));
    a.send(&small("a", 2));
    let error = a.error();
    assert_eq!((api.drain().len(), &error["status"]), (4, &json!(502)));

    let ids = json!([{"id": 1, "clientID": "a"}]);
    let long = "x".repeat(600);
    let preview = format!("{}...", "x".repeat(512));
    let http = |status: u16, preview: &str| {
        json!({"kind": "PushFailed", "origin": "zeroCache", "reason": "http", "status": status,
            "bodyPreview": preview, "mutationIDs": ids,
            "message": format!("Fetch from API server returned non-OK status {status}")})
    };
    for (answer, want) in [
        ((400, long), http(400, &preview)),
        ((404, String::new()), http(404, "")),
        ((403, "no".to_owned()), http(403, "no")),
    ] {
        let mut a = joined(&world, "a");
        api.answer(move |_| answer.clone());
        a.send(&small("a", 1));
        assert_eq!(a.error(), want);
        assert_eq!(api.drain().len(), 1);
    }
    for answer in ["", "{", "{}", "[]", "{\"mutations\":7}", "{\"error\":\"zzz\"}"] {
        let mut a = joined(&world, "a");
        api.answer(move |_| (200, answer.to_owned()));
        a.send(&small("a", 1));
        let error = a.error();
        assert_eq!((&error["origin"], &error["reason"]), (&json!("zeroCache"), &json!("parse")));
        let text = error["message"].as_str().unwrap();
        assert!(text.starts_with("Failed to parse response from API server: "), "{text}");
        assert_eq!((api.drain().len(), &error["mutationIDs"]), (1, &ids));
    }
}

#[test]
fn an_app_that_is_not_there_is_an_internal_failure() {
    // A port that no other test can be given meanwhile.
    let world = World::new(&[("ZERO_MUTATE_URL", "http://127.0.0.1:1/push")]);
    let mut a = joined(&world, "a");
    a.send(&small("a", 1));
    let error = a.error();
    assert_eq!((&error["kind"], &error["reason"]), (&json!("PushFailed"), &json!("internal")));
    let text = error["message"].as_str().unwrap();
    assert!(text.starts_with("Fetch from API server threw error: "), "{text}");
    assert_eq!(error["mutationIDs"], json!([{"id": 1, "clientID": "a"}]));
}

#[test]
fn failures_go_to_the_clients_whose_mutations_they_are() {
    let api = Api::start();
    let world = world(&api, &[]);
    let (mut a, mut b) = (joined(&world, "a"), joined(&world, "b"));
    let ids = json!([{"id": 1, "clientID": "b"}, {"id": 9, "clientID": "elsewhere"}]);
    let failed = json!({"kind": "PushFailed", "origin": "server", "reason": "database",
        "message": "db down", "details": {"x": [1]}, "mutationIDs": ids});
    let text = failed.to_string();
    api.answer(move |_| (200, text.clone()));
    a.send(&small("b", 1));
    assert_eq!(b.error(), failed, "passed on as it is");
    // Without ids nobody is told.
    let mut silent = failed;
    silent["mutationIDs"] = json!([]);
    api.answer(move |_| (200, silent.to_string()));
    a.send(&small("a", 1));
    api.request();
    api.request();

    // Older shapes: each is told its own.
    for (answer, want) in [
        (
            json!({"error": "unsupportedPushVersion"}),
            json!({"origin": "server", "reason": "unsupportedPushVersion",
                "message": "Unsupported push version"}),
        ),
        (
            json!({"error": "unsupportedSchemaVersion"}),
            json!({"origin": "server", "reason": "internal",
                "message": "Unsupported schema version"}),
        ),
        (
            json!({"error": "zeroPusher", "details": "why"}),
            json!({"origin": "server", "reason": "internal", "message": "why"}),
        ),
        (
            json!({"error": "http", "status": 500, "details": "text"}),
            json!({"origin": "zeroCache", "reason": "http", "status": 500, "bodyPreview": "text",
                "message": "Fetch from API server returned non-OK status 500"}),
        ),
    ] {
        let mut b = joined(&world, "b");
        let mut answer = answer;
        answer["mutationIDs"] = ids.clone();
        api.answer(move |_| (200, answer.to_string()));
        a.send(&small("b", 1));
        let mut want = want;
        want["kind"] = json!("PushFailed");
        want["mutationIDs"] = json!([{"id": 1, "clientID": "b"}]);
        assert_eq!(b.error(), want);
    }
    // A gap in the ids, in the result of an old app.
    let mut b = joined(&world, "b");
    let entry = |client: &str, id: i64, result: Value| json!({"id": {"id": id, "clientID": client}, "result": result});
    let answer = json!({"mutations": [entry("a", 2, json!({"error": "alreadyProcessed"})),
        entry("b", 5, json!({})), entry("b", 7, json!({"error": "oooMutation", "details": "gap"}))]});
    api.answer(move |_| (200, answer.to_string()));
    a.send(&small("b", 5));
    assert_eq!(
        b.error(),
        json!({"kind": "PushFailed", "origin": "server", "reason": "oooMutation",
            "message": "mutation was out of order", "details": "gap",
            "mutationIDs": [{"id": 5, "clientID": "b"}, {"id": 7, "clientID": "b"}]})
    );
    let told = a.ping();
    assert!(told.iter().all(|m| m[0] != "error"), "{told:?}");
}

#[test]
fn refused_credentials_end_the_connection() {
    let api = Api::start();
    let query = Api::start();
    let query_url = query.url();
    let world = world(&api, &[("ZERO_QUERY_URL", &query_url)]);
    let mut a = joined(&world, "a");
    // Pins the group to the user of its URL.
    api.answer(done);
    a.send(&small("a", 1));
    api.request();
    a.ping();
    let says = |user: Value| {
        move |request: &Request| {
            let (_, text) = done(request);
            let mut answer: Value = serde_json::from_str(&text).unwrap();
            answer["userID"] = user.clone();
            (200, answer.to_string())
        }
    };
    api.answer(says(json!("u1")));
    a.send(&small("a", 2));
    api.request();
    a.ping();
    for user in [json!("other"), Value::Null] {
        let mut a = joined(&world, "a");
        api.answer(says(user));
        a.send(&small("a", 3));
        assert_eq!(
            a.error(),
            json!({"kind": "PushFailed", "origin": "zeroCache", "reason": "http", "status": 401,
                "message": "Connection userID does not match validated server userID.",
                "mutationIDs": [{"id": 3, "clientID": "a"}]})
        );
        api.request();
    }
}

#[test]
fn errors_before_init_connection_have_nowhere_to_go() {
    let api = Api::start();
    let world = world(&api, &[]);
    api.answer(|request| match request.body["requestID"].as_str() {
        Some("a-2") => done(request),
        _ => (400, "bad".to_owned()),
    });
    let mut a = world.connect("g", "a").connected();
    a.send(&small("a", 1));
    api.request();
    // The next request comes after the answer to the one before.
    a.send(&small("a", 2));
    api.request();
    a.send(&json!(["ackMutationResponses", {"clientID": "a", "id": 1}]));
    assert_eq!(api.request().body["requestID"], "cleanup-g-a-1");
    assert_eq!(a.ping(), [] as [Value; 0], "failures of a clean-up are logged only");
    a.send(&json!(["initConnection", init(&[put("q", &items())])]));
    a.until_got("q");
}

#[test]
fn legacy_crud_mutations_are_refused_clearly() {
    let api = Api::start();
    let crud = json!({"type": "crud", "id": 1, "clientID": "a", "name": "_zero_crud",
        "timestamp": 1, "args": [{"ops": []}]});
    let custom = mutation("a", 2, "m", &Value::Null);
    let off = world(&api, &[("ZERO_ENABLE_CRUD_MUTATIONS", "false")]);
    api.answer(done);
    let mut a = joined(&off, "a");
    a.send(&push("g", "r", &[crud.clone(), custom.clone()]));
    a.fails("InvalidPush", "Support for legacy CRUD mutations is disabled");
    // Behind a custom one they are the app's.
    let mut a = joined(&off, "a");
    a.send(&push("g", "r", &[custom, crud.clone()]));
    let request = api.request();
    assert_eq!(request.body["mutations"][1], crud);
    if !is_original() {
        // It executes them.
        let on = world(&api, &[]);
        let mut a = joined(&on, "a");
        a.send(&push("g", "r", &[crud]));
        a.fails(
            "InvalidPush",
            "This version of zeroring does not execute legacy CRUD mutations. Use custom \
             mutators, with ZERO_MUTATE_URL.",
        );
    }
}

#[test]
fn redirects_are_followed() {
    let (api, other) = (Api::start(), Api::start());
    let world = world(&api, &[("ZERO_MUTATE_API_KEY", "key-1")]);
    other.answer(done);
    let to = url(&other, "/there");
    api.answer(move |_| (308, to.clone()));
    let mut a = joined(&world, "a");
    a.send(&small("a", 1));
    let request = other.request();
    assert_eq!(
        (request.target.as_str(), mutation_ids(&request)),
        ("/there", vec![("a".to_owned(), 1)])
    );
    assert_eq!(request.header("x-api-key"), Some("key-1"));
    a.ping();
    assert_eq!(api.drain().len(), 1);
}

#[test]
fn a_full_queue_makes_its_senders_wait_and_loses_nothing() {
    let HeldUp { api, world: _world, mut a, arrivals: _arrivals, go_on } = held_up();
    // More than may wait in a group, and more than a connection may have waiting behind it.
    let large = json!("x".repeat(9 << 20));
    for id in 2..=5 {
        a.send(&push("g", "large", &[mutation("a", id, "m", &large)]));
    }
    for id in 6..=8 {
        a.send(&small("a", id));
    }
    let mut seen = Vec::new();
    while seen.len() < 8 {
        go_on.send(()).unwrap();
        let request = api.request();
        seen.extend(mutation_ids(&request).into_iter().map(|(_, id)| id));
    }
    assert_eq!(seen, (1..=8).collect::<Vec<_>>());
    a.ping();
}

#[test]
fn an_answer_is_not_waited_for_longer_than_asked() {
    if is_original() {
        return; // It has no such option.
    }
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/push", silent.local_addr().unwrap());
    let world = World::new(&[("ZERO_MUTATE_URL", &url), ("ZERO_API_TIMEOUT_MS", "50")]);
    let mut a = joined(&world, "a");
    a.send(&small("a", 1));
    let error = a.error();
    assert_eq!((&error["kind"], &error["reason"]), (&json!("PushFailed"), &json!("internal")));
    let text = error["message"].as_str().unwrap();
    assert!(text.contains("no answer from") && text.contains("50ms"), "{text}");
}
