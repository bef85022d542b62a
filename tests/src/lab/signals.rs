//! Ctrl-C and its like: sweep every lab and cluster of this process, then end.

use std::cell::Cell;
use std::sync::{Arc, Mutex, RwLock, RwLockReadGuard, Weak};

use anyhow::Result;
use nix::sys::signal::{SigSet, Signal};

use super::state::State;
use super::sweep;

/// Held for reading while something is being made, so that nothing is made behind a sweep's back.
static GATE: RwLock<()> = RwLock::new(());

thread_local! {
    /// True on the thread that sweeps after a signal: it holds the gate for writing.
    static SWEEPING: Cell<bool> = const { Cell::new(false) };
}

static LABS: Mutex<Vec<Weak<State>>> = Mutex::new(Vec::new());

/// From now on SIGINT, SIGTERM, SIGHUP and SIGQUIT sweep all labs and clusters of this process before it ends. Call it before
/// other threads are started: they inherit that the signals are left to ours.
pub fn sweep_on_signals() -> Result<()> {
    let mut signals = SigSet::empty();
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGQUIT] {
        signals.add(signal);
    }
    signals.thread_block()?;
    std::thread::spawn(move || {
        let signal = signals.wait();
        let _closed = GATE.write();
        SWEEPING.set(true);
        eprintln!("\ninterrupted: sweeping");
        for lab in labs().iter().filter_map(Weak::upgrade) {
            if let Err(error) = sweep::everything(&lab) {
                eprintln!("lab {}: {error:#}", lab.name);
            }
        }
        std::process::exit(128 + signal.map_or(0, |signal| signal as i32));
    });
    Ok(())
}

/// Waits, if need be for ever, while a signal's sweep is under way.
pub(crate) fn gate() -> Option<RwLockReadGuard<'static, ()>> {
    let open = !SWEEPING.get();
    open.then(|| GATE.read().unwrap_or_else(|poisoned| poisoned.into_inner()))
}

pub(crate) fn register(lab: &Arc<State>) {
    labs().push(Arc::downgrade(lab));
}

pub(crate) fn unregister(lab: &Arc<State>) {
    labs().retain(|known| !known.ptr_eq(&Arc::downgrade(lab)));
}

fn labs() -> std::sync::MutexGuard<'static, Vec<Weak<State>>> {
    LABS.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}
