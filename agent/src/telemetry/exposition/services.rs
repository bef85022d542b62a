//! The metrics of Services as destinations of this node. They live with the Service: what is gone is not told of any more.

use super::*;
use crate::model::{Service, ServiceEvent};

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

        let help = "HTTP requests that a rule would have had sent again and that were not, by why.";
        let mut family = out.counter("undermesh_http_retries_withheld", help)?;
        for service in services() {
            for (event, reason) in [
                (ServiceEvent::RetryBudgetSpent, "budget"),
                (ServiceEvent::RetriedElsewhere, "retried_elsewhere"),
                (ServiceEvent::RetryAfterTooLong, "retry_after"),
            ] {
                let count = service.load.counted(event);
                if count > 0 {
                    let [name, namespace] = labels(service);
                    counter(&mut family, &[name, namespace, ("reason", reason)], count)?;
                }
            }
        }
        Ok(())
    }
}

fn labels(service: &Service) -> [Label<'_>; 2] {
    [("destination_service", &*service.id.name), ("destination_service_namespace", &*service.id.namespace)]
}
