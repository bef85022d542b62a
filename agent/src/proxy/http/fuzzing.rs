//! Doors for the fuzz targets (`tests/fuzz`), compiled for them alone.

/// What a request carries of its session.
pub(in crate::proxy) fn session(text: &str) {
    super::session::check_token(text);
}
