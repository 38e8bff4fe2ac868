//! Calls that write and read tiles outside attention.

use std::sync::{Arc, Mutex, PoisonError};

use kvasir_core::tile::pi;
use kvasir_core::{
    Buf, Codes, Error, KeySpace, Result, Role, RopeArg, RowWrite, TILE_ROWS, Tile, check, tile_bytes,
    value_offset,
};

use crate::Cpu;
use crate::arch::all::tile::{Store, copy_row, encode_row};
use crate::mem;
use crate::pool::scratch;

/// Where the parts of a tile lie.
#[derive(Clone, Copy)]
pub(super) struct Shape {
    pub(super) stores: [Store; 2],
    pub(super) dims: [usize; 2],
    /// Offset of the value part.
    values: usize,
    /// Bytes of the parts.
    parts: [usize; 2],
    /// Bytes of the record.
    bytes: usize,
}

impl Shape {
    pub(super) fn new(field: &str, codes: &Codes, k_dim: u16, v_dim: u16) -> Result<Self> {
        let dims = [k_dim as usize, v_dim as usize];
        for (name, dim) in [("kDim", dims[0]), ("vDim", dims[1])] {
            check::at_least(&format!("{field}.{name}"), dim, 1)?;
        }
        let at = format!("{field}.codes");
        Ok(Self {
            stores: [Store::of(&at, &codes[0])?, Store::of(&at, &codes[1])?],
            dims,
            values: value_offset(codes, dims[0])?,
            parts: [codes[0].format.part_bytes(dims[0])?, codes[1].format.part_bytes(dims[1])?],
            bytes: tile_bytes(codes, dims[0], dims[1])?,
        })
    }

    /// Key part and value part of a tile.
    pub(super) fn parts<'a>(&self, field: &str, tile: &'a Buf) -> Result<[&'a [u8]; 2]> {
        check::equal(field, "bytes", self.bytes, tile.bytes())?;
        let all = mem::bytes(field, tile)?;
        Ok([&all[..self.parts[0]], &all[self.values..][..self.parts[1]]])
    }

    /// Key part and value part of a tile, to write.
    #[allow(clippy::mut_from_ref)] // as `mem::bytes_mut`
    fn parts_mut<'a>(&self, field: &str, tile: &'a Buf) -> Result<[&'a mut [u8]; 2]> {
        check::equal(field, "bytes", self.bytes, tile.bytes())?;
        let (keys, values) = mem::bytes_mut(field, tile)?.split_at_mut(self.values);
        Ok([&mut keys[..self.parts[0]], &mut values[..self.parts[1]]])
    }
}

const ROLES: [Role; 2] = [Role::Key, Role::Value];

/// Every number fits the format.
fn storable(what: &str, rows: &[f32], dim: usize, store: Store) -> Result<()> {
    let limit = store.limit();
    match rows.iter().position(|x| x.is_nan() || x.abs() > limit) {
        None => Ok(()),
        Some(i) => Err(Error::NonFinite { what: format!("{what} as {}", store.format()), row: i / dim }),
    }
}

pub(super) fn append(
    cpu: &Cpu,
    k: &Buf,
    v: &Buf,
    heads: usize,
    shape: &Shape,
    codes: &Codes,
    rope: Option<&(RopeArg, Arc<[u32]>)>,
    writes: &[RowWrite],
) -> Result<()> {
    check::at_least("append.kvHeads", heads, 1)?;
    for code in codes {
        if !code.format.is_dense() {
            return Err(Error::invalid("append.codes", "f32, f16 or bf16", code.format));
        }
    }
    let [d, dv] = shape.dims;
    let numbers = mem::floats("append.k", k)?;
    let n = numbers / (heads * d);
    let k = mem::f32s("append.k", k, n * heads * d)?;
    let v = mem::f32s("append.v", v, n * heads * dv)?;
    for (i, w) in writes.iter().enumerate() {
        let at = |f: &str| format!("append.writes[{i}].{f}");
        for (name, value, end) in [
            ("src", w.src as usize, n),
            ("head", w.head as usize, heads),
            ("slot", w.slot as usize, TILE_ROWS),
        ] {
            if value >= end {
                return Err(Error::invalid(at(name), format_args!("a number below {end}"), value));
            }
        }
        shape.parts(&at("tile"), &w.tile)?;
    }
    // Only rows that are written matter, but a bad number anywhere means that the caller is in trouble.
    storable("append.k", k, heads * d, shape.stores[0])?;
    storable("append.v", v, heads * dv, shape.stores[1])?;
    let mut rotated = Vec::new();
    if let Some((arg, pos)) = rope.filter(|_| codes[0].space == KeySpace::Rotated) {
        check::equal("append.rope", "positions", n, pos.len())?;
        let last = pos.iter().copied().max().unwrap_or(0);
        if let Some(table) = cpu.ropes.get("append.rope", Some(arg), d, last)? {
            rotated = k.to_vec();
            let mut spare = Vec::new();
            for (row, &pos) in rotated.chunks_exact_mut(heads * d).zip(pos.iter()) {
                row.chunks_exact_mut(d).for_each(|head| table.rotate(head, pos, &mut spare));
            }
            storable("append.k", &rotated, heads * d, shape.stores[0])?;
        }
    }
    let k = if rotated.is_empty() { k } else { &rotated };
    for w in writes {
        let row = w.src as usize * heads + w.head as usize;
        let [keys, values] = shape.parts_mut("append.writes.tile", &w.tile)?;
        encode_row(Role::Key, shape.stores[0], keys, w.slot as usize, &k[row * d..][..d]);
        encode_row(Role::Value, shape.stores[1], values, w.slot as usize, &v[row * dv..][..dv]);
    }
    Ok(())
}

/// Decodes one part to natural rows `[32, dim]`; rows beyond `rows` are zero. `turned` is scratch `[32, dim]`.
fn decode_part(
    cpu: &Cpu,
    role: Role,
    shape: &Shape,
    part: &[u8],
    rows: usize,
    turned: &mut [f32],
    out: &mut [f32],
) {
    let i = usize::from(role == Role::Value);
    let dim = shape.dims[i];
    match role {
        Role::Key => (cpu.kernels.decode_keys)(shape.stores[i], part, &[], dim, turned),
        Role::Value => (cpu.kernels.decode_values)(shape.stores[i], part, &[], dim, turned),
    }
    for (t, row) in out.chunks_exact_mut(dim).enumerate() {
        if t >= rows {
            row.fill(0.0);
        } else if role == Role::Key {
            row.iter_mut().enumerate().for_each(|(c, x)| *x = turned[c * TILE_ROWS + pi(t)]);
        } else {
            row.copy_from_slice(&turned[pi(t) * dim..][..dim]);
        }
    }
}

/// A count of rows of a tile.
fn at_most_a_tile(field: &str, rows: usize) -> Result<()> {
    if rows > TILE_ROWS { Err(Error::invalid(field, "at most 32 rows", rows)) } else { Ok(()) }
}

pub(super) fn seal(
    cpu: &Cpu,
    from_codes: &Codes,
    to_codes: &Codes,
    k_dim: u16,
    v_dim: u16,
    tiles: &[(Buf, Buf, u8)],
) -> Result<()> {
    let from_shape = Shape::new("seal.from", from_codes, k_dim, v_dim)?;
    let to_shape = Shape::new("seal.to", to_codes, k_dim, v_dim)?;
    if from_codes[0].space != to_codes[0].space {
        return Err(Error::unsupported("seal: keys change between plain and rotated without positions"));
    }
    for (i, (from, to, rows)) in tiles.iter().enumerate() {
        from_shape.parts(&format!("seal.tiles[{i}].from"), from)?;
        to_shape.parts(&format!("seal.tiles[{i}].to"), to)?;
        at_most_a_tile(&format!("seal.tiles[{i}].rows"), *rows as usize)?;
    }
    mem::separate("seal.tiles.to", tiles.iter().map(|t| &t.1), tiles.iter().map(|t| &t.0))?;
    let numbers = TILE_ROWS * from_shape.dims[0].max(from_shape.dims[1]);
    // The trouble of the first tile that has one, whichever thread finds it first.
    let trouble = Mutex::new(None);
    // Coding a number takes about ten operations.
    cpu.pool.each(tiles.len(), tiles.len() * numbers * 20, |i| {
        let done = scratch(2 * numbers, |s| seal_one(cpu, &from_shape, &to_shape, &tiles[i], s));
        if let Err(error) = done {
            let mut first = trouble.lock().unwrap_or_else(PoisonError::into_inner);
            if first.as_ref().is_none_or(|(j, _)| i < *j) {
                *first = Some((i, error));
            }
        }
    });
    trouble.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), |(_, error)| Err(error))
}

/// Codes one tile.
fn seal_one(
    cpu: &Cpu,
    from_shape: &Shape,
    to_shape: &Shape,
    tile: &(Buf, Buf, u8),
    s: &mut [f32],
) -> Result<()> {
    let (from, to, rows) = tile;
    let from = from_shape.parts("seal.from", from)?;
    let to = to_shape.parts_mut("seal.to", to)?;
    let (turned, natural) = s.split_at_mut(s.len() / 2);
    for (i, role) in ROLES.into_iter().enumerate() {
        let (dim, store) = (from_shape.dims[i], to_shape.stores[i]);
        let out = &mut natural[..TILE_ROWS * dim];
        decode_part(cpu, role, from_shape, from[i], *rows as usize, &mut turned[..TILE_ROWS * dim], out);
        storable("seal", out, dim, store)?;
        for (t, row) in out.chunks_exact(dim).enumerate() {
            encode_row(role, store, to[i], t, row);
        }
    }
    Ok(())
}

pub(super) fn decode(
    cpu: &Cpu,
    shape: &Shape,
    tile: &Buf,
    rows: usize,
    k_out: &Buf,
    v_out: &Buf,
) -> Result<()> {
    let parts = shape.parts("decode.tile", tile)?;
    at_most_a_tile("decode.rows", rows)?;
    mem::disjoint("decode.kOut", k_out, &[tile, v_out])?;
    mem::disjoint("decode.vOut", v_out, &[tile])?;
    mem::f32s("decode.vOut", v_out, TILE_ROWS * shape.dims[1])?;
    for (i, (role, out)) in ROLES.into_iter().zip([k_out, v_out]).enumerate() {
        let out = mem::f32s_mut("decode.kOut", out, TILE_ROWS * shape.dims[i])?;
        decode_part(cpu, role, shape, parts[i], rows, &mut vec![0.0; out.len()], out);
    }
    Ok(())
}

pub(super) fn compact(shape: &Shape, src: &[Tile], idx: &[u32], dst: &[Buf]) -> Result<()> {
    check::equal("compact.dst", "tiles", idx.len().div_ceil(TILE_ROWS), dst.len())?;
    let from: Vec<[&[u8]; 2]> = src
        .iter()
        .enumerate()
        .map(|(i, t)| shape.parts(&format!("compact.src[{i}]"), &t.codes))
        .collect::<Result<_>>()?;
    for (i, d) in dst.iter().enumerate() {
        shape.parts(&format!("compact.dst[{i}]"), d)?;
    }
    mem::separate("compact.dst", dst.iter(), src.iter().map(|t| &t.codes))?;
    if let Some(i) = idx.iter().find(|&&i| i as usize >= src.len() * TILE_ROWS) {
        return Err(Error::invalid("compact.idx", format_args!("rows below {}", src.len() * TILE_ROWS), i));
    }
    let zeros = [vec![0.0f32; shape.dims[0]], vec![0.0f32; shape.dims[1]]];
    for (dst, idx) in dst.iter().zip(idx.chunks(TILE_ROWS)) {
        let to = shape.parts_mut("compact.dst", dst)?;
        for (i, role) in ROLES.into_iter().enumerate() {
            let store = shape.stores[i];
            for t in 0..TILE_ROWS {
                match idx.get(t) {
                    Some(&s) => {
                        let (tile, row) = (s as usize / TILE_ROWS, s as usize % TILE_ROWS);
                        copy_row(role, store, from[tile][i], row, to[i], t, shape.dims[i]);
                    }
                    None => encode_row(role, store, to[i], t, &zeros[i]),
                }
            }
        }
    }
    Ok(())
}
