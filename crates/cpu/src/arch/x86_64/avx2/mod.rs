//! AVX2 with FMA and F16C.
//!
//! Each kernel is a `#[target_feature]` function behind a safe wrapper of the same name. The wrappers are reachable only
//! through [`kernels`], which hands the table out after the features were found; that is what their `SAFETY` lines mean by
//! "detected". Helpers carry the same features and inline. Loads and stores go through [`load`] and [`store`], which take
//! slices and so cannot leave them.

mod attend;
mod dense;
mod tile;

use std::arch::x86_64::{__m256, _mm256_loadu_ps, _mm256_storeu_ps};

use crate::arch::Kernels;

static KERNELS: Kernels = Kernels {
    name: "avx2",
    decode_keys: tile::decode_keys,
    decode_values: tile::decode_values,
    rotate: tile::rotate,
    scores: attend::scores,
    fold: attend::fold,
    accumulate: attend::accumulate,
    dequantize: dense::dequantize,
    dot: dense::dot,
    matvec: Some(dense::matvec),
    swiglu: dense::swiglu,
    panels: true,
};

/// The table, if this machine has the features.
pub(crate) fn kernels() -> Option<&'static Kernels> {
    let found = is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("fma")
        && is_x86_feature_detected!("f16c");
    found.then_some(&KERNELS)
}

/// Eight numbers from the start of a slice.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn load(from: &[f32]) -> __m256 {
    let from: &[f32; 8] = from[..8].try_into().expect("eight numbers");
    // SAFETY: 32 bytes are there.
    unsafe { _mm256_loadu_ps(from.as_ptr()) }
}

/// Eight numbers to the start of a slice.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn store(to: &mut [f32], x: __m256) {
    let to: &mut [f32; 8] = (&mut to[..8]).try_into().expect("eight numbers");
    // SAFETY: 32 bytes are there.
    unsafe { _mm256_storeu_ps(to.as_mut_ptr(), x) }
}
