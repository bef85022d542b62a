//! Doors for the fuzz targets (`tests/fuzz`), compiled for them alone.

/// The `Forwarded` header of a CONNECT.
pub fn forwarded(header: &str) {
    if let Some(client) = super::server::forwarded_for(header) {
        let written = format!("for=\"{client}\"");
        assert_eq!(super::server::forwarded_for(&written), Some(client), "{written}");
    }
}
