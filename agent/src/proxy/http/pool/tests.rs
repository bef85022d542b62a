//! What the pool lends, and what it lets go.

use futures_util::FutureExt as _;
use hyper_util::rt::{TokioExecutor, TokioIo};

use super::*;
use crate::model::UnderWay;

fn key() -> Key {
    Key {
        source: 1,
        bound: None,
        to: "10.1.0.1:80".parse().unwrap(),
        is_limited: false,
        is_capped: false,
        tls: None,
    }
}

/// A connection to nobody, that waits for a request.
async fn http1_lease(terms: Arc<Terms>) -> (Lease, tokio::io::DuplexStream) {
    let (ours, theirs) = tokio::io::duplex(1024);
    let (mut sender, connection) = http1::handshake(TokioIo::new(ours)).await.unwrap();
    tokio::spawn(connection);
    sender.ready().await.unwrap();
    let lease = Lease {
        sender: Sender::Http1(sender),
        assurance: Assurance::NONE,
        terms,
        is_reused: false,
        _stream: None,
    };
    (lease, theirs)
}

/// The same of HTTP/2, made by the pool.
async fn http2_lease(pool: &Pool, terms: Arc<Terms>) -> (Lease, tokio::io::DuplexStream) {
    let their_end = Mutex::default();
    let make = || async {
        let (ours, theirs) = tokio::io::duplex(1024);
        *their_end.lock().unwrap() = Some(theirs);
        let (sender, connection) = http2::handshake(TokioExecutor::new(), TokioIo::new(ours)).await.unwrap();
        tokio::spawn(connection);
        let most_streams = watch::channel(None).1;
        Ok(Made { sender, most_streams, assurance: Assurance::NONE, terms: terms.clone() })
    };
    let lease = pool.http2(&key(), &Assurance::NONE, None, make).await.unwrap();
    (lease, their_end.into_inner().unwrap().unwrap())
}

/// So many leases at once of connections whose servers take so many streams each; on how many connections they are.
async fn connections(pool: &Pool, leases: usize, most: usize) -> (Vec<Lease>, usize) {
    let (told, most_streams) = watch::channel(None);
    let make = || async {
        let (ours, theirs) = tokio::io::duplex(1024);
        let (sender, connection) = http2::handshake(TokioExecutor::new(), TokioIo::new(ours)).await.unwrap();
        tokio::spawn(connection);
        // It outlives the test.
        std::mem::forget(theirs);
        let terms = Terms::new(None, None, None);
        Ok(Made { sender, most_streams: most_streams.clone(), assurance: Assurance::NONE, terms })
    };
    let key = key();
    let lease = || pool.http2(&key, &Assurance::NONE, None, make);
    let all = futures_util::future::join_all((0..leases).map(|_| lease()));
    let say = async { _ = told.send(Some(most)) };
    let all: Vec<Lease> = futures_util::join!(all, say).0.into_iter().map(Result::unwrap).collect();
    let different: std::collections::HashSet<_> = all.iter().map(|lease| Arc::as_ptr(&lease.terms)).collect();
    let count = different.len();
    (all, count)
}

#[tokio::test]
async fn a_server_that_takes_few_streams_gets_more_connections() {
    for (leases, most, expected) in [(90, 100, 1), (360, 100, 4), (40, 10, 4), (3, 0, 3), (90, usize::MAX, 1)]
    {
        let pool = Pool::default();
        let (all, count) = connections(&pool, leases, most).await;
        assert_eq!(count, expected, "{leases} requests, {most} at a time");
        drop(all);
        // What was lent has come back.
        let (_all, count) = connections(&pool, 1, most).await;
        assert_eq!((count, pool.slots().http2[&key()].len()), (1, expected));
    }
}

#[tokio::test]
async fn where_no_further_connection_may_be_made_streams_are_waited_for() {
    let pool = Pool::default();
    let (all, count) = connections(&pool, 1, 1).await;
    assert_eq!(count, 1);
    let refused = |reason| async move { Err(InTheWay::new(reason, Assurance::NONE)) };
    let (key, port) = (key(), PortLoad::default());
    let lease = |reason| pool.http2(&key, &Assurance::NONE, None, move || refused(reason));
    let waits = lease(RefuseReason::Overloaded).await.unwrap();
    assert!(Arc::ptr_eq(&waits.terms, &all[0].terms) && waits.is_reused);
    assert_eq!(lease(RefuseReason::ConnectRefused).await.unwrap_err().reason, RefuseReason::ConnectRefused);
    drop((all, waits));
    assert!(!pool.let_go(&port), "it has no place at the port");
    let elsewhere = Key { source: 2, ..key.clone() };
    let none = pool.http2(&elsewhere, &Assurance::NONE, None, || refused(RefuseReason::Overloaded)).await;
    assert_eq!(none.unwrap_err().reason, RefuseReason::Overloaded);
}

fn counted(port: &PortLoad) -> Arc<Terms> {
    let guard = port.enter(UnderWay::Connections, 9).unwrap();
    Terms::new(Some(Place::new(guard, &Arc::default())), None, None)
}

#[tokio::test]
async fn an_idle_connection_is_let_go_for_its_port_and_one_that_is_lent_is_not() {
    let (pool, port, other) = (Pool::default(), PortLoad::default(), PortLoad::default());
    let (lease, _server) = http1_lease(counted(&port)).await;
    assert!(!pool.let_go(&port), "it is lent");
    pool.give_back(key(), lease);
    assert!(!pool.let_go(&other), "it is another port's");
    assert!(pool.let_go(&port) && !pool.let_go(&port));
    assert_eq!(port.under_way(UnderWay::Connections), 0);

    let terms = counted(&port);
    // The connection itself.
    let held = terms.clone();
    let (lease, _server) = http2_lease(&pool, terms).await;
    assert!(!pool.let_go(&port), "a request is under way");
    drop(lease);
    assert!(pool.let_go(&port) && !pool.let_go(&port));
    drop(held);
    assert_eq!(port.under_way(UnderWay::Connections), 0);
}

#[tokio::test]
async fn who_waits_for_a_place_is_told_once_it_is_left() {
    let (port, left) = (PortLoad::default(), Arc::<Notify>::default());
    let place = Place::new(port.enter(UnderWay::Connections, 1).unwrap(), &left);
    let mut told = Box::pin(left.notified());
    assert_eq!(told.as_mut().now_or_never(), None, "it is not left yet");
    drop(place);
    assert_eq!(told.now_or_never(), Some(()));
    assert_eq!(port.under_way(UnderWay::Connections), 0);
}

#[tokio::test]
async fn a_connection_that_was_idle_for_too_long_is_not_used() {
    let (pool, limit) = (Pool::default(), Duration::from_millis(40));
    let (lease, _server) = http1_lease(Terms::new(None, Some(limit), None)).await;
    pool.give_back(key(), lease);
    let lease = pool.take_http1(&key(), &Assurance::NONE).unwrap();
    std::thread::sleep(limit);
    pool.give_back(key(), lease);
    let lease = pool.take_http1(&key(), &Assurance::NONE).expect("it was in use");
    pool.give_back(key(), lease);
    std::thread::sleep(limit);
    assert!(pool.take_http1(&key(), &Assurance::NONE).is_none());
}

#[tokio::test]
async fn connections_to_an_endpoint_that_has_gone_are_let_go() {
    let (pool, endpoint, now) = (Pool::default(), EndpointLoad::default(), Instant::now());
    let terms = Terms::new(None, None, Some(endpoint.clone()));
    let (lease, mut server) = http1_lease(terms.clone()).await;
    pool.give_back(key(), lease);
    let (lease, _server) = http2_lease(&pool, terms).await;
    let known = || {
        let slots = pool.slots();
        (slots.http1.len(), slots.http2.len())
    };
    let generation = |generation| Snapshot { generation, ..Snapshot::default() };
    pool.sweep(now, &generation(1));
    assert_eq!(known(), (1, 1));
    endpoint.set_gone(true);
    pool.sweep(now, &generation(1));
    assert_eq!(known(), (1, 1), "not before there is news");
    pool.sweep(now, &generation(2));
    assert_eq!(known(), (0, 0));
    // Whoever has one goes on with it.
    let Sender::Http2(sender) = lease.sender else { panic!("it speaks HTTP/2") };
    assert!(!sender.is_closed());
    let mut bytes = Vec::new();
    tokio::io::AsyncReadExt::read_to_end(&mut server, &mut bytes).await.unwrap();
    assert_eq!(bytes, b"", "the server sees the end");
}

#[tokio::test]
async fn connections_to_a_dialled_pod_that_has_gone_are_let_go() {
    let pool = Pool::default();
    let (lease, _server) = http1_lease(Terms::new(None, None, None)).await;
    pool.give_back(key(), lease);
    pool.sweep(Instant::now(), &Snapshot::default());
    assert!(pool.take_http1(&key(), &Assurance::NONE).is_none());
}
