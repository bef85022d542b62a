//! Codes for destinations, in user space and in the kernel's maps.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use aya::maps::{HashMap as BpfHashMap, MapData};
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

/// Gives out codes. They are used in turn, so that one comes back only after eight million others.
#[derive(Debug)]
pub(super) struct Codes {
    table: CodeTable,
    by_address: HashMap<IpAddr, Arc<Code>>,
    /// Out of use since then, and in use again if their address comes back.
    retired: HashMap<IpAddr, (Instant, Arc<Code>)>,
    next: u32,
    destinations: BpfHashMap<MapData, Address, Destination>,
    codes: BpfHashMap<MapData, u32, Address>,
}

impl Codes {
    /// Takes over what the maps hold.
    pub(super) fn adopt(programs: &Programs) -> Result<Self, CaptureError> {
        let destinations = programs.hash_map("destinations")?;
        let codes = programs.hash_map("codes")?;
        let mut this = Self {
            table: CodeTable::default(),
            by_address: HashMap::new(),
            retired: HashMap::new(),
            next: code::FIRST,
            destinations,
            codes,
        };
        let known: Vec<(u32, Address)> = this.codes.iter().filter_map(Result::ok).collect();
        let now = Instant::now();
        let mut table = imbl::HashMap::new();
        for (code, address) in known {
            let entry = Arc::new(Code { address: address.into(), code });
            table.insert(code, entry.clone());
            let live = this.destinations.get(&address, 0).is_ok_and(|d| d.code == code);
            if live {
                this.by_address.insert(entry.address, entry);
            } else {
                this.retire(entry, now);
            }
            this.next = this.next.max(code + 1);
        }
        this.table.0.store(Arc::new(table));
        Ok(this)
    }

    pub(super) fn addresses(&self) -> OrdSet<IpAddr> {
        self.by_address.keys().copied().collect()
    }

    pub(super) fn table(&self) -> CodeTable {
        self.table.clone()
    }

    /// The way back first: from the moment the kernel rewrites a connect, its code must mean something.
    pub(super) fn add(&mut self, address: IpAddr) -> Result<(), CaptureError> {
        if self.by_address.contains_key(&address) {
            return Ok(());
        }
        // What comes and goes all the time takes no more codes than what stays.
        let entry = match self.retired.remove(&address) {
            Some((_, entry)) => entry,
            None => self.make(address)?,
        };
        self.destinations
            .insert(Address::from(address), Destination { code: entry.code }, 0)
            .map_err(map_error("destinations"))?;
        self.by_address.insert(address, entry);
        Ok(())
    }

    fn make(&mut self, address: IpAddr) -> Result<Arc<Code>, CaptureError> {
        let entry = Arc::new(Code { address, code: self.unused_code() });
        self.table.0.rcu(|table| table.update(entry.code, entry.clone()));
        self.codes.insert(entry.code, Address::from(address), 0).map_err(map_error("codes"))?;
        Ok(entry)
    }

    /// New connects go their direct way at once; the code stays until nothing shows it any more.
    pub(super) fn remove(&mut self, address: IpAddr, now: Instant) -> Result<(), CaptureError> {
        let Some(entry) = self.by_address.remove(&address) else { return Ok(()) };
        self.retire(entry, now);
        self.destinations.remove(&Address::from(address)).map_err(map_error("destinations"))
    }

    pub(super) fn tidy(&mut self, now: Instant) {
        // One reference here, one in the table; the others are connections.
        let is_over = |since: Instant, entry: &Arc<Code>| {
            now.saturating_duration_since(since) >= GRACE && Arc::strong_count(entry) <= 2
        };
        let over: Vec<_> = self.retired.extract_if(|_, (since, entry)| is_over(*since, entry)).collect();
        for (_, (_, entry)) in over {
            self.forget(&entry);
        }
    }

    fn retire(&mut self, entry: Arc<Code>, now: Instant) {
        // Two codes of one address can only be left by an agent of another version.
        if let Some((_, other)) = self.retired.insert(entry.address, (now, entry)) {
            self.forget(&other);
        }
    }

    fn forget(&mut self, entry: &Code) {
        self.table.0.rcu(|table| table.without(&entry.code));
        if let Err(error) = self.codes.remove(&entry.code) {
            warn!(%error, code = entry.code, "cannot remove a code that is out of use");
        }
    }

    fn unused_code(&mut self) -> u32 {
        let table = self.table.0.load();
        loop {
            if self.next >= code::LIMIT {
                self.next = code::FIRST;
            }
            let code = self.next;
            self.next += 1;
            // The maps hold fewer entries than there are codes, so one is free.
            if !table.contains_key(&code) {
                return code;
            }
        }
    }
}
