//! T32 parts, a fragment at a time.
//!
//! In a key part the sixteen bytes of a lane hold channels `2q, 2q + 1 (+ 8)` of rows `r` and `r + 8`; the lanes of both
//! halves of the tile, shuffled and interleaved, give four neighbours in the order `pi` for each channel. In a value part
//! the roles are swapped, and eight lanes transposed give eight neighbouring channels of a row.

#[allow(clippy::wildcard_imports)] // intrinsics
use std::arch::x86_64::*;

use kvasir_core::TILE_ROWS;

use super::{load, store};
use crate::arch::Store;

/// 32 bytes of a part.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn bytes(part: &[u8], at: usize) -> __m256i {
    let from: &[u8; 32] = part[at..at + 32].try_into().expect("32 bytes");
    // SAFETY: 32 bytes are there.
    unsafe { _mm256_loadu_si256(from.as_ptr().cast()) }
}

/// 32 bytes of a part; the first half of a cache line asks for the same line of `next`. Hardware does not foresee the order
/// in which lanes are read, and a whole part asked for at once is slower than none.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn bytes_ahead(part: &[u8], next: &[u8], at: usize) -> __m256i {
    if at.is_multiple_of(64)
        && let Some(line) = next.get(at)
    {
        // SAFETY: a prefetch reads nothing.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(std::ptr::from_ref(line).cast()) }
    }
    bytes(part, at)
}

/// Eight 16-bit numbers to f32.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn widen<const BF16: bool>(x: __m128i) -> __m256 {
    if BF16 {
        _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(x)))
    } else {
        _mm256_cvtph_ps(x)
    }
}

/// The first `n` of eight numbers.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn store_some(to: &mut [f32], x: __m256, n: usize) {
    if n >= 8 {
        store(to, x);
    } else {
        let mut all = [0.0; 8];
        store(&mut all, x);
        to[..n].copy_from_slice(&all[..n]);
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn keys16<const BF16: bool>(part: &[u8], next: &[u8], dim: usize, d: usize, out: &mut [f32]) {
    // [khi][rhi][klo] to [khi][klo][rhi], in both lanes.
    let order = _mm256_setr_epi8(
        0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15, 0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11,
        14, 15,
    );
    for j in 0..d / 16 {
        for q in [0, 2] {
            for r in (0..8).step_by(2) {
                let lane = |sub: usize, r: usize| {
                    let at = sub * d * 32 + j * 512 + (r * 4 + q) * 16;
                    _mm256_shuffle_epi8(bytes_ahead(part, next, at), order)
                };
                let (a0, a1, b0, b1) = (lane(0, r), lane(1, r), lane(0, r + 1), lane(1, r + 1));
                let (al, ah) = (_mm256_unpacklo_epi32(a0, a1), _mm256_unpackhi_epi32(a0, a1));
                let (bl, bh) = (_mm256_unpacklo_epi32(b0, b1), _mm256_unpackhi_epi32(b0, b1));
                let channels = [
                    (0, _mm256_unpacklo_epi64(al, bl)),
                    (1, _mm256_unpackhi_epi64(al, bl)),
                    (8, _mm256_unpacklo_epi64(ah, bh)),
                    (9, _mm256_unpackhi_epi64(ah, bh)),
                ];
                for (c, x) in channels {
                    for (half, x) in
                        [_mm256_castsi256_si128(x), _mm256_extracti128_si256::<1>(x)].into_iter().enumerate()
                    {
                        let c = j * 16 + c + (q + half) * 2;
                        if c < dim {
                            store(&mut out[c * TILE_ROWS + r * 4..], widen::<BF16>(x));
                        }
                    }
                }
            }
        }
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn values16<const BF16: bool>(part: &[u8], next: &[u8], dim: usize, d: usize, out: &mut [f32]) {
    for sub in 0..2 {
        for j in 0..d / 16 {
            for q in [0, 2] {
                let x: [__m256i; 8] = std::array::from_fn(|r| {
                    bytes_ahead(part, next, sub * d * 32 + j * 512 + (r * 4 + q) * 16)
                });
                // Transpose 8 x 8 of 16 bits in both lanes.
                let (a, b) = (
                    [0, 2, 4, 6].map(|i: usize| _mm256_unpacklo_epi16(x[i], x[i + 1])),
                    [0, 2, 4, 6].map(|i: usize| _mm256_unpackhi_epi16(x[i], x[i + 1])),
                );
                let quads = |y: [__m256i; 4]| {
                    let (l, h) = (_mm256_unpacklo_epi32(y[0], y[1]), _mm256_unpackhi_epi32(y[0], y[1]));
                    let (m, i) = (_mm256_unpacklo_epi32(y[2], y[3]), _mm256_unpackhi_epi32(y[2], y[3]));
                    [
                        _mm256_unpacklo_epi64(l, m),
                        _mm256_unpackhi_epi64(l, m),
                        _mm256_unpacklo_epi64(h, i),
                        _mm256_unpackhi_epi64(h, i),
                    ]
                };
                // Columns in the order [khi][rhi][klo].
                for (khi, columns) in [quads(a), quads(b)].into_iter().enumerate() {
                    for (i, x) in columns.into_iter().enumerate() {
                        let (rhi, klo) = (i / 2, i % 2);
                        let c = j * 16 + rhi * 8;
                        if c >= dim {
                            continue;
                        }
                        for (half, x) in [_mm256_castsi256_si128(x), _mm256_extracti128_si256::<1>(x)]
                            .into_iter()
                            .enumerate()
                        {
                            let row = ((q + half) * 2 + klo) * 4 + sub * 2 + khi;
                            store_some(&mut out[row * dim + c..], widen::<BF16>(x), dim - c);
                        }
                    }
                }
            }
        }
    }
}

/// Scales and middles of the rows, in the order `pi`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn params(part: &[u8], d: usize) -> ([f32; TILE_ROWS], [f32; TILE_ROWS]) {
    let split = _mm256_setr_epi8(
        0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15, 0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11,
        14, 15,
    );
    let (mut scale, mut mid) = ([0.0; TILE_ROWS], [0.0; TILE_ROWS]);
    for i in 0..4 {
        let x = _mm256_shuffle_epi8(bytes(part, 32 * d + i * 32), split);
        let x = _mm256_permute4x64_epi64::<0b11_01_10_00>(x);
        store(&mut scale[i * 8..], _mm256_cvtph_ps(_mm256_castsi256_si128(x)));
        store(&mut mid[i * 8..], _mm256_cvtph_ps(_mm256_extracti128_si256::<1>(x)));
    }
    (scale, mid)
}

/// The low eight of sixteen bytes, less 128 by a flipped top bit, to f32.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn signed(x: __m128i) -> __m256 {
    _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(x))
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn keys8(part: &[u8], next: &[u8], dim: usize, d: usize, out: &mut [f32]) {
    let (scale, mid) = params(part, d);
    let flip = _mm256_set1_epi8(-128);
    // [j][khi][rhi][klo] to [j][khi][klo][rhi], in both lanes.
    let order = _mm256_setr_epi8(
        0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15, 0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14,
        13, 15,
    );
    for j in 0..d / 32 {
        for q in [0, 2] {
            for r in [0, 4] {
                let lane = |sub: usize, r: usize| {
                    let at = sub * d * 16 + j * 512 + (r * 4 + q) * 16;
                    _mm256_shuffle_epi8(_mm256_xor_si256(bytes_ahead(part, next, at), flip), order)
                };
                let pairs: [(__m256i, __m256i); 4] = std::array::from_fn(|i| {
                    let (a, b) = (lane(0, r + i), lane(1, r + i));
                    (_mm256_unpacklo_epi16(a, b), _mm256_unpackhi_epi16(a, b))
                });
                for jlo in 0..2 {
                    let x = pairs.map(|(l, h)| if jlo == 0 { l } else { h });
                    let (a, b) = (_mm256_unpacklo_epi32(x[0], x[1]), _mm256_unpackhi_epi32(x[0], x[1]));
                    let (e, f) = (_mm256_unpacklo_epi32(x[2], x[3]), _mm256_unpackhi_epi32(x[2], x[3]));
                    let channels = [
                        (0, _mm256_unpacklo_epi64(a, e)),
                        (1, _mm256_unpackhi_epi64(a, e)),
                        (8, _mm256_unpacklo_epi64(b, f)),
                        (9, _mm256_unpackhi_epi64(b, f)),
                    ];
                    for (c, x) in channels {
                        for (half, x) in [_mm256_castsi256_si128(x), _mm256_extracti128_si256::<1>(x)]
                            .into_iter()
                            .enumerate()
                        {
                            let c = j * 32 + jlo * 16 + c + (q + half) * 2;
                            if c >= dim {
                                continue;
                            }
                            for (i, x) in [x, _mm_unpackhi_epi64(x, x)].into_iter().enumerate() {
                                let p = r * 4 + i * 8;
                                let y = _mm256_mul_ps(signed(x), load(&scale[p..]));
                                store(&mut out[c * TILE_ROWS + p..], _mm256_add_ps(y, load(&mid[p..])));
                            }
                        }
                    }
                }
            }
        }
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn values8(part: &[u8], next: &[u8], dim: usize, d: usize, out: &mut [f32]) {
    let (scale, mid) = params(part, d);
    let flip = _mm256_set1_epi8(-128);
    for sub in 0..2 {
        for j in 0..d / 32 {
            for q in [0, 2] {
                let x: [__m256i; 8] = std::array::from_fn(|r| {
                    _mm256_xor_si256(bytes_ahead(part, next, sub * d * 16 + j * 512 + (r * 4 + q) * 16), flip)
                });
                // Transpose 8 x 16 of 8 bits in both lanes: bytes of two rows, of four, of eight.
                let two = [0, 2, 4, 6].map(|i: usize| {
                    [_mm256_unpacklo_epi8(x[i], x[i + 1]), _mm256_unpackhi_epi8(x[i], x[i + 1])]
                });
                for jlo in 0..2 {
                    let four = [0, 2].map(|i: usize| {
                        let (a, b) = (two[i][jlo], two[i + 1][jlo]);
                        [_mm256_unpacklo_epi16(a, b), _mm256_unpackhi_epi16(a, b)]
                    });
                    for khi in 0..2 {
                        let (a, b) = (four[0][khi], four[1][khi]);
                        // Columns [rhi][klo] of eight bytes, two in a register.
                        for (rhi, x) in
                            [_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b)].into_iter().enumerate()
                        {
                            let c = j * 32 + jlo * 16 + rhi * 8;
                            if c >= dim {
                                continue;
                            }
                            for (half, x) in [_mm256_castsi256_si128(x), _mm256_extracti128_si256::<1>(x)]
                                .into_iter()
                                .enumerate()
                            {
                                for (klo, x) in [x, _mm_unpackhi_epi64(x, x)].into_iter().enumerate() {
                                    let row = ((q + half) * 2 + klo) * 4 + sub * 2 + khi;
                                    let y = _mm256_mul_ps(signed(x), _mm256_set1_ps(scale[row]));
                                    let y = _mm256_add_ps(y, _mm256_set1_ps(mid[row]));
                                    store_some(&mut out[row * dim + c..], y, dim - c);
                                }
                            }
                        }
                    }
                }
            }
        }
    }
}

/// Transposes 8 x 8 numbers.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn transpose(x: [__m256; 8]) -> [__m256; 8] {
    let a =
        [0, 2, 4, 6].map(|i: usize| [_mm256_unpacklo_ps(x[i], x[i + 1]), _mm256_unpackhi_ps(x[i], x[i + 1])]);
    let quad = |l: __m256, m: __m256| [_mm256_shuffle_ps::<0x44>(l, m), _mm256_shuffle_ps::<0xEE>(l, m)];
    let [b0, b1] = quad(a[0][0], a[1][0]);
    let [b2, b3] = quad(a[0][1], a[1][1]);
    let [b4, b5] = quad(a[2][0], a[3][0]);
    let [b6, b7] = quad(a[2][1], a[3][1]);
    [
        _mm256_permute2f128_ps::<0x20>(b0, b4),
        _mm256_permute2f128_ps::<0x20>(b1, b5),
        _mm256_permute2f128_ps::<0x20>(b2, b6),
        _mm256_permute2f128_ps::<0x20>(b3, b7),
        _mm256_permute2f128_ps::<0x31>(b0, b4),
        _mm256_permute2f128_ps::<0x31>(b1, b5),
        _mm256_permute2f128_ps::<0x31>(b2, b6),
        _mm256_permute2f128_ps::<0x31>(b3, b7),
    ]
}

/// Row of the tile at place `p` of the order `pi`.
const fn row_at(p: usize) -> usize {
    p % 4 * 8 + p / 4
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn keys32(part: &[u8], next: &[u8], dim: usize, out: &mut [f32]) {
    for p in (0..TILE_ROWS).step_by(8) {
        let mut c = 0;
        while c + 8 <= dim {
            let x = std::array::from_fn(|i| {
                _mm256_castsi256_ps(bytes_ahead(part, next, (row_at(p + i) * dim + c) * 4))
            });
            for (i, x) in transpose(x).into_iter().enumerate() {
                store(&mut out[(c + i) * TILE_ROWS + p..], x);
            }
            c += 8;
        }
        for c in c..dim {
            for i in 0..8 {
                let at = (row_at(p + i) * dim + c) * 4;
                out[c * TILE_ROWS + p + i] =
                    f32::from_le_bytes([part[at], part[at + 1], part[at + 2], part[at + 3]]);
            }
        }
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn values32(part: &[u8], next: &[u8], dim: usize, out: &mut [f32]) {
    for (p, row) in out.chunks_exact_mut(dim).enumerate().take(TILE_ROWS) {
        let from = &part[row_at(p) * dim * 4..][..dim * 4];
        let whole = dim / 8 * 8;
        for c in (0..whole).step_by(8) {
            store(&mut row[c..], _mm256_castsi256_ps(bytes_ahead(part, next, (row_at(p) * dim + c) * 4)));
        }
        for (x, b) in row[whole..].iter_mut().zip(from[whole * 4..].chunks_exact(4)) {
            *x = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
        }
    }
}

/// Key part to `[D, 32]`.
pub(super) fn decode_keys(store: Store, part: &[u8], next: &[u8], dim: usize, out: &mut [f32]) {
    let d = store.padded(dim);
    // SAFETY: the features were detected.
    unsafe {
        match store {
            Store::F32 => keys32(part, next, dim, out),
            Store::F16 => keys16::<false>(part, next, dim, d, out),
            Store::Bf16 => keys16::<true>(part, next, dim, d, out),
            Store::Int8 => keys8(part, next, dim, d, out),
        }
    }
}

/// Value part to `[32, Dv]`.
pub(super) fn decode_values(store: Store, part: &[u8], next: &[u8], dim: usize, out: &mut [f32]) {
    let d = store.padded(dim);
    // SAFETY: the features were detected.
    unsafe {
        match store {
            Store::F32 => values32(part, next, dim, out),
            Store::F16 => values16::<false>(part, next, dim, d, out),
            Store::Bf16 => values16::<true>(part, next, dim, d, out),
            Store::Int8 => values8(part, next, dim, d, out),
        }
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn rotate_avx2(keys: &mut [f32], adjacent: bool, angles: &[&[f32]; TILE_ROWS]) {
    let pairs = angles[0].len() / 2;
    for p in (0..TILE_ROWS).step_by(8) {
        let mut from = 0;
        while from < pairs {
            let n = (pairs - from).min(8);
            let (cos, sin) = if n == 8 {
                let rows = |at: usize| std::array::from_fn(|i| load(&angles[p + i][at..]));
                (transpose(rows(from)), transpose(rows(pairs + from)))
            } else {
                let mut some = [[[0.0f32; 8]; 8]; 2];
                for i in 0..8 {
                    some[0][i][..n].copy_from_slice(&angles[p + i][from..][..n]);
                    some[1][i][..n].copy_from_slice(&angles[p + i][pairs + from..][..n]);
                }
                let rows = |x: &[[f32; 8]; 8]| std::array::from_fn(|i| load(&x[i]));
                (transpose(rows(&some[0])), transpose(rows(&some[1])))
            };
            for i in 0..n {
                let pair = from + i;
                let (a, b) = if adjacent { (2 * pair, 2 * pair + 1) } else { (pair, pair + pairs) };
                let (a, b) = (a * TILE_ROWS + p, b * TILE_ROWS + p);
                let (x, y) = (load(&keys[a..]), load(&keys[b..]));
                // Products and sums apart, as the portable code rounds.
                store(&mut keys[a..], _mm256_sub_ps(_mm256_mul_ps(x, cos[i]), _mm256_mul_ps(y, sin[i])));
                store(&mut keys[b..], _mm256_add_ps(_mm256_mul_ps(y, cos[i]), _mm256_mul_ps(x, sin[i])));
            }
            from += n;
        }
    }
}

/// Rotates decoded keys; `angles[p]` is the row of cosines and sines for place `p`.
pub(super) fn rotate(keys: &mut [f32], adjacent: bool, angles: &[&[f32]; TILE_ROWS]) {
    // SAFETY: the features were detected.
    unsafe { rotate_avx2(keys, adjacent, angles) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvasir_core::tile::pi;

    #[test]
    fn places_and_rows_are_inverse() {
        assert!((0..TILE_ROWS).all(|t| row_at(pi(t)) == t));
    }
}
