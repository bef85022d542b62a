//! The client's node: where something would go.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use ::http::Request;

use super::{Asked, ClientAnswer, ClientSide, EndpointView, Stopped, WayView};
use crate::capture::PodNet;
use crate::model::{ObjectRef, Service, Workload};
use crate::proxy::{Proxy, captured, http, reach};
use crate::route::{Backend, Rule, Table};
use crate::snapshot::{Destination, Snapshot};
use crate::telemetry::Security;

pub(super) fn answer(
    proxy: &Proxy,
    snapshot: &Snapshot,
    from: Option<&ObjectRef>,
    to: &str,
    asked: Option<Asked>,
) -> Result<ClientAnswer, String> {
    let node = proxy.node();
    let caller = match from.map(|from| caller(proxy, snapshot, from)) {
        None => Caller::Outside { name: "outside".into(), addresses: Vec::new() },
        Some(Ok(caller)) => caller,
        Some(Err(elsewhere)) => return Ok(ClientAnswer { node, client: None, elsewhere: Some(elsewhere) }),
    };
    let goal = Goal::of(snapshot, to)?;
    let client = Journey { proxy, snapshot, caller, goal }.explain(asked)?;
    Ok(ClientAnswer { node, client: Some(client), elsewhere: None })
}

/// Who calls.
enum Caller {
    /// An enrolled pod of this node.
    Pod(Arc<PodNet>),
    /// Whoever is not in the mesh.
    Outside { name: String, addresses: Vec<IpAddr> },
}

/// The pod of this name, or one of those that are replicas of it; else why this node does not know.
fn caller(proxy: &Proxy, snapshot: &Snapshot, from: &ObjectRef) -> Result<Caller, String> {
    let here = proxy.enrolled.load();
    let net = here.values().find(|net| net.pod == *from);
    if let Some(net) = net.or_else(|| here.values().find(|net| net.workload.replica_of() == *from)) {
        return Ok(Caller::Pod(net.clone()));
    }
    let Some(pod) = pod(snapshot, from) else { return Err(format!("there is no pod or workload {from}")) };
    let name = pod.pod.to_string();
    if !pod.enrolment.is_wanted() {
        return Ok(Caller::Outside { name, addresses: pod.addresses.clone() });
    }
    Err(match &pod.node {
        Some(node) if **node != *proxy.node() => format!("pod {name} is on node {node}"),
        _ => format!("pod {name} is not enrolled yet"),
    })
}

fn pod<'s>(snapshot: &'s Snapshot, name: &ObjectRef) -> Option<&'s Arc<Workload>> {
    let of_name = snapshot.workloads.values().find(|pod| pod.pod == *name);
    of_name.or_else(|| snapshot.workloads.values().find(|pod| pod.replica_of() == *name))
}

/// What is called.
struct Goal<'s> {
    service: Option<&'s Service>,
    dialled: SocketAddr,
    told: String,
}

impl<'s> Goal<'s> {
    fn of(snapshot: &'s Snapshot, to: &str) -> Result<Self, String> {
        if let Ok(dialled) = to.parse::<SocketAddr>() {
            return match snapshot.destination(dialled.ip()) {
                Some(Destination::Service(service)) => Self::service(service, dialled),
                Some(Destination::Workload(pod)) => Ok(Self::pod(pod, dialled)),
                None => Ok(Self { service: None, dialled, told: dialled.to_string() }),
            };
        }
        let bad = || format!("to: expected namespace/name:port or an address and a port, found {to:?}");
        let (name, port) = to.rsplit_once(':').ok_or_else(bad)?;
        let port: u16 = port.parse().map_err(|_| bad())?;
        let name = super::object(name).map_err(|why| format!("to: {why}"))?;
        if let Some(service) = snapshot.services.get(&name)
            && let Some(address) = service.addresses.first()
        {
            return Self::service(service, SocketAddr::new(*address, port));
        }
        let pod = pod(snapshot, &name)
            .ok_or_else(|| format!("to: there is no Service with a cluster IP, pod or workload {name}"))?;
        let address = pod.addresses.first().ok_or_else(|| format!("to: pod {} has no address", pod.pod))?;
        Ok(Self::pod(pod, SocketAddr::new(*address, port)))
    }

    fn service(service: &'s Service, dialled: SocketAddr) -> Result<Self, String> {
        let port = dialled.port();
        if service.port(port).is_none() {
            let ports: Vec<_> = service.ports.iter().map(|port| port.port.to_string()).collect();
            return Err(format!(
                "to: Service {} has no port {port}; it has {}",
                service.id,
                ports.join(", ")
            ));
        }
        Ok(Self { service: Some(service), dialled, told: told(service, port) })
    }

    fn pod(pod: &Workload, dialled: SocketAddr) -> Self {
        Self { service: None, dialled, told: format!("pod {}, port {}", pod.pod, dialled.port()) }
    }

    /// What clients ask for who say nothing else.
    fn host(&self) -> String {
        let port = self.dialled.port();
        match self.service {
            Some(Service { id, .. }) if port == 80 => format!("{}.{}", id.name, id.namespace),
            Some(Service { id, .. }) => format!("{}.{}:{port}", id.name, id.namespace),
            None => self.dialled.to_string(),
        }
    }
}

fn told(service: &Service, port: u16) -> String {
    format!("Service {}, port {port}", service.id)
}

/// From the caller to what it calls.
struct Journey<'s> {
    proxy: &'s Proxy,
    snapshot: &'s Snapshot,
    caller: Caller,
    goal: Goal<'s>,
}

impl Journey<'_> {
    fn explain(self, asked: Option<Asked>) -> Result<ClientSide, String> {
        let Self { snapshot, goal, .. } = &self;
        let request = asked.map(|asked| asked.request(Some(&goal.host()))).transpose()?;
        let (caller, identity, addresses) = match &self.caller {
            Caller::Pod(net) => {
                let identity = net.workload.identity.as_ref().map(ToString::to_string);
                (net.pod.to_string(), identity, net.addresses.clone())
            }
            Caller::Outside { name, addresses } => (name.clone(), None, addresses.clone()),
        };
        let mut side = ClientSide {
            caller,
            identity,
            addresses,
            target: goal.told.clone(),
            route: String::new(),
            rule: None,
            never: Vec::new(),
            stopped: None,
            ways: Vec::new(),
        };
        match &self.caller {
            Caller::Outside { .. } => {
                side.route = "the caller is not in the mesh: no route is for it".into();
                side.ways = vec![self.dialled((goal.service, goal.dialled.port()), request.as_ref())];
            }
            Caller::Pod(_) if !snapshot.captured.contains(&goal.dialled.ip()) => {
                side.route = "nothing of the mesh is behind this address: it is called past the mesh".into();
                side.ways = vec![self.dialled((goal.service, goal.dialled.port()), request.as_ref())];
            }
            Caller::Pod(net) => self.by_route(net, &mut side, request.as_ref()),
        }
        Ok(side)
    }

    /// As the proxy takes it, see `carriage` and `http::forward`.
    fn by_route(&self, net: &PodNet, side: &mut ClientSide, request: Option<&Request<()>>) {
        let Self { snapshot, goal, .. } = self;
        // A pod that is dialled may be taken for its Service.
        let front = goal.service.is_none().then(|| captured::front(snapshot, net, goal.dialled)).flatten();
        let of_front =
            front.as_ref().and_then(|front| Some((snapshot.services.get(&front.service)?, front.port)));
        let (service, port) = match of_front {
            Some((service, port)) => {
                side.target = format!("{}, for it is {}", side.target, told(service, port));
                (Some(&**service), port)
            }
            None => (goal.service, goal.dialled.port()),
        };
        let namespace = &net.workload.pod.namespace;
        let routes = service.and_then(|service| snapshot.routes.get(&service.id)?.of_port(port, namespace));
        let dialled = |request| vec![self.dialled((service, port), request)];
        match (routes.map(|routes| &routes.table), request) {
            (None, request) => {
                side.route = "no route is about it: it goes where it was sent".into();
                side.ways = dialled(request);
            }
            (Some(Table::Http(table)), request) => {
                let hidden = table.hidden().into_iter();
                let never = |(rule, by): (&Arc<Rule>, &Arc<Rule>)| {
                    format!("{} never takes a request: {} takes all that it matches", named(rule), named(by))
                };
                side.never = hidden.map(never).collect();
                match request {
                    Some(request) => self.request(side, (service, port), namespace, request),
                    None => {
                        side.route =
                            "routes go by what is asked for; what is no HTTP goes where it was sent".into();
                        side.ways = dialled(None);
                    }
                }
            }
            (Some(Table::Tls(table)), request) => {
                let host = request.and_then(|it| it.headers().get(::http::header::HOST)?.to_str().ok());
                let host = host.map_or_else(|| goal.host(), ToOwned::to_owned);
                let name = host.split(':').next().unwrap_or_default();
                match table.find(Some(name)) {
                    Some(rule) => self.connection(side, rule, &format!("TLS that asks for {name}")),
                    None => side.stop(format!("no rule is for TLS that asks for {name}")),
                }
            }
            (Some(Table::Tcp(rule)), _) => self.connection(side, rule, "every connection"),
        }
    }

    fn request(
        &self,
        side: &mut ClientSide,
        (service, port): (Option<&Service>, u16),
        namespace: &str,
        request: &Request<()>,
    ) {
        match http::routed(self.snapshot, (service, port), namespace, request) {
            // Routes for HTTP are there, so one of them says something.
            Ok(None) => side.stop("the routes have just changed; ask again".into()),
            Err(why) => side.stop(why),
            Ok(Some(http::Routed { matched, own_answer, sent })) => {
                side.rule = Some(named(matched.rule));
                side.route = format!("{} fits", named(matched.rule));
                if let Some(why) = own_answer {
                    side.stopped = Some(Stopped { is_refused: false, why });
                    return;
                }
                side.ways = sent
                    .into_iter()
                    .filter(|(backend, _)| backend.weight > 0)
                    .map(|(backend, request)| self.backend(backend, Some(request)))
                    .collect();
                side.stop_without_ways();
            }
        }
    }

    fn connection(&self, side: &mut ClientSide, rule: &Arc<Rule>, what: &str) {
        side.rule = Some(named(rule));
        side.route = format!("{} is for {what}", named(rule));
        let backends = rule.backends.iter().filter(|backend| backend.weight > 0);
        side.ways = backends.map(|backend| self.backend(backend, None)).collect();
        side.stop_without_ways();
    }

    fn backend(&self, backend: &Backend, request: Option<Result<Request<()>, String>>) -> WayView {
        let nowhere = |problem| WayView {
            backend: "none".into(),
            weight: backend.weight,
            problem: Some(problem),
            request: None,
            endpoints: Vec::new(),
        };
        match (self.snapshot.backend(&backend.target), request.transpose()) {
            (Err(why), _) => nowhere(why.to_string()),
            (_, Err(why)) => nowhere(why),
            (Ok((service, port)), Ok(request)) => {
                let way = self.dialled((Some(service), port), request.as_ref());
                WayView { weight: backend.weight, ..way }
            }
        }
    }

    /// To a Service's endpoints, or to the very address.
    fn dialled(&self, (service, port): (Option<&Service>, u16), request: Option<&Request<()>>) -> WayView {
        let dialled = self.goal.dialled;
        let (backend, endpoints) = match service {
            Some(service) => (told(service, port), self.endpoints(service, port)),
            None => (self.goal.told.clone(), vec![self.endpoint(dialled)]),
        };
        let problem = endpoints.is_empty().then(|| format!("{backend} has no endpoint that is ready"));
        WayView { backend, weight: 1, problem, request: request.map(Asked::of), endpoints }
    }

    /// Those that may be chosen, of the family that is dialled.
    fn endpoints(&self, service: &Service, port: u16) -> Vec<EndpointView> {
        let Some(port) = service.port(port) else { return Vec::new() };
        let is_chosen = |address: SocketAddr, is_ready: bool| match &self.caller {
            Caller::Pod(_) => port.candidate(address).is_some(),
            // As kube-proxy would, for all that is known here.
            Caller::Outside { .. } => is_ready,
        };
        let is_ipv4 = self.goal.dialled.is_ipv4();
        let of_family = port.endpoints.iter().filter(|it| it.address.is_ipv4() == is_ipv4);
        let chosen = of_family.filter(|it| is_chosen(it.address, it.ready));
        chosen.map(|endpoint| self.endpoint(endpoint.address)).collect()
    }

    fn endpoint(&self, address: SocketAddr) -> EndpointView {
        let pod = self.snapshot.workload(address.ip());
        let is_captured = self.snapshot.captured.contains(&self.goal.dialled.ip());
        let security = match &self.caller {
            Caller::Pod(_) if is_captured => {
                reach::assurance_of_pods(self.proxy, self.snapshot, address).security
            }
            _ => Security::Plaintext,
        };
        EndpointView {
            address,
            pod: pod.map(|pod| pod.pod.to_string()),
            node: pod.and_then(|pod| pod.node.as_ref()).map(ToString::to_string),
            is_in_mesh: pod.is_some_and(|pod| pod.enrolment.is_wanted()),
            security: security.as_str().into(),
        }
    }
}

/// `HTTPRoute shop/pay, rule 2 (charge)`.
fn named(rule: &Rule) -> String {
    let name = rule.name.as_ref().map_or_else(String::new, |name| format!(" ({name})"));
    format!("{}, rule {}{name}", rule.route, rule.index + 1)
}

impl ClientSide {
    fn stop(&mut self, why: String) {
        self.stopped = Some(Stopped { is_refused: true, why });
    }

    fn stop_without_ways(&mut self) {
        if self.ways.is_empty() {
            self.stop("the rule has no backend with a weight".into());
        }
    }
}
