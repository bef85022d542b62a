//! Whose connections are taken for the kubelet's.

/// Who may call pods at the ports of their probes, whoever else they let in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Probers {
    /// The kubelet, known by its cgroup.
    Kubelet,
    /// Whoever is on the node's own network, the kubelet among them: why it is not told from the others.
    Node(String),
    /// Nobody: why not even these.
    Nobody(String),
}

impl Probers {
    /// Every stable name.
    pub const NAMES: [&str; 3] = ["kubelet", "node", "nobody"];

    /// The stable name in metrics.
    pub fn as_str(&self) -> &'static str {
        let [kubelet, node, nobody] = Self::NAMES;
        match self {
            Self::Kubelet => kubelet,
            Self::Node(_) => node,
            Self::Nobody(_) => nobody,
        }
    }

    /// The reason in the condition of a pod that suffers from it, if anything is amiss.
    pub fn reason(&self) -> Option<&'static str> {
        match self {
            Self::Kubelet => None,
            Self::Node(_) => Some("ProbesOpenToNode"),
            Self::Nobody(_) => Some("ProbesRefused"),
        }
    }

    /// What is amiss, if anything is: a sentence for whoever looks after the node.
    pub fn trouble(&self) -> Option<String> {
        match self {
            Self::Kubelet => None,
            Self::Node(why) => Some(format!(
                "whoever is on the node's own network is let in to pods at the ports of their probes, for the kubelet is not told \
                 from others: {why}"
            )),
            Self::Nobody(why) => Some(format!(
                "pods that take no plaintext or have policies fail their probes, for the kubelet is not told from others: {why}"
            )),
        }
    }
}
