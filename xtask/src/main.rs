//! Every developer command of Undermesh.

fn main() {}
