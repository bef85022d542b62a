//! `cargo xtask demo`: a shop on two nodes of this machine, with the mesh under it.
//!
//! The file tells the demo's story; `shop` sets the stage, `show` prints what there is to see.

mod canary;
mod hold;
mod shop;
mod show;

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Args;
use undermesh_tests::lab::{Lab, sweep_on_signals};

use crate::build::Build;
use crate::{paths, say, setup};
use shop::Shop;

const LAB: &str = "um-demo";

/// The arguments of `cargo xtask demo`.
#[derive(Args)]
pub struct Demo {
    /// Keep everything up until Ctrl-C, and print commands to look around with.
    #[arg(long)]
    hold: bool,
    /// Keep the logs of the agents and the shop.
    #[arg(long)]
    keep_logs: bool,
    /// Run the shop over plain pod addresses, without agents.
    #[arg(long, hide = true)]
    no_mesh: bool,
}

impl Demo {
    /// Plays the demo and leaves nothing behind.
    pub fn run(&self) -> Result<()> {
        Lab::sweep(LAB)?;
        setup::for_demo()?;
        Build { release: false }.run()?;
        // Before any thread is started, and after the builds, which handle Ctrl-C well themselves.
        sweep_on_signals()?;

        say::step("making two nodes, five pods and a shop");
        let lab = Lab::create(LAB)?;
        let played = self.play(&lab);
        if self.keep_logs || played.is_err() {
            say::step(&format!("the logs are in {}", keep_logs(&lab)?.display()));
        }
        drop(lab);
        if played.is_ok() {
            say::step("the lab is swept: no namespace, cgroup, pin or process is left");
        }
        played
    }

    fn play(&self, lab: &Lab) -> Result<()> {
        hold::write_enter_script(lab)?;
        let shop = Shop::open(lab, !self.no_mesh)?;
        show::pods(&shop)?;
        show::requests(&shop)?;
        if !self.no_mesh {
            show::conversations(&shop)?;
            show::connections(&shop)?;
            canary::play(lab, &shop)?;
            show::metrics(&shop)?;
            show::kernel(&shop)?;
        }
        if self.hold {
            hold::until_interrupted(lab, &shop)?;
        }
        Ok(())
    }
}

/// Copies the lab's logs to where the sweep does not go.
fn keep_logs(lab: &Lab) -> Result<PathBuf> {
    let kept = paths::target().join("demo-logs");
    fs::create_dir_all(&kept)?;
    for log in fs::read_dir(lab.dir().join("log"))? {
        let log = log?;
        fs::copy(log.path(), kept.join(log.file_name())).context("a log cannot be kept")?;
    }
    Ok(kept)
}
