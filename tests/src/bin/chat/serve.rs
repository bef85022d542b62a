//! The server. On the wire the four kinds of calls are one: lines each way, and a status.

use std::convert::Infallible;
use std::net::{Ipv6Addr, SocketAddr};
use std::task::{Context, Poll};
use std::time::Duration;

use anyhow::Result;
use clap::Args;
use tokio::sync::mpsc;
use tonic::codegen::{Body, BoxFuture, BoxStream, Service, StdError, http};
use tonic::metadata::MetadataMap;
use tonic::server::{Grpc, NamedService, StreamingService};
use tonic::transport::Server;
use tonic::{Code, Request, Response, Status, Streaming};
use tonic_prost::ProstCodec;

use crate::line::{Line, SERVICE};

#[derive(Args)]
pub struct Serve {
    /// What it calls itself.
    #[arg(long)]
    name: String,
    /// The port to listen on, IPv4 and IPv6.
    #[arg(long, default_value_t = 8080)]
    port: u16,
}

impl Serve {
    pub async fn run(self) -> Result<()> {
        let address = SocketAddr::from((Ipv6Addr::UNSPECIFIED, self.port));
        Ok(Server::builder().add_service(Chat { name: self.name }).serve(address).await?)
    }
}

#[derive(Clone)]
struct Chat {
    name: String,
}

impl NamedService for Chat {
    const NAME: &'static str = SERVICE;
}

impl<B> Service<http::Request<B>> for Chat
where
    B: Body + Send + 'static,
    B::Error: Into<StdError> + Send,
{
    type Response = http::Response<tonic::body::Body>;
    type Error = Infallible;
    type Future = BoxFuture<Self::Response, Infallible>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<B>) -> Self::Future {
        let name = self.name.clone();
        Box::pin(async move {
            let method = match request.uri().path().rsplit('/').next() {
                Some("Say") => Method::Say,
                Some("Read") => Method::Read,
                Some("Write") => Method::Write,
                Some("Talk") => Method::Talk,
                _ => return Ok(Status::unimplemented(format!("{name} has no such method")).into_http()),
            };
            let codec = ProstCodec::<Line, Line>::default();
            Ok(Grpc::new(codec).streaming(Called { method, name }, request).await)
        })
    }
}

#[derive(Clone, Copy)]
enum Method {
    Say,
    Read,
    Write,
    Talk,
}

/// A method that is called.
struct Called {
    method: Method,
    name: String,
}

impl StreamingService<Line> for Called {
    type Response = Line;
    type ResponseStream = BoxStream<Line>;
    type Future = BoxFuture<Response<Self::ResponseStream>, Status>;

    fn call(&mut self, request: Request<Streaming<Line>>) -> Self::Future {
        let Self { method, ref name } = *self;
        let timeout = request.metadata().get("grpc-timeout").and_then(|value| value.to_str().ok());
        let answer =
            Line { server: name.clone(), timeout: timeout.unwrap_or_default().to_owned(), ..Line::default() };
        let mut lines = request.into_inner();
        Box::pin(async move {
            let first = lines.message().await?.unwrap_or_default();
            tokio::time::sleep(Duration::from_millis(first.delay_ms.into())).await;
            let (answers, mut answered) = mpsc::channel(16);
            tokio::spawn(async move {
                let fail = first.fail;
                let end = converse(method, first, lines, &answer, &answers).await;
                // Who is not there any more needs no status.
                match end.map(|()| Code::from(fail as i32)) {
                    Ok(Code::Ok) => {}
                    Ok(code) => _ = answers.send(Err(asked_for(code))).await,
                    Err(status) => _ = answers.send(Err(status)).await,
                }
            });
            let stream: BoxStream<Line> =
                Box::pin(futures_util::stream::poll_fn(move |context| answered.poll_recv(context)));
            Ok(Response::new(stream))
        })
    }
}

async fn converse(
    method: Method,
    first: Line,
    mut lines: Streaming<Line>,
    answer: &Line,
    answers: &mpsc::Sender<Result<Line, Status>>,
) -> Result<(), Status> {
    let say = async |text: String, count| {
        let line = Line { text, count, ..answer.clone() };
        answers.send(Ok(line)).await.map_err(|_| Status::cancelled("nobody listens"))
    };
    match method {
        Method::Say => say(first.text, 1).await?,
        Method::Read => {
            for number in 1..=first.count {
                say(first.text.clone(), number).await?;
            }
        }
        Method::Write => {
            let (mut text, mut count) = (first.text, 1);
            while let Some(line) = lines.message().await? {
                (text, count) = (text + &line.text, count + 1);
            }
            say(text, count).await?;
        }
        Method::Talk => {
            let (mut line, mut count) = (Some(first), 0);
            while let Some(said) = line {
                count += 1;
                say(said.text, count).await?;
                line = lines.message().await?;
            }
        }
    }
    Ok(())
}

/// A status with all that one may have.
fn asked_for(code: Code) -> Status {
    let mut more = MetadataMap::new();
    more.insert("x-why", "as was asked for".parse().expect("a value of text"));
    Status::with_details_and_metadata(code, "100 % of it: ä", vec![0, 1, 255].into(), more)
}
