//! Weight blocks, dot products and elementwise functions.

use half::{bf16, f16};
use kvasir_core::WeightType;

/// Half at the start of a block.
#[inline]
fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// Decodes one row of a weight matrix.
pub(crate) fn dequantize(kind: WeightType, row: &[u8], out: &mut [f32]) {
    let (numbers, bytes) = kind.block();
    for (b, out) in row.chunks_exact(bytes).zip(out.chunks_exact_mut(numbers)) {
        match kind {
            WeightType::F32 => out[0] = f32::from_le_bytes([b[0], b[1], b[2], b[3]]),
            WeightType::F16 => out[0] = half_at(b, 0),
            WeightType::Bf16 => out[0] = bf16::from_le_bytes([b[0], b[1]]).to_f32(),
            WeightType::Q8_0 => {
                let d = half_at(b, 0);
                for (o, &q) in out.iter_mut().zip(&b[2..]) {
                    *o = f32::from(q as i8) * d;
                }
            }
            WeightType::Q4_0 => {
                let d = half_at(b, 0);
                let (low, high) = out.split_at_mut(16);
                for ((l, h), &q) in low.iter_mut().zip(high).zip(&b[2..]) {
                    *l = (f32::from(q & 15) - 8.0) * d;
                    *h = (f32::from(q >> 4) - 8.0) * d;
                }
            }
            WeightType::Q4_1 => {
                let (d, m) = (half_at(b, 0), half_at(b, 2));
                let (low, high) = out.split_at_mut(16);
                for ((l, h), &q) in low.iter_mut().zip(high).zip(&b[4..]) {
                    *l = f32::from(q & 15) * d + m;
                    *h = f32::from(q >> 4) * d + m;
                }
            }
        }
    }
}

/// Dot product in eight lanes and a tail, folded as a tree: one order for every caller.
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0f32; 8];
    let (a8, b8) = (a.chunks_exact(8), b.chunks_exact(8));
    let tail: f32 = a8.remainder().iter().zip(b8.remainder()).map(|(x, y)| x * y).sum();
    for (x, y) in a8.zip(b8) {
        for i in 0..8 {
            lanes[i] += x[i] * y[i];
        }
    }
    let [a, b, c, d, e, f, g, h] = lanes;
    ((a + e) + (c + g)) + ((b + f) + (d + h)) + tail
}

/// `out = silu(a) b`.
pub(crate) fn swiglu(a: &[f32], b: &[f32], out: &mut [f32]) {
    for ((o, &x), y) in out.iter_mut().zip(a).zip(b) {
        *o = x / (1.0 + (-x).exp()) * y;
    }
}
