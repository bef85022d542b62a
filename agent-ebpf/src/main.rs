//! The kernel programs of Undermesh.
//!
//! A thin shell: an entry point reads its context and maps, asks a pure function of `undermesh-common` and returns.
//! Nothing here decides anything that could be decided there, and nothing here can fail a connection by accident:
//! where a read fails, the branch says whether it goes on or blocks, and why.
#![no_std]
#![no_main]

use aya_ebpf::Global;

mod connect;
mod context;
mod lookup;
mod maps;
mod names;
mod tcp;

/// The network namespace that an instance of the programs is for, by its cookie; set by the loader. 0: none.
#[unsafe(no_mangle)]
static NETNS_COOKIE: Global<u64> = Global::new(0);

/// Never reached: the programs neither index nor unwrap, and the verifier would refuse a loop.
#[cfg(not(test))]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

/// What the kernel asks of a program that wants helpers reserved to compatible licences; none here does.
// SAFETY: the loader reads this section by name; nothing else does.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 11] = *b"Apache-2.0\0";
