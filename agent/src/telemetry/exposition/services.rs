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
        self.service_events(
            out.counter("undermesh_http_retries_withheld", help)?,
            "reason",
            &[
                (ServiceEvent::RetryBudgetSpent, "budget"),
                (ServiceEvent::RetriedElsewhere, "retried_elsewhere"),
                (ServiceEvent::RetryAfterTooLong, "retry_after"),
                (ServiceEvent::RetriesCapped, "limit"),
            ],
        )?;

        let help = "Copies of HTTP requests for a Service that is a mirror, by what became of them.";
        self.service_events(
            out.counter("undermesh_http_mirrored", help)?,
            "outcome",
            &[
                (ServiceEvent::Mirrored, "sent"),
                (ServiceEvent::MirrorDropped, "dropped"),
                (ServiceEvent::MirrorFailed, "failed"),
            ],
        )?;

        let help =
            "Endpoints that were left alone for a while because they failed what they were sent, by why.";
        self.service_events(
            out.counter("undermesh_http_ejections", help)?,
            "reason",
            &[
                (ServiceEvent::EjectedForServerErrors, "server_errors"),
                (ServiceEvent::EjectedForGatewayFailures, "gateway_failures"),
                (ServiceEvent::EjectedForRefusal, "refused"),
                (ServiceEvent::EjectedForFailedProbe, "failed_probe"),
                (ServiceEvent::EjectedForSuccessRate, "success_rate"),
            ],
        )?;

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

    /// How often each of these has happened at each Service, where it has.
    fn service_events(
        &self,
        mut family: MetricEncoder<'_>,
        label: &'static str,
        events: &[(ServiceEvent, &str)],
    ) -> fmt::Result {
        for service in self.snapshot.services.values() {
            for (event, value) in events {
                let count = service.load.counted(*event);
                if count > 0 {
                    let [name, namespace] = labels(service);
                    counter(&mut family, &[name, namespace, (label, value)], count)?;
                }
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
