//! The demo's application: a shop whose web page asks a catalog, which asks a database.
//!
//! `web` and `catalog` speak HTTP/1.1; `db` speaks first, as MySQL or SMTP do, so a proxy that waits for the
//! client's first bytes would hang it. Every answer tells which address the server saw, because in the mesh that
//! has to be the caller's own. Nothing here knows of a mesh.

mod db;
mod http;
mod load;
mod server;

use std::net::SocketAddr;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::{Parser, Subcommand};
use serde_json::{Value, json};

use http::{Request, Response, Url};

#[derive(Parser)]
#[command(about = "A small application to run in a lab's pods")]
struct Shop {
    #[command(subcommand)]
    role: Role,
}

#[derive(Subcommand)]
enum Role {
    /// The page: asks the catalog for every request.
    Web {
        /// The port to listen on, IPv4 and IPv6.
        #[arg(long, default_value_t = 8080)]
        listen: u16,
        /// Where the catalog is.
        #[arg(long)]
        catalog: Url,
    },
    /// The catalog: asks the database for every request.
    Catalog {
        /// What this one calls itself.
        #[arg(long, default_value = "v1")]
        version: String,
        /// The port to listen on, IPv4 and IPv6.
        #[arg(long, default_value_t = 8080)]
        listen: u16,
        /// Where the database is.
        #[arg(long)]
        db: SocketAddr,
    },
    /// The database: greets, then answers `STOCK <fruit>`.
    Db {
        /// The port to listen on, IPv4 and IPv6.
        #[arg(long, default_value_t = 5432)]
        listen: u16,
    },
    /// A client of the database that keeps one session and asks every second.
    Watch {
        /// Where the database is.
        #[arg(long)]
        db: SocketAddr,
    },
    /// A bounded number of requests to the page.
    Load(load::Load),
}

fn main() -> ExitCode {
    let done = match Shop::parse().role {
        Role::Web { listen, catalog } => {
            server::serve(listen, move |io| http::serve(io, |r| page(r, &catalog)))
        }
        Role::Catalog { version, listen, db } => {
            server::serve(listen, move |io| http::serve(io, |r| stock(r, &version, db)))
        }
        Role::Db { listen } => server::serve(listen, db::serve),
        Role::Watch { db } => db::watch(db),
        Role::Load(load) => load.run(),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("shop: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// The web page, as JSON: what the catalog said, and who saw whom.
fn page(request: &Request, catalog: &Url) -> Response {
    match http::get(catalog, &format!("/stock{}", request.path)).and_then(catalog_answer) {
        Ok(answer) => {
            Response::json(200, &json!({ "page": "shop", "web_saw": request.peer, "catalog": answer }))
        }
        Err(error) => failed("catalog", &error),
    }
}

fn catalog_answer(response: Response) -> Result<Value> {
    if response.status != 200 {
        bail!("{} {}", response.status, response.body.trim());
    }
    serde_json::from_str(&response.body).context("the catalog's answer is no JSON")
}

/// The catalog's answer: `/stock/pears` asks for pears, any other path for apples.
fn stock(request: &Request, version: &str, db: SocketAddr) -> Response {
    let fruit = request.path.strip_prefix("/stock/").filter(|fruit| !fruit.is_empty()).unwrap_or("apples");
    match db::ask(db, fruit) {
        Ok(answer) => Response::json(
            200,
            &json!({
                "version": version, "fruit": fruit, "stock": answer.stock,
                "catalog_saw": request.peer, "db_saw": answer.db_saw,
            }),
        ),
        Err(error) => failed("db", &error),
    }
}

fn failed(what: &str, error: &anyhow::Error) -> Response {
    eprintln!("{what}: {error:#}");
    Response::json(502, &json!({ "failed": what, "error": format!("{error:#}") }))
}
