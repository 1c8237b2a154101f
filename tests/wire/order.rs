//! In which order things come on one socket (spec: sync-protocol §4.4, §5.1, §5.5, traps 9, 10).

use serde_json::{Value, json};
use tungstenite::Message;

use crate::api::Api;
use crate::socket::{Next, Socket};
use crate::support::server::is_original;
use crate::world::{World, change, del, init, items, others, put, put_named};

/// What came, in order, one word for each message and each poke: whose desires, what is got, how
/// many rows.
fn story(socket: &mut Socket, is_over: impl Fn(&str) -> bool) -> Vec<String> {
    let mut told: Vec<String> = Vec::new();
    while !told.last().is_some_and(|last| is_over(last)) {
        let word = match socket.next() {
            Next::Frame(frame) => {
                let body = &frame[1];
                match frame[0].as_str().unwrap() {
                    "pong" => continue,
                    "pokeStart" => rest_of_poke(socket, body["pokeID"].as_str().unwrap()),
                    "deleteClients" => format!("deleted {}", body["clientIDs"]),
                    "transformError" => format!("failed {}", body[0]["id"]),
                    "error" => format!("error {}", body["kind"]),
                    other => other.to_owned(),
                }
            }
            Next::Closed(code, reason) => format!("closed {code:?} {reason}"),
            other => panic!("{other:?}"),
        };
        told.push(word.replace('"', ""));
    }
    told
}

/// A poke is one thing: what comes between its parts is of another kind.
fn rest_of_poke(socket: &mut Socket, id: &str) -> String {
    let (mut wants, mut got, mut rows) = (Vec::new(), Vec::new(), 0);
    let ops = |list: &Value, into: &mut Vec<String>| {
        for op in list.as_array().into_iter().flatten() {
            let sign = if op["op"] == "put" { '+' } else { '-' };
            into.push(format!("{sign}{}", op["hash"].as_str().unwrap()));
        }
    };
    loop {
        let frame = socket.frame();
        let body = &frame[1];
        assert_eq!(body["pokeID"], id, "{frame}");
        if frame[0] == "pokeEnd" {
            assert!(body["cancel"].is_null(), "{frame}");
            let mut word = "poke".to_owned();
            for (name, mut list) in [("wants", wants), ("got", got)] {
                list.sort();
                if !list.is_empty() {
                    word += &format!(" {name} {}", list.join(" "));
                }
            }
            return if rows == 0 { word } else { format!("{word} rows {rows}") };
        }
        assert_eq!(frame[0], "pokePart", "{frame}");
        ops(&body["gotQueriesPatch"], &mut got);
        for list in body["desiredQueriesPatches"].as_object().into_iter().flat_map(|o| o.values()) {
            ops(list, &mut wants);
        }
        rows += body["rowsPatch"].as_array().map_or(0, Vec::len);
    }
}

#[test]
fn messages_take_effect_one_after_the_other_and_the_error_comes_last() {
    let world = World::new(&[]);
    let init = init(&[put("q", &items())]);
    let mut socket = world.connect("g", "c").init(init.clone()).open();
    // All at once; `connected` has not even been read.
    let mut messages = vec![
        change(&[put("r", &others())]),
        json!(["deleteClients", {"clientIDs": ["x"]}]),
        json!(["ping", {}]),
        change(&[del("r")]),
    ];
    // An error of the original overtakes pokes, or tears them.
    let fails = !is_original();
    if fails {
        messages.push(json!(["initConnection", init]));
        messages.push(change(&[put("never", &items())]));
    }
    for message in messages {
        socket.try_send(Message::text(message.to_string()));
    }
    let last = if fails { "closed None " } else { "poke wants -r" };
    let told = story(&mut socket, |word| word == last);
    let at = |word: &str| {
        let mut places = told.iter().enumerate().filter(|(_, w)| *w == word).map(|(n, _)| n);
        let place = places.next().unwrap_or_else(|| panic!("no `{word}`: {told:#?}"));
        assert_eq!(places.next(), None, "`{word}` twice: {told:#?}");
        place
    };
    let mut order = ["connected", "poke wants +q", "poke wants +r", "deleted [x]", "poke wants -r"]
        .map(at)
        .to_vec();
    if fails {
        order.extend(["error Internal", "closed None "].map(at));
    }
    assert_eq!(order[0], 0, "{told:#?}");
    assert!(order.is_sorted(), "{told:#?}");
    // Results come when the queries run: after what they are the results of.
    let got = told.iter().position(|word| word.contains("got"));
    assert!(got.is_none_or(|got| got > order[1]), "{told:#?}");
    assert!(told.iter().all(|word| !word.contains("never")), "{told:#?}");
}

#[test]
fn what_a_query_leads_to_comes_in_its_order() {
    let api = Api::start();
    let url = api.url();
    let world = World::new(&[("ZERO_QUERY_URL", &url)]);
    let wanted = [put_named("q", "items", json!([])), put_named("bad", "refused", json!([]))];
    let mut socket = world.connect("g", "c").init(init(&wanted)).open();
    let told = story(&mut socket, |word| word.contains("rows"));
    // It is told of the failure before the poke that says that the query is no more.
    let want = ["connected", "poke wants +bad +q", "failed bad", "poke got +q -bad rows 3"];
    assert_eq!(told, want);
    // One message after the other, each with all that it leads to.
    for message in [
        change(&[put_named("r", "others", json!([]))]),
        json!(["deleteClients", {"clientIDs": ["x"]}]),
        change(&[put_named("s", "from", json!([3])), del("r")]),
    ] {
        socket.send(&message);
    }
    let told = story(&mut socket, |word| word.contains("got +s"));
    assert_eq!(
        told,
        [
            "poke wants +r",
            "poke got +r rows 1",
            "deleted [x]",
            "poke wants +s -r",
            // Its row is there already.
            "poke got +s",
        ]
    );
}
