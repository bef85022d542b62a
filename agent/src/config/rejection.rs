//! What is wrong with a document, where, and what was expected instead.

use std::fmt;
use std::path::{Path, PathBuf};

use serde::{Serialize, Serializer};

use super::Key;

/// A document, or a field of one, that is not in force as it was written. Printed as
/// `file.yaml:12:5: Pod shop/web: spec.containers[0].ports: expected ...`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Rejection {
    /// The file, under the directory as the user named it; empty where the API server is the source.
    #[serde(serialize_with = "as_text")]
    pub file: PathBuf,
    /// Where in the file; none where the file as a whole is meant.
    #[serde(flatten)]
    pub position: Option<Position>,
    /// Which object, where that can be told.
    pub object: Option<Key>,
    /// Which field of the object; empty where the object as a whole is meant.
    pub field: FieldPath,
    /// What is wrong and what was expected.
    pub message: String,
}

/// A place in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
pub struct Position {
    /// Counted from 1.
    pub line: u32,
    /// In characters, counted from 1.
    pub column: u32,
}

/// What is wrong with one field, before it is known where the document stands. Printed as `spec.ports[0].port: expected ...`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The field; empty for the whole document.
    pub field: FieldPath,
    /// What is wrong and what was expected.
    pub message: String,
}

/// The way from a document's root to one of its fields, printed as Kubernetes prints it:
/// `metadata.labels[undermesh.io/mesh]`, `spec.ports[0].port`.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct FieldPath(pub Vec<Segment>);

/// One step of a [`FieldPath`].
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Segment {
    /// The value of a map's key.
    Key(String),
    /// An element of a list, counted from 0.
    Index(usize),
}

impl Rejection {
    /// Says of an object of the API server what is wrong with it.
    pub fn of_object(object: Key, problem: Problem) -> Self {
        let Problem { field, message } = problem;
        Self { file: PathBuf::new(), position: None, object: Some(object), field, message }
    }

    /// Says of a whole file what is wrong with it.
    pub fn of_file(file: &Path, message: impl Into<String>) -> Self {
        Self {
            file: file.to_owned(),
            position: None,
            object: None,
            field: FieldPath::default(),
            message: message.into(),
        }
    }
}

impl fmt::Display for Rejection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let has_file = !self.file.as_os_str().is_empty();
        if has_file {
            write!(f, "{}", self.file.display())?;
        }
        if let Some(Position { line, column }) = self.position {
            write!(f, ":{line}:{column}")?;
        }
        if let Some(object) = &self.object {
            write!(f, "{}{object}", if has_file { ": " } else { "" })?;
        }
        if !self.field.0.is_empty() {
            write!(f, ": {}", self.field)?;
        }
        write!(f, ": {}", self.message)
    }
}

impl Problem {
    /// Says of a field what is wrong with it.
    pub fn new(field: FieldPath, message: impl Into<String>) -> Self {
        Self { field, message: message.into() }
    }

    /// Says of a field that it is not of the type that it should be: what was expected goes first, as everywhere.
    pub fn of_type(field: &FieldPath, error: &serde_json::Error) -> Self {
        let message = error.to_string();
        // "invalid type: string "x", expected i32".
        let found_expected = ["invalid type: ", "invalid value: "]
            .iter()
            .find_map(|prefix| message.strip_prefix(prefix)?.rsplit_once(", expected "));
        let message = match found_expected {
            Some((found, expected)) => format!("expected {}, found {found}", plain(expected)),
            None => message,
        };
        Self::new(field.clone(), message)
    }
}

/// What serde calls a type, as the user would.
fn plain(expected: &str) -> &str {
    match expected {
        "i32" | "i64" => "a whole number",
        "bool" => "true or false",
        "Time" => "a time such as 2026-01-31T12:00:00Z",
        other if other.starts_with("struct ") => "a map",
        other => other,
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.field.0.is_empty() {
            write!(f, "{}: ", self.field)?;
        }
        f.write_str(&self.message)
    }
}

impl FieldPath {
    /// A field reached by these keys.
    pub fn new<const N: usize>(keys: [&str; N]) -> Self {
        Self(keys.iter().map(|key| Segment::Key((*key).to_owned())).collect())
    }

    /// The element of this list.
    pub fn index(mut self, index: usize) -> Self {
        self.0.push(Segment::Index(index));
        self
    }

    /// The value under this key.
    pub fn key(mut self, key: &str) -> Self {
        self.0.push(Segment::Key(key.to_owned()));
        self
    }
}

impl From<&serde_path_to_error::Path> for FieldPath {
    fn from(path: &serde_path_to_error::Path) -> Self {
        use serde_path_to_error::Segment as Step;
        Self(
            path.iter()
                .filter_map(|step| match step {
                    Step::Seq { index } => Some(Segment::Index(*index)),
                    Step::Map { key } | Step::Enum { variant: key } => Some(Segment::Key(key.clone())),
                    Step::Unknown => None,
                })
                .collect(),
        )
    }
}

impl fmt::Display for FieldPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (depth, segment) in self.0.iter().enumerate() {
            match segment {
                Segment::Index(index) => write!(f, "[{index}]")?,
                Segment::Key(key) if key.contains(['.', '/', '[']) => write!(f, "[{key}]")?,
                Segment::Key(key) if depth == 0 => write!(f, "{key}")?,
                Segment::Key(key) => write!(f, ".{key}")?,
            }
        }
        Ok(())
    }
}

impl Serialize for FieldPath {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// Paths may hold bytes that JSON cannot.
fn as_text<S: Serializer>(path: &Path, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&path.display())
}
