//! The endpoints that one request is sent to, one after the other, and what each is known by afterwards: how it did, and how long it took.
//!
//! How long an endpoint takes is never what its client takes: while that is still to say more of the request, nothing is held against it.

use std::fmt::Display;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use http::{Request, Response, StatusCode};
use hyper::body::Incoming;

use super::answer::Refusal;
use super::body::{RequestBody, Upload};
use super::hashed;
use super::send::Way;
use super::talk::Talk;
use crate::balance::latency;
use crate::balance::outlier::Verdict;
use crate::model::{LoadGuard, ServiceLoad, ServicePort};
use crate::proxy::reach::{Attempts, InTheWay, Unreached};
use crate::telemetry::{RefuseReason, RequestEnd};

/// Dropped while one of them is being tried, it was given up.
pub(super) struct Endpoints<'a> {
    of: Of<'a>,
    /// What the client has said of the request.
    upload: Arc<Upload>,
    /// When the one was chosen that is being tried.
    chosen: Instant,
}

enum Of<'a> {
    /// There is one, and what became of it.
    Pod(SocketAddr, Option<InTheWay>),
    Service {
        attempts: Attempts<'a>,
        kept: Option<SocketAddr>,
    },
}

impl<'a> Endpoints<'a> {
    pub(super) fn of(talk: &'a Talk, way: Way<'a>, request: &Request<RequestBody>) -> Self {
        let of = match way {
            Way::Pod(address) => Of::Pod(address, None),
            Way::Service { service, port, kept } => {
                let client = talk.captured.client.ip();
                let dialled = SocketAddr::new(talk.captured.dialled.ip(), port);
                let hash = service.port(port).and_then(|port| hashed::hash(port, client, request));
                let attempts = Attempts::for_request(&talk.proxy, service, client, dialled, hash);
                Of::Service { attempts, kept }
            }
        };
        Self { of, upload: request.body().upload().clone(), chosen: Instant::now() }
    }

    /// The one to try, and its part of the load; else why there is none.
    pub(super) fn next(&mut self) -> Result<(SocketAddr, Option<LoadGuard>), Refusal> {
        self.chosen = Instant::now();
        match &mut self.of {
            Of::Pod(address, None) => Ok((*address, None)),
            Of::Pod(address, Some(why)) => {
                Err(Refusal::unreached(why.reason, why.detail.as_deref(), address))
            }
            Of::Service { attempts, kept } => {
                let next =
                    kept.take().and_then(|kept| attempts.kept(kept)).map_or_else(|| attempts.next(), Ok);
                match next {
                    Ok((address, load)) => Ok((address, Some(load))),
                    // What has been tried says more.
                    Err(unreached) if attempts.is_full() && unreached.tried.is_none() => {
                        let service = &attempts.service().id;
                        let most =
                            attempts.port().and_then(|port| port.traffic.caps.pending).unwrap_or_default();
                        let detail = format!("{service}: {most} requests wait for each endpoint");
                        Err(Refusal::new(RequestEnd::Overloaded, detail))
                    }
                    Err(Unreached { reason: RefuseReason::Overloaded, .. }) => {
                        let (service, caps) =
                            (&attempts.service().id, attempts.port().map(|port| port.traffic.caps));
                        let most = caps.and_then(|caps| caps.connections).unwrap_or_default();
                        let detail = format!("{service}: {most} connections are open, as many as may be");
                        Err(Refusal::new(RequestEnd::Overloaded, detail))
                    }
                    Err(unreached) => {
                        let towards: &dyn Display = match &unreached.tried {
                            Some(address) => address,
                            None => &attempts.service().id,
                        };
                        Err(Refusal::unreached(unreached.reason, unreached.detail.as_deref(), towards))
                    }
                }
            }
        }
    }

    /// Nothing was sent: the next one may do better.
    pub(super) fn failed(&mut self, endpoint: SocketAddr, why: InTheWay) {
        match &mut self.of {
            Of::Pod(_, failed) => *failed = Some(why),
            Of::Service { attempts, .. } => attempts.failed(endpoint, why),
        }
    }

    /// It was sent then, this is what came of it, and what that says of the endpoint. One that says that it has too much to do says so
    /// fast.
    pub(super) fn answered(
        &mut self,
        asked: Option<Instant>,
        answer: &Result<Response<Incoming>, Refusal>,
        verdict: Verdict,
    ) {
        let waited = asked.and_then(|asked| self.upload.waited_behind(asked));
        let Of::Service { attempts, .. } = &mut self.of else { return };
        let is_overloaded = answer.as_ref().map_or(true, |response| {
            matches!(response.status(), StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE)
        });
        let least = is_overloaded.then_some(latency::OVERLOADED);
        if let Some(took) = waited.max(least) {
            attempts.took(took);
        }
        attempts.judge(verdict);
    }

    /// There was no answer within the time that the request is given.
    pub(super) fn was_too_slow(&mut self) {
        let waited = self.upload.waited_behind(self.chosen);
        match (&mut self.of, waited) {
            (Of::Service { attempts, .. }, Some(waited)) => {
                attempts.took(waited.max(latency::OVERLOADED));
                attempts.judge(Verdict::GatewayFailure);
            }
            _ => self.no_verdict(),
        }
    }

    /// Nobody waits for the one that is being tried any more. That is not its doing, and says how long it takes at least.
    pub(super) fn gave_up(&mut self) {
        let waited = self.upload.waited_behind(self.chosen);
        match (&mut self.of, waited) {
            (Of::Service { attempts, .. }, Some(waited)) => attempts.gave_up(waited),
            _ => self.no_verdict(),
        }
    }

    /// Whether the client is still to say more of the request, and all that it has said is on its way.
    pub(super) fn wait_for_client(&self) -> bool {
        self.upload.is_awaited()
    }

    /// What became of it is not the endpoint's doing.
    pub(super) fn no_verdict(&mut self) {
        if let Of::Service { attempts, .. } = &mut self.of {
            attempts.no_verdict();
        }
    }

    /// What is known of the Service that they are of, and its port.
    pub(super) fn port(&self) -> Option<(&'a ServiceLoad, &'a ServicePort)> {
        match &self.of {
            Of::Pod(..) => None,
            Of::Service { attempts, .. } => Some((&attempts.service().load, attempts.port()?)),
        }
    }

    /// The request is to be sent again: to another one, if there is another.
    pub(super) fn avoid(&mut self, endpoint: SocketAddr) {
        if let Of::Service { attempts, .. } = &mut self.of {
            attempts.avoid(endpoint);
        }
    }
}

impl Drop for Endpoints<'_> {
    fn drop(&mut self) {
        self.gave_up();
    }
}
