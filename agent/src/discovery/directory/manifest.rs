//! The text of one manifest file: its documents, each read on its own so that none takes another one down.

mod decode;
mod locate;
mod split;

use std::path::Path;
use std::sync::{Arc, OnceLock};

use serde_json::Value;

use self::decode::{Header, Syntax};
use self::locate::Positions;
use crate::config::document::Kind;
use crate::config::{Document, FieldPath, Key, Position, Problem, Rejection};

/// One object of a file.
#[derive(Clone, Debug)]
pub(super) struct Object {
    /// Where it begins.
    pub(super) position: Position,
    /// Which object it is; none where the document is too broken to tell.
    pub(super) key: Option<Key>,
    /// What it says; none where it cannot be used.
    pub(super) document: Option<Document>,
    /// What is wrong with it.
    pub(super) rejections: Vec<Rejection>,
    /// Where its fields are, of kinds with which something may be wrong only because of others.
    pub(super) text: Option<Text>,
}

/// Where an object is written.
#[derive(Clone, Debug)]
pub(super) struct Text {
    document: Arc<Located>,
    /// From the document, which may be a list, to the object.
    path: FieldPath,
}

/// A document that is kept because somebody may yet ask where its fields are.
#[derive(Debug)]
struct Located {
    text: Box<str>,
    lines_before: u32,
    start: Position,
    positions: OnceLock<Positions>,
}

/// Reads the objects of a file, in their order. Kinds that the mesh does not know are passed over.
pub(super) fn read(file: &Path, bytes: &[u8]) -> Result<Vec<Object>, Box<Rejection>> {
    let text = std::str::from_utf8(bytes).map_err(|error| {
        let before = String::from_utf8_lossy(&bytes[..error.valid_up_to()]);
        let line = before.matches('\n').count() as u32 + 1;
        let column = before.rsplit('\n').next().unwrap_or_default().chars().count() as u32 + 1;
        Box::new(Rejection {
            position: Some(Position { line, column }),
            ..Rejection::of_file(file, "expected UTF-8 text; what it said before stays in force")
        })
    })?;
    let syntax = if file.extension().is_some_and(|it| it == "json") { Syntax::Json } else { Syntax::Yaml };
    let mut objects = Vec::new();
    for chunk in split::documents(text.strip_prefix('\u{feff}').unwrap_or(text), syntax) {
        let mut reader =
            Reader { file, syntax, chunk, positions: None, located: None, objects: &mut objects };
        reader.read();
    }
    Ok(objects)
}

/// Reads one document: an object or a List of them.
struct Reader<'a> {
    file: &'a Path,
    syntax: Syntax,
    chunk: split::Chunk<'a>,
    /// Worked out at the first problem.
    positions: Option<Positions>,
    /// The document as it is kept, if any object asks for that.
    located: Option<Arc<Located>>,
    objects: &'a mut Vec<Object>,
}

impl Reader<'_> {
    fn read(&mut self) {
        match decode::value(self.chunk.text, self.syntax) {
            Ok(Value::Null) => {}
            Ok(value) => self.read_value(&value, None, &FieldPath::default()),
            Err(error) => {
                let key = decode::salvage(self.chunk.text, self.syntax, error.position.line);
                let position = error.position.after(self.chunk.lines_before);
                self.refuse(key, position, FieldPath::default(), error.message);
            }
        }
    }

    /// `implied` is the kind of a typed list's items, which do not name it.
    fn read_value(&mut self, value: &Value, implied: Option<Kind>, path: &FieldPath) {
        let header = match Header::of(value, implied) {
            Ok(header) => header,
            Err(problem) => {
                let problem = Problem { field: join(path, &problem.field), ..problem };
                let position = self.locate(&problem.field);
                return self.refuse(None, position, problem.field, problem.message);
            }
        };
        let kind = match header {
            Header::Object(kind) => kind,
            Header::List(kind) => {
                let items = value.get("items").and_then(Value::as_array);
                for (index, item) in items.into_iter().flatten().enumerate() {
                    self.read_value(item, kind, &join(path, &FieldPath::new(["items"]).index(index)));
                }
                return;
            }
            Header::Other(kind) => {
                tracing::debug!(file = %self.file.display(), kind, "passed over a kind that the mesh does not read");
                return;
            }
        };
        let mut problems = Vec::new();
        let (document, key) = match decode::document(kind, value, &mut problems) {
            Ok(document) => (Some(document.clone()), Some(document.key())),
            Err(problem) => {
                let key = decode::key(kind, value);
                let document = key.as_ref().and_then(|key| Document::unreadable(key, &problem.to_string()));
                problems.push(problem);
                (document, key)
            }
        };
        let position = self.locate(path);
        let rejections = problems
            .into_iter()
            .map(|problem| {
                let field = join(path, &problem.field);
                Rejection {
                    file: self.file.to_owned(),
                    position: Some(self.locate(&field)),
                    object: key.clone(),
                    field: problem.field,
                    message: problem.message,
                }
            })
            .collect();
        let can_be_wrong_in_the_world = |document: &Document| {
            matches!(
                document,
                Document::Route(_)
                    | Document::Policy(_)
                    | Document::AuthorizationPolicy(_)
                    | Document::MeshPolicy(_)
            )
        };
        let text = document
            .as_ref()
            .is_some_and(can_be_wrong_in_the_world)
            .then(|| Text { document: self.keep(), path: path.clone() });
        self.objects.push(Object { position, key, document, rejections, text });
    }

    fn refuse(&mut self, key: Option<Key>, position: Position, field: FieldPath, message: String) {
        let rejection = Rejection {
            file: self.file.to_owned(),
            position: Some(position),
            object: key.clone(),
            field,
            message,
        };
        let position = self.chunk.start();
        let document = key.as_ref().and_then(|key| Document::unreadable(key, &rejection.message));
        let rejections = vec![rejection];
        self.objects.push(Object { position, key, document, rejections, text: None });
    }

    fn keep(&mut self) -> Arc<Located> {
        let chunk = &self.chunk;
        let located = self.located.get_or_insert_with(|| {
            Arc::new(Located {
                text: chunk.text.into(),
                lines_before: chunk.lines_before,
                start: chunk.start(),
                positions: OnceLock::new(),
            })
        });
        located.clone()
    }

    /// Where the field stands, or what is nearest to it if it is missing.
    fn locate(&mut self, path: &FieldPath) -> Position {
        if path.0.is_empty() {
            return self.chunk.start();
        }
        let chunk = &self.chunk;
        let positions = self.positions.get_or_insert_with(|| Positions::of(chunk.text));
        positions.of_field(path).map_or(chunk.start(), |position| position.after(chunk.lines_before))
    }
}

impl Text {
    /// Where the object's field stands, or what is nearest to it if it is missing.
    pub(super) fn locate(&self, field: &FieldPath) -> Position {
        let Located { text, lines_before, start, positions } = &*self.document;
        let path = join(&self.path, field);
        if path.0.is_empty() {
            return *start;
        }
        let positions = positions.get_or_init(|| Positions::of(text));
        positions.of_field(&path).map_or(*start, |position| position.after(*lines_before))
    }
}

impl Position {
    /// This place of a document, in the file that has so many lines before it.
    fn after(self, lines_before: u32) -> Self {
        Self { line: self.line + lines_before, column: self.column }
    }
}

fn join(path: &FieldPath, field: &FieldPath) -> FieldPath {
    FieldPath(path.0.iter().chain(&field.0).cloned().collect())
}

#[cfg(test)]
mod tests {
    use expect_test::{Expect, expect};

    use super::*;

    fn check(file: &str, text: &str, expected: Expect) {
        let mut lines = String::new();
        match read(Path::new(file), text.as_bytes()) {
            Ok(objects) => {
                for object in objects {
                    let key = object.key.map_or("?".to_owned(), |key| key.to_string());
                    let state = if object.document.is_some() { "" } else { " unusable" };
                    lines += &format!("{}: {key}{state}\n", object.position.line);
                    for rejection in object.rejections {
                        lines += &format!("  {rejection}\n");
                    }
                }
            }
            Err(rejection) => lines = format!("{rejection}\n"),
        }
        expected.assert_eq(&lines);
    }

    #[test]
    fn documents_are_read_one_by_one() {
        check(
            "shop.yaml",
            "\
%YAML 1.2
# The shop.
---
apiVersion: v1
kind: Namespace
metadata: {name: shop}
---
# Nothing here.
---
apiVersion: v1
kind: ConfigMap
metadata: {name: other}
data:
  text: |
    # not a document:
     --- neither is this
---
apiVersion: v1
kind: Pod
metadata:
  name: web
  namespace: shop
spec:
  containers:
  - name: web
    ports: 8080
--- # Nor does the next one take others down.
apiVersion: v1
kind: Pod
metadata:
  name: broken
  namespace: shop
spec:
  containers: [
---
apiVersion: v1
kind: Pod
metadata: {name: fine}
...
",
            expect![[r#"
                4: Namespace shop
                10: ConfigMap default/other
                18: Pod shop/web unusable
                  shop.yaml:26:12: Pod shop/web: spec.containers[0].ports: expected a sequence, found integer `8080`
                28: Pod shop/broken unusable
                  shop.yaml:34:15: Pod shop/broken: not valid YAML: unclosed bracket '['
                36: Pod default/fine
            "#]],
        );
    }

    #[test]
    fn a_bad_annotation_is_found_where_it_is() {
        check(
            "pod.yaml",
            "\
apiVersion: v1
kind: Pod
metadata:
  name: web
  annotations:
    undermesh.io/trust-domain: spiffe://b.test
",
            expect![[r#"
                1: Pod default/web
                  pod.yaml:6:32: Pod default/web: metadata.annotations[undermesh.io/trust-domain]: expected a trust domain (the mesh's own is in force until then), found "spiffe://b.test": the trust domain has a character other than a-z, 0-9, '.', '-' and '_'
            "#]],
        );
    }

    #[test]
    fn lists_and_typed_lists() {
        check(
            "list.yaml",
            "\
apiVersion: v1
kind: List
items:
- apiVersion: v1
  kind: Namespace
  metadata: {name: shop, labels: {undermesh.io/mesh: true}}
- apiVersion: v1
  kind: Service
  metadata: {name: [web]}
- apiVersion: v1
  kind: Service
  metadata: {name: web}
  spec:
    clusterIP: 10.0.0.300
    trafficDistribution: Near
    ports:
    - {name: http, port: 0}
    - {name: dns, port: 53, protocol: UDP}
- kind: Pod
---
kind: PodList
apiVersion: v1
items:
- metadata: {name: a}
- metadata: {generateName: b-}
",
            expect![[r#"
                4: Namespace shop unusable
                  list.yaml:6:54: Namespace shop: metadata.labels[undermesh.io/mesh]: expected a string, found boolean `true`
                7: ? unusable
                  list.yaml:9:20: metadata.name: expected a string, found sequence
                10: Service default/web
                  list.yaml:14:16: Service default/web: spec.clusterIP: expected an IP address, found "10.0.0.300"
                  list.yaml:17:26: Service default/web: spec.ports[0].port: expected a port from 1 to 65535, found 0
                  list.yaml:15:26: Service default/web: spec.trafficDistribution: expected PreferClose, PreferSameZone or PreferSameNode, found "Near"
                1: ? unusable
                  list.yaml:19:3: items[3].apiVersion: expected a version such as v1
                24: Pod default/a
                25: ? unusable
                  list.yaml:25:13: metadata.name: expected the object's name
            "#]],
        );
    }

    #[test]
    fn what_is_not_an_object() {
        for (text, expected) in [
            ("", expect![""]),
            ("# only a comment\n", expect![""]),
            (
                "just text",
                expect![[r#"
                1: ? unusable
                  a.yaml:1:1: expected a Kubernetes object, found a text
            "#]],
            ),
            (
                "- a\n- b\n",
                expect![[r#"
                1: ? unusable
                  a.yaml:1:1: expected a Kubernetes object, found a list
            "#]],
            ),
            (
                "kind: Pod\n",
                expect![[r#"
                1: ? unusable
                  a.yaml:1:1: apiVersion: expected a version such as v1
            "#]],
            ),
            (
                "apiVersion: v1\n",
                expect![[r#"
                1: ? unusable
                  a.yaml:1:1: kind: expected a kind such as Pod
            "#]],
            ),
            (
                "apiVersion: v2\nkind: Pod\nmetadata: {name: a}\n",
                expect![[r#"
                    1: Pod default/a unusable
                      a.yaml:1:13: Pod default/a: apiVersion: expected v1, found "v2"
                "#]],
            ),
            (
                "a: 1\na: 2\n",
                expect![[r#"
                    1: ? unusable
                      a.yaml:2:1: not valid YAML: duplicate mapping key: a
                "#]],
            ),
            (
                "a: *nowhere\n",
                expect![[r#"
                1: ? unusable
                  a.yaml:1:4: not valid YAML: alias references unknown anchor
            "#]],
            ),
            ("apiVersion: serving.knative.dev/v1\nkind: Service\n", expect![""]),
        ] {
            check("a.yaml", text, expected);
        }
    }

    #[test]
    fn json() {
        check(
            "a.json",
            r#"{"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"}, "status": {"podIPs": [{"ip": "10.1"}]}}
{
	"apiVersion": "v1", "kind": "Pod",
	"metadata": {"name": "b", "creationTimestamp": "yesterday"}
}
{"apiVersion": "v1", "kind": }"#,
            expect![[r#"
                1: Pod default/a
                  a.json:1:93: Pod default/a: status.podIPs[0].ip: expected an IP address, found "10.1"
                2: Pod default/b unusable
                  a.json:4:49: Pod default/b: metadata.creationTimestamp: failed to parse four digit integer as year: invalid digit, expected 0-9 but got y
                6: ? unusable
                  a.json:6:30: not valid JSON: expected value
            "#]],
        );
    }
}
