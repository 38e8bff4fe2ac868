//! Weight products of a small model (hidden 576, inner 1536, vocabulary 49152), per block type: one row reads weights, 256
//! rows multiply panels.
//!
//! `cargo bench -p kvasir-cpu --bench matmul -- [threads]`

#![allow(clippy::print_stdout, missing_docs)] // a table on stdout is what a bench is for

use std::time::Instant;

use kvasir_core::{Backend, Call, Result, Weight, WeightType};
use kvasir_cpu::{Cpu, CpuOptions};

/// Best seconds of several runs.
fn best(cpu: &Cpu, kind: WeightType, n: usize, rows: usize, cols: usize) -> Result<f64> {
    // Any finite numbers do; untouched memory would be one page of zeros, read from the cache.
    let data = cpu.upload(&vec![0x3c; rows * kind.row_bytes(cols)])?;
    let (x, out) = (cpu.upload_f32(&vec![0.5; n * cols])?, cpu.alloc(n * rows * 4)?);
    let mut best = f64::MAX;
    for _ in 0..if n == 1 { 30 } else { 8 } {
        let w = Weight { data: data.clone(), kind, rows: rows as u32, cols: cols as u32 };
        let start = Instant::now();
        cpu.submit(Call::MatMul { x: x.clone(), w, out: out.clone(), add: false })?;
        best = best.min(start.elapsed().as_secs_f64());
    }
    Ok(best)
}

fn main() -> Result<()> {
    let threads = std::env::args().skip(1).find_map(|a| a.parse().ok());
    let cpu = Cpu::new(CpuOptions { threads, ..CpuOptions::default() })?;
    println!("{}, {}, {} threads", cpu.info().device, cpu.info().isa, cpu.info().threads);
    println!(
        "{:>6} {:>5} {:>6} {:>5} {:>10} {:>9} {:>9}",
        "type", "rows", "out", "in", "us", "GFLOP/s", "weights GB/s"
    );
    for kind in [
        WeightType::F32,
        WeightType::F16,
        WeightType::Bf16,
        WeightType::Q8_0,
        WeightType::Q4_0,
        WeightType::Q4_1,
    ] {
        for (n, rows, cols) in [
            (1, 576, 576),
            (1, 1536, 576),
            (1, 576, 1536),
            (1, 49152, 576),
            (256, 576, 576),
            (256, 1536, 576),
            (256, 576, 1536),
        ] {
            let t = best(&cpu, kind, n, rows, cols)?;
            println!(
                "{:>6} {n:>5} {rows:>6} {cols:>5} {:>10.1} {:>9.1} {:>9.1}",
                format!("{kind:?}"),
                t * 1e6,
                2.0 * (n * rows * cols) as f64 / t / 1e9,
                (rows * kind.row_bytes(cols)) as f64 / t / 1e9
            );
        }
    }
    Ok(())
}
