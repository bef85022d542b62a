//! How much the streams of a tunnel may have under way.
//!
//! A reader that takes nothing holds what its stream's window allows, and all that is held together comes off the
//! connection's window. So the more streams are open the less each of them gets: whatever their readers do, some of the
//! connection's window is left for the next one, and what a tunnel can hold in memory has a bound.

use std::task::Context;

use super::health::Health;

/// What all streams of a connection may have under way together.
pub(super) const CONNECTION_WINDOW: u32 = 64 * 1024 * 1024;

/// What one stream may have under way while there are few of them. It fills 10 Gbit/s for three milliseconds.
pub(super) const STREAM_WINDOW: u32 = 4 * 1024 * 1024;

/// The least, however many there are: the default of HTTP/2 and a byte.
const LEAST: u32 = 64 * 1024;

/// What the streams that are open share. Those that had more when they were fewer may hold that still, hence the room
/// up to the connection's window; see the test.
const SHARED: u32 = 16 * 1024 * 1024;

/// The window that a connection's new streams get, and the open ones from now on.
#[derive(Debug)]
pub(super) struct StreamWindow {
    told: u32,
    /// It is less than before, which the peer has not acknowledged yet.
    is_less: bool,
}

/// What is due once the peer was told of a window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Told {
    Nothing,
    /// To send it.
    Window,
    /// Also to tell of room: the windows of all streams have become smaller.
    Smaller,
}

impl StreamWindow {
    /// As the connection begins.
    pub(super) fn new() -> Self {
        Self { told: STREAM_WINDOW, is_less: false }
    }

    /// Follows the number of streams. To be called after each poll of the connection, by the task that polls it.
    pub(super) fn follow<E>(
        &mut self,
        cx: &mut Context<'_>,
        health: &Health,
        tell: impl FnOnce(u32) -> Result<(), E>,
    ) {
        match self.adjust(health.streams(), tell) {
            Told::Nothing => return,
            Told::Window => {}
            Told::Smaller => health.tell_of_room(),
        }
        cx.waker().wake_by_ref();
    }

    /// Has the peer told of another window if that is due with so many streams. Telling fails while the peer has not
    /// acknowledged what it was told before, and is tried again. After a smaller window it is told in any case: that this
    /// can be done is how the acknowledgement shows.
    fn adjust<E>(&mut self, streams: usize, tell: impl FnOnce(u32) -> Result<(), E>) -> Told {
        let wanted = self.wanted(streams);
        if wanted == self.told && !self.is_less || tell(wanted).is_err() {
            return Told::Nothing;
        }
        let was_less = std::mem::replace(&mut self.is_less, wanted < self.told);
        self.told = wanted;
        if was_less { Told::Smaller } else { Told::Window }
    }

    fn wanted(&self, streams: usize) -> u32 {
        // Not back and forth with every stream that comes and goes.
        let less = fair(streams).min(self.told);
        if fair(streams * 2) > self.told { fair(streams * 2) } else { less }
    }
}

fn fair(streams: usize) -> u32 {
    let streams = u32::try_from(streams.next_power_of_two()).unwrap_or(u32::MAX);
    (SHARED / streams.max(1)).clamp(LEAST, STREAM_WINDOW)
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;
    use std::time::Duration;

    use bytes::Bytes;
    use h2::{RecvStream, SendStream};
    use tokio::time::timeout;

    use super::super::server::MAX_STREAMS;
    use super::super::stream::Ends;
    use super::super::{client, server};
    use super::*;

    #[test]
    fn the_window_follows_the_number_of_streams() {
        let mut window = StreamWindow::new();
        let mut check = |streams: usize, kib: u32| {
            window.adjust(streams, |_| Ok::<(), ()>(()));
            assert_eq!(window.told / 1024, kib, "{streams} streams");
        };
        check(0, 4096);
        check(4, 4096);
        check(5, 2048);
        check(4, 2048);
        check(3, 2048);
        check(2, 4096);
        check(128, 128);
        check(129, 64);
        check(1000, 64);
        check(65, 64);
        check(64, 128);
        check(0, 4096);
    }

    #[test]
    fn what_could_not_be_told_is_told_later() {
        let mut window = StreamWindow::new();
        assert_eq!(window.adjust(8, |_| Err(())), Told::Nothing);
        assert_eq!(
            window.adjust(8, |size| if size == 2 * 1024 * 1024 { Ok(()) } else { Err(size) }),
            Told::Window
        );
        // Until it is acknowledged.
        assert_eq!(window.adjust(8, |_| Err(())), Told::Nothing);
        assert_eq!(window.adjust(8, |_| Ok::<(), ()>(())), Told::Smaller);
        assert_eq!(window.adjust(8, |_| Ok::<(), ()>(())), Told::Nothing);
        // Nothing is short of a larger one.
        assert_eq!(window.adjust(1, |_| Ok::<(), ()>(())), Told::Window);
        assert_eq!(window.adjust(1, |_| Ok::<(), ()>(())), Told::Nothing);
    }

    #[tokio::test]
    async fn a_stream_that_has_been_used_goes_on_when_windows_become_smaller() {
        let (near, far) = tokio::io::duplex(1024 * 1024);
        let (client, server) =
            tokio::join!(client::settings().handshake(near), server::settings().handshake::<_, Bytes>(far));
        let ((mut requests, mut client), mut server) = (client.unwrap(), server.unwrap());
        let mut pings = client.ping_pong().unwrap();
        tokio::spawn(client);
        let request = http::Request::connect("10.77.2.2:7000").body(()).unwrap();
        let (response, mut send) = requests.send_request(request, false).unwrap();
        let (request, mut respond) = server.accept().await.unwrap().unwrap();
        let back = respond.send_response(http::Response::new(()), false).unwrap();
        let (health, mut window) = (Health::new(), StreamWindow::new());
        let mut ends = Ends::new(back, request.into_body(), health.enter());
        let followed = health.clone();
        tokio::spawn(poll_fn(move |cx| {
            let polled = server.poll_closed(cx);
            window.follow(cx, &followed, |size| server.set_initial_window_size(size));
            polled
        }));
        response.await.unwrap();

        // So little that the other side need not be told of room for more, and more than the least window.
        pass(&mut send, &mut ends.recv, STREAM_WINDOW as usize / 4).await;
        let others: Vec<_> = (0..200).map(|_| health.enter()).collect();
        // After these the smaller window is known on both sides, and what follows from it.
        for _ in 0..4 {
            pings.ping(h2::Ping::opaque()).await.unwrap();
        }
        let goes_on = pass(&mut send, &mut ends.recv, 2 * LEAST as usize);
        timeout(Duration::from_secs(10), goes_on).await.expect("there is room");
        drop(others);
    }

    /// Sends so many bytes, which are taken as they come.
    async fn pass(send: &mut SendStream<Bytes>, recv: &mut RecvStream, len: usize) {
        let sent = async {
            let mut left = len;
            while left > 0 {
                send.reserve_capacity(left);
                let room = poll_fn(|cx| send.poll_capacity(cx)).await.unwrap().unwrap();
                let n = room.min(left);
                send.send_data(vec![7; n].into(), false).unwrap();
                left -= n;
            }
        };
        let heard = async {
            let mut left = len;
            while left > 0 {
                let n = recv.data().await.unwrap().unwrap().len();
                recv.flow_control().release_capacity(n).unwrap();
                left -= n;
            }
        };
        tokio::join!(sent, heard);
    }

    /// Each stream holds what it was allowed when it opened, as if no reader ever took anything.
    #[test]
    fn streams_that_hold_all_they_may_leave_room_for_the_next() {
        let mut window = StreamWindow::new();
        let mut held = 0;
        for streams in 1..=MAX_STREAMS as usize {
            window.adjust(streams, |_| Ok::<(), ()>(()));
            held += window.told;
        }
        assert!(held < CONNECTION_WINDOW, "{held} bytes");
    }
}
