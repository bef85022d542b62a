//! What the leader does next to the root's Secret, decided from what was seen of it.

use std::time::SystemTime;

use crate::identity::ca::keyring::Keyring;

/// Annotation by which people ask for a new root: each new value is one request.
pub(super) const ROTATE: &str = "undermesh.io/rotate";
/// Annotation with the last request that was answered; written together with the answer, so that no leader answers twice.
pub(super) const ROTATED: &str = "undermesh.io/rotated";

/// What is known of the Secret.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Seen {
    /// Nothing yet.
    Unknown,
    /// That it does not exist.
    Absent,
    /// What it holds.
    Present(Stored),
}

/// The Secret as it is, without what is secret.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Stored {
    pub(super) resource_version: String,
    /// Of its keys.
    pub(super) names: Vec<String>,
    pub(super) rotate: Option<String>,
    pub(super) rotated: Option<String>,
    pub(super) standing: Standing,
}

/// What has become of what it holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Standing {
    /// It is in force.
    InForce,
    /// What is in force has been rotated since.
    Older,
    /// It cannot be read.
    Broken(String),
}

/// What to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Nothing.
    Nothing,
    /// Make the first root.
    Create,
    /// Make the Secret again from what is in force.
    Restore,
    /// Write what is in force over what is older.
    PutBack,
    /// Make a new root, for a request or because the old one ends.
    Rotate {
        /// The request that this answers.
        request: Option<String>,
    },
    /// Say that there will be none for this request.
    Refuse {
        /// The request.
        request: String,
    },
    /// Take out roots that are not trusted any more.
    Prune,
}

/// The next step. Carried out or not, it is decided anew from what is seen then.
pub(super) fn step(seen: &Seen, in_force: Option<&Keyring>, now: SystemTime) -> Step {
    let (stored, keyring) = match (seen, in_force) {
        (Seen::Unknown, _) => return Step::Nothing,
        (Seen::Absent, None) => return Step::Create,
        // Another root in its place would divide the mesh.
        (Seen::Absent, Some(_)) => return Step::Restore,
        (Seen::Present(_), None) => return Step::Nothing,
        (Seen::Present(stored), Some(keyring)) => (stored, keyring),
    };
    match &stored.standing {
        // Whoever has broken it may have meant something by it, and all that matters may be in it.
        Standing::Broken(_) => return Step::Nothing,
        Standing::Older => return Step::PutBack,
        Standing::InForce => {}
    }
    let request = stored.rotate.as_ref().filter(|wish| stored.rotated.as_ref() != Some(wish)).cloned();
    match request {
        Some(request) if keyring.is_supplied() => Step::Refuse { request },
        // One after the other: a root that waits to sign is not overtaken.
        Some(_) if keyring.is_rotating(now) => Step::Nothing,
        Some(request) => Step::Rotate { request: Some(request) },
        None if keyring.is_ageing(now) => Step::Rotate { request: None },
        None if keyring.pruned(now).is_some() => Step::Prune,
        None => Step::Nothing,
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::identity::ca::directory::InitOptions;

    const HOUR: Duration = Duration::from_secs(3_600);

    fn at(seconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000 + seconds)
    }

    fn stored(rotate: Option<&str>, rotated: Option<&str>, standing: Standing) -> Seen {
        Seen::Present(Stored {
            resource_version: "7".into(),
            names: Vec::new(),
            rotate: rotate.map(Into::into),
            rotated: rotated.map(Into::into),
            standing,
        })
    }

    #[test]
    fn a_root_is_made_once_kept_and_rotated_on_request() {
        let options = InitOptions { root_life: 100 * HOUR, leaf_life: HOUR, ..InitOptions::default() };
        let domain = &options.trust_domain;
        let read = |files, seconds| Keyring::read(files, domain, at(seconds)).unwrap();
        let first = read(Keyring::generate(&options, at(0)).unwrap(), 0);
        let second = read(first.rotated(HOUR, 100 * HOUR, at(0)).unwrap(), 0);
        let check = |seen: &Seen, keyring: Option<&Keyring>, seconds: u64, expected: Step| {
            assert_eq!(step(seen, keyring, at(seconds)), expected, "{seen:?} after {seconds} s");
        };
        let seen = |rotate, rotated| stored(rotate, rotated, Standing::InForce);
        let rotate = |request: &str| Step::Rotate { request: Some(request.into()) };

        check(&Seen::Unknown, None, 0, Step::Nothing);
        check(&Seen::Unknown, Some(&first), 0, Step::Nothing);
        check(&Seen::Absent, None, 0, Step::Create);
        check(&Seen::Absent, Some(&first), 0, Step::Restore);
        check(&seen(None, None), Some(&first), 0, Step::Nothing);
        for keyring in [None, Some(&first)] {
            check(&stored(Some("1"), None, Standing::Broken("x".into())), keyring, 0, Step::Nothing);
        }
        check(&stored(Some("1"), None, Standing::Older), Some(&second), 0, Step::PutBack);

        check(&seen(Some("1"), None), Some(&first), 0, rotate("1"));
        check(&seen(Some("1"), Some("1")), Some(&second), 0, Step::Nothing);
        check(&seen(Some("2"), Some("1")), Some(&second), 3_599, Step::Nothing);
        check(&seen(Some("2"), Some("1")), Some(&second), 3_600, rotate("2"));
        check(&seen(None, Some("1")), Some(&first), 0, Step::Nothing);

        // Overlap, a leaf's life and ten minutes after the rotation the old root goes.
        check(&seen(None, None), Some(&second), 7_799, Step::Nothing);
        check(&seen(None, None), Some(&second), 7_800, Step::Prune);
        // Nobody has asked, and the mesh would end with the root.
        check(&seen(None, None), Some(&first), 90 * 3_600, Step::Nothing);
        check(&seen(None, None), Some(&first), 91 * 3_600, Step::Rotate { request: None });
    }
}
