//! Doors for the fuzz targets (`tests/fuzz`), compiled for them alone.

/// The first bytes of a connection: what they are, and whom a ClientHello asks for. More bytes may tell what fewer could not,
/// and nothing else than what fewer told.
pub fn first_bytes(bytes: &[u8]) {
    let half = &bytes[..bytes.len() / 2];
    if let Some(told) = super::detect::judge(half) {
        assert_eq!(super::detect::judge(bytes), Some(told));
    }
    if let Some(told) = super::detect::asked_for(half) {
        assert_eq!(super::detect::asked_for(bytes), Some(told));
    }
}

/// What a request carries of its session.
pub fn session(text: &str) {
    super::http::fuzzing::session(text);
}
