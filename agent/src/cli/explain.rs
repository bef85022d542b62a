//! `undermesh explain`: what would become of a connection or a request, and why.
//!
//! The client's agent says where it would go, the agents of the endpoints whether they would let it in. Here that is put together;
//! nothing is decided.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::process::ExitCode;
use std::{fmt, fs};

use clap::Args;
use serde::Serialize;

use super::agents::{Agents, AgentsArgs, Answers, INCOMPLETE};
use super::connections::OutputFormat;
use super::print;
use crate::model::ObjectRef;
use crate::proxy::explain::{
    Asked, ClientAnswer, ClientSide, EndpointView, PolicyView, Question, ServerAnswer, ServerSide,
    VerdictView, WayView, header, object,
};

const AUTHORIZATION: &str = "authorization";

const PAGE: &str = "/debug/explain";

/// What `--from` says of callers that are not in the mesh.
const OUTSIDE: &str = "outside";

/// Explains what would become of a connection or a request: the route, the backend, the policies, and the verdict
///
/// Exit code 0: it would be let in. 1: it would not. 2: that could not be told, or depends on the endpoint or on what is asked for.
#[derive(Args, Clone, Debug)]
pub struct ExplainArgs {
    /// Who calls: a pod, or what pods are replicas of, as in shop/web; or `outside`, with --from-address
    #[arg(long, value_name = "NAMESPACE/NAME", value_parser = caller)]
    from: Caller,
    /// The address that somebody calls from who is outside of the mesh
    #[arg(long, value_name = "ADDRESS", required_if_eq("from", OUTSIDE))]
    from_address: Option<IpAddr>,
    /// What is called: a Service, a pod or what pods are replicas of, as in shop/pay:8080, or an address and a port
    #[arg(long, value_name = "NAMESPACE/NAME:PORT")]
    to: String,
    /// The method of a request; GET where there is a path or a header
    #[arg(long, value_name = "METHOD")]
    method: Option<String>,
    /// The path of a request, with its query; / where there is a method or a header
    #[arg(long, value_name = "PATH")]
    path: Option<String>,
    /// A header of a request; may be repeated
    #[arg(long = "header", value_name = "NAME: VALUE", value_parser = header)]
    headers: Vec<(String, String)>,
    /// A token that the request shows in its header `Authorization`, or @FILE for one in a file
    #[arg(long, value_name = "TOKEN", value_parser = token)]
    jwt: Option<Token>,
    #[command(flatten)]
    agents: AgentsArgs,
    /// How to print it
    #[arg(long, short, value_enum, default_value_t)]
    output: OutputFormat,
}

#[derive(Clone, Debug)]
enum Caller {
    Pod(ObjectRef),
    Outside,
}

/// Nobody is to see it who sees what was asked.
#[derive(Clone)]
struct Token(String);

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(..)")
    }
}

fn token(text: &str) -> Result<Token, String> {
    let token = match text.strip_prefix('@') {
        Some(file) => fs::read_to_string(file).map_err(|error| format!("{file}: {error}"))?,
        None => text.to_owned(),
    };
    Ok(Token(token.trim().to_owned()))
}

fn caller(text: &str) -> Result<Caller, String> {
    if text == OUTSIDE { Ok(Caller::Outside) } else { object(text).map(Caller::Pod) }
}

/// Runs the command.
pub fn run(args: &ExplainArgs) -> ExitCode {
    let report = match args.agents.find() {
        Ok(agents) => args.ask(&agents),
        Err(why) => Report::unknown(vec![why]),
    };
    print::report(&report, args.output, Report::as_text, report.exit_code())
}

/// What was found.
#[derive(Debug, Serialize)]
struct Report {
    verdict: VerdictView,
    /// What could not be asked, a sentence each.
    incomplete: Vec<String>,
    /// Where it would go.
    client: Option<ClientSide>,
    /// What each endpoint would do with it, in the order of the ways and of the endpoints of each.
    servers: Vec<Judged>,
}

/// What an endpoint would do.
#[derive(Debug, Serialize)]
struct Judged {
    /// Which of the ways leads to it, from 0 on.
    way: usize,
    endpoint: EndpointView,
    #[serde(flatten)]
    side: ServerSide,
}

impl ExplainArgs {
    fn ask(&self, agents: &Agents) -> Report {
        let Self { method, path, headers, jwt, .. } = self;
        let bearer = jwt.iter().map(|Token(token)| (AUTHORIZATION.to_owned(), format!("Bearer {token}")));
        let headers: Vec<_> = headers.iter().cloned().chain(bearer).collect();
        let is_request = method.is_some() || path.is_some() || !headers.is_empty();
        let asked = is_request.then(|| Asked {
            method: method.clone().unwrap_or_else(|| "GET".into()),
            path: path.clone().unwrap_or_else(|| "/".into()),
            headers,
        });
        let from = match &self.from {
            Caller::Pod(pod) => Some(pod.clone()),
            Caller::Outside => None,
        };
        let question = Question::Client { from, to: self.to.clone(), asked };
        let answers: Answers<ClientAnswer> = agents.ask(&format!("{PAGE}?{}", question.query()));
        let Some(client) = answers.nodes.iter().find_map(|answer| answer.page.client.clone()) else {
            let mut why = answers.missing;
            why.extend(answers.nodes.into_iter().filter_map(|answer| answer.page.elsewhere));
            // Every node says the same of what is on none of those that were asked.
            why.dedup();
            return Report::unknown(why);
        };
        self.ask_servers(agents, client, answers)
    }

    fn ask_servers(&self, agents: &Agents, client: ClientSide, answers: Answers<ClientAnswer>) -> Report {
        let mut incomplete = answers.missing.clone();
        let mut told: Vec<Vec<ServerSide>> = Vec::new();
        for way in &client.ways {
            let pages = by_node(way).into_iter().filter_map(|((node, security), endpoints)| {
                let agent = answers.nodes.iter().find(|answer| answer.page.node == node)?;
                let is_plaintext = security == "plaintext";
                let identity = client.identity.as_ref().filter(|_| !is_plaintext);
                let question = Question::Server {
                    address: self.address(&client, *endpoints.first()?)?,
                    to: endpoints,
                    identity: identity.and_then(|identity| identity.parse().ok()),
                    is_plaintext,
                    asked: way.request.clone(),
                };
                Some((agent, format!("{PAGE}?{}", question.query())))
            });
            let answers: Answers<ServerAnswer> = agents.ask_again(&pages.collect::<Vec<_>>());
            incomplete.extend(answers.missing);
            told.push(answers.nodes.into_iter().flat_map(|answer| answer.page.endpoints).collect());
        }
        Report::of(client, &told, incomplete)
    }

    /// The address that the endpoint sees.
    fn address(&self, client: &ClientSide, endpoint: SocketAddr) -> Option<IpAddr> {
        let own = client.addresses.iter().find(|it| it.is_ipv4() == endpoint.is_ipv4());
        own.or(client.addresses.first()).copied().or(self.from_address)
    }
}

/// Those of which an agent knows, by its node and by what protects the connection.
fn by_node(way: &WayView) -> BTreeMap<(&str, &str), Vec<SocketAddr>> {
    let mut all: BTreeMap<_, Vec<_>> = BTreeMap::new();
    for endpoint in way.endpoints.iter().filter(|endpoint| endpoint.is_in_mesh) {
        if let Some(node) = &endpoint.node {
            all.entry((node.as_str(), endpoint.security.as_str())).or_default().push(endpoint.address);
        }
    }
    all
}

impl Report {
    fn unknown(incomplete: Vec<String>) -> Self {
        Self { verdict: VerdictView::Unknown, incomplete, client: None, servers: Vec::new() }
    }

    fn of(mut client: ClientSide, told: &[Vec<ServerSide>], incomplete: Vec<String>) -> Self {
        let shown = client.ways.iter_mut().filter_map(|way| way.request.as_mut());
        for (_, value) in shown.flat_map(|it| &mut it.headers).filter(|(name, _)| name == AUTHORIZATION) {
            *value = "not shown".into();
        }
        let mut servers = Vec::new();
        for (way, (view, told)) in client.ways.iter().zip(told).enumerate() {
            for endpoint in &view.endpoints {
                let side = told.iter().find(|side| side.address == endpoint.address).cloned();
                let side = side.unwrap_or_else(|| untold(endpoint));
                servers.push(Judged { way, endpoint: endpoint.clone(), side });
            }
        }
        let verdict = verdict(&client, &servers);
        Self { verdict, incomplete, client: Some(client), servers }
    }

    fn exit_code(&self) -> u8 {
        match self.verdict {
            VerdictView::Allowed => 0,
            VerdictView::Denied => 1,
            VerdictView::Depends | VerdictView::Unknown => INCOMPLETE,
        }
    }

    fn as_text(&self) -> String {
        let mut page = Page::default();
        if let Some(client) = &self.client {
            page.client(client);
            for (way, view) in client.ways.iter().enumerate() {
                page.way(view, client.ways.len());
                let servers: Vec<_> = self.servers.iter().filter(|server| server.way == way).collect();
                for (place, server) in servers.iter().enumerate() {
                    let same = servers[..place].iter().find(|it| say_the_same(&it.side, &server.side));
                    page.server(server, same.map(|it| it.side.address));
                }
            }
        }
        let verdict = match self.verdict {
            VerdictView::Allowed => "allowed",
            VerdictView::Denied => "denied",
            VerdictView::Depends => "depends on the endpoint, or on what is asked for",
            VerdictView::Unknown => "could not be told",
        };
        page.line("verdict", verdict);
        self.incomplete.iter().for_each(|why| page.line("incomplete", why));
        page.0
    }
}

/// What all of it comes to.
fn verdict(client: &ClientSide, servers: &[Judged]) -> VerdictView {
    if let Some(stopped) = &client.stopped {
        return if stopped.is_refused { VerdictView::Denied } else { VerdictView::Unknown };
    }
    let problems = client.ways.iter().filter(|way| way.problem.is_some()).map(|_| VerdictView::Denied);
    let all: Vec<_> = problems.chain(servers.iter().map(|server| server.side.verdict)).collect();
    match all.split_first() {
        None => VerdictView::Unknown,
        Some((first, others)) if others.iter().all(|it| it == first) => *first,
        Some(_) if all.contains(&VerdictView::Unknown) => VerdictView::Unknown,
        Some(_) => VerdictView::Depends,
    }
}

/// What is known of an endpoint of which no agent has told.
fn untold(endpoint: &EndpointView) -> ServerSide {
    let (verdict, why) = match (endpoint.is_in_mesh, &endpoint.node) {
        (false, _) => (VerdictView::Allowed, "it is not in the mesh, and takes whatever comes".to_owned()),
        (true, Some(node)) => (VerdictView::Unknown, format!("the agent of {node} was not asked")),
        (true, None) => (VerdictView::Unknown, "its node is not known".to_owned()),
    };
    ServerSide { pod: endpoint.pod.clone(), ..ServerSide::new(endpoint.address, verdict, why) }
}

fn say_the_same(one: &ServerSide, other: &ServerSide) -> bool {
    let what = |it: &ServerSide| (it.verdict, it.why.clone(), it.would_be.clone(), it.policies.clone());
    what(one) == what(other)
}

/// Text, in two columns.
#[derive(Default)]
struct Page(String);

impl Page {
    fn line(&mut self, title: &str, text: &str) {
        let line = format!("{title:10} {}", text.replace(char::is_control, "?"));
        self.0.push_str(line.trim_end());
        self.0.push('\n');
    }

    fn client(&mut self, client: &ClientSide) {
        let ClientSide { caller, identity, target, route, never, stopped, .. } = client;
        let identity = identity.as_ref().map_or_else(String::new, |identity| format!(", {identity}"));
        self.line("from", &format!("{caller}{identity}"));
        self.line("to", target);
        if !route.is_empty() {
            self.line("route", route);
        }
        never.iter().for_each(|never| self.line("", never));
        if let Some(stopped) = stopped {
            self.line("stopped", &stopped.why);
        }
    }

    fn way(&mut self, way: &WayView, ways: usize) {
        let share = if ways > 1 { format!(", weight {}", way.weight) } else { String::new() };
        self.line("backend", &format!("{}{share}", way.backend));
        if let Some(Asked { method, path, headers }) = &way.request {
            let host = headers.iter().find(|(name, _)| name == "host");
            let host = host.map_or_else(String::new, |(_, host)| format!(", host {host}"));
            self.line("request", &format!("{method} {path}{host}"));
        }
        if let Some(problem) = &way.problem {
            self.line("", problem);
        }
    }

    fn server(&mut self, server: &Judged, same_as: Option<SocketAddr>) {
        let Judged { endpoint, side, .. } = server;
        let EndpointView { address, pod, node, security, .. } = endpoint;
        let pod = pod.as_ref().map_or_else(String::new, |pod| format!(", pod {pod}"));
        let node = node.as_ref().map_or_else(String::new, |node| format!(" on {node}"));
        self.line("endpoint", &format!("{address}{pod}{node}, {security}"));
        if let Some(same) = same_as {
            return self.line("", &format!("as {same}"));
        }
        self.line("", &side.why);
        if let Some((_, why)) = &side.bytes {
            self.line("", &format!("what is no HTTP: {why}"));
        }
        if let Some(would_be) = &side.would_be {
            self.line("", &format!("with the policies that are tried out it {would_be}"));
        }
        side.audited.iter().for_each(|rule| self.line("", &format!("audited by {rule}")));
        side.policies.iter().for_each(|policy| self.policy(policy));
        side.never.iter().for_each(|never| self.line("", never));
    }

    fn policy(&mut self, policy: &PolicyView) {
        let PolicyView { name, action, dry_run, invalid, is_for_port, rules } = policy;
        let tried = if *dry_run { ", tried out" } else { "" };
        self.line("", &format!("  {name} ({action}{tried})"));
        if let Some(invalid) = invalid {
            return self.line("", &format!("    cannot be used: {invalid}"));
        }
        if !is_for_port {
            return self.line("", "    is not for this port");
        }
        if rules.is_empty() {
            self.line("", "    has no rules");
        }
        for rule in rules {
            let failed = rule.failed.as_deref().unwrap_or_default();
            let what = match rule.matches.as_str() {
                "yes" => "matches".to_owned(),
                "depends" => format!("depends on what is asked for: {failed}"),
                _ => format!("does not match: {failed}"),
            };
            self.line("", &format!("    rule {} {what}", rule.rule));
        }
    }
}

#[cfg(test)]
mod tests {
    use expect_test::{Expect, expect};
    use serde_json::{Value, json};

    use super::*;

    fn client(route: &str, stopped: Option<Value>, ways: &[Value]) -> ClientSide {
        serde_json::from_value(json!({
            "caller": "shop/web-0", "identity": "spiffe://cluster.local/ns/shop/sa/web", "addresses": ["10.0.0.1"],
            "target": "Service shop/pay, port 8080", "route": route, "rule": null, "never": [],
            "stopped": stopped, "ways": ways,
        }))
        .unwrap()
    }

    fn endpoint(address: &str, is_in_mesh: bool) -> Value {
        json!({
            "address": address, "pod": "shop/pay-0", "node": "n2", "is_in_mesh": is_in_mesh,
            "security": "mutual_tls",
        })
    }

    fn way(weight: u32, problem: Option<&str>, endpoints: &[Value]) -> Value {
        json!({
            "backend": "Service shop/pay, port 8080", "weight": weight, "problem": problem, "endpoints": endpoints,
            "request": { "method": "POST", "path": "/charge", "headers": [["host", "pay.shop:8080"]] },
        })
    }

    fn side(address: &str, verdict: &str, why: &str) -> ServerSide {
        serde_json::from_value(json!({
            "address": address, "pod": "shop/pay-0", "verdict": verdict, "why": why, "bytes": null,
            "would_be": "would not be let in: denied by AuthorizationPolicy shop/new, rule 1",
            "audited": ["AuthorizationPolicy shop/watch, rule 1"],
            "policies": [
                { "name": "AuthorizationPolicy shop/callers", "action": "Allow", "dry_run": false, "invalid": null,
                  "is_for_port": true, "rules": [
                    { "rule": 1, "matches": "yes", "failed": null },
                    { "rule": 2, "matches": "no", "failed": "to: methods does not have \"POST\"" },
                ] },
                { "name": "AuthorizationPolicy shop/new", "action": "Deny", "dry_run": true, "invalid": null,
                  "is_for_port": false, "rules": [] },
            ],
            "never": ["AuthorizationPolicy shop/callers, rule 2 never lets anything in: ... denies it all"],
        }))
        .unwrap()
    }

    fn check(client: ClientSide, told: &[Vec<ServerSide>], exit_code: u8, expected: Expect) {
        let report = Report::of(client, told, Vec::new());
        expected.assert_eq(&report.as_text());
        assert_eq!(report.exit_code(), exit_code);
    }

    #[test]
    fn what_each_endpoint_does_stands_below_it_and_what_is_the_same_is_said_once() {
        let endpoints = [endpoint("10.0.0.2:8080", true), endpoint("10.0.0.3:8080", true)];
        let told = ["10.0.0.2:8080", "10.0.0.3:8080"].map(|it| side(it, "allowed", "allowed by ..., rule 1"));
        let client = client("HTTPRoute shop/pay, rule 2 fits", None, &[way(1, None, &endpoints)]);
        check(
            client,
            &[told.into()],
            0,
            expect![[r#"
            from       shop/web-0, spiffe://cluster.local/ns/shop/sa/web
            to         Service shop/pay, port 8080
            route      HTTPRoute shop/pay, rule 2 fits
            backend    Service shop/pay, port 8080
            request    POST /charge, host pay.shop:8080
            endpoint   10.0.0.2:8080, pod shop/pay-0 on n2, mutual_tls
                       allowed by ..., rule 1
                       with the policies that are tried out it would not be let in: denied by AuthorizationPolicy shop/new, rule 1
                       audited by AuthorizationPolicy shop/watch, rule 1
                         AuthorizationPolicy shop/callers (Allow)
                           rule 1 matches
                           rule 2 does not match: to: methods does not have "POST"
                         AuthorizationPolicy shop/new (Deny, tried out)
                           is not for this port
                       AuthorizationPolicy shop/callers, rule 2 never lets anything in: ... denies it all
            endpoint   10.0.0.3:8080, pod shop/pay-0 on n2, mutual_tls
                       as 10.0.0.2:8080
            verdict    allowed
        "#]],
        );
    }

    #[test]
    fn verdicts_that_differ_are_none() {
        let verdicts = |of_first: &str, of_second: &str| {
            let (first, second) = ("10.0.0.2:8080", "10.0.0.3:8080");
            let ways = [
                way(9, None, &[endpoint(first, true)]),
                way(1, None, &[endpoint(second, of_second != "apart")]),
            ];
            let told = [(first, of_first), (second, of_second)].map(|(address, verdict)| match verdict {
                "untold" | "apart" => Vec::new(),
                verdict => vec![side(address, verdict, "")],
            });
            Report::of(client("", None, &ways), &told, Vec::new()).exit_code()
        };
        for (of_first, of_second, exit_code) in [
            ("allowed", "allowed", 0),
            ("allowed", "apart", 0),
            ("denied", "denied", 1),
            ("allowed", "denied", 2),
            ("denied", "apart", 2),
            ("allowed", "untold", 2),
            ("denied", "untold", 2),
            ("depends", "depends", 2),
            ("unknown", "unknown", 2),
        ] {
            assert_eq!(verdicts(of_first, of_second), exit_code, "{of_first} {of_second}");
        }
    }

    #[test]
    fn what_the_clients_agent_does_itself_is_the_end_of_it() {
        let refused =
            json!({ "is_refused": true, "why": "no rule of the routes of shop/pay fits the request" });
        check(
            client("", Some(refused), &[]),
            &[],
            1,
            expect![[r#"
            from       shop/web-0, spiffe://cluster.local/ns/shop/sa/web
            to         Service shop/pay, port 8080
            stopped    no rule of the routes of shop/pay fits the request
            verdict    denied
        "#]],
        );
        let answered =
            json!({ "is_refused": false, "why": "the agent answers it itself with 301, to http://a/" });
        check(
            client("HTTPRoute shop/pay, rule 1 fits", Some(answered), &[]),
            &[],
            2,
            expect![[r#"
            from       shop/web-0, spiffe://cluster.local/ns/shop/sa/web
            to         Service shop/pay, port 8080
            route      HTTPRoute shop/pay, rule 1 fits
            stopped    the agent answers it itself with 301, to http://a/
            verdict    could not be told
        "#]],
        );
        let nobody = way(1, Some("Service shop/pay, port 8080 has no endpoint that is ready"), &[]);
        check(
            client("", None, &[nobody]),
            &[Vec::new()],
            1,
            expect![[r#"
            from       shop/web-0, spiffe://cluster.local/ns/shop/sa/web
            to         Service shop/pay, port 8080
            backend    Service shop/pay, port 8080
            request    POST /charge, host pay.shop:8080
                       Service shop/pay, port 8080 has no endpoint that is ready
            verdict    denied
        "#]],
        );
    }
}
