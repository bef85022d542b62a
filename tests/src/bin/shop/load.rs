//! A modest load: so many requests, at most so fast, then a summary.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use clap::Args;
use serde_json::Value;

use crate::http::{self, Url};

/// The arguments of `shop load`.
#[derive(Args)]
pub struct Load {
    /// The page to ask for.
    #[arg(long)]
    url: Url,
    /// How often to ask.
    #[arg(long, default_value_t = 20)]
    requests: u32,
    /// Requests per second at most.
    #[arg(long, default_value_t = 50)]
    rate: u32,
}

impl Load {
    /// Asks, counts, and fails if any request failed.
    pub fn run(&self) -> Result<()> {
        let mut answers = BTreeMap::<String, u32>::new();
        let mut slowest = Duration::ZERO;
        let interval = Duration::from_secs(1) / self.rate.max(1);
        let started = Instant::now();
        for number in 0..self.requests {
            std::thread::sleep((started + interval * number).saturating_duration_since(Instant::now()));
            let sent = Instant::now();
            let answer =
                http::get(&self.url, "/apples").map_or_else(|e| format!("error: {e:#}"), |r| kind(&r));
            slowest = slowest.max(sent.elapsed());
            *answers.entry(answer).or_default() += 1;
        }
        for (answer, count) in &answers {
            println!("{count:6} x {answer}");
        }
        println!("{} requests in {:.1?}, the slowest {slowest:.1?}", self.requests, started.elapsed());
        match answers.keys().all(|answer| answer.starts_with("200")) {
            true => Ok(()),
            false => bail!("not every request was answered well"),
        }
    }
}

fn kind(response: &http::Response) -> String {
    let body: Value = serde_json::from_str(&response.body).unwrap_or_default();
    let version = body.pointer("/catalog/version").and_then(Value::as_str);
    match version {
        Some(version) => format!("{} by catalog {version}", response.status),
        None => format!("{} {}", response.status, response.body.trim()),
    }
}
