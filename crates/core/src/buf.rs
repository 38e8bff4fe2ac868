//! `Buf`: opaque memory of one backend. Cloning is cheap and shares the memory; a `Buf` may be a window of another.

use std::any::Any;
use std::ops::Range;
use std::sync::Arc;

use crate::{Error, Result};

/// Opaque memory of one backend. Only its backend can look inside; everyone else moves bytes with
/// [`Call::Write`](crate::Call::Write) and [`Backend::read`](crate::Backend::read).
#[derive(Clone)]
pub struct Buf {
    mem: Arc<dyn Any + Send + Sync>,
    offset: usize,
    bytes: usize,
}

impl Buf {
    /// Wraps a backend's own memory object.
    pub fn new(mem: Arc<dyn Any + Send + Sync>, bytes: usize) -> Self {
        Self { mem, offset: 0, bytes }
    }

    /// Length in bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Byte offset into the memory object.
    pub fn offset(&self) -> usize {
        self.offset
    }

    /// The window `range` of this buffer.
    pub fn slice(&self, range: Range<usize>) -> Result<Self> {
        if range.start > range.end || range.end > self.bytes {
            return Err(Error::invalid(
                "buf.slice",
                format_args!("a range inside 0..{}", self.bytes),
                format_args!("{range:?}"),
            ));
        }
        Ok(Self { mem: Arc::clone(&self.mem), offset: self.offset + range.start, bytes: range.len() })
    }

    /// The backend's memory object, if it is an `M`.
    pub fn mem<M: 'static>(&self) -> Option<&M> {
        self.mem.downcast_ref()
    }

    /// Both are windows of the same memory and overlap.
    pub fn overlaps(&self, other: &Self) -> bool {
        std::ptr::addr_eq(Arc::as_ptr(&self.mem), Arc::as_ptr(&other.mem))
            && self.offset < other.offset + other.bytes
            && other.offset < self.offset + self.bytes
    }
}

impl std::fmt::Debug for Buf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Buf({} bytes at {})", self.bytes, self.offset)
    }
}
