//! One object, read as agents read it.

use k8s_openapi::api::core::v1::{Namespace, Pod};
use kube::core::DynamicObject;
use kube::core::admission::AdmissionRequest;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::config::document::MeshLabel;
use crate::config::{Custom, Document, FieldPath, Kind, Problem, Segment};

/// What is to be said of an object that is written, in words for its author.
#[derive(Debug, PartialEq)]
pub(super) enum Review {
    Clean,
    Warn(Vec<String>),
    Refuse(String),
}

pub(super) fn judge(request: &AdmissionRequest<DynamicObject>) -> Review {
    let value = |object: &Option<DynamicObject>| serde_json::to_value(object.as_ref()?).ok();
    let Some(object) = value(&request.object) else { return Review::Clean };
    let (group, kind) = (request.kind.group.as_str(), request.kind.kind.as_str());
    // What is not about the spec must go through whatever the spec says, so that an object of before can be labelled and deleted.
    let is_new = |object: &Value| value(&request.old_object).is_none_or(|old| old["spec"] != object["spec"]);
    let is_refusable = group == Kind::TrafficPolicy.group() && is_new(&object);
    let problems = problems(group, kind, object);
    match problems.is_empty() {
        true => Review::Clean,
        false if is_refusable => {
            Review::Refuse(problems.iter().map(Problem::to_string).collect::<Vec<_>>().join("; "))
        }
        false => Review::Warn(problems.iter().map(|problem| format!("undermesh: {problem}")).collect()),
    }
}

fn problems(group: &str, kind: &str, object: Value) -> Vec<Problem> {
    let is_it = |custom: &Custom| custom.kind.group() == group && custom.kind.as_str() == kind;
    if let Some(custom) = Custom::ALL.into_iter().find(is_it) {
        return read(object, |object: Value, problems| (custom.read)(&object, problems).map(drop));
    }
    match kind {
        // Of a later version of us.
        _ if group == Kind::TrafficPolicy.group() => Vec::new(),
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
        && let Some(obstacle) = &pod.obstacle
    {
        let field = FieldPath::new(["metadata", "labels", "undermesh.io/mesh"]);
        problems.push(Problem::new(field, obstacle.as_ref()));
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
        match judge(&serde_json::from_value(request).unwrap()) {
            Review::Clean => expected.assert_eq(""),
            Review::Warn(warnings) => expected.assert_eq(&warnings.join("\n")),
            Review::Refuse(why) => panic!("{kind} is refused: {why}"),
        }
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
        let dials = json!({ "annotations": { "undermesh.io/dialled-pods": "services" } });
        check(
            "Namespace",
            types("Namespace", named(dials), json!({})),
            &expect![[r#"
            undermesh: metadata.annotations[undermesh.io/dialled-pods]: expected pod or service (pod is in force until then), found "services""#]],
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

    #[test]
    fn what_is_ours_and_cannot_be_read_is_refused_unless_it_was_so_before() {
        let policy = |attempts: i64| {
            json!({
                "apiVersion": "undermesh.io/v1alpha1", "kind": "TrafficPolicy", "metadata": { "name": "a", "namespace": "shop" },
                "spec": {
                    "targetRefs": [{ "group": "", "kind": "Service", "name": "web" }],
                    "retry": { "attempts": attempts }, "timeouts": { "request": "1s", "perTry": "2s" },
                },
            })
        };
        let review = |old: Option<Value>, new: Value| {
            let request = json!({
                "uid": "1", "operation": if old.is_some() { "UPDATE" } else { "CREATE" }, "name": "a", "userInfo": {},
                "object": new, "oldObject": old,
                "kind": { "group": "undermesh.io", "version": "v1alpha1", "kind": "TrafficPolicy" },
                "resource": { "group": "undermesh.io", "version": "v1alpha1", "resource": "trafficpolicies" },
            });
            judge(&serde_json::from_value(request).unwrap())
        };
        let slow = "spec.timeouts.perTry: expected no longer than the timeout of the whole request";
        let both = format!("spec.retry.attempts: expected 0 to 100, found 101; {slow}");
        assert_eq!(review(None, policy(101)), Review::Refuse(both));
        assert_eq!(review(Some(policy(101)), policy(1)), Review::Refuse(slow.into()));
        let mut labelled = policy(1);
        labelled["metadata"]["labels"] = json!({ "a": "b" });
        assert_eq!(
            review(Some(policy(1)), labelled.clone()),
            Review::Warn(vec![format!("undermesh: {slow}")])
        );
        labelled["spec"]["timeouts"] = json!({});
        assert_eq!(review(Some(policy(1)), labelled), Review::Clean);
    }

    #[test]
    fn whoever_writes_a_route_hears_which_fields_are_not_supported() {
        let route = |filter: Value| {
            json!({
                "apiVersion": "gateway.networking.k8s.io/v1", "kind": "HTTPRoute",
                "metadata": { "name": "web", "namespace": "shop" },
                "spec": {
                    "parentRefs": [{ "group": "", "kind": "Service", "name": "web" }],
                    "rules": [{ "filters": [filter], "backendRefs": [{ "name": "web", "port": 80 }] }],
                },
            })
        };
        let review = |object: Value| {
            let request = json!({
                "uid": "1", "operation": "CREATE", "name": "web", "userInfo": {}, "object": object,
                "kind": { "group": "gateway.networking.k8s.io", "version": "v1", "kind": "HTTPRoute" },
                "resource": { "group": "gateway.networking.k8s.io", "version": "v1", "resource": "httproutes" },
            });
            judge(&serde_json::from_value(request).unwrap())
        };
        let set = json!({ "set": [{ "name": "a", "value": "b" }] });
        let known = json!({ "type": "RequestHeaderModifier", "requestHeaderModifier": set });
        assert_eq!(review(route(known)), Review::Clean);
        let other = json!({ "group": "example.com", "kind": "Filter", "name": "any" });
        let Review::Warn(said) = review(route(json!({ "type": "ExtensionRef", "extensionRef": other })))
        else {
            panic!("nothing is said of a filter that is not supported");
        };
        expect![[r#"undermesh: spec.rules[0].filters[0].type: expected one of RequestHeaderModifier, ResponseHeaderModifier, RequestMirror, RequestRedirect, URLRewrite, CORS; found "ExtensionRef", which is not supported here"#]].assert_eq(&said.join("\n"));
    }

    #[test]
    fn every_kind_of_ours_is_looked_at() {
        let review = |kind: &str, spec: Value| {
            let object = json!({ "apiVersion": "undermesh.io/v1alpha1", "kind": kind, "metadata": { "name": "a" }, "spec": spec });
            let request = json!({
                "uid": "1", "operation": "CREATE", "name": "a", "userInfo": {}, "object": object,
                "kind": { "group": "undermesh.io", "version": "v1alpha1", "kind": kind },
                "resource": { "group": "undermesh.io", "version": "v1alpha1", "resource": "any" },
            });
            judge(&serde_json::from_value(request).unwrap())
        };
        let denies = review("AuthorizationPolicy", json!({ "rules": [{ "form": [] }] }));
        let unknown =
            "spec.rules[0].form: there is no such field, or this version of Undermesh does not know it";
        assert_eq!(denies, Review::Refuse(unknown.into()));
        assert_eq!(review("AuthorizationPolicy", json!({})), Review::Clean);
        let mode = "spec.mtls.mode: expected Strict or Permissive, found \"Off\"";
        assert_eq!(review("MeshPolicy", json!({ "mtls": { "mode": "Off" } })), Review::Refuse(mode.into()));
        assert_eq!(review("OfALaterVersion", json!({ "a": 1 })), Review::Clean);
    }
}
