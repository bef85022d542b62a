//! How large heads may be, how long they may take to come and how many requests there may be at a time.

use std::time::Duration;

/// What the user may set of it, the same on the client's side as on the server's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HttpLimits {
    /// Bytes of a head in HTTP/1, its first line among them; and of trailers.
    pub http1_head: usize,
    /// Headers in one head in HTTP/1.
    pub http1_headers: usize,
    /// How long the head of a request may take from its first byte, in HTTP/1.
    pub http1_head_time: Duration,
    /// Bytes of a head in HTTP/2, as RFC 9113 counts them (section 6.5.2).
    pub http2_head: u32,
    /// Requests at a time on one HTTP/2 connection of a client.
    pub http2_streams: u32,
}

/// Bytes of an HTTP/1 connection that are held at a time; more where a head may have more.
const BUFFERED: usize = 128 * 1024;

impl HttpLimits {
    /// What holds unless the user sets something else.
    pub const DEFAULT: Self = Self {
        http1_head: 128 * 1024,
        http1_headers: 128,
        http1_head_time: Duration::from_secs(30),
        http2_head: 64 * 1024,
        http2_streams: 256,
    };

    /// Bytes of an HTTP/1 connection that are held at a time, a head as a whole among them.
    pub(super) fn http1_buffered(&self) -> usize {
        self.http1_head.max(BUFFERED)
    }
}
