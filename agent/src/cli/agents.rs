//! The agents that a command asks: one, or several one after the other. One that cannot be asked is named, never left out.

use std::net::SocketAddr;

use clap::Args;
use serde::de::DeserializeOwned;

use super::admin_client::{self, DEFAULT_ADMIN_ADDRESS};

/// Which agents to ask.
#[derive(Args, Clone, Debug)]
pub struct AgentsArgs {
    /// Where an agent's admin server listens; may be repeated, to ask several agents
    #[arg(long = "admin-address", value_name = "ADDRESS", default_value = DEFAULT_ADMIN_ADDRESS)]
    admin_addresses: Vec<SocketAddr>,
}

/// What came of asking the agents.
#[derive(Clone, Debug)]
pub struct Answers<T> {
    /// What they said.
    pub answers: Vec<T>,
    /// Who has not, and why, a sentence each.
    pub missing: Vec<String>,
}

impl AgentsArgs {
    /// Asks each of them for a page.
    pub fn ask<T: DeserializeOwned>(&self, path: &str) -> Answers<T> {
        let mut answers = Answers { answers: Vec::new(), missing: Vec::new() };
        for address in &self.admin_addresses {
            match admin_client::get_json(*address, path) {
                Ok(answer) => answers.answers.push(answer),
                Err(error) => answers.missing.push(error.to_string()),
            }
        }
        answers
    }
}
