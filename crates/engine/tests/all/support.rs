//! The bundled model, a scalar backend, texts.

use std::path::PathBuf;
use std::sync::Arc;

use kvasir_core::{Backend, Model};
use kvasir_cpu::{Cpu, CpuOptions, Isa};
use kvasir_engine::{Cache, Cancel, Dtype, Recipe, Session, SessionOptions, drive};
use kvasir_model::Llama;
use kvasir_store::Options;
use serde_json::json;

pub(crate) fn testdata(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../testdata").join(name)
}

pub(crate) fn backend(isa: Isa) -> Arc<dyn Backend> {
    Arc::new(Cpu::new(CpuOptions { isa, threads: Some(2) }).unwrap())
}

/// The small trained model on a backend of its own.
pub(crate) fn model(isa: Isa) -> (Arc<dyn Backend>, Llama) {
    let backend = backend(isa);
    let model = Llama::load(testdata("models/stories260K-f32.gguf"), Arc::clone(&backend)).unwrap();
    (backend, model)
}

pub(crate) fn options(dtype: Dtype, recipe: &serde_json::Value) -> SessionOptions {
    SessionOptions { dtype, recipe: Recipe::parse(recipe).unwrap(), ..SessionOptions::default() }
}

pub(crate) fn dense(dtype: Dtype) -> SessionOptions {
    options(dtype, &json!([]))
}

pub(crate) fn int8() -> SessionOptions {
    options(Dtype::F16, &json!([{ "use": "int8" }]))
}

pub(crate) fn cache(dir: Option<&std::path::Path>, backend: &Arc<dyn Backend>) -> Cache {
    let options = Options { dir: dir.map(Into::into), host_bytes: 64 << 20, ..Options::default() };
    Cache::open(options, Arc::clone(backend)).unwrap()
}

pub(crate) fn open(cache: &Cache, model: &Llama, tenant: &str, options: SessionOptions) -> Session {
    cache.session(tenant, None, Arc::new(model.layout().clone()), options).unwrap()
}

/// Ids of a text that the model knows: token 1, then a fixed pseudo-random walk over pieces.
pub(crate) fn ids(n: usize, seed: u32) -> Vec<u32> {
    let mut x = seed.wrapping_mul(2_654_435_761).wrapping_add(12345);
    std::iter::once(1)
        .chain(std::iter::repeat_with(move || {
            x = x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            259 + (x >> 8) % 253
        }))
        .take(n)
        .collect()
}

/// `n` greedy tokens behind what the session holds.
pub(crate) fn greedy(model: &Llama, session: &mut Session, n: usize) -> Vec<u32> {
    let mut out = Vec::new();
    for _ in 0..n {
        let next = kvasir_core::eval::top1(session.logits().unwrap());
        out.push(next);
        drive::step(model, &mut [session], &[next], &Cancel::default()).unwrap();
    }
    out
}
