//! One fetch of keys: a GET over HTTPS. Nothing that we know is shown, and nobody leads us elsewhere.

use std::path::Path;
use std::time::Duration;

use http::header::{ACCEPT, CACHE_CONTROL, ETAG, HeaderMap, HeaderValue, IF_NONE_MATCH, USER_AGENT};
use http::{Request, StatusCode, Uri};
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::body::Bytes;
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use tokio::time::timeout;

use crate::policy::jwt::KeySet;
use crate::sentence::in_one_sentence;
use crate::web_roots;

/// For all of an answer, with the connection.
const LIMIT: Duration = Duration::from_secs(5);

/// What fetches.
#[derive(Clone)]
pub(super) struct Fetcher(Client<HttpsConnector<HttpConnector>, Empty<Bytes>>);

/// What an address has answered.
#[derive(Debug)]
pub(super) enum Answer {
    /// These keys.
    Keys(KeySet, Terms),
    /// Those that it has told before.
    Unchanged(Terms),
}

/// How long an answer is good for.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Terms {
    /// What the address calls it.
    pub(super) tag: Option<HeaderValue>,
    pub(super) max_age: Option<Duration>,
}

impl Fetcher {
    pub(super) fn new(ca: Option<&Path>) -> Result<Self, String> {
        let connector = HttpsConnectorBuilder::new()
            .with_tls_config(web_roots::client(ca)?)
            .https_only()
            .enable_all_versions()
            .build();
        // A connection is of no use for the minutes until the next fetch.
        Ok(Self(Client::builder(TokioExecutor::new()).pool_max_idle_per_host(0).build(connector)))
    }

    /// Fetches the keys, unless they are still those that are called this.
    pub(super) async fn fetch(&self, address: &str, tag: Option<&HeaderValue>) -> Result<Answer, String> {
        let answer = timeout(LIMIT, self.answer(address, tag)).await;
        answer.unwrap_or_else(|_elapsed| Err(format!("no answer within {} s", LIMIT.as_secs())))
    }

    async fn answer(&self, address: &str, tag: Option<&HeaderValue>) -> Result<Answer, String> {
        let uri: Uri = address.parse().map_err(|_| "it is no address".to_owned())?;
        let mut request = Request::new(Empty::new());
        *request.uri_mut() = uri;
        let headers = request.headers_mut();
        headers.insert(ACCEPT, HeaderValue::from_static("application/jwk-set+json, application/json"));
        let agent = concat!("undermesh/", env!("CARGO_PKG_VERSION"));
        headers.insert(USER_AGENT, HeaderValue::from_static(agent));
        if let Some(tag) = tag {
            headers.insert(IF_NONE_MATCH, tag.clone());
        }
        let answer = self.0.request(request).await.map_err(|error| in_one_sentence(&error))?;
        let terms = terms(answer.headers());
        match answer.status() {
            StatusCode::NOT_MODIFIED if tag.is_some() => {
                // It need not say again what it calls them.
                let tag = terms.tag.or_else(|| tag.cloned());
                Ok(Answer::Unchanged(Terms { tag, ..terms }))
            }
            StatusCode::OK => {
                let body = Limited::new(answer.into_body(), KeySet::MOST_BYTES).collect().await;
                let body = body.map_err(|error| in_one_sentence(&*error))?.to_bytes();
                let keys = KeySet::parse(&body).map_err(|error| format!("what it answers is {error}"))?;
                Ok(Answer::Keys(keys, terms))
            }
            status if status.is_redirection() => {
                Err(format!("it answers {status}, and keys are taken from nowhere else"))
            }
            status => Err(format!("it answers {status}")),
        }
    }
}

fn terms(headers: &HeaderMap) -> Terms {
    let directives = headers.get_all(CACHE_CONTROL).iter().filter_map(|value| value.to_str().ok());
    let mut directives = directives.flat_map(|value| value.split(',')).map(str::trim);
    let max_age = directives.find_map(|directive| {
        let (name, seconds) = directive.split_once('=')?;
        let seconds = name.eq_ignore_ascii_case("max-age").then_some(seconds)?;
        seconds.trim_matches('"').parse().ok().map(Duration::from_secs)
    });
    Terms { tag: headers.get(ETAG).cloned(), max_age }
}
