//! What the kernel holds of a node's agent, as `bpftool` shows it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use undermesh_tests::lab::{Node, run_here};

use crate::kit::SOON;

/// Each program that is attached to a cgroup of the node, with the cgroup.
pub fn programs(node: &Node) -> Result<BTreeSet<(PathBuf, String)>> {
    let groups: Vec<Value> = bpftool(&["cgroup", "tree", &node.cgroup().display().to_string()])?;
    let text =
        |value: &Value| value.as_str().map(str::to_owned).context("bpftool's answer has no text there");
    let mut found = BTreeSet::new();
    for group in groups {
        let cgroup = text(&group["cgroup"])?;
        for program in group["programs"].as_array().context("a cgroup without programs")? {
            ensure!(
                found.insert((cgroup.clone().into(), text(&program["name"])?)),
                "attached twice to {cgroup}: {program}"
            );
        }
    }
    Ok(found)
}

fn bpftool(args: &[&str]) -> Result<Vec<Value>> {
    let mut command = Command::new("bpftool");
    command.arg("--json").args(args);
    let answer = run_here(command, SOON)?.success()?;
    serde_json::from_str(&answer).with_context(|| format!("bpftool says {answer}"))
}

/// How many entries each of the node's pinned maps has.
pub fn map_entries(node: &Node) -> Result<BTreeMap<String, usize>> {
    let mut entries = BTreeMap::new();
    for map in fs::read_dir(node.pins().join("maps"))? {
        let map = map?;
        let name = map.file_name().to_string_lossy().into_owned();
        // A ring buffer has no entries.
        if name != "AYA_LOGS" {
            let dump = bpftool(&["map", "dump", "pinned", &map.path().display().to_string()])?;
            entries.insert(name, dump.len());
        }
    }
    Ok(entries)
}
