//! To come.
use std::borrow::Cow;
/// To come.
#[derive(Clone, Copy, Debug)]
pub enum EscapedSlashes {
    /// .
    Refuse,
    /// .
    Keep,
    /// .
    Decode,
}
/// To come.
#[derive(Clone, Copy, Debug)]
pub struct PathNormalisation {
    /// .
    pub merge_slashes: bool,
    /// .
    pub case_insensitive: bool,
    /// .
    pub escaped_slashes: EscapedSlashes,
}
/// To come.
pub fn normalise(path: &str, _: PathNormalisation) -> Result<Cow<'_, str>, String> {
    Ok(path.into())
}
