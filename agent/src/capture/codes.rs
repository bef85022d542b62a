//! Codes for destinations, in user space and in the kernel's maps.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use aya::maps::{HashMap as BpfHashMap, MapData, MapError};
use imbl::OrdSet;
use tracing::warn;
use undermesh_common::connect::is_of_the_way;
use undermesh_common::maps::Destination;
use undermesh_common::{Address, code};

use super::programs::Programs;
use super::{CaptureError, map_error};

/// How long a code outlives its destination at least: a connection may still be on its way to the agent's listener.
const GRACE: Duration = Duration::from_secs(60);

/// A destination that is or was known to the mesh. A connection keeps its own alive, so that `getpeername` goes on
/// showing the address that was dialled.
#[derive(Debug)]
pub struct Code {
    /// The address that was dialled.
    pub address: IpAddr,
    code: u32,
}

/// What stands behind each code. Cheap to clone; reads take no lock.
#[derive(Clone, Debug, Default)]
pub struct CodeTable(Arc<ArcSwap<imbl::HashMap<u32, Arc<Code>>>>);

impl CodeTable {
    /// The destination that an accepted socket's own address stands for.
    pub fn destination(&self, local: IpAddr) -> Option<Arc<Code>> {
        let code = code::of(&Address::from(local))?;
        self.0.load().get(&code).cloned()
    }
}

/// The source address that an application had bound, if it had: one that had not got a loopback address or a code on
/// the way to the agent.
pub fn bound_source(source: IpAddr) -> Option<IpAddr> {
    (!is_of_the_way(&source.into())).then_some(source)
}

/// The codes and what the kernel knows of them.
#[derive(Debug)]
pub(super) struct Codes {
    book: CodeBook,
    destinations: BpfHashMap<MapData, Address, Destination>,
    codes: BpfHashMap<MapData, u32, Address>,
}

impl Codes {
    /// Takes over what the maps hold.
    pub(super) fn adopt(programs: &Programs) -> Result<Self, CaptureError> {
        let mut this = Self {
            book: CodeBook::default(),
            destinations: programs.hash_map("destinations")?,
            codes: programs.hash_map("codes")?,
        };
        let known: Vec<(u32, Address)> = this.codes.iter().filter_map(Result::ok).collect();
        let now = Instant::now();
        for (code, address) in known {
            let is_live = this.destinations.get(&address, 0).is_ok_and(|d| d.code == code);
            let forgotten = this.book.adopt(code, address.into(), is_live, now);
            this.forget(forgotten);
        }
        Ok(this)
    }

    pub(super) fn addresses(&self) -> OrdSet<IpAddr> {
        self.book.by_address.keys().copied().collect()
    }

    pub(super) fn table(&self) -> CodeTable {
        self.book.table.clone()
    }

    /// The way back first: from the moment the kernel rewrites a connect, its code must mean something.
    pub(super) fn add(&mut self, address: IpAddr) -> Result<(), CaptureError> {
        let key = Address::from(address);
        let (codes, destinations) = (&mut self.codes, &mut self.destinations);
        self.book.add(address, Instant::now(), |code| {
            codes.insert(code, key, 0).map_err(map_error("codes"))?;
            destinations.insert(key, Destination { code }, 0).map_err(map_error("destinations"))
        })
    }

    /// New connects go their direct way at once; the code stays until nothing shows it any more.
    pub(super) fn remove(&mut self, address: IpAddr, now: Instant) -> Result<(), CaptureError> {
        if !self.book.remove(address, now) {
            return Ok(());
        }
        self.destinations.remove(&Address::from(address)).map_err(map_error("destinations"))
    }

    pub(super) fn tidy(&mut self, now: Instant) {
        let forgotten = self.book.tidy(now);
        self.forget(forgotten);
    }

    fn forget(&mut self, codes: impl IntoIterator<Item = u32>) {
        for code in codes {
            match self.codes.remove(&code) {
                // The kernel never took it.
                Ok(()) | Err(MapError::KeyNotFound) => {}
                Err(error) => warn!(%error, code, "cannot remove a code that is out of use"),
            }
        }
    }
}

/// Gives out codes. They are used in turn, so that one comes back only after eight million others.
#[derive(Debug)]
struct CodeBook {
    table: CodeTable,
    by_address: HashMap<IpAddr, Arc<Code>>,
    /// Out of use since then, and in use again if their address comes back.
    retired: HashMap<IpAddr, (Instant, Arc<Code>)>,
    next: u32,
}

impl Default for CodeBook {
    fn default() -> Self {
        Self {
            table: CodeTable::default(),
            by_address: HashMap::new(),
            retired: HashMap::new(),
            next: code::FIRST,
        }
    }
}

impl CodeBook {
    /// Takes over one that an earlier agent gave out. Returns the one that is in its way: two codes of one address can
    /// only be left by an agent of another version.
    fn adopt(&mut self, code: u32, address: IpAddr, is_live: bool, now: Instant) -> Option<u32> {
        let entry = self.enter(code, address);
        self.next = self.next.max(code + 1);
        if is_live {
            self.by_address.insert(address, entry);
            return None;
        }
        let (_, other) = self.retired.insert(address, (now, entry))?;
        self.strike(&other);
        Some(other.code)
    }

    /// Gives the address a code, once the kernel has taken it. One that it refuses is out of use, and the first to be
    /// tried again.
    fn add(
        &mut self,
        address: IpAddr,
        now: Instant,
        write: impl FnOnce(u32) -> Result<(), CaptureError>,
    ) -> Result<(), CaptureError> {
        if self.by_address.contains_key(&address) {
            return Ok(());
        }
        // What comes and goes all the time takes no more codes than what stays.
        let entry = match self.retired.remove(&address) {
            Some((_, entry)) => entry,
            None => {
                let code = self.unused_code()?;
                self.enter(code, address)
            }
        };
        let written = write(entry.code);
        match written {
            Ok(()) => drop(self.by_address.insert(address, entry)),
            Err(_) => drop(self.retired.insert(address, (now, entry))),
        }
        written
    }

    /// Puts the address's code out of use; false if it has none.
    fn remove(&mut self, address: IpAddr, now: Instant) -> bool {
        let Some(entry) = self.by_address.remove(&address) else { return false };
        self.retired.insert(address, (now, entry));
        true
    }

    /// Codes that stand for nothing any more.
    fn tidy(&mut self, now: Instant) -> Vec<u32> {
        // One reference here, one in the table; the others are connections.
        let is_over = |since: Instant, entry: &Arc<Code>| {
            now.saturating_duration_since(since) >= GRACE && Arc::strong_count(entry) <= 2
        };
        let over: Vec<_> = self.retired.extract_if(|_, (since, entry)| is_over(*since, entry)).collect();
        over.into_iter().map(|(_, (_, entry))| self.strike(&entry)).collect()
    }

    fn enter(&self, code: u32, address: IpAddr) -> Arc<Code> {
        let entry = Arc::new(Code { address, code });
        self.table.0.rcu(|table| table.update(code, entry.clone()));
        entry
    }

    fn strike(&self, entry: &Code) -> u32 {
        self.table.0.rcu(|table| table.without(&entry.code));
        entry.code
    }

    fn unused_code(&mut self) -> Result<u32, CaptureError> {
        let table = self.table.0.load();
        let code = next_unused(self.next, |code| table.contains_key(&code));
        let code =
            code.ok_or_else(|| CaptureError::Map { map: "codes", reason: "every code is in use".into() })?;
        self.next = code + 1;
        Ok(code)
    }
}

/// The first code from `next` on, all around, that is not in use.
fn next_unused(next: u32, is_used: impl Fn(u32) -> bool) -> Option<u32> {
    let next = next.clamp(code::FIRST, code::LIMIT);
    (next..code::LIMIT).chain(code::FIRST..next).find(|code| !is_used(*code))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(last: u8) -> IpAddr {
        [10, 0, 0, last].into()
    }

    fn refused(_code: u32) -> Result<(), CaptureError> {
        Err(CaptureError::Map { map: "destinations", reason: "full".into() })
    }

    #[test]
    fn an_address_that_the_kernel_refuses_takes_one_code_however_often() {
        let (mut book, began) = (CodeBook::default(), Instant::now());
        for _ in 0..100 {
            book.add(address(1), began, refused).unwrap_err();
        }
        assert_eq!(book.table.0.load().keys().collect::<Vec<_>>(), [&code::FIRST]);
        assert!(book.by_address.is_empty());
        assert!(book.tidy(began).is_empty());
        assert_eq!(book.tidy(began + GRACE), [code::FIRST]);
        assert!(book.table.0.load().is_empty());
    }

    #[test]
    fn an_address_keeps_its_code_when_it_comes_back() {
        let (mut book, now) = (CodeBook::default(), Instant::now());
        let mut given = Vec::new();
        for host in [1, 2, 1] {
            book.add(address(host), now, |code| {
                given.push(code);
                Ok(())
            })
            .unwrap();
            book.remove(address(host), now);
        }
        assert_eq!(given, [code::FIRST, code::FIRST + 1, code::FIRST]);
    }

    #[test]
    fn codes_are_given_out_in_turn_until_there_are_none() {
        assert_eq!(next_unused(20, |code| code < 25), Some(25));
        assert_eq!(next_unused(code::LIMIT, |code| code == code::FIRST), Some(code::FIRST + 1));
        assert_eq!(next_unused(20, |code| code != 19), Some(19));
        assert_eq!(next_unused(20, |_| true), None);
    }
}
