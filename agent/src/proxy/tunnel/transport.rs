//! A tunnel's bytes on the wire: TLS records to and from the socket, under HTTP/2.
//!
//! tokio-rustls shakes hands; afterwards this takes its place, for three reasons. rustls asks a socket for 4 KiB at a
//! time, here it is given what one large read has brought. HTTP/2 flushes after every frame of some size, here nothing
//! leaves before the connection has said all that it has to say for now, so that the frames of many streams share
//! records and calls to the kernel. And records are full wherever there is enough to fill them.
//!
//! It knows neither frames nor streams. What it holds is bounded: what a chunk has, and [`BACKLOG`].

use std::future::poll_fn;
use std::io::{self, IoSlice};
use std::net::Shutdown;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use rustls::Connection;
use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::chunk::{CHUNK, Chunk};

/// What one TLS record carries at most.
const RECORD: usize = 16 * 1024;

/// What a record adds: its header, the type of its content, the tag (RFC 8446, section 5.2).
const RECORD_OVERHEAD: usize = 5 + 1 + 16;

/// How long the peer may take to end its side when ours has ended.
const FAREWELL: Duration = Duration::from_secs(1);

/// Bytes in records beyond which they are written without waiting for more.
const ENOUGH: usize = 2 * CHUNK;

/// Bytes in records beyond which HTTP/2 has to wait for the socket.
const BACKLOG: usize = 4 * CHUNK;

/// Bytes that may arrive before other connections of the thread get their turn.
const TURN: usize = 256 * 1024;

/// What HTTP/2 reads and writes. Nothing that is written leaves before [`Flusher::poll`] is called.
#[derive(Debug)]
pub(super) struct Transport(Arc<Mutex<Wire>>);

/// For whoever drives the connection: to be polled after each poll of the connection.
#[derive(Debug)]
pub(super) struct Flusher(Arc<Mutex<Wire>>);

#[derive(Debug)]
struct Wire {
    socket: TcpStream,
    tls: Connection,
    ahead: Ahead,
    staged: Staged,
    /// Bytes that are encrypted and not written yet.
    backlog: usize,
    /// Bytes read in this turn.
    moved: usize,
    /// Why nothing can be written any more.
    broken: Option<io::Error>,
}

impl Transport {
    /// Goes on where the handshake has ended.
    pub(super) fn new(socket: TcpStream, tls: impl Into<Connection>) -> (Self, Flusher) {
        let mut tls = tls.into();
        // The bound is the backlog.
        tls.set_buffer_limit(None);
        // A reset at the end would overtake what the peer has not read yet. A stream that is cut looks cut all the same:
        // TLS and HTTP/2 say where theirs end. Where it fails the connection is broken, as reading will show.
        let _ = SockRef::from(&socket).set_linger(None);
        let (ahead, staged) = (Ahead::default(), Staged::default());
        let wire = Wire { socket, tls, ahead, staged, backlog: 0, moved: 0, broken: None };
        let wire = Arc::new(Mutex::new(wire));
        (Self(wire.clone()), Flusher(wire))
    }

    fn wire(&self) -> MutexGuard<'_, Wire> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Flusher {
    /// Writes what HTTP/2 has to say, as far as the socket takes it; the task is woken when it takes more.
    pub(super) fn poll(&self, cx: &mut Context<'_>) {
        let mut wire = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        wire.moved = 0;
        let flushed = wire.seal().map_or_else(|error| Poll::Ready(Err(error)), |()| wire.poll_send(cx));
        if let Poll::Ready(Err(error)) = flushed {
            // HTTP/2 learns of it when it reads, after what has arrived before.
            wire.broken.get_or_insert(error);
            cx.waker().wake_by_ref();
        }
    }

    /// Once the connection is over: waits until the peer has ended its side as well, but not for long. A socket that is
    /// closed with something unread is reset, and the reset overtakes what the peer has not read yet.
    pub(super) async fn farewell(self) {
        let discard =
            |cx: &mut Context<'_>| self.0.lock().unwrap_or_else(PoisonError::into_inner).poll_discard(cx);
        // Whatever comes of it, the connection is over.
        let _ = timeout(FAREWELL, poll_fn(discard)).await;
    }
}

impl AsyncRead for Transport {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.wire().poll_read(cx, buffer)
    }
}

impl AsyncWrite for Transport {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.wire().poll_write(cx, &[IoSlice::new(bytes)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.wire().poll_write(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    /// HTTP/2 calls it for every frame of some size; the one that counts is [`Flusher::poll`].
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.wire().poll_shutdown(cx)
    }
}

impl Wire {
    fn poll_read(&mut self, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        while buffer.remaining() > 0 {
            match self.tls.reader().into_first_chunk() {
                Ok([]) => break,
                Ok(plain) => {
                    let n = plain.len().min(buffer.remaining());
                    buffer.put_slice(&plain[..n]);
                    io::BufRead::consume(&mut self.tls.reader(), n);
                    continue;
                }
                // The next read tells.
                Err(_) if buffer.filled().len() > before => break,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Poll::Ready(Err(self.broken.take().unwrap_or(error))),
            }
            ready!(self.poll_records(cx))?;
        }
        Poll::Ready(Ok(()))
    }

    /// Gives rustls more of what has arrived, and what has not been asked for yet from the socket.
    fn poll_records(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.ahead.is_empty() {
            if self.moved >= TURN {
                self.moved = 0;
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            match self.ahead.poll_fill(&mut self.socket, cx)? {
                Poll::Pending => return self.broken.take().map_or(Poll::Pending, |e| Poll::Ready(Err(e))),
                // The end of the stream, which rustls wants to know of.
                Poll::Ready(0) => self.tls.read_tls(&mut io::empty()).map(|_| ())?,
                Poll::Ready(n) => self.moved += n,
            }
        }
        while !self.ahead.is_empty() && self.tls.wants_read() {
            self.tls.read_tls(&mut self.ahead)?;
            if let Err(error) = self.tls.process_new_packets() {
                // It says why it breaks off, as far as the socket takes it.
                let _ = self.poll_send(cx);
                return Poll::Ready(Err(io::Error::new(io::ErrorKind::InvalidData, error)));
            }
        }
        Poll::Ready(Ok(()))
    }

    /// Takes all of it, or nothing while the socket lags behind.
    fn poll_write(&mut self, cx: &mut Context<'_>, slices: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        if self.backlog >= BACKLOG {
            ready!(self.poll_send(cx))?;
        }
        let len: usize = slices.iter().map(|slice| slice.len()).sum();
        let mut whole = (self.staged.len() + len) / RECORD * RECORD;
        if whole > 0 {
            whole -= self.staged.len();
            self.encrypt(slices, whole)?;
        }
        for slice in slices {
            let skipped = whole.min(slice.len());
            whole -= skipped;
            self.staged.push(&slice[skipped..]);
        }
        if self.backlog >= ENOUGH
            && let Poll::Ready(Err(error)) = self.poll_send(cx)
        {
            return Poll::Ready(Err(error));
        }
        Poll::Ready(Ok(len))
    }

    /// Makes records of what is staged and the first so many bytes.
    fn encrypt(&mut self, slices: &[IoSlice<'_>], mut len: usize) -> io::Result<()> {
        let mut parts = Vec::with_capacity(slices.len() + 1);
        parts.push(IoSlice::new(self.staged.bytes()));
        for slice in slices {
            let n = len.min(slice.len());
            parts.push(IoSlice::new(&slice[..n]));
            len -= n;
        }
        let plain = io::Write::write_vectored(&mut self.tls.writer(), &parts)?;
        self.backlog += plain + plain.div_ceil(RECORD) * RECORD_OVERHEAD;
        self.staged.clear();
        Ok(())
    }

    /// Makes a record of what is staged.
    fn seal(&mut self) -> io::Result<()> {
        if self.staged.len() > 0 { self.encrypt(&[], 0) } else { Ok(()) }
    }

    fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.tls.wants_write() {
            let mut socket = Sender { socket: &mut self.socket, cx };
            match self.tls.write_tls(&mut socket) {
                Ok(0) => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                Ok(n) => self.backlog = self.backlog.saturating_sub(n),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Poll::Pending,
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
        self.backlog = 0;
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.seal()?;
        // Once; rustls knows whether it has.
        self.tls.send_close_notify();
        ready!(self.poll_send(cx))?;
        match SockRef::from(&self.socket).shutdown(Shutdown::Write) {
            // It has closed altogether: nothing is left to tell it.
            Err(error) if error.kind() == io::ErrorKind::NotConnected => Poll::Ready(Ok(())),
            result => Poll::Ready(result),
        }
    }

    /// Takes what comes and forgets it, until the peer has ended its side.
    fn poll_discard(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let mut late = Chunk::take();
        let mut buffer = ReadBuf::new(&mut late);
        match ready!(Pin::new(&mut self.socket).poll_read(cx, &mut buffer)) {
            Ok(()) if !buffer.filled().is_empty() => {
                cx.waker().wake_by_ref();
                Poll::Pending
            }
            _ => Poll::Ready(()),
        }
    }
}

/// What the socket had, and rustls has not taken yet.
#[derive(Debug, Default)]
struct Ahead {
    chunk: Option<Chunk>,
    taken: usize,
    filled: usize,
}

impl Ahead {
    fn is_empty(&self) -> bool {
        self.chunk.is_none()
    }

    /// One read; 0 at the end of the stream.
    fn poll_fill(&mut self, socket: &mut TcpStream, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        let mut chunk = Chunk::take();
        let mut buffer = ReadBuf::new(&mut chunk);
        ready!(Pin::new(socket).poll_read(cx, &mut buffer))?;
        let filled = buffer.filled().len();
        if filled > 0 {
            *self = Self { chunk: Some(chunk), taken: 0, filled };
        }
        Poll::Ready(Ok(filled))
    }
}

impl io::Read for Ahead {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let Some(chunk) = &self.chunk else { return Ok(0) };
        let bytes = &chunk[self.taken..self.filled];
        let n = bytes.len().min(into.len());
        into[..n].copy_from_slice(&bytes[..n]);
        self.taken += n;
        if self.taken == self.filled {
            self.chunk = None;
        }
        Ok(n)
    }
}

/// What is to be said and fills no record yet: always less than a [`RECORD`].
#[derive(Debug, Default)]
struct Staged {
    chunk: Option<Chunk>,
    filled: usize,
}

impl Staged {
    fn len(&self) -> usize {
        self.filled
    }

    fn bytes(&self) -> &[u8] {
        self.chunk.as_deref().map_or(&[], |chunk| &chunk[..self.filled])
    }

    fn push(&mut self, bytes: &[u8]) {
        if !bytes.is_empty() {
            let end = self.filled + bytes.len();
            self.chunk.get_or_insert_with(Chunk::take)[self.filled..end].copy_from_slice(bytes);
            self.filled = end;
        }
    }

    fn clear(&mut self) {
        *self = Self::default();
    }
}

/// The socket as rustls writes to it.
struct Sender<'a, 'b> {
    socket: &'a mut TcpStream,
    cx: &'a mut Context<'b>,
}

impl io::Write for Sender<'_, '_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        would_block(Pin::new(&mut *self.socket).poll_write(self.cx, bytes))
    }

    fn write_vectored(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        would_block(Pin::new(&mut *self.socket).poll_write_vectored(self.cx, slices))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn would_block<T>(poll: Poll<io::Result<T>>) -> io::Result<T> {
    match poll {
        Poll::Ready(result) => result,
        Poll::Pending => Err(io::ErrorKind::WouldBlock.into()),
    }
}

#[cfg(test)]
mod tests;
