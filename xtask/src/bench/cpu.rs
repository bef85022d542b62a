//! CPU time of the whole machine. The kernel's part of a mesh runs in the applications' own system calls and in
//! soft interrupts, so the proxies' own CPU time tells half of the story.

use std::fs;

use anyhow::{Context, Result};

/// Busy CPU seconds of all cores since boot: everything but idling and waiting for disks.
pub fn machine_seconds() -> Result<f64> {
    let stat = fs::read_to_string("/proc/stat")?;
    let total = stat.lines().next().context("an empty /proc/stat")?;
    let ticks: Vec<u64> = total.split_whitespace().skip(1).map(|ticks| ticks.parse().unwrap_or(0)).collect();
    // user, nice, system, idle, iowait, irq, softirq; guests' time is counted in the first two already.
    let busy: u64 = [0, 1, 2, 5, 6].iter().filter_map(|&field| ticks.get(field)).sum();
    let per_second = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK)?.context("no clock tick")?;
    Ok(busy as f64 / per_second as f64)
}
