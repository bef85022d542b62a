//! An issuer's server of keys for the end-to-end tests: over HTTPS, whatever a file says now, with an ETag.

use std::collections::hash_map::DefaultHasher;
use std::fs;
use std::hash::{Hash as _, Hasher as _};
use std::net::SocketAddr;
use std::path::PathBuf;

use anyhow::{Context as _, Result};
use clap::Parser;
use tokio::net::TcpListener;
use undermesh_tests::issuer::{acceptor, answer, publish};

#[derive(Parser)]
#[command(about = "An issuer's server of keys")]
struct Issuer {
    /// Where to listen.
    #[arg(long)]
    address: SocketAddr,
    /// Its certificate, in PEM.
    #[arg(long)]
    certificate: PathBuf,
    /// The certificate's key, in PEM.
    #[arg(long)]
    key: PathBuf,
    /// What it publishes.
    #[arg(long)]
    keys: PathBuf,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<()> {
    let Issuer { address, certificate, key, keys } = Issuer::parse();
    let acceptor = acceptor(&fs::read_to_string(certificate)?, &fs::read_to_string(key)?)?;
    let listener = TcpListener::bind(address).await.context("listening")?;
    println!("listening");
    let told = move |head: &str| {
        println!("{}", head.lines().next().unwrap_or_default());
        let Ok(keys) = fs::read_to_string(&keys) else { return answer("503 Service Unavailable", &[], "") };
        let mut hasher = DefaultHasher::new();
        keys.hash(&mut hasher);
        let tag = format!("\"{:x}\"", hasher.finish());
        match head.contains(&tag) {
            true => answer("304 Not Modified", &[], ""),
            false => answer("200 OK", &[&format!("etag: {tag}")], &keys),
        }
    };
    publish(listener, acceptor, told).await
}
