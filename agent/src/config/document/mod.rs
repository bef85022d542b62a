//! The Kubernetes objects that the mesh understands, each read once into the few facts that it needs.
//!
//! Reading never fails over a field of which a safe reading exists: the [`Problem`] is noted and the safe reading
//! taken (an unknown mTLS mode is strict). Only an object that cannot be told from others is refused.

mod authorization;
mod config_map;
#[cfg(test)]
mod crd;
mod endpoint_slice;
mod marks;
mod mesh_policy;
mod namespace;
mod place;
mod pod;
mod policy;
mod probes;
mod reference_grant;
mod route;
mod selector;
mod service;
mod session;

pub use authorization::{Attachment, AuthorizationPolicy};
pub use config_map::ConfigMap;
pub use endpoint_slice::{EndpointSlice, SliceEndpoint, SlicePort};
pub use marks::{Marks, MeshLabel};
pub use mesh_policy::{MeshPolicy, Mtls};
pub use namespace::Namespace;
pub use pod::{ContainerPort, ENROLLED, EnrolledCondition, Pod, Published};
pub use policy::{AuthorityRefs, Policy, PolicySpec, Says, Target, TlsValidation};
pub use reference_grant::ReferenceGrant;
pub use route::{BackendRef, Parent, Reference, Route, RouteRule, RouteSpec, RuleFilters};
pub use selector::Selector;
pub use service::{Service, ServicePort, TargetPort};

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use k8s_openapi::api::{core::v1 as core, discovery::v1 as discovery};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{FieldPath, Problem};
use crate::model::{Name, ObjectRef};
use crate::route::{RouteKind, RouteRef};

/// One object, reduced to what the mesh needs of it.
#[derive(Clone, Debug, PartialEq)]
pub enum Document {
    /// `v1` Namespace.
    Namespace(Arc<Namespace>),
    /// `v1` Service.
    Service(Arc<Service>),
    /// `v1` Pod.
    Pod(Arc<Pod>),
    /// `discovery.k8s.io/v1` EndpointSlice.
    EndpointSlice(Arc<EndpointSlice>),
    /// `v1` ConfigMap.
    ConfigMap(Arc<ConfigMap>),
    /// `gateway.networking.k8s.io` ReferenceGrant.
    ReferenceGrant(Arc<ReferenceGrant>),
    /// A route of `gateway.networking.k8s.io`.
    Route(Arc<Route>),
    /// A policy of Service ports.
    Policy(Arc<Policy>),
    /// `undermesh.io` AuthorizationPolicy.
    AuthorizationPolicy(Arc<AuthorizationPolicy>),
    /// `undermesh.io` MeshPolicy.
    MeshPolicy(Arc<MeshPolicy>),
}

/// The kinds of objects that are read; all others are passed over. In the order in which they are best applied.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Kind {
    /// `v1` Namespace.
    Namespace,
    /// `v1` Service.
    Service,
    /// `v1` Pod.
    Pod,
    /// `discovery.k8s.io/v1` EndpointSlice.
    EndpointSlice,
    /// `v1` ConfigMap, of which an API server is asked by name.
    ConfigMap,
    /// `gateway.networking.k8s.io` ReferenceGrant.
    ReferenceGrant,
    /// `gateway.networking.k8s.io/v1` HTTPRoute.
    #[serde(rename = "HTTPRoute")]
    HttpRoute,
    /// `gateway.networking.k8s.io/v1` GRPCRoute.
    #[serde(rename = "GRPCRoute")]
    GrpcRoute,
    /// `gateway.networking.k8s.io` TLSRoute.
    #[serde(rename = "TLSRoute")]
    TlsRoute,
    /// `gateway.networking.k8s.io` TCPRoute.
    #[serde(rename = "TCPRoute")]
    TcpRoute,
    /// `gateway.networking.x-k8s.io/v1alpha1` XBackendTrafficPolicy.
    #[serde(rename = "XBackendTrafficPolicy")]
    BackendTrafficPolicy,
    /// `gateway.networking.k8s.io` BackendTLSPolicy.
    #[serde(rename = "BackendTLSPolicy")]
    BackendTlsPolicy,
    /// `undermesh.io/v1alpha1` TrafficPolicy.
    TrafficPolicy,
    /// `undermesh.io/v1alpha1` AuthorizationPolicy.
    AuthorizationPolicy,
    /// `undermesh.io/v1alpha1` MeshPolicy.
    MeshPolicy,
}

/// Tells an object from all others. Printed as `Pod shop/web`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Key {
    /// The object's kind.
    pub kind: Kind,
    /// The object's namespace; empty for a Namespace.
    pub namespace: Name,
    /// The object's name.
    pub name: Name,
}

/// A kind that is not Kubernetes' own: an API server has it once somebody has installed it.
#[derive(Clone, Copy, Debug)]
pub struct Custom {
    /// The kind.
    pub kind: Kind,
    /// What its objects are called in paths.
    pub plural: &'static str,
    /// Reads one of them, and adds to the list what is wrong with it.
    pub read: fn(&Value, &mut Vec<Problem>) -> Result<Document, Problem>,
}

impl Custom {
    /// All of them.
    pub const ALL: [Self; 10] = [
        Self { kind: Kind::ReferenceGrant, plural: "referencegrants", read: Document::reference_grant },
        Self { kind: Kind::HttpRoute, plural: "httproutes", read: Document::http_route },
        Self { kind: Kind::GrpcRoute, plural: "grpcroutes", read: Document::grpc_route },
        Self { kind: Kind::TlsRoute, plural: "tlsroutes", read: Document::tls_route },
        Self { kind: Kind::TcpRoute, plural: "tcproutes", read: Document::tcp_route },
        Self {
            kind: Kind::BackendTrafficPolicy,
            plural: "xbackendtrafficpolicies",
            read: Document::backend_traffic_policy,
        },
        Self {
            kind: Kind::BackendTlsPolicy,
            plural: "backendtlspolicies",
            read: Document::backend_tls_policy,
        },
        Self { kind: Kind::TrafficPolicy, plural: "trafficpolicies", read: Document::traffic_policy },
        Self {
            kind: Kind::AuthorizationPolicy,
            plural: "authorizationpolicies",
            read: Document::authorization_policy,
        },
        Self { kind: Kind::MeshPolicy, plural: "meshpolicies", read: Document::mesh_policy },
    ];
}

impl Document {
    /// Which object this is.
    pub fn key(&self) -> Key {
        match self {
            Self::Namespace(it) => Key { kind: Kind::Namespace, namespace: "".into(), name: it.name.clone() },
            Self::Service(it) => Key::of(Kind::Service, &it.id),
            Self::Pod(it) => Key::of(Kind::Pod, &it.id),
            Self::EndpointSlice(it) => Key::of(Kind::EndpointSlice, &it.id),
            Self::ConfigMap(it) => Key::of(Kind::ConfigMap, &it.id),
            Self::ReferenceGrant(it) => Key::of(Kind::ReferenceGrant, &it.id),
            Self::Route(it) => Key::from(&it.id),
            Self::Policy(it) => it.key.clone(),
            Self::AuthorizationPolicy(it) => it.key.clone(),
            Self::MeshPolicy(it) => it.key.clone(),
        }
    }

    /// Which kind of object this is.
    pub fn kind(&self) -> Kind {
        match self {
            Self::Namespace(_) => Kind::Namespace,
            Self::Service(_) => Kind::Service,
            Self::Pod(_) => Kind::Pod,
            Self::EndpointSlice(_) => Kind::EndpointSlice,
            Self::ConfigMap(_) => Kind::ConfigMap,
            Self::ReferenceGrant(_) => Kind::ReferenceGrant,
            Self::Route(it) => it.id.kind.into(),
            Self::Policy(it) => it.key.kind,
            Self::AuthorizationPolicy(_) => Kind::AuthorizationPolicy,
            Self::MeshPolicy(_) => Kind::MeshPolicy,
        }
    }

    /// Reads a Namespace; problems that it survives are added to `problems`.
    pub fn namespace(object: &core::Namespace, problems: &mut Vec<Problem>) -> Result<Self, Problem> {
        Namespace::read(object, problems).map(|it| Self::Namespace(Arc::new(it)))
    }

    /// Reads a Service; problems that it survives are added to `problems`.
    pub fn service(object: &core::Service, problems: &mut Vec<Problem>) -> Result<Self, Problem> {
        Service::read(object, problems).map(|it| Self::Service(Arc::new(it)))
    }

    /// Reads a Pod; problems that it survives are added to `problems`.
    pub fn pod(object: &core::Pod, problems: &mut Vec<Problem>) -> Result<Self, Problem> {
        Pod::read(object, problems).map(|it| Self::Pod(Arc::new(it)))
    }

    /// Reads an EndpointSlice; problems that it survives are added to `problems`.
    pub fn endpoint_slice(
        object: &discovery::EndpointSlice,
        problems: &mut Vec<Problem>,
    ) -> Result<Self, Problem> {
        EndpointSlice::read(object, problems).map(|it| Self::EndpointSlice(Arc::new(it)))
    }

    /// Reads a ConfigMap.
    pub fn config_map(object: &core::ConfigMap) -> Result<Self, Problem> {
        ConfigMap::read(object).map(|it| Self::ConfigMap(Arc::new(it)))
    }

    /// Reads a ReferenceGrant; problems that it survives are added to `problems`.
    pub fn reference_grant(object: &Value, problems: &mut Vec<Problem>) -> Result<Self, Problem> {
        ReferenceGrant::read(object, problems).map(|it| Self::ReferenceGrant(Arc::new(it)))
    }

    /// Reads an HTTPRoute; problems are added to `problems`. One that says anything badly is a document without a spec.
    pub fn http_route(object: &Value, problems: &mut Vec<Problem>) -> Result<Self, Problem> {
        Route::read(RouteKind::Http, object, problems).map(|it| Self::Route(Arc::new(it)))
    }

    /// Reads a GRPCRoute; problems are added to `problems`. One that says anything badly is a document without a spec.
    pub fn grpc_route(object: &Value, problems: &mut Vec<Problem>) -> Result<Self, Problem> {
        Route::read(RouteKind::Grpc, object, problems).map(|it| Self::Route(Arc::new(it)))
    }

    /// Reads a TLSRoute; problems are added to `problems`. One that says anything badly is a document without a spec.
    pub fn tls_route(object: &Value, problems: &mut Vec<Problem>) -> Result<Self, Problem> {
        Route::read(RouteKind::Tls, object, problems).map(|it| Self::Route(Arc::new(it)))
    }

    /// Reads a TCPRoute; problems are added to `problems`. One that says anything badly is a document without a spec.
    pub fn tcp_route(object: &Value, problems: &mut Vec<Problem>) -> Result<Self, Problem> {
        Route::read(RouteKind::Tcp, object, problems).map(|it| Self::Route(Arc::new(it)))
    }

    /// Reads a TrafficPolicy; problems are added to `problems`. One that says anything badly is a document without a spec.
    pub fn traffic_policy(object: &Value, problems: &mut Vec<Problem>) -> Result<Self, Problem> {
        Policy::read(Kind::TrafficPolicy, object, problems).map(|it| Self::Policy(Arc::new(it)))
    }

    /// Reads an XBackendTrafficPolicy; problems are added to `problems`. One that says anything badly is a document without a spec.
    pub fn backend_traffic_policy(object: &Value, problems: &mut Vec<Problem>) -> Result<Self, Problem> {
        Policy::read(Kind::BackendTrafficPolicy, object, problems).map(|it| Self::Policy(Arc::new(it)))
    }

    /// Reads a BackendTLSPolicy; problems are added to `problems`. One that says anything badly is a document that refuses.
    pub fn backend_tls_policy(object: &Value, problems: &mut Vec<Problem>) -> Result<Self, Problem> {
        Policy::read(Kind::BackendTlsPolicy, object, problems).map(|it| Self::Policy(Arc::new(it)))
    }

    /// Reads an AuthorizationPolicy; problems are added to `problems`. One that says anything badly is a document that denies.
    pub fn authorization_policy(object: &Value, problems: &mut Vec<Problem>) -> Result<Self, Problem> {
        AuthorizationPolicy::read(object, problems).map(|it| Self::AuthorizationPolicy(Arc::new(it)))
    }

    /// Reads a MeshPolicy; problems are added to `problems`. One that says anything badly is a document that says nothing.
    pub fn mesh_policy(object: &Value, problems: &mut Vec<Problem>) -> Result<Self, Problem> {
        MeshPolicy::read(object, problems).map(|it| Self::MeshPolicy(Arc::new(it)))
    }

    /// What stands for an object of which nothing can be read but which one it is, and why: something for the kinds that fail
    /// closed.
    pub fn unreadable(key: &Key, why: &str) -> Option<Self> {
        match key.kind {
            Kind::AuthorizationPolicy => {
                Some(Self::AuthorizationPolicy(Arc::new(AuthorizationPolicy::unreadable(key, why))))
            }
            Kind::MeshPolicy => Some(Self::MeshPolicy(Arc::new(MeshPolicy::unreadable(key, why)))),
            _ => None,
        }
    }
}

impl Kind {
    /// All kinds.
    pub const ALL: [Self; 15] = [
        Self::Namespace,
        Self::Service,
        Self::Pod,
        Self::EndpointSlice,
        Self::ConfigMap,
        Self::ReferenceGrant,
        Self::HttpRoute,
        Self::GrpcRoute,
        Self::TlsRoute,
        Self::TcpRoute,
        Self::BackendTrafficPolicy,
        Self::BackendTlsPolicy,
        Self::TrafficPolicy,
        Self::AuthorizationPolicy,
        Self::MeshPolicy,
    ];

    /// Whether all objects of the kind are of interest; of others it is those that something refers to.
    pub fn is_followed_as_a_whole(self) -> bool {
        self != Self::ConfigMap
    }

    /// The `kind` of a manifest.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Namespace => "Namespace",
            Self::Service => "Service",
            Self::Pod => "Pod",
            Self::EndpointSlice => "EndpointSlice",
            Self::ConfigMap => "ConfigMap",
            Self::ReferenceGrant => "ReferenceGrant",
            Self::HttpRoute => "HTTPRoute",
            Self::GrpcRoute => "GRPCRoute",
            Self::TlsRoute => "TLSRoute",
            Self::TcpRoute => "TCPRoute",
            Self::BackendTrafficPolicy => "XBackendTrafficPolicy",
            Self::BackendTlsPolicy => "BackendTLSPolicy",
            Self::TrafficPolicy => "TrafficPolicy",
            Self::AuthorizationPolicy => "AuthorizationPolicy",
            Self::MeshPolicy => "MeshPolicy",
        }
    }

    /// The `apiVersion` that is read; of several, the newest.
    pub fn api_version(self) -> String {
        let (group, version) = (self.group(), self.versions()[0]);
        if group.is_empty() { version.to_owned() } else { format!("{group}/{version}") }
    }

    /// The versions that are read, which all say the same; the newest first.
    pub fn versions(self) -> &'static [&'static str] {
        match self {
            // They are v1 since bundles 1.5 and 1.6, and many a cluster has an older one.
            Self::ReferenceGrant => &["v1", "v1beta1"],
            Self::TlsRoute => &["v1", "v1alpha3", "v1alpha2"],
            Self::TcpRoute => &["v1", "v1alpha2"],
            // Since bundle 1.4.
            Self::BackendTlsPolicy => &["v1", "v1alpha3"],
            Self::BackendTrafficPolicy
            | Self::TrafficPolicy
            | Self::AuthorizationPolicy
            | Self::MeshPolicy => &["v1alpha1"],
            _ => &["v1"],
        }
    }

    /// The API group, empty for the core one.
    pub fn group(self) -> &'static str {
        match self {
            Self::Namespace | Self::Service | Self::Pod | Self::ConfigMap => "",
            Self::EndpointSlice => "discovery.k8s.io",
            Self::ReferenceGrant
            | Self::HttpRoute
            | Self::GrpcRoute
            | Self::TlsRoute
            | Self::TcpRoute
            | Self::BackendTlsPolicy => route::GROUP,
            Self::BackendTrafficPolicy => policy::EXPERIMENTS,
            Self::TrafficPolicy | Self::AuthorizationPolicy | Self::MeshPolicy => policy::GROUP,
        }
    }
}

impl From<RouteKind> for Kind {
    fn from(kind: RouteKind) -> Self {
        match kind {
            RouteKind::Http => Self::HttpRoute,
            RouteKind::Grpc => Self::GrpcRoute,
            RouteKind::Tls => Self::TlsRoute,
            RouteKind::Tcp => Self::TcpRoute,
        }
    }
}

impl Kind {
    /// Which kind of route this is, if it is one.
    pub fn route(self) -> Option<RouteKind> {
        RouteKind::ALL.into_iter().find(|kind| Self::from(*kind) == self)
    }
}

impl From<&RouteRef> for Key {
    fn from(route: &RouteRef) -> Self {
        Self::of(route.kind.into(), &route.id)
    }
}

impl Key {
    /// The object of this kind and name.
    pub fn of(kind: Kind, id: &ObjectRef) -> Self {
        Self { kind, namespace: id.namespace.clone(), name: id.name.clone() }
    }

    /// Namespace and name.
    pub fn id(&self) -> ObjectRef {
        ObjectRef { namespace: self.namespace.clone(), name: self.name.clone() }
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.kind.as_str())?;
        f.write_str(" ")?;
        if !self.namespace.is_empty() {
            write!(f, "{}/", self.namespace)?;
        }
        f.write_str(&self.name)
    }
}

// === What all kinds share ===

/// The namespace of a manifest that names none.
pub const DEFAULT_NAMESPACE: &str = "default";

fn object_name(meta: &ObjectMeta) -> Result<Name, Problem> {
    match meta.name.as_deref() {
        Some(name) if !name.is_empty() => Ok(name.into()),
        _ => Err(Problem::new(FieldPath::new(["metadata", "name"]), "expected the object's name")),
    }
}

fn object_id(meta: &ObjectMeta) -> Result<ObjectRef, Problem> {
    let namespace = non_empty(&meta.namespace).unwrap_or_else(|| DEFAULT_NAMESPACE.into());
    Ok(ObjectRef { namespace, name: object_name(meta)? })
}

fn non_empty(text: &Option<String>) -> Option<Name> {
    text.as_deref().filter(|text| !text.is_empty()).map(Name::from)
}

fn read_address(text: &str, field: FieldPath, problems: &mut Vec<Problem>) -> Option<IpAddr> {
    match text.parse::<IpAddr>() {
        Ok(address) => Some(address.to_canonical()),
        Err(_) => {
            problems.push(Problem::new(field, format!("expected an IP address, found {text:?}")));
            None
        }
    }
}

fn read_port(number: i32, field: FieldPath, problems: &mut Vec<Problem>) -> Option<u16> {
    match u16::try_from(number) {
        Ok(port) if port != 0 => Some(port),
        _ => {
            problems.push(Problem::new(field, format!("expected a port from 1 to 65535, found {number}")));
            None
        }
    }
}

fn is_tcp(protocol: &Option<String>) -> bool {
    protocol.as_deref().unwrap_or("TCP") == "TCP"
}
