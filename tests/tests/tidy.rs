//! The architecture as a test: who may import whom, how long a file may be, and that each says what it is.
//!
//! The arrows are those of docs/architecture.md. They are read off the text of the sources, which is crude but
//! needs no compiler, so a new module that is not in the table fails at once.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// The modules of `agent/src`, and which others each may import. `self` is always allowed.
const MAY_IMPORT: &[(&str, &[&str])] = &[
    ("model", &[]),
    ("sentence", &[]),
    ("folders", &[]),
    ("replace", &[]),
    ("web_roots", &["sentence"]),
    ("kubernetes", &["model", "sentence"]),
    ("policy", &["model"]),
    ("route", &["model"]),
    ("balance", &["model"]),
    ("snapshot", &["model", "policy", "route"]),
    ("config", &["model", "snapshot", "policy", "route", "balance"]),
    ("identity", &["model", "sentence", "replace"]),
    ("capture", &["model", "snapshot", "sentence", "folders"]),
    ("telemetry", &["model", "snapshot", "web_roots"]),
    ("jwks", &["model", "policy", "sentence", "web_roots"]),
    ("discovery", &["model", "snapshot", "config", "kubernetes", "replace"]),
    (
        "proxy",
        &[
            "model",
            "snapshot",
            "policy",
            "route",
            "balance",
            "identity",
            "capture",
            "telemetry",
            "jwks",
            "sentence",
            "web_roots",
        ],
    ),
    ("admin", &["model", "snapshot", "telemetry"]),
    // A role of its own, wired in its `mod.rs`: the authority is `identity`'s, its health and metrics are `admin`'s.
    ("controller", &["model", "config", "route", "identity", "policy", "telemetry", "admin", "kubernetes"]),
    // Wiring happens here, so it may know everybody.
    ("agent", &EVERYBODY),
    ("cli", &EVERYBODY),
];

const EVERYBODY: [&str; 19] = [
    "agent",
    "model",
    "snapshot",
    "policy",
    "route",
    "balance",
    "config",
    "identity",
    "capture",
    "telemetry",
    "discovery",
    "proxy",
    "admin",
    "controller",
    "kubernetes",
    "sentence",
    "folders",
    "jwks",
    "web_roots",
];

/// What only some modules may name, and which.
const ONLY_IN: &[(&str, &[&str])] = &[
    ("aya::", &["capture"]),
    ("aya_log", &["capture"]),
    ("kube::", &["kubernetes", "discovery", "controller"]),
    ("k8s_openapi", &["kubernetes", "discovery", "config", "controller"]),
];

/// Modules without sockets, clock or log: time is an argument, a verdict carries its reason.
const PURE: [&str; 5] = ["model", "snapshot", "policy", "route", "balance"];

/// What a pure module must not name.
const IMPURE: [&str; 12] = [
    "tokio::",
    "tracing::",
    "socket2::",
    "nix::",
    "libc::",
    "std::fs",
    "std::io",
    "std::thread",
    "TcpStream",
    "UdpSocket",
    "Instant::now",
    "SystemTime::now",
];

/// The longest a source file may be.
const MOST_LINES: usize = 600;

#[test]
fn modules_import_only_what_they_may() {
    let may: BTreeMap<_, _> = MAY_IMPORT.iter().copied().collect();
    let mut wrong = Vec::new();
    for (file, module, code) in agent_modules() {
        let Some(allowed) = may.get(module.as_str()) else {
            wrong.push(format!("{file}: the module `{module}` is not in the table of tests/tests/tidy.rs"));
            continue;
        };
        for other in imports(&code) {
            if other != module && may.contains_key(other.as_str()) && !allowed.contains(&other.as_str()) {
                wrong.push(format!("{file}: `{module}` may not import `{other}`"));
            }
        }
    }
    assert_none(&wrong);
}

#[test]
fn only_some_modules_know_the_outside() {
    let mut wrong = Vec::new();
    for (file, module, code) in agent_modules() {
        for (name, modules) in ONLY_IN {
            if code.contains(name) && !modules.contains(&module.as_str()) {
                wrong.push(format!("{file}: `{name}` belongs to {}", modules.join(" and ")));
            }
        }
    }
    assert_none(&wrong);
}

#[test]
fn pure_modules_have_no_socket_no_clock_no_log() {
    let mut wrong = Vec::new();
    for (file, module, code) in agent_modules() {
        for name in IMPURE {
            if PURE.contains(&module.as_str()) && code.contains(name) {
                wrong.push(format!("{file}: `{module}` is pure and may not use `{name}`"));
            }
        }
    }
    assert_none(&wrong);
}

#[test]
fn files_are_short_and_say_what_they_are() {
    let mut wrong = Vec::new();
    for path in sources(&workspace()) {
        let text = fs::read_to_string(&path).unwrap();
        let lines = text.lines().count();
        if lines > MOST_LINES {
            wrong.push(format!("{}: {lines} lines, {MOST_LINES} at most", shown(&path)));
        }
        if !text.starts_with("//!") {
            wrong.push(format!("{}: does not begin with //! and what it is", shown(&path)));
        }
    }
    assert_none(&wrong);
}

#[test]
fn behaviour_is_shown_by_tests_that_exist() {
    let page = fs::read_to_string(workspace().join("docs/behaviour.md")).unwrap();
    let mut wrong = Vec::new();
    for (module, test) in page.split('`').skip(1).step_by(2).filter_map(|word| word.split_once("::")) {
        let has_it = |suite: &str| {
            let source = fs::read_to_string(workspace().join(format!("tests/tests/{suite}/{module}.rs")));
            source.is_ok_and(|source| source.contains(&format!("fn {test}()")))
        };
        if !has_it("e2e") && !has_it("cluster") {
            wrong.push(format!("docs/behaviour.md: there is no test {module}::{test}"));
        }
    }
    assert_none(&wrong);
}

#[test]
fn imports_are_read_off_the_code() {
    let check = |code: &str, expected: &[&str]| assert_eq!(imports(code), expected, "{code}");
    check("use crate::model::Snapshot;", &["model"]);
    check("use crate::{model, proxy::tcp};", &["model", "proxy"]);
    check(
        "use crate::{\n    config::{self, Error},\n    model::{Name, ObjectRef},\n};",
        &["config", "model"],
    );
    check("let x = crate::balance::pick();", &["balance"]);
    check("use super::model;", &[]);
}

/// Every source of a module of the agent: file, module, code without comments. Unit tests may use what they like.
fn agent_modules() -> Vec<(String, String, String)> {
    let src = workspace().join("agent/src");
    let files = sources(&src).into_iter().filter_map(|path| {
        let first = path.strip_prefix(&src).unwrap().components().next()?.as_os_str().to_str()?.to_owned();
        let module = first.trim_end_matches(".rs").to_owned();
        let left_out = matches!(module.as_str(), "lib" | "main") || path.ends_with("tests.rs");
        (!left_out).then(|| (shown(&path), module, code(&fs::read_to_string(&path).unwrap())))
    });
    files.collect()
}

/// The text without comment lines, and without the unit tests, which close a file.
fn code(text: &str) -> String {
    let before_tests = text.split("#[cfg(test)]\nmod tests").next().unwrap_or_default();
    let lines = before_tests.lines().filter(|line| !line.trim_start().starts_with("//"));
    lines.collect::<Vec<_>>().join("\n")
}

/// The modules named right after `crate::`, alone or in braces.
fn imports(code: &str) -> Vec<String> {
    let mut found = Vec::new();
    for after in code.split("crate::").skip(1) {
        match after.strip_prefix('{') {
            Some(list) => found.extend(top_level(list)),
            None => found.push(name(after)),
        }
    }
    found.retain(|module| !module.is_empty());
    found
}

/// The first names of the items of a list in braces, up to the brace that closes it.
fn top_level(list: &str) -> Vec<String> {
    let (mut depth, mut item, mut items) = (0, String::new(), Vec::new());
    for c in list.chars() {
        match c {
            '{' => depth += 1,
            '}' if depth == 0 => break,
            '}' => depth -= 1,
            ',' if depth == 0 => items.push(std::mem::take(&mut item)),
            c if depth == 0 => item.push(c),
            _ => {}
        }
    }
    items.push(item);
    items.iter().map(|item| name(item.trim())).collect()
}

fn name(text: &str) -> String {
    text.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect()
}

/// All Rust files below, built ones excepted.
fn sources(directory: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        let hidden = path.file_name().unwrap().to_string_lossy().starts_with('.');
        if path.is_dir() && !hidden && !path.ends_with("target") {
            found.extend(sources(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
    found.sort();
    found
}

fn workspace() -> PathBuf {
    // As cargo says at run time: two checkouts may share a target folder.
    let own = std::env::var_os("CARGO_MANIFEST_DIR").unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into());
    Path::new(&own).parent().unwrap().to_owned()
}

fn shown(path: &Path) -> String {
    path.strip_prefix(workspace()).unwrap().display().to_string()
}

fn assert_none(wrong: &[String]) {
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}
