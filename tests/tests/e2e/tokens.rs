//! Tokens of callers: checked at the server's node, wherever the caller is, by keys that their issuer publishes.

use std::fs;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use tempfile::TempDir;
use undermesh_tests::issuer::{SigningKey, key_set};
use undermesh_tests::lab::{Manifest, Node, Pod, Process, binary, eventually};
use undermesh_tests::pki::Authority;
use undermesh_tests::require;
use undermesh_tests::require::Feature;

use crate::kit::{PORT, SHOP, SOON, Talk, dial_at_once, serve_on};
use crate::rates::{Stage, of_status};
use crate::requests::{Asked, ask};

const ISSUER: &str = "https://id.test/";
/// Where the issuer publishes its keys: on the server's node, for its agent.
const PUBLISHED: &str = "127.0.0.1:8443";
const REQUESTS: &str = "undermesh_http_requests_total";
const FETCHES: &str = "undermesh_jwks_fetches_total";

/// An issuer that publishes what is in a file.
struct Issuer {
    folder: TempDir,
}

impl Issuer {
    fn new() -> Result<Self> {
        let authority = Authority::stranger("id.test")?;
        let (certificate, key) = authority.server("127.0.0.1")?;
        let folder = tempfile::tempdir()?;
        for (name, text) in
            [("ca.pem", authority.root()), ("issuer.pem", &certificate), ("issuer.key.pem", &key)]
        {
            fs::write(folder.path().join(name), text)?;
        }
        Ok(Self { folder })
    }

    fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn publish(&self, keys: &[&SigningKey]) -> Result<()> {
        // As a whole, for it may be asked at any moment.
        fs::write(self.file("keys.new"), key_set(keys.iter().copied()))?;
        Ok(fs::rename(self.file("keys.new"), self.file("keys.json"))?)
    }

    fn serve(&self, node: &Node) -> Result<Process> {
        let mut issuer = Command::new(binary("issuer")?);
        issuer.args(["--address", PUBLISHED]);
        for (flag, name) in
            [("--certificate", "issuer.pem"), ("--key", "issuer.key.pem"), ("--keys", "keys.json")]
        {
            issuer.arg(flag).arg(self.file(name));
        }
        let issuer = node.spawn(issuer)?;
        eventually(SOON, "the issuer listens", || {
            ensure!(issuer.output().contains("listening"), "{}", issuer.log_tail(5));
            Ok(())
        })?;
        Ok(issuer)
    }
}

fn claims(more: Value) -> Result<Value> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
    let mut claims = json!({ "iss": ISSUER, "aud": "shop", "sub": "ann", "exp": now + 3600 });
    for (name, value) in more.as_object().into_iter().flatten() {
        claims[name] = value.clone();
    }
    Ok(claims)
}

/// What the server's pod says of tokens whose issuer has its keys there.
fn policy(jwks: Value) -> Manifest {
    let issuer = json!({
        "issuer": ISSUER, "audiences": ["shop"], "jwks": jwks,
        "claimsToHeaders": [{ "claim": ["sub"], "header": "x-user" }],
    });
    let spec = json!({ "selector": { "matchLabels": { "app": "web" } }, "jwt": { "issuers": [issuer] } });
    Manifest::new("undermesh.io/v1alpha1", "MeshPolicy", Some(SHOP), "tokens").with("spec", spec)
}

fn uri() -> Value {
    json!({ "uri": format!("https://{PUBLISHED}/keys") })
}

fn bearer(token: &str) -> String {
    format!("authorization: Bearer {token}")
}

fn asked(client: &Pod, url: &str, headers: &[&str], more: &[&str]) -> Result<Asked> {
    let headers = headers.iter().flat_map(|header| ["--header", header]);
    ask(client, url, &headers.chain(more.iter().copied()).collect::<Vec<_>>())
}

impl Stage {
    /// Fails unless each client is answered so, with HTTP/1 and HTTP/2; what the server saw of the last.
    fn answers(&self, headers: &[&str], status: u64) -> Result<Value> {
        let mut saw = Value::Null;
        for (client, url) in self.clients() {
            for version in [&[][..], &["--http2"]] {
                let whom = || format!("{} {version:?} with {headers:?}", client.name());
                let answer = asked(client, &url, headers, version)?.answered(status).with_context(whom)?;
                if status == 401 {
                    let challenge = &answer["headers"]["www-authenticate"];
                    ensure!(challenge == "Bearer error=\"invalid_token\"", "{}: {answer}", whom());
                }
                saw = answer["saw"]["headers"].clone();
            }
        }
        Ok(saw)
    }

    /// Waits until clients without a token have their forged headers taken out.
    fn is_asking(&self) -> Result<()> {
        eventually(SOON, "tokens are asked for", || {
            let saw = self.answers(&["x-user: root"], 200)?;
            ensure!(saw["x-user"].is_null(), "{saw}");
            Ok(())
        })
    }
}

#[test]
fn callers_are_asked_for_tokens_that_hold_wherever_they_are() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let folder = tempfile::tempdir()?;
    let audit = folder.path().join("audit.json");
    let stage = Stage::set("um-e2e-tokens", &["--audit-log", &audit.display().to_string()])?;
    let _bytes = serve_on(&stage.server, PORT)?;
    let (key, stranger) = (SigningKey::new("a", "ES256")?, SigningKey::new("a", "ES256")?);
    stage.mesh.lab.apply(&policy(json!({ "inline": key_set([&key]) })))?;
    stage.is_asking()?;

    // Who shows none passes, and says nothing that only tokens may.
    let saw = stage.answers(&["x-user: root", "x_user: root", "x-other: 1"], 200)?;
    ensure!(saw["x-user"].is_null() && saw["x_user"].is_null() && saw["x-other"] == json!(["1"]), "{saw}");
    // Who shows one that holds is who it says, and the application does not get it.
    let good = key.token(&claims(json!({ "role": "user" }))?)?;
    let saw = stage.answers(&[&bearer(&good), "x-user: root"], 200)?;
    ensure!(saw["x-user"] == json!(["ann"]) && saw["authorization"].is_null(), "{saw}");
    // Nobody has taken out what the application is told of them.
    for (client, url) in stage.clients() {
        let saw = asked(client, &url, &[&bearer(&good), "connection: x-user"], &[])?.answered(200)?;
        ensure!(saw["saw"]["headers"]["x-user"] == json!(["ann"]), "{}: {saw}", client.name());
    }
    // Trailers are as little anybody else's as headers are.
    let trailers = ["--trailer", "x-user: root", "--trailer", "x_user: root", "--trailer", "x-other: 1"];
    for version in [&[][..], &["--http2"]] {
        for (client, url) in stage.clients() {
            let args = [&["--method", "POST", "--body", "3"], &trailers[..], version].concat();
            let saw = asked(client, &url, &[&bearer(&good)], &args)?.saw()?["trailers"].clone();
            ensure!(saw == json!({ "x-other": ["1"] }), "{} {version:?}: {saw}", client.name());
        }
    }
    // What a connection becomes by CONNECT may be requests with whatever tokens.
    for version in [&[][..], &["--http2"]] {
        for (client, url) in stage.clients() {
            let args = [&["--method", "CONNECT", "--target", "a:80"], version].concat();
            asked(client, &url, &[], &args)?.answered(405).with_context(|| client.name().to_owned())?;
        }
    }
    for (why, token) in [
        ("a stranger's", stranger.token(&claims(json!({}))?)?),
        ("for another", key.token(&claims(json!({ "aud": "bank" }))?)?),
        ("of another", key.token(&claims(json!({ "iss": "https://evil.test/" }))?)?),
        ("expired", key.token(&claims(json!({ "exp": 1 }))?)?),
        ("unsigned", format!("{}.", good.rsplit_once('.').context("a token")?.0)),
        ("opaque", "sesame".to_owned()),
    ] {
        stage.answers(&[&bearer(&token)], 401).context(why)?;
    }
    stage.answers(&[&bearer(&good), &bearer(&good)], 401).context("two")?;
    for (client, url) in stage.clients() {
        let grpc = ["--http2", "--method", "POST"];
        let headers = [bearer("sesame"), "content-type: application/grpc".to_owned()];
        let answer = asked(client, &url, &[&headers[0], &headers[1]], &grpc)?.answered(200)?;
        ensure!(answer["headers"]["grpc-status"] == "16", "{}: {answer}", client.name());
        // What is no HTTP has no token.
        let door = SocketAddr::new(stage.server.ip(), PORT);
        dial_at_once(client, door, 3, 1)?.all_served().context("bytes")?;
    }
    let refused = stage.mesh.agents[0].metrics()?.sum(REQUESTS, &[("reason", "unauthenticated")]);
    ensure!(refused > 0.0, "nobody counts them");

    // Policies go by claims.
    let rule = json!({ "when": [{ "claim": { "path": ["role"], "values": ["admin"] } }] });
    let spec = json!({ "selector": { "matchLabels": { "app": "web" } }, "rules": [rule] });
    let admins = Manifest::new("undermesh.io/v1alpha1", "AuthorizationPolicy", Some(SHOP), "admins");
    stage.mesh.lab.apply(&admins.with("spec", spec))?;
    let admin = key.token(&claims(json!({ "role": ["user", "admin"] }))?)?;
    eventually(SOON, "a claim is asked for", || stage.answers(&[], 403).map(drop))?;
    stage.answers(&[&bearer(&good)], 403)?;
    let saw = stage.answers(&[&bearer(&admin)], 200)?;
    ensure!(saw["x-user"] == json!(["ann"]), "{saw}");
    stage.answers(&[&bearer("sesame")], 401)?;

    let log = eventually(SOON, "the audit log has them", || {
        let log = fs::read_to_string(&audit)?;
        ensure!(log.contains("denied by MeshPolicy shop/tokens: the token has expired"), "{log}");
        Ok(log)
    })?;
    let secret = |token: &str| token.split('.').any(|part| part.len() > 5 && log.contains(part));
    ensure!(!secret(&good) && !secret(&admin) && !log.contains("sesame"), "a token is in the log: {log}");
    Ok(())
}

/// The issuer signs with a new key the moment it has published it, while others go on with the old one.
#[test]
fn a_new_key_of_the_issuer_fails_no_request() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let issuer = Issuer::new()?;
    let stage =
        Stage::set("um-e2e-tokens-rotate", &["--jwks-ca", &issuer.file("ca.pem").display().to_string()])?;
    let old = SigningKey::new("old", "ES256")?;
    issuer.publish(&[&old])?;
    let publisher = issuer.serve(&stage.mesh.nodes[0])?;
    stage.mesh.lab.apply(&policy(uri()))?;
    stage.is_asking()?;
    let told = bearer(&old.token(&claims(json!({}))?)?);
    stage.answers(&[&told], 200)?;
    let load = ["--count", "400", "--connections", "2", "--pause-ms", "20"];
    let clients = stage.clients();
    let new = SigningKey::new("new", "RS256")?;
    let told_by_new = bearer(&new.token(&claims(json!({}))?)?);
    thread::scope(|scope| {
        let under_way: Vec<_> = clients
            .iter()
            .map(|(client, url)| {
                let told = &told;
                scope.spawn(move || asked(client, url, &[told], &load)?.all(200).map(drop))
            })
            .collect();
        thread::sleep(Duration::from_millis(500));
        issuer.publish(&[&old, &new])?;
        let at_once = ["--count", "40", "--connections", "8"];
        let news: Vec<_> = clients
            .iter()
            .map(|(client, url)| {
                let told = &told_by_new;
                scope.spawn(move || asked(client, url, &[told], &at_once)?.all(200).map(drop))
            })
            .collect();
        for ended in news.into_iter().chain(under_way) {
            ended.join().map_err(|_| anyhow::anyhow!("a client panicked"))??;
        }
        anyhow::Ok(())
    })?;
    let fetches = publisher.output().matches("GET /keys ").count();
    ensure!(fetches == 2, "{fetches} fetches: {}", publisher.output());
    let metrics = stage.mesh.agents[0].metrics()?;
    ensure!(metrics.sum(FETCHES, &[("result", "changed")]) == 2.0, "not counted");
    let age = metrics.sum("undermesh_jwks_age_seconds", &[]);
    ensure!((0.0..300.0).contains(&age) && age > 0.0, "the keys are {age} s old");
    Ok(())
}

#[test]
fn an_issuer_that_is_away_fails_no_request_with_a_known_key() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let issuer = Issuer::new()?;
    let stage =
        Stage::set("um-e2e-tokens-away", &["--jwks-ca", &issuer.file("ca.pem").display().to_string()])?;
    let (old, new) = (SigningKey::new("old", "EdDSA")?, SigningKey::new("new", "EdDSA")?);
    issuer.publish(&[&old])?;
    // Nobody is there yet: tokens cannot be checked, and whoever shows none passes.
    stage.mesh.lab.apply(&policy(uri()))?;
    stage.is_asking()?;
    let (by_old, by_new) =
        (bearer(&old.token(&claims(json!({}))?)?), bearer(&new.token(&claims(json!({}))?)?));
    stage.answers(&[&by_old], 401)?;
    let mut publisher = issuer.serve(&stage.mesh.nodes[0])?;
    eventually(SOON, "the keys are fetched", || stage.answers(&[&by_old], 200).map(drop))?;

    publisher.kill();
    stage.answers(&[&by_old], 200)?;
    let began = Instant::now();
    let (near, url) = &stage.clients()[0];
    let refused = asked(near, url, &[&by_new], &["--count", "10"])?;
    ensure!(of_status(&refused, 401) == 10, "{refused:?}");
    ensure!(began.elapsed() < Duration::from_secs(5), "each waits: {:?}", began.elapsed());
    stage.answers(&[&by_old], 200)?;
    ensure!(stage.mesh.agents[0].metrics()?.sum(FETCHES, &[("result", "failed")]) > 0.0, "not counted");

    issuer.publish(&[&new])?;
    let _publisher = issuer.serve(&stage.mesh.nodes[0])?;
    eventually(Duration::from_secs(30), "the new key is known", || stage.answers(&[&by_new], 200).map(drop))?;
    // What the issuer has taken back is nobody's any more.
    stage.answers(&[&by_old], 401)?;
    Ok(())
}

/// Nobody had looked at them, so whatever they carry comes again and is looked at.
#[test]
fn connections_end_when_tokens_begin_to_be_asked_for() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let stage = Stage::set("um-e2e-tokens-live", &[])?;
    let _server = serve_on(&stage.server, PORT)?;
    let door = SocketAddr::new(stage.server.ip(), PORT);
    let clients = [&stage.near, &stage.far, &stage.outside];
    let talks: Vec<Talk> = clients.iter().map(|client| Talk::with(client, door)).collect::<Result<_>>()?;
    let key = SigningKey::new("a", "ES256")?;
    let load = ["--count", "200", "--connections", "2", "--pause-ms", "20"];
    let (far, url) = &stage.clients()[1];
    thread::scope(|scope| {
        // Between agents requests are sent again where they may be.
        let under_way = scope.spawn(move || asked(far, url, &[], &load)?.all(200).map(drop));
        thread::sleep(Duration::from_millis(500));
        stage.mesh.lab.apply(&policy(json!({ "inline": key_set([&key]) })))?;
        under_way.join().map_err(|_| anyhow::anyhow!("a client panicked"))?
    })?;
    for talk in talks {
        talk.ends_somehow(Duration::from_secs(5))?;
    }
    stage.is_asking()?;
    for client in clients {
        let mut talk = Talk::with(client, door)?;
        talk.goes_on()?;
        talk.end()?;
    }
    Ok(())
}
