//! A node of a test cluster: started by the cluster, with the file that says what the node is. It refuses to know
//! more than its command line; `undermesh_tests::cluster::init` does the work.

use std::path::PathBuf;

use anyhow::Result;
use clap::Parser;
use undermesh_tests::cluster::init;

#[derive(Parser)]
struct Arguments {
    /// Be the node's first process; without it, make the node's namespaces and start that one.
    #[arg(long)]
    inside: bool,
    /// The file that says what the node is.
    spec: PathBuf,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    match arguments.inside {
        true => init::inside(&arguments.spec),
        false => init::outside(&arguments.spec),
    }
}
