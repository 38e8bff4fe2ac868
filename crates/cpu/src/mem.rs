//! Memory of the CPU backend: zeroed, 128-byte aligned, shared behind [`Buf`].
//!
//! Every access goes through the functions of this file, which check that the buffer is ours, long enough and aligned.
//!
//! Invariant on which all `SAFETY` lines rest: a session has one writer, a call runs to its end inside `submit`, and calls
//! that run at the same time on different threads write only buffers that no other running call touches. Inside a call
//! [`disjoint`] refuses outputs that overlap inputs, so that a mutable view never meets another view of the same bytes.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::cell::UnsafeCell;
use std::marker::PhantomData;
use std::ptr::NonNull;

use kvasir_core::{Buf, Error, Result, check};

/// Alignment of every allocation: a cache line pair, and enough for any vector load.
const ALIGN: usize = 128;

/// One allocation.
pub(crate) struct Mem {
    base: NonNull<UnsafeCell<u8>>,
    layout: Layout,
    /// From `base` to the first aligned byte.
    skip: usize,
}

// SAFETY: the bytes have no thread affinity; who may write when is the invariant of this file's header.
unsafe impl Send for Mem {}
// SAFETY: as above.
unsafe impl Sync for Mem {}

impl Mem {
    /// Zeroed bytes. Asks the allocator for 16-byte alignment and aligns by hand, because only then a large block comes
    /// as untouched zero pages instead of being cleared byte by byte.
    pub(crate) fn zeroed(bytes: usize) -> Result<Self> {
        let failed = || Error::OutOfMemory { what: "a buffer".into(), bytes: bytes as u64 };
        let size = bytes.checked_add(ALIGN).ok_or_else(failed)?;
        let layout = Layout::from_size_align(size, 16).map_err(|_| failed())?;
        // SAFETY: the size is not zero.
        let base =
            NonNull::new(unsafe { alloc_zeroed(layout) }.cast::<UnsafeCell<u8>>()).ok_or_else(failed)?;
        let skip = base.as_ptr().cast::<u8>().align_offset(ALIGN);
        Ok(Self { base, layout, skip })
    }

    /// First aligned byte.
    fn start(&self) -> *mut u8 {
        // SAFETY: `skip` is below `ALIGN`, and the block is `ALIGN` bytes longer than asked for.
        UnsafeCell::raw_get(unsafe {
            self.base.as_ptr().cast::<u8>().add(self.skip).cast::<UnsafeCell<u8>>()
        })
    }
}

impl Drop for Mem {
    fn drop(&mut self) {
        // SAFETY: allocated in `zeroed` with this layout, freed once.
        unsafe { dealloc(self.base.as_ptr().cast(), self.layout) }
    }
}

/// First byte of a buffer. `Buf` is created by this backend over the whole allocation and can only be narrowed, so the
/// window lies inside it.
fn start(field: &str, buf: &Buf) -> Result<*mut u8> {
    let mem = buf
        .mem::<Mem>()
        .ok_or_else(|| Error::invalid(field, "a buffer of the cpu backend", "another backend's"))?;
    // SAFETY: the offset is inside the allocation, see above.
    Ok(unsafe { mem.start().add(buf.offset()) })
}

/// First byte of a buffer of f32 numbers.
fn start_f32(field: &str, buf: &Buf, len: usize) -> Result<*mut f32> {
    let bytes = size(field, &[len, 4])?;
    check::equal(field, "bytes", bytes, buf.bytes())?;
    let at = start(field, buf)?;
    if !at.addr().is_multiple_of(4) {
        return Err(Error::invalid(field, "4-byte alignment", format_args!("offset {}", buf.offset())));
    }
    #[allow(clippy::cast_ptr_alignment)] // checked above
    Ok(at.cast())
}

/// Product of sizes, without overflow.
pub(crate) fn size(field: &str, factors: &[usize]) -> Result<usize> {
    factors
        .iter()
        .try_fold(1usize, |a, &b| a.checked_mul(b))
        .filter(|&n| isize::try_from(n).is_ok())
        .ok_or_else(|| Error::invalid(field, "a size below 2^63", format_args!("{factors:?}")))
}

/// All bytes of a buffer.
pub(crate) fn bytes<'a>(field: &str, buf: &'a Buf) -> Result<&'a [u8]> {
    let at = start(field, buf)?;
    // SAFETY: the window is inside a live, initialised allocation; header for writers.
    Ok(unsafe { std::slice::from_raw_parts(at, buf.bytes()) })
}

/// All bytes of a buffer, to write.
#[allow(clippy::mut_from_ref)] // a buffer is a shared handle; the header says who may write
pub(crate) fn bytes_mut<'a>(field: &str, buf: &'a Buf) -> Result<&'a mut [u8]> {
    let at = start(field, buf)?;
    // SAFETY: as above; the caller has called `disjoint`.
    Ok(unsafe { std::slice::from_raw_parts_mut(at, buf.bytes()) })
}

/// A buffer of exactly `len` f32 numbers.
pub(crate) fn f32s<'a>(field: &str, buf: &'a Buf, len: usize) -> Result<&'a [f32]> {
    let at = start_f32(field, buf, len)?;
    // SAFETY: length and alignment are checked; header for writers.
    Ok(unsafe { std::slice::from_raw_parts(at, len) })
}

/// The first `len` f32 numbers of a buffer that may have room for more.
pub(crate) fn f32s_prefix<'a>(field: &str, buf: &'a Buf, len: usize) -> Result<&'a [f32]> {
    f32s(field, buf, prefix(field, buf, len)?).map(|all| &all[..len])
}

/// The first `len` f32 numbers of a buffer that may have room for more, to write.
#[allow(clippy::mut_from_ref)] // as `bytes_mut`
pub(crate) fn f32s_prefix_mut<'a>(field: &str, buf: &'a Buf, len: usize) -> Result<&'a mut [f32]> {
    f32s_mut(field, buf, prefix(field, buf, len)?).map(|all| &mut all[..len])
}

/// Numbers in a buffer that must hold at least `len`.
fn prefix(field: &str, buf: &Buf, len: usize) -> Result<usize> {
    let all = floats(field, buf)?;
    if all < len {
        return Err(Error::invalid(
            field,
            format_args!("at least {len} numbers"),
            format_args!("{all} numbers"),
        ));
    }
    Ok(all)
}

/// A buffer of exactly `len` f32 numbers, to write.
#[allow(clippy::mut_from_ref)] // as `bytes_mut`
pub(crate) fn f32s_mut<'a>(field: &str, buf: &'a Buf, len: usize) -> Result<&'a mut [f32]> {
    let at = start_f32(field, buf, len)?;
    // SAFETY: length and alignment are checked; the caller has called `disjoint`.
    Ok(unsafe { std::slice::from_raw_parts_mut(at, len) })
}

/// Number of f32 numbers in a buffer; its length must be whole.
pub(crate) fn floats(field: &str, buf: &Buf) -> Result<usize> {
    if !buf.bytes().is_multiple_of(4) {
        return Err(Error::invalid(field, "a whole number of f32", format_args!("{} bytes", buf.bytes())));
    }
    Ok(buf.bytes() / 4)
}

/// `out` overlaps none of `others`.
pub(crate) fn disjoint(field: &str, out: &Buf, others: &[&Buf]) -> Result<()> {
    if others.iter().any(|b| out.overlaps(b)) {
        return Err(Error::invalid(field, "a buffer of its own", "one that overlaps another argument"));
    }
    Ok(())
}

/// No output overlaps another output or an input; inputs may overlap.
pub(crate) fn separate<'a>(
    field: &str,
    outs: impl Iterator<Item = &'a Buf>,
    ins: impl Iterator<Item = &'a Buf>,
) -> Result<()> {
    let mut windows = Vec::new();
    for (buf, written) in outs.map(|b| (b, true)).chain(ins.map(|b| (b, false))) {
        if buf.bytes() > 0 {
            let at = start(field, buf)?.addr();
            windows.push((at, at + buf.bytes(), written));
        }
    }
    windows.sort_unstable();
    let (mut end, mut end_of_outs) = (0, 0);
    for (at, to, written) in windows {
        if at < end_of_outs || (written && at < end) {
            return Err(Error::invalid(field, "buffers of their own", "one that overlaps another"));
        }
        end = end.max(to);
        if written {
            end_of_outs = end_of_outs.max(to);
        }
    }
    Ok(())
}

/// Both are the same window.
pub(crate) fn same(a: &Buf, b: &Buf) -> bool {
    a.bytes() == b.bytes() && (a.bytes() == 0 || a.offset() == b.offset()) && a.overlaps(b)
}

/// A slice that threads fill in disjoint pieces.
pub(crate) struct Pieces<'a, T> {
    at: *mut T,
    len: usize,
    owner: PhantomData<&'a mut [T]>,
}

// SAFETY: access is by `piece`, whose callers take disjoint ranges.
unsafe impl<T: Send> Sync for Pieces<'_, T> {}

impl<'a, T> Pieces<'a, T> {
    pub(crate) fn new(all: &'a mut [T]) -> Self {
        Self { at: all.as_mut_ptr(), len: all.len(), owner: PhantomData }
    }

    /// The first element, for strided writes.
    pub(crate) fn start(&self) -> *mut T {
        self.at
    }

    /// `len` elements from `from`.
    ///
    /// # Safety
    /// Pieces that are alive at the same time do not overlap.
    #[allow(clippy::mut_from_ref)] // that is the purpose
    pub(crate) unsafe fn piece(&self, from: usize, len: usize) -> &mut [T] {
        assert!(from <= self.len && len <= self.len - from, "piece inside the slice");
        // SAFETY: in bounds by the assertion, exclusive by the contract.
        unsafe { std::slice::from_raw_parts_mut(self.at.add(from), len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    fn buf(bytes: usize) -> Buf {
        Buf::new(Arc::new(Mem::zeroed(bytes).unwrap()), bytes)
    }

    #[test]
    fn memory_is_zeroed_and_aligned() {
        for n in [0, 1, 127, 4096, 1 << 20] {
            let b = buf(n);
            let all = bytes("b", &b).unwrap();
            assert_eq!(all.as_ptr().addr() % ALIGN, 0);
            assert!(all.iter().all(|&x| x == 0) && all.len() == n);
        }
    }

    #[test]
    fn impossible_sizes_are_typed_errors() {
        for n in [usize::MAX, usize::MAX - 100, isize::MAX as usize] {
            assert!(matches!(Mem::zeroed(n), Err(Error::OutOfMemory { .. })));
        }
        assert_eq!(size("x", &[1 << 40, 1 << 40]).unwrap_err().code(), "InvalidArgument");
    }

    #[test]
    fn foreign_and_misaligned_buffers_are_refused() {
        let foreign = Buf::new(Arc::new(7u32), 16);
        assert_eq!(bytes("x", &foreign).unwrap_err().code(), "InvalidArgument");
        let odd = buf(64).slice(1..17).unwrap();
        assert_eq!(f32s("x", &odd, 4).unwrap_err().code(), "InvalidArgument");
        assert_eq!(f32s("x", &buf(16), 5).unwrap_err().code(), "InvalidArgument");
    }
}
