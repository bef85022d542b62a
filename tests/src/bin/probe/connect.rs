//! How long `connect()` takes.

use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::Result;
use clap::Args;
use serde_json::Value;
use socket2::SockRef;

/// The arguments of `probe connect`.
#[derive(Args)]
pub struct Connect {
    /// Where to.
    #[arg(long)]
    to: SocketAddr,
    /// For how long.
    #[arg(long, default_value_t = 1)]
    seconds: u64,
}

impl Connect {
    /// Times the call alone; closes with a reset, so that no port waits.
    pub fn run(&self) -> Result<Value> {
        let end = Instant::now() + Duration::from_secs(self.seconds);
        let mut times = Vec::new();
        while Instant::now() < end {
            let began = Instant::now();
            let stream = TcpStream::connect(self.to)?;
            times.push(began.elapsed());
            SockRef::from(&stream).set_linger(Some(Duration::ZERO))?;
        }
        Ok(crate::percentiles(times))
    }
}
