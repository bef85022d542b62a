//! A certificate authority for the end-to-end tests that speaks Istio's protocol.
//!
//! It signs whatever is asked for with the right token, by a root that `undermesh ca init` has made, and says a line of
//! each request.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Parser;
use tokio::net::TcpListener;
use tonic::Status;
use undermesh_tests::istiod::{self, Answer, Asked};
use undermesh_tests::pki::Authority;

#[derive(Parser)]
#[command(about = "A certificate authority that speaks Istio's protocol")]
struct Istiod {
    /// The folder of the root that signs, also its own certificate.
    #[arg(long)]
    ca_dir: PathBuf,
    /// Where to listen.
    #[arg(long)]
    address: SocketAddr,
    /// The token that it takes.
    #[arg(long)]
    token: String,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<()> {
    let Istiod { ca_dir, address, token } = Istiod::parse();
    let authority = Arc::new(Authority::read(&ca_dir)?);
    let own = authority.server(&address.ip().to_string())?;
    let bearer: Arc<str> = format!("Bearer {token}").into();
    let listener = TcpListener::bind(address).await.context("listening")?;
    println!("listening");
    let answer = move |asked| std::future::ready(answer(&authority, &bearer, &asked));
    istiod::serve(listener, own, answer).await.context("serving")
}

fn answer(authority: &Authority, bearer: &str, asked: &Asked) -> Answer {
    let identity = &asked.identity;
    if asked.authorization != bearer {
        println!("refused {identity}");
        return Err(Status::unauthenticated("the token is not valid"));
    }
    let life = Duration::from_secs(asked.validity_seconds.unsigned_abs());
    let signed = authority.sign_request(&asked.csr, identity, life);
    println!("{} {identity}", if signed.is_ok() { "signed" } else { "failed to sign" });
    signed.map_err(|error| Status::internal(format!("{error:#}")))
}
