//! Doors for the fuzz targets (`tests/fuzz`), compiled for them alone.

use super::enrolled;

/// What another agent has published.
pub fn statement(bytes: &[u8]) {
    enrolled::fuzz(bytes);
}
