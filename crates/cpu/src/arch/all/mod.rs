//! Portable reference of every kernel: plain loops over the address formulas, always compiled. What other paths are tested
//! against.

pub(crate) mod attend;
pub(crate) mod dense;
pub(crate) mod tile;

use super::Kernels;

/// The table of this path.
pub(crate) static KERNELS: Kernels = Kernels {
    name: "scalar",
    decode_keys: tile::decode_keys,
    decode_values: tile::decode_values,
    rotate: tile::rotate,
    scores: attend::scores,
    fold: attend::fold,
    accumulate: attend::accumulate,
    dequantize: dense::dequantize,
    dot: dense::dot,
    matvec: None,
    swiglu: dense::swiglu,
    panels: false,
};
