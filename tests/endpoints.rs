//! The operators' endpoints over real sockets, on both I/O backends (spec: operations checklist
//! 27–31).

// A failed unwrap is a failed test.
#![allow(clippy::unwrap_used)]

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::Duration;

use zeroring::ops::{OpsState, Registry, server};
use zeroring_net::http::{Incoming, Response};
use zeroring_net::rt::{BackendChoice, BoundListener, Executors, RtConfig, bind_group, spawn};

/// How long anything may take before a test fails.
const PATIENCE: Duration = Duration::from_secs(120);

/// One executor that serves the endpoints and answers upgrades with 418.
struct Server {
    executors: Option<Executors>,
    port: u16,
}

impl Server {
    fn start(backend: BackendChoice) -> Server {
        let mut ops = OpsState::default();
        ops.statz.registry = Registry::new(1);
        let ops = Arc::new(ops);
        let listeners = bind_group(SocketAddr::new(Ipv4Addr::LOCALHOST.into(), 0), 1).unwrap();
        let port = listeners[0].local_addr().port();
        let config = RtConfig { executors: NonZeroUsize::new(1), backend, pin: false };
        let executors =
            Executors::spawn_with(&config, listeners, move |ctx, input: BoundListener| {
                let ops = Arc::clone(&ops);
                async move {
                    let listener = input.into_local().unwrap();
                    let teapot = |incoming: Incoming| async {
                        incoming.respond(Response::text(418, "upgrade")).await.unwrap();
                    };
                    let accepting =
                        spawn(async move { server::accept(listener, ops, teapot).await });
                    ctx.stopped().await;
                    drop(accepting);
                }
            });
        Server { executors: Some(executors.unwrap()), port }
    }

    fn ask(&self, request: &str) -> (String, String) {
        let mut socket = TcpStream::connect(("127.0.0.1", self.port)).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket.write_all(request.as_bytes()).unwrap();
        let mut answer = String::new();
        socket.read_to_string(&mut answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        (head.to_ascii_lowercase(), body.to_owned())
    }

    fn get(&self, method: &str, target: &str) -> (String, String) {
        self.ask(&format!("{method} {target} HTTP/1.1\r\nHost: x\r\n\r\n"))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(executors) = self.executors.take() {
            executors.stop_handle().stop();
            let (failures, all) = executors.join(PATIENCE);
            assert!(std::thread::panicking() || (all && failures.is_empty()), "{failures:?}");
        }
    }
}

#[test]
fn endpoints_answer_as_the_original_on_every_backend() {
    for backend in [BackendChoice::Auto, BackendChoice::Epoll] {
        let server = Server::start(backend);
        for path in ["/", "/keepalive"] {
            let (head, body) = server.get("GET", path);
            assert!(head.starts_with("http/1.1 200 ok"), "{head}");
            assert!(head.contains("content-type: text/plain; charset=utf-8"), "{head}");
            assert!(head.contains("content-length: 2"), "{head}");
            assert!(!head.contains("access-control"), "{head}");
            assert_eq!(body, "OK");
            let (head_of_head, no_body) = server.get("HEAD", path);
            assert_eq!((head_of_head, no_body), (head, String::new()));
        }
        let (head, body) = server.get("OPTIONS", "/");
        assert!(head.starts_with("http/1.1 404 not found"), "{head}");
        assert_eq!(
            body,
            "{\"message\":\"Route OPTIONS:/ not found\",\"error\":\"Not Found\",\"statusCode\":404}"
        );
        let (head, body) = server.get("GET", "/statz");
        assert!(head.starts_with("http/1.1 401"), "{head}");
        assert!(head.contains("www-authenticate: basic realm=\"statz protected area\""), "{head}");
        assert_eq!(body, "Unauthorized");
    }
}

#[test]
fn upgrades_are_passed_on_whatever_their_path() {
    let server = Server::start(BackendChoice::Epoll);
    for path in ["/sync/v51/connect?a=b", "/bogus", "/keepalive"] {
        let (head, body) = server.ask(&format!(
            "GET {path} HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
        ));
        assert!(head.starts_with("http/1.1 418"), "{head}");
        assert_eq!(body, "upgrade");
    }
}

#[test]
fn clients_that_say_nothing_or_nonsense_hurt_nobody() {
    let server = Server::start(BackendChoice::Epoll);
    let silent: Vec<TcpStream> =
        (0..50).map(|_| TcpStream::connect(("127.0.0.1", server.port)).unwrap()).collect();
    drop(TcpStream::connect(("127.0.0.1", server.port)).unwrap());
    let (head, _) = server.ask("nonsense\r\n\r\n");
    assert!(head.starts_with("http/1.1 400"), "{head}");
    assert_eq!(server.get("GET", "/").1, "OK");
    drop(silent);
}
