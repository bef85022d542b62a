//! Message bodies on their way through: passed on as they come, frame by frame, and counted.

use std::fmt;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::HeaderMap;
use http_body::{Body, Frame, SizeHint};
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, mpsc};

use super::exchange::Exchange;
use super::repeat::{Repeat, Resumed, Watched};
use crate::policy::jwt::Rules;
use crate::proxy::let_in::Held;

/// How long a client that waits for `100 Continue` is left to wait for it (RFC 9110, section 10.1.1).
const CONTINUE_AFTER: Duration = Duration::from_secs(1);

/// The body of a request on its way to an upstream.
#[derive(Debug)]
pub(super) struct RequestBody {
    inner: Inner,
    upload: Arc<Upload>,
    /// Its sender was asked for more and has none yet.
    is_awaited: bool,
    /// Others that get the same.
    copies: Vec<Copying>,
    held_back: Option<HeldBack>,
    /// Where it breaks off when policies do not let its request in any more.
    held: Option<Arc<Held>>,
    /// What its trailers must not say.
    tokens: Option<Arc<Rules>>,
}

#[derive(Debug)]
enum Inner {
    Empty,
    /// What a client sends.
    Client(Incoming),
    /// The same, as long as it may have to be sent once more.
    Watched(Watched),
    /// What it sends that is being sent once more.
    Resumed(Resumed),
    /// All that a client has sent, to be sent as often as it takes.
    Kept {
        data: Bytes,
        trailers: Option<HeaderMap>,
    },
    /// What another request's body has said.
    Copy(mpsc::UnboundedReceiver<Copied>),
}

/// A piece of a body for whoever gets a copy, and the room that it takes until that is passed on; None is its end.
type Copied = Option<(Bytes, OwnedSemaphorePermit)>;

/// A body broke off.
#[derive(Debug, thiserror::Error)]
pub(super) enum BodyError {
    /// Whoever sends it has failed.
    #[error(transparent)]
    Sender(#[from] hyper::Error),
    /// It is a copy that fell behind.
    #[error("the copy of a request's body fell behind")]
    Behind,
    /// It is being sent on another connection.
    #[error("the request is sent once more")]
    Repeated,
    /// Policies do not let its request in any more.
    #[error("policies do not let the request in any more")]
    Denied(#[source] h2::Error),
}

/// Bytes by which all copies of a worker thread may be behind together.
pub(super) const ROOM_FOR_COPIES: usize = 16 << 20;

/// What a piece that waits for its copy takes besides its bytes: many small ones are not for nothing.
const PIECE: usize = 256;

/// Where a copy gets what is said, and the room that there is for that.
#[derive(Debug)]
struct Copying {
    /// Bounded by `room`.
    pieces: mpsc::UnboundedSender<Copied>,
    room: Arc<Semaphore>,
}

/// A body whose client waits for `100 Continue`: our asking for the first byte is what tells it to go on.
struct HeldBack(Pin<Box<dyn Future<Output = ()> + Send>>);

/// Lets the client of a body that is held back go on.
pub(super) type GoOn = Arc<Notify>;

impl RequestBody {
    /// What comes from the client; `upload` is told of it.
    pub(super) fn new(inner: Incoming, upload: Arc<Upload>) -> Self {
        let inner = if inner.is_end_stream() { Inner::Empty } else { Inner::Client(inner) };
        Self { inner, upload, ..Self::empty() }
    }

    /// Nothing.
    pub(super) fn empty() -> Self {
        Self {
            inner: Inner::Empty,
            upload: Arc::default(),
            is_awaited: false,
            copies: Vec::new(),
            held_back: None,
            held: None,
            tokens: None,
        }
    }

    /// The same again, for another request. It is broken off when it falls behind, so that it never holds this one up.
    pub(super) fn copy(&mut self, room: &Arc<Semaphore>) -> Self {
        if self.is_end_stream() {
            return Self::empty();
        }
        let (copy, pieces) = mpsc::unbounded_channel();
        self.copies.push(Copying { pieces: copy, room: room.clone() });
        Self { inner: Inner::Copy(pieces), ..Self::empty() }
    }

    /// The same when all of it is there. For short ones.
    pub(super) async fn kept(self) -> Result<Self, BodyError> {
        let whole = self.collect().await?;
        let trailers = whole.trailers().cloned();
        Ok(Self { inner: Inner::Kept { data: whole.to_bytes(), trailers }, ..Self::empty() })
    }

    /// The same once more, where there is nothing of it that only the client has.
    pub(super) fn again(&self) -> Option<Self> {
        let inner = match &self.inner {
            Inner::Empty => Inner::Empty,
            Inner::Kept { data, trailers } => Inner::Kept { data: data.clone(), trailers: trailers.clone() },
            Inner::Client(_) | Inner::Watched(_) | Inner::Resumed(_) | Inner::Copy(_) => return None,
        };
        Some(Self { inner, held: self.held.clone(), tokens: self.tokens.clone(), ..Self::empty() })
    }

    /// It breaks off when its request is let in no more.
    pub(super) fn hold(&mut self, held: Arc<Held>) {
        self.held = Some(held);
    }

    /// Its trailers do not have what only tokens may say by these.
    pub(super) fn clear_trailers(&mut self, tokens: Arc<Rules>) {
        self.tokens = Some(tokens);
    }

    /// It is for another endpoint than the one that it was held to.
    pub(super) fn let_go(&mut self) {
        (self.held, self.tokens) = (None, None);
    }

    /// The same once more, should it have to be sent on another connection; also of what the client is still sending, as long as that is
    /// little and nobody gets a copy.
    pub(super) fn once_more(&mut self) -> Option<OnceMore> {
        match std::mem::replace(&mut self.inner, Inner::Empty) {
            Inner::Client(source) if self.copies.is_empty() => {
                let (watched, repeat) = Watched::new(source);
                self.inner = Inner::Watched(watched);
                let (upload, held, tokens) = (self.upload.clone(), self.held.clone(), self.tokens.clone());
                // It may have been waited for since before that.
                let is_awaited = true;
                Some(OnceMore::Repeat(repeat, Self { upload, is_awaited, held, tokens, ..Self::empty() }))
            }
            inner => {
                self.inner = inner;
                self.again().map(OnceMore::Whole)
            }
        }
    }

    /// Asks the client for nothing until it is told to go on, or has waited for long enough.
    pub(super) fn hold_back(&mut self) -> GoOn {
        let go_on = GoOn::default();
        let told = go_on.clone();
        self.held_back = Some(HeldBack(Box::pin(async move {
            // Whether it was told or not is one to it: servers that never say so exist.
            let _ = tokio::time::timeout(CONTINUE_AFTER, told.notified()).await;
        })));
        go_on
    }

    /// What is known of how it comes.
    pub(super) fn upload(&self) -> &Arc<Upload> {
        &self.upload
    }

    /// The next of what somebody else sends.
    fn poll_sender(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let frame = match &mut self.inner {
            Inner::Empty | Inner::Kept { .. } => Poll::Ready(None),
            Inner::Client(inner) => Pin::new(inner).poll_frame(cx).map_err(BodyError::from),
            Inner::Watched(watched) => watched.poll_frame(cx),
            Inner::Resumed(resumed) => Pin::new(&mut resumed.rest).poll_frame(cx).map_err(BodyError::from),
            Inner::Copy(pieces) => pieces.poll_recv(cx).map(|piece| match piece {
                Some(Some((bytes, _room))) => Some(Ok(Frame::data(bytes))),
                Some(None) => None,
                None => Some(Err(BodyError::Behind)),
            }),
        };
        if self.is_awaited != frame.is_pending() {
            self.is_awaited = frame.is_pending();
            self.upload.awaited(self.is_awaited);
        }
        frame
    }

    fn pass_on(&mut self, piece: Option<&Bytes>) {
        self.copies.retain(|copy| copy.pass_on(piece));
    }
}

impl Copying {
    /// False if it has fallen behind.
    fn pass_on(&self, piece: Option<&Bytes>) -> bool {
        let Some(piece) = piece else { return self.pieces.send(None).is_ok() };
        let taken = u32::try_from(piece.len() + PIECE).unwrap_or(u32::MAX);
        let room = self.room.clone().try_acquire_many_owned(taken);
        room.is_ok_and(|room| self.pieces.send(Some((piece.clone(), room))).is_ok())
    }
}

/// How the body of a request comes, for others than who sends it on.
#[derive(Debug, Default)]
pub(super) struct Upload {
    bytes: AtomicU64,
    awaited: Mutex<Awaited>,
}

/// Until when whoever has the request waited for its sender to say more.
#[derive(Clone, Copy, Debug, Default)]
enum Awaited {
    #[default]
    Never,
    StillIs,
    Until(Instant),
}

impl Upload {
    /// Bytes that have come so far.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// So many have come.
    pub(super) fn add(&self, bytes: u64) {
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Whether its sender is still to say more, and is waited for.
    pub(super) fn is_awaited(&self) -> bool {
        matches!(*self.state(), Awaited::StillIs)
    }

    /// For how long whoever was asked then has had all that there is of the request, and is the one to be waited for; None where it is the
    /// request's sender.
    pub(super) fn waited_behind(&self, asked: Instant) -> Option<Duration> {
        let since = match *self.state() {
            Awaited::Never => asked,
            Awaited::StillIs => return None,
            Awaited::Until(then) => then.max(asked),
        };
        Some(since.elapsed())
    }

    fn awaited(&self, is: bool) {
        *self.state() = if is { Awaited::StillIs } else { Awaited::Until(Instant::now()) };
    }

    fn state(&self) -> MutexGuard<'_, Awaited> {
        self.awaited.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A body that may be sent once more.
#[derive(Debug)]
pub(super) enum OnceMore {
    /// All of it is there.
    Whole(RequestBody),
    /// What the client has said so far is, and this is the body but for that.
    Repeat(Repeat, RequestBody),
}

impl OnceMore {
    /// The body from its beginning, unless the client has said too much of it since.
    pub(super) fn begin(self) -> Option<RequestBody> {
        match self {
            Self::Whole(body) => Some(body),
            Self::Repeat(repeat, body) => {
                Some(RequestBody { inner: Inner::Resumed(repeat.begin()?), ..body })
            }
        }
    }
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = self.get_mut();
        if this.held.as_ref().is_some_and(|held| held.poll_body(cx).is_ready()) {
            this.copies.clear();
            return Poll::Ready(Some(Err(BodyError::Denied(h2::Reason::CANCEL.into()))));
        }
        if let Some(HeldBack(told)) = &mut this.held_back {
            ready!(told.as_mut().poll(cx));
            this.held_back = None;
        }
        let mut frame = match &mut this.inner {
            Inner::Kept { data, .. } if !data.is_empty() => Some(Ok(Frame::data(std::mem::take(data)))),
            Inner::Kept { trailers, .. } => trailers.take().map(|trailers| Ok(Frame::trailers(trailers))),
            // It was counted when it was said.
            Inner::Resumed(Resumed { said, .. }) if !said.is_empty() => {
                return Poll::Ready(said.pop_front().map(|said| Ok(Frame::data(said))));
            }
            _ => ready!(this.poll_sender(cx)),
        };
        match &mut frame {
            Some(Ok(frame)) => {
                if let (Some(tokens), Some(trailers)) = (&this.tokens, frame.trailers_mut()) {
                    tokens.clear_headers(trailers);
                }
                if let Some(data) = frame.data_ref() {
                    this.upload.add(data.len() as u64);
                    this.pass_on(Some(data));
                }
                if this.is_end_stream() {
                    this.pass_on(None);
                }
            }
            Some(Err(_)) => this.copies.clear(),
            None => this.pass_on(None),
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        match &self.inner {
            Inner::Empty => true,
            Inner::Client(inner) => inner.is_end_stream(),
            Inner::Watched(watched) => watched.is_end_stream(),
            Inner::Resumed(resumed) => resumed.is_end_stream(),
            Inner::Kept { data, trailers } => data.is_empty() && trailers.is_none(),
            Inner::Copy(_) => false,
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.inner {
            Inner::Empty => SizeHint::with_exact(0),
            Inner::Client(inner) => inner.size_hint(),
            Inner::Watched(watched) => watched.size_hint(),
            Inner::Resumed(resumed) => resumed.size_hint(),
            Inner::Kept { data, .. } => SizeHint::with_exact(data.len() as u64),
            Inner::Copy(_) => SizeHint::default(),
        }
    }
}

impl fmt::Debug for HeldBack {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("HeldBack")
    }
}

/// An answer broke off.
#[derive(Debug, thiserror::Error)]
pub(super) enum AnswerError {
    /// Whoever sends it has failed.
    #[error(transparent)]
    Upstream(#[from] hyper::Error),
    /// The agent ends it, for this reason.
    #[error("{why}")]
    Ended {
        /// In a sentence.
        why: &'static str,
        /// What the client of HTTP/2 is told.
        source: h2::Error,
    },
}

/// The body of a response on its way to the client.
#[derive(Debug)]
pub(super) enum ResponseBody {
    /// What the agent says itself, if anything.
    Own(Option<Bytes>),
    /// What an upstream says, and who is told how it went.
    Upstream {
        /// The body as it comes.
        inner: Incoming,
        /// Told of bytes and of the end.
        exchange: Box<Exchange>,
    },
}

impl ResponseBody {
    /// What an upstream says. An answer without a body is over at once.
    pub(super) fn of(inner: Incoming, mut exchange: Box<Exchange>) -> Self {
        if inner.is_end_stream() {
            exchange.done();
            return Self::Own(None);
        }
        Self::Upstream { inner, exchange }
    }
}

impl Body for ResponseBody {
    type Data = Bytes;
    type Error = AnswerError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, AnswerError>>> {
        let this = self.get_mut();
        match this {
            Self::Own(bytes) => Poll::Ready(bytes.take().map(|bytes| Ok(Frame::data(bytes)))),
            Self::Upstream { inner, exchange } => {
                if exchange.poll_denied(cx).is_ready() || exchange.poll_overdue(cx).is_ready() {
                    let last = exchange.last();
                    // What the upstream has to say beyond that is for nobody.
                    *this = Self::Own(None);
                    return Poll::Ready(Some(last));
                }
                let frame = ready!(Pin::new(&mut *inner).poll_frame(cx));
                exchange.passes(frame.as_ref(), inner.is_end_stream());
                Poll::Ready(frame.map(|frame| frame.map_err(AnswerError::from)))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Own(bytes) => bytes.is_none(),
            Self::Upstream { inner, .. } => inner.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Own(bytes) => SizeHint::with_exact(bytes.as_ref().map_or(0, |bytes| bytes.len() as u64)),
            Self::Upstream { inner, .. } => inner.size_hint(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is sent there.
    fn body() -> (impl AsyncFn(Vec<u8>), RequestBody) {
        let (sender, pieces) = mpsc::unbounded_channel();
        let say = async move |said: Vec<u8>| {
            let room = Arc::new(Semaphore::new(1)).acquire_owned().await.unwrap();
            sender.send(Some((said.into(), room))).unwrap();
        };
        (say, RequestBody { inner: Inner::Copy(pieces), ..RequestBody::empty() })
    }

    #[tokio::test]
    async fn a_copy_that_is_not_read_is_broken_off_and_one_that_is_read_has_all() {
        const ROOM: usize = 256 << 10;
        let room = Arc::new(Semaphore::new(ROOM));
        // The other copy has room for one of them.
        let held = |piece| ROOM / (piece + PIECE) - 1;
        let (large, small) = (held(16 << 10), held(1));
        assert!(large == 14 && small == 1019);
        for (piece, pieces, expected) in
            [(16 << 10, large, large), (16 << 10, large + 1, large), (1, small, small), (1, small + 1, small)]
        {
            let (say, mut original) = body();
            let (mut read, mut stalled) = (original.copy(&room), original.copy(&room));
            let mut had = 0;
            for _ in 0..pieces {
                say(vec![b'.'; piece]).await;
                assert!(original.frame().await.unwrap().is_ok());
                had += read.frame().await.unwrap().unwrap().into_data().unwrap().len();
            }
            drop(say);
            assert_eq!(had, piece * pieces);
            let mut arrived = 0;
            while let Some(Ok(_)) = stalled.frame().await {
                arrived += 1;
                if arrived == pieces {
                    break;
                }
            }
            assert_eq!(arrived, expected, "of {pieces} pieces of {piece} bytes");
            drop((stalled, read, original));
            assert_eq!(room.available_permits(), ROOM);
        }
    }

    #[tokio::test]
    async fn time_in_which_the_sender_is_waited_for_is_not_the_endpoints() {
        let (say, mut body) = body();
        let (upload, asked) = (body.upload().clone(), Instant::now());
        let waited = || upload.waited_behind(asked);
        tokio::time::sleep(Duration::from_millis(20)).await;
        assert!(waited() >= Some(Duration::from_millis(20)), "nobody has asked for more: {:?}", waited());
        {
            let mut frame = std::pin::pin!(body.frame());
            assert!(futures_util::poll!(frame.as_mut()).is_pending());
            assert!(upload.is_awaited() && waited().is_none());
            tokio::time::sleep(Duration::from_millis(20)).await;
            say(b"more".to_vec()).await;
            assert!(frame.await.unwrap().is_ok());
        }
        assert!(!upload.is_awaited());
        assert!(waited().unwrap() + Duration::from_millis(40) <= asked.elapsed(), "{:?}", waited());
        assert_eq!(upload.bytes(), 4);
    }
}
