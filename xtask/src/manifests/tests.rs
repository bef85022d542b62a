//! What holds of the chart without Helm: that it speaks of flags, metrics, values and versions as they are.

use std::collections::BTreeSet;

use serde_json::Value;

use super::*;

/// A template, and the sources that have the flags which it gives.
const FLAGS: &[(&str, &[&str])] = &[
    (
        "templates/agent/daemonset.yaml",
        &[
            "agent/src/cli/agent.rs",
            "agent/src/cli/agent/http.rs",
            "agent/src/cli/agent/identity.rs",
            "agent/src/cli/agent/policy.rs",
            "agent/src/cli/agent/traces.rs",
        ],
    ),
    ("templates/controller/deployment.yaml", &["agent/src/cli/controller.rs"]),
];

/// What asks for metrics.
const METRICS: &[&str] = &["templates/monitoring/rules.yaml", "files/dashboard.json"];

#[test]
fn flags_are_those_of_the_program() {
    for (template, sources) in FLAGS {
        let code: String = sources.iter().map(|source| read(&paths::workspace().join(source))).collect();
        let text = read(&chart().join(template));
        let flags: BTreeSet<_> = text
            .lines()
            .filter_map(|line| line.trim().strip_prefix("- --"))
            .map(|flag| flag.split('=').next().unwrap_or(flag))
            .collect();
        assert!(flags.len() > 5, "{template} has no flags any more: {flags:?}");
        for flag in flags {
            let (field, named) = (format!(" {}: ", flag.replace('-', "_")), format!("long = \"{flag}\""));
            assert!(code.contains(&field) || code.contains(&named), "{template}: there is no flag --{flag}");
        }
    }
}

#[test]
fn metrics_are_those_of_the_documentation() {
    let documented = read(&paths::workspace().join("docs/metrics.md"));
    for file in METRICS {
        let text = read(&chart().join(file));
        let names: BTreeSet<_> = text
            .split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'))
            .filter(|word| word.starts_with("undermesh_") || word.starts_with("process_"))
            .collect();
        assert!(names.len() > 8, "{file} asks for no metrics any more: {names:?}");
        for name in names {
            // A histogram is documented once for all of its series.
            let name = name.strip_suffix("_bucket").unwrap_or(name);
            assert!(
                documented.contains(&format!("`{name}`")),
                "{file}: docs/metrics.md does not know `{name}`"
            );
        }
    }
}

#[test]
fn the_dashboard_can_be_read() {
    let dashboard: Value = serde_json::from_str(&read(&chart().join("files/dashboard.json"))).unwrap();
    let panels = dashboard["panels"].as_array().unwrap();
    let ids: BTreeSet<_> = panels.iter().map(|panel| panel["id"].as_u64().unwrap()).collect();
    assert_eq!(ids.len(), panels.len(), "two panels have one id");
    for panel in panels {
        let title = panel["title"].as_str().unwrap();
        let targets = panel["targets"].as_array().unwrap();
        assert!(!title.is_empty() && !targets.is_empty(), "{panel}");
        for target in targets {
            let expression = target["expr"].as_str().unwrap();
            let count = |c: char| expression.chars().filter(|it| *it == c).count();
            assert!(count('(') == count(')') && count('{') == count('}'), "{title}: {expression}");
        }
    }
}

#[test]
fn values_are_those_of_the_readme_and_the_schema() {
    let values: Value = serde_saphyr::from_str(&read(&chart().join("values.yaml"))).unwrap();
    let schema: Value = serde_json::from_str(&read(&chart().join("values.schema.json"))).unwrap();
    let readme = read(&chart().join("README.md"));
    let listed: BTreeSet<_> = readme
        .lines()
        .filter_map(|line| line.strip_prefix("| `")?.split('`').next())
        .map(str::to_owned)
        .collect();
    let mut leaves = Vec::new();
    leaves_of(&values, "", &mut leaves);
    for leaf in &leaves {
        let is_listed = ancestors(leaf).any(|path| listed.contains(path));
        assert!(is_listed, "README.md of the chart does not list `{leaf}`");
        assert!(is_in_schema(&schema, leaf), "values.schema.json does not know `{leaf}`");
    }
    for path in &listed {
        let pointer = format!("/{}", path.replace('.', "/"));
        assert!(
            values.pointer(&pointer).is_some(),
            "README.md of the chart lists `{path}`, which is no value"
        );
    }
}

#[test]
fn the_chart_is_of_this_version() {
    let chart: Value = serde_saphyr::from_str(&read(&chart().join("Chart.yaml"))).unwrap();
    assert_eq!(chart["version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(chart["appVersion"], env!("CARGO_PKG_VERSION"));
}

#[test]
fn a_difference_is_shown_where_it_begins() {
    assert_eq!(first_difference("a\nb\n", "a\nb\n"), None);
    let told = first_difference("a\nb\n", "a\nc\n").unwrap();
    assert_eq!(told, r#"line 2 is "b", and should be "c""#);
    let told = first_difference("a\n", "a\nb\n").unwrap();
    assert_eq!(told, r#"line 2 is its end, and should be "b""#);
    assert!(first_difference("a", "a\n").is_some());
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Paths to what holds no further values. Keys with dots in them are the user's own, not the chart's.
fn leaves_of(value: &Value, path: &str, leaves: &mut Vec<String>) {
    match value.as_object().filter(|map| !map.is_empty() && !map.keys().any(|key| key.contains('.'))) {
        Some(map) => {
            for (key, value) in map {
                let separator = if path.is_empty() { "" } else { "." };
                leaves_of(value, &format!("{path}{separator}{key}"), leaves);
            }
        }
        None => leaves.push(path.to_owned()),
    }
}

fn ancestors(path: &str) -> impl Iterator<Item = &str> {
    std::iter::successors(Some(path), |path| path.rsplit_once('.').map(|(parent, _)| parent))
}

/// True if the schema names the path, or lets in anything on the way to it.
fn is_in_schema(schema: &Value, path: &str) -> bool {
    let mut schema = schema;
    for key in path.split('.') {
        match schema.pointer(&format!("/properties/{key}")) {
            Some(inner) => schema = inner,
            None => return schema["additionalProperties"] != Value::Bool(false),
        }
    }
    true
}
