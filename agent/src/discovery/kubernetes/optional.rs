//! Kinds that an API server may not have: those of the Gateway API, and our own, are there once somebody has installed them.

use futures_util::StreamExt as _;
use kube::Client;
use serde_json::Value;

use super::watch::news;
use super::{Tell, WatchFailed};
use crate::config::{Document, Kind, Problem};
use crate::kubernetes;

/// A kind that may be missing.
#[derive(Clone, Copy, Debug)]
pub(super) struct Optional {
    pub(super) kind: Kind,
    pub(super) plural: &'static str,
    pub(super) read: fn(&Value, &mut Vec<Problem>) -> Result<Document, Problem>,
}

/// The kinds that the mesh reads and that are not Kubernetes' own.
pub(super) const ALL: [Optional; 7] = [
    Optional { kind: Kind::ReferenceGrant, plural: "referencegrants", read: Document::reference_grant },
    Optional { kind: Kind::HttpRoute, plural: "httproutes", read: Document::http_route },
    Optional { kind: Kind::GrpcRoute, plural: "grpcroutes", read: Document::grpc_route },
    Optional { kind: Kind::TlsRoute, plural: "tlsroutes", read: Document::tls_route },
    Optional { kind: Kind::TcpRoute, plural: "tcproutes", read: Document::tcp_route },
    Optional {
        kind: Kind::BackendTrafficPolicy,
        plural: "xbackendtrafficpolicies",
        read: Document::backend_traffic_policy,
    },
    Optional { kind: Kind::TrafficPolicy, plural: "trafficpolicies", read: Document::traffic_policy },
];

impl Optional {
    /// Tells of the objects of the kind, and of none where the API server does not have it. Ends when nobody listens.
    pub(super) async fn follow(self, client: Client, tell: Tell, failed: WatchFailed) {
        let Self { kind, plural, read } = self;
        let optional = kubernetes::Optional {
            group: kind.group(),
            versions: kind.versions(),
            kind: kind.as_str(),
            plural,
        };
        let mut events = std::pin::pin!(optional.follow(client));
        while let Some(event) = events.next().await {
            let Ok(event) = event else {
                failed(plural);
                continue;
            };
            let news = news(event, kind, |object, problems| {
                // What has come as JSON goes back into it.
                read(&serde_json::to_value(object).unwrap_or_default(), problems)
            });
            if tell.send(news).await.is_err() {
                return;
            }
        }
    }
}
