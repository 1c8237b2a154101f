//! A WebSocket echo server on all executors, for the Autobahn test suite:
//! `cargo run -p zeroring-net --example ws_echo -- 127.0.0.1:9001 [auto|uring|epoll]`.

use std::time::Duration;

use zeroring_net::http;
use zeroring_net::rt::{self, BoundListener, ExecutorCtx, Executors, RtConfig, Stream, spawn};
use zeroring_net::ws::{self, DeflateConfig, Frame, Incoming, Message, WsConfig};

async fn serve(stream: Stream) {
    let deadline = rt::now() + Duration::from_secs(10);
    let Ok(request) = http::Incoming::read(stream, deadline).await else { return };
    let config = WsConfig {
        // Autobahn's largest message has 16 MiB.
        max_payload_bytes: 32 << 20,
        max_queued_bytes: 64 << 20,
        deflate: Some(DeflateConfig { threshold: 0, ..DeflateConfig::default() }),
        ..WsConfig::default()
    };
    match ws::check(&request.head, config.deflate.as_ref()) {
        Ok(agreed) => {
            let (mut reader, writer) = ws::accept(request.stream, &request.rest, agreed, &config);
            loop {
                let frame = match reader.next().await {
                    Incoming::Message(Message::Text(text)) => Frame::text(&text),
                    Incoming::Message(Message::Binary(bytes)) => Frame::binary(&bytes),
                    Incoming::Closed(_) => return,
                };
                if writer.send(&frame.compressible()).is_err() {
                    writer.close(Some((1013, "too slow")));
                }
            }
        }
        Err(refusal) => {
            let _ = request.respond(*refusal).await;
        }
    }
}

async fn accept_all(ctx: ExecutorCtx, listener: BoundListener) {
    let listener = match listener.into_local() {
        Ok(listener) => listener,
        Err(error) => return eprintln!("executor {}: {error}", ctx.index()),
    };
    while let Ok(stream) = listener.accept().await {
        spawn(serve(stream));
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let addr = args.next().unwrap_or_else(|| "127.0.0.1:9001".to_owned()).parse()?;
    let backend = args.next().unwrap_or_else(|| "auto".to_owned()).parse()?;
    let config = RtConfig { backend, ..RtConfig::default() };
    let listeners = rt::bind_group(addr, config.executor_count())?;
    let mut executors = Executors::spawn_with(&config, listeners, accept_all)?;
    println!("echoing on ws://{addr}, {:?}", executors.backends());
    executors.next_exit(Duration::MAX);
    Ok(())
}
