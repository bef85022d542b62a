//! Doors for the fuzz targets (`tests/fuzz`), compiled for them alone.

use super::context::TraceContext;

/// A `traceparent` as anybody may send it: what is read is what is written.
pub fn traceparent(bytes: &[u8]) {
    if let Some(read) = TraceContext::parse(bytes) {
        assert_eq!(TraceContext::parse(read.to_string().as_bytes()), Some(read));
    }
}
