//! Which pods are enrolled, told between the agents of one machine: a file of each in a folder that they share.
//!
//! A label is a wish, enrolment is a fact. Clients tunnel only to pods that are in another agent's file.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::Context as _;
use inotify::WatchMask;
use serde::{Deserialize, Serialize};
use tokio::time::{sleep, timeout};
use tracing::{info, warn};

use crate::capture::OnAgentDown;
use crate::folders::Folders;
use crate::model::{Name, PublishedPod, Workload, WorkloadUid};
use crate::proxy::tunnel::PublishedPods;

const PREFIX: &str = "enrolled-";
const SUFFIX: &str = ".json";

/// How often the folder is looked at where the kernel does not tell of changes, and where it does.
const LOOK: Duration = Duration::from_secs(2);
const LOOK_ANYWAY: Duration = Duration::from_secs(10);

/// What an agent's file says.
#[derive(Debug, Serialize, Deserialize)]
struct Statement {
    node: Name,
    pods: Vec<Enrolled>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Enrolled {
    uid: WorkloadUid,
    addresses: Vec<IpAddr>,
    /// Seconds since 1970.
    since: u64,
    /// While this agent is down, clients are to go past it, in plaintext.
    #[serde(default)]
    plaintext_when_down: bool,
}

/// Whether clients are to go past the pod's agent while that is down, in plaintext.
pub(super) fn takes_plaintext_when_down(workload: &Workload, on_agent_down: OnAgentDown) -> bool {
    on_agent_down == OnAgentDown::Open && workload.takes_plaintext_everywhere() && !workload.guarded
}

/// Writes this agent's file.
#[derive(Debug)]
pub(super) struct Publisher {
    path: PathBuf,
    node: Name,
    on_agent_down: OnAgentDown,
    pods: BTreeMap<WorkloadUid, Enrolled>,
    /// The file does not say what it should: it could not be written.
    is_stale: bool,
}

impl Publisher {
    /// Takes over what an earlier agent of this node has published: its pods are still in the mesh, and are to be told
    /// of until they are not.
    pub(super) fn open(folder: &Path, node: &Name, on_agent_down: OnAgentDown) -> anyhow::Result<Self> {
        fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))?;
        let path = folder.join(format!("{PREFIX}{node}{SUFFIX}"));
        let before = match read(&path) {
            Ok(statement) => statement.pods,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            Err(error) => {
                warn!(path = %path.display(), %error, "what was published before cannot be read");
                Vec::new()
            }
        };
        let is_open = on_agent_down == OnAgentDown::Open;
        let known =
            |pod: Enrolled| Enrolled { plaintext_when_down: pod.plaintext_when_down && is_open, ..pod };
        let pods = before.into_iter().map(|pod| (pod.uid.clone(), known(pod))).collect();
        let mut publisher = Self { path, node: node.clone(), on_agent_down, pods, is_stale: false };
        publisher.write().with_context(|| format!("writing {}", publisher.path.display()))?;
        Ok(publisher)
    }

    /// The pod takes tunnels.
    pub(super) fn publish(&mut self, workload: &Workload) {
        let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
        let enrolled = Enrolled {
            uid: workload.uid.clone(),
            addresses: workload.addresses.clone(),
            since,
            plaintext_when_down: takes_plaintext_when_down(workload, self.on_agent_down),
        };
        let says_the_same = |before: &Enrolled| {
            before.addresses == enrolled.addresses
                && before.plaintext_when_down == enrolled.plaintext_when_down
        };
        if self.pods.get(&workload.uid).is_some_and(says_the_same) {
            return;
        }
        self.pods.insert(workload.uid.clone(), enrolled);
        self.write_or_warn();
    }

    /// Whether it is told of the pod.
    pub(super) fn has(&self, uid: &WorkloadUid) -> bool {
        self.pods.contains_key(uid)
    }

    /// These take no tunnels any more. True if that is news.
    pub(super) fn withdraw<'a>(&mut self, uids: impl IntoIterator<Item = &'a WorkloadUid>) -> bool {
        let before = self.pods.len();
        for uid in uids {
            self.pods.remove(uid);
        }
        let is_news = self.pods.len() != before;
        if is_news {
            self.write_or_warn();
        }
        is_news
    }

    /// What an earlier agent has published of pods that are not to be enrolled now goes.
    pub(super) fn withdraw_all_but(&mut self, is_wanted: impl Fn(&WorkloadUid) -> bool) {
        let gone: Vec<_> = self.pods.keys().filter(|uid| !is_wanted(uid)).cloned().collect();
        self.withdraw(&gone);
    }

    /// Whether the file says what it should.
    pub(super) fn is_settled(&self) -> bool {
        !self.is_stale
    }

    /// Writes again what could not be written.
    pub(super) fn try_again(&mut self) {
        if self.is_stale && self.write().is_ok() {
            info!(path = %self.path.display(), "other nodes are told again which pods are enrolled");
        }
    }

    fn write_or_warn(&mut self) {
        if let Err(error) = self.write() {
            warn!(path = %self.path.display(), %error, "other nodes are not told which pods are enrolled; trying again");
        }
    }

    /// Readers see the file before or after, never in between.
    fn write(&mut self) -> io::Result<()> {
        self.is_stale = true;
        let statement = Statement { node: self.node.clone(), pods: self.pods.values().cloned().collect() };
        let next = self.path.with_extension("new");
        fs::write(&next, serde_json::to_vec(&statement)?)?;
        fs::rename(&next, &self.path)?;
        self.is_stale = false;
        Ok(())
    }
}

/// Reads the others' files.
#[derive(Debug)]
pub(super) struct Follower {
    folder: PathBuf,
    own: PathBuf,
    published: PublishedPods,
    statements: BTreeMap<PathBuf, Statement>,
}

impl Follower {
    /// Reads what there is.
    pub(super) fn open(folder: &Path, node: &Name) -> Self {
        let own = folder.join(format!("{PREFIX}{node}{SUFFIX}"));
        let mut follower =
            Self { folder: folder.to_owned(), own, published: Arc::default(), statements: BTreeMap::new() };
        follower.refresh();
        follower
    }

    /// What is known, always as of now.
    pub(super) fn published(&self) -> PublishedPods {
        self.published.clone()
    }

    /// Follows the folder for ever.
    pub(super) async fn follow(mut self) {
        let mut watched = match self.watch() {
            Ok(folders) => Some(folders),
            Err(error) => {
                warn!(%error, folder = %self.folder.display(), "changes are noticed only every few seconds");
                None
            }
        };
        loop {
            // What came before the watch stood.
            self.refresh();
            match &mut watched {
                Some(folders) => drop(timeout(LOOK_ANYWAY, folders.stirred()).await),
                None => sleep(LOOK).await,
            }
        }
    }

    fn watch(&self) -> io::Result<Folders> {
        let mut folders = Folders::new(WatchMask::MOVED_TO | WatchMask::DELETE | WatchMask::CLOSE_WRITE)?;
        folders.watch([self.folder.as_path()])?;
        Ok(folders)
    }

    fn refresh(&mut self) {
        let names = match files(&self.folder) {
            Ok(names) => names,
            Err(error) => {
                return warn!(folder = %self.folder.display(), %error, "the enrolled pods of other nodes cannot be read");
            }
        };
        self.statements.retain(|path, _| names.contains(path));
        for path in names.into_iter().filter(|path| *path != self.own) {
            match read(&path) {
                Ok(statement) => {
                    self.statements.insert(path, statement);
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    self.statements.remove(&path);
                }
                Err(error) => {
                    warn!(path = %path.display(), %error, "cannot be read; what it said before stays in force");
                }
            }
        }
        let pods = self.pods();
        if **self.published.load() != pods {
            info!(addresses = pods.len(), "pods of other nodes that take tunnels");
            self.published.store(Arc::new(pods));
        }
    }

    /// Of an address that several say to be a pod's of theirs it is the latest's: the others' agents are down and have
    /// not noticed that it has gone.
    fn pods(&self) -> imbl::HashMap<IpAddr, PublishedPod> {
        let with_node = |told: &Statement| {
            told.pods.iter().map(|pod| (pod.clone(), told.node.clone())).collect::<Vec<_>>()
        };
        let mut enrolled: Vec<_> = self.statements.values().flat_map(with_node).collect();
        enrolled.sort_by_key(|(pod, _)| pod.since);
        let mut pods = imbl::HashMap::new();
        for (Enrolled { uid, addresses, plaintext_when_down, .. }, node) in enrolled {
            let published = PublishedPod { uid, node, plaintext_when_down };
            pods.extend(addresses.iter().map(|address| (address.to_canonical(), published.clone())));
        }
        pods
    }
}

fn files(folder: &Path) -> io::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let name = entry.file_name();
        if name.to_str().is_some_and(|name| name.starts_with(PREFIX) && name.ends_with(SUFFIX)) {
            files.push(entry.path());
        }
    }
    Ok(files)
}

fn read(path: &Path) -> io::Result<Statement> {
    Ok(parse(&fs::read(path)?)?)
}

fn parse(bytes: &[u8]) -> serde_json::Result<Statement> {
    serde_json::from_slice(bytes)
}

#[cfg(fuzzing)]
pub(super) fn fuzz(bytes: &[u8]) {
    if let Ok(statement) = parse(bytes) {
        let written = serde_json::to_vec(&statement).expect("what was read can be written");
        assert!(parse(&written).is_ok(), "what was written can be read");
    }
}

#[cfg(test)]
mod tests {
    use expect_test::{Expect, expect};

    use super::*;

    /// A node's agent, one of its pods, since when, and the pod's addresses.
    type Told<'a> = (&'a str, &'a str, u64, &'a [&'a str]);

    fn addresses(of: &[&str]) -> Vec<IpAddr> {
        of.iter().map(|address| address.parse().unwrap()).collect()
    }

    /// The folder after the agents have told of their pods.
    fn folder(all: &[Told<'_>]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        let mut nodes: BTreeMap<&str, Vec<Enrolled>> = BTreeMap::new();
        for (node, uid, since, of) in all {
            nodes.entry(node).or_default().push(Enrolled {
                uid: (*uid).into(),
                addresses: addresses(of),
                since: *since,
                plaintext_when_down: false,
            });
        }
        for (node, pods) in nodes {
            let path = folder.path().join(format!("{PREFIX}{node}{SUFFIX}"));
            fs::write(path, serde_json::to_vec(&Statement { node: node.into(), pods }).unwrap()).unwrap();
        }
        folder
    }

    /// Whose each address is, for an agent of another node.
    fn check(all: &[Told<'_>], expected: Expect) {
        let folder = folder(all);
        let published = Follower::open(folder.path(), &"here".into()).published();
        let mut lines: Vec<_> = published
            .load()
            .iter()
            .map(|(address, pod)| format!("{address} is that of {} on {}\n", pod.uid, pod.node))
            .collect();
        lines.sort();
        expected.assert_eq(&lines.concat());
    }

    #[test]
    fn an_address_is_that_of_the_pod_that_had_it_last() {
        // Whatever the nodes are called, for the files are read in the order of their names.
        check(
            &[("n1", "gone", 10, &["10.1.0.5", "fd01::5"]), ("n2", "heir", 20, &["10.1.0.5"])],
            expect![[r#"
                10.1.0.5 is that of heir on n2
                fd01::5 is that of gone on n1
            "#]],
        );
        check(
            &[("n2", "gone", 10, &["10.1.0.5", "fd01::5"]), ("n1", "heir", 20, &["10.1.0.5"])],
            expect![[r#"
                10.1.0.5 is that of heir on n1
                fd01::5 is that of gone on n2
            "#]],
        );
        // Nor does the order in one agent's file say anything: it goes by uid.
        check(
            &[("n1", "a-heir", 20, &["10.1.0.5"]), ("n1", "b-gone", 10, &["::ffff:10.1.0.5"])],
            expect![[r#"
                10.1.0.5 is that of a-heir on n1
            "#]],
        );
    }

    #[test]
    fn what_an_agent_takes_over_gets_no_younger() {
        let folder = folder(&[("n1", "gone", 10, &["10.1.0.5"]), ("n1", "stays", 10, &["10.1.0.6"])]);
        let mut publisher = Publisher::open(folder.path(), &"n1".into(), OnAgentDown::Closed).unwrap();
        publisher.publish(&Workload {
            uid: "stays".into(),
            addresses: addresses(&["10.1.0.6"]),
            ..Workload::example()
        });
        let told = read(&publisher.path).unwrap().pods;
        let told: Vec<_> = told.iter().map(|pod| (&*pod.uid, pod.since)).collect();
        assert_eq!(told, [("gone", 10), ("stays", 10)]);
    }
}
