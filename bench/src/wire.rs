//! What is written for clients and read from them.

use serde_json::json;
use zeroring_core::json::row::wire_json;
use zeroring_core::protocol::poke::PokePart;
use zeroring_core::row::{Row, RowRef};
use zeroring_core::version::StateVersion;
use zeroring_core::zql::hash;
use zeroring_net::ws::{Decoder, Event, Frame};

use crate::{Batch, Failure, fixture};

const ROWS: usize = 100;

fn rows() -> Vec<RowRef> {
    let version = StateVersion::from_lsn(1);
    (0..ROWS).map(|n| fixture::row(n, n as i32, &version)).collect()
}

/// A row as JSON, for the first time.
pub(crate) fn row_json() -> Result<Batch, Failure> {
    let table = fixture::table();
    let templates = rows();
    Ok(Box::new(move || {
        let mut bytes = 0;
        for row in &templates {
            let fresh = Row::new(row.version.clone(), row.values.to_vec());
            bytes += wire_json(&table, &fresh)?.len();
        }
        Ok(if bytes > 0 { ROWS as u64 } else { 0 })
    }))
}

/// A part of a poke with 100 rows whose JSON is there already.
pub(crate) fn poke_part() -> Result<Batch, Failure> {
    let table = fixture::table();
    let rows = rows();
    Ok(Box::new(move || {
        let mut part = PokePart::new();
        for row in &rows {
            part.put_row(&table.name, wire_json(&table, row)?);
        }
        let message = part.message("4dhwg0");
        Ok(if message.len() > ROWS { ROWS as u64 } else { 0 })
    }))
}

/// A frame around a message of 300 bytes, and a share of it for each of 200 sockets.
pub(crate) fn frame() -> Result<Batch, Failure> {
    let message = "x".repeat(300);
    let mut sockets: Vec<Option<Frame>> = vec![None; 200];
    Ok(Box::new(move || {
        let frame = Frame::text(&message);
        for socket in &mut sockets {
            *socket = Some(frame.clone());
        }
        Ok(sockets.iter().flatten().filter(|f| f.len() > 300).count() as u64)
    }))
}

/// Masked messages of 200 bytes from a client.
pub(crate) fn decode() -> Result<Batch, Failure> {
    let payload = [b'a'; 200];
    let mask = [1_u8, 2, 3, 4];
    let mut one = vec![0x81, 0x80 | 126, 0, 200];
    one.extend(mask);
    one.extend(payload.iter().enumerate().map(|(i, b)| b ^ mask[i % 4]));
    let stream = one.repeat(100);
    let mut decoder = Decoder::new(1 << 20, false);
    Ok(Box::new(move || {
        let mut input = stream.as_slice();
        let mut messages = 0;
        while let Some(event) = decoder.decode(&mut input)? {
            messages += u64::from(matches!(event, Event::Message(_)));
        }
        Ok(messages)
    }))
}

/// Normalising and hashing the AST of a client's query.
pub(crate) fn query_hash() -> Result<Batch, Failure> {
    let ast = json!({"table": "item", "orderBy": [["rank", "desc"], ["id", "asc"]], "limit": 50,
        "where": {"type": "and", "conditions": [
            {"type": "simple", "op": "=", "left": {"type": "column", "name": "project_id"},
             "right": {"type": "literal", "value": "p1"}},
            {"type": "simple", "op": ">", "left": {"type": "column", "name": "rank"},
             "right": {"type": "literal", "value": 7}}]}});
    Ok(Box::new(move || {
        let mut characters = 0;
        for _ in 0..100 {
            characters += hash::received(&ast).len();
        }
        Ok(if characters > 0 { 100 } else { 0 })
    }))
}
