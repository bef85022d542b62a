//! Sessions, as rules of routes and policies have them (GEP-1619): how they are written, and what that means.

use http::HeaderName;
use serde::Deserialize;

use super::non_empty;
use super::place::Place;
use crate::model::{Name, SessionKind, SessionLifetime, SessionPersistence};

/// `sessionPersistence`.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Wire {
    session_name: Option<String>,
    absolute_timeout: Option<String>,
    /// Until bundle 1.5.
    idle_timeout: Option<String>,
    #[serde(rename = "type")]
    kind: Option<String>,
    cookie_config: Option<CookieConfig>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct CookieConfig {
    lifetime_type: Option<String>,
}

impl Wire {
    /// What it says; `name` is that of a session that has none.
    pub(super) fn read(&self, name: impl FnOnce() -> Name, place: &Place<'_>) -> Option<SessionPersistence> {
        let kind = match self.kind.as_deref() {
            None | Some("Cookie") => SessionKind::Cookie,
            Some("Header") => SessionKind::Header,
            Some(other) => {
                place.key("type").expected("Cookie or Header", other);
                return None;
            }
        };
        let name = match non_empty(&self.session_name) {
            None => name(),
            // A cookie's name is made of the same characters as a header's (RFC 6265, section 4.1.1).
            Some(name) if name.len() <= 128 && HeaderName::from_bytes(name.as_bytes()).is_ok() => name,
            Some(name) => {
                place.key("sessionName").expected("a name that a cookie or header may have", &name);
                return None;
            }
        };
        let config = self.cookie_config.as_ref();
        if config.is_some() && kind == SessionKind::Header {
            place
                .key("cookieConfig")
                .refuse("expected nothing about a cookie where a header carries the session");
        }
        let lifetime = match config.and_then(|config| config.lifetime_type.as_deref()) {
            None | Some("Session") => SessionLifetime::Session,
            Some("Permanent") => SessionLifetime::Permanent,
            Some(other) => {
                place.key("cookieConfig").key("lifetimeType").expected("Permanent or Session", other);
                return None;
            }
        };
        let read = |key: &str, text: &Option<String>| place.duration_of(key, text);
        let absolute_timeout = read("absoluteTimeout", &self.absolute_timeout);
        if lifetime == SessionLifetime::Permanent && self.absolute_timeout.is_none() {
            place
                .key("absoluteTimeout")
                .refuse("expected a duration, for a cookie that is Permanent lasts so long");
        }
        let idle_timeout = read("idleTimeout", &self.idle_timeout);
        Some(SessionPersistence { name, kind, lifetime, absolute_timeout, idle_timeout })
    }
}
