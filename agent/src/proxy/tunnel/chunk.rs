//! Large buffers, kept by the thread that needs them all the time.
//!
//! A connection holds one only while bytes are in it. The allocator would fetch blocks of this size from the kernel and
//! give them back again and again, and every time their pages would have to be cleared.

use std::cell::RefCell;

use bytes::Bytes;

/// Bytes in a buffer: eight TLS records' worth, which is about what one call to the kernel can move at a stretch.
pub(super) const CHUNK: usize = 128 * 1024;

/// Buffers that a thread keeps for later.
const SPARE: usize = 8;

thread_local! {
    static POOL: RefCell<Vec<Box<[u8]>>> = const { RefCell::new(Vec::new()) };
}

/// A buffer of [`CHUNK`] bytes, which goes back to the pool of the thread that drops it.
#[derive(Debug)]
pub(super) struct Chunk {
    /// Empty only while it is dropped.
    bytes: Box<[u8]>,
}

impl Chunk {
    /// One that was used before, or a new one. What is in it is left over.
    pub(super) fn take() -> Self {
        let spare = POOL.with_borrow_mut(Vec::pop);
        Self { bytes: spare.unwrap_or_else(|| vec![0; CHUNK].into_boxed_slice()) }
    }

    /// The first so many bytes, without a copy. The buffer comes back when the last of them is dropped.
    pub(super) fn into_bytes(self, len: usize) -> Bytes {
        Bytes::from_owner(Filled { chunk: self, len })
    }
}

impl std::ops::Deref for Chunk {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes
    }
}

impl std::ops::DerefMut for Chunk {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.bytes
    }
}

impl Drop for Chunk {
    fn drop(&mut self) {
        let bytes = std::mem::take(&mut self.bytes);
        // A thread that ends has no pool any more.
        let _ = POOL.try_with(|pool| {
            let mut pool = pool.borrow_mut();
            if pool.len() < SPARE {
                pool.push(bytes);
            }
        });
    }
}

struct Filled {
    chunk: Chunk,
    len: usize,
}

impl AsRef<[u8]> for Filled {
    fn as_ref(&self) -> &[u8] {
        &self.chunk[..self.len]
    }
}
