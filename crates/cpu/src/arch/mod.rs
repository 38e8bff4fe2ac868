//! Kernels, one folder per instruction set. A backend holds one table of function pointers, chosen once.

pub(crate) mod all;
#[cfg(target_arch = "x86_64")]
pub(crate) mod x86_64;

use kvasir_core::{TILE_ROWS, WeightType};

pub(crate) use all::attend::UNSEEN;
pub(crate) use all::tile::Store;

/// `y[r, o] = x[r] W[o]` for a few rows: `(kind, w, cols, x, put)`; `put(o, r, y)`.
pub(crate) type MatVec = fn(WeightType, &[u8], usize, &[f32], &mut dyn FnMut(usize, usize, f32));

/// Decodes a part: `(store, part, next, channels, out)`. `next` is what will be read after it: memory that may be fetched
/// meanwhile.
pub(crate) type Decode = fn(Store, &[u8], &[u8], usize, &mut [f32]);

/// Scores to weights: `(scores, bias, reference, sum)`, answers the factor of earlier sums.
pub(crate) type Fold = fn(&mut [f32], Option<&[f32; TILE_ROWS]>, &mut f32, &mut f32) -> Option<f32>;

/// One path.
pub(crate) struct Kernels {
    /// Name of the path, as reported.
    pub(crate) name: &'static str,
    /// Key part to `[D, 32]`, rows in the order `pi`.
    pub(crate) decode_keys: Decode,
    /// Value part to `[32, Dv]`, rows in the order `pi`.
    pub(crate) decode_values: Decode,
    /// Rotates decoded keys: `(keys, adjacent pairs, angles)`; `angles[p]` holds the cosines, then the sines, for place `p`
    /// of the order `pi`.
    pub(crate) rotate: fn(&mut [f32], bool, &[&[f32]; TILE_ROWS]),
    /// `s = q Kt`.
    pub(crate) scores: fn(&[f32], usize, &[f32], &mut [f32]),
    /// Scores to weights.
    pub(crate) fold: Fold,
    /// `out += p V`.
    pub(crate) accumulate: fn(&[f32], &[f32], usize, &mut [f32]),
    /// A weight row to f32.
    pub(crate) dequantize: fn(WeightType, &[u8], &mut [f32]),
    /// Dot product in a fixed order.
    pub(crate) dot: fn(&[f32], &[f32]) -> f32,
    /// Product of weight blocks with up to four rows.
    pub(crate) matvec: Option<MatVec>,
    /// `silu(a) b`.
    pub(crate) swiglu: fn(&[f32], &[f32], &mut [f32]),
    /// Products of many rows go through `gemm`; otherwise each output is a `dot`.
    pub(crate) panels: bool,
}

/// The AVX2 path, if this machine has it.
pub(crate) fn avx2() -> Option<&'static Kernels> {
    #[cfg(target_arch = "x86_64")]
    return x86_64::avx2::kernels();
    #[cfg(not(target_arch = "x86_64"))]
    None
}

/// The best path of this machine other than the portable one.
pub(crate) fn best() -> Option<&'static Kernels> {
    avx2()
}

/// Features of this machine that some path could use.
pub(crate) fn features() -> Vec<String> {
    #[cfg(target_arch = "x86_64")]
    return x86_64::features();
    #[cfg(not(target_arch = "x86_64"))]
    Vec::new()
}
