//! Informational answers (RFC 9110, section 15.2) on their way to a client that speaks HTTP/1.
//!
//! hyper's server sends none but 100, so the others are written past it, when that can garble nothing. It flushes a connection once all
//! that it had to write has been written, and again whenever its task runs. Nothing of an answer's head is written before the answer
//! is there. So a flush while a request is being answered is the moment.

use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker, ready};

use bytes::{Buf as _, Bytes, BytesMut};
use http::header::{CONTENT_LENGTH, HeaderMap, TRANSFER_ENCODING};
use http::{Request, StatusCode, Version};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::body::RequestBody;
use super::head;

/// Has the client hear what the upstream says ahead of its answer, and send its body when the upstream wants it, if it waits for that.
pub(super) fn listen(request: &mut Request<RequestBody>) {
    let go_on = head::waits_to_go_on(request).then(|| request.body_mut().hold_back());
    let herald = Herald::of(request);
    if go_on.is_none() && herald.is_none() {
        return;
    }
    hyper::ext::on_informational(request, move |said| {
        if said.status() == StatusCode::CONTINUE {
            // What the client sees of it comes of its body being asked for.
            go_on.iter().for_each(|go_on| go_on.notify_one());
        } else if let Some(herald) = &herald {
            herald.tell(said.status(), said.headers());
        }
    });
}

/// Bytes of informational answers to one request. What is beyond is not passed on: a server could say such things for ever.
const MOST: usize = 64 * 1024;

/// What one client is told ahead of its answers.
#[derive(Debug, Default)]
pub(super) struct Interim(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    /// Counts the requests of the connection.
    request: u64,
    /// The last of them has no answer yet.
    is_open: bool,
    /// Heads that are to be written.
    waiting: BytesMut,
    /// What may still be said of the request.
    left: usize,
    /// The task that writes.
    writer: Option<Waker>,
}

/// The request may be told of until this is dropped.
#[derive(Debug)]
pub(super) struct Open(Arc<Interim>);

/// Tells the client of one request. Says nothing any more once that has its answer.
#[derive(Clone, Debug)]
pub(super) struct Herald {
    interim: Arc<Interim>,
    request: u64,
}

impl Interim {
    /// A request is being answered, and has with it who tells of it ([`Herald::of`]).
    pub(super) fn begin<B>(self: &Arc<Self>, request: &mut Request<B>) -> Option<Open> {
        // Older clients know of no such answers (RFC 9110, section 15.2).
        if request.version() != Version::HTTP_11 {
            return None;
        }
        let number = {
            let mut state = self.state();
            state.request += 1;
            (state.is_open, state.left) = (true, MOST);
            state.request
        };
        request.extensions_mut().insert(Herald { interim: self.clone(), request: number });
        Some(Open(self.clone()))
    }

    /// The client's connection, on which this is written.
    pub(super) fn written_to<S>(self: &Arc<Self>, client: S) -> Written<S> {
        Written { client, interim: self.clone(), rest: Bytes::new() }
    }

    /// What is to be written now; whoever asks is woken when there is more, and when an answer may have waited for this.
    fn take(&self, writer: &Waker) -> Bytes {
        let mut state = self.state();
        if !state.waiting.is_empty() {
            writer.wake_by_ref();
        }
        if state.is_open {
            match &mut state.writer {
                Some(known) => known.clone_from(writer),
                None => state.writer = Some(writer.clone()),
            }
        }
        std::mem::take(&mut state.waiting).freeze()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Open {
    /// Returns when all has been written that the client was told: the answer comes after that.
    pub(super) async fn told(self) {
        poll_fn(|_| match self.0.state().waiting.is_empty() {
            true => Poll::Ready(()),
            // Who writes it runs this task again.
            false => Poll::Pending,
        })
        .await;
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        let mut state = self.0.state();
        state.is_open = false;
        state.waiting.clear();
    }
}

impl Herald {
    /// Of this request; none where its client is told nothing.
    pub(super) fn of<B>(request: &Request<B>) -> Option<Self> {
        request.extensions().get().cloned()
    }

    /// Tells the client what the upstream says.
    pub(super) fn tell(&self, status: StatusCode, headers: &HeaderMap) {
        let head = written(status, headers);
        let mut state = self.interim.state();
        if !state.is_open || state.request != self.request || state.left < head.len() {
            return;
        }
        state.left -= head.len();
        state.waiting.extend_from_slice(&head);
        let writer = state.writer.take();
        drop(state);
        if let Some(writer) = writer {
            writer.wake();
        }
    }
}

/// The head as it is sent. It says nothing of a body, for it has none.
fn written(status: StatusCode, headers: &HeaderMap) -> Vec<u8> {
    let mut headers = headers.clone();
    head::strip_hop_by_hop(&mut headers, false);
    headers.remove(CONTENT_LENGTH);
    headers.remove(TRANSFER_ENCODING);
    let reason = status.canonical_reason().unwrap_or_default();
    let mut head = format!("HTTP/1.1 {} {reason}\r\n", status.as_str()).into_bytes();
    for (name, value) in &headers {
        for part in [name.as_str().as_bytes(), b": ", value.as_bytes(), b"\r\n"] {
            head.extend_from_slice(part);
        }
    }
    head.extend_from_slice(b"\r\n");
    head
}

/// A client's connection.
#[derive(Debug)]
pub(super) struct Written<S> {
    client: S,
    interim: Arc<Interim>,
    /// What has been begun, which goes before anything else.
    rest: Bytes,
}

impl<S: AsyncWrite + Unpin> Written<S> {
    fn poll_rest(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.rest.is_empty() {
            match ready!(Pin::new(&mut self.client).poll_write(cx, &self.rest))? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                n => self.rest.advance(n),
            }
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Written<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().client).poll_read(cx, buf)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Written<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        ready!(this.poll_rest(cx))?;
        Pin::new(&mut this.client).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        ready!(this.poll_rest(cx))?;
        Pin::new(&mut this.client).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.client.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        loop {
            ready!(this.poll_rest(cx))?;
            this.rest = this.interim.take(cx.waker());
            if this.rest.is_empty() {
                return Pin::new(&mut this.client).poll_flush(cx);
            }
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        ready!(this.poll_rest(cx))?;
        Pin::new(&mut this.client).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;
    use std::future::pending;
    use std::sync::atomic::{AtomicU32, Ordering};

    use http::Response;
    use hyper::body::Incoming;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::super::body::ResponseBody;
    use super::super::{HttpLimits, serve};
    use super::*;

    /// What a client hears that says this, whose requests are answered so.
    async fn heard<F>(said: &str, answer: impl Fn(Option<Herald>) -> F) -> String
    where
        F: Future<Output = &'static str>,
    {
        // A few bytes at a time, so that nothing is written at once.
        let (client, server) = tokio::io::duplex(7);
        let (mut reader, mut writer) = tokio::io::split(client);
        let answer = |request: Request<Incoming>| {
            let answered = answer(Herald::of(&request));
            async move {
                let body = Bytes::from_static(answered.await.as_bytes());
                Ok::<_, Infallible>(Response::new(ResponseBody::Own(Some(body))))
            }
        };
        let mut heard = String::new();
        let (_, written, read) = tokio::join!(
            serve::http1("a test", &HttpLimits::DEFAULT, server, answer, pending()),
            writer.write_all(said.as_bytes()),
            reader.read_to_string(&mut heard)
        );
        written.unwrap();
        read.unwrap();
        heard
    }

    fn hint(herald: &Herald, link: &'static str) {
        let headers = [("link", link), ("connection", "x-mine"), ("x-mine", "1"), ("content-length", "9")];
        let headers = headers.map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap()));
        herald.tell(StatusCode::EARLY_HINTS, &headers.into_iter().collect());
    }

    #[tokio::test]
    async fn what_is_said_ahead_comes_before_its_own_answer_and_after_the_one_before() {
        let (asked, first) = (AtomicU32::new(0), Mutex::new(None));
        let heard = heard(
            "GET /1 HTTP/1.1\r\nhost: a\r\n\r\nGET /2 HTTP/1.1\r\nhost: a\r\n\r\nGET /3 HTTP/1.0\r\nhost: a\r\n\r\n",
            |herald| {
                let (number, first) = (asked.fetch_add(1, Ordering::Relaxed), &first);
                async move {
                    let Some(herald) = herald else { return "three" };
                    hint(&herald, "</a>");
                    // From elsewhere, and while nothing else happens.
                    let later = herald.clone();
                    let told = tokio::spawn(async move {
                        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
                        hint(&later, "</b>");
                    });
                    told.await.unwrap();
                    // That it has an answer is known by now of the first one.
                    if let Some(first) = first.lock().unwrap().replace(herald) {
                        hint(&first, "</late>");
                    }
                    tokio::time::sleep(std::time::Duration::from_millis(20)).await;
                    ["one", "two"][number as usize]
                }
            },
        )
        .await;
        let ahead =
            "HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: </b>\r\n\r\n";
        let answers =
            ["one", "two"].map(|body| format!("{ahead}HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\n{body}"));
        assert_eq!(heard, answers.concat() + "HTTP/1.0 200 OK\r\ncontent-length: 5\r\n\r\nthree");
    }

    #[tokio::test]
    async fn a_flood_of_it_is_cut_off_and_the_answer_comes() {
        let heard = heard("GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n", |herald| async move {
            (0..100_000).for_each(|_| hint(herald.as_ref().unwrap(), "</a>"));
            "one"
        })
        .await;
        let hint = "HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\n";
        let answer = "HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 3\r\n\r\none";
        assert_eq!(heard, hint.repeat(MOST / hint.len()) + answer);
    }
}
