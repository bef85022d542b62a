//! The filters of a rule or of a backend.

use http::header::{CONNECTION, CONTENT_LENGTH, HOST, TE, TRAILER, TRANSFER_ENCODING, UPGRADE};
use http::{HeaderName, HeaderValue, StatusCode};

use super::super::place::Place;
use super::matches::method;
use super::{BackendRef, Reference, given, wire};
use crate::model::{Name, ObjectRef};
use crate::route::{
    AllowedHeaders, AllowedMethods, Cors, Filters, HeaderModifier, Hostname, Match, Origin, PathMatch,
    PathModifier, Redirect, RouteKind, UrlRewrite,
};

/// The filters of a rule or of a backend.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RuleFilters {
    /// All but the mirrors.
    pub plain: Filters,
    /// Where copies go, and how many of how many requests are copied.
    pub mirrors: Vec<(Reference, (u32, u32))>,
}

/// What is the same for all filters of a route.
pub(super) struct Reader<'a> {
    pub(super) kind: RouteKind,
    pub(super) namespace: &'a Name,
}

/// What filters are of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Of {
    /// A rule.
    Rule,
    /// One of its backends, which is chosen after it is known who answers, and who gets copies.
    Backend,
}

/// Group, kind, namespace, name and port.
type Written<'t> = (&'t Option<String>, &'t Option<String>, &'t Option<String>, &'t str, Option<i64>);

const OF_RULES_ALONE: [&str; 3] = ["RequestMirror", "RequestRedirect", "CORS"];

impl Reader<'_> {
    /// `matches` are those of the rule: some filters go with some of them only.
    pub(super) fn read(
        &self,
        of: Of,
        filters: &Option<Vec<wire::Filter>>,
        matches: &[Match],
        place: &Place<'_>,
    ) -> RuleFilters {
        let mut read = RuleFilters::default();
        for (place, filter) in place.each("filters", filters) {
            self.add(of, filter, &mut read, &place);
        }
        let RuleFilters { plain, mirrors } = &read;
        let at = place.key("filters");
        if plain.redirect.is_some() && plain.rewrite.is_some() {
            at.refuse("expected either a RequestRedirect or a URLRewrite filter, found both");
        }
        if plain.redirect.is_some() && !mirrors.is_empty() {
            at.refuse("expected either a RequestRedirect filter or copies by RequestMirror, found both");
        }
        let path = |path: &Option<PathModifier>| matches!(path, Some(PathModifier::ReplacePrefixMatch(_)));
        let replaces_prefix = plain.redirect.as_ref().is_some_and(|it| path(&it.path))
            || plain.rewrite.as_ref().is_some_and(|it| path(&it.path));
        let has_one_prefix = matches!(matches, [Match { path: PathMatch::Prefix(_), .. }]);
        if replaces_prefix && !has_one_prefix {
            at.refuse(
                "expected exactly one match of the rule, with a PathPrefix, where its prefix is replaced",
            );
        }
        read
    }

    fn add(&self, of: Of, filter: &wire::Filter, read: &mut RuleFilters, place: &Place<'_>) {
        let parts = [
            ("RequestHeaderModifier", "requestHeaderModifier", filter.request_header_modifier.is_some()),
            ("ResponseHeaderModifier", "responseHeaderModifier", filter.response_header_modifier.is_some()),
            ("RequestMirror", "requestMirror", filter.request_mirror.is_some()),
            ("RequestRedirect", "requestRedirect", filter.request_redirect.is_some()),
            ("URLRewrite", "urlRewrite", filter.url_rewrite.is_some()),
            ("CORS", "cors", filter.cors.is_some()),
            ("ExternalAuth", "externalAuth", filter.external_auth.is_some()),
            ("ExtensionRef", "extensionRef", filter.extension_ref.is_some()),
        ];
        let supported = match self.kind {
            RouteKind::Http => &parts[..6],
            RouteKind::Grpc => &parts[..3],
            RouteKind::Tls | RouteKind::Tcp => &[],
        };
        let supported =
            || supported.iter().filter(|(kind, ..)| of == Of::Rule || !OF_RULES_ALONE.contains(kind));
        let Some((_, own, is_there)) = supported().find(|(kind, ..)| *kind == filter.kind) else {
            let kinds: Vec<&str> = supported().map(|(kind, ..)| *kind).collect();
            let known = parts.iter().any(|(kind, ..)| *kind == filter.kind);
            let note = if known { ", which is not supported here" } else { "" };
            let (kinds, found) = (kinds.join(", "), &filter.kind);
            return place.key("type").refuse(format!("expected one of {kinds}; found {found:?}{note}"));
        };
        for (_, key, is_there) in parts.iter().filter(|(_, key, _)| key != own) {
            if *is_there {
                place.key(key).refuse(format!("expected nothing but {own} in a filter of this type"));
            }
        }
        if !is_there {
            return place.refuse(format!("expected {own} in a filter of this type"));
        }
        let at = place.key(own);
        let RuleFilters { plain, mirrors } = read;
        let is_again = match filter.kind.as_str() {
            "RequestHeaderModifier" => plain.request_headers.is_some(),
            "ResponseHeaderModifier" => plain.response_headers.is_some(),
            "RequestRedirect" => plain.redirect.is_some(),
            "URLRewrite" => plain.rewrite.is_some(),
            "CORS" => plain.cors.is_some(),
            _ => false,
        };
        if is_again {
            return place.refuse(format!("expected one filter of the type {}, found another", filter.kind));
        }
        match filter {
            wire::Filter { request_header_modifier: Some(wire), .. } if *own == "requestHeaderModifier" => {
                plain.request_headers = Some(header_modifier(wire, &at));
            }
            wire::Filter { response_header_modifier: Some(wire), .. } if *own == "responseHeaderModifier" => {
                plain.response_headers = Some(header_modifier(wire, &at));
            }
            wire::Filter { request_mirror: Some(wire), .. } if *own == "requestMirror" => {
                mirrors.push(self.mirror(wire, &at));
            }
            wire::Filter { request_redirect: Some(wire), .. } if *own == "requestRedirect" => {
                plain.redirect = Some(redirect(wire, &at));
            }
            wire::Filter { url_rewrite: Some(wire), .. } if *own == "urlRewrite" => {
                let path = wire.path.as_ref().and_then(|path| path_modifier(path, &at.key("path")));
                plain.rewrite = Some(UrlRewrite { hostname: hostname(&wire.hostname, &at), path });
            }
            wire::Filter { cors: Some(wire), .. } if *own == "cors" => plain.cors = Some(cors(wire, &at)),
            _ => {}
        }
    }

    fn mirror(&self, wire: &wire::Mirror, place: &Place<'_>) -> (Reference, (u32, u32)) {
        let fraction = match (wire.percent, &wire.fraction) {
            (None, None) => None,
            (Some(percent), None) => {
                place.key("percent").number(percent, 0..=100).map(|percent| (percent, 100))
            }
            (None, Some(fraction)) => {
                let place = place.key("fraction");
                let denominator = fraction.denominator.unwrap_or(100);
                let most = i64::from(i32::MAX);
                let read = place.key("denominator").number(denominator, 1..=most);
                let numerator =
                    place.key("numerator").number(fraction.numerator, 0..=denominator.clamp(0, most));
                numerator.zip(read)
            }
            (Some(_), Some(_)) => {
                place.refuse("expected either percent or fraction, found both");
                None
            }
        };
        let wire::ObjectReference { group, kind, namespace, name, port } = &wire.backend_ref;
        let to = self.reference((group, kind, namespace, name, *port), &place.key("backendRef"));
        (to, fraction.unwrap_or((1, 1)))
    }

    pub(super) fn backend(
        &self,
        wire: &wire::BackendRef,
        matches: &[Match],
        place: &Place<'_>,
    ) -> BackendRef {
        let wire::BackendRef { group, kind, namespace, name, port, weight, filters } = wire;
        if filters.is_some() && matches!(self.kind, RouteKind::Tls | RouteKind::Tcp) {
            place.key("filters").refuse(format!("{}s have no such field", self.kind.as_str()));
        }
        BackendRef {
            weight: weight.map_or(Some(1), |it| place.key("weight").number(it, 0..=1_000_000)).unwrap_or(1),
            to: self.reference((group, kind, namespace, name, *port), place),
            filters: self.read(Of::Backend, filters, matches, place),
        }
    }

    fn reference(&self, written: Written<'_>, place: &Place<'_>) -> Reference {
        let (group, kind, namespace, name, port) = written;
        if name.is_empty() {
            place.key("name").refuse("expected the name of a Service");
        }
        Reference {
            field: place.field(),
            group: group.as_deref().unwrap_or_default().into(),
            kind: given(kind).unwrap_or_else(|| "Service".into()),
            id: ObjectRef {
                namespace: given(namespace).unwrap_or_else(|| self.namespace.clone()),
                name: name.into(),
            },
            port: port.and_then(|port| place.key("port").port(port)),
        }
    }
}

/// Headers that say where a message ends and who it is for: those are made anew for each connection, and a message that says
/// it twice is read differently by different servers.
fn is_framing(name: &HeaderName) -> bool {
    [CONNECTION, CONTENT_LENGTH, TE, TRAILER, TRANSFER_ENCODING, UPGRADE].contains(name)
        || matches!(name.as_str(), "keep-alive" | "proxy-connection")
}

fn header_modifier(wire: &wire::HeaderModifier, place: &Place<'_>) -> HeaderModifier {
    let mut seen: Vec<HeaderName> = Vec::new();
    let mut name = |text: &str, place: &Place<'_>| {
        let name = place.header_name(text)?;
        if is_framing(&name) {
            place.refuse(format!("expected a header other than {name}, which belongs to the connection"));
        } else if name == HOST {
            place.refuse("expected a header other than host, which a URLRewrite filter's hostname changes");
        } else if seen.contains(&name) {
            place.refuse(format!("expected each header once, found {name} again"));
        }
        seen.push(name.clone());
        Some(name)
    };
    let mut headers = |key: &str, list: &Option<Vec<wire::Header>>| {
        let header = |(place, header): (Place<'_>, &wire::Header)| {
            let name = name(&header.name, &place.key("name"));
            let value = HeaderValue::from_str(&header.value).ok();
            if value.is_none() {
                place.key("value").expected("a value that a header may have", &header.value);
            }
            name.zip(value)
        };
        place.each(key, list).filter_map(header).collect::<Vec<_>>()
    };
    let set = headers("set", &wire.set);
    let add = headers("add", &wire.add);
    let remove = place.each("remove", &wire.remove).filter_map(|(place, text)| name(text, &place)).collect();
    HeaderModifier { set, add, remove }
}

fn redirect(wire: &wire::Redirect, place: &Place<'_>) -> Redirect {
    let scheme = match wire.scheme.as_deref() {
        None | Some("") => None,
        Some(scheme @ ("http" | "https")) => Some(scheme.into()),
        Some(other) => {
            place.key("scheme").expected("http or https", other);
            None
        }
    };
    let status = match wire.status_code {
        None => StatusCode::FOUND,
        Some(301) => StatusCode::MOVED_PERMANENTLY,
        Some(302) => StatusCode::FOUND,
        Some(303) => StatusCode::SEE_OTHER,
        Some(307) => StatusCode::TEMPORARY_REDIRECT,
        Some(308) => StatusCode::PERMANENT_REDIRECT,
        Some(other) => {
            place.key("statusCode").expected("301, 302, 303, 307 or 308", other);
            StatusCode::FOUND
        }
    };
    Redirect {
        scheme,
        hostname: hostname(&wire.hostname, place),
        port: wire.port.and_then(|port| place.key("port").port(port)),
        path: wire.path.as_ref().and_then(|path| path_modifier(path, &place.key("path"))),
        status,
    }
}

fn hostname(text: &Option<String>, place: &Place<'_>) -> Option<Name> {
    let text = text.as_deref().filter(|text| !text.is_empty())?;
    match Hostname::parse(text) {
        Ok(Hostname::Exact(name)) => Some(name),
        _ => {
            place.key("hostname").expected("a host name without a wildcard and a port", text);
            None
        }
    }
}

fn path_modifier(wire: &wire::PathModifier, place: &Place<'_>) -> Option<PathModifier> {
    let parts =
        [("replaceFullPath", &wire.replace_full_path), ("replacePrefixMatch", &wire.replace_prefix_match)];
    let (own, other) = match wire.kind.as_str() {
        "ReplaceFullPath" => (parts[0], parts[1]),
        "ReplacePrefixMatch" => (parts[1], parts[0]),
        found => {
            place.key("type").expected("ReplaceFullPath or ReplacePrefixMatch", found);
            return None;
        }
    };
    if other.1.is_some() {
        place.key(other.0).refuse(format!("expected nothing but {} for this type", own.0));
    }
    let Some(text) = own.1 else {
        place.refuse(format!("expected {} for this type", own.0));
        return None;
    };
    let is_path = text.bytes().all(|byte| (b'!'..=b'~').contains(&byte)) && !text.contains(['?', '#']);
    if !is_path {
        place.key(own.0).expected("a path of visible ASCII characters, without a query and a fragment", text);
    }
    let text = Name::from(text.as_str());
    Some(match wire.kind.as_str() {
        "ReplaceFullPath" => PathModifier::ReplaceFullPath(text),
        _ => PathModifier::ReplacePrefixMatch(text),
    })
}

fn cors(wire: &wire::Cors, place: &Place<'_>) -> Cors {
    let origin = |(place, text): (Place<'_>, &String)| {
        let origin = Origin::parse(text);
        if origin.is_none() {
            place.expected("* or an origin such as https://shop.example.com or https://*.example.com", text);
        }
        origin
    };
    let is_any = |list: &Option<Vec<String>>| list.iter().flatten().any(|text| text == "*");
    let headers = |key: &str, list: &Option<Vec<String>>| {
        if is_any(list) {
            return AllowedHeaders::Any;
        }
        let names = place.each(key, list).filter_map(|(place, text)| place.header_name(text));
        AllowedHeaders::These(names.collect())
    };
    let allow_methods = if is_any(&wire.allow_methods) {
        AllowedMethods::Any
    } else {
        let methods = place.each("allowMethods", &wire.allow_methods);
        AllowedMethods::These(methods.filter_map(|(place, text)| method(text, &place)).collect())
    };
    Cors {
        allow_origins: place.each("allowOrigins", &wire.allow_origins).filter_map(origin).collect(),
        allow_credentials: wire.allow_credentials.unwrap_or_default(),
        allow_methods,
        allow_headers: headers("allowHeaders", &wire.allow_headers),
        expose_headers: headers("exposeHeaders", &wire.expose_headers),
        max_age: wire
            .max_age
            .map_or(Some(5), |it| place.key("maxAge").number(it, 1..=i64::from(i32::MAX)))
            .unwrap_or(5),
    }
}
