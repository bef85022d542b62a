//! What goes wrong about pods and the kernel, in words that name the culprit.

use std::io;

use crate::sentence::in_one_sentence;

/// Why something about a pod or the kernel could not be done. The message names the culprit and what to do.
#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    /// The machine lacks something that the agent needs.
    #[error("{0}")]
    Preflight(String),
    /// The kernel refused the programs.
    #[error("loading the kernel programs: {0}")]
    Load(String),
    /// A step failed that concerns one part of a pod, or of the agent itself.
    #[error("{step}: {source}")]
    Step {
        /// The part.
        part: Part,
        /// What was tried, with the path or name it was tried on.
        step: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// A map refused an entry.
    #[error("map {map}: {reason}")]
    Map {
        /// The map's name.
        map: &'static str,
        /// What the kernel said.
        reason: String,
    },
}

/// What a failed step was about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// The pod's network namespace, its interfaces and routes.
    Netns,
    /// The pod's or the agent's cgroup.
    Cgroup,
    /// The listeners inside of the pod.
    Listeners,
    /// Links and their pins.
    Links,
    /// The agent's own threads.
    Workers,
}

impl Part {
    /// Turns the error of a step into one that names it.
    pub(crate) fn step(self, what: impl Into<String>) -> impl FnOnce(io::Error) -> CaptureError {
        let step = what.into();
        move |source| CaptureError::Step { part: self, step, source }
    }
}

pub(super) fn map_error(map: &'static str) -> impl Fn(aya::maps::MapError) -> CaptureError {
    move |error| CaptureError::Map { map, reason: in_one_sentence(&error) }
}
