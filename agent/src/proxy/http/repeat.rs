//! Bodies of requests that may have to be sent once more, because the connection that they were sent on turns out to have gone: what a
//! client has said so far is kept for as long as there is no answer, if it is little.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;

use super::body::BodyError;

/// Bytes of one body that are kept.
const MOST: usize = 64 * 1024;

/// What a client sends, with what it has sent so far kept for a [`Repeat`].
#[derive(Debug)]
pub(super) struct Watched(Arc<Mutex<State>>);

/// Begins the body anew, as long as all that was sent of it is known.
#[derive(Debug)]
pub(super) struct Repeat(Arc<Mutex<State>>);

/// A body that was begun anew: what was sent before, and then what comes.
#[derive(Debug)]
pub(super) struct Resumed {
    pub(super) said: VecDeque<Bytes>,
    pub(super) rest: Incoming,
}

#[derive(Debug)]
struct State {
    /// None once it is somebody else's to send.
    source: Option<Incoming>,
    said: VecDeque<Bytes>,
    /// Bytes that may still be kept; None once something was not.
    room: Option<usize>,
}

impl Watched {
    pub(super) fn new(source: Incoming) -> (Self, Repeat) {
        let state = State { source: Some(source), said: VecDeque::new(), room: Some(MOST) };
        let state = Arc::new(Mutex::new(state));
        (Self(state.clone()), Repeat(state))
    }

    pub(super) fn poll_frame(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let mut state = lock(&self.0);
        // Whoever got this far with it must not take it for the whole.
        let Some(source) = &mut state.source else { return Poll::Ready(Some(Err(BodyError::Repeated))) };
        let frame = ready!(Pin::new(source).poll_frame(cx));
        match &frame {
            Some(Ok(frame)) => state.keep(frame.data_ref()),
            Some(Err(_)) => state.keep(None),
            None => {}
        }
        Poll::Ready(frame.map(|frame| frame.map_err(BodyError::from)))
    }

    pub(super) fn is_end_stream(&self) -> bool {
        lock(&self.0).source.as_ref().is_some_and(Incoming::is_end_stream)
    }

    pub(super) fn size_hint(&self) -> SizeHint {
        lock(&self.0).source.as_ref().map(Incoming::size_hint).unwrap_or_default()
    }
}

impl State {
    /// Keeps what was said, where that is data and there is room for it; else there is no more to keep anything for.
    fn keep(&mut self, said: Option<&Bytes>) {
        let room = self.room.zip(said).and_then(|(room, said)| room.checked_sub(said.len()));
        self.room = room;
        match said.filter(|_| room.is_some()) {
            Some(said) => self.said.push_back(said.clone()),
            None => self.said = VecDeque::new(),
        }
    }
}

impl Repeat {
    /// The body from its beginning. Whoever has sent it so far sends no more of it.
    pub(super) fn begin(self) -> Option<Resumed> {
        let mut state = lock(&self.0);
        state.room?;
        Some(Resumed { rest: state.source.take()?, said: std::mem::take(&mut state.said) })
    }
}

impl Drop for Repeat {
    /// There is an answer, or there will be none.
    fn drop(&mut self) {
        lock(&self.0).keep(None);
    }
}

impl Resumed {
    pub(super) fn is_end_stream(&self) -> bool {
        self.said.is_empty() && self.rest.is_end_stream()
    }

    pub(super) fn size_hint(&self) -> SizeHint {
        let said: u64 = self.said.iter().map(|said| said.len() as u64).sum();
        let rest = self.rest.size_hint();
        let mut whole = SizeHint::new();
        whole.set_lower(rest.lower() + said);
        if let Some(upper) = rest.upper() {
            whole.set_upper(upper + said);
        }
        whole
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}
