//! Both ends of a connection, as HTTP/2 would use them.

use std::future::poll_fn;
use std::time::Duration;

use rustls::crypto::aws_lc_rs::default_provider;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;
use tokio::time::timeout;
use tokio_rustls::{TlsAcceptor, TlsConnector};

use super::*;

const PATIENCE: Duration = Duration::from_secs(20);

/// An end, and what flushes it.
type End = (Transport, Flusher);

async fn ends() -> (End, End) {
    let key = rcgen::generate_simple_self_signed(["tunnel".to_owned()]).unwrap();
    let certificate = key.cert.der().clone();
    let mut roots = RootCertStore::empty();
    roots.add(certificate.clone()).unwrap();
    let provider = Arc::new(default_provider());
    let client = ClientConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let server = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![certificate], key.signing_key.serialize_der().try_into().unwrap())
        .unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (near, far) = tokio::join!(TcpStream::connect(listener.local_addr().unwrap()), listener.accept());
    let connect = TlsConnector::from(Arc::new(client)).connect("tunnel".try_into().unwrap(), near.unwrap());
    let accept = TlsAcceptor::from(Arc::new(server)).accept(far.unwrap().0);
    let (client, server) = tokio::join!(connect, accept);
    let ((near, client), (far, server)) = (client.unwrap().into_inner(), server.unwrap().into_inner());
    (Transport::new(near, client), Transport::new(far, server))
}

/// Drives a future as a connection's driver drives the connection.
async fn driven<T>(flusher: &Flusher, what: impl Future<Output = T>) -> T {
    let mut what = std::pin::pin!(what);
    let all = poll_fn(|cx| {
        let done = what.as_mut().poll(cx);
        flusher.poll(cx);
        done
    });
    timeout(PATIENCE, all).await.expect("it goes on")
}

fn pattern(len: usize, seed: usize) -> Vec<u8> {
    (0..len).map(|n| (n * 31 + n / 251 + seed) as u8).collect()
}

#[tokio::test]
async fn what_is_written_arrives_whatever_its_size() {
    let (near, far) = ends().await;
    let sizes: Vec<usize> =
        [1, 9, RECORD - 1, RECORD, RECORD + 1, 4 * RECORD, CHUNK, BACKLOG + 7, 3, 5 * BACKLOG].repeat(2);
    let both = |(end, flusher): End, seed: usize| {
        let sizes = sizes.clone();
        async move {
            let (mut read, mut write) = tokio::io::split(end);
            let total = sizes.iter().sum();
            let say = async {
                for (number, size) in sizes.iter().enumerate() {
                    write.write_all(&pattern(*size, number + seed)).await.unwrap();
                }
                write.shutdown().await.unwrap();
            };
            let hear = async {
                let mut heard = Vec::with_capacity(total);
                read.read_to_end(&mut heard).await.unwrap();
                heard
            };
            driven(&flusher, async { tokio::join!(say, hear).1 }).await
        }
    };
    let (at_near, at_far) = tokio::join!(both(near, 0), both(far, 100));
    for (heard, seed) in [(at_near, 100), (at_far, 0)] {
        let said: Vec<u8> =
            sizes.iter().enumerate().flat_map(|(number, size)| pattern(*size, number + seed)).collect();
        assert!(heard == said, "{} bytes of {} arrived, or others", heard.len(), said.len());
    }
}

#[tokio::test]
async fn small_writes_leave_together_once_they_are_flushed() {
    let ((mut near, flusher), (mut far, _)) = ends().await;
    for _ in 0..10 {
        near.write_all(&[7; 300]).await.unwrap();
        near.flush().await.unwrap();
    }
    let mut heard = [0; 3000];
    let early = timeout(Duration::from_millis(50), far.read(&mut heard)).await;
    assert!(early.is_err(), "{early:?} left before it was flushed");
    driven(&flusher, async {}).await;
    // One read is one record at most, or several that lay there together.
    let n = timeout(PATIENCE, far.read(&mut heard)).await.expect("it left").unwrap();
    assert_eq!(n, 3000);
}

#[tokio::test]
async fn a_reader_that_stands_still_bounds_what_is_held() {
    let ((mut near, flusher), far) = ends().await;
    let block = pattern(RECORD, 0);
    let mut written = 0;
    let fill = async {
        while timeout(Duration::from_millis(300), near.write_all(&block)).await.is_ok() {
            written += block.len();
            assert!(written < 64 * 1024 * 1024, "{written} bytes are somewhere");
        }
    };
    driven(&flusher, fill).await;
    assert!(flusher.0.lock().unwrap().backlog <= BACKLOG + RECORD);
    drop(far);
}

#[tokio::test]
async fn a_connection_without_an_end_is_told_from_one_with_it() {
    let ((mut near, near_flusher), (mut far, far_flusher)) = ends().await;
    driven(&near_flusher, async { near.shutdown().await }).await.unwrap();
    assert_eq!(driven(&far_flusher, far.read(&mut [0; 8])).await.unwrap(), 0);

    let ((near, _), (mut far, far_flusher)) = ends().await;
    drop(near);
    let error = driven(&far_flusher, far.read(&mut [0; 8])).await.unwrap_err();
    assert_ne!(error.kind(), io::ErrorKind::WouldBlock, "{error}");
}
