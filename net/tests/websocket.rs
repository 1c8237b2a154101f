//! WebSocket connections over real sockets, on both backends.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::num::NonZeroUsize;
use std::rc::Rc;
use std::sync::mpsc;
use std::time::Duration;

use tungstenite::client::IntoClientRequest;
use tungstenite::protocol::frame::coding::CloseCode;
use tungstenite::{Message as Sent, WebSocket};
use zeroring_net::http;
use zeroring_net::rt::{
    self, BackendChoice, BoundListener, ExecutorCtx, Executors, RtConfig, Stream, TaskPanicked,
    bind_group, spawn,
};
use zeroring_net::ws::{
    self, Closed, DeflateConfig, Frame, Incoming, Message, SendError, WsConfig, WsReader, WsWriter,
};

const LONG: Duration = Duration::from_secs(120);

/// A running server, and what went wrong in its connections.
struct Server {
    executors: Executors,
    panics: mpsc::Receiver<TaskPanicked>,
}

/// A server of one executor that runs `serve` for each connection, and its address.
fn server<F, Fut>(backend: BackendChoice, config: WsConfig, serve: F) -> (Server, SocketAddr)
where
    F: Fn(WsReader, WsWriter) -> Fut + Send + Sync + Clone + 'static,
    Fut: Future<Output = ()> + 'static,
{
    let listeners = bind_group("127.0.0.1:0".parse().unwrap(), 1).unwrap();
    let addr = listeners[0].local_addr();
    let rt = RtConfig { executors: NonZeroUsize::new(1), backend, ..RtConfig::default() };
    let (report, panics) = mpsc::channel();
    let main = move |ctx: ExecutorCtx, listener: BoundListener| {
        let (config, serve, report) = (config.clone(), serve.clone(), report.clone());
        async move {
            let listener = listener.into_local().unwrap();
            let accepting = async {
                loop {
                    let stream = listener.accept().await.unwrap();
                    let (config, serve) = (config.clone(), serve.clone());
                    let serving = spawn(connection(stream, config, serve));
                    let report = report.clone();
                    spawn(async move {
                        if let Err(panic) = serving.await {
                            report.send(panic).unwrap();
                        }
                    });
                }
            };
            futures_util::future::select(Box::pin(accepting), Box::pin(ctx.stopped())).await;
        }
    };
    (Server { executors: Executors::spawn_with(&rt, listeners, main).unwrap(), panics }, addr)
}

async fn connection<F, Fut>(stream: Stream, config: WsConfig, serve: F)
where
    F: Fn(WsReader, WsWriter) -> Fut,
    Fut: Future<Output = ()>,
{
    let Ok(request) = http::Incoming::read(stream, rt::now() + LONG).await else { return };
    if request.head.path() == "/refuse" {
        let reason = "r".repeat(200);
        ws::upgrade_and_close(request, &config, 1002, &reason).await.unwrap();
        return;
    }
    match ws::check(&request.head, config.deflate.as_ref()) {
        Ok(agreed) => {
            let (reader, writer) = ws::accept(request.stream, &request.rest, agreed, &config);
            serve(reader, writer).await;
        }
        Err(refusal) => request.respond(*refusal).await.unwrap(),
    }
}

/// Stops the server; a connection that panicked fails the test.
fn stop(server: Server) {
    let Server { executors, panics } = server;
    executors.stop_handle().stop();
    let (failures, all) = executors.join(LONG);
    assert!(failures.is_empty() && all, "{failures:?}");
    let panics: Vec<_> = panics.try_iter().collect();
    assert!(panics.is_empty(), "{panics:?}");
}

fn connect(addr: SocketAddr, path: &str) -> WebSocket<TcpStream> {
    let stream = TcpStream::connect(addr).unwrap();
    stream.set_read_timeout(Some(LONG)).unwrap();
    let mut request = format!("ws://{addr}{path}").into_client_request().unwrap();
    let protocol = "e30%3D".parse().unwrap();
    request.headers_mut().insert("sec-websocket-protocol", protocol);
    let (client, response) = tungstenite::client(request, stream).unwrap();
    assert_eq!(response.headers()["sec-websocket-protocol"], "e30%3D");
    client
}

async fn echo(mut reader: WsReader, writer: WsWriter) {
    loop {
        match reader.next().await {
            Incoming::Message(Message::Text(text)) => writer.send(&Frame::text(&text)).unwrap(),
            Incoming::Message(Message::Binary(b)) => writer.send(&Frame::binary(&b)).unwrap(),
            Incoming::Closed(_) => return,
        }
    }
}

#[test]
fn messages_of_any_size_come_back() {
    for backend in common::backends() {
        let (executors, addr) = server(backend, WsConfig::default(), echo);
        let mut client = connect(addr, "/");
        for len in [1, 125, 126, 65_535, 65_536, 1_000_000] {
            let text = "é".repeat(len / 2) + "x";
            client.send(Sent::text(text.clone())).unwrap();
            assert_eq!(client.read().unwrap().into_text().unwrap().as_str(), text);
        }
        // Empty messages are dropped, pings are answered, both between other messages.
        client.send(Sent::text("")).unwrap();
        client.send(Sent::Ping(b"hello".to_vec().into())).unwrap();
        client.send(Sent::binary(b"\x00\xff".to_vec())).unwrap();
        assert_eq!(client.read().unwrap(), Sent::Pong(b"hello".to_vec().into()));
        assert_eq!(client.read().unwrap(), Sent::binary(b"\x00\xff".to_vec()));
        // The peer closes; the server answers with the same code and ends the connection.
        client.close(Some(close_frame(CloseCode::Away, "bye"))).unwrap();
        match client.read().unwrap() {
            Sent::Close(Some(frame)) => assert_eq!(frame.code, CloseCode::Away),
            other => panic!("{other:?}"),
        }
        assert!(matches!(client.read(), Err(tungstenite::Error::ConnectionClosed)));
        stop(executors);
    }
}

fn close_frame(code: CloseCode, reason: &str) -> tungstenite::protocol::CloseFrame {
    tungstenite::protocol::CloseFrame { code, reason: reason.to_owned().into() }
}

#[test]
fn a_flood_of_pings_gets_a_few_pongs_and_the_latest() {
    for backend in common::backends() {
        let (executors, addr) = server(backend, WsConfig::default(), echo);
        let mut client = connect(addr, "/");
        // In one segment, so that the server reads them in one piece.
        let mut bytes = Vec::new();
        for i in 0..100u8 {
            bytes.extend_from_slice(&[0x89, 0x81, 0, 0, 0, 0, i]);
        }
        client.get_mut().write_all(&bytes).unwrap();
        let mut pongs = Vec::new();
        while pongs.last() != Some(&99) {
            match client.read().unwrap() {
                Sent::Pong(payload) => pongs.push(payload[0]),
                other => panic!("{other:?}"),
            }
        }
        assert!(pongs.is_sorted());
        assert_eq!(pongs[..16], (0..16).collect::<Vec<u8>>());
        stop(executors);
    }
}

#[test]
fn whatever_is_queued_in_one_tick_leaves_in_one_write() {
    for backend in common::backends() {
        let (executors, addr) =
            server(backend, WsConfig::default(), |mut reader, writer| async move {
                while let Incoming::Message(_) = reader.next().await {
                    writer.flushed().await;
                    let before = writer.writes();
                    let shared = Frame::text("shared");
                    for i in 0..100 {
                        writer.send(&shared).unwrap();
                        writer.send(&Frame::text(&i.to_string())).unwrap();
                    }
                    assert!(writer.queued_bytes() > 0);
                    writer.flushed().await;
                    assert_eq!(writer.writes(), before + 1);
                    assert_eq!(writer.queued_bytes(), 0);
                    writer.send(&Frame::text("counted")).unwrap();
                }
            });
        let mut client = connect(addr, "/");
        client.send(Sent::text("go")).unwrap();
        for i in 0..100 {
            assert_eq!(client.read().unwrap(), Sent::text("shared"));
            assert_eq!(client.read().unwrap(), Sent::text(i.to_string()));
        }
        assert_eq!(client.read().unwrap(), Sent::text("counted"));
        stop(executors);
    }
}

#[test]
fn a_client_that_stops_reading_overflows_its_queue_and_delays_nobody() {
    let config = WsConfig { max_queued_bytes: 1 << 20, ..WsConfig::default() };
    for backend in common::backends() {
        let (executors, addr) = server(backend, config.clone(), |mut reader, writer| async move {
            let Incoming::Message(Message::Text(first)) = reader.next().await else { panic!() };
            if first == "stuck" {
                let frame = Frame::text(&"x".repeat(10_000));
                let overflow = loop {
                    match writer.send(&frame) {
                        Ok(()) => rt::yield_now().await,
                        Err(error) => break error,
                    }
                };
                assert!(matches!(overflow, SendError::Overflow { bytes, frames }
                        if bytes > 1_000_000 && bytes <= 1 << 20 && frames > 100));
                writer.close_now(Some((1013, "too slow")));
                assert_eq!(writer.send(&frame), Err(SendError::Closed));
                // Still blocked: only an abort ends it now.
                writer.abort();
                assert!(matches!(reader.next().await, Incoming::Closed(Closed::ByUs)));
            } else {
                writer.send(&Frame::text(&first)).unwrap();
                echo(reader, writer).await;
            }
        });
        let mut stuck = connect(addr, "/");
        stuck.send(Sent::text("stuck")).unwrap();
        let mut client = connect(addr, "/");
        for i in 0..100 {
            client.send(Sent::text(i.to_string())).unwrap();
            assert_eq!(client.read().unwrap(), Sent::text(i.to_string()), "{backend:?}");
        }
        // The stuck client finds its connection gone after what the kernel had taken.
        while stuck.read().is_ok() {}
        stop(executors);
    }
}

#[test]
fn the_server_closes_with_a_code_a_reason_or_plainly() {
    for backend in common::backends() {
        let (executors, addr) =
            server(backend, WsConfig::default(), |mut reader, writer| async move {
                let Incoming::Message(Message::Text(how)) = reader.next().await else { panic!() };
                writer.send(&Frame::text("last words")).unwrap();
                match how.as_str() {
                    "plain" => writer.close(None),
                    _ => writer.close(Some((3000, &how))),
                }
                writer.close(Some((1011, "second calls do nothing")));
                assert!(!writer.is_open());
                assert!(matches!(reader.next().await, Incoming::Closed(Closed::ByUs)));
            });
        let long = "€".repeat(60);
        for (how, reason) in [
            ("plain", None),
            ("why", Some("why".to_owned())),
            (&long, Some("€".repeat(40) + "...")),
        ] {
            let mut client = connect(addr, "/");
            client.send(Sent::text(how)).unwrap();
            assert_eq!(client.read().unwrap(), Sent::text("last words"));
            let frame = reason.map(|r| close_frame(CloseCode::from(3000), &r));
            assert_eq!(client.read().unwrap(), Sent::Close(frame), "{how}");
            assert!(matches!(client.read(), Err(tungstenite::Error::ConnectionClosed)));
        }
        let mut client = connect(addr, "/refuse");
        let reason = "r".repeat(120) + "...";
        let frame = close_frame(CloseCode::Protocol, &reason);
        assert_eq!(client.read().unwrap(), Sent::Close(Some(frame)));
        stop(executors);
    }
}

#[test]
fn a_closed_connection_ends_even_if_the_peer_never_answers() {
    let config = WsConfig { close_timeout: Duration::from_millis(20), ..WsConfig::default() };
    for backend in common::backends() {
        let (executors, addr) = server(backend, config.clone(), |mut reader, writer| async move {
            let Incoming::Message(_) = reader.next().await else { panic!() };
            writer.close(None);
            assert!(matches!(reader.next().await, Incoming::Closed(Closed::ByUs)));
        });
        let mut client = connect(addr, "/");
        client.send(Sent::text("x")).unwrap();
        // Reads the close frame without answering it, then the end.
        let mut bytes = Vec::new();
        client.get_mut().read_to_end(&mut bytes).unwrap();
        assert_eq!(bytes, [0x88, 0]);
        stop(executors);
    }
}

#[test]
fn violations_and_lost_peers_are_told_apart() {
    let config = WsConfig { max_payload_bytes: 1000, ..WsConfig::default() };
    for backend in common::backends() {
        let (ends, seen) = mpsc::channel();
        let (executors, addr) = server(backend, config.clone(), move |mut reader, writer| {
            let ends = ends.clone();
            async move {
                let end = loop {
                    if let Incoming::Closed(end) = reader.next().await {
                        break end;
                    }
                };
                ends.send(format!("{end:?}")).unwrap();
                // Nothing follows the end.
                assert!(matches!(reader.next().await, Incoming::Closed(Closed::ByUs)));
                writer.flushed().await;
            }
        });
        for (bytes, code, end) in [
            (&[0x81, 0x01, b'a'][..], 1002u16, "Violation(Unmasked)"),
            (&[0x81, 0x81, 0, 0, 0, 0, 0xff], 1007, "Violation(BadUtf8)"),
            (&[0x82, 0xfe, 0x03, 0xe9], 1009, "Violation(TooLarge(1000))"),
        ] {
            let mut client = connect(addr, "/");
            client.get_mut().write_all(bytes).unwrap();
            if code == 1009 {
                client.get_mut().write_all(&[0; 4]).unwrap();
            }
            match client.read().unwrap() {
                Sent::Close(Some(frame)) => assert_eq!(u16::from(frame.code), code),
                other => panic!("{other:?}"),
            }
            assert_eq!(seen.recv_timeout(LONG).unwrap(), end);
        }
        let client = connect(addr, "/");
        drop(client);
        assert!(seen.recv_timeout(LONG).unwrap().starts_with("Lost("));
        stop(executors);
    }
}

#[test]
fn frames_that_came_with_the_request_are_not_lost() {
    for backend in common::backends() {
        let (executors, addr) = server(backend, WsConfig::default(), echo);
        let mut client = TcpStream::connect(addr).unwrap();
        client.set_read_timeout(Some(LONG)).unwrap();
        let mut bytes =
            b"GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
            Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
                .to_vec();
        bytes.extend_from_slice(&[0x82, 0x83, 1, 1, 1, 1, b'a' ^ 1, b'b' ^ 1, b'c' ^ 1]);
        client.write_all(&bytes).unwrap();
        let mut answer = Vec::new();
        while !answer.ends_with(b"\x82\x03abc") {
            let mut some = [0; 512];
            let n = client.read(&mut some).unwrap();
            assert!(n > 0, "{answer:?}");
            answer.extend_from_slice(&some[..n]);
        }
        assert!(answer.starts_with(b"HTTP/1.1 101 "));
        stop(executors);
    }
}

#[test]
fn compression_is_negotiated_and_compresses_a_broadcast_once() {
    let config = WsConfig { deflate: Some(DeflateConfig::default()), ..WsConfig::default() };
    for backend in common::backends() {
        let (executors, addr) = server(backend, config.clone(), |mut reader, writer| async move {
            let Incoming::Message(message) = reader.next().await else { panic!() };
            assert_eq!(message, Message::Text("grün grün grün".to_owned()));
            let frame = Frame::text(&"compress me ".repeat(1000)).compressible();
            let other = frame.clone();
            writer.send(&frame).unwrap();
            writer.send(&other).unwrap();
            writer.send(&Frame::text("short").compressible()).unwrap();
            writer.send(&Frame::text(&"never compress me ".repeat(100))).unwrap();
            writer.close(None);
            while let Incoming::Message(_) = reader.next().await {}
        });
        let mut client = TcpStream::connect(addr).unwrap();
        client.set_read_timeout(Some(LONG)).unwrap();
        let request = "GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
            Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\
            Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits\r\n\r\n";
        client.write_all(request.as_bytes()).unwrap();
        let mut compress = flate2::Compress::new(flate2::Compression::fast(), false);
        let mut body = Vec::with_capacity(100);
        let text = "grün grün grün";
        compress.compress_vec(text.as_bytes(), &mut body, flate2::FlushCompress::Sync).unwrap();
        body.truncate(body.len() - 4);
        let mut frame = vec![0xC1, 0x80 | u8::try_from(body.len()).unwrap(), 0, 0, 0, 0];
        frame.extend_from_slice(&body);
        client.write_all(&frame).unwrap();
        client.write_all(&[0x88, 0x80, 0, 0, 0, 0]).unwrap();
        let mut answer = Vec::new();
        client.read_to_end(&mut answer).unwrap();
        let head_end = answer.windows(4).position(|w| w == b"\r\n\r\n").unwrap() + 4;
        let head = String::from_utf8_lossy(&answer[..head_end]);
        assert!(
            head.contains(
                "permessage-deflate; server_no_context_takeover; client_no_context_takeover"
            ),
            "{head}"
        );
        let frames = frames(&answer[head_end..]);
        let heads: Vec<_> = frames.iter().map(|(first, _)| *first).collect();
        assert_eq!(heads, [0xC1, 0xC1, 0x81, 0x81, 0x88]);
        assert_eq!(frames[0].1, frames[1].1);
        let mut small = frames[0].1.clone();
        assert!(small.len() < 200);
        small.extend_from_slice(&[0, 0, 0xff, 0xff]);
        let mut inflate = flate2::Decompress::new(false);
        let mut out = Vec::with_capacity(20_000);
        inflate.decompress_vec(&small, &mut out, flate2::FlushDecompress::Sync).unwrap();
        assert_eq!(out, "compress me ".repeat(1000).as_bytes());
        assert_eq!(frames[2].1, b"short");
        stop(executors);
    }
}

/// First byte and payload of each server frame.
fn frames(mut bytes: &[u8]) -> Vec<(u8, Vec<u8>)> {
    let mut all = Vec::new();
    while !bytes.is_empty() {
        let (len, header) = match bytes[1] {
            126 => (usize::from(u16::from_be_bytes([bytes[2], bytes[3]])), 4),
            n => (usize::from(n), 2),
        };
        all.push((bytes[0], bytes[header..header + len].to_vec()));
        bytes = &bytes[header + len..];
    }
    all
}

#[test]
fn requests_that_are_no_handshake_get_an_http_answer() {
    for backend in common::backends() {
        let (executors, addr) = server(backend, WsConfig::default(), echo);
        let huge = format!("GET /{} HTTP/1.1\r\n\r\n", "a".repeat(70_000));
        for (request, status) in [
            ("GET / HTTP/1.1\r\nHost: x\r\n\r\n", "400"),
            ("POST / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\n\r\n", "405"),
            ("NONSENSE\r\n\r\n", "400"),
            (&huge, "431"),
        ] {
            let mut client = TcpStream::connect(addr).unwrap();
            client.set_read_timeout(Some(LONG)).unwrap();
            client.write_all(request.as_bytes()).unwrap();
            let mut answer = String::new();
            client.read_to_string(&mut answer).unwrap();
            assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{answer}");
            assert!(answer.contains("\r\nConnection: close\r\n"));
        }
        stop(executors);
    }
}

#[test]
fn a_dropped_connection_frees_its_socket() {
    for backend in common::backends() {
        let (executors, addr) =
            server(backend, WsConfig::default(), |mut reader, writer| async move {
                let Incoming::Message(_) = reader.next().await else { panic!() };
                let shared = Rc::new(writer);
                drop(shared);
            });
        let mut client = connect(addr, "/");
        client.send(Sent::text("x")).unwrap();
        assert!(client.read().is_err());
        stop(executors);
    }
}
