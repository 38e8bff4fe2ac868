//! Tests of the CPU backend.

#![allow(clippy::unwrap_used)] // helpers of tests, too

mod attend;
mod contract;
mod dense;
mod scene;
mod tiles;

use kvasir_cpu::{Cpu, CpuOptions, Isa};

fn cpu(isa: Isa) -> Cpu {
    Cpu::new(CpuOptions { isa, threads: Some(2) }).expect("a backend")
}

/// Every path of this machine.
fn cpus() -> Vec<Cpu> {
    let simd = Cpu::new(CpuOptions { isa: Isa::Avx2, threads: Some(2) });
    std::iter::once(cpu(Isa::Scalar)).chain(simd.ok()).collect()
}
