//! The relay: bytes of any protocol, both ways, until both sides are done.
//!
//! It never looks at the bytes. A half-close is passed on as a half-close, a reset as a reset. An idle connection
//! holds no buffer: reads go to a buffer of the thread, and only what the other side does not take at once is kept.

use std::cell::RefCell;
use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::TcpStream;
use tokio::net::tcp::{ReadHalf, WriteHalf};

use super::splice::{Pipe, Spliced};
use crate::telemetry::{CloseReason, OpenConnection};

/// Bytes read at a time. A TCP receive queue of a busy connection holds more than this, hence the splice.
const CHUNK: usize = 64 * 1024;

/// Bytes that one direction may move before other connections of the thread get their turn.
const TURN: usize = 1024 * 1024;

/// Full reads in a row after which a direction counts as bulk, where splicing pays for its pipe.
const BULK_AFTER: u32 = 4;

thread_local! {
    static SCRATCH: RefCell<Box<[u8]>> = RefCell::new(vec![0; CHUNK].into_boxed_slice());
}

/// Counts the bytes of one connection, for each side that reports it.
#[derive(Debug)]
pub(super) struct Meter {
    records: Vec<OpenConnection>,
}

impl Meter {
    pub(super) fn new(records: Vec<OpenConnection>) -> Self {
        Self { records }
    }

    pub(super) fn close(self, reason: CloseReason) {
        for record in self.records {
            record.close(reason);
        }
    }

    pub(super) fn sent(&self, bytes: usize) {
        self.records.iter().for_each(|record| record.add_sent(bytes as u64));
    }

    pub(super) fn received(&self, bytes: usize) {
        self.records.iter().for_each(|record| record.add_received(bytes as u64));
    }
}

/// Relays between the two until both directions have ended or one of them broke; says why it ended. Both sockets are
/// closed: in order after an orderly end, else by a reset, as all of the agent's are unless told otherwise.
pub(super) async fn relay(mut client: TcpStream, mut upstream: TcpStream, meter: &Meter) -> CloseReason {
    match both_ways(&mut client, &mut upstream, meter).await {
        Ok(()) => {
            close_in_order(&client);
            close_in_order(&upstream);
            CloseReason::Done
        }
        Err(Broken { side: Side::Client, error }) if is_silence(&error) => CloseReason::ClientTimeout,
        Err(Broken { side: Side::Client, .. }) => CloseReason::ClientReset,
        Err(Broken { side: Side::Upstream, error }) if is_silence(&error) => CloseReason::UpstreamTimeout,
        Err(Broken { side: Side::Upstream, .. }) => CloseReason::UpstreamReset,
    }
}

/// Makes the close of the socket an orderly one.
pub(super) fn close_in_order(socket: &TcpStream) {
    // It fails only on a socket that is reset already.
    let _ = SockRef::from(socket).set_linger(None);
}

/// Which of the two sockets broke, and how.
#[derive(Debug)]
struct Broken {
    side: Side,
    error: io::Error,
}

#[derive(Clone, Copy, Debug)]
enum Side {
    Client,
    Upstream,
}

/// Whether the other end fell silent, rather than said anything.
pub(super) fn is_silence(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::TimedOut | io::ErrorKind::HostUnreachable | io::ErrorKind::NetworkUnreachable
    )
}

async fn both_ways(client: &mut TcpStream, upstream: &mut TcpStream, meter: &Meter) -> Result<(), Broken> {
    let (mut client_read, mut client_write) = client.split();
    let (mut upstream_read, mut upstream_write) = upstream.split();
    let mut up = Direction::new();
    let mut down = Direction::new();
    let mut poll_up = |cx: &mut Context<'_>| {
        up.poll(cx, &mut client_read, &mut upstream_write, |n| meter.sent(n))
            .map_err(|broken| broken.of(Side::Client, Side::Upstream))
    };
    let mut poll_down = |cx: &mut Context<'_>| {
        down.poll(cx, &mut upstream_read, &mut client_write, |n| meter.received(n))
            .map_err(|broken| broken.of(Side::Upstream, Side::Client))
    };
    let (up_ended, down_ended) = poll_fn(|cx| {
        let up = poll_up(cx)?;
        let down = poll_down(cx)?;
        let ended = up.is_ready() || down.is_ready();
        if ended { Poll::Ready(Ok((up.is_ready(), down.is_ready()))) } else { Poll::Pending }
    })
    .await?;
    // Half closed: the side that has ended its stream may still break, which shows in no read.
    if !down_ended {
        until_broken(poll_down, client_read.as_ref(), Side::Client).await
    } else if !up_ended {
        until_broken(poll_up, upstream_read.as_ref(), Side::Upstream).await
    } else {
        Ok(())
    }
}

/// Drives the direction that is left, unless the other one's sender breaks.
async fn until_broken(
    rest: impl FnMut(&mut Context<'_>) -> Poll<Result<(), Broken>>,
    ended: &TcpStream,
    side: Side,
) -> Result<(), Broken> {
    tokio::select! {
        biased;
        result = poll_fn(rest) => result,
        error = broken(ended) => Err(Broken { side, error }),
    }
}

/// Returns when the socket is broken; says how.
pub(super) async fn broken(socket: &TcpStream) -> io::Error {
    if socket.ready(Interest::ERROR).await.is_ok()
        && let Ok(Some(error)) = socket.take_error()
    {
        return error;
    }
    std::future::pending().await
}

/// One direction of a relay.
struct Direction {
    state: State,
    full_reads: u32,
}

enum State {
    /// Nothing is held: the next step is a read.
    Reading,
    /// Bytes that the receiver did not take at once.
    Holding { bytes: Vec<u8>, written: usize },
    /// Bulk goes through a pipe.
    Splicing(Pipe),
    /// The sender has ended its stream, the receiver is to be told.
    Ending,
    /// The receiver has been told.
    Ended,
}

/// One direction's socket broke.
enum DirectionBroken {
    Sender(io::Error),
    Receiver(io::Error),
}

impl DirectionBroken {
    fn of(self, sender: Side, receiver: Side) -> Broken {
        match self {
            Self::Sender(error) => Broken { side: sender, error },
            Self::Receiver(error) => Broken { side: receiver, error },
        }
    }
}

impl Direction {
    fn new() -> Self {
        Self { state: State::Reading, full_reads: 0 }
    }

    /// Moves bytes until one side is not ready, the turn is over or the direction has ended.
    fn poll(
        &mut self,
        cx: &mut Context<'_>,
        from: &mut ReadHalf<'_>,
        to: &mut WriteHalf<'_>,
        count: impl Fn(usize),
    ) -> Poll<Result<(), DirectionBroken>> {
        let mut moved = 0;
        while moved < TURN {
            match &mut self.state {
                State::Reading => {
                    if self.full_reads >= BULK_AFTER
                        && let Some(pipe) = Pipe::take()
                    {
                        self.state = State::Splicing(pipe);
                        continue;
                    }
                    moved += ready!(self.copy(cx, from, to, &count))?;
                }
                State::Holding { bytes, written } => {
                    let rest = &bytes[*written..];
                    let n =
                        ready!(Pin::new(&mut *to).poll_write(cx, rest)).map_err(DirectionBroken::Receiver)?;
                    *written += n;
                    if *written == bytes.len() {
                        self.state = State::Reading;
                    }
                }
                State::Splicing(pipe) => match ready!(pipe.poll_move(cx, from.as_ref(), to.as_ref()))? {
                    Spliced::Moved(n) => {
                        count(n);
                        moved += n;
                    }
                    // The burst is over; the pipe goes back for others.
                    Spliced::Dry => {
                        self.full_reads = 0;
                        self.state = State::Reading;
                    }
                },
                State::Ending => {
                    match ready!(Pin::new(&mut *to).poll_shutdown(cx)) {
                        // The receiver has closed altogether: nothing is left to tell it.
                        Err(error) if error.kind() == io::ErrorKind::NotConnected => {}
                        result => result.map_err(DirectionBroken::Receiver)?,
                    }
                    self.state = State::Ended;
                }
                State::Ended => return Poll::Ready(Ok(())),
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// One read and as much writing as the receiver takes; the rest is held.
    fn copy(
        &mut self,
        cx: &mut Context<'_>,
        from: &mut ReadHalf<'_>,
        to: &mut WriteHalf<'_>,
        count: &impl Fn(usize),
    ) -> Poll<Result<usize, DirectionBroken>> {
        SCRATCH.with_borrow_mut(|scratch| {
            let mut buffer = ReadBuf::new(scratch);
            ready!(Pin::new(from).poll_read(cx, &mut buffer)).map_err(DirectionBroken::Sender)?;
            let bytes = buffer.filled();
            if bytes.is_empty() {
                self.state = State::Ending;
                return Poll::Ready(Ok(0));
            }
            self.full_reads = if bytes.len() == CHUNK { self.full_reads + 1 } else { 0 };
            count(bytes.len());
            let mut written = 0;
            while written < bytes.len() {
                match Pin::new(&mut *to).poll_write(cx, &bytes[written..]) {
                    Poll::Ready(n) => written += n.map_err(DirectionBroken::Receiver)?,
                    Poll::Pending => {
                        self.state = State::Holding { bytes: bytes[written..].to_vec(), written: 0 };
                        break;
                    }
                }
            }
            Poll::Ready(Ok(bytes.len()))
        })
    }
}

impl From<super::splice::SpliceBroken> for DirectionBroken {
    fn from(broken: super::splice::SpliceBroken) -> Self {
        match broken {
            super::splice::SpliceBroken::Sender(error) => Self::Sender(error),
            super::splice::SpliceBroken::Receiver(error) => Self::Receiver(error),
        }
    }
}
