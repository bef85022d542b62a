//! A loopback port of the machine behind which the API server is, so that whoever has the kubeconfig can use it
//! without entering a namespace. Bytes only; it knows nothing of TLS.

use std::io;
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use anyhow::{Context, Result};

use crate::lab::in_netns;

/// The relay; ends when dropped, and its connections with whoever made them.
#[derive(Debug)]
pub(super) struct Relay {
    address: SocketAddr,
    ended: Arc<AtomicBool>,
}

impl Relay {
    /// Listens; connections are made in the namespace.
    pub(super) fn start(netns: &Path, to: SocketAddr) -> Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("no loopback port is free")?;
        let address = listener.local_addr()?;
        let ended = Arc::new(AtomicBool::new(false));
        let (netns, over) = (netns.to_owned(), ended.clone());
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                if over.load(Ordering::Relaxed) {
                    break;
                }
                let netns = netns.clone();
                thread::spawn(move || serve(client, &netns, to));
            }
        });
        Ok(Self { address, ended })
    }

    /// Where it listens.
    pub(super) fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Relaxed);
        // Wakes the listener up, which then sees that it is over.
        let _ = TcpStream::connect(self.address);
    }
}

fn serve(client: TcpStream, netns: &Path, to: SocketAddr) {
    // Whoever connects hears of a server that is not there by the end of the connection.
    let Ok(server) = in_netns(netns, || Ok(TcpStream::connect(to)?)) else { return };
    let _ = (client.set_nodelay(true), server.set_nodelay(true));
    thread::scope(|scope| {
        scope.spawn(|| copy(&client, &server));
        copy(&server, &client);
    });
}

fn copy(mut from: &TcpStream, mut to: &TcpStream) {
    let end = match io::copy(&mut from, &mut to) {
        Ok(_) => Shutdown::Write,
        Err(_) => Shutdown::Both,
    };
    let _ = to.shutdown(end);
}
