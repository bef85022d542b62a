//! What a client speaks, by its first bytes. They are looked at and left where they are, so that whoever carries the
//! connection on finds it as it was made.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use h2::RecvStream;
use socket2::SockRef;
use tokio::io::Interest;
use tokio::net::TcpStream;

/// What the first bytes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Speech {
    /// A request line of HTTP/1.0 or 1.1.
    Http1,
    /// The preface of HTTP/2 (RFC 9113, section 3.4).
    Http2,
    /// Anything else, TLS included; also nothing at all where the server is to speak first.
    Opaque,
    /// Nothing was said in time.
    Silence,
}

/// How long a client may take to say something before it counts as one that waits for the server.
const SERVER_FIRST: Duration = Duration::from_millis(50);

/// The most that is looked at: a TLS record, and a longer request line than servers take.
const LONGEST_LOOK: usize = 17 * 1024;

/// How long a client of TLS may take to say whom it wants.
const HELLO_LIMIT: Duration = Duration::from_secs(10);

/// Bytes looked at first: request lines are seldom longer.
const FIRST_LOOK: usize = 512;

/// How long it is remembered that a destination's clients wait for it to speak.
const REMEMBERED: Duration = Duration::from_secs(60);

/// Destinations that are remembered.
const MOST_REMEMBERED: usize = 1024;

/// The destinations whose clients said nothing at first: the next ones are not waited for.
#[derive(Debug, Default)]
pub(super) struct ServersFirst(Mutex<HashMap<SocketAddr, Instant>>);

impl ServersFirst {
    /// How long a client of this destination is waited for.
    pub(super) fn limit(&self, destination: SocketAddr) -> Duration {
        let known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let is_known = known.get(&destination).is_some_and(|since| since.elapsed() < REMEMBERED);
        if is_known { Duration::ZERO } else { SERVER_FIRST }
    }

    /// A client of this destination has said nothing.
    pub(super) fn note(&self, destination: SocketAddr) {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() >= MOST_REMEMBERED {
            known.retain(|_, since| since.elapsed() < REMEMBERED);
        }
        if known.len() < MOST_REMEMBERED {
            known.entry(destination).or_insert_with(Instant::now);
        }
    }

    /// One has said something first: another server has the address, or that client was slow.
    pub(super) fn forget(&self, destination: SocketAddr) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&destination);
    }
}

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Waits until what the client says can be told, and hands the connection back. A `limit` is for clients that may wait for the
/// server to speak; with none left, only what has come already is looked at.
pub(super) async fn detect(client: TcpStream, limit: Option<Duration>) -> io::Result<(Speech, TcpStream)> {
    let told = match limit {
        None => Some(look(&client, judge).await),
        // More often than not the first bytes come with the connection.
        Some(Duration::ZERO) => return Ok((glance(&client).unwrap_or(Speech::Silence), client)),
        Some(limit) => tokio::time::timeout(limit, look(&client, judge)).await.ok(),
    };
    match told {
        Some(speech) => Ok((speech.unwrap_or(Speech::Opaque), client)),
        None => Ok((Speech::Silence, unseen(client)?)),
    }
}

/// Waits until it can be told what a client and its server speak, by what the one says or by what the other says first; hands both back.
/// Silence: the server has begun, and is none of HTTP.
pub(super) async fn between(
    client: TcpStream,
    server: TcpStream,
) -> io::Result<(Speech, TcpStream, TcpStream)> {
    let told = tokio::select! {
        biased;
        told = look(&client, judge) => Some(told.unwrap_or(Speech::Opaque)),
        () = speaks_first(&server) => None,
    };
    match told {
        Some(speech) => Ok((speech, client, unseen(server)?)),
        None => Ok((Speech::Silence, unseen(client)?, unseen(server)?)),
    }
}

/// Waits until a server has said something before its client that none of HTTP says, however long that takes.
async fn speaks_first(server: &TcpStream) {
    if look(server, may_be_http_server).await != Some(false) {
        // Of its end its client hears when that has said something.
        std::future::pending().await
    }
}

/// Whether a server of HTTP says this before its client says anything: HTTP/2 begins with SETTINGS (RFC 9113, section 3.4), and some tell a
/// client of HTTP/1 that it is too slow. Nothing as long as that cannot be told.
fn may_be_http_server(bytes: &[u8]) -> Option<bool> {
    const ANSWER: &[u8] = b"HTTP/";
    match bytes {
        [] => None,
        [0, ..] => {
            let has = |place: usize, value: u8| bytes.get(place).is_none_or(|byte| *byte == value);
            let is_settings = has(3, 4) && (5..9).all(|place| has(place, 0));
            if !is_settings || bytes.len() >= 9 { Some(is_settings) } else { None }
        }
        bytes if ANSWER.starts_with(bytes) && bytes.len() < ANSWER.len() => None,
        bytes => Some(bytes.starts_with(ANSWER)),
    }
}

/// The server that a client of TLS asks for (SNI, RFC 6066, section 3); none where it asks for none or speaks no TLS. One that
/// says nothing for so long is one that speaks none.
pub(super) async fn server_name(client: TcpStream) -> io::Result<(Option<String>, TcpStream)> {
    match tokio::time::timeout(HELLO_LIMIT, look(&client, asked_for)).await {
        Ok(name) => Ok((name.flatten(), client)),
        Err(_elapsed) => Ok((None, unseen(client)?)),
    }
}

/// The same of a client on a stream of a tunnel. The bytes of it that this was told by are still to be passed on and to be taken off the
/// stream's window.
pub(super) async fn between_frames(
    stream: &mut RecvStream,
    server: TcpStream,
) -> io::Result<(Speech, Bytes, TcpStream)> {
    let mut seen = BytesMut::new();
    let speech = tokio::select! {
        biased;
        speech = first_frames(stream, &mut seen) => speech,
        () = speaks_first(&server) => Speech::Silence,
    };
    Ok((speech, seen.freeze(), unseen(server)?))
}

async fn first_frames(stream: &mut RecvStream, seen: &mut BytesMut) -> Speech {
    loop {
        match judge(seen) {
            Some(speech) => return speech,
            None if seen.len() >= LONGEST_LOOK => return Speech::Opaque,
            None => {}
        }
        match stream.data().await {
            Some(Ok(bytes)) => seen.extend_from_slice(&bytes),
            // Whoever carries it on finds the same end.
            Some(Err(_)) | None => return Speech::Opaque,
        }
    }
}

/// Some bytes may have been seen, and tokio thinks that they were taken: only a socket that is registered anew tells of them
/// again.
fn unseen(client: TcpStream) -> io::Result<TcpStream> {
    TcpStream::from_std(client.into_std()?)
}

/// What can be told by what has come already, of which tokio is not asked.
fn glance(client: &TcpStream) -> Option<Speech> {
    let mut seen = [0; FIRST_LOOK];
    let n = peek(client, &mut seen).unwrap_or_default();
    judge(&seen[..n])
}

/// Waits for as many bytes as it takes to tell; nothing where the client ends before, or goes on for too long.
async fn look<T>(client: &TcpStream, tell: impl Fn(&[u8]) -> Option<T>) -> Option<T> {
    let mut seen = vec![0; FIRST_LOOK];
    let mut known = peek(client, &mut seen).unwrap_or_default();
    let mut is_over = false;
    loop {
        if known == seen.len() && known < LONGEST_LOOK {
            // There may be more than there was room for.
            seen.resize(LONGEST_LOOK, 0);
            known = peek(client, &mut seen).unwrap_or(known);
        }
        if let Some(told) = tell(&seen[..known]) {
            return Some(told);
        }
        if is_over || known == LONGEST_LOOK {
            return None;
        }
        (known, is_over) = more(client, &mut seen, known).await?;
    }
}

/// Waits for more bytes than are known, or for the end of them; how many there are then, and whether there will be no more.
async fn more(client: &TcpStream, seen: &mut [u8], known: usize) -> Option<(usize, bool)> {
    loop {
        let ready = client.ready(Interest::READABLE).await.ok()?;
        let peeked = client.try_io(Interest::READABLE, || {
            let n = peek(client, seen)?;
            // What is left unread makes the socket readable for ever: only more of it is news.
            let is_over = n == 0 || ready.is_read_closed();
            if n > known || is_over { Ok((n, is_over)) } else { Err(io::ErrorKind::WouldBlock.into()) }
        });
        match peeked {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            peeked => return peeked.ok(),
        }
    }
}

fn peek(client: &TcpStream, seen: &mut [u8]) -> io::Result<usize> {
    SockRef::from(client).peek(uninit(seen))
}

/// The server name of a ClientHello, as soon as that is whole; that there is none, as soon as it cannot be one.
pub(super) fn asked_for(bytes: &[u8]) -> Option<Option<String>> {
    let mut acceptor = rustls::server::Acceptor::default();
    let mut rest = bytes;
    while !rest.is_empty() {
        if acceptor.read_tls(&mut rest).is_err() {
            return Some(None);
        }
        match acceptor.accept() {
            Ok(None) => {}
            Ok(Some(accepted)) => return Some(accepted.client_hello().server_name().map(str::to_owned)),
            Err(_no_hello) => return Some(None),
        }
    }
    None
}

/// What the bytes are the beginning of; nothing as long as that cannot be told.
pub(super) fn judge(bytes: &[u8]) -> Option<Speech> {
    if bytes.starts_with(PREFACE) {
        return Some(Speech::Http2);
    }
    if PREFACE.starts_with(bytes) {
        return None;
    }
    let line = bytes.split(|byte| *byte == b'\n').next().unwrap_or_default();
    let is_whole = line.len() < bytes.len();
    // RFC 9112, section 2.2: an empty line before the request line is to be passed over.
    if matches!(line, b"" | b"\r") {
        return if is_whole { judge(&bytes[line.len() + 1..]) } else { None };
    }
    let mut parts = line.splitn(3, |byte| *byte == b' ');
    let (method, target, version) = (parts.next().unwrap_or_default(), parts.next(), parts.next());
    let is_token =
        !method.is_empty() && method.len() <= LONGEST_METHOD && method.iter().all(|byte| is_token(*byte));
    let is_target =
        target.is_none_or(|target| target.iter().all(|byte| byte.is_ascii_graphic() || *byte >= 0x80));
    let is_version = version.is_none_or(|version| {
        let version = version.strip_suffix(b"\r").unwrap_or(version);
        let fits = |whole: &[u8]| version == whole || !is_whole && whole.starts_with(version);
        fits(b"HTTP/1.1") || fits(b"HTTP/1.0")
    });
    if !(is_token && is_target && is_version) {
        return Some(Speech::Opaque);
    }
    match (is_whole, target, version) {
        (true, Some(target), Some(_)) if !target.is_empty() => Some(Speech::Http1),
        (true, ..) => Some(Speech::Opaque),
        (false, ..) => None,
    }
}

/// Longer than any registered method; WebDAV's `UPDATEREDIRECTREF` has 17.
const LONGEST_METHOD: usize = 24;

/// RFC 9110, section 5.6.2. Methods in lower case exist by the letter alone, and text protocols begin with them.
fn is_token(byte: u8) -> bool {
    byte.is_ascii_uppercase() || byte.is_ascii_digit() || matches!(byte, b'-' | b'_')
}

fn uninit(bytes: &mut [u8]) -> &mut [std::mem::MaybeUninit<u8>] {
    // SAFETY: initialised bytes are valid as uninitialised ones, and `peek` writes nothing but initialised bytes.
    unsafe { &mut *(std::ptr::from_mut(bytes) as *mut [std::mem::MaybeUninit<u8>]) }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    #[test]
    fn first_bytes_and_what_speaks_so() {
        use Speech::{Http1, Http2, Opaque};
        let check = |bytes: &[u8], expected: Option<Speech>| {
            assert_eq!(judge(bytes), expected, "{:?}", String::from_utf8_lossy(bytes));
        };
        check(b"", None);
        check(b"G", None);
        check(b"GET", None);
        check(b"GET / HTT", None);
        check(b"GET / HTTP/1.1", None);
        check(b"GET / HTTP/1.1\r", None);
        check(b"GET / HTTP/1.1\r\n", Some(Http1));
        check(b"GET / HTTP/1.0\n", Some(Http1));
        check(b"\r\n\r\nPOST /a?b=c HTTP/1.1\r\nHost: x", Some(Http1));
        check(b"OPTIONS * HTTP/1.1\r\n", Some(Http1));
        check(b"CONNECT a:1 HTTP/1.1\r\n", Some(Http1));
        check(b"M-SEARCH * HTTP/1.1\r\n", Some(Http1));
        check(b"GET /\xc3\xa4 HTTP/1.1\r\n", Some(Http1));
        check(b"GET / HTTP/2.0\r\n", Some(Opaque));
        check(b"GET / HTTP/1.12\r\n", Some(Opaque));
        check(b"GET /\r\n", Some(Opaque));
        check(b"GET  HTTP/1.1\r\n", Some(Opaque));
        check(b"get / HTTP/1.1\r\n", Some(Opaque));
        check(b"EHLO example.org\r\n", Some(Opaque));
        check(b"*1\r\n$4\r\nPING\r\n", Some(Opaque));
        check(b"\x16\x03\x01\x02\x00\x01\x00", Some(Opaque));
        check(b"\0\0\0\x08\x04\xd2\x16\x2f", Some(Opaque));
        check(b"SSH-2.0-OpenSSH_9.2\r\n", Some(Opaque));
        check(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", Some(Http2));
        check(b"PRI * HTTP/2.0\r\n\r\nSM", None);
        check(b"PRI * HTTP/2.0\r\n\r\nXX\r\n\r\n", Some(Opaque));
        check(b"PRI", None);
    }

    #[test]
    fn the_server_that_a_client_of_tls_asks_for() {
        let hello = |name: &str| {
            let config = rustls::ClientConfig::builder_with_provider(Arc::new(
                rustls::crypto::aws_lc_rs::default_provider(),
            ))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(rustls::RootCertStore::empty())
            .with_no_client_auth();
            let name = name.to_owned().try_into().unwrap();
            let mut client = rustls::ClientConnection::new(Arc::new(config), name).unwrap();
            let mut bytes = Vec::new();
            client.write_tls(&mut bytes).unwrap();
            bytes
        };
        let named = hello("pay.shop.test");
        assert_eq!(asked_for(&named), Some(Some("pay.shop.test".into())));
        assert_eq!(asked_for(&hello("10.0.0.1")), Some(None));
        for end in 0..named.len() {
            assert_eq!(asked_for(&named[..end]), None, "{end} bytes of {}", named.len());
        }
        assert_eq!(asked_for(b"GET / HTTP/1.1\r\n"), Some(None));
    }

    #[test]
    fn what_servers_say_before_their_clients() {
        let check = |bytes: &[u8], expected: Option<bool>| {
            assert_eq!(may_be_http_server(bytes), expected, "{:?}", String::from_utf8_lossy(bytes));
        };
        check(b"", None);
        check(b"220 mail.example.org ESMTP\r\n", Some(false));
        check(b"S", Some(false));
        check(b"hi\n", Some(false));
        check(b"J\0\0\0\n8.0.36\0", Some(false));
        check(b"HTT", None);
        check(b"HTTP/1.1 408 Request Timeout\r\n", Some(true));
        check(b"HTML", Some(false));
        // SETTINGS with two of them, and what only begins like it.
        check(b"\0\0\x0c\x04\0\0\0\0\0\0\x03", Some(true));
        check(b"\0\0\x0c\x04\0", None);
        check(b"\0\0", None);
        check(b"\0\0\x0c\x06\0", Some(false));
        check(b"\0\0\x0c\x04\0\0\0\0\x01", Some(false));
    }

    /// Whoever of the two tells what it is, all that either says is still there to be read.
    #[tokio::test]
    async fn what_is_told_between_two_is_left_to_be_read() {
        async fn pair() -> (TcpStream, TcpStream) {
            let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
            let far = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
            (listener.accept().await.unwrap().0, far)
        }
        const SETTINGS: &[u8] = b"\0\0\0\x04\0\0\0\0\0";
        for (said, answered, expected) in [
            (&b""[..], &b"220 mail\r\n"[..], Some(Speech::Silence)),
            (b"GET", b"220 mail\r\n", Some(Speech::Silence)),
            (b"EHLO mail\r\n", b"", Some(Speech::Opaque)),
            (b"GET / HTTP/1.1\r\n", b"", Some(Speech::Http1)),
            (PREFACE, SETTINGS, Some(Speech::Http2)),
            (b"", SETTINGS, None),
            (b"", b"HTTP/1.1 408 Request Timeout\r\n\r\n", None),
            (b"", b"", None),
        ] {
            let ((client, mut its_end), (server, mut its_server)) = (pair().await, pair().await);
            let telling = tokio::spawn(between(client, server));
            // Before anything is said it is waited for.
            tokio::time::sleep(Duration::from_millis(5)).await;
            its_server.write_all(answered).await.unwrap();
            tokio::time::sleep(Duration::from_millis(5)).await;
            its_end.write_all(said).await.unwrap();
            // What is never told is not waited for for long.
            let limit = expected.map_or(Duration::from_millis(300), |_| Duration::from_secs(5));
            let told = tokio::time::timeout(limit, telling).await;
            let Some(expected) = expected else {
                assert!(told.is_err(), "{answered:?}");
                continue;
            };
            let (speech, mut client, mut server) = told.unwrap().unwrap().unwrap();
            assert_eq!(speech, expected, "{said:?} {answered:?}");
            for (socket, bytes) in [(&mut client, said), (&mut server, answered)] {
                let mut read = vec![0; bytes.len()];
                let reading = socket.read_exact(&mut read);
                tokio::time::timeout(Duration::from_secs(5), reading).await.unwrap().unwrap();
                assert_eq!(read, bytes);
            }
        }
    }

    /// However long what a client says is, and in whatever pieces it comes, it is told, and still there to be read.
    #[tokio::test]
    async fn what_is_told_is_left_to_be_read() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        for length in [20, 511, 512, 513, 3000, 16_000] {
            for pieces in [1, 2, 7] {
                let target = "a".repeat(length - "GET / HTTP/1.1\r\n".len());
                let line = format!("GET /{target} HTTP/1.1\r\n");
                let mut client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
                let (server, _) = listener.accept().await.unwrap();
                let said = line.clone().into_bytes();
                let speaking = tokio::spawn(async move {
                    for piece in said.chunks(said.len().div_ceil(pieces)) {
                        client.write_all(piece).await.unwrap();
                        tokio::time::sleep(Duration::from_millis(5)).await;
                    }
                    client
                });
                // Once before anything is said, once when all of it may have been.
                if pieces == 2 {
                    tokio::time::sleep(Duration::from_millis(30)).await;
                }
                let (speech, mut server) = detect(server, Some(Duration::from_secs(10))).await.unwrap();
                assert_eq!(speech, Speech::Http1, "{length} bytes in {pieces} pieces");
                let mut read = vec![0; line.len()];
                server.read_exact(&mut read).await.unwrap();
                assert_eq!(read, line.as_bytes());
                drop(speaking.await.unwrap());
            }
        }
    }

    #[tokio::test]
    async fn a_client_that_says_half_a_line_and_waits_is_heard_later() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (server, _) = listener.accept().await.unwrap();
        client.write_all(b"GE").await.unwrap();
        let (speech, mut server) = detect(server, Some(Duration::from_millis(20))).await.unwrap();
        assert_eq!(speech, Speech::Silence);
        let mut read = [0; 2];
        tokio::time::timeout(Duration::from_secs(5), server.read_exact(&mut read)).await.unwrap().unwrap();
        assert_eq!(&read, b"GE");
        drop(client);
    }

    proptest! {
        /// What was told once is not told otherwise when more comes, and a request line is found however it comes.
        #[test]
        fn more_bytes_change_nothing(bytes in prop::collection::vec(any::<u8>(), 0..64), at in 0usize..64) {
            let at = at.min(bytes.len());
            if let Some(speech) = judge(&bytes[..at]) {
                prop_assert_eq!(judge(&bytes), Some(speech));
            }
        }

        #[test]
        fn request_lines_are_found(method in "[A-Z-]{1,10}", target in "/[!-~]{0,40}", minor in "[01]", at in 0usize..64) {
            let line = format!("{method} {target} HTTP/1.{minor}\r\n");
            prop_assert_eq!(judge(line.as_bytes()), Some(Speech::Http1));
            prop_assert_eq!(judge(&line.as_bytes()[..at.min(line.len() - 1)]), None);
        }
    }
}
