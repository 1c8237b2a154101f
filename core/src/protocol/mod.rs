//! The wire shapes of the client sync protocol, and of the app's query and mutate endpoints.
//!
//! - [`connect`]: the upgrade request: path, parameters, `Sec-WebSocket-Protocol`, versions.
//! - [`up`]: what clients send, parsed and bounded. Unknown keys are tolerated; an unknown type,
//!   a wrong type or a missing field is `InvalidMessage`.
//! - [`down`], [`poke`]: what the server sends, written straight into byte buffers.
//! - [`error`]: error bodies. Every one carries an `origin`: clients need it.
//! - `client_schema`: the grammar of a shape that the CVR keeps. - [`custom_query`], [`mutate`]: requests to
//!   and answers from the app's endpoints.
//!
//! Data comes in as text of one WebSocket message or HTTP body, and leaves as typed values; the
//! other way round for the server's side. No state is kept here.

mod client_schema;
pub mod connect;
pub mod custom_query;
pub mod down;
pub mod error;
pub mod mutate;
pub mod poke;
#[cfg(test)]
mod tests;
pub mod up;

/// The newest sync protocol that this server speaks.
pub const PROTOCOL_VERSION: u32 = 52;
/// The oldest sync protocol that is accepted. The original promises never to raise it.
pub const MIN_PROTOCOL_VERSION: u32 = 30;
/// First version whose poke payload travels in binary chunks.
pub const BINARY_POKES_SINCE: u32 = 52;
