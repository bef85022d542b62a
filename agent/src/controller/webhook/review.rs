//! One object, read as agents read it.

use k8s_openapi::api::core::v1::{Namespace, Pod};
use kube::core::DynamicObject;
use kube::core::admission::AdmissionRequest;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::config::document::MeshLabel;
use crate::config::{Document, FieldPath, Problem, Segment};

/// What is wrong with the object that is written, in words for its author.
pub(super) fn warnings(request: &AdmissionRequest<DynamicObject>) -> Vec<String> {
    let Some(object) = request.object.as_ref().and_then(|object| serde_json::to_value(object).ok()) else {
        return Vec::new();
    };
    let problems = problems(&request.kind.kind, object);
    problems.into_iter().map(|problem| format!("undermesh: {problem}")).collect()
}

fn problems(kind: &str, object: Value) -> Vec<Problem> {
    match kind {
        "Namespace" => {
            read(object, |namespace: Namespace, problems| Document::namespace(&namespace, problems).map(drop))
        }
        "Pod" => read(object, pod),
        "CronJob" => template(&object, &["spec", "jobTemplate", "spec", "template"]),
        _ => template(&object, &["spec", "template"]),
    }
}

/// What others make pods from; they would be warned, and nobody would see it.
fn template(object: &Value, path: &[&str]) -> Vec<Problem> {
    let Some(template) = path.iter().try_fold(object, |value, key| value.get(key)) else {
        return Vec::new();
    };
    let mut pod = template.clone();
    for key in ["name", "namespace"] {
        pod["metadata"][key] = object["metadata"][key].clone();
    }
    let prefix = path.iter().map(|key| Segment::Key((*key).to_owned()));
    let within = |mut problem: Problem| {
        if !problem.field.0.is_empty() {
            problem.field = FieldPath(prefix.clone().chain(problem.field.0).collect());
        }
        problem
    };
    self::read(pod, self::pod).into_iter().map(within).collect()
}

fn pod(pod: Pod, problems: &mut Vec<Problem>) -> Result<(), Problem> {
    if let Document::Pod(pod) = Document::pod(&pod, problems)?
        && pod.marks.mesh == Some(MeshLabel::Enabled)
        && let Some(obstacle) = pod.obstacle
    {
        let field = FieldPath::new(["metadata", "labels", "undermesh.io/mesh"]);
        problems.push(Problem::new(field, obstacle));
    }
    Ok(())
}

/// What is no object of its kind is the API server's to refuse.
fn read<K: DeserializeOwned>(
    mut object: Value,
    read: impl FnOnce(K, &mut Vec<Problem>) -> Result<(), Problem>,
) -> Vec<Problem> {
    // It has no name yet if the API server is to make one.
    if object["metadata"]["name"].is_null() {
        object["metadata"]["name"] = json!("new");
    }
    let Ok(object) = serde_json::from_value(object) else { return Vec::new() };
    let mut problems = Vec::new();
    let outcome = read(object, &mut problems);
    problems.extend(outcome.err());
    problems
}

#[cfg(test)]
mod tests {
    use expect_test::{Expect, expect};

    use super::*;

    fn check(kind: &str, object: Value, expected: &Expect) {
        let request = json!({
            "uid": "1", "operation": "CREATE", "name": "", "userInfo": {}, "object": object,
            "kind": { "group": "", "version": "v1", "kind": kind },
            "resource": { "group": "", "version": "v1", "resource": "any" },
        });
        expected.assert_eq(&warnings(&serde_json::from_value(request).unwrap()).join("\n"));
    }

    fn marked(mesh: &str, mtls: &str) -> Value {
        json!({ "labels": { "undermesh.io/mesh": mesh }, "annotations": { "undermesh.io/mtls": mtls } })
    }

    #[test]
    fn whoever_writes_an_object_hears_what_agents_would_say() {
        let named = |mut metadata: Value| {
            metadata["name"] = "web".into();
            metadata["namespace"] = "shop".into();
            metadata
        };
        let types = |kind: &str, metadata: Value, spec: Value| json!({ "apiVersion": "v1", "kind": kind, "metadata": metadata, "spec": spec });
        check("Namespace", types("Namespace", named(marked("enabled", "strict")), json!({})), &expect![[""]]);
        check(
            "Namespace",
            types("Namespace", named(marked("on", "Strict")), json!({})),
            &expect![[r#"
                undermesh: metadata.labels[undermesh.io/mesh]: expected enabled or disabled, found "on"
                undermesh: metadata.annotations[undermesh.io/mtls]: expected permissive or strict (strict is in force until then), found "Strict""#]],
        );
        let containers = json!({ "hostNetwork": true, "containers": [] });
        let mut made = marked("enabled", "strict");
        made["generateName"] = "web-".into();
        made["namespace"] = "shop".into();
        check(
            "Pod",
            types("Pod", made, containers.clone()),
            &expect![[r#"
            undermesh: metadata.labels[undermesh.io/mesh]: the pod uses the host's network and has no network namespace of its own to capture in"#]],
        );
        let template = json!({ "metadata": marked("yes", "strict"), "spec": containers });
        check(
            "Deployment",
            types("Deployment", named(json!({})), json!({ "template": template })),
            &expect![[r#"
            undermesh: spec.template.metadata.labels[undermesh.io/mesh]: expected enabled or disabled, found "yes""#]],
        );
        let cron = json!({ "jobTemplate": { "spec": { "template": template } } });
        check(
            "CronJob",
            types("CronJob", named(json!({})), cron),
            &expect![[r#"
            undermesh: spec.jobTemplate.spec.template.metadata.labels[undermesh.io/mesh]: expected enabled or disabled, found "yes""#]],
        );
        // What is not of its kind.
        check("Pod", types("Pod", named(json!({})), json!({ "containers": "many" })), &expect![[""]]);
        check("Deployment", types("Deployment", named(json!({})), json!({})), &expect![[""]]);
    }
}
