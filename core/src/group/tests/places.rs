//! A group asks for a place before it comes up, and holds it no longer than it needs it.

use super::super::{ConnId, Event, KEEP_ALIVE_MS, ResetReason};
use super::client::Persisted;
use super::harness::{Answer, CLIENT_SCHEMA, Harness};
use super::scenarios::{ALL_ISSUES, change, init, joined, put, rejoin};

fn connect(h: &mut Harness, client: &str, patch: &str) -> ConnId {
    let conn = h.connect("g", client, None, Persisted::default(), 51).expect("admitted");
    h.say(conn, &init(patch));
    conn
}

fn is_admitted(h: &Harness) -> bool {
    h.groups["g"].admitted
}

#[test]
fn nothing_is_loaded_before_the_groups_turn_and_the_place_is_free_when_it_is_up() {
    let mut h = Harness::new(false);
    let conn = connect(&mut h, "c", &put("q", ALL_ISSUES));
    assert_eq!((h.loads, is_admitted(&h)), (0, false));
    assert!(h.answer(&"g".into()), "its turn");
    assert!(is_admitted(&h));
    h.answer(&"g".into());
    assert_eq!((h.loads, is_admitted(&h)), (1, true));
    h.settle();
    assert_eq!((h.came_up, is_admitted(&h), h.state(conn).got.len()), (1, false, 1));
    // What it does from now on takes no place.
    h.say(conn, &change(&put("r", ALL_ISSUES)));
    joined(&mut h, "d", &put("q", ALL_ISSUES));
    assert_eq!((h.loads, h.came_up, h.state(conn).got.len()), (1, 1, 2));
}

#[test]
fn a_reset_takes_a_place_again() {
    let mut h = Harness::new(false);
    let conn = joined(&mut h, "c", &put("q", ALL_ISSUES));
    h.feed(&"g".into(), Event::Reset(ResetReason::SchemaChange));
    assert_eq!(h.world.instances(), 0, "what is void ends at once");
    h.answer(&"g".into());
    assert!(is_admitted(&h));
    h.settle();
    assert_eq!((h.loads, h.came_up), (1, 2));
    assert_eq!(h.state(conn).got.len(), 1);
}

#[test]
fn a_group_that_waits_for_the_app_has_no_place() {
    let mut h = Harness::new(true);
    h.endpoint = Box::new(|_, _| Answer::Ast(ALL_ISSUES.to_owned()));
    let named = r#"{"op":"put","hash":"q","name":"n","args":[]}"#;
    let conn = connect(&mut h, "c", named);
    let (mut asked, mut held) = (0, 0);
    while h.answer(&"g".into()) {
        let waits = matches!(
            h.groups["g"].questions.front(),
            Some(super::harness::Question::Transform(..))
        );
        asked += usize::from(waits);
        held += usize::from(is_admitted(&h));
        assert!(!(waits && is_admitted(&h)), "nobody knows how long the app takes");
    }
    h.settle();
    assert!(asked >= 2 && held >= 1, "{asked} {held}");
    assert_eq!((h.state(conn).got.len(), is_admitted(&h)), (1, false));
}

#[test]
fn nothing_is_done_for_clients_that_have_left_when_their_turn_comes() {
    let mut h = Harness::new(false);
    let conn = connect(&mut h, "c", &put("q", ALL_ISSUES));
    h.disconnect(conn);
    h.settle();
    assert_eq!((h.loads, h.came_up, is_admitted(&h)), (0, 0, false));
    let conn = connect(&mut h, "d", &put("q", ALL_ISSUES));
    h.settle();
    assert_eq!((h.loads, h.came_up, h.state(conn).got.len()), (1, 1, 1));
    // The same for a group that is to come up again.
    h.feed(&"g".into(), Event::Reset(ResetReason::SchemaChange));
    let state = h.disconnect(conn);
    h.settle();
    assert_eq!((h.came_up, is_admitted(&h), h.world.instances()), (1, false, 0));
    let conn = rejoin(&mut h, "d", state);
    assert_eq!((h.came_up, h.socket(conn).model.pokes), (2, 1));
    assert!(h.error_kind(conn).is_none() && CLIENT_SCHEMA.contains("issue"));
    h.disconnect(conn);
    h.pass(KEEP_ALIVE_MS + 1.0);
    assert!(h.groups.is_empty());
}
