//! The API client against servers that answer, refuse, stall, redirect and lie; and the server
//! side's bodies.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use bytes::Bytes;
use zeroring_net::http::client::{
    ApiClient, ApiClientConfig, ApiError, ApiRequest, ApiResponse, LocalApiClient,
};
use zeroring_net::http::{Incoming, Response};
use zeroring_net::rt::{self, BackendChoice, bind_group, spawn};

const LONG: Duration = Duration::from_secs(120);

fn request(addr: SocketAddr, path: &str) -> ApiRequest {
    ApiRequest {
        method: "POST".to_owned(),
        url: format!("http://{addr}{path}"),
        headers: vec![("X-Name".to_owned(), "grÃ¼n".to_owned())],
        body: Bytes::from_static(b"{\"a\":1}"),
        deadline: LONG,
    }
}

/// Runs `test` on an executor with a client of this configuration.
fn with_client<T, F, Fut>(backend: BackendChoice, config: ApiClientConfig, test: F) -> T
where
    T: Send + 'static,
    F: FnOnce(LocalApiClient) -> Fut + Send + 'static,
    Fut: Future<Output = T>,
{
    let client = ApiClient::start(config).unwrap();
    let port = client.port().unwrap();
    rt::block_on(backend, move || async move { test(port.into_local().unwrap()).await }).unwrap()
}

/// An HTTP server on our own server side; it runs until the test's process ends.
fn endpoint() -> SocketAddr {
    let listener = bind_group("127.0.0.1:0".parse().unwrap(), 1).unwrap().remove(0);
    let addr = listener.local_addr();
    thread::spawn(move || {
        rt::block_on(BackendChoice::Epoll, move || async move {
            let listener = listener.into_local().unwrap();
            loop {
                let stream = listener.accept().await.unwrap();
                spawn(async move {
                    let mut incoming = Incoming::read(stream, rt::now() + LONG).await.unwrap();
                    let body = match incoming.read_body(1000, rt::now() + LONG).await {
                        Ok(body) => body,
                        Err(error) => return incoming.respond(error.response()).await.unwrap(),
                    };
                    let response = match incoming.head.path() {
                        "/echo" => {
                            let name = incoming.head.header("x-name").unwrap_or_default();
                            Response::json(200, String::from_utf8(body).unwrap())
                                .with_header("X-Seen", name)
                        }
                        "/fail" => Response::text(503, "later"),
                        "/redirect" => Response::new(302).with_header("Location", "/echo"),
                        "/big" => Response::text(200, "x".repeat(100_000)),
                        _ => Response::text(404, "no"),
                    };
                    incoming.respond(response).await.unwrap();
                });
            }
        })
        .unwrap();
    });
    addr
}

/// Accepts, reads the request, and does `then` with the socket; tells when a request was there.
fn raw_endpoint(
    then: impl Fn(std::net::TcpStream) + Send + 'static,
) -> (SocketAddr, mpsc::Receiver<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap();
    let (tell, told) = mpsc::channel();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut some = [0; 1000];
            if stream.read(&mut some).unwrap() > 0 {
                let _ = tell.send(());
                then(stream);
            }
        }
    });
    (addr, told)
}

#[test]
fn answers_of_any_status_come_back_and_redirects_are_not_followed() {
    let addr = endpoint();
    for backend in common::backends() {
        with_client(backend, ApiClientConfig::default(), move |client| async move {
            let answer = client.request(request(addr, "/echo?x=1")).await.unwrap();
            assert_eq!((answer.status, &answer.body[..]), (200, &b"{\"a\":1}"[..]));
            assert_eq!(answer.header("x-seen"), Some("grÃ¼n"));
            let status = |answer: Result<ApiResponse, ApiError>| answer.unwrap().status;
            assert_eq!(status(client.request(request(addr, "/fail")).await), 503);
            assert_eq!(status(client.request(request(addr, "/nothing")).await), 404);
            let redirect = client.request(request(addr, "/redirect")).await.unwrap();
            assert_eq!((redirect.status, redirect.header("location")), (302, Some("/echo")));
            // The server takes bodies of at most 1000 bytes.
            let large = ApiRequest { body: vec![0; 1001].into(), ..request(addr, "/echo") };
            assert_eq!(status(client.request(large).await), 413);
            // Many at once.
            let all: Vec<_> = (0..50)
                .map(|i| {
                    let client = client.clone();
                    let body = Bytes::from(format!("body {i}"));
                    let ask = ApiRequest { body, ..request(addr, "/echo") };
                    spawn(async move { client.request(ask).await.unwrap().body })
                })
                .collect();
            for (i, answer) in all.into_iter().enumerate() {
                assert_eq!(answer.await.unwrap(), format!("body {i}"));
            }
            assert_eq!(client.in_flight(), 0);
        });
    }
}

#[test]
fn requests_without_an_answer_are_typed_errors() {
    let addr = endpoint();
    let (stalled, _) = raw_endpoint(std::mem::forget);
    let (hangs_up, _) = raw_endpoint(drop);
    let (half, _) = raw_endpoint(|mut stream| {
        stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf").unwrap();
    });
    let (garbage, _) = raw_endpoint(|mut stream| {
        stream.write_all(b"\x00\x01garbage\r\n\r\n").unwrap();
    });
    let refused = {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        listener.local_addr().unwrap()
    };
    let config = ApiClientConfig { max_body_bytes: 50_000, ..ApiClientConfig::default() };
    with_client(BackendChoice::Auto, config, move |client| async move {
        let short = Duration::from_millis(20);
        let late = ApiRequest { deadline: short, ..request(stalled, "/") };
        let url = late.url.clone();
        let timeout = ApiError::Timeout { url, deadline: short };
        assert_eq!(client.request(late).await, Err(timeout));
        let no_tls = ApiRequest { url: format!("https://{hangs_up}/"), ..request(addr, "/") };
        for (what, error) in [
            ("refused", client.request(request(refused, "/")).await),
            ("no TLS there", client.request(no_tls).await),
        ] {
            assert!(matches!(error, Err(ApiError::Connect { .. })), "{what}: {error:?}");
        }
        for (what, addr) in [("hangs up", hangs_up), ("half", half), ("garbage", garbage)] {
            let error = client.request(request(addr, "/")).await;
            assert!(matches!(error, Err(ApiError::Transport { .. })), "{what}: {error:?}");
        }
        let big = client.request(request(addr, "/big")).await;
        assert!(matches!(big, Err(ApiError::BodyTooLarge { max: 50_000, .. })), "{big:?}");
        let good = request(addr, "/echo");
        for bad in [
            ApiRequest { url: "/relative".to_owned(), ..good.clone() },
            ApiRequest { url: "ftp://x/".to_owned(), ..good.clone() },
            ApiRequest { url: "http://[".to_owned(), ..good.clone() },
            ApiRequest { method: "NO METHOD".to_owned(), ..good.clone() },
            ApiRequest { headers: vec![("a b".to_owned(), String::new())], ..good.clone() },
            ApiRequest { headers: vec![("a".to_owned(), "x\r\ny: z".to_owned())], ..good },
        ] {
            let error = client.request(bad.clone()).await;
            assert!(matches!(error, Err(ApiError::BadRequest { .. })), "{bad:?}: {error:?}");
        }
    });
}

#[test]
fn a_dropped_request_is_cancelled_and_frees_its_place() {
    let (ended, end) = mpsc::channel();
    let (stalled, arrived) = raw_endpoint(move |mut stream| {
        let ended = ended.clone();
        thread::spawn(move || {
            // Ends when the client closes the connection.
            let _ = stream.read_to_end(&mut Vec::new());
            let _ = ended.send(());
        });
    });
    let config = ApiClientConfig { max_in_flight: 2, ..ApiClientConfig::default() };
    let client = ApiClient::start(config).unwrap();
    let port = client.port().unwrap();
    rt::block_on(BackendChoice::Auto, move || async move {
        let client = port.into_local().unwrap();
        let ask = || {
            let client = client.clone();
            async move { client.request(request(stalled, "/")).await }
        };
        let mut first = Box::pin(ask());
        let mut second = Box::pin(ask());
        for pending in [&mut first, &mut second] {
            let once = futures_util::poll!(pending.as_mut());
            assert!(once.is_pending());
            arrived.recv_timeout(LONG).unwrap();
        }
        assert_eq!(ask().await, Err(ApiError::Overloaded));
        drop(first);
        end.recv_timeout(LONG).unwrap();
        while client.in_flight() == 2 {
            rt::yield_now().await;
        }
        let third = Box::pin(ask());
        assert!(futures_util::poll!(third).is_pending());
        drop(second);
    })
    .unwrap();
}

#[test]
fn bodies_that_lie_about_their_length_are_refused() {
    let addr = endpoint();
    for (headers, body, status) in [
        ("Content-Length: 2\r\n", "{}", 200),
        ("Content-Length: 2\r\n", "{}extra", 200),
        ("", "", 411),
        ("Transfer-Encoding: chunked\r\n", "0\r\n\r\n", 411),
        ("Content-Length: 2\r\nContent-Length: 2\r\n", "{}", 400),
        ("Content-Length: +2\r\n", "{}", 400),
        ("Content-Length: \r\n", "{}", 400),
        ("Content-Length: 99999999999999999999999\r\n", "{}", 400),
        ("Content-Length: 1001\r\n", "", 413),
        ("Content-Length: 18446744073709551615\r\n", "", 413),
    ] {
        let mut stream = std::net::TcpStream::connect(addr).unwrap();
        stream.set_read_timeout(Some(LONG)).unwrap();
        let text = format!("POST /echo HTTP/1.1\r\nHost: x\r\n{headers}\r\n{body}");
        // Byte by byte: nothing depends on how it arrives.
        for byte in text.as_bytes() {
            if stream.write_all(&[*byte]).is_err() {
                break;
            }
        }
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{headers:?}: {answer}");
    }
}

#[test]
fn a_request_that_does_not_complete_in_time_gets_408() {
    for backend in common::backends() {
        let listener = bind_group("127.0.0.1:0".parse().unwrap(), 1).unwrap().remove(0);
        let addr = listener.local_addr();
        let client = thread::spawn(move || {
            let mut stream = std::net::TcpStream::connect(addr).unwrap();
            stream.write_all(b"GET / HT").unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).unwrap();
            answer
        });
        rt::block_on(backend, move || async move {
            let stream = listener.into_local().unwrap().accept().await.unwrap();
            let deadline = rt::now() + Duration::from_millis(20);
            assert!(Incoming::read(stream, deadline).await.is_err());
        })
        .unwrap();
        assert!(client.join().unwrap().starts_with("HTTP/1.1 408 "));
    }
}

// ---- HTTPS -----------------------------------------------------------------------------------

fn openssl(dir: &std::path::Path, args: &str) {
    let out = std::process::Command::new("openssl")
        .args(args.split_whitespace())
        .current_dir(dir)
        .output()
        .unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
}

/// Serves HTTPS with the certificate in `dir`, for the name `localhost`.
fn https_endpoint(dir: &std::path::Path) -> u16 {
    use rustls::pki_types::pem::PemObject;
    use rustls::pki_types::{CertificateDer, PrivateKeyDer};
    let cert = CertificateDer::from_pem_file(dir.join("server.crt")).unwrap();
    let key = PrivateKeyDer::from_pem_file(dir.join("server.key")).unwrap();
    let config = rustls::ServerConfig::builder_with_provider(zeroring_net::tls::provider())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![cert], key)
        .unwrap();
    let config = std::sync::Arc::new(config);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let session = rustls::ServerConnection::new(config.clone()).unwrap();
            let mut tls = rustls::StreamOwned::new(session, stream.unwrap());
            let mut some = [0; 1000];
            // A client that does not trust the certificate ends the handshake.
            if tls.read(&mut some).is_ok_and(|n| n > 0) {
                tls.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nsecret").unwrap();
                tls.flush().unwrap();
            }
        }
    });
    port
}

#[test]
fn https_needs_a_trusted_certificate_of_that_name() {
    let dir = tempfile::tempdir().unwrap();
    openssl(
        dir.path(),
        "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=x \
         -addext basicConstraints=critical,CA:FALSE -addext subjectAltName=DNS:localhost \
         -keyout server.key -out server.crt",
    );
    let port = https_endpoint(dir.path());
    let ask = |host: &str| ApiRequest {
        url: format!("https://{host}:{port}/"),
        ..request(([127, 0, 0, 1], port).into(), "/")
    };
    let (good, wrong_name) = (ask("localhost"), ask("127.0.0.1"));
    let trusting = ApiClientConfig {
        ca_file: Some(dir.path().join("server.crt")),
        ..ApiClientConfig::default()
    };
    let ask = good.clone();
    with_client(BackendChoice::Auto, trusting, move |client| async move {
        assert_eq!(client.request(ask).await.unwrap().body, "secret");
        let error = client.request(wrong_name).await;
        assert!(matches!(error, Err(ApiError::Connect { .. })), "{error:?}");
    });
    with_client(BackendChoice::Auto, ApiClientConfig::default(), move |client| async move {
        let error = client.request(good).await;
        assert!(matches!(error, Err(ApiError::Connect { .. })), "{error:?}");
    });
    let missing =
        ApiClientConfig { ca_file: Some(dir.path().join("none")), ..ApiClientConfig::default() };
    let error = ApiClient::start(missing).map(|_| ()).unwrap_err().to_string();
    assert!(error.contains("none") && error.contains("PEM"), "{error}");
}
