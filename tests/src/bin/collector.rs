//! A collector of traces for the end-to-end tests: takes OTLP over gRPC and HTTP on one port, and says a line of JSON of each span.

use std::convert::Infallible;
use std::net::SocketAddr;

use anyhow::{Context as _, Result};
use clap::Parser;
use data_encoding::HEXLOWER;
use http::{HeaderMap, Method, Request, Response, StatusCode};
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto::Builder;
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{
    TraceService, TraceServiceServer,
};
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use opentelemetry_proto::tonic::common::v1::{KeyValue, any_value::Value};
use opentelemetry_proto::tonic::trace::v1::{Span, span::SpanKind};
use prost::Message as _;
use serde_json::json;
use tokio::net::TcpListener;
use tonic::Status;
use tonic::body::Body;
use tonic::codegen::Service as _;

#[derive(Parser)]
#[command(about = "A collector that says what spans it gets")]
struct Collector {
    /// Where to listen.
    #[arg(long)]
    address: SocketAddr,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<()> {
    let Collector { address } = Collector::parse();
    let listener = TcpListener::bind(address).await.context("listening")?;
    println!("listening");
    loop {
        let (stream, _) = listener.accept().await?;
        tokio::spawn(async move {
            // How an agent ends its connection is for the agent to tell.
            let _ = Builder::new(TokioExecutor::new())
                .serve_connection(TokioIo::new(stream), service_fn(answer))
                .await;
        });
    }
}

async fn answer(request: Request<Incoming>) -> Result<Response<Body>, Infallible> {
    let kind = request.headers().get("content-type").and_then(|kind| kind.to_str().ok()).unwrap_or_default();
    if kind.starts_with("application/grpc") {
        return TraceServiceServer::new(ByGrpc).call(request).await;
    }
    let is_meant = request.method() == Method::POST
        && request.uri().path() == "/v1/traces"
        && kind == "application/x-protobuf";
    let headers = request.headers().clone();
    let body = request.into_body().collect().await.map(|body| body.to_bytes());
    let spans = body.ok().and_then(|body| ExportTraceServiceRequest::decode(body).ok());
    let mut response = Response::new(Body::default());
    match spans.filter(|_| is_meant) {
        Some(spans) => say("http", &headers, spans),
        None => *response.status_mut() = StatusCode::BAD_REQUEST,
    }
    Ok(response)
}

struct ByGrpc;

#[tonic::async_trait]
impl TraceService for ByGrpc {
    async fn export(
        &self,
        request: tonic::Request<ExportTraceServiceRequest>,
    ) -> Result<tonic::Response<ExportTraceServiceResponse>, Status> {
        let headers = request.metadata().clone().into_headers();
        say("grpc", &headers, request.into_inner());
        Ok(tonic::Response::new(ExportTraceServiceResponse::default()))
    }
}

fn say(protocol: &str, headers: &HeaderMap, request: ExportTraceServiceRequest) {
    let authorization = headers.get("authorization").and_then(|value| value.to_str().ok());
    for of_resource in request.resource_spans {
        let resource = attributes(&of_resource.resource.unwrap_or_default().attributes);
        for span in of_resource.scope_spans.iter().flat_map(|scope| &scope.spans) {
            let Span { trace_id, span_id, parent_span_id, trace_state, name, .. } = span;
            let said = json!({
                "protocol": protocol,
                "authorization": authorization,
                "resource": resource,
                "trace": HEXLOWER.encode(trace_id),
                "id": HEXLOWER.encode(span_id),
                "parent": HEXLOWER.encode(parent_span_id),
                "state": trace_state,
                "name": name,
                "kind": SpanKind::try_from(span.kind).map(|kind| kind.as_str_name()).unwrap_or("?"),
                "failed": span.status.as_ref().is_some_and(|status| status.code == 2),
                "took_ns": span.end_time_unix_nano.saturating_sub(span.start_time_unix_nano),
                "attributes": attributes(&span.attributes),
            });
            println!("{said}");
        }
    }
}

fn attributes(all: &[KeyValue]) -> serde_json::Value {
    let read = |KeyValue { key, value, .. }: &KeyValue| {
        let value = match value.as_ref().and_then(|value| value.value.as_ref()) {
            Some(Value::StringValue(text)) => json!(text),
            Some(Value::IntValue(number)) => json!(number),
            other => json!(format!("{other:?}")),
        };
        (key.clone(), value)
    };
    serde_json::Value::Object(all.iter().map(read).collect())
}
