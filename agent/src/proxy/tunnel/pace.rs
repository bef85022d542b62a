//! How fast callers of one address may begin handshakes.
//!
//! Whoever reaches the tunnel's port can have the agent agree on keys and sign for nothing but a hello, on the threads
//! that relay for all others. So each address has a number of handshakes that it may begin at once, more than a peer of
//! the mesh ever needs, and then as many a second as cost little. Time is an argument.

use std::collections::HashMap;
use std::net::IpAddr;
use std::time::{Duration, Instant};

/// One more handshake for each address.
const EVERY: Duration = Duration::from_millis(5);

/// Handshakes that an address may begin at once: with an agent that is back, a pod needs a tunnel to each pod of the node
/// for each of its own node's workers.
const BURST: u32 = 1000;

/// How long one may have to wait for its turn; the caller gives up after ten seconds.
const PATIENCE: Duration = Duration::from_secs(2);

/// Addresses that are remembered without a look at which of them need not be.
const FEW: usize = 1024;

/// When the handshakes of each address will have been paid for, in units of [`EVERY`].
#[derive(Debug)]
pub(super) struct Pace {
    paid: HashMap<IpAddr, Instant>,
    /// Addresses beyond which those that owe nothing are forgotten.
    many: usize,
}

impl Default for Pace {
    fn default() -> Self {
        Self { paid: HashMap::new(), many: FEW }
    }
}

impl Pace {
    /// When the address may begin one more handshake. None if that is too far away: then it is not to begin at all.
    pub(super) fn turn(&mut self, address: IpAddr, now: Instant) -> Option<Instant> {
        let paid = self.paid.get(&address).map_or(now, |paid| now.max(*paid)) + EVERY;
        let ahead = paid.duration_since(now).saturating_sub(EVERY * BURST);
        if ahead > PATIENCE {
            return None;
        }
        self.forget(now);
        self.paid.insert(address, paid);
        Some(now + ahead)
    }

    /// Costs a look at each address when they have become twice as many, so little for each of them.
    fn forget(&mut self, now: Instant) {
        if self.paid.len() >= self.many {
            self.paid.retain(|_, paid| *paid > now);
            self.many = FEW.max(2 * self.paid.len());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(last: u32) -> IpAddr {
        std::net::Ipv4Addr::from_bits(0x0a4d_0000 + last).into()
    }

    /// Milliseconds until the turn of each of so many handshakes.
    fn waits(pace: &mut Pace, caller: u32, now: Instant, count: usize) -> Vec<Option<u128>> {
        let mut wait = || Some(pace.turn(address(caller), now)?.duration_since(now).as_millis());
        (0..count).map(|_| wait()).collect()
    }

    #[test]
    fn beyond_a_burst_handshakes_wait_and_then_are_refused() {
        let (mut pace, start) = (Pace::default(), Instant::now());
        assert_eq!(waits(&mut pace, 1, start, 1000), [Some(0); 1000]);
        assert_eq!(waits(&mut pace, 1, start, 3), [Some(5), Some(10), Some(15)]);
        assert_eq!(waits(&mut pace, 1, start, 1000).iter().flatten().max(), Some(&2000));
        assert_eq!(waits(&mut pace, 1, start, 1000), [None; 1000]);
        // Nobody else has to wait, and what was refused is not paid for.
        assert_eq!(waits(&mut pace, 2, start, 1), [Some(0)]);
        let later = start + Duration::from_secs(1);
        assert_eq!(waits(&mut pace, 1, later, 1000).iter().flatten().count(), 200);
        let much_later = start + Duration::from_secs(60);
        assert_eq!(waits(&mut pace, 1, much_later, 1001)[998..], [Some(0), Some(0), Some(5)]);
    }

    #[test]
    fn addresses_that_owe_nothing_are_forgotten() {
        let (mut pace, start) = (Pace::default(), Instant::now());
        for second in 0..100 {
            for caller in 0..100 {
                let caller = 100 * second + caller;
                pace.turn(address(caller), start + Duration::from_secs(second.into()));
            }
        }
        assert!(pace.paid.len() <= FEW, "{} are remembered", pace.paid.len());
    }
}
