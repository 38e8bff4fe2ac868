//! Calls on dense rows: embedding, norm, product, activation, sums.
//!
//! Products: the portable path is one fixed-order dot per output. With SIMD up to [`FEW`] rows read the weight blocks
//! directly; more rows go through f32 panels and the `gemm` crate, one panel per item, so that the pool and not `gemm`
//! divides the work.

use kvasir_core::{Activation, Buf, Error, Result, Weight, check};

use crate::Cpu;
use crate::mem::{self, Pieces};
use crate::pool::scratch;

/// Rows up to which weight blocks are read directly.
const FEW: usize = 4;
/// Outputs of one item of a product of few rows.
const OUTPUTS: usize = 32;
/// Outputs of a panel.
const PANEL: usize = 96;

/// The bytes of a weight matrix, with its row length.
fn weight<'a>(field: &str, w: &'a Weight) -> Result<(&'a [u8], usize)> {
    let (numbers, _) = w.kind.block();
    let (rows, cols) = (w.rows as usize, w.cols as usize);
    if cols == 0 || !cols.is_multiple_of(numbers) {
        return Err(Error::invalid(
            format!("{field}.cols"),
            format_args!("a positive multiple of {numbers}"),
            cols,
        ));
    }
    let row = w.kind.row_bytes(cols);
    check::equal(&format!("{field}.data"), "bytes", mem::size(field, &[rows, row])?, w.data.bytes())?;
    Ok((mem::bytes(field, &w.data)?, row))
}

/// Rows in a buffer of f32 rows of `dim`.
fn rows_of(field: &str, buf: &Buf, dim: usize) -> Result<usize> {
    let n = mem::floats(field, buf)?;
    if dim == 0 || !n.is_multiple_of(dim) {
        return Err(Error::invalid(
            field,
            format_args!("rows of {dim} numbers"),
            format_args!("{n} numbers"),
        ));
    }
    Ok(n / dim)
}

pub(super) fn embed(cpu: &Cpu, table: &Weight, ids: &[u32], out: &Buf) -> Result<()> {
    let (data, row) = weight("embed.table", table)?;
    let cols = table.cols as usize;
    if let Some(id) = ids.iter().find(|&&id| id >= table.rows) {
        return Err(Error::invalid("embed.ids", format_args!("ids below {}", table.rows), id));
    }
    mem::disjoint("embed.out", out, &[&table.data])?;
    let to = mem::f32s_mut("embed.out", out, mem::size("embed.out", &[ids.len(), cols])?)?;
    for (to, &id) in to.chunks_exact_mut(cols).zip(ids) {
        (cpu.kernels.dequantize)(table.kind, &data[id as usize * row..][..row], to);
    }
    Ok(())
}

pub(super) fn rms_norm(cpu: &Cpu, x: &Buf, weight: &Buf, eps: f32, dim: usize, out: &Buf) -> Result<()> {
    let n = rows_of("rmsNorm.x", x, dim)?;
    mem::disjoint("rmsNorm.out", out, &[x, weight])?;
    let (x, weight) = (mem::f32s("rmsNorm.x", x, n * dim)?, mem::f32s("rmsNorm.weight", weight, dim)?);
    let out = mem::f32s_mut("rmsNorm.out", out, n * dim)?;
    for (x, out) in x.chunks_exact(dim).zip(out.chunks_exact_mut(dim)) {
        let mean = (cpu.kernels.dot)(x, x) / dim as f32;
        let factor = 1.0 / (mean + eps).sqrt();
        for ((o, x), w) in out.iter_mut().zip(x).zip(weight) {
            *o = x * factor * w;
        }
    }
    Ok(())
}

pub(super) fn matmul(cpu: &Cpu, x: &Buf, w: &Weight, out: &Buf, add: bool) -> Result<()> {
    let (data, row) = weight("matMul.w", w)?;
    let (outputs, cols) = (w.rows as usize, w.cols as usize);
    let n = rows_of("matMul.x", x, cols)?;
    mem::disjoint("matMul.out", out, &[x, &w.data])?;
    let x = mem::f32s("matMul.x", x, n * cols)?;
    let out = mem::f32s_mut("matMul.out", out, mem::size("matMul.out", &[n, outputs])?)?;
    if n == 0 || outputs == 0 {
        return Ok(());
    }
    let operations = n * outputs * cols;
    let pieces = Pieces::new(out);
    let kernels = cpu.kernels;
    let put = |o: usize, r: usize, y: f32| {
        // SAFETY: each item owns the outputs `o` of its range, in every row.
        let to = unsafe { pieces.piece(r * outputs + o, 1) };
        to[0] = if add { to[0] + y } else { y };
    };
    match kernels.matvec {
        Some(matvec) if n <= FEW => cpu.pool.each(outputs.div_ceil(OUTPUTS), operations, |i| {
            let from = i * OUTPUTS;
            let to = outputs.min(from + OUTPUTS);
            matvec(w.kind, &data[from * row..to * row], cols, x, &mut |o, r, y| put(from + o, r, y));
        }),
        _ if kernels.panels => cpu.pool.each(outputs.div_ceil(PANEL), operations, |i| {
            let from = i * PANEL;
            let wide = PANEL.min(outputs - from);
            scratch(PANEL * cols, |panel| {
                for (o, to) in panel.chunks_exact_mut(cols).take(wide).enumerate() {
                    (kernels.dequantize)(w.kind, &data[(from + o) * row..][..row], to);
                }
                panel_product(&pieces, x, panel, [n, outputs, cols], from, wide, add);
            });
        }),
        _ => cpu.pool.each(outputs.div_ceil(OUTPUTS), operations, |i| {
            let from = i * OUTPUTS;
            scratch(cols, |line| {
                for o in from..outputs.min(from + OUTPUTS) {
                    (kernels.dequantize)(w.kind, &data[o * row..][..row], line);
                    for (r, x) in x.chunks_exact(cols).enumerate() {
                        put(o, r, (kernels.dot)(x, line));
                    }
                }
            });
        }),
    }
    Ok(())
}

/// `out[:, from..from + wide] (+)= x panelᵀ`.
fn panel_product(
    out: &Pieces<'_, f32>,
    x: &[f32],
    panel: &[f32],
    [n, outputs, cols]: [usize; 3],
    from: usize,
    wide: usize,
    add: bool,
) {
    assert!(x.len() == n * cols && panel.len() >= wide * cols && from + wide <= outputs);
    let to = out.start();
    // SAFETY: `out` is `[n, outputs]` and this item alone writes the columns `from..from + wide`; the strides below stay
    // inside `out`, `x` and `panel` by the assertion.
    unsafe {
        gemm::gemm(
            n,
            wide,
            cols,
            to.add(from),
            1,
            outputs as isize,
            add,
            x.as_ptr(),
            1,
            cols as isize,
            panel.as_ptr(),
            cols as isize,
            1,
            1.0,
            1.0,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

pub(super) fn activate(cpu: &Cpu, f: Activation, a: &Buf, b: &Buf, out: &Buf) -> Result<()> {
    let n = mem::floats("activate.out", out)?;
    let Activation::SwiGlu = f;
    for (field, buf) in [("activate.a", a), ("activate.b", b)] {
        mem::f32s(field, buf, n)?;
        if !mem::same(out, buf) {
            mem::disjoint("activate.out", out, &[buf])?;
        }
    }
    // In place, the argument is copied first, piece by piece: `out` must not be seen through two views.
    let to = mem::f32s_mut("activate.out", out, n)?;
    let mut spare = [[0.0f32; PIECE]; 2];
    for from in (0..n).step_by(PIECE) {
        let len = PIECE.min(n - from);
        for (spare, buf) in spare.iter_mut().zip([a, b]) {
            if mem::same(out, buf) {
                spare[..len].copy_from_slice(&to[from..from + len]);
            } else {
                spare[..len].copy_from_slice(&mem::f32s("activate", buf, n)?[from..from + len]);
            }
        }
        (cpu.kernels.swiglu)(&spare[0][..len], &spare[1][..len], &mut to[from..from + len]);
    }
    Ok(())
}

/// Numbers an activation takes at once.
const PIECE: usize = 1024;

pub(super) fn add(x: &Buf, y: &Buf) -> Result<()> {
    let n = mem::floats("add.x", x)?;
    mem::disjoint("add.x", x, &[y])?;
    let y = mem::f32s("add.y", y, n)?;
    for (x, y) in mem::f32s_mut("add.x", x, n)?.iter_mut().zip(y) {
        *x += y;
    }
    Ok(())
}

/// Sums in f64: the difference of close rows is what matters.
pub(super) fn row_distance(a: &Buf, b: &Buf, dim: usize, out: &Buf) -> Result<()> {
    let n = rows_of("rowDistance.a", a, dim)?;
    mem::disjoint("rowDistance.out", out, &[a, b])?;
    let (a, b) = (mem::f32s("rowDistance.a", a, n * dim)?, mem::f32s("rowDistance.b", b, n * dim)?);
    let out = mem::f32s_mut("rowDistance.out", out, n)?;
    for ((a, b), out) in a.chunks_exact(dim).zip(b.chunks_exact(dim)).zip(out) {
        *out = a.iter().zip(b).map(|(x, y)| (f64::from(*x) - f64::from(*y)).powi(2)).sum::<f64>() as f32;
    }
    Ok(())
}
