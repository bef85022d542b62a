//! `undermesh check DIR`: what is wrong with a directory of manifests, without an agent.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, ValueEnum};
use serde::Serialize;

use crate::config::Rejection;
use crate::discovery::directory::{self, Checked};
use crate::model::NodeInfo;

/// Reads a directory of manifests as an agent would and says what is wrong with it.
#[derive(Args, Clone, Debug)]
pub struct CheckArgs {
    /// The directory of Kubernetes manifests.
    pub dir: PathBuf,
    /// How to print what was found.
    #[arg(long, short, value_enum, default_value_t)]
    pub output: Output,
}

/// How to print what was found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// A line per problem and one that sums up.
    #[default]
    Text,
    /// One JSON object.
    Json,
}

/// Exits with 0 if all is well, 1 if there are problems and 2 if the directory cannot be read.
pub fn run(args: &CheckArgs) -> ExitCode {
    // Which node it is seen from does not matter for what is wrong with it.
    let node = NodeInfo { name: "".into(), zone: None };
    let checked = match directory::check(&args.dir, node) {
        Ok(checked) => checked,
        Err(error) => {
            eprintln!("error: {error}");
            return ExitCode::from(2);
        }
    };
    match args.output {
        Output::Text => print!("{}", text(&checked)),
        Output::Json => println!("{}", json(&checked)),
    }
    if checked.rejections.is_empty() { ExitCode::SUCCESS } else { ExitCode::from(1) }
}

fn text(checked: &Checked) -> String {
    let Checked { files, objects, rejections } = checked;
    let lines: String = rejections.iter().map(|rejection| format!("{rejection}\n")).collect();
    format!("{lines}checked {files} files, {objects} objects: {} problems\n", rejections.len())
}

fn json(checked: &Checked) -> String {
    #[derive(Serialize)]
    struct Report<'a> {
        files: usize,
        objects: usize,
        problems: &'a [Rejection],
    }
    let Checked { files, objects, rejections } = checked;
    let report = Report { files: *files, objects: *objects, problems: rejections };
    // Paths that are not UTF-8 are the only thing that JSON cannot hold.
    serde_json::to_string_pretty(&report).unwrap_or_else(|error| format!("{{\"error\": \"{error}\"}}"))
}

#[cfg(test)]
mod tests {
    use expect_test::expect;

    use super::*;

    #[test]
    fn problems_are_listed_and_counted() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
        write(
            "a.yaml",
            "{apiVersion: v1, kind: Pod, metadata: {name: a, labels: {undermesh.io/mesh: maybe}}}",
        );
        write("b.yaml", "{apiVersion: v1, kind: Pod, metadata: {name: b}}");
        write("README.md", "not a manifest");
        let args = CheckArgs { dir: dir.path().to_owned(), output: Output::Text };
        assert_eq!(format!("{:?}", run(&args)), format!("{:?}", ExitCode::from(1)));
        let node = NodeInfo { name: "".into(), zone: None };
        let report = text(&directory::check(dir.path(), node).unwrap());
        expect![[r#"
            ./a.yaml:1:77: Pod default/a: metadata.labels[undermesh.io/mesh]: expected enabled or disabled, found "maybe"
            checked 2 files, 2 objects: 1 problems
        "#]].assert_eq(&report.replace(&dir.path().display().to_string(), "."));

        std::fs::remove_file(dir.path().join("a.yaml")).unwrap();
        assert_eq!(format!("{:?}", run(&args)), format!("{:?}", ExitCode::SUCCESS));
        let missing = CheckArgs { dir: dir.path().join("missing"), ..args };
        assert_eq!(format!("{:?}", run(&missing)), format!("{:?}", ExitCode::from(2)));
    }
}
