//! What the agent says of itself, put into the words of telemetry.

use std::collections::HashMap;
use std::sync::Arc;

use imbl::ordmap::DiffItem;
use tracing::warn;

use crate::capture::{Capture, CaptureError, Counters, Part, PodCounters, PodNet};
use crate::config;
use crate::discovery::kubernetes::{Announcer, Condition};
use crate::identity::{self, Danger, Radar, SpiffeId};
use crate::jwks::{Jwks, Reading};
use crate::model::{Opened, Probers, Workload, WorkloadUid};
use crate::telemetry::{
    self, CertificateFigures, CertificateLifetime, IssuerKeyFigures, KernelCounters, NotEnrolledReason,
    PodReport, PodState, PodTcp, Status, Telemetry,
};

/// Whoever is told how the pods of this node stand.
pub(super) struct Reporters {
    /// The agent's own endpoints.
    pub(super) status: Arc<Status>,
    /// The API server, where it is the source.
    pub(super) announcer: Option<Announcer>,
}

impl Reporters {
    /// How a pod stands that is to be in the mesh.
    pub(super) fn pod(&self, workload: &Workload, state: PodState) {
        if let Some(announcer) = &self.announcer {
            let probers = self.status.probers().filter(|_| workload.shields_probed_ports());
            announcer.condition(&workload.uid, &workload.pod, condition(&state, probers.as_ref()));
        }
        self.status.set_pod(workload.uid.clone(), PodReport { pod: workload.pod.clone(), state });
    }

    /// Which of the pods that are in the mesh have certificates in danger, or probes that are not the kubelet's alone: the API server is
    /// told when that changes.
    pub(super) fn dangers<'a>(
        &self,
        enrolled: impl Iterator<Item = &'a Workload>,
        dangers: &HashMap<SpiffeId, Danger>,
        probers: Option<&Probers>,
    ) {
        if let Some(probers) = probers {
            self.status.set_probers(probers.clone());
        }
        if let Some(announcer) = &self.announcer {
            announcer.conditions(enrolled.map(|pod| {
                let danger = pod.identity.as_ref().and_then(|identity| dangers.get(identity));
                let probers = probers.filter(|_| pod.shields_probed_ports());
                (&pod.uid, &pod.pod, in_mesh(danger, probers))
            }));
        }
    }

    /// The pod will be in the mesh in a moment: nothing to tell the API server.
    pub(super) fn pending(&self, workload: &Workload) {
        let report = PodReport { pod: workload.pod.clone(), state: PodState::Pending };
        self.status.set_pod(workload.uid.clone(), report);
    }

    /// The pod asks for the mesh and cannot be in it, which the snapshot says as well.
    pub(super) fn impossible(&self, workload: &Workload, detail: &str) {
        if let Some(announcer) = &self.announcer {
            let state =
                PodState::NotEnrolled { reason: NotEnrolledReason::Impossible, detail: detail.to_owned() };
            announcer.condition(&workload.uid, &workload.pod, condition(&state, None));
        }
    }

    /// The pod does not ask for the mesh any more.
    pub(super) fn left(&self, workload: &Workload) {
        if let Some(announcer) = &self.announcer {
            let message = "the pod, or its namespace, does not ask for the mesh any more".into();
            let left = Condition { is_enrolled: false, reason: "Left".into(), message };
            announcer.condition(&workload.uid, &workload.pod, left);
        }
    }

    /// The pod is not to be in the mesh now, or has gone. True if anything was known of it.
    pub(super) fn forget(&self, uid: &WorkloadUid) -> bool {
        self.status.remove_pod(uid).is_some()
    }
}

fn condition(state: &PodState, probers: Option<&Probers>) -> Condition {
    match state {
        PodState::Enrolled { .. } => in_mesh(None, probers),
        PodState::Pending => Condition {
            is_enrolled: false,
            reason: "Pending".into(),
            message: "the pod is being enrolled".into(),
        },
        PodState::NotEnrolled { reason, detail } => {
            Condition { is_enrolled: false, reason: camel_case(reason.as_str()), message: detail.clone() }
        }
    }
}

/// `probers` are those of its probes, where these matter. Of several troubles the reason is the certificate's.
fn in_mesh(danger: Option<&Danger>, probers: Option<&Probers>) -> Condition {
    let of_certificate = danger.map(|Danger { is_expired, text }| {
        (if *is_expired { "CertificateExpired" } else { "CertificateExpires" }, text.clone())
    });
    let of_probes = probers.and_then(|probers| probers.reason().zip(probers.trouble()));
    let (mut reason, mut message) = ("Enrolled", "the pod is in the mesh".to_owned());
    for (of_trouble, text) in of_probes.into_iter().chain(of_certificate) {
        reason = of_trouble;
        message = format!("{message}; {text}");
    }
    Condition { is_enrolled: true, reason: reason.into(), message }
}

/// `netns_unavailable` as Kubernetes spells reasons.
fn camel_case(name: &str) -> String {
    let word = |word: &str| {
        let mut letters = word.chars();
        letters
            .next()
            .map_or_else(String::new, |first| first.to_ascii_uppercase().to_string() + letters.as_str())
    };
    name.split('_').map(word).collect()
}

/// Has the kernel's counters read whenever the metrics are.
pub(super) fn kernel_counters_at_scrape(telemetry: &Arc<Telemetry>, capture: &Capture) -> anyhow::Result<()> {
    let counters = capture.counters()?;
    let (enrolled, earlier) = (capture.enrolled(), capture.earlier());
    telemetry.on_scrape(move |telemetry| {
        let pods: HashMap<u64, Arc<PodNet>> =
            enrolled.load().values().map(|net| (net.cookie, net.clone())).collect();
        let open: HashMap<u64, usize> =
            earlier.open().iter().map(|(net, open)| (net.cookie, open.len())).collect();
        telemetry.set_kernel_counters(kernel_counters(&counters, &open, pods.values()));
    });
    Ok(())
}

/// Has the certificates looked at whenever the metrics are scraped or somebody asks whether the agent is ready: what
/// is told is never older than the question.
pub(super) fn certificates(telemetry: &Arc<Telemetry>, radar: &Arc<Radar>) {
    let at_scrape = radar.clone();
    telemetry.on_scrape(move |telemetry| telemetry.set_certificates(certificate_figures(at_scrape.read())));
    let radar = radar.clone();
    telemetry.status().on_missing(move || radar.missing());
}

/// Has the keys of tokens looked at whenever the metrics are scraped.
pub(super) fn keys_at_scrape(telemetry: &Arc<Telemetry>, jwks: &Arc<Jwks>) {
    let jwks = jwks.clone();
    telemetry.on_scrape(move |telemetry| {
        let Reading { fetches, ages } = jwks.read();
        telemetry.set_issuer_keys(IssuerKeyFigures {
            fetches: fetches.iter().map(|(result, count)| (result.as_str(), *count)).collect(),
            ages: ages.into_iter().map(|(uri, age)| (uri, age.as_secs_f64())).collect(),
        });
    });
}

fn certificate_figures(reading: identity::Reading) -> CertificateFigures {
    let lifetimes = reading.lifetimes.into_iter().map(|lifetime| CertificateLifetime {
        kind: lifetime.kind.as_str(),
        identity: lifetime.identity,
        expires: lifetime.expires,
        remaining: lifetime.remaining,
    });
    let lags = reading.lags.iter().map(|lag| (lag.identity.to_string(), lag.lag.as_secs_f64()));
    let lives = reading.lives.iter().map(|life| (life.identity.to_string(), life.share));
    CertificateFigures {
        lifetimes: lifetimes.collect(),
        renewal_lags: lags.collect(),
        lives_left: lives.collect(),
        renewals: reading.renewals.iter().map(|(result, count)| (result.as_str(), *count)).collect(),
        clock_skew: reading.clock_skew.unwrap_or_default().as_secs_f64(),
    }
}

fn kernel_counters<'a>(
    counters: &PodCounters,
    before_enrolment: &HashMap<u64, usize>,
    pods: impl Iterator<Item = &'a Arc<PodNet>>,
) -> KernelCounters {
    let total = counters.total();
    KernelCounters {
        bypassed: vec![
            ("agent_down", total.bypassed_agent_down),
            ("inbound_agent_down", total.inbound_bypassed_agent_down),
            ("inner_netns", total.bypassed_inner_netns),
            ("other_interface", total.bypassed_interface),
        ],
        refused: vec![
            ("agent_down", total.refused_agent_down),
            ("inbound_agent_down", total.inbound_refused_agent_down),
            ("inner_netns", total.refused_inner_netns),
            ("plaintext", total.inbound_refused_strict),
            ("not_probed", total.inbound_refused_unprobed),
            ("listener_dial", total.refused_listener_dial),
            ("interface", total.refused_interface),
        ],
        pods: pods
            .map(|net| PodTcp {
                before_enrolment: before_enrolment.get(&net.cookie).map_or(0, |count| *count as u64),
                ..pod_tcp(net, &counters.of(net.cookie))
            })
            .collect(),
    }
}

fn pod_tcp(net: &PodNet, counters: &Counters) -> PodTcp {
    PodTcp {
        pod: net.pod.clone(),
        retransmits: counters.tcp_retransmits,
        timeouts: counters.tcp_timeouts,
        connected: counters.tcp_active_opens,
        accepted: counters.tcp_passive_opens,
        before_enrolment: 0,
    }
}

/// What kind of obstacle an error is, for the metric.
pub(super) fn obstacle(error: &CaptureError) -> NotEnrolledReason {
    match error {
        CaptureError::Step { part: Part::Netns, .. } => NotEnrolledReason::NetnsUnavailable,
        CaptureError::Step { part: Part::Cgroup, .. } => NotEnrolledReason::CgroupUnavailable,
        CaptureError::Step { part: Part::Listeners, .. } => NotEnrolledReason::ListenFailed,
        CaptureError::Step { part: Part::Links, .. } | CaptureError::Load(_) | CaptureError::Map { .. } => {
            NotEnrolledReason::AttachFailed
        }
        CaptureError::Step { part: Part::Workers, .. } | CaptureError::Preflight(_) => {
            NotEnrolledReason::Internal
        }
    }
}

/// Tells of a pod that is wanted here and takes plaintext where it refused it, or comes with that where its namespace or the mesh refuse
/// it: whoever wanted that knows, and whoever did not is to hear of it.
pub(super) fn opened(
    telemetry: &Telemetry,
    change: &DiffItem<'_, '_, WorkloadUid, Arc<Workload>>,
    is_wanted: impl Fn(&Workload) -> bool,
) {
    let (before, now) = match change {
        DiffItem::Add(_, now) => (None, now),
        DiffItem::Update { old: (_, before), new: (_, now) } => (Some(before), now),
        DiffItem::Remove(..) => return,
    };
    if !is_wanted(now) {
        return;
    }
    let (opened, refused) = match before.filter(|before| is_wanted(before)) {
        Some(before) => (now.opened_since(before), "which was refused before"),
        None => (now.mtls_opened.clone(), "which its namespace, the mesh or the agent's own setting refuses"),
    };
    if let Some(opened) = opened {
        tell_opened(telemetry, now, &opened, refused);
    }
}

/// Tells of what takes plaintext that refused it under an earlier agent, however that came about while no agent watched.
pub(super) fn inherited(telemetry: &Telemetry, now: &Workload, opened: Option<&Opened>) {
    // Of what is more open than it should be it was told when the pod came.
    if let Some(opened) = opened.filter(|opened| now.mtls_opened.as_ref() != Some(opened)) {
        tell_opened(telemetry, now, opened, "which was refused before this agent began");
    }
}

fn tell_opened(telemetry: &Telemetry, now: &Workload, opened: &Opened, refused: &str) {
    let by: Vec<String> = now.mtls_by.iter().map(ToString::to_string).collect();
    let by = match by.is_empty() {
        true => "no policy and no annotation, hence the agent's own setting".to_owned(),
        false => by.join(" and "),
    };
    telemetry.mtls_downgraded();
    match opened {
        Opened::Pod => warn!(pod = %now.pod, by, "the pod takes plaintext, {refused}"),
        Opened::Ports(ports) => {
            warn!(pod = %now.pod, ?ports, by, "ports of the pod take plaintext, {refused}")
        }
    }
}

/// Logs what is rejected anew, and reports all that is.
pub(super) fn rejections(status: &Status, rejections: &[config::Rejection]) {
    let reports: Vec<_> = rejections.iter().map(rejection_report).collect();
    let before = status.rejections();
    for (rejection, _) in rejections.iter().zip(&reports).filter(|(_, report)| !before.contains(report)) {
        warn!(%rejection, "rejected");
    }
    status.set_rejections(reports);
}

fn rejection_report(rejection: &config::Rejection) -> telemetry::Rejection {
    let field = rejection.field.to_string();
    telemetry::Rejection {
        origin: rejection.file.display().to_string(),
        line: rejection.position.map(|position| position.line.into()),
        object: rejection.object.as_ref().map(ToString::to_string),
        field: (!field.is_empty()).then_some(field),
        message: rejection.message.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(Condition { is_enrolled, reason, message }: Condition) -> String {
        format!("{is_enrolled} {reason}: {message}")
    }

    #[test]
    fn probes_that_are_not_the_kubelets_alone_are_told_of_and_certificates_go_before_them() {
        let node = Probers::Node("there is none".into());
        assert_eq!(
            told(in_mesh(None, Some(&node))),
            "true ProbesOpenToNode: the pod is in the mesh; whoever is on the node's own network is let in to pods at the ports of \
             their probes, for the kubelet is not told from others: there is none"
        );
        let danger = Danger { is_expired: true, text: "it ended".into() };
        assert_eq!(
            told(in_mesh(Some(&danger), Some(&Probers::Nobody("there is none".into())))),
            "true CertificateExpired: the pod is in the mesh; pods that take no plaintext or have policies fail their probes, for \
             the kubelet is not told from others: there is none; it ended"
        );
    }

    #[test]
    fn a_certificate_in_danger_leaves_its_pod_in_the_mesh() {
        let told = |danger: Option<bool>| {
            let danger = danger.map(|is_expired| Danger { is_expired, text: "it ends".into() });
            told(in_mesh(danger.as_ref(), Some(&Probers::Kubelet)))
        };
        assert_eq!(told(None), "true Enrolled: the pod is in the mesh");
        assert_eq!(told(Some(false)), "true CertificateExpires: the pod is in the mesh; it ends");
        assert_eq!(told(Some(true)), "true CertificateExpired: the pod is in the mesh; it ends");
    }
}
