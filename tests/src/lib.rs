//! The lab: nodes and pods as namespaces on one machine.
