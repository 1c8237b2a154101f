//! The state of an executor without its loop: what depends on the order of two things that the
//! loop decides.

use std::io::{ErrorKind, Read, Write};
use std::sync::Arc;
use std::time::Duration;

use zeroring_core::change::published::PublishedSchema;
use zeroring_core::cvr::internal::ShardTables;
use zeroring_core::group::{Connection, Credentials, Event, Settings};
use zeroring_core::version::StateVersion;
use zeroring_net::http::Incoming;
use zeroring_net::rt::{BackendChoice, Doorbell, bind_group, block_on, now, sleep};
use zeroring_net::ws::{self, WsWriter};
use zeroring_storage::cvr_store::embedded::EmbeddedCvrStore;
use zeroring_storage::replica::initial::{InitialSpec, InitialSync};
use zeroring_storage::replica::schema::TableIds;

use super::answers::Mailbox;
use super::executor::Executor;
use super::groups::{Slot, State};
use super::sockets::Conn;
use super::websocket_config;
use super::world::World;

const PATIENCE: Duration = Duration::from_secs(120);

/// An executor's state over an empty replica.
fn state(dir: &tempfile::TempDir) -> State {
    let path = dir.path().join("replica.db");
    let version = StateVersion::from_lsn(1_000);
    let schema = PublishedSchema { tables: Vec::new(), indexes: Vec::new() };
    let spec =
        InitialSpec { schema: &schema, version: &version, publications: &[], context_json: "{}" };
    let mut sync = InitialSync::create(&path, &spec).unwrap();
    sync.create_indexes(&mut |_| {}).unwrap();
    sync.finish().unwrap();
    let tables = ShardTables::new("zero", 0);
    let world =
        World::open(&path, "zero", &tables, version, TableIds::default(), PATIENCE).unwrap();
    let store = EmbeddedCvrStore::open(&dir.path().join("cvr.db"), "task").unwrap();
    let settings = Settings {
        app_id: "zero".into(),
        shard_num: 0,
        tables,
        has_query_endpoint: false,
        has_mutate_endpoint: false,
        crud_mutations: true,
        refuses_tokens: None,
        revalidate_ms: 300_000.0,
        retransform_ms: 300_000.0,
    };
    let mailbox = Mailbox::new(Doorbell::new().unwrap().ringer());
    State::new(world, Arc::new(settings), Arc::new(store), mailbox, false)
}

/// A socket that has passed its handshake, and its other end.
async fn socket() -> (WsWriter, std::net::TcpStream) {
    let listener = bind_group("127.0.0.1:0".parse().unwrap(), 1).unwrap().remove(0);
    let mut client = std::net::TcpStream::connect(listener.local_addr()).unwrap();
    let head = "GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
                Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n";
    client.write_all(head.as_bytes()).unwrap();
    let stream = listener.into_local().unwrap().accept().await.unwrap();
    let request = Incoming::read(stream, now() + PATIENCE).await.unwrap();
    let agreed = ws::check(&request.head, None).unwrap();
    let (_reader, writer) = ws::accept(request.stream, &request.rest, agreed, &websocket_config());
    (writer, client)
}

#[test]
fn a_client_that_comes_while_its_group_is_ending_is_sent_to_come_again() {
    let received = block_on(BackendChoice::Epoll, || async {
        let dir = tempfile::tempdir().unwrap();
        let mut state = state(&dir);
        let key = state.group_of(&"g".into());
        // It ends; that waits in the inbox when a client of it connects.
        state.inbox.push_back((key, Event::Drain));
        let (writer, mut client) = socket().await;
        assert!(state.may_join(key, None).is_ok());
        let conn = state.connect(key, writer.clone());
        let connection = Connection {
            conn,
            client_id: "c".into(),
            ws_id: "w".into(),
            protocol: 51,
            profile_id: None,
            base_cookie: None,
            credentials: Arc::new(Credentials::default()),
        };
        state.inbox.push_back((key, Event::Connected(Box::new(connection))));
        while let Some((key, event)) = state.inbox.pop_front() {
            state.feed(key, event);
        }
        assert_eq!((state.groups(), state.connections()), (0, 0));
        writer.flushed().await;
        let mut received = vec![0; 4_096];
        let mut length = 0;
        // The error waits until the client can hear it, on this thread's timer: nothing may block.
        client.set_nonblocking(true).unwrap();
        let until = now() + PATIENCE;
        while !String::from_utf8_lossy(&received[..length]).contains("Rehome") {
            assert!(now() < until, "no error came: {:?}", &received[..length]);
            match client.read(&mut received[length..]) {
                Ok(read) => length += read,
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    sleep(Duration::from_millis(5)).await;
                }
                Err(error) => panic!("{error}"),
            }
        }
        String::from_utf8_lossy(&received[..length]).into_owned()
    });
    assert!(received.unwrap().contains(r#"["error",{"#));
}

/// Bytes of what a function of these arguments returns.
fn size_of_return<A, B, C, D, R>(_: fn(A, B, C, D) -> R) -> usize {
    size_of::<R>()
}

#[test]
fn what_a_connection_keeps_for_hours_is_small() {
    let sizes = [
        ("task", size_of_return(Executor::read)),
        ("reader", size_of::<ws::WsReader>()),
        ("connection", size_of::<Conn>()),
        ("group", size_of::<Slot>()),
    ];
    println!("{sizes:?}");
    assert!(sizes.iter().map(|(_, size)| size).sum::<usize>() < 2_048, "{sizes:?}");
}
