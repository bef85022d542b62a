//! Which pods are captured, as the pins say: whichever agent has enrolled them. Changes nothing.

use std::path::{Path, PathBuf};

use super::Netns;
use super::pod::pin_label;
use super::programs::{COOKIE_FREE, STEER};
use crate::model::ObjectRef;

/// The folder of the pods' pins.
#[derive(Clone, Debug)]
pub struct PinnedPods(PathBuf);

/// Those of them that are of one network namespace.
#[derive(Debug)]
pub struct PinnedWithin {
    pods: PinnedPods,
    /// None if the namespace cannot be opened.
    cookie: Option<u64>,
}

impl PinnedPods {
    pub(super) fn new(folder: PathBuf) -> Self {
        Self(folder)
    }

    /// What is captured in the network namespace at this path. Blocks for a moment.
    pub fn within(&self, netns: &Path) -> PinnedWithin {
        PinnedWithin { pods: self.clone(), cookie: Netns::open(netns).ok().map(|netns| netns.cookie()) }
    }

    /// A pod that is being enrolled has some of its programs.
    fn is_complete(&self, pod: &ObjectRef, cookie: u64) -> bool {
        let pins = self.0.join(pin_label(pod, cookie));
        COOKIE_FREE.iter().chain([&STEER]).all(|program| pins.join(program).exists())
    }
}

impl PinnedWithin {
    /// Whether the pod is captured there, and not merely in a namespace that it had before.
    pub fn has(&self, pod: &ObjectRef) -> bool {
        self.cookie.is_some_and(|cookie| self.pods.is_complete(pod, cookie))
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_pod_is_captured_with_its_last_program_and_in_its_own_namespace() {
        let root = tempfile::tempdir().unwrap();
        let (pinned, web) = (PinnedPods::new(root.path().to_owned()), ObjectRef::new("shop", "web"));
        let pins = root.path().join("shop_web_7");
        fs::create_dir_all(&pins).unwrap();
        for program in [STEER].iter().chain(&COOKIE_FREE) {
            assert!(!pinned.is_complete(&web, 7), "without {program}");
            fs::write(pins.join(program), "").unwrap();
        }
        assert!(pinned.is_complete(&web, 7));
        assert!(!pinned.is_complete(&web, 8) && !pinned.is_complete(&ObjectRef::new("shop", "we"), 7));
    }
}
