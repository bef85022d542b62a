//! `undermesh detach`: takes every pod of this node out of the mesh when no agent is to come back.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;

use crate::capture;

/// Remove every program, link and map that agents pinned on this node. Stop the agent first.
#[derive(Debug, Args)]
pub struct DetachArgs {
    /// The agent's folder on the bpffs.
    #[arg(long, value_name = "DIR", default_value = "/sys/fs/bpf/undermesh", env = "UNDERMESH_BPFFS")]
    bpffs: PathBuf,
}

/// Exit code 1: something could not be removed.
pub fn run(args: &DetachArgs) -> ExitCode {
    let folder = args.bpffs.display();
    if !args.bpffs.join("maps").is_dir() {
        println!("nothing to detach: {folder} holds no pins of an agent");
        return ExitCode::SUCCESS;
    }
    match capture::detach_all(&args.bpffs) {
        Ok(pods) => {
            println!("detached {pods} pods; {folder} is gone");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("undermesh: cannot remove the pins in {folder}: {error}");
            ExitCode::FAILURE
        }
    }
}
