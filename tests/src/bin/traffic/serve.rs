//! The server: greets with its name and the address that called, then echoes until the client ends.

use std::net::{Ipv6Addr, SocketAddr};

use anyhow::{Context, Result};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

pub(crate) async fn serve(name: &str, port: u16) -> Result<()> {
    let listener = listen(port).with_context(|| format!("port {port}"))?;
    loop {
        let Ok((stream, peer)) = listener.accept().await else { continue };
        let greeting = format!("{name} {}\n", peer.ip().to_canonical());
        tokio::spawn(echo(stream, greeting));
    }
}

/// A client that goes away in whatever manner ends its own connection and nothing else.
async fn echo(mut stream: TcpStream, greeting: String) -> std::io::Result<()> {
    stream.write_all(greeting.as_bytes()).await?;
    let mut buffer = [0; 1024];
    loop {
        match stream.read(&mut buffer).await? {
            0 => return Ok(()),
            n => stream.write_all(&buffer[..n]).await?,
        }
    }
}

fn listen(port: u16) -> Result<TcpListener> {
    let socket = Socket::new(Domain::IPV6, Type::STREAM.nonblocking(), Some(Protocol::TCP))?;
    socket.set_only_v6(false)?;
    socket.set_reuse_address(true)?;
    socket.bind(&SocketAddr::from((Ipv6Addr::UNSPECIFIED, port)).into())?;
    socket.listen(4096)?;
    Ok(TcpListener::from_std(socket.into())?)
}
