//! The relay between a socket and a stream of a tunnel, both ways, until both sides are done.
//!
//! It never looks at the bytes. END_STREAM is a half-close, RST_STREAM a reset, whatever its reason. An idle stream holds no buffer and none
//! of the tunnel's window: it asks for room only once the socket has something to say, and gives the peer new room only
//! when the socket has taken what came.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::io::{self, IoSlice};
use std::pin::{Pin, pin};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf as _, Bytes};
use h2::{Reason, RecvStream, SendStream};
use tokio::io::{AsyncRead as _, ReadBuf};
use tokio::net::TcpStream;
use tokio::net::tcp::ReadHalf;

use super::chunk::{CHUNK, Chunk};
use super::health::{Health, Place};
use crate::proxy::relay::{Meter, Unread, close_in_order, end, is_silence};
use crate::telemetry::CloseReason;

/// Bytes read from the socket at a time.
const MOST: usize = CHUNK;

/// Reads shorter than this are copied: while they wait for the tunnel they count by their bytes, but hold a whole chunk.
const SMALL: usize = CHUNK / 4;

/// Frames that are passed on together.
const PARTS: usize = 8;

/// Bytes that one direction may move before other connections of the thread get their turn.
const TURN: usize = 1024 * 1024;

/// How long a peer may take to end its side of a stream that has been ended.
const SEEN_OUT: Duration = Duration::from_secs(5);

/// A stream of a tunnel, connected at both ends.
#[derive(Debug)]
pub(in crate::proxy) struct Ends {
    pub(in crate::proxy) send: SendStream<Bytes>,
    pub(in crate::proxy) recv: RecvStream,
    pub(super) place: Place,
}

impl Ends {
    pub(super) fn new(send: SendStream<Bytes>, mut recv: RecvStream, mut place: Place) -> Self {
        place.connected(recv.stream_id(), recv.flow_control().clone());
        Self { send, recv, place }
    }

    /// Breaks the stream off. Others take CANCEL for an orderly end, and what was cut off for the whole (RFC 9113, section 8.5).
    pub(in crate::proxy) fn reset(mut self) {
        self.send.send_reset(Reason::CONNECT_ERROR);
    }

    /// Waits for the peer to end its side of a stream that has been ended here, whatever it still says: were the stream dropped
    /// before, it would be reset after all.
    pub(in crate::proxy) async fn see_out(mut self) {
        let said = async {
            while let Some(Ok(bytes)) = self.recv.data().await {
                if self.recv.flow_control().release_capacity(bytes.len()).is_err() {
                    break;
                }
            }
        };
        // A peer that never ends is left.
        let _ = tokio::time::timeout(SEEN_OUT, said).await;
    }
}

/// On which side of the tunnel the socket is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::proxy) enum Side {
    /// The client's: what the socket says is sent.
    Client,
    /// The server's: what the socket says is received.
    Server,
}

/// Which of the two broke, and how.
#[derive(Debug)]
enum Broken {
    Socket(io::Error),
    Tunnel(h2::Error),
}

/// Relays between the two until both directions have ended or one of them broke; says why it ended. Whoever has them is to drop
/// them then: after an orderly end both are closed in order, else both are reset.
pub(in crate::proxy) async fn relay(
    socket: &mut TcpStream,
    side: Side,
    ends: &mut Ends,
    meter: &Meter,
) -> CloseReason {
    let Ends { send, recv, place } = ends;
    let ended = {
        let carried = pin!(both_ways(socket, side, send, recv, meter));
        meter.unless_idle(carried).await
    };
    match ended {
        Some(Ok(())) => {
            close_in_order(socket);
            CloseReason::Done
        }
        None => {
            send.send_reset(Reason::CONNECT_ERROR);
            CloseReason::Idle
        }
        Some(Err(broken)) => {
            if matches!(broken, Broken::Socket(_)) {
                // A reset overtakes what the connection has not sent yet. It runs now, and sends what it can: so would
                // the kernel.
                tokio::task::yield_now().await;
                // RFC 9113, section 8.5. Others take CANCEL for an orderly end, and what was cut off for the whole.
                send.send_reset(Reason::CONNECT_ERROR);
            }
            broken.reason(side, place.health())
        }
    }
}

async fn both_ways(
    socket: &mut TcpStream,
    side: Side,
    send: &mut SendStream<Bytes>,
    recv: &mut RecvStream,
    meter: &Meter,
) -> Result<(), Broken> {
    let (mut reader, writer) = socket.split();
    let socket: &TcpStream = writer.as_ref();
    let mut outgoing = Outgoing::Waiting;
    let mut incoming = Incoming::default();
    let mut unread = Unread::default();
    let (said, heard) = match side {
        Side::Client => (Meter::sent as fn(&Meter, usize), Meter::received as fn(&Meter, usize)),
        Side::Server => (Meter::received as fn(&Meter, usize), Meter::sent as fn(&Meter, usize)),
    };
    poll_fn(|cx| {
        let out = outgoing.poll(cx, &mut reader, send, |n| said(meter, n))?;
        let back = incoming.poll(cx, socket, recv, |n| heard(meter, n))?;
        if out.is_ready() && back.is_ready() {
            return Poll::Ready(Ok(()));
        }
        if outgoing == Outgoing::Waiting {
            unread.is_read();
        } else if let Poll::Ready(error) = unread.poll_broken(cx, socket) {
            return Poll::Ready(Err(Broken::Socket(error)));
        }
        match send.poll_reset(cx) {
            Poll::Ready(Ok(reason)) => Poll::Ready(Err(Broken::Tunnel(reason.into()))),
            Poll::Ready(Err(error)) => Poll::Ready(Err(Broken::Tunnel(error))),
            Poll::Pending => Poll::Pending,
        }
    })
    .await
}

/// From the socket into the tunnel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outgoing {
    /// For the socket to say something.
    Waiting,
    /// For room in the tunnel.
    Reserving,
    /// The socket has ended its stream, and the tunnel has been told.
    Ended,
}

impl Outgoing {
    /// Moves bytes until one side is not ready, the turn is over or the direction has ended.
    fn poll(
        &mut self,
        cx: &mut Context<'_>,
        socket: &mut ReadHalf<'_>,
        send: &mut SendStream<Bytes>,
        count: impl Fn(usize),
    ) -> Poll<Result<(), Broken>> {
        let mut moved = 0;
        while moved < TURN {
            match self {
                Self::Waiting => {
                    ready!(socket.as_ref().poll_read_ready(cx)).map_err(Broken::Socket)?;
                    send.reserve_capacity(MOST);
                    *self = Self::Reserving;
                    // The end of the stream needs no room, and must not wait for others to make some.
                    if send.capacity() == 0 {
                        match poll_peek(cx, socket) {
                            Poll::Ready(Ok(0)) => self.end(send)?,
                            // Bytes need room; what broke the socket shows when it is read.
                            Poll::Ready(_) => {}
                            // What was read last was all that there is, and the end may come next.
                            Poll::Pending => {
                                send.reserve_capacity(0);
                                *self = Self::Waiting;
                                return Poll::Pending;
                            }
                        }
                    }
                }
                Self::Reserving => {
                    if send.capacity() == 0 {
                        match ready!(send.poll_capacity(cx)) {
                            Some(Ok(_)) => continue,
                            Some(Err(error)) => return Poll::Ready(Err(Broken::Tunnel(error))),
                            // The stream is closed.
                            None => return Poll::Ready(Err(Broken::Tunnel(Reason::CANCEL.into()))),
                        }
                    }
                    let room = send.capacity().min(MOST);
                    let read = poll_read(cx, socket, room);
                    if let Poll::Ready(Ok(bytes)) = &read
                        && bytes.is_empty()
                    {
                        self.end(send)?;
                        continue;
                    }
                    let mut n = 0;
                    if let Poll::Ready(bytes) = read {
                        let bytes = bytes.map_err(Broken::Socket)?;
                        n = bytes.len();
                        count(n);
                        moved += n;
                        send.send_data(bytes, false).map_err(Broken::Tunnel)?;
                    }
                    if n < room {
                        // There is no more for now, and others may need what this stream does not.
                        send.reserve_capacity(0);
                    }
                    *self = Self::Waiting;
                }
                Self::Ended => return Poll::Ready(Ok(())),
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// Tells the tunnel that the socket has ended its stream.
    fn end(&mut self, send: &mut SendStream<Bytes>) -> Result<(), Broken> {
        send.send_data(Bytes::new(), true).map_err(Broken::Tunnel)?;
        *self = Self::Ended;
        Ok(())
    }
}

/// How many bytes wait to be read, one at the most; 0 at the end of the stream.
fn poll_peek(cx: &mut Context<'_>, socket: &mut ReadHalf<'_>) -> Poll<io::Result<usize>> {
    let mut byte = [0];
    socket.poll_peek(cx, &mut ReadBuf::new(&mut byte))
}

/// One read of what there is room for. A short one leaves the socket drained, without asking again.
fn poll_read(cx: &mut Context<'_>, socket: &mut ReadHalf<'_>, room: usize) -> Poll<io::Result<Bytes>> {
    let mut chunk = Chunk::take();
    let mut buffer = ReadBuf::new(&mut chunk[..room]);
    ready!(Pin::new(socket).poll_read(cx, &mut buffer))?;
    let n = buffer.filled().len();
    let bytes = if n < SMALL { Bytes::copy_from_slice(buffer.filled()) } else { chunk.into_bytes(n) };
    Poll::Ready(Ok(bytes))
}

/// From the tunnel to the socket.
#[derive(Debug, Default)]
struct Incoming {
    /// What the socket has not taken yet. It counts against the stream's window until it has.
    held: VecDeque<Bytes>,
    /// The tunnel's stream has ended.
    is_over: bool,
    /// And the socket has been told.
    is_told: bool,
}

impl Incoming {
    /// Moves bytes until one side is not ready, the turn is over or the direction has ended.
    fn poll(
        &mut self,
        cx: &mut Context<'_>,
        socket: &TcpStream,
        recv: &mut RecvStream,
        count: impl Fn(usize),
    ) -> Poll<Result<(), Broken>> {
        let mut moved = 0;
        while moved < TURN {
            let gathered = self.gather(cx, recv, &count);
            if self.held.is_empty() {
                // Nor does an idle stream hold room for what comes.
                self.held = VecDeque::new();
                ready!(gathered).map_err(Broken::Tunnel)?;
                if !self.is_told {
                    end(socket).map_err(Broken::Socket)?;
                    self.is_told = true;
                }
                return Poll::Ready(Ok(()));
            }
            match self.write(socket) {
                Ok(n) => {
                    moved += n;
                    recv.flow_control().release_capacity(n).map_err(Broken::Tunnel)?;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    ready!(socket.poll_write_ready(cx)).map_err(Broken::Socket)?;
                }
                Err(error) => return Poll::Ready(Err(Broken::Socket(error))),
            }
            if let Poll::Ready(Err(error)) = gathered {
                return Poll::Ready(Err(Broken::Tunnel(error)));
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// Takes what the tunnel has brought, so that one call to the kernel passes it on. Ready when no more comes.
    fn gather(
        &mut self,
        cx: &mut Context<'_>,
        recv: &mut RecvStream,
        count: impl Fn(usize),
    ) -> Poll<Result<(), h2::Error>> {
        // Frames without bytes count as well, or a peer could keep the thread busy with them.
        for _ in 0..PARTS {
            if self.is_over {
                return Poll::Ready(Ok(()));
            }
            if self.held.len() == PARTS {
                return Poll::Pending;
            }
            match ready!(recv.poll_data(cx)) {
                Some(Ok(bytes)) if bytes.is_empty() => {}
                Some(Ok(bytes)) => {
                    count(bytes.len());
                    self.held.push_back(bytes);
                }
                Some(Err(error)) => return Poll::Ready(Err(error)),
                None => self.is_over = true,
            }
        }
        if self.held.is_empty() {
            cx.waker().wake_by_ref();
        }
        Poll::Pending
    }

    fn write(&mut self, socket: &TcpStream) -> io::Result<usize> {
        let mut slices = [IoSlice::new(&[]); PARTS];
        for (slice, bytes) in slices.iter_mut().zip(&self.held) {
            *slice = IoSlice::new(bytes);
        }
        let written = match &slices[..self.held.len()] {
            // Not the same to the kernel, where it is faster.
            [only] => socket.try_write(only)?,
            all => socket.try_write_vectored(all)?,
        };
        let mut left = written;
        while let Some(bytes) = self.held.front_mut() {
            let n = left.min(bytes.len());
            bytes.advance(n);
            left -= n;
            if !bytes.is_empty() {
                break;
            }
            self.held.pop_front();
        }
        Ok(written)
    }
}

impl Broken {
    fn reason(&self, side: Side, health: &Health) -> CloseReason {
        let (is_silent, is_client) = match self {
            Self::Socket(error) => (is_silence(error), side == Side::Client),
            Self::Tunnel(error) => {
                let is_silent = health.is_silent() || error.get_io().is_some_and(is_silence);
                (is_silent, side == Side::Server)
            }
        };
        match (is_client, is_silent) {
            (true, true) => CloseReason::ClientTimeout,
            (true, false) => CloseReason::ClientReset,
            (false, true) => CloseReason::UpstreamTimeout,
            (false, false) => CloseReason::UpstreamReset,
        }
    }
}

#[cfg(test)]
mod tests;
