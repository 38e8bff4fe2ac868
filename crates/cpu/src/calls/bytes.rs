//! Calls that move bytes.

use kvasir_core::tile::pi;
use kvasir_core::{Buf, Error, Result, TILE_ROWS, check};

use crate::mem;

pub(super) fn write(dst: &Buf, data: &[u8]) -> Result<()> {
    check::equal("write.data", "bytes", dst.bytes(), data.len())?;
    mem::bytes_mut("write.dst", dst)?.copy_from_slice(data);
    Ok(())
}

pub(super) fn copy(src: &Buf, dst: &Buf) -> Result<()> {
    check::equal("copy.dst", "bytes", src.bytes(), dst.bytes())?;
    mem::disjoint("copy.dst", dst, &[src])?;
    let from = mem::bytes("copy.src", src)?;
    mem::bytes_mut("copy.dst", dst)?.copy_from_slice(from);
    Ok(())
}

pub(super) fn fill(dst: &Buf, value: f32) -> Result<()> {
    let n = mem::floats("fill.dst", dst)?;
    mem::f32s_mut("fill.dst", dst, n)?.fill(value);
    Ok(())
}

/// Every index is below the rows that `bytes` hold.
fn indices(field: &str, idx: &[u32], rows: usize) -> Result<()> {
    match idx.iter().find(|&&i| i as usize >= rows) {
        None => Ok(()),
        Some(i) => Err(Error::invalid(field, format_args!("rows below {rows}"), i)),
    }
}

pub(super) fn gather(src: &Buf, idx: &[u32], row: usize, dst: &Buf) -> Result<()> {
    check::at_least("gather.rowBytes", row, 1)?;
    check::equal("gather.dst", "bytes", mem::size("gather.dst", &[idx.len(), row])?, dst.bytes())?;
    indices("gather.idx", idx, src.bytes() / row)?;
    mem::disjoint("gather.dst", dst, &[src])?;
    let from = mem::bytes("gather.src", src)?;
    let to = mem::bytes_mut("gather.dst", dst)?;
    for (to, &i) in to.chunks_exact_mut(row).zip(idx) {
        to.copy_from_slice(&from[i as usize * row..][..row]);
    }
    Ok(())
}

pub(super) fn scatter(src: &Buf, idx: &[u32], row: usize, dst: &Buf) -> Result<()> {
    check::at_least("scatter.rowBytes", row, 1)?;
    check::equal("scatter.src", "bytes", mem::size("scatter.src", &[idx.len(), row])?, src.bytes())?;
    indices("scatter.idx", idx, dst.bytes() / row)?;
    mem::disjoint("scatter.dst", dst, &[src])?;
    let from = mem::bytes("scatter.src", src)?;
    let to = mem::bytes_mut("scatter.dst", dst)?;
    for (from, &i) in from.chunks_exact(row).zip(idx) {
        to[i as usize * row..][..row].copy_from_slice(from);
    }
    Ok(())
}

/// Place of row `i` in a column beside tiles.
#[inline]
fn place(i: usize) -> usize {
    i / TILE_ROWS * TILE_ROWS + pi(i % TILE_ROWS)
}

/// Rows of `dst` beyond `idx` become zero, so that rows that arrive later start there.
pub(super) fn compact_column(src: &Buf, idx: &[u32], dst: &Buf) -> Result<()> {
    let (have, room) = (mem::floats("compactColumn.src", src)?, mem::floats("compactColumn.dst", dst)?);
    let whole = |n: usize| n / TILE_ROWS * TILE_ROWS;
    indices("compactColumn.idx", idx, whole(have))?;
    if whole(room) < idx.len() {
        return Err(Error::invalid(
            "compactColumn.dst",
            format_args!("room for {} rows", idx.len()),
            format_args!("{} rows", whole(room)),
        ));
    }
    mem::disjoint("compactColumn.dst", dst, &[src])?;
    let from = mem::f32s("compactColumn.src", src, have)?;
    let to = mem::f32s_mut("compactColumn.dst", dst, room)?;
    to.fill(0.0);
    for (i, &s) in idx.iter().enumerate() {
        to[place(i)] = from[place(s as usize)];
    }
    Ok(())
}
