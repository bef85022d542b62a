//! How NRI puts calls into one stream: frames of logical connections (`pkg/net/multiplex`), and in each of these the messages
//! of ttrpc (`PROTOCOL.md` of containerd/ttrpc). What the messages mean is not known here.
//!
//! The crate `ttrpc` wants sockets of its own, where NRI has one for calls in both directions.

use std::collections::HashMap;

/// The connection by which the runtime calls the plugin.
pub(super) const PLUGIN: u32 = 1;
/// The connection by which the plugin calls the runtime.
pub(super) const RUNTIME: u32 = 2;

const FRAME_HEADER: usize = 8;
const MESSAGE_HEADER: usize = 10;
/// The longest message of ttrpc.
const MOST: usize = 4 << 20;

/// What a message is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Request = 1,
    Response = 2,
}

/// One message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Message {
    /// The logical connection.
    pub(super) connection: u32,
    /// Which call it belongs to.
    pub(super) stream: u32,
    pub(super) kind: Kind,
    pub(super) payload: Vec<u8>,
}

/// What comes is not what NRI speaks.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Garbled {
    #[error("a frame of {0} bytes")]
    Frame(usize),
    #[error("a message of {0} bytes")]
    Message(usize),
    #[error("a message of the kind {0}")]
    Kind(u8),
}

/// Puts messages together from bytes as they come.
#[derive(Debug, Default)]
pub(super) struct Decoder {
    frames: Vec<u8>,
    connections: HashMap<u32, Vec<u8>>,
}

impl Message {
    /// In one frame: the runtime's reader takes each for a read of its own.
    pub(super) fn encode(&self) -> Vec<u8> {
        let length = u32::try_from(self.payload.len()).unwrap_or(u32::MAX);
        let mut bytes = Vec::with_capacity(FRAME_HEADER + MESSAGE_HEADER + self.payload.len());
        bytes.extend(self.connection.to_be_bytes());
        bytes.extend(length.saturating_add(MESSAGE_HEADER as u32).to_be_bytes());
        bytes.extend(length.to_be_bytes());
        bytes.extend(self.stream.to_be_bytes());
        bytes.extend([self.kind as u8, 0]);
        bytes.extend(&self.payload);
        bytes
    }
}

impl Decoder {
    /// Takes bytes in; the messages that are complete by them.
    pub(super) fn take(&mut self, bytes: &[u8]) -> Result<Vec<Message>, Garbled> {
        self.frames.extend(bytes);
        let mut messages = Vec::new();
        while let Some((header, rest)) = self.frames.split_first_chunk::<FRAME_HEADER>() {
            let [c0, c1, c2, c3, l0, l1, l2, l3] = *header;
            let (connection, length) =
                (u32::from_be_bytes([c0, c1, c2, c3]), u32::from_be_bytes([l0, l1, l2, l3]) as usize);
            if length > MOST + MESSAGE_HEADER {
                return Err(Garbled::Frame(length));
            }
            let Some(payload) = rest.get(..length) else { break };
            // Connections that nobody opened are no business of ours.
            if matches!(connection, PLUGIN | RUNTIME) {
                let stream = self.connections.entry(connection).or_default();
                stream.extend(payload);
                messages_of(connection, stream, &mut messages)?;
            }
            self.frames.drain(..FRAME_HEADER + length);
        }
        Ok(messages)
    }
}

fn messages_of(connection: u32, bytes: &mut Vec<u8>, messages: &mut Vec<Message>) -> Result<(), Garbled> {
    while let Some((header, rest)) = bytes.split_first_chunk::<MESSAGE_HEADER>() {
        let [l0, l1, l2, l3, s0, s1, s2, s3, kind, _flags] = *header;
        let length = u32::from_be_bytes([l0, l1, l2, l3]) as usize;
        if length > MOST {
            return Err(Garbled::Message(length));
        }
        let Some(payload) = rest.get(..length) else { break };
        let kind = match kind {
            1 => Kind::Request,
            2 => Kind::Response,
            other => return Err(Garbled::Kind(other)),
        };
        let stream = u32::from_be_bytes([s0, s1, s2, s3]);
        messages.push(Message { connection, stream, kind, payload: payload.to_vec() });
        bytes.drain(..MESSAGE_HEADER + length);
    }
    Ok(())
}

/// What a runtime may send, at once and byte by byte: it means the same.
#[cfg(fuzzing)]
pub fn fuzz(bytes: &[u8]) {
    let at_once = Decoder::default().take(bytes);
    let mut decoder = Decoder::default();
    let pieces = bytes.chunks(1).map(|byte| decoder.take(byte)).collect::<Result<Vec<_>, _>>();
    assert_eq!(pieces.map(|pieces| pieces.concat()), at_once);
    let encoded: Vec<u8> = at_once.iter().flatten().flat_map(Message::encode).collect();
    assert!(at_once.is_err() || Decoder::default().take(&encoded) == at_once);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(connection: u32, stream: u32, payload: &[u8]) -> Message {
        Message { connection, stream, kind: Kind::Request, payload: payload.to_vec() }
    }

    #[test]
    fn messages_come_out_as_they_went_in_however_they_are_cut() {
        let messages = [message(PLUGIN, 1, b"one"), message(RUNTIME, 2, b""), message(PLUGIN, 3, &[7; 5000])];
        let bytes: Vec<u8> = messages.iter().flat_map(Message::encode).collect();
        for size in [1, 7, 18, 4096, bytes.len()] {
            let mut decoder = Decoder::default();
            let taken: Vec<_> = bytes.chunks(size).flat_map(|chunk| decoder.take(chunk).unwrap()).collect();
            assert_eq!(taken, messages, "in pieces of {size}");
        }
    }

    #[test]
    fn a_message_may_be_spread_over_frames() {
        let whole = message(PLUGIN, 1, b"payload").encode().split_off(FRAME_HEADER);
        let frame = |bytes: &[u8]| {
            let mut frame = PLUGIN.to_be_bytes().to_vec();
            frame.extend((bytes.len() as u32).to_be_bytes());
            frame.extend(bytes);
            frame
        };
        let mut decoder = Decoder::default();
        assert_eq!(decoder.take(&frame(&whole[..4])), Ok(vec![]));
        // Of another connection in between.
        assert_eq!(decoder.take(&message(RUNTIME, 9, b"x").encode()), Ok(vec![message(RUNTIME, 9, b"x")]));
        assert_eq!(decoder.take(&frame(&whole[4..])), Ok(vec![message(PLUGIN, 1, b"payload")]));
    }

    #[test]
    fn what_makes_no_sense_is_refused_and_never_waited_for() {
        let taken = |bytes: &[u8]| Decoder::default().take(bytes);
        assert_eq!(taken(&[0, 0, 0, 1, 255, 255, 255, 255]), Err(Garbled::Frame(u32::MAX as usize)));
        let mut long = message(PLUGIN, 1, b"").encode();
        long[8..12].copy_from_slice(&[1, 0, 0, 0]);
        assert_eq!(taken(&long), Err(Garbled::Message(1 << 24)));
        let mut odd = message(PLUGIN, 1, b"").encode();
        odd[16] = 3;
        assert_eq!(taken(&odd), Err(Garbled::Kind(3)));
        let unknown = message(77, 1, b"whatever").encode();
        assert_eq!(taken(&unknown), Ok(vec![]));
    }
}
