//! The metrics of HTTP requests.

use super::*;
use crate::telemetry::http::{RequestFigures, RouteLabel};

impl Scrape {
    pub(super) fn requests(&self, out: &mut Out<'_>) -> fmt::Result {
        let help = "HTTP requests that have ended, by what they were and how they ended.";
        let mut family = out.counter("undermesh_http_requests", help)?;
        for series in &self.series {
            for request in series.http.get().map(|http| http.figures()).unwrap_or_default() {
                let labels = (labels(&series.labels), request_labels(&request));
                family.encode_family(&labels)?.encode_counter::<NoLabelSet, _, f64>(&request.count, None)?;
            }
        }

        let mut family =
            out.gauge("undermesh_http_requests_active", "HTTP requests that are under way now.")?;
        for series in &self.series {
            let active = series.active_requests.load(Relaxed);
            if active > 0 || series.http.get().is_some() {
                gauge(&mut family, &labels(&series.labels), active)?;
            }
        }

        let help = "How long HTTP requests took until the end of the answer, by destination and route.";
        let mut family = out.histogram("undermesh_http_request_duration_seconds", help)?;
        for (labels, durations) in &self.request_durations {
            let service = [
                ("destination_service", &*labels.service.name),
                ("destination_service_namespace", &*labels.service.namespace),
            ];
            let route = route_labels(RouteLabel::values(labels.route.as_ref()));
            let labels = (destination_labels(&labels.destination), (service, route));
            histogram(&mut family, &labels, durations)?;
        }

        let help = "How large the bodies of HTTP requests were, by destination.";
        let mut family = out.histogram("undermesh_http_request_bytes", help)?;
        for (labels, sizes) in &self.request_sizes {
            histogram(&mut family, &destination_labels(labels), &sizes.request)?;
        }

        let help = "How large the bodies of the answers to HTTP requests were, by destination.";
        let mut family = out.histogram("undermesh_http_response_bytes", help)?;
        for (labels, sizes) in &self.request_sizes {
            histogram(&mut family, &destination_labels(labels), &sizes.response)?;
        }
        Ok(())
    }
}

fn request_labels<'a>(request: &'a RequestFigures<'_>) -> ([Label<'a>; 3], ([Label<'a>; 4], [Label<'a>; 1])) {
    let answer = [
        ("method", request.method),
        ("response_code", &*request.response_code),
        ("grpc_status", &*request.grpc_status),
    ];
    (answer, (route_labels(request.route), [("reason", request.reason)]))
}

fn route_labels([kind, namespace, name, rule]: [&str; 4]) -> [Label<'_>; 4] {
    [("route_kind", kind), ("route_name", name), ("route_namespace", namespace), ("route_rule", rule)]
}
