//! T32 parts, one number at a time.
//!
//! Decoded keys lie as `[D, 32]`, decoded values as `[32, Dv]`, rows in the order `pi`, in which everything beside the tiles
//! lies too. The 8-bit format: scale = absmax / 127 rounded to f16 before coding, code = round half even, stored + 128.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use kvasir_core::tile::{key8, key16, pi, row_params8, value8, value16};
use kvasir_core::{Code, Error, Format, Result, Role, TILE_ROWS};

/// Formats that have kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Store {
    F32,
    F16,
    Bf16,
    Int8,
}

impl Store {
    /// The kernels of a code.
    pub(crate) fn of(field: &str, code: &Code) -> Result<Self> {
        code.check(field)?;
        Ok(match code.format {
            Format::F32 => Self::F32,
            Format::F16 => Self::F16,
            Format::Bf16 => Self::Bf16,
            Format::INT8 => Self::Int8,
            other => {
                return Err(Error::unsupported(format!(
                    "{field}: format {other} has no kernel in this build"
                )));
            }
        })
    }

    pub(crate) fn format(self) -> Format {
        match self {
            Self::F32 => Format::F32,
            Self::F16 => Format::F16,
            Self::Bf16 => Format::Bf16,
            Self::Int8 => Format::INT8,
        }
    }

    /// Channels as stored.
    pub(crate) fn padded(self, dim: usize) -> usize {
        self.format().padded(dim)
    }

    /// Largest magnitude that stays finite when stored.
    pub(crate) fn limit(self) -> f32 {
        match self {
            Self::F32 => f32::MAX,
            Self::Bf16 => bf16::MAX.to_f32(),
            Self::F16 => 65504.0,
            Self::Int8 => 65504.0 * 127.0,
        }
    }
}

/// Address of a 16-bit number of a key or value row.
#[inline]
fn at16(role: Role, t: usize, c: usize, d: usize) -> usize {
    match role {
        Role::Key => key16(t, c, d),
        Role::Value => value16(t, c, d),
    }
}

/// Address of an 8-bit number of a key or value row.
#[inline]
fn at8(role: Role, t: usize, c: usize, d: usize) -> usize {
    match role {
        Role::Key => key8(t, c, d),
        Role::Value => value8(t, c, d),
    }
}

/// Channels coded at once.
const PIECE: usize = 64;
/// Adding and subtracting it rounds to an integer, half to even, below 2^22.
const ROUND: f32 = 12_582_912.0;

/// Codes one row into its slot of a part. The row is finite and within the limit of the format.
pub(crate) fn encode_row(role: Role, store: Store, part: &mut [u8], t: usize, row: &[f32]) {
    let d = store.padded(row.len());
    match store {
        Store::F32 => {
            for (to, x) in part[t * d * 4..][..d * 4].chunks_exact_mut(4).zip(row) {
                to.copy_from_slice(&x.to_le_bytes());
            }
        }
        Store::F16 => encode16(role, part, t, d, row, |from, to| {
            let mut halves = [f16::ZERO; PIECE];
            halves[..from.len()].convert_from_f32_slice(from);
            to.copy_from_slice(halves.reinterpret_cast());
        }),
        Store::Bf16 => encode16(role, part, t, d, row, |from, to| {
            let mut halves = [bf16::ZERO; PIECE];
            halves[..from.len()].convert_from_f32_slice(from);
            to.copy_from_slice(halves.reinterpret_cast());
        }),
        Store::Int8 => {
            let top = row.iter().fold(0.0f32, |m, x| m.max(x.abs()));
            let scale = f16::from_f32(top / 127.0);
            let s = scale.to_f32();
            for from in (0..d).step_by(PIECE) {
                let mut codes = [128u8; PIECE];
                // A row too small for its scale is zero, like the padding.
                if s > 0.0 && from < row.len() {
                    for (code, x) in codes.iter_mut().zip(&row[from..]) {
                        let rounded = (x / s).clamp(-127.0, 127.0) + ROUND - ROUND;
                        *code = (rounded as i32 + 128) as u8;
                    }
                }
                for (c, code) in (from..d).zip(codes) {
                    part[at8(role, t, c, d)] = code;
                }
            }
            let params = row_params8(t, d);
            part[params..params + 2].copy_from_slice(&scale.to_le_bytes());
            part[params + 2..params + 4].copy_from_slice(&f16::ZERO.to_le_bytes());
        }
    }
}

/// Converts a row to 16 bits, piece by piece, and puts the numbers in their places; padding is zero.
fn encode16(
    role: Role,
    part: &mut [u8],
    t: usize,
    d: usize,
    row: &[f32],
    convert: impl Fn(&[f32], &mut [u16]),
) {
    let mut bits = [0u16; PIECE];
    for from in (0..d).step_by(PIECE) {
        let end = row.len().min(from + PIECE);
        convert(&row[from.min(end)..end], &mut bits);
        for (c, x) in (from..d).zip(bits) {
            part[at16(role, t, c, d)..][..2].copy_from_slice(&x.to_le_bytes());
        }
    }
}

/// Decodes channel `c` of row `t`.
#[inline]
fn number(role: Role, store: Store, part: &[u8], t: usize, c: usize, d: usize) -> f32 {
    let pair = |at: usize| [part[at], part[at + 1]];
    match store {
        Store::F32 => {
            let at = (t * d + c) * 4;
            f32::from_le_bytes([part[at], part[at + 1], part[at + 2], part[at + 3]])
        }
        Store::F16 => f16::from_le_bytes(pair(at16(role, t, c, d))).to_f32(),
        Store::Bf16 => bf16::from_le_bytes(pair(at16(role, t, c, d))).to_f32(),
        Store::Int8 => {
            let params = row_params8(t, d);
            let scale = f16::from_le_bytes(pair(params)).to_f32();
            let mid = f16::from_le_bytes(pair(params + 2)).to_f32();
            (f32::from(part[at8(role, t, c, d)]) - 128.0) * scale + mid
        }
    }
}

/// Decodes a key part to `[D, 32]`, rows in the order `pi`.
pub(crate) fn decode_keys(store: Store, part: &[u8], _next: &[u8], dim: usize, out: &mut [f32]) {
    let d = store.padded(dim);
    for t in 0..TILE_ROWS {
        for c in 0..dim {
            out[c * TILE_ROWS + pi(t)] = number(Role::Key, store, part, t, c, d);
        }
    }
}

/// Decodes a value part to `[32, Dv]`, rows in the order `pi`.
pub(crate) fn decode_values(store: Store, part: &[u8], _next: &[u8], dim: usize, out: &mut [f32]) {
    let d = store.padded(dim);
    for t in 0..TILE_ROWS {
        for (c, x) in out[pi(t) * dim..][..dim].iter_mut().enumerate() {
            *x = number(Role::Value, store, part, t, c, d);
        }
    }
}

/// Copies row `s` of one part to row `t` of another of the same format, codes and parameters.
pub(crate) fn copy_row(role: Role, store: Store, from: &[u8], s: usize, to: &mut [u8], t: usize, dim: usize) {
    let d = store.padded(dim);
    match store {
        Store::F32 => to[t * d * 4..][..d * 4].copy_from_slice(&from[s * d * 4..][..d * 4]),
        Store::F16 | Store::Bf16 => {
            for c in 0..d {
                let (a, b) = (at16(role, s, c, d), at16(role, t, c, d));
                to[b..b + 2].copy_from_slice(&from[a..a + 2]);
            }
        }
        Store::Int8 => {
            for c in 0..d {
                to[at8(role, t, c, d)] = from[at8(role, s, c, d)];
            }
            to[row_params8(t, d)..][..4].copy_from_slice(&from[row_params8(s, d)..][..4]);
        }
    }
}

/// Rotates decoded keys `[D, 32]`: pairs `(2i, 2i + 1)` if `adjacent`, else `(i, i + D / 2)`. `angles[p]` holds the cosines
/// and then the sines for place `p`.
pub(crate) fn rotate(keys: &mut [f32], adjacent: bool, angles: &[&[f32]; TILE_ROWS]) {
    let pairs = angles[0].len() / 2;
    for i in 0..pairs {
        let (a, b) = if adjacent { (2 * i, 2 * i + 1) } else { (i, i + pairs) };
        for (p, angles) in angles.iter().enumerate() {
            let (cos, sin) = (angles[i], angles[pairs + i]);
            let (a, b) = (a * TILE_ROWS + p, b * TILE_ROWS + p);
            let (x, y) = (keys[a], keys[b]);
            (keys[a], keys[b]) = (x * cos - y * sin, y * cos + x * sin);
        }
    }
}
