//! Pieces of attention over one decoded tile. Every query vector is computed alone, in one order, so that its result does
//! not depend on the vectors beside it.

use kvasir_core::{HIDDEN, TILE_ROWS};

/// A score below this belongs to a row that is not seen.
pub(crate) const UNSEEN: f32 = HIDDEN / 2.0;
/// How far, in log2 units, scores may pass the reference before sums are rescaled.
pub(crate) const LAZY: f32 = 8.0;

/// Chebyshev interpolation of 2^r on [-0.5, 0.5], degree 5; relative error 2.1e-7.
#[allow(clippy::approx_constant)] // close to ln 2, but fitted
pub(crate) const EXP2: [f32; 6] =
    [1.000_000_1, 0.693_147_2, 0.240_221_07, 0.055_503_57, 0.009_676_032, 0.001_339_086_3];
/// Adding and subtracting it rounds to an integer, half to even, below 2^22.
const ROUND: f32 = 12_582_912.0;

/// 2^x for x up to 100; zero below -126.
#[inline(always)]
pub(crate) fn exp2(x: f32) -> f32 {
    let clamped = x.max(-126.0);
    let n = (clamped + ROUND) - ROUND;
    let r = clamped - n;
    let mut y = EXP2[5];
    for c in EXP2[..5].iter().rev() {
        y = y * r + c;
    }
    let scaled = f32::from_bits((y.to_bits() as i32).wrapping_add((n as i32) << 23) as u32);
    if x < -126.0 { 0.0 } else { scaled }
}

/// `s[v] = q[v] Kt`: `q` `[n, D]`, `kt` `[D, 32]`, `s` `[n, 32]`.
pub(crate) fn scores(q: &[f32], d: usize, kt: &[f32], s: &mut [f32]) {
    for (q, s) in q.chunks_exact(d).zip(s.chunks_exact_mut(TILE_ROWS)) {
        let mut sum = [0.0f32; TILE_ROWS];
        for (x, k) in q.iter().zip(kt.chunks_exact(TILE_ROWS)) {
            for (a, k) in sum.iter_mut().zip(k) {
                *a += x * k;
            }
        }
        s.copy_from_slice(&sum);
    }
}

/// Largest of eight lanes' maxima.
fn top(s: &[f32]) -> f32 {
    let mut lanes = [HIDDEN; 8];
    for s in s.chunks_exact(8) {
        for (a, &x) in lanes.iter_mut().zip(s) {
            *a = if x > *a { x } else { *a };
        }
    }
    lanes.iter().fold(HIDDEN, |a, &x| a.max(x))
}

/// Sum in eight lanes, folded as a tree.
fn sum(p: &[f32]) -> f32 {
    let mut lanes = [0.0f32; 8];
    for p in p.chunks_exact(8) {
        for (a, x) in lanes.iter_mut().zip(p) {
            *a += x;
        }
    }
    let [a, b, c, d, e, f, g, h] = lanes;
    ((a + e) + (c + g)) + ((b + f) + (d + h))
}

/// Turns the 32 scores of one query into weights relative to the running reference `m`, and adds them to `l`.
///
/// `bias` is added first; rows with a bias below `UNSEEN` are not seen. Returns the factor by which earlier sums
/// must be multiplied, or nothing if no row is seen (the weights are then zero).
pub(crate) fn fold(s: &mut [f32], bias: Option<&[f32; TILE_ROWS]>, m: &mut f32, l: &mut f32) -> Option<f32> {
    if let Some(bias) = bias {
        for (s, &b) in s.iter_mut().zip(bias) {
            *s = if b > UNSEEN { *s + b } else { HIDDEN };
        }
    }
    let top = top(s);
    if top <= UNSEEN {
        s.fill(0.0);
        return None;
    }
    let mut factor = 1.0;
    if top > *m + LAZY {
        factor = exp2(*m - top);
        *m = top;
        *l *= factor;
    }
    let reference = *m;
    for s in s.iter_mut() {
        *s = exp2(*s - reference);
    }
    *l += sum(s);
    Some(factor)
}

/// `out[v] += p[v] V`: `p` `[n, 32]`, `v` `[32, Dv]`, `out` `[n, Dv]`.
pub(crate) fn accumulate(p: &[f32], v: &[f32], dv: usize, out: &mut [f32]) {
    for (p, out) in p.chunks_exact(TILE_ROWS).zip(out.chunks_exact_mut(dv)) {
        for (p, v) in p.iter().zip(v.chunks_exact(dv)) {
            for (o, v) in out.iter_mut().zip(v) {
                *o += p * v;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp2_is_close_to_the_library() {
        let mut worst = 0.0f64;
        for i in -126_000..100_000 {
            let x = i as f32 / 1000.0;
            let want = f64::from(x).exp2();
            worst = worst.max(((f64::from(exp2(x)) - want) / want).abs());
        }
        assert!(worst < 3e-7, "{worst}");
        assert_eq!(exp2(-126.5), 0.0);
        assert_eq!(exp2(HIDDEN), 0.0);
    }
}
