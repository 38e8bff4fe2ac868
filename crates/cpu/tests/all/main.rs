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

#[test]
fn options_are_checked_and_reported() {
    for n in [0, 5000] {
        let options = CpuOptions { threads: Some(n), ..CpuOptions::default() };
        assert_eq!(Cpu::new(options).err().expect("a refusal").code(), "InvalidArgument");
    }
    let backend = cpu(Isa::Scalar);
    let info = kvasir_core::Backend::info(&backend);
    assert_eq!((info.kind.as_str(), info.isa.as_str(), info.threads), ("cpu", "scalar", 2));
    assert!(!info.device.is_empty());
    assert!(Cpu::new(CpuOptions::default()).is_ok());
}
