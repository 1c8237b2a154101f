//! Frames to sockets: each frame is put on the wire format once, however many sockets get it.

use std::sync::Arc;

use rustc_hash::FxHashMap;
use zeroring_core::group::Frame;
use zeroring_net::ws;

/// Wire frames made while one event's effects are carried out: clients of a group share most.
#[derive(Default)]
pub(super) struct WireFrames(FxHashMap<*const u8, (Arc<[u8]>, ws::Frame)>);

impl WireFrames {
    /// The wire form of a frame.
    pub(super) fn of(&mut self, frame: &Frame, compress: bool) -> ws::Frame {
        // The payload is kept beside its address, so the address names nothing else meanwhile.
        let made = self.0.entry(frame.payload.as_ptr()).or_insert_with(|| {
            (frame.payload.clone(), wire(&frame.payload, frame.binary, compress))
        });
        made.1.clone()
    }
}

/// A message as a frame.
pub(super) fn wire(payload: &[u8], binary: bool, compress: bool) -> ws::Frame {
    let mut builder = ws::FrameBuilder::new();
    builder.payload().extend_from_slice(payload);
    let frame = if binary { builder.finish_binary() } else { builder.finish_text() };
    if compress { frame.compressible() } else { frame }
}
