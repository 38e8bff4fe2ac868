//! Calls: check every length, then run. Nothing is written before all checks have passed.

mod attend;
mod bytes;
mod columns;
mod dense;
mod tiles;

use kvasir_core::{Call, Result};

use crate::Cpu;

/// Runs one call.
pub(crate) fn run(cpu: &Cpu, call: &Call) -> Result<()> {
    match call {
        Call::Write { dst, data } => bytes::write(dst, data),
        Call::Copy { src, dst } => bytes::copy(src, dst),
        Call::Fill { dst, value } => bytes::fill(dst, *value),
        Call::Gather { src, idx, row_bytes, dst } => bytes::gather(src, idx, *row_bytes as usize, dst),
        Call::Scatter { src, idx, row_bytes, dst } => bytes::scatter(src, idx, *row_bytes as usize, dst),
        Call::CompactColumn { src, idx, dst } => bytes::compact_column(src, idx, dst),
        Call::Embed { table, ids, out } => dense::embed(cpu, table, ids, out),
        Call::RmsNorm { x, weight, eps, dim, out } => {
            dense::rms_norm(cpu, x, weight, *eps, *dim as usize, out)
        }
        Call::MatMul { x, w, out, add } => dense::matmul(cpu, x, w, out, *add),
        Call::Activate { f, a, b, out } => dense::activate(cpu, *f, a, b, out),
        Call::Add { x, y } => dense::add(x, y),
        Call::RowDistance { a, b, dim, out } => dense::row_distance(a, b, *dim as usize, out),
        Call::Append { k, v, kv_heads, k_dim, v_dim, codes, rope, writes } => {
            let shape = tiles::Shape::new("append", codes, *k_dim, *v_dim)?;
            tiles::append(cpu, k, v, *kv_heads as usize, &shape, codes, rope.as_ref(), writes)
        }
        Call::Seal { from_codes, to_codes, k_dim, v_dim, tiles } => {
            tiles::seal(cpu, from_codes, to_codes, *k_dim, *v_dim, tiles)
        }
        Call::Decode { codes, k_dim, v_dim, tile, rows, k_out, v_out } => {
            let shape = tiles::Shape::new("decode", codes, *k_dim, *v_dim)?;
            tiles::decode(cpu, &shape, tile, *rows as usize, k_out, v_out)
        }
        Call::Compact { codes, k_dim, v_dim, src, idx, dst } => {
            let shape = tiles::Shape::new("compact", codes, *k_dim, *v_dim)?;
            tiles::compact(&shape, src, idx, dst)
        }
        Call::Attend(a) => attend::attend(cpu, a),
    }
}
