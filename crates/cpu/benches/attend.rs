//! Attention of a decode step, per code, head size and group, against the read ceiling of the same round.
//!
//! `cargo bench -p kvasir-cpu --bench attend -- [threads] [tokens]`

#![allow(clippy::print_stdout, missing_docs)] // a table on stdout is what a bench is for

use kvasir_cpu::CpuOptions;
use kvasir_cpu::bench::{BenchOptions, bench_attention};

fn main() {
    let mut numbers = std::env::args().skip(1).filter_map(|a| a.parse::<u32>().ok());
    let threads = numbers.next().map(|n| n as usize);
    let tokens = numbers.next().unwrap_or(8192);
    let options = BenchOptions {
        cpu: CpuOptions { threads, ..CpuOptions::default() },
        tokens,
        ..BenchOptions::default()
    };
    match bench_attention(&options) {
        Ok(report) => {
            println!(
                "{}, {}, {} threads, ceiling {:.1} GB/s",
                report.device, report.isa, report.threads, report.ceiling_gbps
            );
            println!(
                "{:>6} {:>4} {:>6} {:>7} {:>6} {:>9} {:>6}",
                "code", "D", "group", "tokens", "GB/s", "fraction", "x f16"
            );
            for r in report.attention {
                println!(
                    "{:>6} {:>4} {:>6} {:>7} {:>6.2} {:>9.2} {:>6.2}",
                    r.code, r.head_dim, r.group, r.tokens, r.gbps, r.fraction_of_ceiling, r.ratio_to_f16
                );
            }
        }
        Err(error) => println!("{error}"),
    }
}
