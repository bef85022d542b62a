//! What a cluster is made of, as Go modules: the folders of `tests/cluster`.

use anyhow::Result;
use undermesh_tests::cluster::Tools;

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
            manifests: None,
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
            manifests: None,
            tags: "",
            cgo: false,
        },
        Module {
            folder: "tests/cluster/runc",
            programs: &[("runc", "github.com/opencontainers/runc")],
            told: Some(("github.com/opencontainers/runc", &["main.version"])),
            manifests: None,
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
            manifests: None,
            tags: "",
            cgo: false,
        },
        Module {
            folder: "tests/cluster/etcd",
            programs: &[("etcd", "go.etcd.io/etcd/server/v3")],
            told: None,
            manifests: None,
            tags: "",
            cgo: false,
        },
        Module {
            folder: "tests/cluster/kubernetes",
            programs: &[
                ("kubectl", "k8s.io/kubernetes/cmd/kubectl"),
                ("kube-apiserver", "k8s.io/kubernetes/cmd/kube-apiserver"),
                ("kube-controller-manager", "k8s.io/kubernetes/cmd/kube-controller-manager"),
                ("kube-scheduler", "k8s.io/kubernetes/cmd/kube-scheduler"),
                ("kubelet", "k8s.io/kubernetes/cmd/kubelet"),
                ("kube-proxy", "k8s.io/kubernetes/cmd/kube-proxy"),
            ],
            told: Some(("k8s.io/kubernetes", &["k8s.io/component-base/version.gitVersion"])),
            manifests: None,
            tags: "",
            cgo: false,
        },
        Module {
            folder: "tests/cluster/coredns",
            programs: &[("coredns", "github.com/coredns/coredns")],
            told: None,
            manifests: None,
            tags: "",
            cgo: false,
        },
        Module {
            folder: "tests/cluster/helm",
            programs: &[("helm", "helm.sh/helm/v3/cmd/helm")],
            told: Some(("helm.sh/helm/v3", &["helm.sh/helm/v3/internal/version.version"])),
            manifests: None,
            tags: "",
            cgo: false,
        },
        // The Gateway API's own tests of meshes, and its CRDs, which are to be of the same version.
        Module {
            folder: "tests/cluster/conformance",
            programs: &[("conformance", "undermesh/tests/cluster/conformance/suite")],
            told: None,
            manifests: Some(("gateway-api.yaml", "sigs.k8s.io/gateway-api", "config/crd/standard")),
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
            manifests: None,
            tags: "",
            cgo: false,
        },
    ],
};

/// The programs, built if they are not.
pub fn ensure() -> Result<Tools> {
    Tools::in_folder(&MODULES.ensure()?)
}

/// The programs, if they are built.
pub fn built() -> Option<Tools> {
    Tools::in_folder(&MODULES.built()?).ok()
}
