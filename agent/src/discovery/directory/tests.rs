//! A real directory that changes, and what is published of it.

use std::os::unix::fs::{PermissionsExt, symlink};

use expect_test::{Expect, expect};
use proptest::prelude::*;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::*;

fn node() -> NodeInfo {
    NodeInfo { name: "node-1".into(), zone: None }
}

/// A directory that is followed.
struct Live {
    base: tempfile::TempDir,
    root: PathBuf,
    now: Publication,
    publications: mpsc::UnboundedReceiver<Publication>,
    follower: JoinHandle<()>,
}

impl Live {
    fn open(files: &[(&str, &str)]) -> Self {
        let base = tempfile::tempdir().unwrap();
        let root = base.path().join("manifests");
        fs::create_dir(&root).unwrap();
        for (name, text) in files {
            fs::write(root.join(name), text).unwrap();
        }
        let directory = Directory::open(&root, node(), Defaults::default()).unwrap();
        let now = directory.publication();
        let (sender, publications) = mpsc::unbounded_channel();
        let follower = tokio::spawn(async move {
            let publish = |publication| drop(sender.send(publication));
            directory.follow(publish).await.unwrap();
        });
        Self { base, root, now, publications, follower }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.path(name), text).unwrap();
    }

    fn show(&self) -> String {
        let pods = self.now.snapshot.workloads.values();
        let mut lines: String = pods.map(|it| format!("{} {:?}\n", it.pod, it.addresses)).collect();
        for rejection in &*self.now.rejections {
            lines += &format!("! {rejection}\n");
        }
        lines.replace(&self.base.path().display().to_string(), "")
    }

    /// The next publication is this.
    async fn check(&mut self, expected: Expect) {
        let next = tokio::time::timeout(Duration::from_secs(5), self.publications.recv()).await;
        self.now = next.expect("nothing was published").unwrap();
        expected.assert_eq(&self.show());
    }
}

impl Drop for Live {
    fn drop(&mut self) {
        self.follower.abort();
    }
}

fn pod(name: &str, address: &str) -> String {
    format!("apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}}}\nstatus: {{podIP: {address}}}\n")
}

#[tokio::test]
async fn files_come_change_and_go() {
    let mut live = Live::open(&[("a.yaml", &pod("a", "10.0.0.1"))]);
    expect![[r#"
        default/a [10.0.0.1]
    "#]]
    .assert_eq(&live.show());
    live.write("b.json", r#"{"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "b"}}"#);
    live.check(expect![[r#"
        default/a [10.0.0.1]
        default/b []
    "#]])
        .await;
    live.write("a.yaml", &pod("a", "10.0.0.2"));
    live.check(expect![[r#"
        default/a [10.0.0.2]
        default/b []
    "#]])
        .await;
    // An atomic replacement, and one file's object moving to another file.
    live.write("new", &pod("a", "10.0.0.3"));
    fs::rename(live.path("new"), live.path("a.yaml")).unwrap();
    fs::rename(live.path("b.json"), live.path("c.json")).unwrap();
    live.check(expect![[r#"
        default/a [10.0.0.3]
        default/b []
    "#]])
        .await;
    fs::remove_file(live.path("c.json")).unwrap();
    live.check(expect![[r#"
        default/a [10.0.0.3]
    "#]])
        .await;
}

#[tokio::test]
async fn what_editors_do_is_one_change() {
    let mut live = Live::open(&[("a.yaml", &pod("a", "10.0.0.1"))]);
    live.write("4913", "");
    fs::remove_file(live.path("4913")).unwrap();
    live.write(".a.yaml.swp", "swap");
    live.write("#a.yaml#", "autosave");
    fs::rename(live.path("a.yaml"), live.path("a.yaml~")).unwrap();
    live.write("a.yaml", &pod("a", "10.0.0.2"));
    fs::remove_file(live.path("a.yaml~")).unwrap();
    live.check(expect![[r#"
        default/a [10.0.0.2]
    "#]])
        .await;
    assert_eq!(live.now.snapshot.generation, 2);
    // Written again as it was: nothing to publish until something is new.
    live.write("a.yaml", &pod("a", "10.0.0.2"));
    tokio::time::sleep(Duration::from_millis(150)).await;
    live.write("a.yaml", &pod("a", "10.0.0.3"));
    live.check(expect![[r#"
        default/a [10.0.0.3]
    "#]])
        .await;
    assert_eq!(live.now.snapshot.generation, 3);
}

#[tokio::test]
async fn the_last_good_version_stays() {
    let two = [pod("a", "10.0.0.1"), pod("b", "10.0.0.2")].join("---\n");
    let mut live = Live::open(&[("ab.yaml", &two)]);
    // Told by its name, which the broken document still shows.
    live.write("ab.yaml", &format!("{}---\n{}spec: {{\n", pod("a", "10.0.0.3"), pod("b", "10.0.0.9")));
    live.check(expect![[r#"
        default/a [10.0.0.3]
        default/b [10.0.0.2]
        ! /manifests/ab.yaml:10:7: Pod default/b: not valid YAML: unclosed bracket '{'
    "#]])
        .await;
    // Not to be told: what the file no longer shows stays.
    live.write("ab.yaml", &format!("{}---\n]broken\n", pod("a", "10.0.0.4")));
    live.check(expect![[r#"
        default/a [10.0.0.4]
        default/b [10.0.0.2]
        ! /manifests/ab.yaml:6:1: not valid YAML: misplaced bracket
    "#]])
        .await;
    fs::write(live.path("ab.yaml"), b"\n  \xff").unwrap();
    live.check(expect![[r#"
        default/a [10.0.0.4]
        default/b [10.0.0.2]
        ! /manifests/ab.yaml:2:3: expected UTF-8 text; what it said before stays in force
        ! /manifests/ab.yaml:6:1: not valid YAML: misplaced bracket
    "#]])
        .await;
    live.write("ab.yaml", &pod("b", "10.0.0.5"));
    live.check(expect![[r#"
        default/b [10.0.0.5]
    "#]])
        .await;
}

/// Of who may do what it does not: nobody is let in then.
#[tokio::test]
async fn a_policy_that_cannot_be_read_denies_at_once() {
    let policy = |rest: &str| {
        format!(
            "apiVersion: undermesh.io/v1alpha1\nkind: AuthorizationPolicy\nmetadata: {{name: web}}\n{rest}"
        )
    };
    let pod = "apiVersion: v1\nkind: Pod\nmetadata: {name: a, labels: {undermesh.io/mesh: enabled}}\nspec: {nodeName: node-1, containers: []}\n";
    let good = policy("spec: {selector: {matchLabels: {app: web}}}\n");
    let mut live = Live::open(&[("a.yaml", pod), ("policy.yaml", &good)]);
    let denies = |live: &Live| {
        let policies = live.now.snapshot.access.values().flat_map(|access| access.policies());
        policies.map(|applied| applied.policy.invalid.is_some()).collect::<Vec<_>>()
    };
    assert!(denies(&live).is_empty(), "it selects others");
    for (text, expected) in [
        (
            policy("spec: {selector: [}\n"),
            expect![[r#"
            default/a []
            ! /manifests/policy.yaml:1:1: AuthorizationPolicy default/web: this version cannot be used: until then everything is denied at all pods of the namespace default, for what it is for cannot be read
            ! /manifests/policy.yaml:4:18: AuthorizationPolicy default/web: not valid YAML: mismatched bracket '[' closed by '}'
        "#]],
        ),
        (
            good.replace("v1alpha1", "v7"),
            expect![[r#"
            default/a []
            ! /manifests/policy.yaml:1:1: AuthorizationPolicy default/web: this version cannot be used: until then everything is denied at all pods of the namespace default, for what it is for cannot be read
            ! /manifests/policy.yaml:1:13: AuthorizationPolicy default/web: apiVersion: expected undermesh.io/v1alpha1, found "undermesh.io/v7"
        "#]],
        ),
    ] {
        live.write("policy.yaml", &text);
        live.check(expected).await;
        assert_eq!(denies(&live), [true], "{text}");
    }
    live.write("policy.yaml", &good);
    live.check(expect![[r#"
        default/a []
    "#]])
        .await;
    assert!(denies(&live).is_empty());
}

#[tokio::test]
async fn an_object_in_two_files() {
    let mut live = Live::open(&[("b.yaml", &pod("a", "10.0.0.1"))]);
    live.write("a.yaml", &pod("a", "10.0.0.2"));
    live.check(expect![[r#"
        default/a [10.0.0.1]
        ! /manifests/a.yaml:1:1: Pod default/a: expected each object once, but /manifests/b.yaml:1 has it too and is in force
    "#]]).await;
    fs::remove_file(live.path("b.yaml")).unwrap();
    live.check(expect![[r#"
        default/a [10.0.0.2]
    "#]])
        .await;
    live.write("a.yaml", &[pod("a", "10.0.0.3"), pod("a", "10.0.0.4")].join("---\n"));
    live.check(expect![[r#"
        default/a [10.0.0.3]
        ! /manifests/a.yaml:6:1: Pod default/a: expected each object once, but /manifests/a.yaml:1 has it too and is in force
    "#]]).await;
}

#[tokio::test]
async fn subdirectories_come_and_go() {
    let mut live = Live::open(&[]);
    fs::create_dir_all(live.path("x/y")).unwrap();
    live.write("x/y/a.yaml", &pod("a", "10.0.0.1"));
    live.check(expect![[r#"
        default/a [10.0.0.1]
    "#]])
        .await;
    live.write("x/y/a.yaml", &pod("a", "10.0.0.2"));
    live.check(expect![[r#"
        default/a [10.0.0.2]
    "#]])
        .await;
    fs::rename(live.path("x"), live.path("z")).unwrap();
    tokio::time::sleep(Duration::from_millis(150)).await;
    live.write("z/y/a.yaml", &pod("a", "10.0.0.3"));
    live.check(expect![[r#"
        default/a [10.0.0.3]
    "#]])
        .await;
    fs::remove_dir_all(live.path("z")).unwrap();
    live.check(expect![""]).await;
}

#[tokio::test]
async fn the_directory_is_replaced() {
    let mut live = Live::open(&[("a.yaml", &pod("a", "10.0.0.1"))]);
    let old = live.base.path().join("old");
    fs::rename(&live.root, &old).unwrap();
    live.check(expect![[r#"
        default/a [10.0.0.1]
        ! /manifests: cannot be read: No such file or directory (os error 2); what it said before stays in force
    "#]]).await;
    fs::create_dir(&live.root).unwrap();
    live.write("a.yaml", &pod("a", "10.0.0.2"));
    live.check(expect![[r#"
        default/a [10.0.0.2]
    "#]])
        .await;
    live.write("a.yaml", &pod("a", "10.0.0.3"));
    live.check(expect![[r#"
        default/a [10.0.0.3]
    "#]])
        .await;
}

#[tokio::test]
async fn a_mounted_config_map() {
    let mut live = Live::open(&[]);
    let version = |number: u8| {
        let name = format!("..2026_{number}");
        fs::create_dir(live.path(&name)).unwrap();
        live.write(&format!("{name}/a.yaml"), &pod("a", &format!("10.0.0.{number}")));
        symlink(&name, live.path("..data_tmp")).unwrap();
        fs::rename(live.path("..data_tmp"), live.path("..data")).unwrap();
    };
    version(1);
    symlink("..data/a.yaml", live.path("a.yaml")).unwrap();
    version(2);
    live.check(expect![[r#"
        default/a [10.0.0.2]
    "#]])
        .await;
    let name = "..2026_3";
    fs::create_dir(live.path(name)).unwrap();
    live.write("..2026_3/a.yaml", &pod("a", "10.0.0.3"));
    symlink(name, live.path("..data_tmp")).unwrap();
    fs::rename(live.path("..data_tmp"), live.path("..data")).unwrap();
    fs::remove_dir_all(live.path("..2026_2")).unwrap();
    live.check(expect![[r#"
        default/a [10.0.0.3]
    "#]])
        .await;
}

#[tokio::test]
async fn links_to_files_elsewhere() {
    let mut live = Live::open(&[]);
    let target = live.base.path().join("elsewhere");
    fs::write(&target, pod("a", "10.0.0.1")).unwrap();
    symlink(&target, live.path("a.yaml")).unwrap();
    symlink(&live.root, live.path("loop")).unwrap();
    live.check(expect![[r#"
        default/a [10.0.0.1]
    "#]])
        .await;
    fs::write(&target, pod("a", "10.0.0.2")).unwrap();
    live.check(expect![[r#"
        default/a [10.0.0.2]
    "#]])
        .await;
    let new = live.base.path().join("new");
    fs::write(&new, pod("a", "10.0.0.3")).unwrap();
    fs::rename(&new, &target).unwrap();
    live.check(expect![[r#"
        default/a [10.0.0.3]
    "#]])
        .await;
}

#[tokio::test]
async fn unreadable_files_keep_what_they_said() {
    let mut live = Live::open(&[("a.yaml", &pod("a", "10.0.0.1"))]);
    fs::set_permissions(live.path("a.yaml"), PermissionsExt::from_mode(0o000)).unwrap();
    if fs::read(live.path("a.yaml")).is_ok() {
        eprintln!("skipped: root reads every file");
        return;
    }
    live.check(expect![[r#"
        default/a [10.0.0.1]
        ! /manifests/a.yaml: cannot be read: Permission denied (os error 13); what it said before stays in force
    "#]]).await;
}

#[test]
fn a_directory_that_is_not_there() {
    let error =
        Directory::open(Path::new("/nonexistent/x"), node(), Defaults::default()).unwrap_err().to_string();
    expect!["cannot read the directory of manifests /nonexistent/x: No such file or directory (os error 2)"]
        .assert_eq(&error);
}

/// Many files at once overflow neither the queue nor the patience of whoever waits.
#[tokio::test]
async fn a_thousand_files() {
    let mut live = Live::open(&[]);
    for number in 0..1_000 {
        live.write(
            &format!("{number}.yaml"),
            &pod(&format!("pod-{number}"), &format!("10.0.{}.{}", number / 250, number % 250)),
        );
    }
    let all_there = async {
        while live.now.snapshot.workloads.len() < 1_000 {
            live.now = live.publications.recv().await.unwrap();
        }
    };
    tokio::time::timeout(Duration::from_secs(20), all_there).await.unwrap();
    assert!(live.now.rejections.is_empty());
}

const VALID: &str = include_str!("tests/shop.yaml");

proptest! {
    /// Nothing that a file may hold makes the reader or the compiler panic, and nothing takes an untouched file down.
    #[test]
    fn mutated_manifests_do_no_harm(
        edits in proptest::collection::vec((any::<prop::sample::Index>(), 0..12usize, ".{0,6}"), 1..12),
    ) {
        let mut text: Vec<char> = VALID.chars().collect();
        for (at, length, insert) in &edits {
            let start = at.index(text.len() + 1);
            let end = (start + length).min(text.len());
            text.splice(start..end, insert.chars());
        }
        let text: String = text.into_iter().collect();
        let mut store = Store::default();
        let mut compiler = Compiler::new(node());
        let fine = pod("untouched", "10.255.0.1");
        for (file, text) in [("z.yaml", fine.as_str()), ("a.yaml", VALID), ("a.yaml", &text), ("a.json", &text)] {
            let objects = manifest::read(Path::new(file), text.as_bytes()).unwrap();
            let changes = store.update([(PathBuf::from(file), Some(objects))]);
            compiler.apply(changes);
        }
        store.rejections(&BTreeMap::new());
        let snapshot = compiler.snapshot();
        prop_assert!(snapshot.workloads.values().any(|it| &*it.pod.name == "untouched"));
        // All gone: nothing is left behind.
        let files = ["z.yaml", "a.yaml", "a.json"].map(|file| (PathBuf::from(file), None));
        let changes = store.update(files);
        compiler.apply(changes);
        let snapshot = compiler.snapshot();
        prop_assert!(snapshot.workloads.is_empty() && snapshot.destinations.is_empty() && snapshot.captured.is_empty());
        prop_assert!(store.rejections(&BTreeMap::new()).is_empty());
    }
}

#[test]
fn what_is_wrong_with_routes_and_policies_is_found_where_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| fs::write(dir.path().join(name), text).unwrap();
    write(
        "service.yaml",
        "{apiVersion: v1, kind: Service, metadata: {name: web}, spec: {clusterIP: 10.0.0.1, ports: [{port: 80}]}}",
    );
    write(
        "routes.yaml",
        "\
apiVersion: v1
kind: List
items:
- apiVersion: gateway.networking.k8s.io/v1
  kind: HTTPRoute
  metadata: {name: a}
  spec:
    parentRefs:
    - {group: '', kind: Service, name: web}
    rules:
    - backendRefs:
      - {name: web, port: 80}
      - {name: absent, port: 80}
---
apiVersion: gateway.networking.k8s.io/v1
kind: GRPCRoute
metadata: {name: b}
spec:
  parentRefs:
  - {group: '', kind: Service, name: web}
  rules:
  - matches:
    - metod: {service: a}
---
apiVersion: gateway.networking.k8s.io/v1alpha2
kind: HTTPRoute
metadata: {name: c}
---
apiVersion: gateway.networking.k8s.io/v1beta1
kind: ReferenceGrant
metadata: {name: d}
spec: {from: [{group: gateway.networking.k8s.io, kind: HTTPRoute}], to: []}
",
    );
    write(
        "policies.yaml",
        "\
apiVersion: undermesh.io/v1alpha1
kind: TrafficPolicy
metadata: {name: a}
spec:
  targetRefs:
  - {group: '', kind: Service, name: web}
  - {group: '', kind: Service, name: web, sectionName: http}
  limits: {maxConnections: 10}
---
apiVersion: undermesh.io/v1alpha1
kind: TrafficPolicy
metadata: {name: b}
spec:
  targetRefs: [{group: '', kind: Service, name: web}]
  limits:
    maxConnection: 10
---
apiVersion: gateway.networking.x-k8s.io/v1alpha1
kind: XBackendTrafficPolicy
metadata: {name: c}
spec:
  targetRefs: [{group: '', kind: Service, name: absent}]
",
    );
    let checked = check(dir.path(), node()).unwrap();
    let lines: Vec<_> = checked.rejections.iter().map(|it| format!("{it}\n")).collect();
    expect![[r#"
        ./policies.yaml:7:56: TrafficPolicy default/a: spec.targetRefs[1].sectionName: the Service default/web has no TCP port named "http"
        ./policies.yaml:10:1: TrafficPolicy default/b: this version cannot be used, and there was none before it: the policy is not in force
        ./policies.yaml:16:20: TrafficPolicy default/b: spec.limits.maxConnection: there is no such field, or this version of Undermesh does not know it
        ./policies.yaml:22:49: XBackendTrafficPolicy default/c: spec.targetRefs[0].name: there is no Service default/absent
        ./routes.yaml:13:9: HTTPRoute default/a: spec.rules[0].backendRefs[1]: there is no Service default/absent; its share of the requests is answered with an error
        ./routes.yaml:15:1: GRPCRoute default/b: this version cannot be used, and there was none before it: the route is not in force
        ./routes.yaml:23:14: GRPCRoute default/b: spec.rules[0].matches[0].metod: there is no such field, or this version of Undermesh does not know it
        ./routes.yaml:25:13: HTTPRoute default/c: apiVersion: expected gateway.networking.k8s.io/v1, found "gateway.networking.k8s.io/v1alpha2"
        ./routes.yaml:32:15: ReferenceGrant default/d: spec.from[0]: missing field `namespace`; the grant grants nothing until then
    "#]]
    .assert_eq(&lines.concat().replace(&dir.path().display().to_string(), "."));
}
