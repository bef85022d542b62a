//! The keys of whoever makes tokens, as the wiring reads them for each scrape.

use crate::model::Name;

/// What the metrics tell of these keys. What is missing here is gone from the metrics.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct IssuerKeyFigures {
    /// Attempts to fetch keys, by the stable name of their result.
    pub fetches: Vec<(&'static str, u64)>,
    /// How many seconds ago the keys of each address were told last.
    pub ages: Vec<(Name, f64)>,
}
