//! The machine against a world of plain data: scenarios of the spec, and a seeded simulation.
//!
//! Where items of the checklists are tested (`spec/view-syncer-cvr.md`; those of the stores, 1 to
//! 26, in `storage/tests/cvr_store`; of the updaters, 27 to 38, 59, in `core/tests/cvr_updaters.rs`):
//!
//! | Item | Test |
//! |---|---|
//! | 39 client schema kept and compared | `scenarios::the_client_schema_is_needed_kept_and_compared` |
//! | 40 config poke, then results | `scenarios::a_new_group_gets_its_config_then_its_rows` |
//! | 41 cookies ahead, unknown groups | `scenarios::cookies_from_the_future_and_of_unknown_groups_are_refused` |
//! | 42 one empty poke for who is current | `scenarios::a_client_that_is_current_gets_one_empty_poke` |
//! | 43 late clients | `scenarios::a_late_client_gets_what_it_missed_and_others_nothing`, `simulation` |
//! | 44 replica behind the CVR | `checklist::a_replica_behind_the_cvr_is_waited_for` |
//! | 45 schema problems | `scenarios::a_schema_that_the_replica_cannot_serve_fails_the_group` |
//! | 46 resets | `simulation` |
//! | 47 erroring queries | `scenarios::an_application_error_fails_one_query`, `scenarios::a_failed_request_fails_the_client_that_asked` |
//! | 48 refused at connect | `scenarios::refused_credentials_at_connect_change_nothing` |
//! | 49 second user | `scenarios::another_user_is_turned_away_and_touches_nothing` |
//! | 50 old sockets | `scenarios::a_new_socket_of_a_client_closes_the_old_one_without_error` |
//! | 51 TTL in connected time | `scenarios::desired_queries_come_and_go_with_their_ttl_in_connected_time`, `checklist::evictions_that_are_close_share_a_poke_and_no_ttl_is_longer_than_ten_minutes` |
//! | 52 idle groups | `scenarios::an_idle_group_lives_for_five_seconds` |
//! | 53 drain | `src/sync/drain.rs`, `scenarios::a_drain_closes_without_error` |
//! | 54 unaffected groups | `scenarios::a_commit_reaches_clients_and_one_that_touches_nothing_does_not` |
//! | 55 last mutation ids alone | `scenarios::a_mutation_result_comes_with_its_id_and_rows` |
//! | 56 integers out of range | `checklist::an_integer_that_javascript_cannot_hold_fails_its_query_alone` (decision 5) |
//! | 57 parts of 100, unbroken cookies | every test: the client model ([`client`]) refuses anything else |
//! | 58 `deleteClients` | `scenarios::delete_clients_is_acknowledged_to_everybody` |
//! | 60 no trace of what failed | `checklist::a_message_that_fails_before_its_flush_leaves_no_trace` |
//! | 36–38, 43, 45, 50, 58 and traps T26, T32, to the letter | `rules` |
//! | decision 12 lost rows | `scenarios::records_of_rows_that_the_replica_lost_are_put_right` |
//! | T9, T33 open pokes; rows that go ahead | `early`, `simulation` |
//! | encode once, no reads | `shared` |

mod checklist;
mod client;
mod early;
mod errors;
mod harness;
mod places;
mod pushes;
mod rules;
mod scenarios;
mod shared;
mod simulation;
mod store;
mod takeover;
mod taking;
mod unread;
mod world;
