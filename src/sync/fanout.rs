//! Frames to sockets: each frame is put on the wire format once, however many sockets of however
//! many groups get it.

use std::rc::Rc;
use std::sync::Arc;

use rustc_hash::FxHashMap;
use zeroring_core::group::Frame;
use zeroring_net::ws;

/// Bytes of wire frames that are kept.
const MAX_KEPT_BYTES: usize = 8 << 20;
/// Entries that are kept.
const MAX_KEPT: usize = 16_384;

/// What was made of, and made.
type Made = (Arc<[Frame]>, Rc<[ws::Frame]>);

/// Wire frames made lately. Only of frames that somebody else holds too: others come once.
#[derive(Default)]
pub(super) struct WireFrames {
    lists: FxHashMap<*const Frame, Made>,
    frames: FxHashMap<*const u8, (Arc<[u8]>, ws::Frame)>,
    bytes: usize,
}

impl WireFrames {
    /// The wire form of frames that are sent together.
    pub(super) fn of(&mut self, list: &Arc<[Frame]>, compress: bool) -> Rc<[ws::Frame]> {
        // Payloads and lists are kept beside their address, so it names nothing else meanwhile.
        if let Some((_, made)) = self.lists.get(&list.as_ptr()) {
            return made.clone();
        }
        let made: Rc<[ws::Frame]> = list.iter().map(|frame| self.one(frame, compress)).collect();
        if Arc::strong_count(list) > 1 && !list.is_empty() {
            self.bytes += list.iter().map(|frame| frame.payload.len()).sum::<usize>();
            self.lists.insert(list.as_ptr(), (list.clone(), made.clone()));
        }
        made
    }

    fn one(&mut self, frame: &Frame, compress: bool) -> ws::Frame {
        let make = || wire(&frame.payload, frame.binary, compress);
        if Arc::strong_count(&frame.payload) == 1 {
            return make();
        }
        if let Some((_, made)) = self.frames.get(&frame.payload.as_ptr()) {
            return made.clone();
        }
        let made = make();
        self.bytes += frame.payload.len();
        self.frames.insert(frame.payload.as_ptr(), (frame.payload.clone(), made.clone()));
        made
    }

    /// Forgets everything if it has become much. Not while effects of one event are carried out:
    /// clients of a group share large pokes too.
    pub(super) fn trim(&mut self) {
        if self.bytes > MAX_KEPT_BYTES || self.frames.len() + self.lists.len() > MAX_KEPT {
            self.clear();
        }
    }

    /// Forgets everything.
    pub(super) fn clear(&mut self) {
        *self = WireFrames::default();
    }
}

/// A message as a frame.
pub(super) fn wire(payload: &[u8], binary: bool, compress: bool) -> ws::Frame {
    let frame = if binary { ws::Frame::binary(payload) } else { ws::Frame::text(payload) };
    if compress { frame.compressible() } else { frame }
}
