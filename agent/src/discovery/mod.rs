//! Where documents come from, and where the pods of this node are.
//!
//! Both sources yield the same: a [`Publication`]. What becomes of it is for others to say.

pub mod directory;
pub mod kubernetes;
pub mod node;

use std::sync::Arc;

use crate::config::Rejection;
use crate::snapshot::Snapshot;

/// What a source says at one moment.
#[derive(Clone, Debug)]
pub struct Publication {
    /// The world as the documents in force describe it.
    pub snapshot: Arc<Snapshot>,
    /// What is wrong with the documents, sorted by place.
    pub rejections: Arc<[Rejection]>,
}
