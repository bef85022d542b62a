//! The relay: bytes of any protocol, both ways, until both sides are done.
//!
//! It never looks at the bytes. A half-close is passed on as a half-close, a reset as a reset. An idle connection
//! holds no buffer: reads go to a buffer of the thread, and only what the other side does not take at once is kept.

use std::cell::RefCell;
use std::future::poll_fn;
use std::io;
use std::net::Shutdown;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use socket2::SockRef;
use tokio::io::Interest;
use tokio::net::TcpStream;

use super::idle::unmoved;
use super::splice::{Pipe, Spliced};
use crate::telemetry::{CloseReason, OpenConnection, Reporter, Ruling};

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
    /// Of just their size: an idle connection keeps them.
    records: Box<[OpenConnection]>,
    /// How long nothing may move on it.
    idle_limit: Option<Duration>,
}

impl Meter {
    pub(super) fn new(records: impl IntoIterator<Item = OpenConnection>) -> Self {
        Self { records: records.into_iter().collect(), idle_limit: None }
    }

    /// The connection is to end when nothing has moved on it for so long; None: never for this.
    pub(super) fn ending_when_idle(self, limit: Option<Duration>) -> Self {
        Self { idle_limit: limit, ..self }
    }

    /// Carries the connection to its end; None if nothing moved on it for too long.
    pub(super) async fn unless_idle<T>(&self, carried: impl Future<Output = T>) -> Option<T> {
        let Some(limit) = self.idle_limit else { return Some(carried.await) };
        // On the heap: nearly all do without.
        let idle = Box::pin(unmoved(limit, || self.records.first().map(OpenConnection::moved)));
        tokio::select! {
            biased;
            ended = carried => Some(ended),
            () = idle => None,
        }
    }

    pub(super) fn close(self, reason: CloseReason) {
        for record in self.records {
            record.close(reason);
        }
    }

    /// Says what policies say of it on behalf of the server's side, whose they are.
    pub(super) fn rule(&self, ruling: &Arc<Ruling>) {
        let of_server = self.records.iter().filter(|record| record.reporter() == Reporter::Destination);
        of_server.for_each(|record| record.rule(ruling.clone()));
    }

    pub(super) fn sent(&self, bytes: usize) {
        self.records.iter().for_each(|record| record.add_sent(bytes as u64));
    }

    pub(super) fn received(&self, bytes: usize) {
        self.records.iter().for_each(|record| record.add_received(bytes as u64));
    }
}

/// A connection that stands, as it is carried to its end.
pub(super) type Carried = Pin<Box<dyn Future<Output = ()> + Send>>;

/// Makes a connection stand, and carries it. What stands, as many do for long, has no room for how it came about: each of the two is
/// on the heap by itself.
pub(super) fn begin_and_carry(
    begun: impl Future<Output = Option<Carried>> + Send,
) -> impl Future<Output = ()> + Send {
    let begun = Box::pin(begun);
    async move {
        let carried = begun.await;
        if let Some(carried) = carried {
            carried.await;
        }
    }
}

/// Relays between the two until both directions have ended or one of them broke; says why it ended. Whoever has the sockets is to
/// drop them then, which closes them: in order after an orderly end, else by a reset, as all of the agent's are unless told otherwise: to
/// who waits on a connection that was idle for too long an orderly end might look like that of what it waits for.
pub(super) async fn relay(client: &TcpStream, upstream: &TcpStream, meter: &Meter) -> CloseReason {
    let carried = pin!(both_ways(client, upstream, meter));
    match meter.unless_idle(carried).await {
        None => CloseReason::Idle,
        Some(Ok(())) => {
            close_in_order(client);
            close_in_order(upstream);
            CloseReason::Done
        }
        Some(Err(Broken { side: Side::Client, error })) if is_silence(&error) => CloseReason::ClientTimeout,
        Some(Err(Broken { side: Side::Client, .. })) => CloseReason::ClientReset,
        Some(Err(Broken { side: Side::Upstream, error })) if is_silence(&error) => {
            CloseReason::UpstreamTimeout
        }
        Some(Err(Broken { side: Side::Upstream, .. })) => CloseReason::UpstreamReset,
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

async fn both_ways(client: &TcpStream, upstream: &TcpStream, meter: &Meter) -> Result<(), Broken> {
    let mut up = Direction::new(client, upstream);
    let mut down = Direction::new(upstream, client);
    poll_fn(|cx| {
        let up = up.poll(cx, |n| meter.sent(n)).map_err(|broken| broken.of(Side::Client, Side::Upstream))?;
        let down =
            down.poll(cx, |n| meter.received(n)).map_err(|broken| broken.of(Side::Upstream, Side::Client))?;
        if up.is_ready() && down.is_ready() { Poll::Ready(Ok(())) } else { Poll::Pending }
    })
    .await
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
struct Direction<'a> {
    from: &'a TcpStream,
    to: &'a TcpStream,
    state: State,
    full_reads: u32,
    unread: Unread<'a>,
}

/// Watches a socket that is not read from, for then no read shows that it breaks.
#[derive(Default)]
pub(super) struct Unread<'a> {
    /// On the heap: an idle connection needs none.
    failure: Option<Pin<Box<dyn Future<Output = io::Error> + Send + 'a>>>,
}

impl<'a> Unread<'a> {
    /// It is read from: nothing needs to be watched.
    pub(super) fn is_read(&mut self) {
        self.failure = None;
    }

    /// Ready when it is broken; says how.
    pub(super) fn poll_broken(&mut self, cx: &mut Context<'_>, socket: &'a TcpStream) -> Poll<io::Error> {
        self.failure.get_or_insert_with(|| Box::pin(broken(socket))).as_mut().poll(cx)
    }
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

impl<'a> Direction<'a> {
    fn new(from: &'a TcpStream, to: &'a TcpStream) -> Self {
        Self { from, to, state: State::Reading, full_reads: 0, unread: Unread::default() }
    }

    /// Moves bytes until one side is not ready or the turn is over. Ready when the direction has ended: the sender's
    /// stream is over, and the receiver knows.
    fn poll(&mut self, cx: &mut Context<'_>, count: impl Fn(usize)) -> Poll<Result<(), DirectionBroken>> {
        let moved = self.poll_move(cx, count)?;
        if matches!(self.state, State::Reading) {
            self.unread.is_read();
        } else if let Poll::Ready(error) = self.unread.poll_broken(cx, self.from) {
            return Poll::Ready(Err(DirectionBroken::Sender(error)));
        }
        moved.map(Ok)
    }

    fn poll_move(
        &mut self,
        cx: &mut Context<'_>,
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
                    moved += ready!(self.copy(cx, &count))?;
                }
                State::Holding { bytes, written } => {
                    let rest = &bytes[*written..];
                    *written += ready!(poll_send(cx, self.to, rest)).map_err(DirectionBroken::Receiver)?;
                    if *written == bytes.len() {
                        self.state = State::Reading;
                    }
                }
                State::Splicing(pipe) => match ready!(pipe.poll_move(cx, self.from, self.to))? {
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
                    end(self.to).map_err(DirectionBroken::Receiver)?;
                    self.state = State::Ended;
                }
                State::Ended => return Poll::Ready(Ok(())),
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// One read and as much writing as the receiver takes; the rest is held.
    fn copy(&mut self, cx: &mut Context<'_>, count: &impl Fn(usize)) -> Poll<Result<usize, DirectionBroken>> {
        SCRATCH.with_borrow_mut(|scratch| {
            let n = ready!(poll_receive(cx, self.from, scratch)).map_err(DirectionBroken::Sender)?;
            if n == 0 {
                self.state = State::Ending;
                return Poll::Ready(Ok(0));
            }
            self.full_reads = if n == CHUNK { self.full_reads + 1 } else { 0 };
            count(n);
            let mut rest = &scratch[..n];
            while !rest.is_empty() {
                match poll_send(cx, self.to, rest) {
                    Poll::Ready(written) => rest = &rest[written.map_err(DirectionBroken::Receiver)?..],
                    Poll::Pending => {
                        self.state = State::Holding { bytes: rest.to_vec(), written: 0 };
                        break;
                    }
                }
            }
            Poll::Ready(Ok(n))
        })
    }
}

/// One read; 0 at the end of the stream.
fn poll_receive(cx: &mut Context<'_>, from: &TcpStream, into: &mut [u8]) -> Poll<io::Result<usize>> {
    loop {
        ready!(from.poll_read_ready(cx))?;
        let mut read = 0;
        let received = from.try_io(Interest::READABLE, || {
            read = io::Read::read(&mut &*SockRef::from(from), into)?;
            // A short read is the end of what is there: asking again would only tell so.
            if read == 0 || read == into.len() { Ok(()) } else { Err(io::ErrorKind::WouldBlock.into()) }
        });
        match received {
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => return Poll::Ready(Err(error)),
            Err(_) if read == 0 => {}
            _ => return Poll::Ready(Ok(read)),
        }
    }
}

fn poll_send(cx: &mut Context<'_>, to: &TcpStream, bytes: &[u8]) -> Poll<io::Result<usize>> {
    loop {
        ready!(to.poll_write_ready(cx))?;
        match to.try_write(bytes) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            written => return Poll::Ready(written),
        }
    }
}

/// Tells the socket that no more comes.
pub(super) fn end(socket: &TcpStream) -> io::Result<()> {
    match SockRef::from(socket).shutdown(Shutdown::Write) {
        // It has closed altogether: nothing is left to tell it.
        Err(error) if error.kind() == io::ErrorKind::NotConnected => Ok(()),
        result => result,
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
