//! What a cluster is made of, as Go modules: the folders of `tests/cluster`.

use std::fs;

use anyhow::{Context as _, Result};
use undermesh_tests::cluster::{PROGRAMS, Tools};

use crate::command::{command, run};
use crate::go::{Module, Modules};

const MODULES: Modules = Modules {
    name: "cluster",
    notice: "building the programs of a cluster (half an hour on one core, once)",
    modules: &[
        Module {
            folder: "tests/cluster/node",
            programs: &[
                ("pause", "undermesh/tests/cluster/node/pause"),
                ("runc-partial", "undermesh/tests/cluster/node/runc-partial"),
            ],
            told: None,
            manifests: &[],
            tags: "",
            cgo: false,
        },
        Module {
            folder: "tests/cluster/cni",
            programs: &[
                ("bridge", "github.com/containernetworking/plugins/plugins/main/bridge"),
                ("host-local", "github.com/containernetworking/plugins/plugins/ipam/host-local"),
                ("loopback", "github.com/containernetworking/plugins/plugins/main/loopback"),
                ("portmap", "github.com/containernetworking/plugins/plugins/meta/portmap"),
            ],
            told: None,
            manifests: &[],
            tags: "",
            cgo: false,
        },
        Module {
            folder: "tests/cluster/runc",
            programs: &[("runc", "github.com/opencontainers/runc")],
            told: Some(("github.com/opencontainers/runc", &["main.version"])),
            manifests: &[],
            // The pods' profiles are made by libseccomp.
            tags: "seccomp",
            // It enters namespaces in C, before Go starts its threads.
            cgo: true,
        },
        Module {
            folder: "tests/cluster/containerd",
            programs: &[
                ("containerd", "github.com/containerd/containerd/v2/cmd/containerd"),
                (
                    "containerd-shim-runc-v2",
                    "github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2",
                ),
                ("ctr", "github.com/containerd/containerd/v2/cmd/ctr"),
            ],
            told: Some((
                "github.com/containerd/containerd/v2",
                &["github.com/containerd/containerd/v2/version.Version"],
            )),
            manifests: &[],
            tags: "",
            cgo: false,
        },
        Module {
            folder: "tests/cluster/etcd",
            programs: &[("etcd", "go.etcd.io/etcd/server/v3")],
            told: None,
            manifests: &[],
            tags: "",
            cgo: false,
        },
        kubernetes("tests/cluster/kubernetes", KUBERNETES),
        Module {
            folder: "tests/cluster/coredns",
            programs: &[("coredns", "github.com/coredns/coredns")],
            told: None,
            manifests: &[],
            tags: "",
            cgo: false,
        },
        Module {
            folder: "tests/cluster/helm",
            programs: &[("helm", "helm.sh/helm/v3/cmd/helm")],
            told: Some(("helm.sh/helm/v3", &["helm.sh/helm/v3/internal/version.version"])),
            manifests: &[],
            tags: "",
            cgo: false,
        },
        // The Gateway API's own tests of meshes, and its CRDs, which are to be of the same version.
        Module {
            folder: "tests/cluster/conformance",
            programs: &[("conformance", "undermesh/tests/cluster/conformance/suite")],
            told: None,
            manifests: &[
                ("gateway-api.yaml", "sigs.k8s.io/gateway-api", "config/crd/standard"),
                ("gateway-api-experimental.yaml", "sigs.k8s.io/gateway-api", "config/crd/experimental"),
            ],
            tags: "",
            cgo: false,
        },
        // What those tests run in pods.
        Module {
            folder: "tests/cluster/echo",
            programs: &[
                ("echo-client", "istio.io/istio/pkg/test/echo/cmd/client"),
                ("echo-server", "istio.io/istio/pkg/test/echo/cmd/server"),
            ],
            told: None,
            manifests: &[],
            tags: "",
            cgo: false,
        },
    ],
};

/// What nodes have with CRI-O, beside containerd's, which lie idle.
const CRI_O: Modules = Modules {
    name: "cri-o",
    notice: "building CRI-O (three minutes, once)",
    modules: &[Module {
        folder: "tests/cluster/cri-o",
        programs: &[
            ("crio", "github.com/cri-o/cri-o/cmd/crio"),
            // It puts images where CRI-O has them.
            ("copyimg", "github.com/cri-o/cri-o/test/copyimg"),
        ],
        told: None,
        manifests: &[],
        // Without what wants libraries that nothing here uses.
        tags: "seccomp,containers_image_openpgp,containers_image_ostree_stub,exclude_graphdriver_btrfs",
        cgo: true,
    }],
};

/// What is another one in a cluster of the oldest Kubernetes that is supported.
const OLDEST: Modules = Modules {
    name: "kubernetes-oldest",
    notice: "building the oldest Kubernetes that is supported (a quarter of an hour, once)",
    // Without kubectl: the tests speak that of the newest.
    modules: &[kubernetes("tests/cluster/kubernetes-oldest", KUBERNETES.split_at(1).1)],
};

const KUBERNETES: &[(&str, &str)] = &[
    ("kubectl", "k8s.io/kubernetes/cmd/kubectl"),
    ("kube-apiserver", "k8s.io/kubernetes/cmd/kube-apiserver"),
    ("kube-controller-manager", "k8s.io/kubernetes/cmd/kube-controller-manager"),
    ("kube-scheduler", "k8s.io/kubernetes/cmd/kube-scheduler"),
    ("kubelet", "k8s.io/kubernetes/cmd/kubelet"),
    ("kube-proxy", "k8s.io/kubernetes/cmd/kube-proxy"),
];

const fn kubernetes(folder: &'static str, programs: &'static [(&'static str, &'static str)]) -> Module {
    Module {
        folder,
        programs,
        told: Some(("k8s.io/kubernetes", &["k8s.io/component-base/version.gitVersion"])),
        manifests: &[],
        tags: "",
        cgo: false,
    }
}

/// The programs, built if they are not.
pub fn ensure() -> Result<Tools> {
    Tools::in_folder(&MODULES.ensure()?)
}

/// The same with the oldest Kubernetes that is supported.
pub fn ensure_oldest() -> Result<Tools> {
    ensure_with(&OLDEST)
}

/// The same with CRI-O.
pub fn ensure_cri_o() -> Result<Tools> {
    let tools = ensure_with(&CRI_O)?;
    let pinns = tools.program("pinns");
    if !pinns.exists() {
        // The one program of it that is in C: it holds namespaces.
        let sources = CRI_O.modules[0].folder_of("github.com/cri-o/cri-o", "pinns/src")?;
        let mut build = command("sh");
        build.args(["-c", "exec cc -std=c99 -Os -static -o \"$0\" *.c"]).arg(&pinns).current_dir(sources);
        run(build)?;
    }
    Ok(tools)
}

/// All programs, these instead of others of the same names or beside them.
fn ensure_with(own: &Modules) -> Result<Tools> {
    let (all, folder) = (MODULES.ensure()?, own.ensure()?);
    for name in PROGRAMS.iter().filter(|name| !own.makes().any(|made| made == **name)) {
        // Anew each time, for the others change by themselves.
        let _ = fs::remove_file(folder.join(name));
        fs::hard_link(all.join(name), folder.join(name))
            .with_context(|| format!("{name} cannot be linked"))?;
    }
    Tools::in_folder(&folder)
}

/// The programs, if they are built.
pub fn built() -> Option<Tools> {
    Tools::in_folder(&MODULES.built()?).ok()
}
