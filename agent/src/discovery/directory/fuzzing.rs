//! Doors for the fuzz targets (`tests/fuzz`), compiled for them alone.

use std::path::Path;

use super::manifest;
use super::store::Store;
use crate::config::Compiler;
use crate::model::NodeInfo;

/// A file of manifests, in YAML or JSON by its name: read and compiled into a snapshot.
pub fn manifests(file: &Path, bytes: &[u8]) {
    let Ok(objects) = manifest::read(file, bytes) else { return };
    for object in &objects {
        assert!(object.document.is_some() || !object.rejections.is_empty(), "{object:?} has no reason");
    }
    let mut store = Store::default();
    let changes = store.update([(file.to_owned(), Some(objects))]);
    let mut compiler = Compiler::new(NodeInfo { name: "node1".into(), zone: None });
    compiler.apply(changes);
    for rejection in store.rejections(compiler.problems()) {
        assert!(!rejection.to_string().is_empty());
    }
}
