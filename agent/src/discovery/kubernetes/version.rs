//! Which API servers can be served.

use std::fmt;

use k8s_openapi::apimachinery::pkg::version::Info;

/// The oldest: what runs on the nodes, and the objects that the mesh reads, are tested from here on.
const OLDEST: Version = Version { major: 1, minor: 30 };

/// `major.minor` of an API server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    major: u32,
    minor: u32,
}

/// An API server that is too old, in one sentence.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the API server is Kubernetes {0}, and Undermesh needs {OLDEST} or newer; upgrade the cluster, or use a release of Undermesh for that version"
)]
pub struct Unsupported(String);

impl Version {
    /// Reads what the server says of itself. A version that cannot be read is not held against it.
    ///
    /// # Errors
    /// When it is too old.
    pub fn of(info: &Info) -> Result<Self, Unsupported> {
        // Managed clusters write `30+`.
        let number = |text: &str| text.trim_end_matches(|c: char| !c.is_ascii_digit()).parse().ok();
        let Some((major, minor)) = number(&info.major).zip(number(&info.minor)) else {
            return Ok(OLDEST);
        };
        let version = Self { major, minor };
        if version < OLDEST { Err(Unsupported(info.git_version.clone())) } else { Ok(version) }
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_too_old_is_refused_in_a_sentence() {
        let check = |major: &str, minor: &str, expected: &str| {
            let git_version = format!("v{major}.{minor}.1");
            let info = Info { major: major.into(), minor: minor.into(), git_version, ..Info::default() };
            let told =
                Version::of(&info).map_or_else(|error| error.to_string(), |version| version.to_string());
            assert_eq!(told, expected);
        };
        check("1", "30", "1.30");
        check("1", "34+", "1.34");
        check("2", "0", "2.0");
        check("", "", "1.30");
        check(
            "1",
            "29",
            "the API server is Kubernetes v1.29.1, and Undermesh needs 1.30 or newer; upgrade the cluster, or use a \
             release of Undermesh for that version",
        );
    }
}
