//! What the tests have in common: a cluster of their own, an image of a shell and small tools, and pods of it. It tests
//! nothing but that a cluster leaves nothing.

use std::path::Path;
use std::time::Instant;

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use undermesh_tests::cluster::image::{Image, Layer};
use undermesh_tests::cluster::{Cluster, Tools};
use undermesh_tests::lab::leftovers;

/// Plays on a cluster of its own. Where that fails, its logs are kept; afterwards nothing else of it is there.
pub(crate) fn on_cluster(
    name: &str,
    nodes: usize,
    play: impl FnOnce(&mut Cluster) -> Result<()>,
) -> Result<()> {
    let begun = Instant::now();
    let mut cluster = Cluster::start(name, nodes, Tools::of_environment()?)?;
    eprintln!("{name}: all nodes are ready after {:.1} s", begun.elapsed().as_secs_f32());
    let played = play(&mut cluster);
    if played.is_err() {
        let kept = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
        cluster.keep_logs(&kept)?;
        eprintln!("the logs are in {}", kept.display());
    }
    drop(cluster);
    let left = leftovers(name)?;
    played?;
    ensure!(left.is_empty(), "left of the cluster: {left:?}");
    Ok(())
}

/// The image's name.
pub(crate) const IMAGE: &str = "um.test/busybox:1";

/// Gives all nodes the image: Debian's static busybox, under the names of its tools.
pub(crate) fn import_image(cluster: &Cluster) -> Result<()> {
    let mut layer = Layer::default().file("/bin/busybox", 0o755, Path::new("/bin/busybox"))?;
    for tool in ["cat", "grep", "httpd", "ls", "mount", "nsenter", "nslookup", "sh", "sleep", "wget"] {
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
