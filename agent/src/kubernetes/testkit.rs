//! An API server in the same process, for tests.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};

use bytes::Bytes;
use futures_util::StreamExt as _;
use futures_util::stream::{self, BoxStream};
use http_body::Frame;
use http_body_util::StreamBody;
use kube::Client;
use kube::client::Body;
use serde_json::{Value, json};
use tonic::codegen::{BoxFuture, Service};

use super::resume;

/// A question to the API server.
#[derive(Clone, Debug)]
pub(crate) struct Question {
    pub(crate) method: String,
    pub(crate) path: String,
    pub(crate) query: String,
    pub(crate) body: Value,
}

/// What it answers: a status code and a body, in lines where it is a list, plain where it is a text; none: it never answers, or if it
/// is asked to watch, says that it does and tells nothing.
pub(crate) type Answer = Option<(u16, Value)>;

type Frames = BoxStream<'static, Result<Frame<Bytes>, std::io::Error>>;

type Answers = dyn Fn(&Question) -> Answer + Send + Sync;

/// An API server that does what a test says.
#[derive(Clone)]
pub(crate) struct FakeApi {
    answers: Arc<Answers>,
    /// Its revision, as whoever goes on with a watch is told it.
    pub(crate) revision: Arc<AtomicU64>,
    /// It takes what is asked and says nothing, whatever it is.
    pub(crate) is_silent: Arc<AtomicBool>,
    /// What it was asked beside that.
    pub(crate) asked: Arc<Mutex<Vec<Question>>>,
}

impl FakeApi {
    pub(crate) fn new(answers: impl Fn(&Question) -> Answer + Send + Sync + 'static) -> Self {
        let revision = Arc::new(AtomicU64::new(1_000_000));
        Self { answers: Arc::new(answers), revision, is_silent: Arc::default(), asked: Arc::default() }
    }

    pub(crate) fn client(&self) -> Client {
        resume::checked(Client::new(self.clone(), "default"))
    }

    fn answer(&self, question: &Question) -> Answer {
        if resume::is_about_revision(&question.path, &question.query) {
            let revision = self.revision.load(Ordering::SeqCst).to_string();
            return Some((200, json!({ "metadata": { "resourceVersion": revision }, "items": [] })));
        }
        self.asked.lock().unwrap().push(question.clone());
        (self.answers)(question)
    }
}

impl Service<http::Request<Body>> for FakeApi {
    type Response = http::Response<StreamBody<Frames>>;
    type Error = std::io::Error;
    type Future = BoxFuture<Self::Response, Self::Error>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let this = self.clone();
        Box::pin(async move {
            let (head, body) = request.into_parts();
            let body = body.collect_bytes().await.unwrap_or_default();
            let question = Question {
                method: head.method.to_string(),
                path: head.uri.path().to_owned(),
                query: head.uri.query().unwrap_or_default().to_owned(),
                body: serde_json::from_slice(&body).unwrap_or_default(),
            };
            if this.is_silent.load(Ordering::SeqCst) {
                return std::future::pending().await;
            }
            match this.answer(&question) {
                Some((status, body)) => {
                    let body = match &body {
                        Value::Array(lines) => lines.iter().map(|line| format!("{line}\n")).collect(),
                        Value::String(text) => text.clone(),
                        one => one.to_string(),
                    };
                    let body = stream::iter([Ok(Frame::data(Bytes::from(body)))]).boxed();
                    Ok(http::Response::builder().status(status).body(StreamBody::new(body)).unwrap())
                }
                None if question.query.contains("watch=true") => {
                    Ok(http::Response::new(StreamBody::new(stream::pending().boxed())))
                }
                None => std::future::pending().await,
            }
        })
    }
}

/// What an API server says to what it does not want.
pub(crate) fn failure(code: u16, reason: &str) -> Answer {
    let status = json!({
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
        "message": format!("{reason}, says the API server"), "reason": reason, "code": code,
    });
    Some((code, status))
}

/// What it says of an object that it would have if there were one.
pub(crate) fn no_such(plural: &str, name: &str) -> Answer {
    let (code, mut status) = failure(404, "NotFound")?;
    status["details"] = json!({ "name": name, "kind": plural });
    Some((code, status))
}
