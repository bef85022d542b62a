//! Listens, and gives every connection a thread.

use std::io;
use std::net::{Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};

/// More connections at once than this are closed at the door.
const MOST_CONNECTIONS: usize = 4096;

/// An idle connection is closed after this long.
const IDLE: Duration = Duration::from_secs(300);

/// Serves one port for ever, IPv4 and IPv6.
pub fn serve(port: u16, handle: impl Fn(TcpStream) -> Result<()> + Send + Sync + 'static) -> Result<()> {
    let listener =
        TcpListener::bind((Ipv6Addr::UNSPECIFIED, port)).with_context(|| format!("port {port}"))?;
    println!("listening on port {port}");
    let (handle, open) = (Arc::new(handle), Arc::new(AtomicUsize::new(0)));
    loop {
        let stream = match listener.accept() {
            Ok((stream, _)) => stream,
            // A client that gave up, or no descriptor left: neither is a reason to end.
            Err(error) => {
                eprintln!("accept: {error}");
                std::thread::sleep(Duration::from_millis(10));
                continue;
            }
        };
        if open.fetch_add(1, Ordering::Relaxed) >= MOST_CONNECTIONS {
            open.fetch_sub(1, Ordering::Relaxed);
            continue;
        }
        let (handle, open) = (handle.clone(), open.clone());
        std::thread::spawn(move || {
            let done = prepare(&stream).map_err(Into::into).and_then(|()| handle(stream));
            if let Err(error) = done {
                eprintln!("connection: {error:#}");
            }
            open.fetch_sub(1, Ordering::Relaxed);
        });
    }
}

/// The caller, as the kernel names it to us; an IPv4 one in its usual form.
pub fn peer(stream: &TcpStream) -> io::Result<SocketAddr> {
    let address = stream.peer_addr()?;
    Ok(SocketAddr::new(address.ip().to_canonical(), address.port()))
}

fn prepare(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(IDLE))
}
