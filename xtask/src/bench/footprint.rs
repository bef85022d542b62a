//! What a mesh costs while nothing happens: memory and CPU time.

use std::time::Duration;

use anyhow::Result;
use serde_json::{Map, Value, json};

use super::case::Figure;
use super::column::Column;
use super::probe;

const CONNECTIONS: usize = 1000;
const PODS: usize = 100;
const KIB: f64 = 1024.0;

/// One column's figures.
pub struct Footprint {
    /// The column.
    pub column: String,
    /// Its figures.
    pub figures: Vec<Figure>,
}

impl Footprint {
    /// The figures as a member of the report.
    pub fn json(&self) -> (String, Value) {
        let figures = self.figures.iter().map(|figure| (figure.name.to_owned(), json!(figure.value)));
        (self.column.clone(), Value::Object(figures.collect::<Map<_, _>>()))
    }
}

/// Measures a mesh that has carried nothing yet; nothing for a column without one, or with
/// one that captures nothing. Adds idle pods, so the column is of
/// no use for loads afterwards.
pub fn at_rest(column: &mut Column, quick: bool) -> Result<Option<Footprint>> {
    settle();
    if !column.is_captured() {
        return Ok(None);
    }
    let Some(idle) = memory(column)? else { return Ok(None) };
    let mut figures = vec![Figure { name: "node1's proxy, idle, MiB", value: idle / KIB / KIB }];

    // Pods before connections: what those leave in the allocator would be counted against the pods.
    if column.add_pods(PODS)? {
        settle();
        let with_pods = memory(column)?.unwrap_or(idle);
        figures.push(Figure { name: "per idle pod, KiB", value: (with_pods - idle) / PODS as f64 / KIB });
        let (watched, cpu) = (Duration::from_secs(if quick { 3 } else { 20 }), column.near_proxy_cpu()?);
        std::thread::sleep(watched);
        let used = (column.near_proxy_cpu()? - cpu) / watched.as_secs_f64();
        figures.push(Figure { name: "its CPU with 100 idle pods, % of a core", value: used * 100.0 });
    }

    let before = memory(column)?.unwrap_or(idle);
    let held = probe::hold(column, CONNECTIONS)?;
    settle();
    column.check_encrypted()?;
    let with_connections = memory(column)?.unwrap_or(before);
    drop(held);
    let value = (with_connections - before) / CONNECTIONS as f64 / KIB;
    figures.push(Figure { name: "per idle connection, KiB", value });
    Ok(Some(Footprint { column: column.name.clone(), figures }))
}

/// What the loads have left behind.
pub fn after_loads(column: &Column) -> Result<Option<Figure>> {
    settle();
    Ok(memory(column)?
        .map(|bytes| Figure { name: "node1's proxy after the loads, MiB", value: bytes / KIB / KIB }))
}

/// Resident memory of the proxy on the client's node.
fn memory(column: &Column) -> Result<Option<f64>> {
    Ok(column.proxy_memory()?.first().map(|bytes| *bytes as f64))
}

/// What comes after the last answer, such as closing and freeing, takes a moment.
fn settle() {
    std::thread::sleep(Duration::from_secs(1));
}
