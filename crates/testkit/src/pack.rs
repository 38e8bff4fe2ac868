//! The naive packer: rows to T32 tiles and back, number by number, and the block formats of weights. What a backend stores
//! is compared with this byte by byte.
//!
//! int8: symmetric, scale = f16(absmax / 127) per row, code = round(x / scale) + 128, mid 0; padded channels hold zeros.

use half::{bf16, f16};
use kvasir_core::{Codes, Format, TILE_ROWS, WeightType, tile, tile_bytes, value_offset};

use crate::Noise;

/// Which part of a tile.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PartOf {
    /// Keys.
    Key,
    /// Values.
    Value,
}

fn place16(part: PartOf, t: usize, c: usize, d: usize) -> usize {
    if part == PartOf::Key { tile::key16(t, c, d) } else { tile::value16(t, c, d) }
}

fn place8(part: PartOf, t: usize, c: usize, d: usize) -> usize {
    if part == PartOf::Key { tile::key8(t, c, d) } else { tile::value8(t, c, d) }
}

fn put16(bytes: &mut [u8], at: usize, x: u16) {
    bytes[at..at + 2].copy_from_slice(&x.to_le_bytes());
}

fn get16(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

/// Scale and codes of one row of int8, not yet offset by 128.
pub fn code_row(row: &[f32]) -> (f16, Vec<i8>) {
    let most = row.iter().fold(0f32, |m, x| m.max(x.abs()));
    let scale = f16::from_f32(most / 127.0);
    let s = scale.to_f32();
    let code = |x: &f32| if s == 0.0 { 0 } else { (x / s).round_ties_even().clamp(-127.0, 127.0) as i8 };
    (scale, row.iter().map(code).collect())
}

/// Writes row `t` into a part.
pub fn put_row(format: Format, part: PartOf, bytes: &mut [u8], t: usize, row: &[f32]) {
    let d = format.padded(row.len());
    match format {
        Format::F32 => {
            for (c, x) in row.iter().enumerate() {
                bytes[4 * (t * d + c)..][..4].copy_from_slice(&x.to_le_bytes());
            }
        }
        Format::F16 | Format::Bf16 => {
            for c in 0..d {
                let x = row.get(c).copied().unwrap_or(0.0);
                let bits = if format == Format::F16 {
                    f16::from_f32(x).to_bits()
                } else {
                    bf16::from_f32(x).to_bits()
                };
                put16(bytes, place16(part, t, c, d), bits);
            }
        }
        Format::INT8 => {
            let (scale, codes) = code_row(row);
            for c in 0..d {
                bytes[place8(part, t, c, d)] = (i16::from(codes.get(c).copied().unwrap_or(0)) + 128) as u8;
            }
            put16(bytes, tile::row_params8(t, d), scale.to_bits());
            put16(bytes, tile::row_params8(t, d) + 2, 0);
        }
        other => panic!("the packer does not know {other}"),
    }
}

/// Reads row `t` of a part.
pub fn get_row(format: Format, part: PartOf, bytes: &[u8], t: usize, dim: usize) -> Vec<f32> {
    let d = format.padded(dim);
    (0..dim)
        .map(|c| match format {
            Format::F32 => {
                let at = 4 * (t * d + c);
                f32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
            }
            Format::F16 => f16::from_bits(get16(bytes, place16(part, t, c, d))).to_f32(),
            Format::Bf16 => bf16::from_bits(get16(bytes, place16(part, t, c, d))).to_f32(),
            Format::INT8 => {
                let at = tile::row_params8(t, d);
                let (scale, mid) = (f16::from_bits(get16(bytes, at)), f16::from_bits(get16(bytes, at + 2)));
                scale.to_f32() * (f32::from(bytes[place8(part, t, c, d)]) - 128.0) + mid.to_f32()
            }
            other => panic!("the packer does not know {other}"),
        })
        .collect()
}

/// A tile of up to 32 rows: `k` `[rows, D]`, `v` `[rows, Dv]`.
pub fn pack(codes: &Codes, k_dim: usize, v_dim: usize, k: &[f32], v: &[f32]) -> Vec<u8> {
    let mut bytes = vec![0; tile_bytes(codes, k_dim, v_dim).expect("a code of this build")];
    let at = value_offset(codes, k_dim).expect("a code of this build");
    for (t, row) in k.chunks_exact(k_dim).enumerate() {
        put_row(codes[0].format, PartOf::Key, &mut bytes, t, row);
    }
    for (t, row) in v.chunks_exact(v_dim).enumerate() {
        put_row(codes[1].format, PartOf::Value, &mut bytes[at..], t, row);
    }
    bytes
}

/// The first `rows` rows of a tile: `[rows, D]`, `[rows, Dv]`.
pub fn unpack(codes: &Codes, k_dim: usize, v_dim: usize, bytes: &[u8], rows: usize) -> (Vec<f32>, Vec<f32>) {
    assert!(rows <= TILE_ROWS, "a tile has {TILE_ROWS} rows");
    let at = value_offset(codes, k_dim).expect("a code of this build");
    let k = (0..rows).flat_map(|t| get_row(codes[0].format, PartOf::Key, bytes, t, k_dim)).collect();
    let v = (0..rows).flat_map(|t| get_row(codes[1].format, PartOf::Value, &bytes[at..], t, v_dim)).collect();
    (k, v)
}

/// Numbers that lie beside tiles: `[tiles, 32]` in the order `pi`, padded with `pad`.
pub fn beside(values: &[f32], pad: f32) -> Vec<f32> {
    let mut out = vec![pad; values.len().div_ceil(TILE_ROWS) * TILE_ROWS];
    for (i, &x) in values.iter().enumerate() {
        out[i / TILE_ROWS * TILE_ROWS + tile::pi(i % TILE_ROWS)] = x;
    }
    out
}

/// Back from [`beside`].
pub fn in_row_order(stored: &[f32], rows: usize) -> Vec<f32> {
    (0..rows).map(|i| stored[i / TILE_ROWS * TILE_ROWS + tile::pi(i % TILE_ROWS)]).collect()
}

/// Random blocks of a weight matrix and the numbers they stand for.
pub fn weight(kind: WeightType, rows: usize, cols: usize, noise: &mut Noise) -> (Vec<u8>, Vec<f64>) {
    let (mut bytes, mut values) = (Vec::new(), Vec::new());
    let (per, _) = kind.block();
    for _ in 0..rows * cols / per {
        let x = noise.normal() as f32 * 0.2;
        match kind {
            WeightType::F32 => {
                bytes.extend(x.to_le_bytes());
                values.push(f64::from(x));
            }
            WeightType::F16 => {
                bytes.extend(f16::from_f32(x).to_le_bytes());
                values.push(f16::from_f32(x).to_f64());
            }
            WeightType::Bf16 => {
                bytes.extend(bf16::from_f32(x).to_le_bytes());
                values.push(bf16::from_f32(x).to_f64());
            }
            WeightType::Q8_0 => {
                let scale = f16::from_f32(x / 64.0);
                bytes.extend(scale.to_le_bytes());
                for _ in 0..32 {
                    let code = noise.bits() as u8 as i8;
                    bytes.push(code as u8);
                    values.push(scale.to_f64() * f64::from(code));
                }
            }
            WeightType::Q4_0 | WeightType::Q4_1 => {
                let scale = f16::from_f32(x / 4.0);
                let min = f16::from_f32(noise.normal() as f32 * 0.2);
                bytes.extend(scale.to_le_bytes());
                if kind == WeightType::Q4_1 {
                    bytes.extend(min.to_le_bytes());
                }
                let nibbles: Vec<u8> = (0..16).map(|_| noise.bits() as u8).collect();
                bytes.extend(&nibbles);
                // Number j of a block is the low nibble of byte j, number j + 16 the high one.
                for code in nibbles.iter().map(|b| b & 15).chain(nibbles.iter().map(|b| b >> 4)) {
                    values.push(match kind {
                        WeightType::Q4_0 => scale.to_f64() * (f64::from(code) - 8.0),
                        _ => scale.to_f64() * f64::from(code) + min.to_f64(),
                    });
                }
            }
        }
    }
    (bytes, values)
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvasir_core::Code;

    #[test]
    fn rows_come_back_within_half_a_step() {
        let mut noise = Noise::new(1);
        for dim in [8, 64, 80, 128] {
            for (format, step) in
                [(Format::F32, 0.0), (Format::F16, 1e-3), (Format::Bf16, 8e-3), (Format::INT8, 1.0 / 127.0)]
            {
                let codes = [Code::rotated(format), Code::plain(format)];
                let (k, v) = (noise.normals(19 * dim), noise.normals(19 * dim));
                let bytes = pack(&codes, dim, dim, &k, &v);
                let (k2, v2) = unpack(&codes, dim, dim, &bytes, 19);
                for (a, b) in k.chunks(dim).chain(v.chunks(dim)).zip(k2.chunks(dim).chain(v2.chunks(dim))) {
                    let most = a.iter().fold(0f32, |m, x| m.max(x.abs()));
                    for (x, y) in a.iter().zip(b) {
                        assert!((x - y).abs() <= 0.51 * step * most, "{format} D {dim}: {x} {y}");
                    }
                }
            }
        }
    }

    #[test]
    fn a_row_of_zeros_stays_zero_and_its_largest_number_is_127() {
        let (scale, codes) = code_row(&[0.0; 4]);
        assert_eq!((scale.to_f32(), codes), (0.0, vec![0; 4]));
        assert_eq!(code_row(&[1.0, -2.0]).1, [64, -127]);
    }

    #[test]
    fn columns_go_to_pi_order_and_back() {
        let x: Vec<f32> = (0..45u8).map(f32::from).collect();
        let stored = beside(&x, -1.0);
        assert_eq!((stored.len(), stored[1], stored[4]), (64, 8.0, 1.0));
        assert_eq!(in_row_order(&stored, 45), x);
    }
}
