//! `--hold`: everything stays up, with commands to look around.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use anyhow::Result;
use undermesh_tests::lab::{ADMIN_ADDRESS, Lab, cgroup_root};

use super::LAB;
use super::shop::{Shop, shop_binary};
use crate::say;

/// Writes the script that enters a pod. It joins the pod's cgroup too: a process that only entered the namespace,
/// as `nsenter` and `ip netns exec` do, is not captured.
pub fn write_enter_script(lab: &Lab) -> Result<()> {
    let script = lab.dir().join("enter");
    let cgroup = cgroup_root()?.join(LAB);
    let text = format!(
        "#!/bin/sh\n\
         # enter POD [COMMAND...]: runs a command, or a shell, in a pod of the lab\n\
         pod=${{1:?which pod?}}; shift\n\
         cgroup=$(ls -d {}/*/pods/\"$pod\") || exit 1\n\
         echo $$ > \"$cgroup/cgroup.procs\" || exit 1\n\
         exec nsenter --net=/run/netns/{LAB}-\"$pod\" -- \"${{@:-sh}}\"\n",
        cgroup.display()
    );
    fs::write(&script, text)?;
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755))?;
    Ok(())
}

/// Prints the commands and waits; Ctrl-C sweeps.
pub fn until_interrupted(lab: &Lab, shop: &Shop) -> Result<()> {
    let dir = lab.dir().display();
    say::heading("Have a look around");
    let mesh = !shop.agents.is_empty();
    let mut hints = vec![
        ("a shell in a pod", format!("{dir}/enter web")),
        ("the page, from outside of the mesh", format!("{dir}/enter client curl {}/pears", shop.page())),
        ("the manifests; edit them", format!("ls {dir}/config")),
        ("the logs", format!("tail -f {dir}/log/*.log")),
    ];
    if mesh {
        let node = format!("ip netns exec {LAB}-node1");
        hints.extend([
            (
                "a Service, from a pod in the mesh",
                format!("{dir}/enter web curl http://10.96.0.10/stock/apples"),
            ),
            (
                "the canary's weights; edit them, and see who answers",
                format!("vi {dir}/config/shop-httproute-catalog.yaml"),
            ),
            (
                "who answers",
                format!("{dir}/enter client {} load --url {}", shop_binary().display(), shop.page()),
            ),
            ("metrics", format!("{node} curl {ADMIN_ADDRESS}/metrics")),
            ("the snapshot", format!("{node} curl {ADMIN_ADDRESS}/debug/config")),
            ("attached programs", format!("bpftool cgroup tree {}", cgroup_root()?.join(LAB).display())),
            ("maps", format!("ls -R {}", shop.nodes[0].pins().display())),
        ]);
    }
    for (what, command) in hints {
        println!("# {what}\n{command}\n");
    }
    println!("Ctrl-C ends the demo and sweeps it.");
    loop {
        std::thread::park();
    }
}
