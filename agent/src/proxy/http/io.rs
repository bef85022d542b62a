//! A connection as a stream of bytes, counted if need be: a socket, or a stream of a tunnel.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::{Buf as _, Bytes};
use h2::{RecvStream, SendStream};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::client::TlsStream;
use tokio_util::either::Either;

use super::pool::Terms;
use crate::proxy::reach::Upstream;
use crate::proxy::relay::{Meter, close_in_order, is_silence};
use crate::proxy::tasks::Tasks;
use crate::proxy::tunnel::stream::Ends;
use crate::telemetry::CloseReason;

/// Bytes that are handed to a tunnel at a time.
const MOST: usize = 64 * 1024;

/// A connection, of whichever kind.
#[derive(Debug)]
pub(in crate::proxy) enum Stream {
    Socket(TcpStream),
    Tunnel(TunnelStream),
}

/// A connection to an upstream, whose bytes count.
#[derive(Debug)]
pub(super) struct Counted {
    meter: Option<Meter>,
    stream: Stream,
    /// Its place among the connections of the Service port lasts as long.
    _terms: Option<Arc<Terms>>,
    /// What ended it, once something has.
    ended: Option<CloseReason>,
}

/// What HTTP is spoken on: a connection as it is, or TLS on it.
pub(super) type Io = Either<Counted, Box<TlsStream<Counted>>>;

impl Stream {
    /// A stream of a tunnel of which these bytes have been read already.
    pub(in crate::proxy) fn tunnel(ends: Ends, held: Bytes, tasks: &Tasks) -> Self {
        Self::Tunnel(TunnelStream { ends: Some(ends), held, is_ended: false, tasks: tasks.clone() })
    }

    pub(in crate::proxy) fn socket(socket: TcpStream) -> Self {
        // HTTP says for itself when a message is cut off, so that no reset has to.
        close_in_order(&socket);
        Self::Socket(socket)
    }

    pub(super) fn new(way: Upstream, tasks: &Tasks) -> Self {
        match way {
            Upstream::Socket(socket) => Self::socket(socket),
            Upstream::Tunnel(ends) => Self::tunnel(ends, Bytes::new(), tasks),
        }
    }
}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Socket(socket) => Pin::new(socket).poll_read(cx, buf),
            Self::Tunnel(stream) => stream.poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Socket(socket) => Pin::new(socket).poll_write(cx, bytes),
            Self::Tunnel(stream) => stream.poll_write(cx, bytes),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Socket(socket) => Pin::new(socket).poll_write_vectored(cx, slices),
            Self::Tunnel(stream) => {
                let first = slices.iter().find(|slice| !slice.is_empty());
                stream.poll_write(cx, first.map_or(&[], |slice| slice))
            }
        }
    }

    /// A tunnel takes one buffer at a time: HTTP then joins small ones by itself.
    fn is_write_vectored(&self) -> bool {
        matches!(self, Self::Socket(_))
    }

    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        // Sockets and tunnels send what they have by themselves.
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Socket(socket) => Pin::new(socket).poll_shutdown(cx),
            Self::Tunnel(stream) => Poll::Ready(stream.end()),
        }
    }
}

impl Counted {
    pub(super) fn new(stream: Stream, meter: Meter, terms: Option<Arc<Terms>>) -> Self {
        Self { meter: Some(meter), stream, _terms: terms, ended: None }
    }

    fn note<T>(&mut self, result: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if let Poll::Ready(Err(error)) = &result {
            let is_silent = is_silence(error);
            self.ended =
                Some(if is_silent { CloseReason::UpstreamTimeout } else { CloseReason::UpstreamReset });
        }
        result
    }

    fn sent(&mut self, written: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        if let Poll::Ready(Ok(n)) = &written {
            self.meter.iter().for_each(|meter| meter.sent(*n));
        }
        self.note(written)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        if let Some(meter) = self.meter.take() {
            meter.close(self.ended.unwrap_or(CloseReason::Cancelled));
        }
    }
}

impl AsyncRead for Counted {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buf.filled().len();
        let read = Pin::new(&mut this.stream).poll_read(cx, buf);
        let n = buf.filled().len() - before;
        if n > 0 {
            this.meter.iter().for_each(|meter| meter.received(n));
        } else if matches!(read, Poll::Ready(Ok(()))) {
            this.ended.get_or_insert(CloseReason::Done);
        }
        this.note(read)
    }
}

impl AsyncWrite for Counted {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let written = Pin::new(&mut this.stream).poll_write(cx, bytes);
        this.sent(written)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let written = Pin::new(&mut this.stream).poll_write_vectored(cx, slices);
        this.sent(written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let flushed = Pin::new(&mut this.stream).poll_flush(cx);
        this.note(flushed)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        this.ended.get_or_insert(CloseReason::Done);
        let ended = Pin::new(&mut this.stream).poll_shutdown(cx);
        this.note(ended)
    }
}

/// A stream of a tunnel. It holds one frame at the most, and the peer gets room for more only when that is taken.
#[derive(Debug)]
pub(in crate::proxy) struct TunnelStream {
    /// None when it is dropped.
    ends: Option<Ends>,
    held: Bytes,
    is_ended: bool,
    /// Has the peer's end waited for.
    tasks: Tasks,
}

impl TunnelStream {
    fn recv(&mut self) -> io::Result<&mut RecvStream> {
        let ends = self.ends.as_mut().ok_or(io::ErrorKind::NotConnected)?;
        Ok(&mut ends.recv)
    }

    fn send(&mut self) -> io::Result<&mut SendStream<Bytes>> {
        let ends = self.ends.as_mut().ok_or(io::ErrorKind::NotConnected)?;
        Ok(&mut ends.send)
    }

    fn poll_read(&mut self, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        while self.held.is_empty() {
            match ready!(self.recv()?.poll_data(cx)) {
                Some(Ok(bytes)) => self.held = bytes,
                Some(Err(error)) => return Poll::Ready(Err(broken(error))),
                None => return Poll::Ready(Ok(())),
            }
        }
        let n = self.held.len().min(buf.remaining());
        buf.put_slice(&self.held[..n]);
        self.held.advance(n);
        self.recv()?.flow_control().release_capacity(n).map_err(broken)?;
        Poll::Ready(Ok(()))
    }

    fn poll_write(&mut self, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        if bytes.is_empty() {
            return Poll::Ready(Ok(0));
        }
        let send = self.send()?;
        send.reserve_capacity(bytes.len().min(MOST));
        while send.capacity() == 0 {
            match ready!(send.poll_capacity(cx)) {
                Some(capacity) => _ = capacity.map_err(broken)?,
                None => return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into())),
            }
        }
        let n = bytes.len().min(send.capacity());
        send.send_data(Bytes::copy_from_slice(&bytes[..n]), false).map_err(broken)?;
        Poll::Ready(Ok(n))
    }

    fn end(&mut self) -> io::Result<()> {
        if !std::mem::replace(&mut self.is_ended, true) {
            self.send()?.send_data(Bytes::new(), true).map_err(broken)?;
        }
        Ok(())
    }
}

impl Drop for TunnelStream {
    fn drop(&mut self) {
        let Some(ends) = self.ends.take() else { return };
        if !self.is_ended {
            ends.reset();
        } else if !ends.recv.is_end_stream() {
            self.tasks.spawn(ends.see_out());
        }
    }
}

fn broken(error: h2::Error) -> io::Error {
    if error.is_io() {
        return error.into_io().unwrap_or_else(|| io::ErrorKind::ConnectionReset.into());
    }
    io::Error::new(io::ErrorKind::ConnectionReset, error)
}
