//! The shared contract suite, on every path and behind the deferred backend.

use std::sync::Arc;

use kvasir_cpu::{Cpu, CpuOptions, Isa};
use kvasir_testkit::contract;

fn cpu(isa: Isa) -> Cpu {
    Cpu::new(CpuOptions { isa, threads: Some(2) }).expect("a backend")
}

#[test]
fn scalar_keeps_the_contract() {
    contract::run(&cpu(Isa::Scalar));
}
