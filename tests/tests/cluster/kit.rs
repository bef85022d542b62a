//! What the tests have in common: an image of a shell and small tools, and pods of it. It starts no cluster.

use std::path::Path;

use anyhow::Result;
use serde_json::{Value, json};
use undermesh_tests::cluster::Cluster;
use undermesh_tests::cluster::image::{Image, Layer};

/// The image's name.
pub(crate) const IMAGE: &str = "um.test/busybox:1";

/// Gives all nodes the image: Debian's static busybox, under the names of its tools.
pub(crate) fn import_image(cluster: &Cluster) -> Result<()> {
    let mut layer = Layer::default().file("/bin/busybox", 0o755, Path::new("/bin/busybox"))?;
    for tool in ["cat", "echo", "grep", "httpd", "ls", "mount", "nsenter", "readlink", "sh", "sleep", "wget"]
    {
        layer = layer.link(&format!("/bin/{tool}"), "busybox")?;
    }
    layer = layer.directory("/tmp", 0o1777)?.text("/www/index.html", 0o644, "a page\n")?;
    let tar = tempfile::NamedTempFile::new()?;
    Image::new(IMAGE).layer(layer).command(&["sh"]).write(tar.path())?;
    cluster.import(tar.path())
}

/// A pod on this node, which runs this script.
pub(crate) fn pod(name: &str, node: &str, script: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": { "name": name, "namespace": "default", "labels": { "app": name } },
        "spec": {
            "nodeName": node, "terminationGracePeriodSeconds": 5,
            "containers": [{ "name": "main", "image": IMAGE, "command": ["sh", "-c", script] }],
        },
    })
}
