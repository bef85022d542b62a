//! What pods refused when an earlier agent was last there: the kernel still knows, whatever has become of the policies since.

use std::collections::HashMap;

use tracing::warn;
use undermesh_common::maps::Pod;

use super::programs::Programs;
use crate::model::{MtlsMode, Opened};

/// The entries of pods as they were when this agent began, by the cookie of their network namespace.
#[derive(Debug, Default)]
pub(super) struct Inherited(HashMap<u64, Pod>);

impl Inherited {
    /// Reads them, before this agent writes any.
    pub(super) fn of(programs: &Programs) -> Self {
        let entries = programs.hash_map::<u64, Pod>("pods").map(|pods| pods.iter().flatten().collect());
        Self(entries.unwrap_or_else(|error| {
            warn!(%error, "what pods refused before this agent began is not known");
            HashMap::new()
        }))
    }

    /// What of the pod takes plaintext now and did not under an earlier agent. It is told once.
    pub(super) fn opened(&mut self, cookie: u64, now: &Pod) -> Option<Opened> {
        let before = self.0.remove(&cookie)?;
        Opened::between((mode(&before), &exceptions(&before)), (mode(now), &exceptions(now)))
    }
}

fn mode(entry: &Pod) -> MtlsMode {
    if entry.strict == 0 { MtlsMode::Permissive } else { MtlsMode::Strict }
}

fn exceptions(entry: &Pod) -> Vec<(u16, MtlsMode)> {
    let other = if entry.strict == 0 { MtlsMode::Strict } else { MtlsMode::Permissive };
    entry.mode_exceptions.iter().filter(|port| **port != 0).map(|port| (*port, other)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whether plaintext is refused, and the ports at which it is the other way round.
    fn entry(strict: u32, ports: &[u16]) -> Pod {
        let mut entry = Pod { strict, ..Pod::default() };
        entry.mode_exceptions[..ports.len()].copy_from_slice(ports);
        entry
    }

    #[test]
    fn what_comes_to_take_plaintext_is_told_once() {
        for (before, now, expected) in [
            (entry(1, &[]), entry(0, &[]), Some(Opened::Pod)),
            (entry(1, &[]), entry(1, &[9090]), Some(Opened::Ports(vec![9090]))),
            (entry(0, &[8080, 9090]), entry(0, &[8080]), Some(Opened::Ports(vec![9090]))),
            (entry(1, &[9090]), entry(0, &[8080]), Some(Opened::Pod)),
            (entry(0, &[]), entry(1, &[9090]), None),
            (entry(1, &[9090]), entry(1, &[9090]), None),
        ] {
            let mut inherited = Inherited([(7, before)].into());
            assert_eq!(inherited.opened(8, &now), None);
            assert_eq!(inherited.opened(7, &now), expected, "{before:?} {now:?}");
            assert_eq!(inherited.opened(7, &now), None);
        }
    }
}
