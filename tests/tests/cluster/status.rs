//! What the status of the Gateway API's routes and policies says, in short. It knows no object itself.

use anyhow::{Result, ensure};
use serde_json::Value;
use undermesh_tests::cluster::Kube;
use undermesh_tests::lab::eventually;

use crate::installed::A_WHILE;

/// Waits until the status of what `kubectl get` names so says this of each parent or target, of its latest generation.
pub(crate) fn says(cluster: &Kube, object: &[&str], expected: &[&str]) -> Result<()> {
    eventually(A_WHILE, "its status says so", || {
        let object = cluster.get(object)?;
        let status = &object["status"];
        let entries =
            [&status["parents"], &status["ancestors"]].into_iter().filter_map(Value::as_array).flatten();
        let said: Vec<_> = entries.map(|entry| said(entry, &object["metadata"]["generation"])).collect();
        ensure!(said == expected, "{status}");
        Ok(())
    })
}

fn said(entry: &Value, generation: &Value) -> String {
    let conditions = entry["conditions"].as_array().into_iter().flatten();
    let conditions = conditions.map(|condition| {
        let get = |key: &str| condition[key].as_str().unwrap_or_default();
        match get("status") {
            _ if condition["observedGeneration"] != *generation => "of another generation".to_owned(),
            "True" => get("type").to_owned(),
            _ => format!("not {} for {}", get("type"), get("reason")),
        }
    });
    let of = ["parentRef", "ancestorRef"].into_iter().find_map(|of| entry[of]["name"].as_str());
    format!("{}: {}", of.unwrap_or_default(), conditions.collect::<Vec<_>>().join(", "))
}
