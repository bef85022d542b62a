//! The relay between a socket and a stream of a tunnel, both ways, until both sides are done.
//!
//! It never looks at the bytes. END_STREAM is a half-close, RST_STREAM a reset. An idle stream holds no buffer and none
//! of the tunnel's window: it asks for room only once the socket has something to say, and gives the peer new room only
//! when the socket has taken what came.

use std::cell::RefCell;
use std::future::poll_fn;
use std::io;
use std::net::Shutdown;
use std::pin::pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf as _, Bytes, BytesMut};
use h2::{Reason, RecvStream, SendStream};
use socket2::SockRef;
use tokio::net::TcpStream;

use super::health::{Health, Place};
use crate::proxy::relay::{Meter, broken, close_in_order, is_silence};
use crate::telemetry::CloseReason;

/// Bytes read from the socket at a time, four TLS records' worth.
const CHUNK: usize = 64 * 1024;

/// Reads shorter than this are copied, so that few bytes never hold a whole chunk.
const SMALL: usize = 8 * 1024;

/// Bytes that one direction may move before other connections of the thread get their turn.
const TURN: usize = 1024 * 1024;

thread_local! {
    static SCRATCH: RefCell<BytesMut> = RefCell::new(BytesMut::new());
}

/// A stream of a tunnel, connected at both ends.
#[derive(Debug)]
pub(in crate::proxy) struct Ends {
    pub(super) send: SendStream<Bytes>,
    pub(super) recv: RecvStream,
    pub(super) place: Place,
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

/// Relays between the two until both directions have ended or one of them broke; says why it ended. After an orderly
/// end both are closed in order, else both are reset.
pub(in crate::proxy) async fn relay(socket: TcpStream, side: Side, ends: Ends, meter: &Meter) -> CloseReason {
    let Ends { mut send, mut recv, place } = ends;
    let ended = both_ways(&socket, side, &mut send, &mut recv, meter).await;
    match ended {
        Ok(()) => {
            close_in_order(&socket);
            CloseReason::Done
        }
        Err(broken) => {
            if matches!(broken, Broken::Socket(_)) {
                // A reset overtakes what the connection has not sent yet. It runs now, and sends what it can: so would
                // the kernel.
                tokio::task::yield_now().await;
                send.send_reset(Reason::CANCEL);
            }
            broken.reason(side, place.health())
        }
    }
}

async fn both_ways(
    socket: &TcpStream,
    side: Side,
    send: &mut SendStream<Bytes>,
    recv: &mut RecvStream,
    meter: &Meter,
) -> Result<(), Broken> {
    let mut outgoing = Outgoing::Waiting;
    let mut incoming = Incoming::Waiting;
    // A reset shows in no read while the socket is not read from.
    let mut failure = pin!(broken(socket));
    let (said, heard) = match side {
        Side::Client => (Meter::sent as fn(&Meter, usize), Meter::received as fn(&Meter, usize)),
        Side::Server => (Meter::received as fn(&Meter, usize), Meter::sent as fn(&Meter, usize)),
    };
    poll_fn(|cx| {
        let out = outgoing.poll(cx, socket, send, |n| said(meter, n))?;
        let back = incoming.poll(cx, socket, recv, |n| heard(meter, n))?;
        if out.is_ready() && back.is_ready() {
            return Poll::Ready(Ok(()));
        }
        if let Poll::Ready(error) = failure.as_mut().poll(cx) {
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
        socket: &TcpStream,
        send: &mut SendStream<Bytes>,
        count: impl Fn(usize),
    ) -> Poll<Result<(), Broken>> {
        let mut moved = 0;
        while moved < TURN {
            match self {
                Self::Waiting => {
                    ready!(socket.poll_read_ready(cx)).map_err(Broken::Socket)?;
                    send.reserve_capacity(CHUNK);
                    *self = Self::Reserving;
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
                    match read(socket, send.capacity()) {
                        Ok(bytes) if bytes.is_empty() => {
                            send.send_data(Bytes::new(), true).map_err(Broken::Tunnel)?;
                            *self = Self::Ended;
                        }
                        Ok(bytes) => {
                            count(bytes.len());
                            moved += bytes.len();
                            send.send_data(bytes, false).map_err(Broken::Tunnel)?;
                            send.reserve_capacity(CHUNK);
                        }
                        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                            // Others may need what this stream does not.
                            send.reserve_capacity(0);
                            *self = Self::Waiting;
                        }
                        Err(error) => return Poll::Ready(Err(Broken::Socket(error))),
                    }
                }
                Self::Ended => return Poll::Ready(Ok(())),
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }
}

/// One read of what there is room for.
fn read(socket: &TcpStream, room: usize) -> io::Result<Bytes> {
    SCRATCH.with_borrow_mut(|scratch| {
        scratch.clear();
        scratch.reserve(CHUNK);
        let mut limited = bytes::BufMut::limit(&mut *scratch, room.min(CHUNK));
        let n = socket.try_read_buf(&mut limited)?;
        Ok(if n < SMALL { Bytes::copy_from_slice(scratch) } else { scratch.split().freeze() })
    })
}

/// From the tunnel to the socket.
#[derive(Debug)]
enum Incoming {
    /// For the tunnel to bring something.
    Waiting,
    /// What the socket has not taken yet.
    Holding(Bytes),
    /// The tunnel's stream has ended, and the socket has been told.
    Ended,
}

impl Incoming {
    fn poll(
        &mut self,
        cx: &mut Context<'_>,
        socket: &TcpStream,
        recv: &mut RecvStream,
        count: impl Fn(usize),
    ) -> Poll<Result<(), Broken>> {
        let mut moved = 0;
        while moved < TURN {
            match self {
                Self::Waiting => match ready!(recv.poll_data(cx)) {
                    Some(Ok(bytes)) => {
                        count(bytes.len());
                        // Empty frames cost a turn as well.
                        moved += bytes.len().max(1024);
                        *self = Self::Holding(bytes);
                    }
                    Some(Err(error)) => return Poll::Ready(Err(Broken::Tunnel(error))),
                    None => {
                        end(socket).map_err(Broken::Socket)?;
                        *self = Self::Ended;
                    }
                },
                Self::Holding(bytes) if bytes.is_empty() => *self = Self::Waiting,
                Self::Holding(bytes) => match socket.try_write(bytes) {
                    Ok(n) => {
                        bytes.advance(n);
                        recv.flow_control().release_capacity(n).map_err(Broken::Tunnel)?;
                    }
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                        ready!(socket.poll_write_ready(cx)).map_err(Broken::Socket)?;
                    }
                    Err(error) => return Poll::Ready(Err(Broken::Socket(error))),
                },
                Self::Ended => return Poll::Ready(Ok(())),
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }
}

/// Tells the socket that no more comes.
fn end(socket: &TcpStream) -> io::Result<()> {
    match SockRef::from(socket).shutdown(Shutdown::Write) {
        // It has closed altogether: nothing is left to tell it.
        Err(error) if error.kind() == io::ErrorKind::NotConnected => Ok(()),
        result => result,
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
