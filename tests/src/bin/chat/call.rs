//! The client: calls of all four kinds, many at a time on one channel.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::Result;
use clap::Args;
use futures_util::future::join_all;
use futures_util::stream;
use http::uri::PathAndQuery;
use serde_json::json;
use tokio::sync::mpsc;
use tonic::client::Grpc;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status, Streaming};
use tonic_prost::ProstCodec;

use crate::line::{Line, SERVICE};

/// For each call.
const LIMIT: Duration = Duration::from_secs(30);

/// Lines of a call.
const LINES: u32 = 20;

#[derive(Args)]
pub struct Call {
    /// `http://ADDRESS:PORT`.
    url: Endpoint,
    /// Calls of each kind.
    #[arg(long, default_value_t = 1)]
    count: usize,
    /// Letters of each line.
    #[arg(long, default_value_t = 10)]
    letters: usize,
}

impl Call {
    pub async fn run(self) -> Result<()> {
        let channel = self.url.connect().await?;
        let text = "x".repeat(self.letters);
        let calls = (0..self.count).map(|_| async {
            [
                ("Say", said(say(&channel, &text).await)),
                ("Read", said(read(&channel, &text).await)),
                ("Write", said(write(&channel, &text).await)),
                ("Talk", said(talk(&channel, &text).await)),
            ]
        });
        let mut found: BTreeMap<&str, BTreeMap<String, usize>> = BTreeMap::new();
        for (method, outcome) in join_all(calls).await.into_iter().flatten() {
            *found.entry(method).or_default().entry(outcome).or_default() += 1;
        }
        println!("{}", json!(found));
        Ok(())
    }
}

/// What came of a call, in few words: who answered, with how many lines of how many letters, and what the last one counts.
fn said(outcome: Result<Vec<Line>, Status>) -> String {
    match outcome.as_deref() {
        Ok([first, .., last] | [first @ last]) => {
            let lines = outcome.as_deref().map_or(0, <[Line]>::len);
            format!("{}: {lines} of {} letters, {}", first.server, last.text.len(), last.count)
        }
        Ok([]) => "nothing".to_owned(),
        Err(status) => format!("{:?}: {}", status.code(), status.message()),
    }
}

async fn say(channel: &Channel, text: &str) -> Result<Vec<Line>, Status> {
    let line = Line { text: text.to_owned(), ..Line::default() };
    all(call(channel, "Say", stream::iter([line])).await?).await
}

async fn read(channel: &Channel, text: &str) -> Result<Vec<Line>, Status> {
    let line = Line { text: text.to_owned(), count: LINES, ..Line::default() };
    all(call(channel, "Read", stream::iter([line])).await?).await
}

async fn write(channel: &Channel, text: &str) -> Result<Vec<Line>, Status> {
    let line = Line { text: text.to_owned(), ..Line::default() };
    let lines = stream::iter(std::iter::repeat_n(line, LINES as usize));
    all(call(channel, "Write", lines).await?).await
}

/// Says nothing more before it has been answered.
async fn talk(channel: &Channel, text: &str) -> Result<Vec<Line>, Status> {
    let (lines, mut to_say) = mpsc::channel(1);
    let line = Line { text: text.to_owned(), ..Line::default() };
    let gone = |_| Status::internal("the call has ended");
    lines.send(line.clone()).await.map_err(gone)?;
    let mut answers =
        call(channel, "Talk", stream::poll_fn(move |context| to_say.poll_recv(context))).await?;
    let mut heard = Vec::new();
    while let Some(answer) = answers.message().await? {
        heard.push(answer);
        if heard.len() == LINES as usize {
            break;
        }
        lines.send(line.clone()).await.map_err(gone)?;
    }
    drop(lines);
    match answers.message().await? {
        None => Ok(heard),
        Some(_) => Err(Status::internal("more answers than lines")),
    }
}

async fn call(
    channel: &Channel,
    method: &str,
    lines: impl futures_util::Stream<Item = Line> + Send + 'static,
) -> Result<Streaming<Line>, Status> {
    let mut grpc = Grpc::new(channel.clone());
    grpc.ready().await.map_err(|error| Status::unavailable(error.to_string()))?;
    let path = PathAndQuery::try_from(format!("/{SERVICE}/{method}")).expect("names of letters");
    let mut request = Request::new(lines);
    request.set_timeout(LIMIT);
    Ok(grpc.streaming(request, path, ProstCodec::<Line, Line>::default()).await?.into_inner())
}

async fn all(mut answers: Streaming<Line>) -> Result<Vec<Line>, Status> {
    let mut lines = Vec::new();
    while let Some(line) = answers.message().await? {
        lines.push(line);
    }
    Ok(lines)
}
