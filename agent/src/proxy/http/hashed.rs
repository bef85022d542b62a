//! What of a request is hashed, where its port goes by hashes.

use std::net::IpAddr;

use http::Request;

use super::session::cookie;
use crate::balance;
use crate::model::{Algorithm, HashKey, ServicePort};

/// The hash of the first that the request has of what the port goes by.
pub(super) fn hash<B>(port: &ServicePort, client: IpAddr, request: &Request<B>) -> Option<u64> {
    let Algorithm::ConsistentHash(keys) = &port.traffic.balancing.algorithm else { return None };
    keys.iter().find_map(|key| match key {
        HashKey::Header(name) => Some(balance::hash(request.headers().get(name)?.as_bytes())),
        HashKey::Cookie(name) => Some(balance::hash(cookie(request.headers(), name)?.as_bytes())),
        HashKey::Query(name) => Some(balance::hash(parameter(request.uri().query()?, name)?.as_bytes())),
        HashKey::SourceAddress => Some(balance::hash_address(client)),
    })
}

/// The parameter's value as it is written: alike requests are written alike.
fn parameter<'q>(query: &'q str, name: &str) -> Option<&'q str> {
    let mut pairs = query.split('&').map(|pair| pair.split_once('=').unwrap_or((pair, "")));
    pairs.find(|(key, _)| *key == name).map(|(_, value)| value)
}

#[cfg(test)]
mod tests {
    use http::HeaderName;

    use super::*;
    use crate::model::{Balancing, TrafficSettings};
    use crate::proxy::testkit::service;

    /// The hash of a request for `uri` with these headers, as a line each.
    fn hash_of(keys: &[HashKey], uri: &str, headers: &[(&str, &str)]) -> Option<u64> {
        let algorithm = Algorithm::ConsistentHash(keys.into());
        let balancing = Balancing { algorithm, ..Balancing::default() };
        let service = service(TrafficSettings { balancing, ..TrafficSettings::default() });
        let request =
            headers.iter().fold(Request::get(uri), |request, (name, value)| request.header(*name, *value));
        hash(&service.ports[0], "10.1.0.9".parse().unwrap(), &request.body(()).unwrap())
    }

    #[test]
    fn the_first_of_the_keys_that_a_request_has_is_the_one() {
        let header = HashKey::Header(HeaderName::from_static("x-user"));
        let (cookie, query) = (HashKey::Cookie("id".into()), HashKey::Query("q".into()));
        let alice = Some(balance::hash(b"alice"));
        let all = [header.clone(), cookie.clone(), query.clone(), HashKey::SourceAddress];
        let by_address = Some(balance::hash_address("10.1.0.9".parse().unwrap()));
        for (keys, uri, headers, expected) in [
            (&all[..], "/", &[("x-user", "alice"), ("cookie", "id=bob")][..], alice),
            (&all, "/?q=alice", &[("cookie", "a=b; id=bob")], Some(balance::hash(b"bob"))),
            (&all, "/?p=1&q=alice&q=bob", &[("cookie", "ids=bob")], alice),
            (&all, "/?qq=alice", &[], by_address),
            (&all[..3], "/", &[], None),
            (&all[2..3], "/?q", &[], Some(balance::hash(b""))),
            (&[cookie], "/", &[("cookie", "a=b"), ("cookie", "id=alice")], alice),
            (&[header], "/", &[("x-user", "alice"), ("x-user", "bob")], alice),
        ] {
            assert_eq!(hash_of(keys, uri, headers), expected, "{keys:?} {uri} {headers:?}");
        }
    }
}
