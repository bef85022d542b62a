//! The requests of one label set, by what they were: found without a lock and without allocating, bounded in number.

use std::borrow::Cow;
use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, OnceLock};

use super::{HttpRequest, RouteLabel};
use crate::model::ObjectRef;
use crate::telemetry::RequestEnd;
use crate::telemetry::histogram::{BODY_SIZES, Histogram, REQUEST_DURATIONS};
use crate::telemetry::series::{DestinationLabels, OTHER, SeriesLabels, WorkloadName};
use crate::telemetry::shared::Shared;

/// The label value of what a request does not have: a rule, an answer.
const NONE: &str = "none";

/// A few dozen kinds of requests are many between two workloads: most chains have one link.
const BUCKETS: usize = 32;

/// The last status that gRPC knows (UNAUTHENTICATED). A server may say any number, and each would be a series.
const LAST_GRPC_STATUS: u16 = 16;

/// What all label sets have in common.
#[derive(Debug)]
pub(in crate::telemetry) struct HttpSet {
    hasher: RandomState,
    /// Kinds of requests in all label sets, and the most there may be.
    count: AtomicUsize,
    max: usize,
    durations: Shared<DurationLabels, Histogram>,
    sizes: Shared<DestinationLabels, Sizes>,
}

/// The requests of one label set: a table that only grows, so that whoever looks something up needs no lock. It goes
/// with its label set.
#[derive(Debug)]
pub(in crate::telemetry) struct HttpSeries {
    buckets: [Link; BUCKETS],
    /// Places that it holds of the maximum.
    held: AtomicUsize,
    /// What found no place.
    beyond: OnceLock<Counted>,
    sizes: Arc<Sizes>,
}

type Link = OnceLock<Box<Node>>;

#[derive(Debug)]
struct Node {
    route: Option<RouteLabel>,
    kind: RequestKind,
    counted: Counted,
    next: Link,
}

/// What is counted of requests of one kind.
#[derive(Debug)]
struct Counted {
    count: AtomicU64,
    durations: Arc<Histogram>,
}

/// How large the bodies of a destination's requests and answers are.
#[derive(Debug)]
pub(in crate::telemetry) struct Sizes {
    pub(in crate::telemetry) request: Histogram,
    pub(in crate::telemetry) response: Histogram,
}

/// The labels of how long requests took.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(in crate::telemetry) struct DurationLabels {
    pub(in crate::telemetry) destination: DestinationLabels,
    pub(in crate::telemetry) service: WorkloadName,
    pub(in crate::telemetry) route: Option<RouteLabel>,
}

/// What tells requests of one rule apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct RequestKind {
    method: Method,
    status: Option<u16>,
    grpc_status: Option<u16>,
    end: RequestEnd,
}

/// The methods that have names: a client may invent more, and each would be a series.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Method {
    Get,
    Head,
    Post,
    Put,
    Patch,
    Delete,
    Options,
    Connect,
    Trace,
    Other,
}

/// One sample of the requests of a label set.
#[derive(Debug)]
pub(in crate::telemetry) struct RequestFigures<'a> {
    /// The values of `route_kind`, `route_namespace`, `route_name` and `route_rule`.
    pub(in crate::telemetry) route: [&'a str; 4],
    pub(in crate::telemetry) method: &'static str,
    pub(in crate::telemetry) response_code: Cow<'static, str>,
    pub(in crate::telemetry) grpc_status: Cow<'static, str>,
    pub(in crate::telemetry) reason: &'static str,
    pub(in crate::telemetry) count: u64,
}

impl HttpSet {
    pub(in crate::telemetry) fn new(max: usize) -> Self {
        Self {
            hasher: RandomState::new(),
            count: AtomicUsize::new(0),
            max,
            durations: Shared::default(),
            sizes: Shared::default(),
        }
    }

    /// Of the requests of the label set; nothing has been counted yet.
    pub(in crate::telemetry) fn series_of(&self, labels: &SeriesLabels) -> HttpSeries {
        let destination = labels.destination();
        let other = destination.folded();
        let sizes = || Sizes { request: Histogram::new(BODY_SIZES), response: Histogram::new(BODY_SIZES) };
        HttpSeries {
            buckets: Default::default(),
            held: AtomicUsize::new(0),
            beyond: OnceLock::new(),
            sizes: self.sizes.get_bounded(destination, self.tenth(), other, sizes),
        }
    }

    /// The label set is retired: the places of its requests are free again.
    pub(in crate::telemetry) fn retired(&self, series: &mut HttpSeries) {
        self.count.fetch_sub(std::mem::take(series.held.get_mut()), Relaxed);
    }

    /// Forgets what no label set has any more.
    pub(in crate::telemetry) fn sweep(&self) {
        self.durations.sweep();
        self.sizes.sweep();
    }

    /// How long requests took, ordered by their labels.
    pub(in crate::telemetry) fn durations(&self) -> Vec<(DurationLabels, Arc<Histogram>)> {
        self.durations.all()
    }

    /// How large they were, ordered by their labels.
    pub(in crate::telemetry) fn sizes(&self) -> Vec<(DestinationLabels, Arc<Sizes>)> {
        self.sizes.all()
    }

    /// No pair of workloads takes all the places: its server may answer with a thousand codes. Nor are there so many
    /// histograms, for each is some twenty series.
    fn tenth(&self) -> usize {
        self.max.div_ceil(10)
    }

    fn durations_of(&self, labels: &SeriesLabels, route: Option<&RouteLabel>) -> Arc<Histogram> {
        let destination = labels.destination();
        let wanted = DurationLabels {
            destination: destination.clone(),
            service: labels.service.clone(),
            route: route.cloned(),
        };
        let other = DurationLabels {
            destination: destination.folded(),
            service: WorkloadName::other(),
            route: Some(RouteLabel::other()),
        };
        self.durations.get_bounded(wanted, self.tenth(), other, || Histogram::new(REQUEST_DURATIONS))
    }
}

impl HttpSeries {
    /// Counts the request; says whether it found a place of its own.
    pub(in crate::telemetry) fn count(
        &self,
        set: &HttpSet,
        labels: &SeriesLabels,
        request: &HttpRequest,
    ) -> bool {
        self.sizes.request.observe(request.request_bytes);
        self.sizes.response.observe(request.response_bytes);
        let found = self.find_or_make(set, labels, request);
        let counted = found.unwrap_or_else(|| {
            self.beyond.get_or_init(|| Counted::new(set.durations_of(labels, Some(&RouteLabel::other()))))
        });
        counted.durations.observe_duration(request.duration);
        counted.count.fetch_add(1, Relaxed);
        found.is_some()
    }

    /// What has been counted, in the order of its labels.
    pub(in crate::telemetry) fn figures(&self) -> Vec<RequestFigures<'_>> {
        let mut nodes: Vec<&Node> = Vec::new();
        for bucket in &self.buckets {
            let mut link = bucket;
            while let Some(node) = link.get() {
                nodes.push(node);
                link = &node.next;
            }
        }
        nodes.sort_unstable_by(|a, b| (&a.route, a.kind).cmp(&(&b.route, b.kind)));
        let beyond = self.beyond.get().map(|counted| RequestFigures {
            route: [OTHER; 4],
            method: OTHER,
            response_code: OTHER.into(),
            grpc_status: OTHER.into(),
            reason: OTHER,
            count: counted.count.load(Relaxed),
        });
        nodes.into_iter().map(Node::figures).chain(beyond).collect()
    }

    /// `None` where there are too many.
    fn find_or_make(&self, set: &HttpSet, labels: &SeriesLabels, request: &HttpRequest) -> Option<&Counted> {
        let kind = RequestKind::of(request);
        let hash = set.hasher.hash_one((kind, &request.route));
        let mut link = &self.buckets[hash as usize % BUCKETS];
        let mut holds_place = false;
        let found = loop {
            if let Some(node) = link.get() {
                if node.kind == kind && node.route == request.route {
                    break Some(node);
                }
                link = &node.next;
                continue;
            }
            if !holds_place && !self.try_hold(set) {
                break None;
            }
            holds_place = true;
            let mut made = false;
            let node = link.get_or_init(|| {
                made = true;
                let durations = set.durations_of(labels, request.route.as_ref());
                let (route, counted) = (request.route.clone(), Counted::new(durations));
                Box::new(Node { route, kind, counted, next: Link::new() })
            });
            if made {
                return Some(&node.counted);
            }
            // Another thread has put its own there, which may be the same.
        };
        if holds_place {
            self.give_back(set);
        }
        found.map(|node| &node.counted)
    }

    fn try_hold(&self, set: &HttpSet) -> bool {
        let below = |max: usize| move |count: usize| (count < max).then_some(count + 1);
        if self.held.try_update(Relaxed, Relaxed, below(set.tenth())).is_err() {
            return false;
        }
        let held = set.count.try_update(Relaxed, Relaxed, below(set.max)).is_ok();
        if !held {
            self.held.fetch_sub(1, Relaxed);
        }
        held
    }

    fn give_back(&self, set: &HttpSet) {
        self.held.fetch_sub(1, Relaxed);
        set.count.fetch_sub(1, Relaxed);
    }
}

impl Counted {
    fn new(durations: Arc<Histogram>) -> Self {
        Self { count: AtomicU64::new(0), durations }
    }
}

impl Node {
    fn figures(&self) -> RequestFigures<'_> {
        let grpc_status = match self.kind.grpc_status {
            // Prometheus takes a label without a value for none, which is what most requests have.
            None => "".into(),
            Some(status) if status > LAST_GRPC_STATUS => OTHER.into(),
            Some(status) => status.to_string().into(),
        };
        RequestFigures {
            route: RouteLabel::values(self.route.as_ref()),
            method: self.kind.method.as_str(),
            response_code: self.kind.status.map_or(NONE.into(), |status| format!("{status:03}").into()),
            grpc_status,
            reason: self.kind.end.as_str(),
            count: self.counted.count.load(Relaxed),
        }
    }
}

impl RouteLabel {
    /// The values of `route_kind`, `route_namespace`, `route_name` and `route_rule`.
    pub(in crate::telemetry) fn values(route: Option<&Self>) -> [&str; 4] {
        route.map_or([NONE; 4], |route| [route.kind, &route.id.namespace, &route.id.name, &route.rule])
    }

    fn other() -> Self {
        Self { kind: OTHER, id: ObjectRef::new(OTHER, OTHER), rule: OTHER.into() }
    }
}

impl RequestKind {
    fn of(request: &HttpRequest) -> Self {
        Self {
            method: Method::of(&request.method),
            status: request.status,
            grpc_status: request.grpc_status.map(|status| status.min(LAST_GRPC_STATUS + 1)),
            end: request.end,
        }
    }
}

/// Whether the method is one of those that have names.
pub(in crate::telemetry) fn is_named(method: &http::Method) -> bool {
    Method::of(method) != Method::Other
}

impl Method {
    fn of(method: &http::Method) -> Self {
        match *method {
            http::Method::GET => Self::Get,
            http::Method::HEAD => Self::Head,
            http::Method::POST => Self::Post,
            http::Method::PUT => Self::Put,
            http::Method::PATCH => Self::Patch,
            http::Method::DELETE => Self::Delete,
            http::Method::OPTIONS => Self::Options,
            http::Method::CONNECT => Self::Connect,
            http::Method::TRACE => Self::Trace,
            _ => Self::Other,
        }
    }

    fn as_str(self) -> &'static str {
        match self {
            Self::Get => "GET",
            Self::Head => "HEAD",
            Self::Post => "POST",
            Self::Put => "PUT",
            Self::Patch => "PATCH",
            Self::Delete => "DELETE",
            Self::Options => "OPTIONS",
            Self::Connect => "CONNECT",
            Self::Trace => "TRACE",
            Self::Other => OTHER,
        }
    }
}
