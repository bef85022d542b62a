//! What a BackendTLSPolicy says (GEP-1897, GEP-3155).

use std::collections::BTreeMap;

use rustls_pki_types::DnsName;
use serde::Deserialize;
use serde_json::Value;

use super::super::place::Place;
use super::{Key, PolicySpec, Says, Target, is_for_others, targets, wire};
use crate::model::{AltName, Name, ObjectRef};
use crate::route::Hostname;

/// `validation`.
#[derive(Clone, Debug, PartialEq)]
pub struct TlsValidation {
    /// Whose certificates are believed.
    pub authorities: AuthorityRefs,
    /// `hostname`.
    pub hostname: Name,
    /// `subjectAltNames`.
    pub alt_names: Vec<AltName>,
}

/// Where the certificates of authorities are.
#[derive(Clone, Debug, PartialEq)]
pub enum AuthorityRefs {
    /// `wellKnownCACertificates: System`.
    System,
    /// `caCertificateRefs`: ConfigMaps, and of others the kinds.
    Objects(Vec<Result<ObjectRef, String>>),
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Spec {
    target_refs: Vec<wire::TargetRef>,
    /// Read apart, so that it is known for whom a policy is that says something else badly.
    validation: Option<Value>,
    options: Option<BTreeMap<String, String>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Validation {
    #[serde(rename = "caCertificateRefs")]
    ca_certificate_refs: Option<Vec<ObjectReference>>,
    #[serde(rename = "wellKnownCACertificates")]
    well_known_ca_certificates: Option<String>,
    hostname: String,
    subject_alt_names: Option<Vec<SubjectAltName>>,
}

#[derive(Deserialize)]
struct ObjectReference {
    group: String,
    kind: String,
    name: String,
}

#[derive(Deserialize)]
struct SubjectAltName {
    #[serde(rename = "type")]
    kind: String,
    hostname: Option<String>,
    uri: Option<String>,
}

/// What it says; nothing, and why, if it cannot be read whom it is for.
pub(super) fn read(key: &Key, spec: &Value, place: &Place<'_>) -> Option<PolicySpec> {
    if is_for_others(spec) {
        return Some(PolicySpec { targets: Vec::new(), says: Says::Tls(None) });
    }
    let spec: Spec = place.typed(spec)?;
    // What is no Service is for those who know it.
    let targets: Vec<Target> = targets(key, &spec.target_refs, place, |_, _| {});
    for option in spec.options.iter().flat_map(BTreeMap::keys) {
        place.key("options").key(option).refuse("there is no such option");
    }
    let place = place.key("validation");
    let validation = place.typed(spec.validation.as_ref().unwrap_or(&Value::Null));
    Some(PolicySpec { targets, says: Says::Tls(validation.and_then(|it| validated(key, &it, &place))) })
}

fn validated(key: &Key, wire: &Validation, place: &Place<'_>) -> Option<TlsValidation> {
    let names = place.few("subjectAltNames", &wire.subject_alt_names, 5);
    let alt_names: Vec<_> = names.map(|(place, name)| alt_name(name, &place)).collect();
    Some(TlsValidation {
        authorities: authorities(key, wire, place)?,
        hostname: hostname(&wire.hostname, &place.key("hostname"))?,
        // Without one of them it would ask for less, or for something else.
        alt_names: alt_names.into_iter().collect::<Option<_>>()?,
    })
}

fn authorities(key: &Key, wire: &Validation, place: &Place<'_>) -> Option<AuthorityRefs> {
    let has_refs = wire.ca_certificate_refs.as_ref().is_some_and(|refs| !refs.is_empty());
    match wire.well_known_ca_certificates.as_deref().filter(|name| !name.is_empty()) {
        Some(_) if has_refs => {
            place.refuse("expected either caCertificateRefs or wellKnownCACertificates, found both");
            None
        }
        Some("System") => Some(AuthorityRefs::System),
        Some(other) => {
            place.key("wellKnownCACertificates").expected("System", other);
            None
        }
        None if !has_refs => {
            place.refuse("expected caCertificateRefs or wellKnownCACertificates, found neither");
            None
        }
        None => {
            let reference =
                |(_, reference): (_, &ObjectReference)| match (&*reference.group, &*reference.kind) {
                    ("", "ConfigMap") => Ok(ObjectRef::new(key.namespace.clone(), reference.name.as_str())),
                    (group, kind) => Err(format!("the kind {kind:?} of the group {group:?}")),
                };
            let refs = place.few("caCertificateRefs", &wire.ca_certificate_refs, 8);
            Some(AuthorityRefs::Objects(refs.map(reference).collect()))
        }
    }
}

fn alt_name(wire: &SubjectAltName, place: &Place<'_>) -> Option<AltName> {
    let given = |text: &Option<String>| text.clone().filter(|text| !text.is_empty());
    match (wire.kind.as_str(), given(&wire.hostname), given(&wire.uri)) {
        ("Hostname", Some(name), None) if name.starts_with("*.") => {
            place.key("hostname").take(Hostname::parse(&name))?;
            Some(AltName::Hostname(name.to_ascii_lowercase().into()))
        }
        ("Hostname", Some(name), None) => hostname(&name, &place.key("hostname")).map(AltName::Hostname),
        ("URI", None, Some(uri)) => {
            let (scheme, rest) = uri.split_once(':').unwrap_or_default();
            let is_scheme = scheme.starts_with(|it: char| it.is_ascii_alphabetic())
                && scheme.bytes().all(|it| it.is_ascii_alphanumeric() || b"+-.".contains(&it));
            if !is_scheme || rest.is_empty() {
                place.key("uri").expected("a URI with its scheme, such as spiffe://mesh/ns/a/sa/b", &uri);
                return None;
            }
            Some(AltName::Uri(uri.into()))
        }
        ("Hostname" | "URI", ..) => {
            place.refuse("expected hostname alone for the type Hostname, uri alone for the type URI");
            None
        }
        (other, ..) => {
            place.key("type").expected("Hostname or URI", other);
            None
        }
    }
}

/// One that a server can be asked for.
fn hostname(text: &str, place: &Place<'_>) -> Option<Name> {
    match Hostname::parse(text) {
        Ok(Hostname::Exact(name)) if DnsName::try_from(&*name).is_ok() => Some(name),
        _ => {
            place.expected("a host name without a wildcard and a port, and not an address", text);
            None
        }
    }
}
