//! Callers over loopback who want more than is theirs, or nothing.

use rustls::pki_types::{PrivatePkcs8KeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpSocket;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use super::super::webhook;
use super::*;
use crate::telemetry::ControllerTelemetry;

type Client = tokio_rustls::client::TlsStream<TcpStream>;

const PATIENCE: Duration = Duration::from_secs(20);

/// A server's side and a client's.
fn tls() -> (ServerConfig, TlsConnector) {
    let key = rcgen::KeyPair::generate().unwrap();
    let certificate =
        rcgen::CertificateParams::new(["ca.test".to_owned()]).unwrap().self_signed(&key).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut roots = RootCertStore::empty();
    roots.add(certificate.der().clone()).unwrap();
    let server =
        ServerConfig::builder_with_provider(provider.clone()).with_safe_default_protocol_versions().unwrap();
    let server = server.with_no_client_auth();
    let key = PrivatePkcs8KeyDer::from(key.serialize_der()).into();
    let server = server.with_single_cert(vec![certificate.der().clone()], key).unwrap();
    let client = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    let client = client.with_root_certificates(roots).with_no_client_auth();
    (server, TlsConnector::from(Arc::new(client)))
}

/// A listener and how to call it from an address.
async fn listener() -> (TcpListener, ServerConfig, impl AsyncFn(&str) -> io::Result<Client>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (address, (server, client)) = (listener.local_addr().unwrap(), tls());
    let call = async move |from: &str| {
        let socket = TcpSocket::new_v4()?;
        socket.bind(format!("{from}:0").parse().unwrap())?;
        let stream = timeout(PATIENCE, socket.connect(address)).await??;
        let name = ServerName::try_from("ca.test").unwrap();
        timeout(PATIENCE, client.connect(name, stream)).await?
    };
    (listener, server, call)
}

/// All that comes until the other side closes.
async fn all(stream: &mut Client) -> String {
    let mut came = Vec::new();
    // Without a word of TLS is closed, too.
    _ = timeout(PATIENCE, stream.read_to_end(&mut came)).await.expect("it is not closed");
    String::from_utf8_lossy(&came).into_owned()
}

#[tokio::test]
async fn one_address_does_not_have_all_connections() {
    let (listener, server, call) = listener().await;
    let bounds = Bounds { connections: 8, of_one_address: 2, request: PATIENCE };
    let (keep, mut kept) = mpsc::unbounded_channel();
    tokio::spawn(incoming(listener, server, bounds).for_each(move |connection| {
        _ = keep.send(connection.unwrap());
        std::future::ready(())
    }));
    let (_a, _b) = (call("127.0.0.1").await.unwrap(), call("127.0.0.1").await.unwrap());
    assert!(call("127.0.0.1").await.is_err());
    call("127.0.0.2").await.unwrap();
    // Its place is free as soon as one of its connections is over.
    drop(kept.recv().await);
    call("127.0.0.1").await.unwrap();
    assert!(call("127.0.0.1").await.is_err());
}

#[tokio::test]
async fn a_connection_of_which_nothing_comes_ends() {
    let (listener, server, call) = listener().await;
    let bounds = Bounds { connections: 8, of_one_address: 8, request: Duration::from_millis(200) };
    let mut connections = Box::pin(incoming(listener, server, bounds));
    let (client, connection) = tokio::join!(call("127.0.0.1"), connections.next());
    let (mut client, mut connection) = (client.unwrap(), connection.unwrap().unwrap());
    let mut byte = [0];
    // What is there is read, and does not count as something.
    client.write_all(b"a").await.unwrap();
    assert_eq!(connection.read(&mut byte).await.unwrap(), 1);
    let late = timeout(PATIENCE, connection.read(&mut byte)).await.unwrap().unwrap_err();
    assert_eq!(late.kind(), io::ErrorKind::TimedOut);
    connection.seat.keep();
    let waits = timeout(Duration::from_millis(600), connection.read(&mut byte)).await;
    assert!(waits.is_err(), "it may stay: {waits:?}");
    connection.seat.limit(Duration::from_millis(200));
    assert!(timeout(PATIENCE, connection.read(&mut byte)).await.unwrap().is_err());
    connection.seat.earn();
    connection.seat.limit(Duration::from_millis(200));
    let waits = timeout(Duration::from_millis(600), connection.read(&mut byte)).await;
    assert!(waits.is_err(), "it has earned to stay: {waits:?}");
}

#[tokio::test]
async fn the_webhook_keeps_nobody_who_asks_for_nothing() {
    let (listener, server, call) = listener().await;
    let telemetry = Arc::new(ControllerTelemetry::default());
    tokio::spawn(webhook::serve(listener, server, telemetry, std::future::pending()));
    let ask = |body: &str, length: usize| {
        format!(
            "POST /check HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n{body}"
        )
    };
    let review = r#"{"apiVersion":"admission.k8s.io/v1","kind":"AdmissionReview","request":{"uid":"u","kind":{"group":"","version":"v1","kind":"Pod"},
        "resource":{"group":"","version":"v1","resource":"pods"},"name":"web","namespace":"shop","operation":"CREATE","userInfo":{},
        "object":{"apiVersion":"v1","kind":"Pod","metadata":{"name":"web","namespace":"shop"}}}}"#;
    let since = Instant::now();
    let [mut silent, mut slow, mut stranger, mut server] = [
        call("127.0.0.1").await.unwrap(),
        call("127.0.0.1").await.unwrap(),
        call("127.0.0.1").await.unwrap(),
        call("127.0.0.1").await.unwrap(),
    ];
    // Of its request the last byte does not come.
    slow.write_all(ask(review, review.len() + 1).as_bytes()).await.unwrap();
    stranger.write_all(ask("{}", 2).as_bytes()).await.unwrap();
    assert!(all(&mut stranger).await.contains("connection: close"));
    assert!(since.elapsed() < Duration::from_secs(4));
    for _ in 0..2 {
        server.write_all(ask(review, review.len()).as_bytes()).await.unwrap();
        let mut answer = vec![0; 4096];
        let length = timeout(PATIENCE, server.read(&mut answer)).await.unwrap().unwrap();
        let answer = String::from_utf8_lossy(&answer[..length]);
        assert!(answer.starts_with("HTTP/1.1 200") && !answer.contains("connection: close"), "{answer}");
        // The others are closed meanwhile, and this one is not.
        tokio::join!(all(&mut silent), all(&mut slow));
    }
    assert!(since.elapsed() < PATIENCE / 2);
}
