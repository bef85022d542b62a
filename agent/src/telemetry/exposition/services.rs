//! The metrics of Services as destinations of this node. They live with the Service: what is gone is not told of any more.

use std::collections::BTreeSet;
use std::net::SocketAddr;

use super::*;
use crate::model::{Service, ServiceEvent, Standing};

impl Scrape {
    pub(super) fn services(&self, out: &mut Out<'_>) -> fmt::Result {
        let services = || self.snapshot.services.values();
        let mut family = out.counter("undermesh_http_retries", "HTTP requests that were sent again.")?;
        for service in services() {
            let count = service.load.counted(ServiceEvent::Retried);
            if count > 0 {
                counter(&mut family, &labels(service), count)?;
            }
        }

        let help = "HTTP requests that a rule or a Service port would have had sent again and that were not, by why.";
        let mut family = out.counter("undermesh_http_retries_withheld", help)?;
        for service in services() {
            for (event, reason) in [
                (ServiceEvent::RetryBudgetSpent, "budget"),
                (ServiceEvent::RetriedElsewhere, "retried_elsewhere"),
                (ServiceEvent::RetryAfterTooLong, "retry_after"),
                (ServiceEvent::RetriesCapped, "limit"),
            ] {
                let count = service.load.counted(event);
                if count > 0 {
                    let [name, namespace] = labels(service);
                    counter(&mut family, &[name, namespace, ("reason", reason)], count)?;
                }
            }
        }

        let help = "Copies of HTTP requests for a Service that is a mirror, by what became of them.";
        let mut family = out.counter("undermesh_http_mirrored", help)?;
        for service in services() {
            for (event, outcome) in [
                (ServiceEvent::Mirrored, "sent"),
                (ServiceEvent::MirrorDropped, "dropped"),
                (ServiceEvent::MirrorFailed, "failed"),
            ] {
                let count = service.load.counted(event);
                if count > 0 {
                    let [name, namespace] = labels(service);
                    counter(&mut family, &[name, namespace, ("outcome", outcome)], count)?;
                }
            }
        }

        let help =
            "Endpoints that were left alone for a while because they failed what they were sent, by why.";
        let mut family = out.counter("undermesh_http_ejections", help)?;
        for service in services() {
            for (event, reason) in [
                (ServiceEvent::EjectedForServerErrors, "server_errors"),
                (ServiceEvent::EjectedForGatewayFailures, "gateway_failures"),
                (ServiceEvent::EjectedForRefusal, "refused"),
                (ServiceEvent::EjectedForFailedProbe, "failed_probe"),
                (ServiceEvent::EjectedForSuccessRate, "success_rate"),
            ] {
                let count = service.load.counted(event);
                if count > 0 {
                    let [name, namespace] = labels(service);
                    counter(&mut family, &[name, namespace, ("reason", reason)], count)?;
                }
            }
        }

        let mut family = out.gauge("undermesh_endpoints_ejected", "Endpoints that are left alone now.")?;
        for service in services() {
            let addresses: BTreeSet<SocketAddr> = service
                .ports
                .iter()
                .flat_map(|port| port.endpoints.iter())
                .filter(|endpoint| endpoint.load.standing() == Standing::Ejected)
                .map(|endpoint| endpoint.address)
                .collect();
            let was_ever = EJECTIONS.iter().any(|event| service.load.counted(*event) > 0);
            if was_ever || !addresses.is_empty() {
                gauge(&mut family, &labels(service), addresses.len() as u64)?;
            }
        }
        Ok(())
    }
}

/// What shows that the Service's endpoints are worth a gauge.
const EJECTIONS: [ServiceEvent; 5] = [
    ServiceEvent::EjectedForServerErrors,
    ServiceEvent::EjectedForGatewayFailures,
    ServiceEvent::EjectedForRefusal,
    ServiceEvent::EjectedForFailedProbe,
    ServiceEvent::EjectedForSuccessRate,
];

fn labels(service: &Service) -> [Label<'_>; 2] {
    [("destination_service", &*service.id.name), ("destination_service_namespace", &*service.id.namespace)]
}
