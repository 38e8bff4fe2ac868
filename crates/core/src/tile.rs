//! Addresses inside a T32 part: 32 rows of one column, in the fragment order that tensor cores read.
//!
//! A row `t` of the part lies in sub `t / 16`. Keys put rows on the fragment's rows and channels on its columns; values
//! the other way round. One number per row (scale, bias, score, column) is stored in the order [`pi`].
//! `F32` parts are plain rows.

/// Place of row `t` in everything that is one number per row of a tile.
#[inline]
pub const fn pi(t: usize) -> usize {
    (t % 8) * 4 + t / 8
}

/// Byte address of a 16-bit number. `r`, `k` are row and column inside the 16 x 16 block `j` of sub `sub`; `d` channels.
#[inline]
pub const fn at16(sub: usize, j: usize, r: usize, k: usize, d: usize) -> usize {
    sub * d * 32
        + j * 512
        + ((r % 8) * 4 + (k % 8) / 2) * 16
        + ((r >= 8) as usize + 2 * (k >= 8) as usize) * 4
        + (k % 2) * 2
}

/// Byte address of an 8-bit number.
#[inline]
pub const fn at8(sub: usize, j: usize, r: usize, k: usize, d: usize) -> usize {
    sub * d * 16
        + (j / 2) * 512
        + ((r % 8) * 4 + (k % 8) / 2) * 16
        + (j % 2) * 8
        + ((r >= 8) as usize + 2 * (k >= 8) as usize) * 2
        + k % 2
}

/// Byte address of key channel `c` of row `t`, 16-bit format, `d` padded channels.
#[inline]
pub const fn key16(t: usize, c: usize, d: usize) -> usize {
    at16(t / 16, c / 16, t % 16, c % 16, d)
}

/// Byte address of value channel `c` of row `t`, 16-bit format.
#[inline]
pub const fn value16(t: usize, c: usize, d: usize) -> usize {
    at16(t / 16, c / 16, c % 16, t % 16, d)
}

/// Byte address of key channel `c` of row `t`, 8-bit format.
#[inline]
pub const fn key8(t: usize, c: usize, d: usize) -> usize {
    at8(t / 16, c / 16, t % 16, c % 16, d)
}

/// Byte address of value channel `c` of row `t`, 8-bit format.
#[inline]
pub const fn value8(t: usize, c: usize, d: usize) -> usize {
    at8(t / 16, c / 16, c % 16, t % 16, d)
}

/// Byte address of the row parameters `{f16 scale, f16 mid}` of row `t`, 8-bit row format: behind the codes.
#[inline]
pub const fn row_params8(t: usize, d: usize) -> usize {
    32 * d + 4 * pi(t)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_address_is_used_once() {
        for d in [16, 32, 64, 128] {
            let mut seen16 = vec![0u8; 64 * d];
            let mut seen16v = seen16.clone();
            for t in 0..32 {
                for c in 0..d {
                    seen16[key16(t, c, d)] += 1;
                    seen16v[value16(t, c, d)] += 1;
                }
            }
            assert!(
                seen16.iter().step_by(2).chain(seen16v.iter().step_by(2)).all(|&n| n == 1),
                "16 bit, D {d}"
            );
            if d % 32 == 0 {
                let (mut k, mut v) = (vec![0u8; 32 * d], vec![0u8; 32 * d]);
                for t in 0..32 {
                    for c in 0..d {
                        k[key8(t, c, d)] += 1;
                        v[value8(t, c, d)] += 1;
                    }
                }
                assert!(k.iter().chain(&v).all(|&n| n == 1), "8 bit, D {d}");
            }
        }
        let mut rows: Vec<_> = (0..32).map(pi).collect();
        rows.sort_unstable();
        assert_eq!(rows, (0..32).collect::<Vec<_>>());
    }
}
