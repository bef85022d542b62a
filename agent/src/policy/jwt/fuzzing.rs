//! Doors for the fuzz targets (`tests/fuzz`), compiled for them alone.

use http::{HeaderMap, HeaderValue, Uri};

use super::keys::KeySet;
use super::{Issuer, Keys, Place, Rules};

/// The keys of RFC 7515, appendices A.2 and A.3.
const KEYS: &str = include_str!("cases/rfc7515.json");

/// What anybody may show as a token, in a header and in the query: it holds only if the issuer has signed it.
pub fn token(bytes: &[u8]) {
    let Ok(keys) = KeySet::parse(KEYS.as_bytes()) else { return };
    let places = vec![Place::bearer(), Place::Param("token".into())];
    let issuer = Issuer {
        name: "joe".into(),
        audiences: Vec::new(),
        keys: Keys::Given(keys.into()),
        places,
        forward: false,
        headers: Vec::new(),
    };
    let rules = Rules { policy: "a".into(), issuers: vec![issuer], leeway: 0, invalid: None };
    let mut headers = HeaderMap::new();
    if let Ok(value) = HeaderValue::from_bytes(&[b"Bearer ", bytes].concat()) {
        headers.insert(http::header::AUTHORIZATION, value);
    }
    let query = [b"/?token=", bytes].concat();
    for mut uri in [Some(Uri::from_static("/")), Uri::try_from(query).ok()].into_iter().flatten() {
        if let Ok(accepted) = rules.check(&headers, &uri, |_| None, 1_300_819_379) {
            if let Some(accepted) = &accepted {
                assert_eq!(accepted.claims["iss"], "joe");
            }
            let _ = rules.apply(accepted.as_ref(), &mut headers.clone(), &mut uri);
        }
    }
}

/// Keys as an issuer publishes them.
pub fn key_set(bytes: &[u8]) {
    if let Ok(keys) = KeySet::parse(bytes) {
        assert!(keys.candidates(None).count() > 0, "a set has a key");
    }
}
