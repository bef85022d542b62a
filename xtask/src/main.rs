//! Every developer command of Undermesh: `cargo xtask --help`.

mod bench;
mod build;
mod cluster;
mod command;
mod crds;
mod demo;
mod envoy;
mod fuzz;
mod go;
mod image;
mod interop;
mod lint;
mod manifests;
mod paths;
mod say;
mod setup;
mod test;
mod vm;
mod ztunnel;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "cargo xtask", about = "Every developer command of Undermesh")]
struct Xtask {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Install what is missing on this machine to build, show and test everything.
    Setup,
    /// Build the kernel programs, then the agent with them inside, and the test programs.
    Build(build::Build),
    /// Check formatting, lints, licences and the architecture.
    Lint,
    /// Run every test, those that need root and a kernel included.
    Test(test::Test),
    /// Run end-to-end tests under other kernels, in a VM.
    Vm(vm::Vm),
    /// Make the container image, without a daemon.
    Image(image::ImageTask),
    /// Write what is generated from the Helm chart.
    Manifests(manifests::Manifests),
    /// Write what API servers are told of our own kinds (CustomResourceDefinitions), from the types that these are read by.
    Crds,
    /// Bring up a real Kubernetes on this machine, until Ctrl-C.
    ///
    /// A control plane and nodes are started in namespaces of their own, from programs that are built from Go modules
    /// when they are not in the cache. Nothing of the machine's network is changed. The API server can be reached at a
    /// loopback port, by the kubeconfig that is printed. Ctrl-C ends the cluster and removes all of it; what a cluster
    /// that was killed has left is removed when the next of its name is started, or by `--sweep`. Needs root and Go.
    Cluster(cluster::ClusterTask),
    /// Run the tests that need a real Kubernetes, on one that is made for them.
    E2e(cluster::E2e),
    /// Measure an agent in a cluster of 20,000 pods, and how soon a change is in force; try 500 real pods at once, and an API server
    /// that is away for ten minutes.
    Scale,
    /// Show the mesh at work on this machine.
    Demo(demo::Demo),
    /// Feed malformed input to every parser of what comes from outside.
    Fuzz(fuzz::Fuzz),
    /// Measure the mesh against the same pods without one.
    Bench(bench::Bench),
    /// See that another mesh's proxy can be at either end of our tunnel.
    Interop(interop::Interop),
}

fn main() -> ExitCode {
    let done = match Xtask::parse().task {
        Task::Setup => setup::everything(),
        Task::Build(build) => setup::for_build().and_then(|()| build.run()),
        Task::Lint => lint::run(),
        Task::Test(test) => test.run(),
        Task::Vm(vm) => vm.run(),
        Task::Image(image) => image.run(),
        Task::Manifests(manifests) => manifests.run(),
        Task::Crds => crds::write(),
        Task::Cluster(cluster) => cluster.run(),
        Task::E2e(e2e) => e2e.run(),
        Task::Scale => cluster::scale(),
        Task::Demo(demo) => demo.run(),
        Task::Fuzz(fuzz) => fuzz.run(),
        Task::Bench(bench) => bench.run(),
        Task::Interop(interop) => interop.run(),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("\nerror: {error:#}");
            ExitCode::FAILURE
        }
    }
}
