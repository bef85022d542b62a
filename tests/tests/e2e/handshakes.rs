//! Handshakes as a flood: whoever begins them as fast as it can takes little from those who are let in.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{JoinHandle, sleep};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustls::crypto::aws_lc_rs;
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection, RootCertStore};
use undermesh_tests::lab::{Pod, eventually, in_netns};
use undermesh_tests::require;
use undermesh_tests::require::Feature;

use crate::kit::{Mesh, Ran, Run, SOON, serve};
use crate::tunnel::TUNNEL;

/// How long each is measured.
const LENGTH: Duration = Duration::from_secs(4);

/// Handshakes that the agent lets an address begin at once, and then in each second.
const BURST: u64 = 1000;
const RATE: u64 = 200;

/// Threads that say hello to a pod's tunnel, wait for the answer, which is what costs the agent most, and go.
struct Flood {
    stop: Arc<AtomicBool>,
    answered: Arc<AtomicU64>,
    threads: Vec<JoinHandle<Result<()>>>,
}

impl Flood {
    fn begin(from: &Pod, to: IpAddr, threads: usize) -> Result<Self> {
        let (stop, answered, hello) = (Arc::default(), Arc::default(), client_hello()?);
        let thread = |_| {
            let (netns, hello) = (from.netns().to_owned(), hello.clone());
            let (stop, answered) = (Arc::clone(&stop), Arc::clone(&answered));
            std::thread::spawn(move || in_netns(&netns, || knock(to, &hello, &stop, &answered)))
        };
        let threads = (0..threads).map(thread).collect();
        Ok(Self { stop, answered, threads })
    }

    /// How many of its handshakes the agent has answered so far.
    fn answered(&self) -> u64 {
        self.answered.load(Ordering::Relaxed)
    }

    fn end(self) -> Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        self.threads.into_iter().try_for_each(|thread| thread.join().expect("a thread of the flood"))
    }
}

fn knock(to: IpAddr, hello: &[u8], stop: &AtomicBool, answered: &AtomicU64) -> Result<()> {
    while !stop.load(Ordering::Relaxed) {
        let Ok(mut stream) = TcpStream::connect(SocketAddr::new(to, TUNNEL)) else { continue };
        stream.set_read_timeout(Some(Duration::from_secs(1)))?;
        let greeted = stream.write_all(hello).and_then(|()| stream.read(&mut [0; 64]));
        if greeted.is_ok_and(|count| count > 0) {
            answered.fetch_add(1, Ordering::Relaxed);
        }
    }
    Ok(())
}

/// The same hello serves for all: whoever means to cost others much pays little.
fn client_hello() -> Result<Vec<u8>> {
    let config = ClientConfig::builder_with_provider(aws_lc_rs::default_provider().into());
    let config = config.with_protocol_versions(&[&rustls::version::TLS13])?;
    let mut config = config.with_root_certificates(RootCertStore::empty()).with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec()];
    let name = ServerName::try_from("somebody").context("a name")?;
    let mut hello = Vec::new();
    ClientConnection::new(config.into(), name)?.write_tls(&mut hello)?;
    Ok(hello)
}

fn measure(client: &Pod, to: IpAddr) -> Result<Ran> {
    let run = Run::begin(client, to, 1)?;
    sleep(LENGTH);
    run.end()
}

#[test]
fn a_flood_of_handshakes_starves_nobody() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let mut mesh = Mesh::start("um-e2e-handshakes", 2, &["--workers", "1"])?;
    let (client, server) = (mesh.pod(0, "client")?, mesh.pod(1, "server")?);
    let outsider = mesh.outsider(0, "outsider")?;
    let _server = serve(&server)?;
    mesh.ready()?;
    let alone = measure(&client, server.ip())?;
    let (began, flood) = (Instant::now(), Flood::begin(&outsider, server.ip(), 8)?);
    let allowed = || BURST + (RATE as f64 * began.elapsed().as_secs_f64()) as u64;
    eventually(SOON, "the flood takes nearly all that it is allowed", || {
        let (answered, allowed) = (flood.answered(), allowed());
        ensure!(10 * answered >= 9 * allowed, "{answered} handshakes of {allowed} were answered");
        Ok(())
    })?;
    let flooded = measure(&client, server.ip())?;
    let (answered, most) = (flood.answered(), allowed() + 20);
    flood.end()?;
    eprintln!("alone: {alone:?}\nbeside a flood: {flooded:?}");
    ensure!(flooded.failed_in_all == 0, "connections failed: {:?}", flooded.failed);
    ensure!(answered <= most, "{answered} handshakes were answered, not {most} at most");
    ensure!(flooded.median_ns < 4 * alone.median_ns, "alone: {alone:?}; beside the flood: {flooded:?}");
    Ok(())
}
