//! Sets of ports.

use super::rule::Matcher;

const WORDS: usize = 1 << 10;

/// Some of all ports: a bit for each, once there are any.
#[derive(Clone, Debug, Default)]
pub(super) struct Ports {
    bits: Vec<u64>,
    is_full: bool,
}

impl Ports {
    pub(super) fn has(&self, port: u16) -> bool {
        let (word, bit) = place(port);
        self.bits.get(word).is_some_and(|word| word & bit != 0)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.bits.iter().all(|word| *word == 0)
    }

    /// Those that the matcher means, and of them those of the list alone, if there is one.
    pub(super) fn add(&mut self, matcher: &Matcher<u16>, only: Option<&[u16]>) {
        // Most say nothing of ports, and there may be many of them.
        if self.is_full {
            return;
        }
        let lists = [Some(&*matcher.any_of).filter(|list| !list.is_empty()), only];
        let mut added = vec![u64::MAX; WORDS];
        for list in lists.into_iter().flatten() {
            let of_list = bits(list);
            added.iter_mut().zip(of_list).for_each(|(added, listed)| *added &= listed);
        }
        let left_out = bits(&matcher.none_of);
        added.iter_mut().zip(left_out).for_each(|(added, left_out)| *added &= !left_out);
        self.bits.resize(WORDS, 0);
        self.bits.iter_mut().zip(added).for_each(|(word, added)| *word |= added);
        self.is_full = self.bits.iter().all(|word| *word == u64::MAX);
    }
}

fn bits(ports: &[u16]) -> Vec<u64> {
    let mut bits = vec![0; WORDS];
    for port in ports {
        let (word, bit) = place(*port);
        bits[word] |= bit;
    }
    bits
}

fn place(port: u16) -> (usize, u64) {
    (usize::from(port >> 6), 1 << (port & 63))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_that_are_meant_left_out_and_all() {
        let matcher =
            |any_of: &[u16], none_of: &[u16]| Matcher { any_of: any_of.to_vec(), none_of: none_of.to_vec() };
        let check = |added: &[(&Matcher<u16>, Option<&[u16]>)], expected: [bool; 4]| {
            let mut ports = Ports::default();
            added.iter().for_each(|(matcher, only)| ports.add(matcher, *only));
            assert_eq!([0, 80, 443, u16::MAX].map(|port| ports.has(port)), expected, "{added:?}");
            assert_eq!(ports.is_empty(), expected == [false; 4], "{added:?}");
        };
        check(&[], [false; 4]);
        check(&[(&matcher(&[], &[]), None)], [true; 4]);
        check(&[(&matcher(&[80], &[]), None)], [false, true, false, false]);
        check(&[(&matcher(&[], &[80, 65535]), None)], [true, false, true, false]);
        check(&[(&matcher(&[80, 443], &[80]), None)], [false, false, true, false]);
        check(&[(&matcher(&[], &[443]), Some(&[80, 443]))], [false, true, false, false]);
        check(&[(&matcher(&[], &[]), Some(&[]))], [false; 4]);
        check(&[(&matcher(&[80], &[]), None), (&matcher(&[], &[80]), None)], [true; 4]);
    }
}
