//! The JSON of the debug pages. Hand-written beside the model, so that the model stays plain and a change there does
//! not silently change what users' scripts read. The user's commands read the same types back.

mod before;
mod config;
mod connections;
mod plaintext;
mod status;

pub use before::{BeforeView, EarlierView, PodBeforeView};
pub use connections::{ConnectionView, ConnectionsView, PeerView};
pub use plaintext::{CallerView, CallsView, PlaintextView, WatchedView};
pub use status::{PodView, RejectionView, StatusView};

pub(super) use config::config;
pub(super) use connections::connections;
pub(super) use plaintext::plaintext;
pub(super) use status::{pods, status};

use std::time::SystemTime;

use jiff::Timestamp;
use serde::Serialize;

/// RFC 3339, UTC, milliseconds; `None` beyond the year 9999.
fn time(at: SystemTime) -> Option<String> {
    Timestamp::try_from(at).ok().map(|at| format!("{at:.3}"))
}

pub(super) fn to_json(view: &impl Serialize) -> Vec<u8> {
    let mut json = serde_json::to_vec(view).unwrap_or_else(|error| {
        // No view has a map with keys that are no strings, nor a Serialize that fails of itself.
        tracing::error!(%error, "a debug page cannot be written as JSON");
        b"null".to_vec()
    });
    json.push(b'\n');
    json
}
