//! Many client groups come at once: they come up in the order in which they came, a bounded number
//! of them at a time, and those that are up are served meanwhile.

use crate::held_store::HeldStore;
use crate::support::*;

/// Groups that may come up at once (`src/sync/admission.rs`).
const PLACES: usize = 256;
const CLIENTS: usize = 400;

#[test]
fn groups_come_up_in_order_a_bounded_number_at_a_time_while_others_are_served() {
    let store = HeldStore::new();
    let mut server = Server::start(&Setup { store: Some(store.clone()), ..Setup::default() });
    let mut served = Client::joined(&server, &dial("served", "c"), &put("q"));
    served.pokes_until(is_got);

    store.hold_loads();
    let mut clients: Vec<Client> = (0..CLIENTS)
        .map(|n| Client::joined(&server, &dial(&format!("g{n:03}"), "c"), &put("q")))
        .collect();
    let waiting = (CLIENTS - PLACES) as u64;
    eventually("all have asked", || server.number("groupsWaiting") == waiting);
    assert_eq!((store.loads_held(), server.number("groupsComingUp")), (PLACES, PLACES as u64));

    for n in 0..3 {
        let new = server.issue(&format!("i{n}"), n);
        let version = server.commit(vec![new]);
        served.poke();
        assert_eq!(served.cookie.as_deref(), Some(version.as_str()), "it is not kept from its own");
    }

    for (n, client) in clients.iter_mut().enumerate() {
        assert!(store.loads_held() <= PLACES);
        assert_eq!(store.let_a_load_go(), format!("g{n:03}"));
        // Its place is the next one's: so it is not before it is up.
        if n % 40 == 0 {
            let parts = client.pokes_until(is_got);
            assert_eq!(parts.iter().filter_map(|p| p["rowsPatch"].as_array()).flatten().count(), 3);
        }
    }
    for (n, client) in clients.iter_mut().enumerate().filter(|(n, _)| n % 40 != 0) {
        let rows = client.pokes_until(is_got);
        assert!(!rows.is_empty(), "g{n:03}");
    }
    let up = CLIENTS as u64 + 1;
    eventually("all are up", || server.number("groupsUp") == up);
    assert_eq!(server.number("mostGroupsComingUp"), PLACES as u64);
    assert_eq!(server.number("groupsAdmitted"), up);
    assert_eq!((server.number("groupsWaiting"), server.number("groupsComingUp")), (0, 0));
}
