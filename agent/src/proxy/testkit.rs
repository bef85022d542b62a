//! For the unit tests of the proxy: Services that are not in any snapshot.

use std::sync::Arc;

use crate::model::{
    Candidates, ObjectRef, Service, ServicePort, SessionAffinity, TrafficDistribution, TrafficScope,
    TrafficSettings,
};

/// The Service `shop/web` with port 80, which is treated like this, and no endpoints.
pub(super) fn service(traffic: TrafficSettings) -> Service {
    Service {
        id: ObjectRef::new("shop", "web"),
        addresses: Vec::new(),
        ports: vec![ServicePort {
            name: "http".into(),
            port: 80,
            app_protocol: None,
            endpoints: Arc::default(),
            candidates: Candidates::default(),
            traffic: Arc::new(traffic),
            load: Default::default(),
        }],
        session_affinity: SessionAffinity::None,
        internal_traffic: TrafficScope::Cluster,
        distribution: TrafficDistribution::Anywhere,
        load: Default::default(),
    }
}
