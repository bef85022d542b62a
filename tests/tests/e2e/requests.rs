//! The `requests` program's roles as types.

use std::collections::BTreeMap;
use std::process::Command;
use std::time::Duration;

use anyhow::{Result, ensure};
use serde::Deserialize;
use serde_json::Value;
use undermesh_tests::lab::{Pod, Process, binary};

use crate::kit::last_line;

/// What came of requests.
#[derive(Clone, Debug, Deserialize)]
pub struct Asked {
    pub by_server: BTreeMap<String, usize>,
    pub by_status: BTreeMap<String, usize>,
    pub failed: BTreeMap<String, usize>,
    /// The last answer.
    pub last: Value,
}

impl Asked {
    /// Fails unless the last request had this answer, which it returns.
    pub fn answered(self, status: u64) -> Result<Value> {
        ensure!(
            self.failed.is_empty() && self.last["status"] == status,
            "not answered with {status}: {self:?}"
        );
        Ok(self.last)
    }

    /// Fails unless all had such an answer; how many each server has given.
    pub fn all(&self, status: u16) -> Result<BTreeMap<String, usize>> {
        let only = self.failed.is_empty() && self.by_status.keys().eq([&status.to_string()]);
        ensure!(only, "not all were answered with {status}: {self:?}");
        Ok(self.by_server.clone())
    }

    /// What the server saw of the last request.
    pub fn saw(&self) -> Result<Value> {
        ensure!(!self.last["saw"].is_null(), "no server has answered: {self:?}");
        Ok(self.last["saw"].clone())
    }
}

/// Asks from the pod.
pub fn ask(client: &Pod, url: &str, args: &[&str]) -> Result<Asked> {
    let mut command = Command::new(binary("requests")?);
    command.arg("ask").arg(url).args(args);
    last_line(&client.run(command, Duration::from_secs(120))?.success()?)
}

/// Starts a server on port 8080 that says what it sees, and waits until it listens.
pub fn serve_requests(pod: &Pod) -> Result<Process> {
    serve_requests_with(pod, &[])
}

/// As [`serve_requests`], and does what the arguments say.
pub fn serve_requests_with(pod: &Pod, args: &[&str]) -> Result<Process> {
    let mut command = Command::new(binary("requests")?);
    command.args(["serve", "--name", pod.name()]).args(args);
    let server = pod.spawn(command)?;
    pod.wait_listening(8080)?;
    Ok(server)
}
