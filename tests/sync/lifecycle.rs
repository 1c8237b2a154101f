//! Checklist 32–40: replaced sockets, silence, stopping, users.

use serde_json::json;

use crate::support::*;

#[test]
fn a_new_socket_of_a_client_closes_the_old_one_without_error() {
    let server = Server::start(&Setup::default());
    let mut old = Client::joined(&server, &dial("g", "c"), &put("q"));
    old.pokes_until(is_got);
    let cookie = old.cookie.clone().unwrap();
    let mut new = Client::joined(&server, &dial("g", "c").cookie(&cookie), "");
    loop {
        match old.next() {
            Got::Json(kind, body) => assert_ne!(kind, "error", "{body}"),
            Got::Binary(_) => panic!("binary"),
            Got::End(end) => {
                assert_eq!(end.code, None);
                break;
            }
        }
    }
    new.cookie = Some(cookie);
    new.poke();
}

#[test]
fn another_user_is_refused_and_the_first_stays() {
    let server = Server::start(&Setup::default());
    let mut first = Client::joined(&server, &dial("g", "c").and("userID=u1"), "");
    first.poke();
    let mut second = Client::connect(&server, &dial("g", "d").and("userID=u2")).unwrap();
    assert_eq!(second.error()["kind"], "Unauthorized");
    let end = second.end();
    assert_eq!(end.code, Some(3000));
    assert!(end.reason.starts_with("Client groups are pinned"));
    first.say(r#"["ping",{}]"#);
    assert!(matches!(first.next(), Got::Json(kind, _) if kind == "pong" || kind == "pokeStart"));
}

#[test]
fn a_silent_server_says_that_it_lives() {
    let server = Server::start(&Setup::default());
    let mut client = Client::connect(&server, &dial("g", "c")).unwrap();
    assert_eq!(client.json().0, "connected");
    assert!(matches!(client.next(), Got::Json(kind, _) if kind == "pong"));
}

#[test]
fn stopping_closes_every_socket_without_error() {
    let mut server = Server::start(&Setup { executors: 2, ..Setup::default() });
    let mut clients: Vec<Client> = (0..6)
        .map(|g| {
            let mut client = Client::joined(&server, &dial(&format!("g{g}"), "c"), &put("q"));
            client.pokes_until(is_got);
            client
        })
        .collect();
    let ending = std::thread::spawn(move || {
        for client in &mut clients {
            loop {
                match client.next() {
                    Got::Json(kind, body) => assert_ne!(kind, "error", "{body}"),
                    Got::Binary(_) => panic!("binary"),
                    Got::End(end) => {
                        assert_eq!(end.code, None);
                        break;
                    }
                }
            }
        }
    });
    assert!(server.stop());
    ending.join().unwrap();
}

#[test]
fn pushes_are_refused_clearly_where_there_is_no_mutate_endpoint() {
    let server = Server::start(&Setup::default());
    let mut client = Client::joined(&server, &dial("g", "c"), "");
    client.poke();
    let push = json!(["push", {"clientGroupID": "g", "mutations": [
        {"type": "custom", "id": 1, "clientID": "c", "name": "m", "args": [null], "timestamp": 1.0}
    ], "pushVersion": 1, "timestamp": 1.0, "requestID": "r"}]);
    client.say(&push.to_string());
    assert_eq!(client.error()["kind"], "InvalidPush");
}

#[test]
fn pings_are_answered_while_the_query_endpoint_is_slow() {
    let (release, wait) = std::sync::mpsc::channel::<()>();
    let wait = std::sync::Mutex::new(wait);
    let api = QueryApi::start(move |call, _| {
        wait.lock().unwrap().recv_timeout(PATIENCE).ok();
        (200, all_issues(call))
    });
    let server = Server::start(&Setup { query_url: Some(api.url.clone()), ..Setup::default() });
    let mut client = Client::joined(&server, &dial("g", "c"), &named("q"));
    eventually("the endpoint is asked", || !api.bodies().is_empty());
    client.say(r#"["ping",{}]"#);
    assert!(matches!(client.next(), Got::Json(kind, _) if kind == "pong"));
    release.send(()).unwrap();
    release.send(()).unwrap();
    client.pokes_until(is_got);
}
