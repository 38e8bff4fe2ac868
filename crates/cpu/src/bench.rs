//! Attention of a decode step against the speed of reading memory.
//!
//! Each round measures the ceiling (a plain sum over a large buffer, on the same threads) next to each code, since a shared
//! machine changes from second to second; what is reported is the median over rounds of the per-round ratios. Buffer and
//! tables hold more bytes than a cache does and are timed in slices of 8 MiB, of which the best counts: other processes
//! interrupt some of them.

use std::hint::black_box;
use std::sync::Arc;
use std::time::Instant;

use kvasir_core::{
    Attend, AttendSeq, Backend, Call, Code, Codes, Format, Mask, Meta, Pos, Result, Run, TILE_ROWS, Tile,
    check, tile_bytes,
};
use serde::Serialize;

use crate::arch::all::tile::{Store, encode_row};
use crate::{Cpu, CpuOptions, mem};

/// What to measure.
#[derive(Clone, Debug)]
pub struct BenchOptions {
    /// Kernels and threads.
    pub cpu: CpuOptions,
    /// Cached tokens.
    pub tokens: u32,
    /// Rounds; the median is reported.
    pub rounds: usize,
    /// Bytes that the tables of one measurement, and the buffer of the ceiling, hold at least.
    pub bytes: usize,
    /// Channels per head.
    pub head_dims: Vec<u16>,
    /// Query heads per kv head.
    pub groups: Vec<u16>,
}

impl Default for BenchOptions {
    fn default() -> Self {
        Self {
            cpu: CpuOptions::default(),
            tokens: 8192,
            rounds: 7,
            bytes: 64 << 20,
            head_dims: vec![64, 128],
            groups: vec![1, 3, 4, 8],
        }
    }
}

/// Speed of attention over one code.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct AttentionRow {
    /// Code of keys and values.
    pub code: String,
    /// Channels per head.
    pub head_dim: u16,
    /// Query heads per kv head.
    pub group: u16,
    /// Cached tokens.
    pub tokens: u32,
    /// Stored bytes read per second, in 10^9.
    pub gbps: f64,
    /// The same over the ceiling.
    pub fraction_of_ceiling: f64,
    /// Tokens per second over those of f16.
    pub ratio_to_f16: f64,
}

/// Result of [`bench_attention`].
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct BenchReport {
    /// Kernels used.
    pub isa: String,
    /// Threads used.
    pub threads: usize,
    /// Processor.
    pub device: String,
    /// Bytes per second that these threads read, in 10^9.
    #[serde(rename = "ceilingGBps")]
    pub ceiling_gbps: f64,
    /// One row per code, head size and group.
    pub attention: Vec<AttentionRow>,
}

/// Bytes timed at once.
const SLICE: usize = 8 << 20;

/// Bytes per second, in 10^9, at which the threads of `cpu` read `data`: the best slice of 8 MiB.
pub fn ceiling(cpu: &Cpu, data: &[u64]) -> f64 {
    let speed = |slice: &[u64]| {
        let pieces: Vec<&[u64]> = slice.chunks(1 << 16).collect();
        let start = Instant::now();
        cpu.pool.each(pieces.len(), usize::MAX, |i| {
            let mut lanes = [0u64; 32];
            for x in pieces[i].chunks_exact(32) {
                for (a, x) in lanes.iter_mut().zip(x) {
                    *a = a.wrapping_add(*x);
                }
            }
            black_box(lanes);
        });
        size_of_val(slice) as f64 / start.elapsed().as_secs_f64() / 1e9
    };
    data.chunks_exact(SLICE / 8).map(speed).fold(0.0, f64::max)
}

/// A decode step over tables of one code, in slices of several kv heads.
struct Step {
    calls: Vec<Attend>,
    /// Bytes of a kv head's tiles.
    bytes: f64,
}

impl Step {
    fn new(cpu: &Cpu, format: Format, options: &BenchOptions, dim: u16, group: u16) -> Result<Self> {
        let codes: Codes = [Code::rotated(format), Code::plain(format)];
        let d = dim as usize;
        let (tile, tiles) = (tile_bytes(&codes, d, d)?, (options.tokens as usize).div_ceil(TILE_ROWS));
        // One tile of noise, copied: what the numbers are does not change the time.
        let mut record = vec![0u8; tile];
        let store = Store::of("bench.code", &codes[0])?;
        let values = kvasir_core::value_offset(&codes, d)?;
        let mut state = 1u32;
        let mut row = || -> Vec<f32> {
            let mut next = || {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 8) as f32 / (1 << 23) as f32 - 1.0
            };
            (0..d).map(|_| next()).collect()
        };
        for t in 0..TILE_ROWS {
            encode_row(kvasir_core::Role::Key, store, &mut record[..values], t, &row());
            encode_row(kvasir_core::Role::Value, store, &mut record[values..], t, &row());
        }
        let run = || -> Result<Run> {
            let all = cpu.alloc(tile * tiles)?;
            for to in mem::bytes_mut("bench.tiles", &all)?.chunks_exact_mut(tile) {
                to.copy_from_slice(&record);
            }
            let tiles =
                (0..tiles).map(|i| Ok(Tile { codes: all.slice(i * tile..(i + 1) * tile)?, own: true }));
            let tiles = Arc::new(tiles.collect::<Result<Vec<_>>>()?);
            let meta = Meta { pos: Pos::From(0), bias: None, scale: [None, None], cols: Vec::new() };
            Ok(Run { codes: codes.clone(), tiles, rows: options.tokens, meta })
        };
        let (per_call, pos): (usize, Arc<[u32]>) = (SLICE.div_ceil(tile * tiles), [options.tokens].into());
        let call = || -> Result<Attend> {
            let q_heads = per_call * group as usize;
            let q: Vec<f32> = (0..q_heads).flat_map(|_| row()).collect();
            Ok(Attend {
                q: cpu.upload_f32(&q)?,
                q_pos: Arc::clone(&pos),
                q_rope: Arc::clone(&pos),
                out: cpu.alloc(q.len() * 4)?,
                lse: None,
                q_heads: q_heads as u16,
                kv_heads: per_call as u16,
                k_dim: dim,
                v_dim: dim,
                scale: 1.0 / (d as f32).sqrt(),
                rope: None,
                mask: Mask::Causal,
                window: None,
                seqs: vec![AttendSeq {
                    rows: 0..1,
                    heads: (0..per_call).map(|_| Ok(vec![run()?])).collect::<Result<_>>()?,
                    pass_from: options.tokens,
                }],
                columns: Vec::new(),
            })
        };
        let calls = options.bytes.div_ceil(per_call * tile * tiles).max(1);
        let calls = std::iter::repeat_with(call).take(calls).collect::<Result<_>>()?;
        Ok(Self { calls, bytes: (tiles * tile) as f64 })
    }

    /// Seconds per kv head, of the best slice.
    fn time(&self, cpu: &Cpu) -> Result<f64> {
        let mut best = f64::MAX;
        for call in &self.calls {
            let heads = f64::from(call.kv_heads);
            let call = Call::Attend(Box::new(call.clone()));
            let start = Instant::now();
            cpu.submit(call)?;
            best = best.min(start.elapsed().as_secs_f64() / heads);
        }
        Ok(best)
    }
}

fn median(mut x: Vec<f64>) -> f64 {
    x.sort_by(f64::total_cmp);
    x[x.len() / 2]
}

/// Measures attention of one query row over `tokens` cached tokens for every code, head size and group.
pub fn bench_attention(options: &BenchOptions) -> Result<BenchReport> {
    check::at_least("bench.tokens", options.tokens as usize, 1)?;
    check::at_least("bench.rounds", options.rounds, 1)?;
    check::at_least("bench.bytes", options.bytes, SLICE)?;
    let cpu = Cpu::new(options.cpu)?;
    let data: Vec<u64> = (0..options.bytes as u64 / 8).collect();
    let formats = [Format::F32, Format::F16, Format::Bf16, Format::INT8];
    let mut ceilings = Vec::new();
    let mut attention = Vec::new();
    for &dim in &options.head_dims {
        check::at_least("bench.headDims", dim as usize, 1)?;
        for &group in &options.groups {
            check::at_least("bench.groups", group as usize, 1)?;
            let steps = formats
                .iter()
                .map(|&f| Step::new(&cpu, f, options, dim, group))
                .collect::<Result<Vec<_>>>()?;
            // Per code: speed, fraction, tokens per second, over rounds.
            let mut seen = vec![[const { Vec::new() }; 3]; formats.len()];
            for step in &steps {
                step.time(&cpu)?;
            }
            for _ in 0..options.rounds {
                let top = ceiling(&cpu, &data);
                ceilings.push(top);
                let seconds = steps.iter().map(|s| s.time(&cpu)).collect::<Result<Vec<_>>>()?;
                for (i, seen) in seen.iter_mut().enumerate() {
                    let speed = steps[i].bytes / seconds[i] / 1e9;
                    seen[0].push(speed);
                    seen[1].push(speed / top);
                    seen[2].push(seconds[1] / seconds[i]);
                }
            }
            for (format, [speed, fraction, ratio]) in formats.iter().zip(seen) {
                attention.push(AttentionRow {
                    code: format.to_string(),
                    head_dim: dim,
                    group,
                    tokens: options.tokens,
                    gbps: median(speed),
                    fraction_of_ceiling: median(fraction),
                    ratio_to_f16: median(ratio),
                });
            }
        }
    }
    let info = cpu.info();
    Ok(BenchReport {
        isa: info.isa.clone(),
        threads: info.threads,
        device: info.device.clone(),
        ceiling_gbps: median(ceilings),
        attention,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_small_run_reports_every_code() {
        let options = BenchOptions {
            tokens: 100,
            rounds: 1,
            bytes: SLICE,
            head_dims: vec![16],
            groups: vec![2],
            ..BenchOptions::default()
        };
        let report = bench_attention(&options).unwrap();
        let codes: Vec<_> = report.attention.iter().map(|r| r.code.as_str()).collect();
        assert_eq!(codes, ["f32", "f16", "bf16", "int8"]);
        assert!(report.attention.iter().all(|r| r.gbps > 0.0 && r.fraction_of_ceiling > 0.0));
        assert_eq!(report.attention[1].ratio_to_f16, 1.0);
        assert!(bench_attention(&BenchOptions { rounds: 0, ..options }).is_err());
    }
}
