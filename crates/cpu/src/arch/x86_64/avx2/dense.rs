//! Weight blocks and elementwise functions.
//!
//! A row of weights is read 32 numbers at a time into four registers, whatever its type; up to four rows of activations are
//! multiplied with them, four accumulators each. The order of sums depends on the row length only.

#[allow(clippy::wildcard_imports)] // intrinsics
use std::arch::x86_64::*;

use kvasir_core::WeightType;

use super::attend::{exp2, sum};
use super::{load, store};
use crate::arch::all;

/// How 32 numbers of a weight row are read.
trait Kind {
    /// Bytes of 32 numbers.
    const BYTES: usize;
    /// Reads them.
    ///
    /// # Safety
    /// AVX2, FMA and F16C are there.
    unsafe fn read(at: &[u8]) -> [__m256; 4];
}

struct F32;
struct F16;
struct Bf16;
struct Q8;
struct Q4;
struct Q41;

/// Sixteen bytes.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn sixteen(from: &[u8]) -> __m128i {
    let from: &[u8; 16] = from[..16].try_into().expect("16 bytes");
    // SAFETY: 16 bytes are there.
    unsafe { _mm_loadu_si128(from.as_ptr().cast()) }
}

/// A half at the start of a slice, in all lanes.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn half(from: &[u8]) -> __m256 {
    _mm256_cvtph_ps(_mm_set1_epi16(i16::from_le_bytes([from[0], from[1]])))
}

/// The low eight signed bytes, then the high ones.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn floats(x: __m128i) -> [__m256; 2] {
    [x, _mm_unpackhi_epi64(x, x)].map(|x| _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(x)))
}

/// Low and high nibbles.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn nibbles(x: __m128i) -> [__m128i; 2] {
    let low = _mm_set1_epi8(15);
    [_mm_and_si128(x, low), _mm_and_si128(_mm_srli_epi16::<4>(x), low)]
}

impl Kind for F32 {
    const BYTES: usize = 128;
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn read(at: &[u8]) -> [__m256; 4] {
        std::array::from_fn(|i| {
            let (l, h) = (sixteen(&at[i * 32..]), sixteen(&at[i * 32 + 16..]));
            _mm256_castsi256_ps(_mm256_set_m128i(h, l))
        })
    }
}

impl Kind for F16 {
    const BYTES: usize = 64;
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn read(at: &[u8]) -> [__m256; 4] {
        std::array::from_fn(|i| _mm256_cvtph_ps(sixteen(&at[i * 16..])))
    }
}

impl Kind for Bf16 {
    const BYTES: usize = 64;
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn read(at: &[u8]) -> [__m256; 4] {
        std::array::from_fn(|i| {
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(sixteen(&at[i * 16..]))))
        })
    }
}

impl Kind for Q8 {
    const BYTES: usize = 34;
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn read(at: &[u8]) -> [__m256; 4] {
        let d = half(at);
        let ([a, b], [c, e]) = (floats(sixteen(&at[2..])), floats(sixteen(&at[18..])));
        [a, b, c, e].map(|x| _mm256_mul_ps(x, d))
    }
}

impl Kind for Q4 {
    const BYTES: usize = 18;
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn read(at: &[u8]) -> [__m256; 4] {
        let d = half(at);
        let [l, h] = nibbles(sixteen(&at[2..])).map(|x| floats(_mm_sub_epi8(x, _mm_set1_epi8(8))));
        [l[0], l[1], h[0], h[1]].map(|x| _mm256_mul_ps(x, d))
    }
}

impl Kind for Q41 {
    const BYTES: usize = 20;
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn read(at: &[u8]) -> [__m256; 4] {
        let (d, m) = (half(at), half(&at[2..]));
        let [l, h] = nibbles(sixteen(&at[4..])).map(|x| floats(x));
        [l[0], l[1], h[0], h[1]].map(|x| _mm256_fmadd_ps(x, d, m))
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn dequantize_avx2<K: Kind>(row: &[u8], out: &mut [f32]) {
    for (at, out) in row.chunks_exact(K::BYTES).zip(out.chunks_exact_mut(32)) {
        // SAFETY: this function has the features.
        for (i, x) in unsafe { K::read(at) }.into_iter().enumerate() {
            store(&mut out[i * 8..], x);
        }
    }
}

/// A weight row to f32.
pub(super) fn dequantize(kind: WeightType, row: &[u8], out: &mut [f32]) {
    // SAFETY: the features were detected.
    unsafe {
        match kind {
            WeightType::F32 => dequantize_avx2::<F32>(row, out),
            WeightType::F16 => dequantize_avx2::<F16>(row, out),
            WeightType::Bf16 => dequantize_avx2::<Bf16>(row, out),
            WeightType::Q8_0 => dequantize_avx2::<Q8>(row, out),
            WeightType::Q4_0 => dequantize_avx2::<Q4>(row, out),
            WeightType::Q4_1 => dequantize_avx2::<Q41>(row, out),
        }
    }
    // Rows that are no multiple of 32 have types of one number a block.
    let rest = out.len() / 32 * 32;
    if rest < out.len() {
        all::dense::dequantize(kind, &row[kind.row_bytes(rest)..], &mut out[rest..]);
    }
}

/// Dot product: four accumulators, tail by number.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn dot_avx2(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [_mm256_setzero_ps(); 4];
    let (a32, b32) = (a.chunks_exact(32), b.chunks_exact(32));
    let tail = a32.remainder().iter().zip(b32.remainder()).fold(0.0f32, |s, (x, y)| x.mul_add(*y, s));
    for (x, y) in a32.zip(b32) {
        for i in 0..4 {
            sums[i] = _mm256_fmadd_ps(load(&x[i * 8..]), load(&y[i * 8..]), sums[i]);
        }
    }
    total(sums) + tail
}

/// Sum of four accumulators.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn total(s: [__m256; 4]) -> f32 {
    sum(_mm256_add_ps(_mm256_add_ps(s[0], s[1]), _mm256_add_ps(s[2], s[3])))
}

/// Dot product in a fixed order.
pub(super) fn dot(a: &[f32], b: &[f32]) -> f32 {
    // SAFETY: the features were detected.
    unsafe { dot_avx2(a, b) }
}

/// All outputs of some weight rows for `R` rows of activations.
#[target_feature(enable = "avx2,fma,f16c")]
fn matvec_avx2<K: Kind, const R: usize>(
    kind: WeightType,
    w: &[u8],
    cols: usize,
    x: &[f32],
    put: &mut dyn FnMut(usize, usize, f32),
) {
    let whole = cols / 32 * 32;
    let x: [&[f32]; R] = std::array::from_fn(|r| &x[r * cols..][..cols]);
    for (o, row) in w.chunks_exact(kind.row_bytes(cols)).enumerate() {
        let mut sums = [[_mm256_setzero_ps(); 4]; R];
        for (b, at) in row.chunks_exact(K::BYTES).enumerate() {
            // SAFETY: this function has the features.
            let weights = unsafe { K::read(at) };
            for r in 0..R {
                let x = &x[r][b * 32..][..32];
                for i in 0..4 {
                    sums[r][i] = _mm256_fmadd_ps(weights[i], load(&x[i * 8..]), sums[r][i]);
                }
            }
        }
        let mut rest = [0.0f32; 32];
        if whole < cols {
            all::dense::dequantize(kind, &row[kind.row_bytes(whole)..], &mut rest[..cols - whole]);
        }
        for r in 0..R {
            let tail = x[r][whole..].iter().zip(&rest).fold(0.0f32, |s, (x, w)| x.mul_add(*w, s));
            put(o, r, total(sums[r]) + tail);
        }
    }
}

/// Product of weight rows with one to four rows.
pub(super) fn matvec(
    kind: WeightType,
    w: &[u8],
    cols: usize,
    x: &[f32],
    put: &mut dyn FnMut(usize, usize, f32),
) {
    macro_rules! rows {
        ($kind:ty) => {
            match x.len() / cols {
                1 => matvec_avx2::<$kind, 1>(kind, w, cols, x, put),
                2 => matvec_avx2::<$kind, 2>(kind, w, cols, x, put),
                3 => matvec_avx2::<$kind, 3>(kind, w, cols, x, put),
                _ => matvec_avx2::<$kind, 4>(kind, w, cols, x, put),
            }
        };
    }
    // SAFETY: the features were detected.
    unsafe {
        match kind {
            WeightType::F32 => rows!(F32),
            WeightType::F16 => rows!(F16),
            WeightType::Bf16 => rows!(Bf16),
            WeightType::Q8_0 => rows!(Q8),
            WeightType::Q4_0 => rows!(Q4),
            WeightType::Q4_1 => rows!(Q41),
        }
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn swiglu_avx2(a: &[f32], b: &[f32], out: &mut [f32]) {
    let one = _mm256_set1_ps(1.0);
    let step = |a: &[f32], b: &[f32], out: &mut [f32]| {
        let x = load(a);
        let t = _mm256_mul_ps(x, _mm256_set1_ps(-std::f32::consts::LOG2_E));
        let e = exp2(_mm256_min_ps(t, _mm256_set1_ps(126.0)));
        let y = _mm256_div_ps(x, _mm256_add_ps(one, e));
        store(out, _mm256_mul_ps(y, load(b)));
    };
    let whole = out.len() / 8 * 8;
    for i in (0..whole).step_by(8) {
        step(&a[i..], &b[i..], &mut out[i..]);
    }
    let n = out.len() - whole;
    if n > 0 {
        let mut tail = [[0.0f32; 8]; 3];
        tail[0][..n].copy_from_slice(&a[whole..whole + n]);
        tail[1][..n].copy_from_slice(&b[whole..whole + n]);
        let [x, y, z] = &mut tail;
        step(x, y, z);
        out[whole..].copy_from_slice(&z[..n]);
    }
}

/// `out = silu(a) b`.
pub(super) fn swiglu(a: &[f32], b: &[f32], out: &mut [f32]) {
    // SAFETY: the features were detected.
    unsafe { swiglu_avx2(a, b, out) }
}
