//! SPIFFE ids and trust domains.

#![no_main]

use libfuzzer_sys::fuzz_target;
use undermesh::identity::{SpiffeId, TrustDomain};

fuzz_target!(|input: &str| {
    if let Ok(id) = input.parse::<SpiffeId>() {
        assert_eq!(id.as_str(), input);
        let domain: TrustDomain = id.trust_domain().parse().expect("an id is of a trust domain");
        let again = SpiffeId::new(&domain, id.namespace(), id.service_account());
        assert_eq!(again.as_ref(), Ok(&id), "an id is made of its parts");
    }
    if let Ok(domain) = input.parse::<TrustDomain>() {
        assert_eq!(domain.as_str(), input);
    }
});
