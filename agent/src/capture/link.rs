//! Detaching a pinned link at once, which aya has no call for.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// `enum bpf_cmd` of linux/bpf.h.
const BPF_OBJ_GET: libc::c_int = 7;
const BPF_LINK_DETACH: libc::c_int = 34;

/// The part of `union bpf_attr` that BPF_OBJ_GET reads.
#[repr(C)]
struct ObjGet {
    pathname: u64,
    bpf_fd: u32,
    file_flags: u32,
}

/// Detaches the link (Linux 5.9): when this returns its program runs no more. The pin stays, without effect.
pub(super) fn detach(pin: &Path) -> io::Result<()> {
    let link = open(pin)?;
    let link_fd = link.as_raw_fd();
    // SAFETY: BPF_LINK_DETACH reads one descriptor.
    unsafe { bpf(BPF_LINK_DETACH, (&raw const link_fd).cast(), size_of_val(&link_fd)) }.map(drop)
}

fn open(pin: &Path) -> io::Result<OwnedFd> {
    let path = CString::new(pin.as_os_str().as_bytes())?;
    let get = ObjGet { pathname: path.as_ptr() as u64, bpf_fd: 0, file_flags: 0 };
    // SAFETY: BPF_OBJ_GET reads these fields; the path lives through the call.
    let fd = unsafe { bpf(BPF_OBJ_GET, (&raw const get).cast(), size_of_val(&get)) }?;
    // SAFETY: the call has just opened it, and nobody else knows of it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// # Safety
///
/// `attr` points to `size` bytes of the form that the command reads.
unsafe fn bpf(command: libc::c_int, attr: *const libc::c_void, size: usize) -> io::Result<libc::c_int> {
    // SAFETY: as the caller promises.
    let ret = unsafe { libc::syscall(libc::SYS_bpf, command, attr, size) };
    if ret < 0 { Err(io::Error::last_os_error()) } else { Ok(ret as libc::c_int) }
}
