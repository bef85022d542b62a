//! What becomes of the contexts of requests, and what collectors are sent.

use std::net::SocketAddr;
use std::time::UNIX_EPOCH;

use ::http::HeaderName;
use data_encoding::HEXLOWER;
use expect_test::expect;
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::trace::v1::{Span, span::SpanKind};
use rustls_pki_types::PrivateKeyDer;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;

use super::*;
use crate::model::{ObjectRef, SpiffeId};
use crate::telemetry::{ConnectionFacts, Peer, Reporter, RequestEnd, RouteLabel, Security};

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const CALLER: &str = "00f067aa0ba902b7";

fn settings(endpoint: &str, sampling: f64) -> TraceSettings {
    TraceSettings {
        endpoint: endpoint.parse().unwrap(),
        protocol: TraceProtocol::Http,
        sampling,
        headers: Vec::new(),
        ca: None,
        node: "node-1".into(),
    }
}

fn traces(sampling: f64) -> (Traces, TraceExporter) {
    Traces::new(&settings("http://127.0.0.1:1", sampling)).unwrap()
}

fn headers(all: &[(&'static str, &str)]) -> HeaderMap {
    let read = |(name, value): &(&'static str, &str)| {
        (HeaderName::from_static(name), HeaderValue::from_str(value).unwrap())
    };
    all.iter().map(read).collect()
}

/// What the upstream gets of the headers, with what is new in it as letters, and what is recorded.
fn passed_on(traces: &Traces, came: &[(&'static str, &str)]) -> String {
    let mut headers = headers(came);
    let Some(place) = traces.place(&headers, true) else { return "no trace".into() };
    place.pass_on(&mut headers);
    let told = |value: &HeaderValue| {
        let text = value.to_str().unwrap();
        let fields: Vec<&str> = text.split('-').collect();
        let [version, trace, parent, flags] = fields[..] else { return text.to_owned() };
        assert_eq!(trace, place.id().to_string());
        let trace = if trace == TRACE { "THE-TRACE" } else { "a-new-one" };
        let parent = if parent == CALLER { "the-caller" } else { "our-own" };
        format!("{version} {trace} {parent} {flags}")
    };
    let left: Vec<_> = headers.iter().map(|(name, value)| format!("{name}: {}", told(value))).collect();
    let recorded = match &place.part {
        Part::Recorded(lineage) => format!(
            "; recorded, {}, {:?}",
            if lineage.parent.is_some() { "a child" } else { "the first" },
            lineage.state
        ),
        Part::None | Part::Begun => String::new(),
    };
    format!("{}{recorded}", left.join(", "))
}

#[test]
fn a_request_joins_the_trace_that_it_comes_with_or_begins_one() {
    let (off, (never, _), (always, _)) = (Traces::off(), traces(0.0), traces(1.0));
    let sampled = ("traceparent", &*format!("00-{TRACE}-{CALLER}-01"));
    let random = ("traceparent", &*format!("00-{TRACE}-{CALLER}-ff"));
    let unsampled = ("traceparent", &*format!("00-{TRACE}-{CALLER}-00"));
    let invalid = ("traceparent", &*format!("00-{TRACE}-{CALLER}"));
    let (state, more) = (("tracestate", "a=1"), ("tracestate", "b=2"));
    let long = "c".repeat(600);
    let cases: [(&str, &[(&str, &str)]); 9] = [
        ("nothing", &[]),
        ("sampled", &[sampled]),
        ("sampled, two states", &[sampled, state, more]),
        ("sampled, a long state", &[sampled, ("tracestate", &long)]),
        ("all flags", &[random]),
        ("unsampled", &[unsampled, state]),
        ("invalid", &[invalid, state]),
        ("two", &[sampled, sampled, state]),
        ("a state alone", &[state]),
    ];
    let mut table = String::new();
    for (what, came) in cases {
        for (setting, traces) in [("off", &off), ("0", &never), ("1", &always)] {
            table += &format!("{what}, {setting}: {}\n", passed_on(traces, came).replace(&long, "..."));
        }
    }
    expect![[r#"
        nothing, off: no trace
        nothing, 0: traceparent: 00 a-new-one our-own 02
        nothing, 1: traceparent: 00 a-new-one our-own 03; recorded, the first, ""
        sampled, off: traceparent: 00 THE-TRACE the-caller 01
        sampled, 0: traceparent: 00 THE-TRACE our-own 01; recorded, a child, ""
        sampled, 1: traceparent: 00 THE-TRACE our-own 01; recorded, a child, ""
        sampled, two states, off: traceparent: 00 THE-TRACE the-caller 01, tracestate: a=1, tracestate: b=2
        sampled, two states, 0: traceparent: 00 THE-TRACE our-own 01, tracestate: a=1, tracestate: b=2; recorded, a child, "a=1,b=2"
        sampled, two states, 1: traceparent: 00 THE-TRACE our-own 01, tracestate: a=1, tracestate: b=2; recorded, a child, "a=1,b=2"
        sampled, a long state, off: traceparent: 00 THE-TRACE the-caller 01, tracestate: ...
        sampled, a long state, 0: traceparent: 00 THE-TRACE our-own 01, tracestate: ...; recorded, a child, ""
        sampled, a long state, 1: traceparent: 00 THE-TRACE our-own 01, tracestate: ...; recorded, a child, ""
        all flags, off: traceparent: 00 THE-TRACE the-caller ff
        all flags, 0: traceparent: 00 THE-TRACE our-own 03; recorded, a child, ""
        all flags, 1: traceparent: 00 THE-TRACE our-own 03; recorded, a child, ""
        unsampled, off: traceparent: 00 THE-TRACE the-caller 00, tracestate: a=1
        unsampled, 0: traceparent: 00 THE-TRACE the-caller 00, tracestate: a=1
        unsampled, 1: traceparent: 00 THE-TRACE the-caller 00, tracestate: a=1
        invalid, off: no trace
        invalid, 0: traceparent: 00 a-new-one our-own 02
        invalid, 1: traceparent: 00 a-new-one our-own 03; recorded, the first, ""
        two, off: no trace
        two, 0: traceparent: 00 a-new-one our-own 02
        two, 1: traceparent: 00 a-new-one our-own 03; recorded, the first, ""
        a state alone, off: no trace
        a state alone, 0: traceparent: 00 a-new-one our-own 02
        a state alone, 1: traceparent: 00 a-new-one our-own 03; recorded, the first, ""
    "#]].assert_eq(&table);
}

#[test]
fn contexts_are_read_only_if_somebody_wants_to_know() {
    let came = headers(&[("traceparent", &format!("00-{TRACE}-{CALLER}-01"))]);
    assert!(Traces::off().place(&came, false).is_none());
    assert_eq!(Traces::off().place(&came, true).unwrap().to_string(), TRACE);
    assert_eq!(traces(0.0).0.place(&came, false).unwrap().to_string(), TRACE);
}

#[test]
fn as_many_are_recorded_as_are_wished_for() {
    fastrand::seed(7);
    let (some, _exporter) = traces(0.25);
    let recorded = |_| some.place(&HeaderMap::new(), false).unwrap().is_recorded();
    let count = (0..10_000).map(recorded).filter(|recorded| *recorded).count();
    assert!((2_300..2_700).contains(&count), "{count}");
}

fn request(trace: Option<RequestTrace>) -> HttpRequest {
    let peer = |name: &str, address: &str| {
        let identity: SpiffeId = format!("spiffe://cluster.local/ns/shop/sa/{name}").parse().unwrap();
        Peer { workload: None, identity: Some(identity.to_name()), address: address.parse().unwrap() }
    };
    let upstream: SocketAddr = "10.0.0.2:8080".parse().unwrap();
    HttpRequest {
        route: Some(RouteLabel { kind: "HTTPRoute", id: ObjectRef::new("shop", "orders"), rule: "0".into() }),
        backend: None,
        method: ::http::Method::GET,
        status: Some(200),
        grpc_status: None,
        version: ::http::Version::HTTP_11,
        authority: "db.shop:5432".into(),
        path: "/orders".into(),
        end: RequestEnd::Done,
        detail: None,
        attempts: 1,
        duration: Duration::from_millis(3),
        request_bytes: 0,
        response_bytes: 1000,
        facts: Arc::new(ConnectionFacts {
            reporter: Reporter::Source,
            source: peer("web", "10.0.0.1:40000"),
            destination: peer("db", "10.0.0.2:8080"),
            service: Some(ObjectRef::new("shop", "db")),
            security: Security::MutualTls,
            dialled: "10.96.0.7:80".parse().unwrap(),
            client: "10.0.0.1:40000".parse().unwrap(),
            upstream: None,
            ruling: None,
        }),
        upstream: Some(upstream),
        ruling: None,
        trace,
    }
}

/// Of a request that somebody else had recorded.
fn recorded() -> Option<RequestTrace> {
    let came = headers(&[("traceparent", &format!("00-{TRACE}-{CALLER}-03")), ("tracestate", "a=1")]);
    traces(0.0).0.place(&came, false)
}

fn told(span: &Span) -> String {
    let kind = SpanKind::try_from(span.kind).unwrap().as_str_name();
    let status = span.status.as_ref().map(|status| status.code);
    let mut told = format!(
        "{:?} {kind} {:?} {} of {} flags {:x} status {status:?}\n",
        span.name,
        span.trace_state,
        HEXLOWER.encode(&span.trace_id),
        HEXLOWER.encode(&span.parent_span_id),
        span.flags
    );
    for attribute in &span.attributes {
        let value = match attribute.value.as_ref().and_then(|value| value.value.as_ref()) {
            Some(Value::StringValue(text)) => text.clone(),
            Some(Value::IntValue(number)) => number.to_string(),
            other => format!("{other:?}"),
        };
        told += &format!("{}={value}\n", attribute.key);
    }
    told
}

#[test]
fn a_span_tells_what_the_conventions_ask_for() {
    let at = UNIX_EPOCH + Duration::from_secs(1_000);
    let span = span::of(&request(recorded()), at).unwrap();
    assert_eq!(span.end_time_unix_nano - span.start_time_unix_nano, 3_000_000);
    assert_eq!(span.end_time_unix_nano, 1_000_000_000_000);
    expect![[r#"
        "GET shop/orders" SPAN_KIND_CLIENT "a=1" 4bf92f3577b34da6a3ce929d0e0e4736 of 00f067aa0ba902b7 flags 303 status None
        http.request.method=GET
        url.scheme=http
        url.path=/orders
        http.response.status_code=200
        network.protocol.name=http
        network.protocol.version=1.1
        server.address=db.shop
        server.port=5432
        network.peer.address=10.0.0.2
        network.peer.port=8080
        client.address=10.0.0.1
        undermesh.route=HTTPRoute/shop/orders
        undermesh.rule=0
        undermesh.reason=done
        undermesh.attempts=1
        undermesh.security=mutual_tls
        undermesh.source.identity=spiffe://cluster.local/ns/shop/sa/web
        undermesh.destination.identity=spiffe://cluster.local/ns/shop/sa/db
        undermesh.destination.service=db
        undermesh.destination.service.namespace=shop
    "#]].assert_eq(&told(&span));
    let odd = HttpRequest {
        route: None,
        method: "PURGE".parse().unwrap(),
        status: None,
        authority: String::new(),
        version: ::http::Version::HTTP_2,
        attempts: 3,
        upstream: None,
        end: RequestEnd::NoEndpoints,
        ..request(traces(1.0).0.place(&HeaderMap::new(), false))
    };
    let mut span = span::of(&odd, at).unwrap();
    assert!(span.parent_span_id.is_empty());
    span.trace_id.clear();
    expect![[r#"
        "HTTP" SPAN_KIND_CLIENT ""  of  flags 103 status Some(2)
        http.request.method=_OTHER
        http.request.method_original=PURGE
        url.scheme=http
        url.path=/orders
        http.request.resend_count=2
        network.protocol.name=http
        network.protocol.version=2
        server.address=10.96.0.7
        server.port=80
        client.address=10.0.0.1
        error.type=no_endpoints
        undermesh.reason=no_endpoints
        undermesh.attempts=3
        undermesh.security=mutual_tls
        undermesh.source.identity=spiffe://cluster.local/ns/shop/sa/web
        undermesh.destination.identity=spiffe://cluster.local/ns/shop/sa/db
        undermesh.destination.service=db
        undermesh.destination.service.namespace=shop
    "#]]
    .assert_eq(&told(&span));
    assert_eq!(span::of(&request(None), at), None);
    assert_eq!(span::of(&request(traces(0.0).0.place(&HeaderMap::new(), false)), at), None);
}

#[test]
fn who_has_failed_says_so() {
    let check = |reporter, status: Option<u16>, grpc_status, end, expected: Option<&str>| {
        let plain = request(recorded());
        let facts = Arc::new(ConnectionFacts { reporter, ..(*plain.facts).clone() });
        let span = span::of(&HttpRequest { status, grpc_status, end, facts, ..plain }, UNIX_EPOCH).unwrap();
        let told = told(&span);
        let error = told.lines().find_map(|line| line.strip_prefix("error.type="));
        assert_eq!(error, expected, "{reporter:?} {status:?} {grpc_status:?} {end:?}");
        assert_eq!(span.status.is_some(), expected.is_some());
    };
    use Reporter::{Destination, Source};
    use RequestEnd::{ClientGone, Done, NoRoute, RateLimited, Redirected, UpstreamReset};
    check(Source, Some(200), None, Done, None);
    check(Source, Some(302), None, Redirected, None);
    check(Source, Some(404), None, Done, Some("404"));
    check(Destination, Some(404), None, Done, None);
    check(Destination, Some(503), None, Done, Some("503"));
    check(Source, Some(404), None, NoRoute, Some("no_route"));
    check(Destination, Some(429), None, RateLimited, None);
    check(Source, Some(429), None, RateLimited, Some("rate_limited"));
    check(Source, Some(200), None, UpstreamReset, Some("upstream_reset"));
    check(Destination, None, None, UpstreamReset, Some("upstream_reset"));
    check(Source, None, None, ClientGone, Some("client_gone"));
    check(Source, Some(200), Some(0), Done, None);
    check(Source, Some(200), Some(5), Done, Some("grpc_5"));
    check(Destination, Some(200), Some(5), Done, None);
    check(Destination, Some(200), Some(14), Done, Some("grpc_14"));
}

fn dropped(traces: &Traces) -> String {
    traces.dropped().map(|(why, count)| format!("{}={count}", why.as_str())).join(" ")
}

#[tokio::test]
async fn what_the_queue_has_no_room_for_is_dropped_and_counted() {
    let (traces, _exporter) = traces(1.0);
    let request = request(recorded());
    for _ in 0..QUEUE + 3 {
        traces.ended(&request);
    }
    assert_eq!(dropped(&traces), "queue_full=3 unavailable=0 rejected=0");
    // Nobody takes any; whoever waits for it does not wait for long.
    traces.flush(Duration::from_millis(1)).await;
}

#[tokio::test(start_paused = true)]
async fn spans_for_a_collector_that_is_not_there_are_given_up_after_a_while() {
    let (traces, exporter) = traces(1.0);
    let running = tokio::spawn(exporter.run());
    traces.ended(&request(recorded()));
    traces.ended(&request(None));
    traces.flush(Duration::from_secs(60)).await;
    assert_eq!(dropped(&traces), "queue_full=0 unavailable=1 rejected=0");
    running.abort();
}

/// What it takes to be a connection of a collector.
trait Connection: AsyncRead + AsyncWrite + Unpin + Send {}

impl<T: AsyncRead + AsyncWrite + Unpin + Send> Connection for T {}

/// Reads a request and answers it so; its head.
async fn answered(mut client: Box<dyn Connection>, answer: &str) -> String {
    let mut asked = Vec::new();
    let head = loop {
        let mut some = [0; 4096];
        let n = client.read(&mut some).await.unwrap();
        assert!(n > 0, "the exporter ends its connection");
        asked.extend_from_slice(&some[..n]);
        let text = String::from_utf8_lossy(&asked).to_ascii_lowercase();
        if let Some((head, _)) = text.split_once("\r\n\r\n") {
            break head.to_owned();
        }
    };
    let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")).unwrap();
    let mut left = length.parse::<usize>().unwrap() + head.len() + 4 - asked.len();
    while left > 0 {
        left -= client.read(&mut [0; 4096]).await.unwrap();
    }
    client.write_all(answer.as_bytes()).await.unwrap();
    client.flush().await.unwrap();
    head
}

/// Sends one span to a collector that answers so: what the collector was asked, and what was counted. With TLS, by the roots in
/// this file.
async fn sent(
    answer: &'static str,
    header: TraceHeader,
    tls: Option<(TlsAcceptor, PathBuf)>,
) -> (String, u64, String) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let scheme = if tls.is_some() { "https" } else { "http" };
    let endpoint = format!("{scheme}://{}", listener.local_addr().unwrap());
    let (acceptor, ca) = tls.unzip();
    let settings = TraceSettings { headers: vec![header], ca, ..settings(&endpoint, 0.0) };
    let (traces, exporter) = Traces::new(&settings).unwrap();
    let running = tokio::spawn(exporter.run());
    let collector = tokio::spawn(async move {
        let (socket, _) = listener.accept().await.unwrap();
        let client: Box<dyn Connection> = match acceptor {
            Some(acceptor) => Box::new(acceptor.accept(socket).await.unwrap()),
            None => Box::new(socket),
        };
        answered(client, answer).await
    });
    traces.ended(&request(recorded()));
    traces.flush(Duration::from_secs(10)).await;
    running.abort();
    (collector.await.unwrap(), traces.exported(), dropped(&traces))
}

const TAKEN: &str = "HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n";

fn authorization(value: TraceHeaderValue) -> TraceHeader {
    TraceHeader { name: HeaderName::from_static("authorization"), value }
}

#[tokio::test]
async fn a_collector_is_shown_the_headers_and_its_answer_is_counted() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("token");
    std::fs::write(&file, "Bearer hush\n").unwrap();
    let (head, exported, lost) = sent(TAKEN, authorization(TraceHeaderValue::File(file)), None).await;
    assert!(head.starts_with("post /v1/traces http/1.1\r\n"), "{head}");
    assert!(head.contains("\r\nauthorization: bearer hush"), "{head}");
    assert!(head.contains("\r\ncontent-type: application/x-protobuf"), "{head}");
    assert_eq!((exported, &*lost), (1, "queue_full=0 unavailable=0 rejected=0"));

    let given = authorization(TraceHeaderValue::Given(HeaderValue::from_static("x")));
    // A partial success: one span is not wanted.
    let partial = "HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\n\u{a}\u{2}\u{8}\u{1}";
    let (_, exported, lost) = sent(partial, given.clone(), None).await;
    assert_eq!((exported, &*lost), (0, "queue_full=0 unavailable=0 rejected=1"));
    let refusal = "HTTP/1.1 401 Unauthorized\r\ncontent-length: 0\r\n\r\n";
    let (_, exported, lost) = sent(refusal, given, None).await;
    assert_eq!((exported, &*lost), (0, "queue_full=0 unavailable=0 rejected=1"));
}

#[tokio::test]
async fn a_collector_with_a_certificate_is_believed_by_the_given_roots() {
    let folder = tempfile::tempdir().unwrap();
    let own = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()]).unwrap();
    let roots = folder.path().join("roots.pem");
    std::fs::write(&roots, own.cert.pem()).unwrap();
    let key = PrivateKeyDer::try_from(own.signing_key.serialize_der()).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let server = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![own.cert.der().clone()], key)
        .unwrap();
    let tls = Some((TlsAcceptor::from(Arc::new(server)), roots));
    let given = authorization(TraceHeaderValue::Given(HeaderValue::from_static("x")));
    let (_, exported, lost) = sent(TAKEN, given, tls).await;
    assert_eq!((exported, &*lost), (1, "queue_full=0 unavailable=0 rejected=0"));

    let no_roots = folder.path().join("no-roots.pem");
    std::fs::write(&no_roots, "nothing").unwrap();
    let ca = Some(no_roots.clone());
    let error = Traces::new(&TraceSettings { ca, ..settings("https://127.0.0.1:1", 0.0) }).unwrap_err();
    let expected =
        format!("the roots of the traces' collector: {}: there is no certificate in it", no_roots.display());
    assert_eq!(error.to_string(), expected);
}

/// `cargo test --release -p undermesh --lib -- --ignored --nocapture traces::tests::cost`
#[test]
#[ignore = "a measurement"]
fn cost() {
    const ROUNDS: u32 = 2_000_000;
    let (off, (never, _waiting)) = (Traces::off(), traces(0.0));
    let plain = headers(&[("host", "db"), ("accept", "*/*"), ("user-agent", "a"), ("x-request-id", "b")]);
    let mut came = plain.clone();
    came.extend(headers(&[("traceparent", &format!("00-{TRACE}-{CALLER}-00"))]));
    let cases = [
        ("off", &off, &plain, false),
        ("off, logged", &off, &plain, true),
        ("off, logged, with a context", &off, &came, true),
        ("on, unsampled by the caller", &never, &came, false),
        ("on, unsampled by us", &never, &plain, false),
    ];
    for (what, traces, headers, is_asked_for) in cases {
        let mut headers = headers.clone();
        let began = std::time::Instant::now();
        for _ in 0..ROUNDS {
            let place = std::hint::black_box(traces).place(&headers, is_asked_for);
            if let Some(place) = std::hint::black_box(place) {
                place.pass_on(&mut headers);
                if matches!(place.part, Part::Begun) {
                    headers.remove(&TRACEPARENT);
                }
            }
        }
        println!("{what}: {:.1} ns", began.elapsed().as_nanos() as f64 / f64::from(ROUNDS));
    }
}
