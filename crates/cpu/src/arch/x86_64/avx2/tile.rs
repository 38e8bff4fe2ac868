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

/// A part that is read, what is read after it, and where its numbers go. The slices are checked once, not at each access:
/// checks cost a third of the time here.
#[derive(Clone, Copy)]
struct Reader {
    part: *const u8,
    next: *const u8,
    out: *mut f32,
}

impl Reader {
    /// A part of `bytes` bytes that gives `32 dim` numbers. Addresses of T32 stay inside a part of its size, as the tests of
    /// their formulas assert.
    fn new(part: &[u8], next: &[u8], bytes: usize, dim: usize, out: &mut [f32]) -> Self {
        assert!(part.len() >= bytes && out.len() >= TILE_ROWS * dim, "a whole part");
        let next = if next.len() >= bytes { next } else { part };
        Self { part: part.as_ptr(), next: next.as_ptr(), out: out.as_mut_ptr() }
    }

    /// 32 bytes of the part; the first half of a cache line asks for the same line of what is read next. Hardware does not
    /// foresee the order in which lanes are read, and a whole part asked for at once is slower than none.
    ///
    /// # Safety
    /// `at + 32` is inside the part.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn bytes(self, at: usize) -> __m256i {
        // SAFETY: by the contract; a prefetch reads nothing, and `next` is as long as the part.
        unsafe {
            if at.is_multiple_of(64) {
                _mm_prefetch::<_MM_HINT_T0>(self.next.add(at).cast());
            }
            _mm256_loadu_si256(self.part.add(at).cast())
        }
    }

    /// The f32 number at `at`.
    ///
    /// # Safety
    /// `at + 4` is inside the part.
    unsafe fn number(self, at: usize) -> f32 {
        // SAFETY: by the contract.
        f32::from_bits(u32::from_le_bytes(unsafe { self.part.add(at).cast::<[u8; 4]>().read() }))
    }

    /// Eight numbers to place `at` of the output.
    ///
    /// # Safety
    /// `at + 8` is inside the output.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn put(self, at: usize, x: __m256) {
        // SAFETY: by the contract.
        unsafe { _mm256_storeu_ps(self.out.add(at), x) }
    }

    /// The first `n` of eight numbers, or all.
    ///
    /// # Safety
    /// `at + min(n, 8)` is inside the output.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn put_some(self, at: usize, x: __m256, n: usize) {
        // SAFETY: by the contract.
        unsafe {
            if n >= 8 {
                self.put(at, x);
            } else {
                let mut all = [0.0f32; 8];
                store(&mut all, x);
                std::ptr::copy_nonoverlapping(all.as_ptr(), self.out.add(at), n);
            }
        }
    }
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

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn keys16<const BF16: bool>(io: Reader, dim: usize, d: usize) {
    // SAFETY: the reader was made for these sizes, and the addresses are those of T32.
    unsafe {
        // [khi][rhi][klo] to [khi][klo][rhi], in both lanes.
        let order = _mm256_setr_epi8(
            0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15, 0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10,
            11, 14, 15,
        );
        for j in 0..d / 16 {
            for q in [0, 2] {
                for r in (0..8).step_by(2) {
                    let lane = |sub: usize, r: usize| {
                        let at = sub * d * 32 + j * 512 + (r * 4 + q) * 16;
                        _mm256_shuffle_epi8(io.bytes(at), order)
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
                        for (half, x) in [_mm256_castsi256_si128(x), _mm256_extracti128_si256::<1>(x)]
                            .into_iter()
                            .enumerate()
                        {
                            let c = j * 16 + c + (q + half) * 2;
                            if c < dim {
                                io.put(c * TILE_ROWS + r * 4, widen::<BF16>(x));
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
unsafe fn values16<const BF16: bool>(io: Reader, dim: usize, d: usize) {
    // SAFETY: the reader was made for these sizes, and the addresses are those of T32.
    unsafe {
        for sub in 0..2 {
            for j in 0..d / 16 {
                for q in [0, 2] {
                    let x: [__m256i; 8] =
                        std::array::from_fn(|r| io.bytes(sub * d * 32 + j * 512 + (r * 4 + q) * 16));
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
                                io.put_some(row * dim + c, widen::<BF16>(x), dim - c);
                            }
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
unsafe fn params(io: Reader, d: usize) -> ([f32; TILE_ROWS], [f32; TILE_ROWS]) {
    // SAFETY: the reader was made for these sizes, and the addresses are those of T32.
    unsafe {
        let split = _mm256_setr_epi8(
            0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15, 0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10,
            11, 14, 15,
        );
        let (mut scale, mut mid) = ([0.0; TILE_ROWS], [0.0; TILE_ROWS]);
        for i in 0..4 {
            let x = _mm256_shuffle_epi8(io.bytes(32 * d + i * 32), split);
            let x = _mm256_permute4x64_epi64::<0b11_01_10_00>(x);
            store(&mut scale[i * 8..], _mm256_cvtph_ps(_mm256_castsi256_si128(x)));
            store(&mut mid[i * 8..], _mm256_cvtph_ps(_mm256_extracti128_si256::<1>(x)));
        }
        (scale, mid)
    }
}

/// The low eight of sixteen bytes, less 128 by a flipped top bit, to f32.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn signed(x: __m128i) -> __m256 {
    _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(x))
}

/// Rows `r..r + 4` and `r + 8..r + 12` of both subs, channels `c, c + 1, c + 8, c + 9` in the low lane and `2` further in the
/// high one.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn keys8_block(
    io: Reader,
    x: [__m256i; 4],
    dim: usize,
    c: usize,
    scale: [__m256; 2],
    mid: [__m256; 2],
    p: usize,
) {
    let (a, b) = (_mm256_unpacklo_epi32(x[0], x[1]), _mm256_unpackhi_epi32(x[0], x[1]));
    let (e, f) = (_mm256_unpacklo_epi32(x[2], x[3]), _mm256_unpackhi_epi32(x[2], x[3]));
    let put = |x: __m128i, c: usize| {
        if c < dim {
            // SAFETY: the channel exists, and `p + 16` is at most 32.
            unsafe {
                io.put(c * TILE_ROWS + p, _mm256_fmadd_ps(signed(x), scale[0], mid[0]));
                let x = _mm_unpackhi_epi64(x, x);
                io.put(c * TILE_ROWS + p + 8, _mm256_fmadd_ps(signed(x), scale[1], mid[1]));
            }
        }
    };
    let both = |x: __m256i, c: usize| {
        put(_mm256_castsi256_si128(x), c);
        put(_mm256_extracti128_si256::<1>(x), c + 2);
    };
    both(_mm256_unpacklo_epi64(a, e), c);
    both(_mm256_unpackhi_epi64(a, e), c + 1);
    both(_mm256_unpacklo_epi64(b, f), c + 8);
    both(_mm256_unpackhi_epi64(b, f), c + 9);
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn keys8(io: Reader, dim: usize, d: usize) {
    let flip = _mm256_set1_epi8(-128);
    // [j][khi][rhi][klo] to [j][khi][klo][rhi], in both lanes.
    let order = _mm256_setr_epi8(
        0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15, 0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14,
        13, 15,
    );
    // SAFETY: the reader was made for these sizes, and the addresses are those of T32.
    unsafe {
        let (scale, mid) = params(io, d);
        for r in [0, 4] {
            let eight = |x: &[f32; TILE_ROWS]| [load(&x[r * 4..]), load(&x[r * 4 + 8..])];
            let (scale, mid) = (eight(&scale), eight(&mid));
            for j in 0..d / 32 {
                for q in [0, 2] {
                    let (mut low, mut high) = ([_mm256_setzero_si256(); 4], [_mm256_setzero_si256(); 4]);
                    for i in 0..4 {
                        let at = j * 512 + ((r + i) * 4 + q) * 16;
                        let a = _mm256_shuffle_epi8(_mm256_xor_si256(io.bytes(at), flip), order);
                        let b = _mm256_shuffle_epi8(_mm256_xor_si256(io.bytes(d * 16 + at), flip), order);
                        low[i] = _mm256_unpacklo_epi16(a, b);
                        high[i] = _mm256_unpackhi_epi16(a, b);
                    }
                    keys8_block(io, low, dim, j * 32 + q * 2, scale, mid, r * 4);
                    keys8_block(io, high, dim, j * 32 + 16 + q * 2, scale, mid, r * 4);
                }
            }
        }
    }
}

/// What the blocks of a value part share.
#[derive(Clone, Copy)]
struct Rows<'a> {
    io: Reader,
    dim: usize,
    scale: &'a [f32; TILE_ROWS],
    mid: &'a [f32; TILE_ROWS],
}

impl Rows<'_> {
    /// `x` holds channels `c..c + 8` of the rows at places `p` and `p + 4` in its low lane, `p + 8` and `p + 12` in its high
    /// one.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn put(self, x: __m256i, c: usize, p: usize) {
        let row = |x: __m128i, p: usize| {
            let y = _mm256_fmadd_ps(signed(x), _mm256_set1_ps(self.scale[p]), _mm256_set1_ps(self.mid[p]));
            // SAFETY: `c` is below the channels and `p` below 32.
            unsafe { self.io.put_some(p * self.dim + c, y, self.dim - c) }
        };
        if c < self.dim {
            let (low, high) = (_mm256_castsi256_si128(x), _mm256_extracti128_si256::<1>(x));
            row(low, p);
            row(_mm_unpackhi_epi64(low, low), p + 4);
            row(high, p + 8);
            row(_mm_unpackhi_epi64(high, high), p + 12);
        }
    }

    /// Transposes the eight bytes of one half of a lane: `[khi][rhi][klo]` of eight channels.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn half(self, x: [__m256i; 4], c: usize, p: usize) {
        let (a, b) = (_mm256_unpacklo_epi16(x[0], x[1]), _mm256_unpackhi_epi16(x[0], x[1]));
        let (e, f) = (_mm256_unpacklo_epi16(x[2], x[3]), _mm256_unpackhi_epi16(x[2], x[3]));
        // SAFETY: by the contract of `put`.
        unsafe {
            self.put(_mm256_unpacklo_epi32(a, e), c, p);
            self.put(_mm256_unpackhi_epi32(a, e), c + 8, p);
            self.put(_mm256_unpacklo_epi32(b, f), c, p + 1);
            self.put(_mm256_unpackhi_epi32(b, f), c + 8, p + 1);
        }
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn values8(io: Reader, dim: usize, d: usize) {
    let flip = _mm256_set1_epi8(-128);
    // SAFETY: the reader was made for these sizes, and the addresses are those of T32.
    unsafe {
        let (scale, mid) = params(io, d);
        let rows = Rows { io, dim, scale: &scale, mid: &mid };
        for sub in 0..2 {
            for j in 0..d / 32 {
                for q in [0, 2] {
                    let (mut low, mut high) = ([_mm256_setzero_si256(); 4], [_mm256_setzero_si256(); 4]);
                    for i in 0..4 {
                        let at = sub * d * 16 + j * 512 + (i * 8 + q) * 16;
                        let a = _mm256_xor_si256(io.bytes(at), flip);
                        let b = _mm256_xor_si256(io.bytes(at + 64), flip);
                        low[i] = _mm256_unpacklo_epi8(a, b);
                        high[i] = _mm256_unpackhi_epi8(a, b);
                    }
                    rows.half(low, j * 32, q * 8 + sub * 2);
                    rows.half(high, j * 32 + 16, q * 8 + sub * 2);
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
unsafe fn keys32(io: Reader, dim: usize) {
    // SAFETY: the reader was made for these sizes, and the addresses are those of T32.
    unsafe {
        for p in (0..TILE_ROWS).step_by(8) {
            let mut c = 0;
            while c + 8 <= dim {
                let x = std::array::from_fn(|i| _mm256_castsi256_ps(io.bytes((row_at(p + i) * dim + c) * 4)));
                for (i, x) in transpose(x).into_iter().enumerate() {
                    io.put((c + i) * TILE_ROWS + p, x);
                }
                c += 8;
            }
            for c in c..dim {
                for i in 0..8 {
                    let from = io.number((row_at(p + i) * dim + c) * 4);
                    *io.out.add(c * TILE_ROWS + p + i) = from;
                }
            }
        }
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn values32(io: Reader, dim: usize) {
    // SAFETY: the reader was made for these sizes, and the addresses are those of T32.
    unsafe {
        for p in 0..TILE_ROWS {
            let whole = dim / 8 * 8;
            for c in (0..whole).step_by(8) {
                io.put(p * dim + c, _mm256_castsi256_ps(io.bytes((row_at(p) * dim + c) * 4)));
            }
            for c in whole..dim {
                *io.out.add(p * dim + c) = io.number((row_at(p) * dim + c) * 4);
            }
        }
    }
}

/// Key part to `[D, 32]`.
pub(super) fn decode_keys(store: Store, part: &[u8], next: &[u8], dim: usize, out: &mut [f32]) {
    let d = store.padded(dim);
    let bytes = store.format().part_bytes(dim).expect("a format with kernels");
    let io = Reader::new(part, next, bytes, dim, out);
    // SAFETY: the features were detected, and the reader is made for these sizes.
    unsafe {
        match store {
            Store::F32 => keys32(io, dim),
            Store::F16 => keys16::<false>(io, dim, d),
            Store::Bf16 => keys16::<true>(io, dim, d),
            Store::Int8 => keys8(io, dim, d),
        }
    }
}

/// Value part to `[32, Dv]`.
pub(super) fn decode_values(store: Store, part: &[u8], next: &[u8], dim: usize, out: &mut [f32]) {
    let d = store.padded(dim);
    let bytes = store.format().part_bytes(dim).expect("a format with kernels");
    let io = Reader::new(part, next, bytes, dim, out);
    // SAFETY: the features were detected, and the reader is made for these sizes.
    unsafe {
        match store {
            Store::F32 => values32(io, dim),
            Store::F16 => values16::<false>(io, dim, d),
            Store::Bf16 => values16::<true>(io, dim, d),
            Store::Int8 => values8(io, dim, d),
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
