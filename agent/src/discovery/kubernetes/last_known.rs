//! What the API server said last, in a file of this node: an agent that starts while no API server answers begins with it.
//!
//! The file holds what the agent keeps of objects anyway, and no secret: no key, no token, nothing of Secrets. Where pods live on the
//! machine is not in it. One that is not whole, not ours, of another node or of another version of the program is not used.

use std::fs::File;
use std::io::{self, BufWriter, Read as _, Write as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use aws_lc_rs::digest::{self, Context};
use data_encoding::HEXLOWER;
use nix::unistd::Uid;
use serde::{Deserialize, Serialize};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until};
use tracing::{debug, warn};

use crate::config::document::{ConfigMap, EndpointSlice, Namespace, Pod, Service};
use crate::config::{Custom, Document, Key, Kind, Problem};
use crate::model::{Name, NodeInfo};
use crate::replace::replace;

/// What changes is written after this time, and not more often. Large files are written less often still.
const EVERY: Duration = Duration::from_secs(60);

/// At most this share of the time is spent with writing.
const SHARE: u32 = 20;

/// No file of ours is larger: some hundred thousand pods.
const MOST_BYTES: u64 = 1 << 30;

/// One object.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) enum Record {
    Namespace(Arc<Namespace>),
    Service(Arc<Service>),
    Pod(Arc<Pod>),
    EndpointSlice(Arc<EndpointSlice>),
    ConfigMap(Arc<ConfigMap>),
    /// Of a kind that is not Kubernetes' own, as it is written: it is read anew.
    Custom(Key, Arc<str>),
}

/// What was in the file.
#[derive(Clone, Debug)]
pub(super) struct Remembered {
    /// When it was written.
    pub(super) as_of: SystemTime,
    /// The zone of the node.
    pub(super) zone: Option<Name>,
    pub(super) records: Vec<Record>,
}

/// Why a file is of no use.
#[derive(Debug, thiserror::Error)]
pub(super) enum Unusable {
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("it belongs to user {0}, or others may write it")]
    NotOurs(u32),
    #[error("it is larger than {} GiB", MOST_BYTES >> 30)]
    TooLarge,
    #[error("it is not whole")]
    Broken,
    #[error("it is of version {0}, and this is {this}", this = env!("CARGO_PKG_VERSION"))]
    Version(String),
    #[error("it is of the node {0}")]
    Node(Name),
    #[error("line {line} cannot be read: {source}")]
    Line { line: usize, source: serde_json::Error },
}

/// The first line.
#[derive(Serialize, Deserialize)]
struct Head {
    version: String,
    node: Name,
    zone: Option<Name>,
    as_of: SystemTime,
}

impl Record {
    /// None of a kind that is not Kubernetes' own: of it is remembered what is written.
    pub(super) fn of(document: Document) -> Option<Self> {
        Some(match document {
            Document::Namespace(it) => Self::Namespace(it),
            Document::Service(it) => Self::Service(it),
            Document::Pod(it) => Self::Pod(it),
            Document::EndpointSlice(it) => Self::EndpointSlice(it),
            Document::ConfigMap(it) => Self::ConfigMap(it),
            _ => return None,
        })
    }

    /// What is written in it, where that is remembered.
    pub(super) fn text(&self) -> Option<Arc<str>> {
        match self {
            Self::Custom(_, text) => Some(text.clone()),
            _ => None,
        }
    }

    /// The document as it was when it was read from the API server, with what is wrong with it as far as that is known.
    pub(super) fn read(self) -> (Key, Option<Document>, Vec<Problem>) {
        let document = match self {
            Self::Namespace(it) => Document::Namespace(it),
            Self::Service(it) => Document::Service(it),
            Self::Pod(it) => Document::Pod(it),
            Self::EndpointSlice(it) => Document::EndpointSlice(it),
            Self::ConfigMap(it) => Document::ConfigMap(it),
            Self::Custom(key, text) => {
                let mut problems = Vec::new();
                let object = serde_json::from_str(&text).unwrap_or_default();
                let custom = Custom::ALL.into_iter().find(|custom| custom.kind == key.kind);
                let read = custom.map(|custom| (custom.read)(&object, &mut problems));
                let document = read.and_then(|read| read.map_err(|problem| problems.push(problem)).ok());
                return (key, document, problems);
            }
        };
        (document.key(), Some(document), Vec::new())
    }
}

/// Reads what an agent of this node has written.
pub(super) fn load(path: &Path, node: &Name) -> Result<Remembered, Unusable> {
    let mut file = File::open(path)?;
    let metadata = file.metadata()?;
    if metadata.uid() != Uid::effective().as_raw() || metadata.mode() & 0o022 != 0 {
        return Err(Unusable::NotOurs(metadata.uid()));
    }
    if metadata.size() > MOST_BYTES {
        return Err(Unusable::TooLarge);
    }
    let mut text = String::new();
    file.read_to_string(&mut text)?;
    parse(&text, node)
}

fn parse(text: &str, node: &Name) -> Result<Remembered, Unusable> {
    let (content, sum) = text.trim_end().rsplit_once('\n').ok_or(Unusable::Broken)?;
    let content = &text[..content.len() + 1];
    if sum_of(content) != sum {
        return Err(Unusable::Broken);
    }
    let mut lines = content.lines().enumerate();
    let (_, head) = lines.next().ok_or(Unusable::Broken)?;
    let Head { version, node: of, zone, as_of } = line(0, head)?;
    if version != env!("CARGO_PKG_VERSION") {
        return Err(Unusable::Version(version));
    }
    if of != *node {
        return Err(Unusable::Node(of));
    }
    let records = lines.map(|(at, text)| line(at, text)).collect::<Result<_, _>>()?;
    Ok(Remembered { as_of, zone, records })
}

fn sum_of(content: &str) -> String {
    HEXLOWER.encode(digest::digest(&digest::SHA256, content.as_bytes()).as_ref())
}

/// Records in a file that is whole and of this node: what is read of them is an object, or says what is wrong with it.
#[cfg(fuzzing)]
pub fn fuzz(lines: &str) {
    let (version, as_of) = (env!("CARGO_PKG_VERSION").into(), SystemTime::UNIX_EPOCH);
    let head = Head { version, node: "n1".into(), zone: None, as_of };
    let content = format!("{}\n{lines}\n", serde_json::to_string(&head).expect("it can be written"));
    let text = format!("{content}{}\n", sum_of(&content));
    let Ok(remembered) = parse(&text, &"n1".into()) else { return };
    for record in remembered.records {
        let (key, document, problems) = record.read();
        assert!(document.is_some_and(|document| document.key() == key) || !problems.is_empty());
    }
}

fn line<'t, T: Deserialize<'t>>(at: usize, text: &'t str) -> Result<T, Unusable> {
    serde_json::from_str(text).map_err(|source| Unusable::Line { line: at + 1, source })
}

/// Writes a file that only its owner may read. Others find the old one or the new one.
pub(super) fn save(path: &Path, node: &NodeInfo, records: &[Record]) -> io::Result<()> {
    // Two agents may be at it during an update. What they mix up is not whole, and written anew a minute later.
    replace(path, |file| write(file, node, records))
}

fn write(file: &File, node: &NodeInfo, records: &[Record]) -> io::Result<()> {
    let (mut out, mut sum) = (BufWriter::new(file), Context::new(&digest::SHA256));
    let mut line = |text: Vec<u8>| {
        let text = [text, vec![b'\n']].concat();
        sum.update(&text);
        out.write_all(&text)
    };
    let head = Head {
        version: env!("CARGO_PKG_VERSION").into(),
        node: node.name.clone(),
        zone: node.zone.clone(),
        as_of: SystemTime::now(),
    };
    line(serde_json::to_vec(&head)?)?;
    for record in records {
        line(serde_json::to_vec(record)?)?;
    }
    writeln!(out, "{}", HEXLOWER.encode(sum.finish().as_ref()))?;
    out.flush()
}

/// Writes what is known, some time after it has changed.
pub(super) struct Keeper {
    path: PathBuf,
    is_due: bool,
    not_before: Instant,
    writing: Option<JoinHandle<io::Result<Duration>>>,
    has_failed: bool,
}

impl Keeper {
    pub(super) fn new(path: PathBuf) -> Self {
        let not_before = Instant::now() + EVERY.mul_f64(fastrand::f64() / 10.0);
        Self { path, is_due: false, not_before, writing: None, has_failed: false }
    }

    /// What is known is other than it was.
    pub(super) fn changed(&mut self) {
        self.is_due = true;
    }

    /// Returns when it is to be written. Cancelling it loses nothing.
    pub(super) async fn due(&mut self) {
        if let Some(writing) = &mut self.writing {
            let written = writing.await;
            self.writing = None;
            self.written(written.map_err(io::Error::other).flatten());
        }
        if !self.is_due {
            std::future::pending::<()>().await;
        }
        sleep_until(self.not_before).await;
    }

    /// Writes this.
    pub(super) fn write(&mut self, node: NodeInfo, records: Vec<Record>) {
        self.is_due = false;
        let path = self.path.clone();
        self.writing = Some(tokio::task::spawn_blocking(move || {
            let began = std::time::Instant::now();
            save(&path, &node, &records)?;
            Ok(began.elapsed())
        }));
    }

    fn written(&mut self, written: io::Result<Duration>) {
        let path = self.path.display();
        let took = match written {
            Ok(took) => {
                self.has_failed = false;
                debug!(%path, ?took, "what the API server says is written down");
                took
            }
            Err(error) => {
                // The same every minute would say nothing new.
                if !std::mem::replace(&mut self.has_failed, true) {
                    warn!(%path, %error, "what the API server says cannot be written down: an agent that starts without one has the file of before, or none");
                }
                self.is_due = true;
                Duration::ZERO
            }
        };
        self.not_before = Instant::now() + EVERY.max(took * SHARE);
    }
}

/// The kinds of which an API server tells all.
pub(super) fn kinds() -> impl Iterator<Item = Kind> {
    Kind::ALL.into_iter().filter(|kind| kind.is_followed_as_a_whole())
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt as _;

    use serde_json::json;

    use super::*;

    fn node() -> NodeInfo {
        NodeInfo { name: "n1".into(), zone: Some("z1".into()) }
    }

    fn records() -> Vec<Record> {
        let pod = json!({
            "metadata": {
                "name": "web", "namespace": "shop", "uid": "u1", "creationTimestamp": "2027-01-15T08:00:00Z",
                "labels": { "app": "web", "undermesh.io/mesh": "enabled" },
                "annotations": { "undermesh.io/netns": "/run/netns/a", "undermesh.io/cgroup": "/a", "undermesh.io/enrolled": "open",
                    "undermesh.io/trust-domain": "other.test", "undermesh.io/mtls": "strict" },
            },
            "spec": { "nodeName": "n1", "serviceAccountName": "web", "hostNetwork": true,
                "containers": [{ "name": "a", "ports": [{ "name": "http", "containerPort": 8080 }], "env": [{ "name": "KEY", "value": "secret" }] }] },
            "status": { "phase": "Running", "podIPs": [{ "ip": "10.0.0.5" }, { "ip": "fd77::5" }] },
        });
        let service = json!({
            "metadata": { "name": "web", "namespace": "shop" },
            "spec": { "clusterIP": "10.9.0.1", "clusterIPs": ["10.9.0.1"], "selector": { "app": "web" }, "sessionAffinity": "ClientIP",
                "trafficDistribution": "PreferSameZone", "internalTrafficPolicy": "Local",
                "ports": [{ "name": "http", "port": 80, "targetPort": "http", "appProtocol": "kubernetes.io/h2c" }] },
        });
        let pod = Document::pod(&serde_json::from_value(pod).unwrap(), &mut Vec::new()).unwrap();
        let service = Document::service(&serde_json::from_value(service).unwrap(), &mut Vec::new()).unwrap();
        let key = Key { kind: Kind::AuthorizationPolicy, namespace: "shop".into(), name: "only-web".into() };
        let written = json!({ "metadata": { "name": "only-web", "namespace": "shop" }, "spec": { "action": "no such" } });
        let custom = Record::Custom(key, written.to_string().into());
        [pod, service].into_iter().filter_map(Record::of).chain([custom]).collect()
    }

    #[test]
    fn what_is_written_is_read_as_it_was() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("last-known");
        save(&path, &node(), &records()).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::read_dir(&folder).unwrap().count(), 1, "nothing is left beside it");
        assert!(!fs::read_to_string(&path).unwrap().contains("secret"), "what is not needed is not written");
        let read = load(&path, &"n1".into()).unwrap();
        assert_eq!(read.zone.as_deref(), Some("z1"));
        let documents = |records: Vec<Record>| -> Vec<_> { records.into_iter().map(Record::read).collect() };
        let mut expected = documents(records());
        if let Some(Document::Pod(pod)) = &mut expected[0].1 {
            assert!(Arc::make_mut(pod).paths.take().is_some());
        }
        let read = documents(read.records);
        assert_eq!(read, expected);
        // A policy that nobody can understand denies, as it did.
        assert!(read[2].1.is_some() && !read[2].2.is_empty(), "{:?}", read[2]);
    }

    #[test]
    fn a_file_that_is_not_ours_as_it_was_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("last-known");
        let refused = |text: &str, mode: u32, node: &str| {
            fs::write(&path, text).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            load(&path, &node.into()).map(|it| it.records.len()).map_err(|error| error.to_string())
        };
        save(&path, &node(), &records()).unwrap();
        let good = fs::read_to_string(&path).unwrap();
        assert_eq!(refused(&good, 0o600, "n1"), Ok(3));
        assert_eq!(refused(&good, 0o600, "n2"), Err("it is of the node n1".into()));
        assert_eq!(
            refused(&good, 0o622, "n1"),
            Err(format!("it belongs to user {}, or others may write it", Uid::effective()))
        );
        let broken = || Err("it is not whole".to_owned());
        for text in [
            "",
            "\n",
            "{}",
            &good.replacen("web", "wab", 1),
            &good[..good.len() - 10],
            &good[..good.len() / 2],
        ] {
            assert_eq!(refused(text, 0o600, "n1"), broken(), "{text}");
        }
        // Whole, and yet not to be understood.
        let again = |content: &str| {
            let content = format!("{content}\n");
            format!("{content}{}\n", sum_of(&content))
        };
        let content = good.trim_end().rsplit_once('\n').unwrap().0;
        assert_eq!(refused(&again(content), 0o600, "n1"), Ok(3));
        let other = content.replacen(env!("CARGO_PKG_VERSION"), "0.0.1", 1);
        let version = format!("it is of version 0.0.1, and this is {}", env!("CARGO_PKG_VERSION"));
        assert_eq!(refused(&again(&other), 0o600, "n1"), Err(version));
        let unknown = refused(&again(&format!("{content}\n{{\"Secret\":1}}")), 0o600, "n1").unwrap_err();
        assert!(unknown.starts_with("line 5 cannot be read: unknown variant `Secret`"), "{unknown}");
        fs::remove_file(&path).unwrap();
        assert!(matches!(load(&path, &"n1".into()), Err(Unusable::Io(_))));
    }
}
