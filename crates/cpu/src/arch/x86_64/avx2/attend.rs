//! Pieces of attention over one decoded tile. The order of sums of a query vector does not depend on the block it is in.

#[allow(clippy::wildcard_imports)] // intrinsics
use std::arch::x86_64::*;

use kvasir_core::{HIDDEN, TILE_ROWS};

use super::{load, store};
use crate::arch::all::attend::{EXP2, LAZY, UNSEEN};

/// 2^x for x up to 126; zero below -126.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn exp2(x: __m256) -> __m256 {
    let least = _mm256_set1_ps(-126.0);
    let clamped = _mm256_max_ps(x, least);
    let n = _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(clamped);
    let r = _mm256_sub_ps(clamped, n);
    let mut y = _mm256_set1_ps(EXP2[5]);
    for c in EXP2[..5].iter().rev() {
        y = _mm256_fmadd_ps(y, r, _mm256_set1_ps(*c));
    }
    let exponent = _mm256_slli_epi32::<23>(_mm256_cvtps_epi32(n));
    let scaled = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(y), exponent));
    _mm256_and_ps(scaled, _mm256_cmp_ps::<_CMP_GE_OQ>(x, least))
}

/// Sum of eight lanes.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn sum(x: __m256) -> f32 {
    let a = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
    let a = _mm_add_ps(a, _mm_movehl_ps(a, a));
    _mm_cvtss_f32(_mm_add_ss(a, _mm_shuffle_ps::<1>(a, a)))
}

/// Largest of eight lanes.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn top(x: __m256) -> f32 {
    let a = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
    let a = _mm_max_ps(a, _mm_movehl_ps(a, a));
    _mm_cvtss_f32(_mm_max_ss(a, _mm_shuffle_ps::<1>(a, a)))
}

/// `N` query vectors: four accumulators each, keys loaded once for all of them.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn score_block<const N: usize>(q: &[f32], d: usize, kt: &[f32], s: &mut [f32]) {
    let mut sums = [[_mm256_setzero_ps(); 4]; N];
    let rows: [&[f32]; N] = std::array::from_fn(|v| &q[v * d..][..d]);
    // Three vectors need twelve sums, three numbers and one register of keys: all sixteen.
    for (c, k) in kt.chunks_exact(TILE_ROWS).take(d).enumerate() {
        let x: [__m256; N] = std::array::from_fn(|v| _mm256_set1_ps(rows[v][c]));
        for i in 0..4 {
            let k = load(&k[i * 8..]);
            for v in 0..N {
                sums[v][i] = _mm256_fmadd_ps(x[v], k, sums[v][i]);
            }
        }
    }
    for v in 0..N {
        for i in 0..4 {
            store(&mut s[v * TILE_ROWS + i * 8..], sums[v][i]);
        }
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn scores_avx2(q: &[f32], d: usize, kt: &[f32], s: &mut [f32]) {
    let mut q = q;
    let mut s = s;
    // Four as two and two.
    while q.len() >= 5 * d || q.len() == 3 * d {
        score_block::<3>(q, d, kt, s);
        q = &q[3 * d..];
        s = &mut s[3 * TILE_ROWS..];
    }
    while q.len() >= 2 * d {
        score_block::<2>(q, d, kt, s);
        q = &q[2 * d..];
        s = &mut s[2 * TILE_ROWS..];
    }
    if q.len() >= d {
        score_block::<1>(q, d, kt, s);
    }
}

/// `s[v] = q[v] Kt`.
pub(super) fn scores(q: &[f32], d: usize, kt: &[f32], s: &mut [f32]) {
    // SAFETY: the features were detected.
    unsafe { scores_avx2(q, d, kt, s) }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn fold_avx2(s: &mut [f32], bias: Option<&[f32; TILE_ROWS]>, m: &mut f32, l: &mut f32) -> Option<f32> {
    let mut x: [__m256; 4] = [load(s), load(&s[8..]), load(&s[16..]), load(&s[24..])];
    if let Some(bias) = bias {
        for (i, x) in x.iter_mut().enumerate() {
            let b = load(&bias[i * 8..]);
            let shown = _mm256_cmp_ps::<_CMP_GT_OQ>(b, _mm256_set1_ps(UNSEEN));
            *x = _mm256_blendv_ps(_mm256_set1_ps(HIDDEN), _mm256_add_ps(*x, b), shown);
        }
    }
    let top = top(_mm256_max_ps(_mm256_max_ps(x[0], x[1]), _mm256_max_ps(x[2], x[3])));
    if top <= UNSEEN {
        s[..TILE_ROWS].fill(0.0);
        return None;
    }
    let mut factor = 1.0;
    if top > *m + LAZY {
        factor = _mm256_cvtss_f32(exp2(_mm256_set1_ps(*m - top)));
        *m = top;
        *l *= factor;
    }
    let reference = _mm256_set1_ps(*m);
    let mut total = _mm256_setzero_ps();
    for (i, x) in x.iter().enumerate() {
        let p = exp2(_mm256_sub_ps(*x, reference));
        total = _mm256_add_ps(total, p);
        store(&mut s[i * 8..], p);
    }
    *l += sum(total);
    Some(factor)
}

/// Scores to weights, see the portable version.
pub(super) fn fold(s: &mut [f32], bias: Option<&[f32; TILE_ROWS]>, m: &mut f32, l: &mut f32) -> Option<f32> {
    // SAFETY: the features were detected.
    unsafe { fold_avx2(s, bias, m, l) }
}

/// `N` vectors, `8 W` channels from `from`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn sum_block<const N: usize, const W: usize>(p: &[f32], v: &[f32], dv: usize, from: usize, out: &mut [f32]) {
    let p: [&[f32; TILE_ROWS]; N] =
        std::array::from_fn(|n| p[n * TILE_ROWS..][..TILE_ROWS].try_into().expect("a tile of weights"));
    let mut sums: [[__m256; W]; N] = [[_mm256_setzero_ps(); W]; N];
    for n in 0..N {
        for w in 0..W {
            sums[n][w] = load(&out[n * dv + from + w * 8..]);
        }
    }
    for (t, row) in v.chunks_exact(dv).enumerate().take(TILE_ROWS) {
        let row = &row[from..from + 8 * W];
        let x: [__m256; N] = std::array::from_fn(|n| _mm256_set1_ps(p[n][t]));
        for w in 0..W {
            let v = load(&row[w * 8..]);
            for n in 0..N {
                sums[n][w] = _mm256_fmadd_ps(x[n], v, sums[n][w]);
            }
        }
    }
    for n in 0..N {
        for w in 0..W {
            store(&mut out[n * dv + from + w * 8..], sums[n][w]);
        }
    }
}

/// `N` vectors, all channels: `W` registers at a time, then one, then number by number. Every channel sums in row order.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn sum_rows<const N: usize, const W: usize>(p: &[f32], v: &[f32], dv: usize, out: &mut [f32]) {
    let mut from = 0;
    while from + 8 * W <= dv {
        sum_block::<N, W>(p, v, dv, from, out);
        from += 8 * W;
    }
    while from + 8 <= dv {
        sum_block::<N, 1>(p, v, dv, from, out);
        from += 8;
    }
    for c in from..dv {
        for n in 0..N {
            let o = &mut out[n * dv + c];
            for t in 0..TILE_ROWS {
                *o = p[n * TILE_ROWS + t].mul_add(v[t * dv + c], *o);
            }
        }
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn accumulate_avx2(p: &[f32], v: &[f32], dv: usize, out: &mut [f32]) {
    let mut p = p;
    let mut out = out;
    while p.len() >= 5 * TILE_ROWS || p.len() == 3 * TILE_ROWS {
        sum_rows::<3, 4>(p, v, dv, out);
        p = &p[3 * TILE_ROWS..];
        out = &mut out[3 * dv..];
    }
    while p.len() >= 2 * TILE_ROWS {
        sum_rows::<2, 4>(p, v, dv, out);
        p = &p[2 * TILE_ROWS..];
        out = &mut out[2 * dv..];
    }
    if p.len() >= TILE_ROWS {
        sum_rows::<1, 8>(p, v, dv, out);
    }
}

/// `out[v] += p[v] V`.
pub(super) fn accumulate(p: &[f32], v: &[f32], dv: usize, out: &mut [f32]) {
    // SAFETY: the features were detected.
    unsafe { accumulate_avx2(p, v, dv, out) }
}
