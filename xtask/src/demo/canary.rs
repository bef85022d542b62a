//! A new version gets some of the requests, then more: by editing one file.

use std::time::Duration;

use anyhow::Result;
use serde_json::json;
use undermesh_tests::lab::{Lab, Manifest};

use super::shop::{NAMESPACE, Shop};
use super::show;
use crate::say;

/// Agents take up a changed file at once; this is more than they need.
const IN_FORCE: Duration = Duration::from_millis(500);

/// Shifts requests from the first catalog to the second, and shows the shares.
pub fn play(lab: &Lab, shop: &Shop) -> Result<()> {
    say::heading("A canary: 5 % of the requests for the new catalog, then half of them");
    for weights in [[95, 5], [50, 50]] {
        let route = route(weights);
        lab.apply(&route)?;
        let file = lab.config_dir().join(route.file_name());
        say::shown(&format!("cat {}", file.display()), &route.to_yaml()?);
        std::thread::sleep(IN_FORCE);
        show::load(shop, 400)?;
    }
    Ok(())
}

fn route([first, second]: [u32; 2]) -> Manifest {
    let backend = |name, weight| json!({ "name": name, "port": 80, "weight": weight });
    let spec = json!({
        "parentRefs": [{ "group": "", "kind": "Service", "name": "catalog" }],
        "rules": [{ "backendRefs": [backend("catalog-v1", first), backend("catalog-v2", second)] }],
    });
    Manifest::new("gateway.networking.k8s.io/v1", "HTTPRoute", Some(NAMESPACE), "catalog").with("spec", spec)
}
