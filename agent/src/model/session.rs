//! How the requests of one session are known, and how long it lasts.
//!
//! Values alone: what a request carries of its session is for `proxy` to know.

use std::time::Duration;

use super::Name;

/// How the requests of one session are known and for how long they go to one endpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SessionPersistence {
    /// The name of the cookie or header.
    pub name: Name,
    /// What carries the session.
    pub kind: SessionKind,
    /// How long a client keeps its cookie.
    pub lifetime: SessionLifetime,
    /// The session ends so long after it began.
    pub absolute_timeout: Option<Duration>,
    /// The session ends when it was not used for so long.
    pub idle_timeout: Option<Duration>,
}

/// What carries a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SessionKind {
    /// A cookie.
    Cookie,
    /// A header.
    Header,
}

/// How long a client keeps the cookie of its session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SessionLifetime {
    /// Until its own session ends (a browser is closed): no `Max-Age`.
    Session,
    /// Until the absolute timeout, which is its `Max-Age`.
    Permanent,
}
