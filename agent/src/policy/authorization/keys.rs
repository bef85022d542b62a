//! What rules are found by: of everything that a rule asks for, the parts that are known word for word.
//!
//! A key is a hash. Two things of one hash find each other's rules, which costs a look at them: whoever finds a rule holds it against
//! the facts. So those that case tells apart in some requests only share a key.

use std::hash::Hasher as _;
use std::net::IpAddr;

use fnv::FnvHasher;
use http::HeaderName;
use ipnet::IpNet;

use super::facts::host_and_port;
use super::rule::{Condition, GrpcMethod, Matcher, Operation, PathPattern, Pattern, Rule, Segment, Source};

/// What a key is of. Where two find equally few rules, the first is taken: it is likely to be asked for less often.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Dimension {
    Identity,
    ServiceAccount,
    Path,
    Address,
    Header,
    Host,
    Namespace,
    Method,
    Port,
    TrustDomain,
}

impl Dimension {
    /// The byte as it is hashed: hosts are compared without regard to case, and paths may be.
    pub(super) fn folded(self, byte: u8) -> u8 {
        match self {
            Self::Host | Self::Path => byte.to_ascii_lowercase(),
            _ => byte,
        }
    }
}

/// What of a text is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Part {
    /// All of it, which is as long as this.
    Whole(usize),
    /// So much of its beginning.
    Start(usize),
    /// So much of its end.
    End(usize),
}

/// One of the values that a rule is found by.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Key {
    pub(super) dimension: Dimension,
    pub(super) part: Part,
    /// For headers: which.
    pub(super) header: Option<HeaderName>,
    pub(super) hash: u64,
}

/// Keys of one dimension of which one is there whenever the rule matches.
pub(super) type Choice = Vec<Key>;

/// What holds of a rule: each of these clauses, of which each is one of several entries, of which each has choices.
pub(super) type Clause = Vec<Vec<Choice>>;

/// The clauses of a rule that is for these ports alone, by what is known of a connection, and of requests where these are there.
pub(super) fn clauses(rule: &Rule, ports: Option<&[u16]>, has_requests: bool) -> Vec<Clause> {
    let mut clauses: Vec<Clause> = Vec::new();
    if !rule.from.is_empty() {
        clauses.push(rule.from.iter().map(of_source).collect());
    }
    if !rule.to.is_empty() {
        clauses.push(rule.to.iter().map(|operation| of_operation(operation, has_requests)).collect());
    }
    if let Some(ports) = ports {
        clauses.push(vec![vec![ports.iter().copied().map(of_port).collect()]]);
    }
    let headers = rule.when.iter().filter(|_| has_requests).filter_map(of_header);
    clauses.extend(headers.map(|keys| vec![vec![keys]]));
    clauses
}

fn of_source(source: &Source) -> Vec<Choice> {
    let Source { identities, service_accounts, namespaces, trust_domains, ip_blocks } = source;
    let accounts = service_accounts.any_of.iter().map(|account| {
        let text = || account.namespace.bytes().chain([b'/']).chain(account.name.bytes());
        Key::new(
            Dimension::ServiceAccount,
            Part::Whole(text().count()),
            hash(Dimension::ServiceAccount, text()),
        )
    });
    let blocks = ip_blocks.any_of.iter().map(|block| of_block(*block));
    let choices = [
        of_patterns(Dimension::Identity, identities),
        Some(accounts.collect()),
        of_patterns(Dimension::Namespace, namespaces),
        of_patterns(Dimension::TrustDomain, trust_domains),
        Some(blocks.collect()),
    ];
    chosen(choices)
}

fn of_operation(operation: &Operation, has_requests: bool) -> Vec<Choice> {
    let ports = Some(operation.ports.any_of.iter().copied().map(of_port).collect());
    if !has_requests {
        return chosen([ports]);
    }
    let paths: Option<Choice> = operation.paths.any_of.iter().map(of_path).collect();
    let hosts: Option<Choice> = operation.hosts.any_of.iter().map(of_host).collect();
    let methods = of_patterns(Dimension::Method, &operation.methods);
    let grpc = operation.grpc.iter().map(of_grpc).collect();
    chosen([ports, paths, hosts, methods, Some(grpc)])
}

/// Those that say anything. A list that is empty, or that leaves anything open, does not.
fn chosen(choices: impl IntoIterator<Item = Option<Choice>>) -> Vec<Choice> {
    choices.into_iter().flatten().filter(|keys| !keys.is_empty()).collect()
}

fn of_patterns(dimension: Dimension, matcher: &Matcher<Pattern>) -> Option<Choice> {
    matcher.any_of.iter().map(|pattern| of_pattern(dimension, pattern)).collect()
}

fn of_pattern(dimension: Dimension, pattern: &Pattern) -> Option<Key> {
    match pattern {
        Pattern::Present => None,
        Pattern::Exact(text) => Some(Key::whole(dimension, text)),
        Pattern::Prefix(text) => Key::start(dimension, text),
        Pattern::Suffix(text) => Key::end(dimension, text),
    }
}

fn of_path(pattern: &PathPattern) -> Option<Key> {
    match pattern {
        PathPattern::Exact(text) => Some(Key::whole(Dimension::Path, text)),
        PathPattern::Prefix(text) => Key::start(Dimension::Path, text),
        PathPattern::Suffix(text) => Key::end(Dimension::Path, text),
        PathPattern::Template(segments) => {
            let mut start = String::new();
            for segment in segments {
                // What follows on `{**}` may be nothing at all, not even the slash.
                match segment {
                    Segment::Literal(text) => start.extend(["/", text]),
                    Segment::One => start.push('/'),
                    Segment::Any => {}
                }
                if !matches!(segment, Segment::Literal(_)) {
                    break;
                }
            }
            Key::start(Dimension::Path, &start)
        }
    }
}

fn of_grpc(method: &GrpcMethod) -> Key {
    let GrpcMethod { service, method } = method;
    let path = format!("/{service}/{}", method.as_deref().unwrap_or_default());
    match method {
        Some(_) => Key::whole(Dimension::Path, &path),
        None => Key::new(Dimension::Path, Part::Start(path.len()), hash(Dimension::Path, path.bytes())),
    }
}

fn of_host(pattern: &Pattern) -> Option<Key> {
    let name = |text| host_and_port(text).0;
    match pattern {
        Pattern::Present => None,
        Pattern::Exact(text) => Some(Key::whole(Dimension::Host, name(text))),
        // It may end within the port.
        Pattern::Prefix(text) if host_and_port(text).1.is_some() => None,
        Pattern::Prefix(text) => Key::start(Dimension::Host, text),
        Pattern::Suffix(text) => Key::end(Dimension::Host, name(text)),
    }
}

fn of_header(condition: &Condition) -> Option<Choice> {
    let Condition::Header { name, values } = condition else { return None };
    let keys = values.any_of.iter().map(|pattern| match pattern {
        Pattern::Exact(value) => {
            let hash = of_header_line(name, value.as_bytes());
            Some(Key {
                header: Some(name.clone()),
                ..Key::new(Dimension::Header, Part::Whole(value.len()), hash)
            })
        }
        _ => None,
    });
    keys.collect::<Option<Choice>>().filter(|keys| !keys.is_empty())
}

fn of_block(block: IpNet) -> Key {
    let bits = usize::from(block.prefix_len());
    Key::new(Dimension::Address, Part::Start(bits), of_network(block.network(), bits))
}

fn of_port(port: u16) -> Key {
    Key::new(Dimension::Port, Part::Whole(2), hash(Dimension::Port, port.to_be_bytes()))
}

impl Key {
    fn new(dimension: Dimension, part: Part, hash: u64) -> Self {
        Self { dimension, part, header: None, hash }
    }

    fn whole(dimension: Dimension, text: &str) -> Self {
        Self::new(dimension, Part::Whole(text.len()), hash(dimension, text.bytes()))
    }

    /// Nothing is no key: everything begins and ends with it.
    fn start(dimension: Dimension, text: &str) -> Option<Self> {
        let key = Self::new(dimension, Part::Start(text.len()), hash(dimension, text.bytes()));
        (!text.is_empty()).then_some(key)
    }

    fn end(dimension: Dimension, text: &str) -> Option<Self> {
        let key = Self::new(dimension, Part::End(text.len()), hash(dimension, text.bytes().rev()));
        (!text.is_empty()).then_some(key)
    }
}

/// The hash of a text, of which more may follow: that of its beginning is passed on the way to that of all of it.
pub(super) fn begin(dimension: Dimension) -> FnvHasher {
    let mut hasher = FnvHasher::default();
    hasher.write_u8(dimension as u8);
    hasher
}

pub(super) fn hash(dimension: Dimension, bytes: impl IntoIterator<Item = u8>) -> u64 {
    let mut hasher = begin(dimension);
    bytes.into_iter().for_each(|byte| hasher.write_u8(dimension.folded(byte)));
    hasher.finish()
}

pub(super) fn of_header_line(name: &HeaderName, value: &[u8]) -> u64 {
    let name = name.as_str().bytes();
    hash(Dimension::Header, name.chain([b':']).chain(value.iter().copied()))
}

/// The hash of the network that the address is in, of so many bits.
pub(super) fn of_network(address: IpAddr, bits: usize) -> u64 {
    let length = [bits as u8];
    match address {
        IpAddr::V4(address) => {
            let network = address.to_bits().checked_shr(32 - bits as u32).unwrap_or(0);
            hash(Dimension::Address, length.into_iter().chain(network.to_be_bytes()))
        }
        IpAddr::V6(address) => {
            let network = address.to_bits().checked_shr(128 - bits as u32).unwrap_or(0);
            hash(Dimension::Address, length.into_iter().chain(network.to_be_bytes()))
        }
    }
}
