//! The last words to a connection that the server ends with an error.
//!
//! A real client (1.9.0) goes on digesting `connected` for a moment after it came: it reads its
//! queries from its store. An error that it hears meanwhile does not end that: it then believes to
//! be connected, without a socket, and five seconds later gives up for good. For most errors that
//! is all the same. Those that only ask it to come back wait until the moment is over.

use std::time::Duration;

use zeroring_core::protocol::down;
use zeroring_core::protocol::error::ErrorBody;
use zeroring_net::rt::{Instant, now, sleep, spawn};
use zeroring_net::ws::WsWriter;

use super::fanout::wire;

/// A client has digested `connected` after this long. It takes a few milliseconds on an idle
/// machine; who is sent elsewhere waits this long for it at most.
const DIGESTED: Duration = Duration::from_millis(250);

/// Sends the error and closes, now or when the client is ready to hear it.
pub(super) fn farewell(writer: WsWriter, error: &ErrorBody, connected: Instant) {
    let frame = wire(&down::error(error), false, false);
    let last_words = move || {
        // If even this does not fit, the close says enough: the client comes back.
        if writer.send(&frame).is_ok() {
            writer.close(None);
        } else {
            writer.close_now(None);
        }
    };
    let moment = (connected + DIGESTED).saturating_duration_since(now());
    if !asks_to_come_back(error) || moment.is_zero() {
        return last_words();
    }
    spawn(async move {
        sleep(moment).await;
        last_words();
    });
}

/// The client's state is good, and it connects again by itself.
fn asks_to_come_back(error: &ErrorBody) -> bool {
    matches!(error, ErrorBody::Backoff { .. })
}
