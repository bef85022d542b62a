//! Who is in charge of a node's kernel side: one agent at a time, and how the next one gets it.
//!
//! Two locks, on folders of the bpffs that both agents see, and that the kernel takes back from whoever dies. Who holds the
//! folder of the pins is in charge. Who wants to be next holds the folder `next` until every pod is served by it, and knocks by
//! opening it once more: the agent in charge sees that, lets go of the pins, and goes on accepting for as long as its listeners
//! are in the maps.

use std::fs::{self, File};
use std::path::Path;
use std::time::{Duration, Instant};

use inotify::WatchMask;
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use tokio::time::{sleep, timeout};
use tracing::warn;

use super::{CaptureError, Part};
use crate::folders::Folders;

/// How long an agent that is asked to may take to let go. One that hangs does not.
const LETS_GO: Duration = Duration::from_secs(20);

/// How often it is looked whether a lock is free that somebody waits for.
const LOOK: Duration = Duration::from_millis(50);

/// How often an agent looks whether another one wants its place though nobody has knocked, which it does all its life: one of an
/// earlier version does not knock.
const CLAIM_LOOK: Duration = Duration::from_secs(5);

/// The locks of an agent in charge.
#[derive(Debug)]
pub(super) struct Charge {
    /// The pins; none once it has let go.
    pins: Option<Flock<File>>,
    /// Held until every pod is served, by one that has succeeded another.
    claim: Option<Flock<File>>,
    /// Another agent was in charge, and lives on for what it carries.
    succeeds: bool,
}

/// Watches for who wants to be next.
#[derive(Debug)]
pub struct Succession {
    next: File,
    /// None where the kernel does not tell of knocks.
    knocks: Option<Folders>,
}

impl Charge {
    /// Takes charge, where nobody is; with `take_over` of one who is, too.
    pub(super) fn take(root: &Path, take_over: bool) -> Result<Self, CaptureError> {
        if !take_over {
            return match lock(root)? {
                Some(pins) => Ok(Self { pins: Some(pins), claim: None, succeeds: false }),
                None => Err(CaptureError::Preflight(format!(
                    "another agent uses the pins in {}; stop it, name another folder with --bpffs, or take over from it \
                     with --take-over",
                    root.display()
                ))),
            };
        }
        let deadline = Instant::now() + LETS_GO;
        let next = make_next(root)?;
        let claim = Some(wait_for(&next, deadline)?);
        if let Some(pins) = lock(root)? {
            return Ok(Self { pins: Some(pins), claim, succeeds: false });
        }
        // A knock that is not heard is made up for by a look.
        drop(File::open(&next));
        let pins = wait_for(root, deadline)?;
        Ok(Self { pins: Some(pins), claim, succeeds: true })
    }

    /// Whether the agent that was in charge before lives on for what it carries.
    pub(super) fn succeeds(&self) -> bool {
        self.succeeds
    }

    /// Every pod is served: the agent before may close its listeners.
    pub(super) fn complete(&mut self) {
        self.claim = None;
    }

    /// Takes charge again where nobody is: the agent that wanted to be next has died over it. False if it has not.
    pub(super) fn take_back(&mut self, root: &Path) -> Result<bool, CaptureError> {
        self.pins = lock(root)?;
        Ok(self.pins.is_some())
    }

    /// Lets the next agent have the pins. Nothing of the kernel side may be changed from here on.
    pub(super) fn let_go(&mut self) {
        self.pins = None;
        self.claim = None;
    }
}

impl Succession {
    pub(super) fn watch(root: &Path) -> Result<Self, CaptureError> {
        let folder = make_next(root)?;
        let next = File::open(&folder).map_err(Part::Links.step(format!("opening {}", folder.display())))?;
        let knocks = listen(&folder).inspect_err(
            |error| warn!(%error, "another agent that is to take over has to wait for some seconds"),
        );
        Ok(Self { next, knocks: knocks.ok() })
    }

    /// Returns when another agent wants to take charge.
    pub async fn claimed(&mut self) {
        while !self.is_claimed() {
            match &mut self.knocks {
                Some(knocks) => drop(timeout(CLAIM_LOOK, knocks.stirred()).await),
                None => sleep(CLAIM_LOOK).await,
            }
        }
    }

    /// Returns when the one that wanted to serves every pod, or has died over it.
    pub async fn settled(&mut self) {
        while self.is_claimed() {
            sleep(LOOK * 2).await;
        }
    }

    fn is_claimed(&self) -> bool {
        let Ok(next) = self.next.try_clone() else { return false };
        // One that is got is free again at once.
        matches!(Flock::lock(next, FlockArg::LockSharedNonblock), Err((_, Errno::EWOULDBLOCK)))
    }
}

fn listen(folder: &Path) -> std::io::Result<Folders> {
    let mut folders = Folders::new(WatchMask::OPEN)?;
    folders.watch([folder])?;
    Ok(folders)
}

fn make_next(root: &Path) -> Result<std::path::PathBuf, CaptureError> {
    let next = root.join("next");
    fs::create_dir_all(&next).map_err(Part::Links.step(format!("making {}", next.display())))?;
    Ok(next)
}

fn wait_for(folder: &Path, deadline: Instant) -> Result<Flock<File>, CaptureError> {
    loop {
        if let Some(lock) = lock(folder)? {
            return Ok(lock);
        }
        if Instant::now() >= deadline {
            return Err(CaptureError::Preflight(format!(
                "the agent that uses the pins in {} does not let go of them; stop it",
                folder.display()
            )));
        }
        std::thread::sleep(LOOK);
    }
}

fn lock(folder: &Path) -> Result<Option<Flock<File>>, CaptureError> {
    let file = File::open(folder).map_err(Part::Links.step(format!("opening {}", folder.display())))?;
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => Ok(Some(lock)),
        Err((_, Errno::EWOULDBLOCK)) => Ok(None),
        Err((_, errno)) => Err(Part::Links.step(format!("locking {}", folder.display()))(errno.into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn one_lets_go_when_another_wants_to_be_next() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().to_owned();
        let mut first = Charge::take(&root, true).unwrap();
        let mut succession = Succession::watch(&root).unwrap();
        assert!(succession.is_claimed(), "it has not served every pod yet");
        first.complete();
        succession.settled().await;

        let refused = Charge::take(&root, false).unwrap_err().to_string();
        assert!(refused.starts_with("another agent uses the pins in"), "{refused}");

        let claim = root.clone();
        let second = std::thread::spawn(move || Charge::take(&claim, true).unwrap());
        timeout(CLAIM_LOOK / 2, succession.claimed()).await.expect("it knocks");
        first.let_go();
        let mut second = second.join().unwrap();
        assert!(succession.is_claimed(), "it has not served every pod yet");
        second.complete();
        succession.settled().await;
        assert!(lock(&root).unwrap().is_none(), "the second is in charge");
    }

    /// It cannot load its programs, say.
    #[tokio::test]
    async fn one_that_dies_on_its_way_leaves_the_other_in_charge() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().to_owned();
        let mut first = Charge::take(&root, false).unwrap();
        let mut succession = Succession::watch(&root).unwrap();
        for lives in [false, true] {
            let claim = root.clone();
            let second = std::thread::spawn(move || Charge::take(&claim, true).unwrap());
            succession.claimed().await;
            first.let_go();
            let mut second = second.join().unwrap();
            if lives {
                second.complete();
            }
            let _in_charge = lives.then_some(second);
            succession.settled().await;
            assert_eq!(first.take_back(&root).unwrap(), !lives);
        }
    }

    /// The kernel lets go for it.
    #[tokio::test]
    async fn one_that_dies_holds_nobody() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().to_owned();
        drop(Charge::take(&root, true).unwrap());
        let mut succession = Succession::watch(&root).unwrap();
        succession.settled().await;
        Charge::take(&root, false).unwrap();
    }
}
