//! The spec of a MeshPolicy as it is written. From these types comes its CustomResourceDefinition, and from their comments what
//! `kubectl explain` says; what a type does not tell stands in `crd`.

#[cfg(test)]
use schemars::JsonSchema;
use serde::Deserialize;

use super::super::selector;

/// What pods ask of their callers. Of several that speak of a pod the most specific has the word: one that selects it, then the pod's
/// annotation, then one for its namespace, then the namespace's annotation, then one for the mesh, then the agent's settings.
#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(JsonSchema))]
pub(super) struct Spec {
    /// Which pods of the policy's own namespace it is for. Without it, it is for all of them; in the namespace that the mesh is
    /// installed in, for all pods of the mesh.
    pub(super) selector: Option<selector::Wire>,
    /// Whether callers must be in the mesh. At least one of its fields.
    pub(super) mtls: Option<Mtls>,
    /// JSON Web Tokens of callers. Of several policies the most specific that has this has the word on all of it. Without a token a
    /// request has no claims, with one that does not hold it is refused.
    pub(super) jwt: Option<Jwt>,
}

#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(JsonSchema))]
pub(super) struct Mtls {
    /// Strict: plaintext from outside of the mesh is refused. Permissive: it is let in. Left to less specific policies unless given.
    pub(super) mode: Option<String>,
    /// Ports with a mode of their own, which wins over mode.
    pub(super) ports: Option<Vec<Port>>,
}

#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(JsonSchema))]
pub(super) struct Port {
    /// The port of the pod, not of the Service.
    pub(super) port: i64,
    /// Strict or Permissive.
    pub(super) mode: String,
}

#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(JsonSchema))]
pub(super) struct Jwt {
    /// Whose tokens are believed. Those of others are refused.
    pub(super) issuers: Vec<Issuer>,
    /// How far clocks may be apart when it is judged whether a token holds now. 60s unless given, 10m at most.
    pub(super) leeway: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
#[cfg_attr(test, derive(JsonSchema))]
pub(super) struct Issuer {
    /// As its tokens name it in iss, word for word.
    pub(super) issuer: String,
    /// One of these must be in a token's aud. Whomever a token is for unless given.
    pub(super) audiences: Option<Vec<String>>,
    /// The public keys that its tokens are signed with: either inline or uri.
    pub(super) jwks: Jwks,
    /// Where requests have its tokens; in Authorization, after Bearer, unless given.
    pub(super) from: Option<TokenPlaces>,
    /// Whether the application is shown the token. It is taken out unless this is true.
    pub(super) forward: Option<bool>,
    /// Headers that tell the application what a token says. What callers write there is taken out, token or not.
    pub(super) claims_to_headers: Option<Vec<ClaimToHeader>>,
}

#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(JsonSchema))]
pub(super) struct Jwks {
    /// A JSON Web Key Set.
    pub(super) inline: Option<String>,
    /// Where the issuer publishes one, which agents fetch: https, without a user.
    pub(super) uri: Option<String>,
}

#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(JsonSchema))]
pub(super) struct TokenPlaces {
    /// Headers.
    pub(super) headers: Option<Vec<TokenHeader>>,
    /// Parameters of the query.
    pub(super) params: Option<Vec<String>>,
}

#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(JsonSchema))]
pub(super) struct TokenHeader {
    /// The header's name.
    pub(super) name: String,
    /// What comes before the token in it, in any case, with the space if there is one. Values without it are no tokens.
    pub(super) prefix: Option<String>,
}

#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(JsonSchema))]
pub(super) struct ClaimToHeader {
    /// The claim's name, and the names in it where it is an object.
    pub(super) claim: Vec<String>,
    /// The header's name. It is not there where the claim is not.
    pub(super) header: String,
}
