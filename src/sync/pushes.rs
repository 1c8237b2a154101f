//! Mutations between the groups of an executor and the app's mutate endpoint.

use std::rc::Rc;
use std::sync::Arc;

use zeroring_core::cvr::ClientGroupId;
use zeroring_core::group::{Credentials, Event, OutgoingPush};
use zeroring_core::protocol::mutate::CleanUp;
use zeroring_net::rt::spawn;

use super::executor::Executor;
use super::groups::wall_ms;
use crate::mutations::Room;

/// Something for the mutate endpoint.
pub(super) enum MutateCall {
    Push(Box<OutgoingPush>),
    CleanUp(Arc<Credentials>, CleanUp),
}

impl Executor {
    /// Takes what groups have for the endpoint; it is sent by and by.
    pub(super) fn forward(self: &Rc<Self>, calls: Vec<(ClientGroupId, MutateCall)>) {
        let Some(mutations) = &self.mutations else {
            if !calls.is_empty() {
                // Groups push only where there is an endpoint.
                tracing::error!("a group pushed to a mutate endpoint that is not configured");
            }
            return;
        };
        for (group, call) in calls {
            match call {
                MutateCall::Push(push) => {
                    let conn = push.conn;
                    let (room, idle) = mutations.put(&group, *push);
                    if room == Room::Free {
                        self.state.borrow_mut().message_done(conn);
                    }
                    if idle {
                        spawn(self.clone().push(group));
                    }
                }
                MutateCall::CleanUp(credentials, clean_up) => {
                    if mutations.put_clean_up(&group, credentials, clean_up) {
                        let mutations = mutations.clone();
                        spawn(async move { mutations.run_clean_ups(&group, wall_ms).await });
                    }
                }
            }
        }
    }

    async fn push(self: Rc<Self>, group: ClientGroupId) {
        let Some(mutations) = &self.mutations else { return };
        let done = |pushed, freed| {
            let mut state = self.state.borrow_mut();
            for conn in freed {
                state.message_done(conn);
            }
            // The group may be gone, or a new one: the answer is for whoever is connected now.
            if let Some(key) = state.key_of(&group) {
                state.inbox.push_back((key, Event::Pushed(Box::new(pushed))));
            }
            drop(state);
            self.work.notify_one();
        };
        mutations.run(&group, done).await;
    }
}
