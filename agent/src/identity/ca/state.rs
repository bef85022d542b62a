//! The state of an embedded authority: which roots there are, and from when to when each is trusted and signs.
//!
//! The file holds moments, not phases. Whoever reads it at the same time comes to the same conclusion, so agents that
//! share a directory agree without talking, and nobody has to be running for a rotation to go on.

use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

use super::super::TrustDomain;
use super::super::clock::{from_unix, rfc3339, to_unix};

/// The only version that there has been.
const VERSION: u32 = 1;
/// A rotation has two roots; more are left over from ones in a row.
const MAX_ROOTS: usize = 16;
/// What the clocks of a mesh may differ, on top of a leaf's life, before a root is dropped.
const SLACK: Duration = Duration::from_secs(10 * 60);
/// Beyond this, times are nonsense, and the arithmetic below would have to be careful.
const LAST_SECOND: i64 = 253_402_300_799; // 9999-12-31T23:59:59Z
/// A leaf that outlives its node is no leaf.
const LONGEST_LEAF_LIFE: u64 = 366 * 86_400;

/// The authority's state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CaState {
    /// Its trust domain.
    pub trust_domain: TrustDomain,
    /// The longest that a leaf may live.
    pub leaf_life: Duration,
    /// In the order of their making.
    pub roots: Vec<RootState>,
}

/// One root.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RootState {
    /// Names its files; never used again.
    pub number: u32,
    /// From when on it signs leaves, until a later one does.
    pub signs_from: SystemTime,
    /// When it is dropped; `None` while no rotation has begun.
    pub trusted_until: Option<SystemTime>,
    /// When its certificate expires.
    pub expires: SystemTime,
}

/// What a root is, at some moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Trusted, so that every agent knows it by the time it signs.
    Next,
    /// Signs leaves.
    Signing,
    /// Trusted, for leaves that it signed are in use.
    Retiring,
    /// Not trusted any more.
    Dropped,
}

/// What is wrong with a state file.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not the state of a certificate authority: {0}")]
pub struct StateError(String);

/// A rotation cannot begin yet.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a rotation is under way: root {number} signs from {from} on")]
pub struct RotationUnderWay {
    number: u32,
    from: String,
}

impl CaState {
    /// That of a new authority, whose first root signs at once.
    pub(super) fn new(
        trust_domain: TrustDomain,
        leaf_life: Duration,
        now: SystemTime,
        expires: SystemTime,
    ) -> Self {
        let first = RootState { number: 1, signs_from: now, trusted_until: None, expires };
        Self { trust_domain, leaf_life, roots: vec![first] }
    }

    /// Adds a root that is trusted from now on and signs after the overlap. Those before it are dropped when the last
    /// leaf that they may have signed has expired everywhere.
    pub(super) fn rotate(
        &mut self,
        now: SystemTime,
        overlap: Duration,
        expires: SystemTime,
    ) -> Result<u32, RotationUnderWay> {
        if let Some(next) = self.roots.iter().find(|root| root.signs_from > now) {
            return Err(RotationUnderWay { number: next.number, from: rfc3339(next.signs_from) });
        }
        let signs_from = now + overlap;
        let dropped = signs_from + self.leaf_life + SLACK;
        for root in &mut self.roots {
            root.trusted_until.get_or_insert(dropped);
        }
        let number = self.roots.iter().map(|root| root.number).max().unwrap_or(0) + 1;
        self.roots.push(RootState { number, signs_from, trusted_until: None, expires });
        Ok(number)
    }

    /// Takes out the roots that are dropped, and tells their numbers.
    pub(super) fn prune(&mut self, now: SystemTime) -> Vec<u32> {
        let phases: Vec<_> = self.phases(now).map(|(root, phase)| (root.number, phase)).collect();
        let dropped: Vec<_> =
            phases.iter().filter(|(_, phase)| *phase == Phase::Dropped).map(|(number, _)| *number).collect();
        self.roots.retain(|root| !dropped.contains(&root.number));
        dropped
    }

    /// Every root with what it is now.
    pub fn phases(&self, now: SystemTime) -> impl Iterator<Item = (&RootState, Phase)> {
        let signing = self.signing(now).number;
        self.roots.iter().map(move |root| {
            let phase = match root.trusted_until {
                _ if root.number == signing => Phase::Signing,
                Some(until) if until <= now => Phase::Dropped,
                _ if root.signs_from > now => Phase::Next,
                _ => Phase::Retiring,
            };
            (root, phase)
        })
    }

    /// The root that signs now: the latest whose time has come. Before the first one's time, by a clock that is behind,
    /// the first.
    pub(super) fn signing(&self, now: SystemTime) -> &RootState {
        let due = self.roots.iter().filter(|root| root.signs_from <= now).max_by_key(|root| root.number);
        // A state has one root at least; the parser sees to it.
        due.unwrap_or(&self.roots[0])
    }

    /// Reads the file.
    ///
    /// # Errors
    /// When it is not exactly what this version writes.
    pub fn parse(text: &[u8]) -> Result<Self, StateError> {
        let file: File = serde_json::from_slice(text).map_err(|error| StateError(error.to_string()))?;
        if file.version != VERSION {
            return Err(StateError(format!("version {}, and this undermesh reads {VERSION}", file.version)));
        }
        if file.roots.is_empty() || file.roots.len() > MAX_ROOTS {
            return Err(StateError(format!("{} roots, and it must have 1 to {MAX_ROOTS}", file.roots.len())));
        }
        if !file.roots.is_sorted_by(|a, b| a.number < b.number) {
            return Err(StateError("the roots are not in order".into()));
        }
        if !(1..=LONGEST_LEAF_LIFE).contains(&file.leaf_life_seconds) {
            return Err(StateError("leafLifeSeconds is out of range".into()));
        }
        let trust_domain =
            file.trust_domain.parse().map_err(|error| StateError(format!("trustDomain: {error}")))?;
        let roots = file.roots.into_iter().map(RootState::try_from).collect::<Result<_, _>>()?;
        Ok(Self { trust_domain, leaf_life: Duration::from_secs(file.leaf_life_seconds), roots })
    }

    /// Writes the file.
    pub(super) fn to_text(&self) -> String {
        let roots = self.roots.iter().map(|root| RootFile {
            number: root.number,
            signs_from: rfc3339(root.signs_from),
            trusted_until: root.trusted_until.map(rfc3339),
            expires: rfc3339(root.expires),
        });
        let file = File {
            version: VERSION,
            trust_domain: self.trust_domain.to_string(),
            leaf_life_seconds: self.leaf_life.as_secs(),
            roots: roots.collect(),
        };
        // Maps with keys of text and plain values always become JSON.
        serde_json::to_string_pretty(&file).unwrap_or_default() + "\n"
    }
}

impl Phase {
    /// Its stable name.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Next => "next",
            Self::Signing => "signing",
            Self::Retiring => "retiring",
            Self::Dropped => "dropped",
        }
    }
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct File {
    version: u32,
    trust_domain: String,
    leaf_life_seconds: u64,
    roots: Vec<RootFile>,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct RootFile {
    number: u32,
    signs_from: String,
    trusted_until: Option<String>,
    expires: String,
}

impl TryFrom<RootFile> for RootState {
    type Error = StateError;

    fn try_from(file: RootFile) -> Result<Self, StateError> {
        if !(1..u32::MAX).contains(&file.number) {
            return Err(StateError(format!("a root cannot have the number {}", file.number)));
        }
        Ok(Self {
            number: file.number,
            signs_from: moment("signsFrom", &file.signs_from)?,
            trusted_until: file.trusted_until.map(|text| moment("trustedUntil", &text)).transpose()?,
            expires: moment("expires", &file.expires)?,
        })
    }
}

fn moment(field: &str, text: &str) -> Result<SystemTime, StateError> {
    let time: jiff::Timestamp = text.parse().map_err(|error| StateError(format!("{field}: {error}")))?;
    match time.as_second() {
        seconds @ 0..=LAST_SECOND => Ok(from_unix(seconds)),
        _ => Err(StateError(format!("{field}: {text} is out of range"))),
    }
}

/// To the second, as the file has it: what is in memory and what is read back are the same.
pub(super) fn whole_seconds(time: SystemTime) -> SystemTime {
    from_unix(to_unix(time))
}

#[cfg(test)]
mod tests {
    use expect_test::expect;
    use proptest::prelude::*;

    use super::*;

    fn at(seconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000 + seconds)
    }

    fn phases(state: &CaState, now: SystemTime) -> String {
        state.phases(now).map(|(root, phase)| format!("{}:{} ", root.number, phase.as_str())).collect()
    }

    #[test]
    fn a_rotation_follows_the_clock_alone() {
        let life = Duration::from_secs(3600);
        let mut state = CaState::new(TrustDomain::default(), life, at(0), at(1_000_000));
        assert_eq!(phases(&state, at(0)), "1:signing ");
        assert_eq!(state.rotate(at(100), Duration::from_secs(60), at(2_000_000)), Ok(2));
        let dropped = 160 + 3600 + 600;
        for (now, expected) in [
            // A clock that is behind.
            (0, "1:signing 2:next "),
            (100, "1:signing 2:next "),
            (159, "1:signing 2:next "),
            (160, "1:retiring 2:signing "),
            (dropped - 1, "1:retiring 2:signing "),
            (dropped, "1:dropped 2:signing "),
        ] {
            assert_eq!(phases(&state, at(now)), expected, "{now}");
        }
        let error = state.rotate(at(130), Duration::ZERO, at(3_000_000)).unwrap_err();
        assert_eq!(error.to_string(), "a rotation is under way: root 2 signs from 2027-01-15T08:02:40Z on");
        // The third before the first is gone, then both are dropped together with time.
        assert_eq!(state.rotate(at(200), Duration::from_secs(10), at(3_000_000)), Ok(3));
        assert_eq!(phases(&state, at(300)), "1:retiring 2:retiring 3:signing ");
        assert_eq!(state.prune(at(dropped)), [1]);
        assert_eq!(phases(&state, at(dropped)), "2:retiring 3:signing ");
        assert_eq!(state.prune(at(1_000_000)), [2]);
        assert_eq!(state.prune(at(9_000_000)), [0; 0]);
        assert_eq!(state.rotate(at(1_000_000), Duration::ZERO, at(3_000_000)), Ok(4));
    }

    #[test]
    fn files_that_are_none() {
        let good = CaState::new(TrustDomain::default(), Duration::from_secs(60), at(0), at(9)).to_text();
        expect![[r#"
            {
              "version": 1,
              "trustDomain": "cluster.local",
              "leafLifeSeconds": 60,
              "roots": [
                {
                  "number": 1,
                  "signsFrom": "2027-01-15T08:00:00Z",
                  "trustedUntil": null,
                  "expires": "2027-01-15T08:00:09Z"
                }
              ]
            }
        "#]]
        .assert_eq(&good);
        for (from, to, what) in [
            ("\"version\": 1", "\"version\": 2", "version 2, and this undermesh reads 1"),
            ("\"number\": 1", "\"number\": 0", "a root cannot have the number 0"),
            ("\"number\": 1", "\"number\": -1", "invalid value"),
            ("\"number\": 1", "\"number\": \"../1\"", "invalid type"),
            ("\"number\": 1", "\"number\": 4294967295", "a root cannot have the number"),
            ("\"number\": 1,", "\"number\": 1, \"key\": 1,", "unknown field"),
            ("cluster.local", "Cluster", "trustDomain: the trust domain has a character"),
            ("2027-01-15T08:00:00Z", "yesterday", "signsFrom"),
            ("2027-01-15T08:00:00Z", "-002027-01-15T08:00:00Z", "out of range"),
            ("\"leafLifeSeconds\": 60", "\"leafLifeSeconds\": 0", "leafLifeSeconds"),
            ("\"leafLifeSeconds\": 60", "\"leafLifeSeconds\": 18446744073709551615", "leafLifeSeconds"),
        ] {
            let error = CaState::parse(good.replace(from, to).as_bytes()).unwrap_err().to_string();
            assert!(error.contains(what), "{to}: {error}");
        }
        let none = r#"{"version":1,"trustDomain":"a","leafLifeSeconds":1,"roots":[]}"#;
        assert!(CaState::parse(none.as_bytes()).is_err());
        assert!(CaState::parse(good[..good.len() / 2].as_bytes()).is_err());
    }

    proptest! {
        #[test]
        fn bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            _ = CaState::parse(&bytes);
        }

        #[test]
        fn nothing_that_is_read_panics_or_is_read_back_otherwise(
            numbers in prop::collection::btree_set(0u32.., 0..4),
            times in prop::collection::vec(-10i64..300_000_000_000, 12),
            life in any::<u64>(),
            now in 0u64..300_000_000_000,
        ) {
            let time = |i: usize| jiff::Timestamp::from_second(times[i]).map_or("x".into(), |t| t.to_string());
            let roots: Vec<_> = numbers.iter().enumerate().map(|(i, number)| serde_json::json!({
                "number": number, "signsFrom": time(3 * i), "expires": time(3 * i + 1),
                "trustedUntil": (times[3 * i + 2] % 2 == 0).then(|| time(3 * i + 2)),
            })).collect();
            let file = serde_json::json!({
                "version": 1, "trustDomain": "td", "leafLifeSeconds": life, "roots": roots
            });
            if let Ok(mut state) = CaState::parse(file.to_string().as_bytes()) {
                prop_assert_eq!(&CaState::parse(state.to_text().as_bytes()).unwrap(), &state);
                let now = SystemTime::UNIX_EPOCH + Duration::from_secs(now);
                prop_assert_eq!(state.phases(now).filter(|(_, p)| *p == Phase::Signing).count(), 1);
                state.prune(now);
                prop_assert!(!state.roots.is_empty());
                _ = state.rotate(now, Duration::from_secs(1), now);
            }
        }
    }
}
