//! What would become of a connection or a request that nobody has made, and why: for people who wonder.
//!
//! It asks the snapshot in force by the functions that connections and requests are judged by, and neither makes one nor counts
//! anything. The client's node knows where something goes, and the server's whether it is let in: whoever asks, asks both.

mod client;
mod server;

use std::net::{IpAddr, SocketAddr};

use http::{HeaderName, HeaderValue, Method, Request, Uri};
use serde::{Deserialize, Serialize};

use super::Proxy;
use crate::model::{ObjectRef, SpiffeId};

/// What is asked, as it is written behind the `?` of a page.
#[derive(Clone, Debug)]
pub enum Question {
    /// Where would it go? To the client's node.
    Client {
        /// The pod that calls, or what it is a replica of; None: somebody outside of the mesh.
        from: Option<ObjectRef>,
        /// A Service, a pod or what pods are replicas of, as `shop/pay:8080`, or an address and a port.
        to: String,
        /// What is asked for, if it is known.
        asked: Option<Asked>,
    },
    /// Would it be let in? To the server's node.
    Server {
        /// The endpoints.
        to: Vec<SocketAddr>,
        /// The identity that the caller proves.
        identity: Option<SpiffeId>,
        /// The address that it calls from.
        address: IpAddr,
        /// Whether nothing protects the connection.
        is_plaintext: bool,
        /// What is asked for, if it is known.
        asked: Option<Asked>,
    },
}

/// A request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Asked {
    /// Its method.
    pub method: String,
    /// Its path, with the query.
    pub path: String,
    /// Its headers, `Host` among them.
    pub headers: Vec<(String, String)>,
}

/// What the client's node knows.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ClientAnswer {
    /// The node that answers.
    pub node: String,
    /// Where it would go.
    pub client: Option<ClientSide>,
    /// Why this node does not know: another one does, or there is no such thing.
    pub elsewhere: Option<String>,
}

/// Where something would go.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ClientSide {
    /// `shop/web-0`, or `outside`.
    pub caller: String,
    /// The identity that it would prove to endpoints of the mesh.
    pub identity: Option<String>,
    /// The addresses that it calls from.
    pub addresses: Vec<IpAddr>,
    /// What is called: `Service shop/pay, port 8080`.
    pub target: String,
    /// What routes say of that, as a sentence.
    pub route: String,
    /// The rule that it falls under: `HTTPRoute shop/pay, rule 2`.
    pub rule: Option<String>,
    /// Rules of these routes that nothing ever falls under, a sentence each.
    pub never: Vec<String>,
    /// What the client's agent does with it instead of passing it on.
    pub stopped: Option<Stopped>,
    /// Where it goes; of several backends to one of them.
    pub ways: Vec<WayView>,
}

/// Something goes no further than the client's agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stopped {
    /// Whether that is a refusal, and not an answer.
    pub is_refused: bool,
    /// What becomes of it.
    pub why: String,
}

/// One of the places that something may go to.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct WayView {
    /// `Service shop/pay, port 8080`.
    pub backend: String,
    /// Its share of the requests, relative to the others.
    pub weight: u32,
    /// Why nothing gets there.
    pub problem: Option<String>,
    /// The request as it gets there.
    pub request: Option<Asked>,
    /// The endpoints that may be chosen.
    pub endpoints: Vec<EndpointView>,
}

/// An endpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndpointView {
    /// Its address.
    pub address: SocketAddr,
    /// Its pod.
    pub pod: Option<String>,
    /// The node of that.
    pub node: Option<String>,
    /// Whether the pod is to be in the mesh.
    pub is_in_mesh: bool,
    /// `same_node`, `mutual_tls` or `plaintext`.
    pub security: String,
}

/// What the server's node knows.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ServerAnswer {
    /// The node that answers.
    pub node: String,
    /// One for each endpoint that was asked about.
    pub endpoints: Vec<ServerSide>,
}

/// Whether an endpoint lets something in.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ServerSide {
    /// The endpoint.
    pub address: SocketAddr,
    /// Its pod.
    pub pod: Option<String>,
    /// Whether it does.
    pub verdict: VerdictView,
    /// Why, as a sentence.
    pub why: String,
    /// Where it depends on the request: what becomes of a connection that carries something else than requests.
    pub bytes: Option<(VerdictView, String)>,
    /// What would become of it if policies that are tried out were in force, where that is something else.
    pub would_be: Option<String>,
    /// The rules that ask for it to be written to the audit log.
    pub audited: Vec<String>,
    /// Every policy of the pod, and what it makes of it.
    pub policies: Vec<PolicyView>,
    /// Rules that never let anything in, a sentence each.
    pub never: Vec<String>,
}

/// Whether something is let in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VerdictView {
    /// It is.
    Allowed,
    /// It is not.
    Denied,
    /// That depends on what is asked for.
    Depends,
    /// This node cannot tell.
    Unknown,
}

/// A policy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PolicyView {
    /// `AuthorizationPolicy shop/only-web`.
    pub name: String,
    /// `Allow`, `Deny` or `Audit`.
    pub action: String,
    /// Whether it is only tried out.
    pub dry_run: bool,
    /// What is wrong with it.
    pub invalid: Option<String>,
    /// Whether it is for the port that is called.
    pub is_for_port: bool,
    /// What each of its rules does: `matches`, or why not.
    pub rules: Vec<RuleView>,
}

/// A rule of a policy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RuleView {
    /// Its place, from 1 on.
    pub rule: usize,
    /// `yes`, `no`, or `depends` where it depends on the request.
    pub matches: String,
    /// What does not hold, or on what it depends.
    pub failed: Option<String>,
}

/// The answer of one side.
#[derive(Debug, Serialize)]
#[serde(untagged)]
enum Answer {
    Client(Box<ClientAnswer>),
    Server(ServerAnswer),
}

impl Proxy {
    /// Answers a question as [`Question::query`] writes it.
    ///
    /// # Errors
    /// When it cannot be understood.
    pub fn explain(&self, query: &str) -> Result<impl Serialize + use<>, String> {
        let question = Question::parse(query)?;
        let snapshot = self.snapshot.load_full();
        Ok(match question {
            Question::Client { from, to, asked } => {
                Answer::Client(Box::new(client::answer(self, &snapshot, from.as_ref(), &to, asked)?))
            }
            Question::Server { to, identity, address, is_plaintext, asked } => {
                let request = asked.as_ref().map(|asked| asked.request(None)).transpose()?;
                let visit = server::Visit { identity, address, is_plaintext, request };
                let endpoints = to.iter().map(|to| server::answer(self, &snapshot, *to, &visit)).collect();
                Answer::Server(ServerAnswer { node: self.node(), endpoints })
            }
        })
    }

    fn node(&self) -> String {
        self.telemetry.status().node.to_string()
    }
}

impl Question {
    /// As a page is asked it.
    pub fn query(&self) -> String {
        let mut query = form_urlencoded::Serializer::new(String::new());
        let asked = match self {
            Self::Client { from, to, asked } => {
                query.append_pair("side", "client").append_pair("to", to);
                if let Some(from) = from {
                    query.append_pair("from", &from.to_string());
                }
                asked
            }
            Self::Server { to, identity, address, is_plaintext, asked } => {
                query.append_pair("side", "server").append_pair("address", &address.to_string());
                to.iter().for_each(|to| _ = query.append_pair("to", &to.to_string()));
                if let Some(identity) = identity {
                    query.append_pair("identity", identity.as_str());
                }
                if *is_plaintext {
                    query.append_pair("plaintext", "true");
                }
                asked
            }
        };
        if let Some(Asked { method, path, headers }) = asked {
            query.append_pair("method", method).append_pair("path", path);
            for (name, value) in headers {
                query.append_pair("header", &format!("{name}: {value}"));
            }
        }
        query.finish()
    }

    fn parse(query: &str) -> Result<Self, String> {
        let pairs: Vec<_> = form_urlencoded::parse(query.as_bytes()).into_owned().collect();
        let all = |name: &str| {
            let found = pairs.iter().filter(|(key, _)| key == name);
            found.map(|(_, value)| value.clone()).collect::<Vec<_>>()
        };
        let known = ["side", "from", "to", "address", "identity", "plaintext", "method", "path", "header"];
        if let Some((unknown, _)) = pairs.iter().find(|(key, _)| !known.contains(&key.as_str())) {
            return Err(format!(
                "{unknown:?} is nothing that can be asked for; there is {}",
                known.join(", ")
            ));
        }
        let one = |name: &str| {
            let mut found = all(name);
            if found.len() > 1 { Err(format!("{name}: given twice")) } else { Ok(found.pop()) }
        };
        let needed = |name: &str| one(name)?.ok_or_else(|| format!("{name}: needed"));
        let asked = match (one("method")?, one("path")?) {
            (None, None) if all("header").is_empty() => None,
            (method, path) => Some(Asked {
                method: method.unwrap_or_else(|| "GET".into()),
                path: path.unwrap_or_else(|| "/".into()),
                headers: all("header").iter().map(|line| header(line)).collect::<Result<_, _>>()?,
            }),
        };
        match one("side")?.as_deref() {
            None | Some("client") => {
                let from = one("from")?.map(|from| object(&from)).transpose()?;
                Ok(Self::Client { from, to: needed("to")?, asked })
            }
            Some("server") => Ok(Self::Server {
                to: all("to").iter().map(|to| read("to", to)).collect::<Result<_, _>>()?,
                identity: one("identity")?.map(|identity| read("identity", &identity)).transpose()?,
                address: read("address", &needed("address")?)?,
                is_plaintext: one("plaintext")?.as_deref() == Some("true"),
                asked,
            }),
            Some(other) => Err(format!("side: expected client or server, found {other:?}")),
        }
    }
}

impl ServerSide {
    /// A verdict, and nothing beside it.
    pub fn new(address: SocketAddr, verdict: VerdictView, why: String) -> Self {
        Self {
            address,
            pod: None,
            verdict,
            why,
            bytes: None,
            would_be: None,
            audited: Vec::new(),
            policies: Vec::new(),
            never: Vec::new(),
        }
    }
}

impl Asked {
    /// The request; it asks for this host unless it says another.
    fn request(&self, host: Option<&str>) -> Result<Request<()>, String> {
        let Self { method, path, headers } = self;
        let bad = |what: &str, text: &str| format!("{what}: {text:?} cannot be sent");
        if !path.starts_with('/') {
            return Err(format!("path: expected one that begins with /, found {path:?}"));
        }
        let mut request = Request::new(());
        *request.method_mut() = Method::try_from(method.as_str()).map_err(|_| bad("method", method))?;
        *request.uri_mut() = Uri::try_from(path.as_str()).map_err(|_| bad("path", path))?;
        for (name, value) in headers {
            let key = HeaderName::try_from(name.as_str()).map_err(|_| bad("header", name))?;
            let value = HeaderValue::try_from(value.as_str()).map_err(|_| bad("header", name))?;
            request.headers_mut().append(key, value);
        }
        if let Some(host) = host
            && !request.headers().contains_key(http::header::HOST)
        {
            let host = HeaderValue::try_from(host).map_err(|_| bad("host", host))?;
            request.headers_mut().insert(http::header::HOST, host);
        }
        Ok(request)
    }

    fn of(request: &Request<()>) -> Self {
        let text = |value: &HeaderValue| String::from_utf8_lossy(value.as_bytes()).into_owned();
        Self {
            method: request.method().to_string(),
            path: request.uri().path_and_query().map_or("/", |path| path.as_str()).to_owned(),
            headers: request.headers().iter().map(|(name, value)| (name.to_string(), text(value))).collect(),
        }
    }
}

/// `name: value`.
///
/// # Errors
/// When it is none.
pub fn header(line: &str) -> Result<(String, String), String> {
    let (name, value) =
        line.split_once(':').ok_or_else(|| format!("header: expected name: value, found {line:?}"))?;
    Ok((name.trim().to_ascii_lowercase(), value.trim().to_owned()))
}

/// `namespace/name`.
///
/// # Errors
/// When it is none.
pub fn object(text: &str) -> Result<ObjectRef, String> {
    match text.split_once('/') {
        Some((namespace, name)) if !namespace.is_empty() && !name.is_empty() && !name.contains('/') => {
            Ok(ObjectRef::new(namespace, name))
        }
        _ => Err(format!("expected namespace/name, found {text:?}")),
    }
}

fn read<T: std::str::FromStr<Err: std::fmt::Display>>(what: &str, text: &str) -> Result<T, String> {
    text.parse().map_err(|error| format!("{what}: {text:?}: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The question that stands behind the `?`, as it would be written again; else what is wrong with it.
    fn check(query: &str, expected: &str) {
        let parsed = Question::parse(query).and_then(|question| {
            let asked = match &question {
                Question::Client { asked, .. } | Question::Server { asked, .. } => asked,
            };
            asked.as_ref().map(|asked| asked.request(None)).transpose()?;
            Ok(question.query())
        });
        assert_eq!(parsed.unwrap_or_else(|why| why), expected, "{query}");
    }

    #[test]
    fn questions_are_read_as_they_are_written() {
        for query in [
            "side=client&to=shop%2Fpay%3A8080&from=shop%2Fweb",
            "side=client&to=10.0.0.1%3A80&method=POST&path=%2Fa%3Fb%3Dc%26d&header=x-team%3A+blue%2C+red",
            "side=server&address=10.0.0.1&to=10.0.0.2%3A80&to=%5Bfd00%3A%3A2%5D%3A80&identity=spiffe%3A%2F%2Fa%2Fns%2Fb%2Fsa%2Fc",
            "side=server&address=fd00%3A%3A1&to=10.0.0.2%3A80&plaintext=true&method=GET&path=%2F",
        ] {
            check(query, query);
        }
        check("to=a/b:1&header=A:%20b", "side=client&to=a%2Fb%3A1&method=GET&path=%2F&header=a%3A+b");
    }

    #[test]
    fn what_cannot_be_asked_is_told_with_its_name() {
        check("", "to: needed");
        check("to=a&to=b", "to: given twice");
        check(
            "to=a&form=b",
            "\"form\" is nothing that can be asked for; there is side, from, to, address, identity, plaintext, method, path, header",
        );
        check("to=a&from=b", "expected namespace/name, found \"b\"");
        check("to=a&side=both", "side: expected client or server, found \"both\"");
        check("side=server&to=10.0.0.1&address=10.0.0.1", "to: \"10.0.0.1\": invalid socket address syntax");
        check("side=server&to=10.0.0.1:1&address=here", "address: \"here\": invalid IP address syntax");
        check("to=a&header=b", "header: expected name: value, found \"b\"");
        check("to=a&path=b", "path: expected one that begins with /, found \"b\"");
        check("to=a&method=A%20B", "method: \"A B\" cannot be sent");
        check("to=a&path=/%0A", "path: \"/\\n\" cannot be sent");
        check("to=a&header=a:b%0Ac", "header: \"a\" cannot be sent");
    }
}
