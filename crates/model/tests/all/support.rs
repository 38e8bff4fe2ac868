//! Paths, small readers and runs that several tests share.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use kvasir_core::{Ask, Backend, Batch, Logits, Model};
use kvasir_cpu::{Cpu, CpuOptions, Isa};
use kvasir_model::{Llama, eval};
use serde_json::Value as Json;

use crate::hooks::Dense;

pub(crate) fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata").join(name)
}

pub(crate) fn cpu(isa: Isa) -> Arc<dyn Backend> {
    Arc::new(Cpu::new(CpuOptions { isa, ..CpuOptions::default() }).unwrap())
}

pub(crate) fn load(name: &str, isa: Isa) -> Llama {
    Llama::load(data(name), cpu(isa)).unwrap()
}

pub(crate) fn json(name: &str) -> Json {
    serde_json::from_slice(&std::fs::read(data(name)).unwrap()).unwrap()
}

pub(crate) fn ids(v: &Json) -> Vec<u32> {
    v.as_array().unwrap().iter().map(|x| x.as_u64().unwrap() as u32).collect()
}

pub(crate) fn ids_u16(name: &str) -> Vec<u32> {
    std::fs::read(data(name))
        .unwrap()
        .chunks_exact(2)
        .map(|b| u32::from(u16::from_le_bytes([b[0], b[1]])))
        .collect()
}

/// Tensors of a golden file, widened to f32.
pub(crate) struct Golden(Vec<u8>);

impl Golden {
    pub(crate) fn open(name: &str) -> Self {
        Self(std::fs::read(data(name)).unwrap())
    }

    pub(crate) fn f32(&self, name: &str) -> Vec<f32> {
        let file = safetensors::SafeTensors::deserialize(&self.0).unwrap();
        let t = file.tensor(name).unwrap();
        let four = || t.data().chunks_exact(4).map(|b| [b[0], b[1], b[2], b[3]]);
        match t.dtype() {
            safetensors::Dtype::F32 => four().map(f32::from_le_bytes).collect(),
            safetensors::Dtype::I32 => four().map(|b| i32::from_le_bytes(b) as f32).collect(),
            safetensors::Dtype::F16 => {
                t.data().chunks_exact(2).map(|b| half::f16::from_le_bytes([b[0], b[1]]).to_f32()).collect()
            }
            other => panic!("{other:?}"),
        }
    }

    pub(crate) fn ids(&self, name: &str) -> Vec<u32> {
        self.f32(name).iter().map(|&x| x as u32).collect()
    }
}

/// Largest difference of two tensors.
pub(crate) fn distance(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max)
}

/// One sequence over a dense f32 cache.
pub(crate) struct Session<'a> {
    pub(crate) model: &'a Llama,
    pub(crate) hooks: Dense,
    pub(crate) at: u32,
    pub(crate) logits: Logits,
}

impl<'a> Session<'a> {
    pub(crate) fn new(model: &'a Llama) -> Self {
        let hooks = Dense::new(model.backend(), model.layout(), 1);
        Self { model, hooks, at: 0, logits: Logits::default() }
    }

    pub(crate) fn pass(&mut self, ids: &[u32], ask: Ask) -> &Logits {
        self.model.forward(&Batch::one(ids, self.at, ask), &mut self.hooks, &mut self.logits).unwrap();
        self.at += ids.len() as u32;
        &self.logits
    }

    /// Greedy ids behind the prompt, fed in passes of 256.
    pub(crate) fn greedy(&mut self, prompt: &[u32], count: usize) -> Vec<u32> {
        for chunk in prompt.chunks(256) {
            self.pass(chunk, Ask::Last);
        }
        let mut out = vec![eval::top1(self.logits.row(0))];
        while out.len() < count {
            out.push(eval::top1(self.pass(&out[out.len() - 1..], Ask::Last).row(0)));
        }
        out
    }
}

/// Sum of the negative log-likelihoods of `targets` after `input`, computed in one pass.
pub(crate) fn nll_sum(model: &Llama, input: &[u32], targets: &[u32]) -> f64 {
    assert_eq!(input.len(), targets.len());
    let mut session = Session::new(model);
    let logits = session.pass(input, Ask::All);
    targets.iter().enumerate().map(|(i, &t)| eval::nll(logits.row(i), t)).sum()
}

/// Perplexity of the first `chunks` chunks of `size` ids, each behind `lead`.
pub(crate) fn p_chunk(model: &Llama, ids: &[u32], lead: u32, size: usize, chunks: usize) -> f64 {
    let mut sum = 0.0;
    for chunk in ids.chunks_exact(size).take(chunks) {
        let input: Vec<u32> = std::iter::once(lead).chain(chunk[..size - 1].iter().copied()).collect();
        sum += nll_sum(model, &input, chunk);
    }
    (sum / (size * chunks) as f64).exp()
}
