//! The agents that a command asks: one, several, or those of all nodes. One that cannot be asked is named, never left out.

use std::net::SocketAddr;
use std::process::ExitCode;

use clap::Args;
use futures_util::{StreamExt as _, stream};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::admin_client::{self, DEFAULT_ADMIN_ADDRESS};
use super::connections::OutputFormat;
use super::print;
use crate::kubernetes::{Server, Servers};

/// Agents that are asked at the same time.
const AT_ONCE: usize = 16;

/// By which the chart marks the agents' pods, and the port of their pages.
const AGENT_LABELS: &str = "app.kubernetes.io/name=undermesh,app.kubernetes.io/component=agent";
const AGENT_PORT: &str = "admin";

/// The exit code where something is not known.
pub const INCOMPLETE: u8 = 2;

/// Which agents to ask.
#[derive(Args, Clone, Debug)]
pub struct AgentsArgs {
    /// Where an agent's admin server listens; may be repeated, to ask several agents
    #[arg(long = "admin-address", value_name = "ADDRESS", default_value = DEFAULT_ADMIN_ADDRESS)]
    admin_addresses: Vec<SocketAddr>,
    /// Ask the agents of all nodes of a cluster, through its API server, as KUBECONFIG or the usual kubeconfig says
    #[arg(long, conflicts_with = "admin_addresses")]
    all_nodes: bool,
    /// The namespace that the mesh is installed in
    #[arg(long, value_name = "NAMESPACE", default_value = "undermesh-system", requires = "all_nodes")]
    mesh_namespace: String,
}

/// The agents, found but not yet asked.
pub(super) enum Agents {
    /// Where they listen.
    At(Vec<SocketAddr>),
    /// Behind the API server of their cluster.
    Of(tokio::runtime::Runtime, Servers),
}

/// What came of asking them.
#[derive(Clone, Debug, Serialize)]
pub struct Answers<T> {
    /// What they said.
    pub nodes: Vec<Answer<T>>,
    /// Who has not, and why, a sentence each.
    pub missing: Vec<String>,
}

/// What one of them said.
#[derive(Clone, Debug, Serialize)]
pub struct Answer<T> {
    /// Its node, or its address where that is all that is known.
    pub node: String,
    /// The page.
    pub page: T,
    #[serde(skip)]
    agent: usize,
}

/// Whether it has to be said of which node something is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Naming {
    /// There is one.
    Needless,
    /// There may be several.
    Needed,
}

impl AgentsArgs {
    /// Whether more than one is asked.
    pub fn are_several(&self) -> bool {
        self.all_nodes || self.admin_addresses.len() > 1
    }

    /// Finds them.
    ///
    /// # Errors
    /// When nothing can be said of where they are, in a sentence.
    pub(super) fn find(&self) -> Result<Agents, String> {
        if !self.all_nodes {
            return Ok(Agents::At(self.admin_addresses.clone()));
        }
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.map_err(|error| error.to_string())?;
        let namespace = &self.mesh_namespace;
        let servers = runtime.block_on(Servers::find(namespace, AGENT_LABELS, AGENT_PORT))?;
        match servers.all.is_empty() {
            true => {
                Err(format!("no agent runs in the namespace {namespace}; --mesh-namespace names another one"))
            }
            false => Ok(Agents::Of(runtime, servers)),
        }
    }

    /// Prints what the page of each of them says: of one alone the page itself and else its error, of several whatever they say.
    pub fn show<T: DeserializeOwned>(
        &self,
        path: &str,
        output: OutputFormat,
        as_text: impl Fn(&[Answer<T>], Naming) -> String,
    ) -> ExitCode {
        if !self.are_several() {
            let address = self.admin_addresses[0];
            return print::outcome(match output {
                OutputFormat::Json => {
                    admin_client::get_json::<Value>(address, path).map(|page| print::json(&page))
                }
                OutputFormat::Table => admin_client::get_json(address, path)
                    .map(|page| as_text(&[Answer::new(address.to_string(), page, 0)], Naming::Needless)),
            });
        }
        match output {
            OutputFormat::Json => {
                let answers = self.ask::<Value>(path);
                print::and_exit(&print::json(&answers), answers.exit_code())
            }
            OutputFormat::Table => {
                let answers = self.ask(path);
                let text = match answers.nodes.is_empty() {
                    true => String::new(),
                    false => as_text(&answers.nodes, Naming::Needed) + "\n",
                };
                let text = if answers.missing.is_empty() { text.trim_end().to_owned() + "\n" } else { text };
                print::and_exit(&(text + &answers.missing_lines()), answers.exit_code())
            }
        }
    }

    /// Finds them and asks each for a page.
    pub fn ask<T: DeserializeOwned>(&self, path: &str) -> Answers<T> {
        match self.find() {
            Ok(agents) => agents.ask(path),
            Err(why) => Answers { nodes: Vec::new(), missing: vec![why] },
        }
    }
}

impl Agents {
    /// Asks each for a page.
    pub fn ask<T: DeserializeOwned>(&self, path: &str) -> Answers<T> {
        let count = match self {
            Self::At(addresses) => addresses.len(),
            Self::Of(_, servers) => servers.all.len(),
        };
        self.ask_some(&(0..count).map(|agent| (agent, path.to_owned())).collect::<Vec<_>>())
    }

    /// Asks those again that have answered, each for a page of its own.
    pub fn ask_again<T: DeserializeOwned, U>(&self, pages: &[(&Answer<U>, String)]) -> Answers<T> {
        self.ask_some(&pages.iter().map(|(answer, path)| (answer.agent, path.clone())).collect::<Vec<_>>())
    }

    fn ask_some<T: DeserializeOwned>(&self, pages: &[(usize, String)]) -> Answers<T> {
        let asked: Vec<Result<Answer<T>, String>> = match self {
            Self::At(addresses) => pages.iter().map(|(agent, path)| at(addresses, *agent, path)).collect(),
            Self::Of(runtime, servers) => {
                let asked = pages.iter().map(|(agent, path)| of(servers, *agent, path));
                runtime.block_on(stream::iter(asked).buffered(AT_ONCE).collect())
            }
        };
        let mut answers = Answers { nodes: Vec::new(), missing: Vec::new() };
        for answer in asked {
            match answer {
                Ok(answer) => answers.nodes.push(answer),
                Err(why) => answers.missing.push(why),
            }
        }
        answers
    }
}

fn at<T: DeserializeOwned>(addresses: &[SocketAddr], agent: usize, path: &str) -> Result<Answer<T>, String> {
    let address = addresses[agent];
    let page = admin_client::get_json(address, path).map_err(|error| error.to_string())?;
    Ok(Answer::new(address.to_string(), page, agent))
}

async fn of<T: DeserializeOwned>(servers: &Servers, agent: usize, path: &str) -> Result<Answer<T>, String> {
    let server = &servers.all[agent];
    let Server { node, pod, .. } = server;
    let told = |why: String| format!("node {node}: pod {pod}: {why}");
    let page = servers.page(server, path).await.map_err(told)?;
    let page = serde_json::from_str(&page).map_err(|error| told(format!("GET {path}: {error}")))?;
    Ok(Answer::new(node.clone(), page, agent))
}

impl<T> Answer<T> {
    pub(super) fn new(node: String, page: T, agent: usize) -> Self {
        Self { node, page, agent }
    }
}

impl Naming {
    /// A row, with its node where that is needed.
    pub fn row<T, const N: usize>(self, answer: &Answer<T>, row: [String; N]) -> Vec<String> {
        let node = (self == Self::Needed).then(|| answer.node.clone());
        node.into_iter().chain(row).collect()
    }

    /// The heading of such rows.
    pub fn heading<const N: usize>(self, heading: [&str; N]) -> Vec<&str> {
        (self == Self::Needed).then_some("NODE").into_iter().chain(heading).collect()
    }

    /// A line, with its node in front where that is needed.
    pub fn line<T>(self, answer: &Answer<T>, line: &str) -> String {
        let line = line.replace(char::is_control, "?");
        match self {
            Self::Needed => format!("{}: {line}", answer.node),
            Self::Needless => line,
        }
    }
}

impl<T> Answers<T> {
    /// The exit code: whether all have answered.
    pub fn exit_code(&self) -> u8 {
        if self.missing.is_empty() { 0 } else { INCOMPLETE }
    }

    /// What is printed below all the rest: who has not answered.
    pub fn missing_lines(&self) -> String {
        let line = |why: &String| format!("incomplete: {}\n", why.replace(char::is_control, "?"));
        self.missing.iter().map(line).collect()
    }
}
