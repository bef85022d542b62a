//! From text to a value, and from a value to a document, with errors that say what was expected.

use k8s_openapi::api::{core::v1 as core, discovery::v1 as discovery};
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::config::document::{DEFAULT_NAMESPACE, Kind};
use crate::config::{Document, FieldPath, Key, Position, Problem};

/// How the file is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Syntax {
    Json,
    Yaml,
}

/// A text that is neither YAML nor JSON.
#[derive(Debug)]
pub(super) struct SyntaxError {
    pub(super) position: Position,
    pub(super) message: String,
}

/// What `apiVersion` and `kind` say.
#[derive(Debug)]
pub(super) enum Header<'a> {
    Object(Kind),
    /// `List`, or a typed list with the kind of its items.
    List(Option<Kind>),
    /// A kind that the mesh does not read.
    Other(&'a str),
}

/// Parses one document.
pub(super) fn value(text: &str, syntax: Syntax) -> Result<Value, SyntaxError> {
    match syntax {
        Syntax::Json => serde_json::from_str(text).map_err(|error| {
            let position = Position { line: error.line() as u32, column: (error.column() as u32).max(1) };
            let message = error.to_string();
            let end = message.rfind(" at line ").unwrap_or(message.len());
            SyntaxError { position, message: format!("not valid JSON: {}", &message[..end]) }
        }),
        Syntax::Yaml => serde_saphyr::from_str_with_options(text, options()).map_err(|error| {
            let error = error.without_snippet();
            let at = error.location();
            let position = Position {
                line: at.map_or(1, |at| at.line() as u32).max(1),
                column: at.map_or(1, |at| at.column() as u32).max(1),
            };
            let message = error.to_string();
            let message = message.lines().next().unwrap_or_default();
            let message = [" at line ", ", set DuplicateKeyPolicy"]
                .iter()
                .fold(message, |message, tail| message.rfind(tail).map_or(message, |end| &message[..end]));
            SyntaxError { position, message: format!("not valid YAML: {message}") }
        }),
    }
}

/// The limits are those against recursion and against bombs of aliases; a long list of pods is no attack.
pub(super) fn options() -> serde_saphyr::Options {
    serde_saphyr::options! {
        budget: serde_saphyr::budget! {
            max_depth: 100,
            max_events: usize::MAX,
            max_nodes: usize::MAX,
            max_total_scalar_bytes: usize::MAX,
        },
        emit_comments: false,
    }
}

/// Which object a broken document is, read from the part of it before the error.
pub(super) fn salvage(text: &str, syntax: Syntax, error_line: u32) -> Option<Key> {
    /// How far an unfinished construct may reach back from where the parser noticed it.
    const ATTEMPTS: usize = 32;
    if syntax == Syntax::Json {
        return None;
    }
    let ends: Vec<usize> = std::iter::once(0)
        .chain(text.match_indices('\n').map(|(at, _)| at + 1))
        .take(error_line as usize)
        .collect();
    ends.iter().rev().take(ATTEMPTS).find_map(|&end| {
        let value = value(&text[..end], syntax).ok()?;
        match Header::of(&value, None).ok()? {
            // The namespace may be in the part that cannot be read: without it, this may be any object.
            Header::Object(kind) if has_namespace(&value) || has_whole_metadata(text, error_line) => {
                key(kind, &value)
            }
            _ => None,
        }
    })
}

fn has_namespace(value: &Value) -> bool {
    value.pointer("/metadata/namespace").is_some_and(Value::is_string)
}

/// Whether another field of the object begins after `metadata`, at the line of the error at the latest.
fn has_whole_metadata(text: &str, error_line: u32) -> bool {
    let mut after = text.lines().take(error_line as usize).skip_while(|line| !line.starts_with("metadata:"));
    after.next();
    after.any(|line| line.starts_with(|c: char| c.is_ascii_alphabetic()))
}

impl<'a> Header<'a> {
    pub(super) fn of(value: &'a Value, implied: Option<Kind>) -> Result<Self, Problem> {
        let Value::Object(object) = value else {
            let message = format!("expected a Kubernetes object, found {}", name_of(value));
            return Err(Problem::new(FieldPath::default(), message));
        };
        let text = |key: &str| object.get(key).and_then(Value::as_str).filter(|text| !text.is_empty());
        let expected =
            |key: &str, what: &str| Problem::new(FieldPath::new([key]), format!("expected {what}"));
        let (api_version, kind) = match (text("apiVersion"), text("kind"), implied) {
            (Some(api_version), Some(kind), _) => (api_version, kind),
            (None, None, Some(kind)) => return Ok(Self::Object(kind)),
            (None, ..) => return Err(expected("apiVersion", "a version such as v1")),
            (_, None, _) => return Err(expected("kind", "a kind such as Pod")),
        };
        let group = api_version.split_once('/').map_or("", |(group, _)| group);
        let of_kind =
            |name: &str| Kind::ALL.into_iter().find(|it| it.as_str() == name && it.group() == group);
        Ok(match (of_kind(kind), kind.strip_suffix("List")) {
            (Some(kind), _) => Self::Object(kind),
            (None, Some("")) if group.is_empty() => Self::List(None),
            (None, Some(item)) => of_kind(item).map_or(Self::Other(kind), |item| Self::List(Some(item))),
            (None, None) => Self::Other(kind),
        })
    }
}

/// Reads the object; problems that it survives are added to `problems`.
pub(super) fn document(kind: Kind, value: &Value, problems: &mut Vec<Problem>) -> Result<Document, Problem> {
    if let Some(other) = value.get("apiVersion").and_then(Value::as_str)
        && !kind.versions().contains(&other.rsplit('/').next().unwrap_or_default())
    {
        let message = format!("expected {}, found {other:?}", kind.api_version());
        return Err(Problem::new(FieldPath::new(["apiVersion"]), message));
    }
    match kind {
        Kind::Namespace => Document::namespace(&typed::<core::Namespace>(value)?, problems),
        Kind::Service => Document::service(&typed::<core::Service>(value)?, problems),
        Kind::Pod => Document::pod(&typed::<core::Pod>(value)?, problems),
        Kind::EndpointSlice => Document::endpoint_slice(&typed::<discovery::EndpointSlice>(value)?, problems),
        Kind::ConfigMap => Document::config_map(&typed::<core::ConfigMap>(value)?),
        Kind::ReferenceGrant => Document::reference_grant(value, problems),
        Kind::HttpRoute => Document::http_route(value, problems),
        Kind::GrpcRoute => Document::grpc_route(value, problems),
        Kind::TlsRoute => Document::tls_route(value, problems),
        Kind::TcpRoute => Document::tcp_route(value, problems),
        Kind::BackendTrafficPolicy => Document::backend_traffic_policy(value, problems),
        Kind::BackendTlsPolicy => Document::backend_tls_policy(value, problems),
        Kind::TrafficPolicy => Document::traffic_policy(value, problems),
        Kind::AuthorizationPolicy => Document::authorization_policy(value, problems),
        Kind::MeshPolicy => Document::mesh_policy(value, problems),
    }
}

/// Which object it is, as far as an object that could not be read tells.
pub(super) fn key(kind: Kind, value: &Value) -> Option<Key> {
    let meta = value.get("metadata")?;
    let text = |key: &str| meta.get(key).and_then(Value::as_str).filter(|text| !text.is_empty());
    let namespace = match kind {
        Kind::Namespace => "",
        _ => text("namespace").unwrap_or(DEFAULT_NAMESPACE),
    };
    Some(Key { kind, namespace: namespace.into(), name: text("name")?.into() })
}

fn typed<T: DeserializeOwned>(value: &Value) -> Result<T, Problem> {
    serde_path_to_error::deserialize(value)
        .map_err(|error| Problem::of_type(&FieldPath::from(error.path()), error.inner()))
}

fn name_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "nothing",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "a text",
        Value::Array(_) => "a list",
        Value::Object(_) => "a map",
    }
}
