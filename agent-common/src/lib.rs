//! Types and pure decisions shared by the kernel programs and the agent.
//!
//! Nothing here touches a map, a socket or a clock: an entry point reads facts, asks a function of this crate and
//! does what it says. That is what lets every branch be tested on the host.
//!
//! Structs that live in maps are `repr(C)`, integers only and explicitly padded; their field names are what
//! `bpftool map dump` prints.
#![cfg_attr(not(any(test, feature = "user")), no_std)]

pub mod address;
pub mod code;
pub mod connect;
pub mod lookup;
pub mod maps;
pub mod source;

pub use address::{Address, Endpoint, Tuple};
