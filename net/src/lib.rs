//! Everything that touches a socket: the runtime façade, WebSocket, HTTP, TLS and Postgres.
//!
//! Nothing else in the project names the runtime, an HTTP library or a TLS library.

pub mod http;
pub mod pg;
pub mod rt;
pub mod tls;
pub mod ws;
