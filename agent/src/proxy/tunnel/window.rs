//! How much the streams of a tunnel may have under way.
//!
//! A reader that takes nothing holds what its stream's window allows, and all that is held together comes off the
//! connection's window. So the more streams are open the less each of them gets: whatever their readers do, some of the
//! connection's window is left for the next one, and what a tunnel can hold in memory has a bound.

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
}

impl StreamWindow {
    /// As the connection begins.
    pub(super) fn new() -> Self {
        Self { told: STREAM_WINDOW }
    }

    /// Has the peer told of another window if that is due with so many streams; true if it will be. Telling fails while
    /// the peer has not acknowledged what it was told before, and is tried again.
    pub(super) fn adjust<E>(&mut self, streams: usize, tell: impl FnOnce(u32) -> Result<(), E>) -> bool {
        let wanted = self.wanted(streams);
        let is_told = wanted != self.told && tell(wanted).is_ok();
        if is_told {
            self.told = wanted;
        }
        is_told
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
    use super::super::server::MAX_STREAMS;
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
        assert!(!window.adjust(8, |_| Err(())));
        assert!(window.adjust(8, |size| if size == 2 * 1024 * 1024 { Ok(()) } else { Err(size) }));
        assert!(!window.adjust(8, |_| Ok::<(), ()>(())));
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
