//! What the kubelet calls the cgroups of pods, with both of its drivers.

use crate::model::WorkloadUid;

/// The uid of the pod whose directory is called so: `pod<uid>` with the driver cgroupfs, and with systemd
/// `kubepods[-burstable|-besteffort]-pod<uid>.slice`, the dashes of the uid written as underscores, after whatever prefix the
/// kubelet's own slice has (kind: `kubelet-kubepods-...`). Static pods have a hash instead of a uid, and are not meant.
pub(super) fn pod(directory: &str) -> Option<WorkloadUid> {
    let uid = match directory.strip_suffix(".slice") {
        Some(slice) => slice.rsplit_once("-pod")?.1.replace('_', "-"),
        None => directory.strip_prefix("pod")?.to_owned(),
    };
    is_uid(&uid).then(|| uid.into())
}

/// Whether there may be pods under a directory that is called so.
pub(super) fn leads_to_pods(directory: &str) -> bool {
    directory.contains("kubepods")
        || directory.contains("kubelet")
        || matches!(directory, "burstable" | "besteffort" | "guaranteed")
}

/// A UUID as Kubernetes writes it (RFC 9562, section 4).
fn is_uid(text: &str) -> bool {
    text.len() == 36
        && text.char_indices().all(|(at, c)| match at {
            8 | 13 | 18 | 23 => c == '-',
            _ => c.is_ascii_hexdigit(),
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pods_are_told_from_what_else_there_is() {
        const UID: &str = "0a1b2c3d-1111-2222-3333-444455556666";
        let check = |directory: &str, expected: Option<&str>| {
            assert_eq!(pod(directory).as_deref(), expected, "{directory}");
        };
        check("pod0a1b2c3d-1111-2222-3333-444455556666", Some(UID));
        check("kubepods-pod0a1b2c3d_1111_2222_3333_444455556666.slice", Some(UID));
        check("kubepods-burstable-pod0a1b2c3d_1111_2222_3333_444455556666.slice", Some(UID));
        check("kubelet-kubepods-besteffort-pod0a1b2c3d_1111_2222_3333_444455556666.slice", Some(UID));
        // A static pod.
        check("pod5f3b1c0e9d8a7b6c5d4e3f2a1b0c9d8e", None);
        check("kubepods-besteffort.slice", None);
        check("cri-containerd-0a1b2c3d1111222233334444555566667777.scope", None);
        check("podman-123.slice", None);
        check("pod", None);
    }

    #[test]
    fn the_way_to_pods_is_known() {
        for directory in
            ["kubepods", "kubepods.slice", "kubelet.slice", "kubelet-kubepods.slice", "besteffort"]
        {
            assert!(leads_to_pods(directory), "{directory}");
        }
        for directory in ["system.slice", "user.slice", "init.scope", "containerd.service"] {
            assert!(!leads_to_pods(directory), "{directory}");
        }
    }
}
