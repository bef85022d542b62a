//! Whom nothing is heard of is given up: an API server that lost its power, or the way to it, closes no connection, and whoever
//! waits for it would wait for as long as TCP does.
//!
//! API servers tell every watch about once a minute how far it is, so a live one is silent for longer only where a kind has not changed
//! since the watch began, and the store says nothing of its progress either. That is why a watch is not failed but ended: it is taken
//! up again where it was, and the question that comes before that ([`super::resume`]) tells a quiet kind from an API server that is
//! gone. That costs an API server nothing more for all kinds of which it tells; to ask for shorter watches would make it answer
//! thousands of agents four times as often for all of them.

use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt as _;
use futures_util::stream::{self, BoxStream};
use http::{Request, Response};
use http_body::Frame;
use http_body_util::{BodyExt as _, StreamBody};
use kube::Client;
use kube::client::Body;
use tokio::time::timeout;

/// Between two signs of life. API servers give one a minute, and up to a minute to a list.
const SILENCE: Duration = Duration::from_secs(75);

/// Nothing was heard.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("nothing was heard of it for {} s", SILENCE.as_secs())]
struct Silent;

/// An answer that ends when nothing more is heard.
pub(super) type Heard = StreamBody<BoxStream<'static, kube::Result<Frame<Bytes>>>>;

/// Sends the request. Of an answer that breaks off with silence a watch ends, and anything else fails.
pub(super) async fn send(
    client: &Client,
    request: Request<Body>,
    is_watch: bool,
) -> kube::Result<Response<Heard>> {
    let answer = timeout(SILENCE, client.send(request)).await;
    let (head, body) = answer.map_err(|_| silent())??.into_parts();
    let frames = stream::unfold(Some(body), move |body| async move {
        let mut body = body?;
        match timeout(SILENCE, body.frame()).await {
            Ok(frame) => Some((frame?, Some(body))),
            Err(_) if is_watch => None,
            Err(_) => Some((Err(silent()), None)),
        }
    });
    Ok(Response::from_parts(head, StreamBody::new(frames.boxed())))
}

/// An answer of our own.
pub(super) fn said(text: String) -> Heard {
    StreamBody::new(stream::iter([Ok(Frame::data(Bytes::from(text)))]).boxed())
}

fn silent() -> kube::Error {
    kube::Error::Service(Box::new(Silent))
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::sync::atomic::Ordering;

    use k8s_openapi::api::core::v1::Pod;
    use kube::Api;
    use kube::runtime::watcher::{self, Error, Event};
    use serde_json::{Value, json};
    use tokio::time::{Instant, sleep};

    use super::super::follow;
    use super::super::testkit::{FakeApi, failure};
    use super::*;

    fn answer(query: &str) -> Option<(u16, Value)> {
        match query {
            _ if query.contains("sendInitialEvents") => failure(422, "Invalid"),
            _ if query.contains("watch=true") => None,
            _ => {
                Some((200, json!({ "kind": "PodList", "metadata": { "resourceVersion": "7" }, "items": [] })))
            }
        }
    }

    /// What is heard of pods until then: when, and what.
    async fn heard(api: &FakeApi, until: Duration) -> Vec<(u64, &'static str)> {
        let (since, heard) = (Instant::now(), Mutex::new(Vec::new()));
        let listen = follow(Api::<Pod>::all(api.client()), watcher::Config::default(), "pods");
        let listen = listen.for_each(async |event| {
            let what = match event {
                Ok(Event::Init) => "init",
                Ok(Event::InitDone) => "done",
                Err(Error::WatchStartFailed(_)) => "no watch",
                Err(Error::InitialListFailed(_)) => "no list",
                other => panic!("{other:?}"),
            };
            heard.lock().unwrap().push((since.elapsed().as_secs(), what));
        });
        _ = timeout(until, listen).await;
        heard.into_inner().unwrap()
    }

    fn watches(api: &FakeApi) -> usize {
        api.asked.lock().unwrap().iter().filter(|it| it.query.ends_with("resourceVersion=7")).count()
    }

    /// A kind that does not change: its watch is taken up again, and nothing has failed.
    #[tokio::test(start_paused = true)]
    async fn a_watch_that_is_quiet_is_taken_up_again() {
        let api = FakeApi::new(|question| answer(&question.query));
        assert_eq!(heard(&api, SILENCE * 3 + Duration::from_secs(1)).await, [(0, "init"), (0, "done")]);
        assert_eq!(watches(&api), 4);
    }

    /// Its connections stay open, and nothing comes by them any more.
    #[tokio::test(start_paused = true)]
    async fn an_api_server_that_falls_silent_is_noticed_and_gone_back_to() {
        let api = FakeApi::new(|question| answer(&question.query));
        let falls_silent = async {
            sleep(Duration::from_secs(10)).await;
            api.is_silent.store(true, Ordering::SeqCst);
            sleep(Duration::from_secs(90)).await;
            api.is_silent.store(false, Ordering::SeqCst);
        };
        let (heard, ()) = tokio::join!(heard(&api, Duration::from_secs(140)), falls_silent);
        // After the silence two questions are not answered.
        assert_eq!(heard[..3], [(0, "init"), (0, "done"), (85, "no watch")]);
        assert!(heard[3..].iter().all(|(at, what)| *at <= 110 && *what == "no watch"), "{heard:?}");
        assert_eq!(watches(&api), 2);
    }

    /// Nor is there an end to it where it was never heard of.
    #[tokio::test(start_paused = true)]
    async fn a_list_that_does_not_come_has_failed() {
        let api = FakeApi::new(|question| answer(&question.query));
        api.is_silent.store(true, Ordering::SeqCst);
        assert_eq!(heard(&api, SILENCE + Duration::from_secs(1)).await, [(75, "no watch")]);
    }
}
