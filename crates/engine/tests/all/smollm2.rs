//! SmolLM2-135M-Instruct: published perplexities and the int8 line of the cached-prefix table, by the product's own code.
//!
//! The model file is named by `KVASIR_SMOLLM2` or lies in the cache folder; in CI a missing file is a failure.

use std::path::PathBuf;
use std::sync::Arc;

use kvasir_cpu::Isa;
use kvasir_engine::{Cancel, Dtype, drive};
use kvasir_model::Llama;
use serde_json::json;

use crate::support::{backend, options, testdata};

fn real_model() -> Option<PathBuf> {
    let cached = || {
        let home = std::env::var_os("HOME")?;
        Some(PathBuf::from(home).join(".cache/kvasir/SmolLM2-135M-Instruct.Q4_1.gguf"))
    };
    let path = std::env::var_os("KVASIR_SMOLLM2").map(PathBuf::from).or_else(cached)?;
    if path.exists() {
        return Some(path);
    }
    assert!(
        std::env::var_os("CI").is_none(),
        "{} is missing; run npm test, which fetches it",
        path.display()
    );
    eprintln!("NOT RUN: {} is missing", path.display());
    None
}

fn alice() -> Vec<u32> {
    let bytes = std::fs::read(testdata("smollm2/alice.smollm2.u16")).unwrap();
    bytes.chunks_exact(2).map(|b| u32::from(u16::from_le_bytes([b[0], b[1]]))).collect()
}

#[test]
fn perplexities_match_the_published_values() {
    let Some(path) = real_model() else { return };
    let backend = backend(Isa::Auto);
    let model = Llama::load(path, Arc::clone(&backend)).unwrap();
    let run = |chunk, chunks, prefix, session, dense| {
        let o = drive::EvaluateOptions { ids: alice(), chunk, chunks, prefix, bos: Some(0), session, dense };
        drive::evaluate(&model, &backend, &o, &Cancel::default()).unwrap()
    };
    // P-CHUNK(512, 4) over f32 rows: 24.422.
    let dense = run(512, 4, 0, options(Dtype::F32, &json!([])), false);
    assert!((dense.perplexity - 24.422).abs() < 0.005, "{dense:?}");
    // A prefix of 256 cached as int8, 256 measured: nearly free, and really coded.
    let int8 = run(512, 1, 256, options(Dtype::F16, &json!([{ "use": "int8" }])), true);
    assert!(int8.coded_tiles > 0 && int8.kl > 0.0 && int8.kl < 0.001 && int8.top1 > 0.98, "{int8:?}");
    println!("f32 {dense:?}\nint8 {int8:?}");
}
