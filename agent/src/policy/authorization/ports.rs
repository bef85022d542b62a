//! Sets of ports.

use super::rule::Matcher;

/// How many there are.
pub(super) const ALL: usize = 1 << 16;

const WORDS: usize = ALL / u64::BITS as usize;

/// Some of all ports: a bit for each, once there are any.
#[derive(Clone, Debug, Default)]
pub(super) struct Ports {
    bits: Vec<u64>,
    /// How many there are.
    len: usize,
}

impl Ports {
    pub(super) fn has(&self, port: u16) -> bool {
        let (word, bit) = place(port);
        self.bits.get(word).is_some_and(|word| word & bit != 0)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Those that the matcher means, and of them those of the list alone, if there is one.
    pub(super) fn add(&mut self, matcher: &Matcher<u16>, only: Option<&[u16]>) {
        let Matcher { any_of, none_of } = matcher;
        // Most say nothing of ports, and there may be many of them.
        if self.len == ALL {
            return;
        }
        self.bits.resize(WORDS, 0);
        let listed = if any_of.is_empty() { only } else { Some(&**any_of) };
        if let Some(listed) = listed {
            let is_meant = |port: &&u16| !none_of.contains(port) && only.is_none_or(|it| it.contains(port));
            for (word, bit) in listed.iter().filter(is_meant).map(|port| place(*port)) {
                self.len += usize::from(self.bits[word] & bit == 0);
                self.bits[word] |= bit;
            }
            return;
        }
        let mut left_out = vec![0; WORDS];
        for (word, bit) in none_of.iter().map(|port| place(*port)) {
            left_out[word] |= bit;
        }
        self.bits.iter_mut().zip(left_out).for_each(|(word, left_out)| *word |= !left_out);
        self.len = self.bits.iter().map(|word| word.count_ones() as usize).sum();
    }
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
