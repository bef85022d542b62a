//! Consistent hashing: requests with the same hash go to the same endpoint, on every node, and where endpoints come and go few of
//! them go elsewhere.
//!
//! The table is Maglev's (Eisenbud et al., NSDI 2016): one look for each request, every endpoint has the same number of slots but for
//! one in a hundred, and what leads to an endpoint that stays is left alone but for a few. Rendezvous hashing is simpler and moves
//! nothing needlessly, but looks at every endpoint for every request; here it serves the few requests whose endpoint is ejected,
//! full or has been tried. Jump hashing needs no table, but knows endpoints by their number alone, so that one that leaves from the
//! middle moves most of the others' requests; and a ring is uneven, or as large as the table and slower.

use std::hash::Hasher as _;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use fnv::FnvHasher;

use crate::model::{Endpoint, HashTable};

/// Slots of a table, a prime. The same however many endpoints there are: tables of two sizes have nothing in common, so that with
/// the one endpoint more that asks for a larger one nearly all requests would go elsewhere. 128 KiB for a port that wants one.
const SLOTS: usize = 65_537;

/// What no endpoint has taken yet.
const FREE: u16 = u16::MAX;

/// A hash of something that requests have in common. It is the same on all nodes and in all versions, or a rollout would move
/// sessions; nothing secret is in it, for nodes could not agree on that.
pub fn hash(bytes: &[u8]) -> u64 {
    let mut hasher = FnvHasher::default();
    hasher.write(bytes);
    mixed(hasher.finish())
}

/// That of an address, as one that came as another kind of the same.
pub fn hash_address(address: IpAddr) -> u64 {
    match address.to_canonical() {
        IpAddr::V4(address) => hash(&address.octets()),
        IpAddr::V6(address) => hash(&address.octets()),
    }
}

/// The table for these endpoints, or the old one if that is for the same.
pub(super) fn table<'a>(
    endpoints: impl Iterator<Item = &'a Endpoint>,
    old: Option<&HashTable>,
) -> Option<HashTable> {
    // Slots hold 16 bits. What is beyond, and no Service has so many endpoints, is reached only when others are not fit.
    let of: Arc<[SocketAddr]> = endpoints.map(|endpoint| endpoint.address).take(usize::from(FREE)).collect();
    match old {
        Some(old) if old.of == of => Some(old.clone()),
        _ if of.is_empty() => None,
        _ => Some(HashTable { slots: filled(&of), of }),
    }
}

/// The place of the endpoint that the hash leads to, among those of the table.
pub(super) fn place(table: &HashTable, hash: u64) -> usize {
    usize::from(table.slots[(hash % table.slots.len() as u64) as usize])
}

/// How much the hash is for the endpoint: of several the one with the most has it.
pub(super) fn rank(hash: u64, endpoint: SocketAddr) -> u64 {
    mixed(hash ^ hash_endpoint(endpoint))
}

/// Each endpoint has an order of its own in which it likes the slots, and they take turns in taking the best that is left.
fn filled(of: &[SocketAddr]) -> Arc<[u16]> {
    let slots = SLOTS as u64;
    // Where each is in its order, and how far it steps: any step leads past all slots, their number being a prime.
    let mut next: Vec<(u64, u64)> = of
        .iter()
        .map(|endpoint| {
            let hash = hash_endpoint(*endpoint);
            (hash % slots, mixed(hash ^ SECOND) % (slots - 1) + 1)
        })
        .collect();
    // Turns go by a hash, too: by the address, the first ones would have the odd slots.
    let mut turns: Vec<u16> = (0..of.len() as u16).collect();
    turns.sort_by_key(|place| (mixed(hash_endpoint(of[usize::from(*place)])), of[usize::from(*place)]));
    let mut table = vec![FREE; SLOTS];
    for (_, &endpoint) in (0..SLOTS).zip(turns.iter().cycle()) {
        let (slot, step) = &mut next[usize::from(endpoint)];
        while table[*slot as usize] != FREE {
            *slot = (*slot + *step) % slots;
        }
        table[*slot as usize] = endpoint;
    }
    table.into()
}

/// Any number but 0: makes a second hash of a first.
const SECOND: u64 = 0x9e37_79b9_7f4a_7c15;

fn hash_endpoint(endpoint: SocketAddr) -> u64 {
    mixed(hash_address(endpoint.ip()) ^ u64::from(endpoint.port()))
}

/// FNV leaves the upper bits of short inputs much alike. These are the last steps of MurmurHash3, which let each bit depend on all.
fn mixed(hash: u64) -> u64 {
    let hash = (hash ^ hash >> 33).wrapping_mul(0xff51_afd7_ed55_8ccd);
    let hash = (hash ^ hash >> 33).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    hash ^ hash >> 33
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn addresses(numbers: impl IntoIterator<Item = u32>) -> Vec<SocketAddr> {
        let address =
            |number: u32| SocketAddr::new(std::net::Ipv4Addr::from(0x0a01_0000 + number).into(), 80);
        numbers.into_iter().map(address).collect()
    }

    /// The endpoint of each slot.
    fn led_to(of: &[SocketAddr]) -> Vec<SocketAddr> {
        filled(of).iter().map(|place| of[usize::from(*place)]).collect()
    }

    #[test]
    fn hashes_stay_what_they_are() {
        assert_eq!(hash(b""), 0xefd0_1f60_ba99_2926);
        assert_eq!(hash(b"alice"), 0x3507_d047_a67c_08f4);
        assert_eq!(
            hash_address("10.1.0.1".parse().unwrap()),
            hash_address("::ffff:10.1.0.1".parse().unwrap())
        );
        let table = filled(&addresses(0..5));
        let first: Vec<u16> = table.iter().take(12).copied().collect();
        assert_eq!(first, [4, 0, 1, 3, 0, 1, 0, 1, 3, 4, 1, 4]);
    }

    #[test]
    fn one_endpoint_that_goes_moves_what_led_to_it_and_little_else() {
        for count in [2, 3, 10, 100, 1_000] {
            let all = addresses(0..count);
            let before = led_to(&all);
            for gone in [0, count / 2, count - 1] {
                let left = addresses((0..count).filter(|number| *number != gone));
                let after = led_to(&left);
                let moved = before
                    .iter()
                    .zip(&after)
                    .filter(|(before, after)| **before != all[gone as usize] && before != after);
                let share = moved.count() as f64 / SLOTS as f64;
                assert!(share < 0.05, "without {gone} of {count} {share} of the others' slots move");
            }
        }
    }

    #[test]
    fn keys_spread_evenly() {
        for count in [2, 10, 50] {
            let of = addresses(0..count);
            let table = HashTable { slots: filled(&of), of: of.clone().into() };
            let mut counts = vec![0u32; of.len()];
            let mut ranked = counts.clone();
            for user in 0..100_000 {
                let hash = hash(format!("user-{user}").as_bytes());
                counts[place(&table, hash)] += 1;
                let best = (0..of.len()).max_by_key(|place| rank(hash, of[*place])).unwrap();
                ranked[best] += 1;
            }
            for counts in [counts, ranked] {
                let most = f64::from(*counts.iter().max().unwrap());
                let mean = 100_000.0 / f64::from(count);
                assert!(most / mean < 1.1, "{count}: {counts:?}");
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(12))]

        #[test]
        fn slots_are_shared_out_evenly(numbers in prop::collection::btree_set(0u32..100_000, 1..400)) {
            let of = addresses(numbers);
            let mut counts = vec![0usize; of.len()];
            for place in filled(&of).iter() {
                counts[usize::from(*place)] += 1;
            }
            // Everybody has had as many turns, but perhaps the last one.
            let (least, most) = (counts.iter().min().unwrap(), counts.iter().max().unwrap());
            prop_assert!(most - least <= 1, "{least} to {most}");
        }

        #[test]
        fn the_order_of_endpoints_makes_no_difference(
            numbers in prop::collection::btree_set(0u32..100_000, 1..60),
            seed: u64,
        ) {
            let sorted = addresses(numbers);
            let mut shuffled = sorted.clone();
            fastrand::Rng::with_seed(seed).shuffle(&mut shuffled);
            prop_assert_eq!(led_to(&sorted), led_to(&shuffled));
        }

        #[test]
        fn every_hash_leads_to_an_endpoint(hash: u64, numbers in prop::collection::btree_set(0u32..1_000, 1..9)) {
            let of = addresses(numbers.iter().copied());
            let table = HashTable { slots: filled(&of), of: of.clone().into() };
            prop_assert!(place(&table, hash) < of.len());
            let ranks: BTreeSet<u64> = of.iter().map(|endpoint| rank(hash, *endpoint)).collect();
            prop_assert_eq!(ranks.len(), of.len());
        }
    }
}
