//! Golden values of SmolLM2-135M-Instruct (Q4_1): an independent f32 forward pass over the dequantized weights.
//!
//! The file is not in the repository: `KVASIR_SMOLLM2` names it, or `scripts/setup.mjs` has put it into the cache folder.
//! Without it these tests say that they did not run; in CI they fail.

use std::io::Write;
use std::path::PathBuf;
use std::sync::LazyLock;

use kvasir_core::Ask;
use kvasir_cpu::Isa;
use kvasir_model::{Llama, eval};

use crate::support::{Golden, Session, cpu, ids, ids_u16, json, p_chunk};

fn path() -> PathBuf {
    let set = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    let home = || set("HOME").or_else(|| set("USERPROFILE")).unwrap_or_default().join(".cache");
    set("KVASIR_SMOLLM2").unwrap_or_else(|| {
        set("KVASIR_CACHE")
            .unwrap_or_else(|| set("XDG_CACHE_HOME").unwrap_or_else(home).join("kvasir"))
            .join("SmolLM2-135M-Instruct.Q4_1.gguf")
    })
}

static MODEL: LazyLock<Option<Llama>> =
    LazyLock::new(|| path().exists().then(|| Llama::load(path(), cpu(Isa::Auto)).unwrap()));

/// The model, or `None` after a line that the test harness does not swallow.
fn model(test: &str) -> Option<&'static Llama> {
    let model = MODEL.as_ref();
    if model.is_none() {
        let missing = format!("{} is missing", path().display());
        assert!(std::env::var_os("CI").is_none(), "{missing}");
        // In one write, so that lines of other tests stay apart.
        let line = format!("NOT RUN: {test}: {missing}\n");
        std::io::stderr().write_all(line.as_bytes()).unwrap();
    }
    model
}

#[test]
fn metadata() {
    let Some(model) = model("smollm2::metadata") else { return };
    assert_eq!((model.vocab(), model.context(), model.bos()), (49_152, 8192, Some(1)));
    assert_eq!(model.eos(), [2]);
    let types: Vec<_> = model.weight_types().iter().map(|(k, v)| (*k, *v)).collect();
    assert_eq!(types, [("F32", 61), ("Q4_1", 210), ("Q8_0", 1)]);
    let meta = &model.metadata_json()["metadata"];
    assert_eq!(meta["tokenizer.ggml.merges"].as_array().unwrap().len(), 48_900);
    assert!(meta["tokenizer.chat_template"].as_str().unwrap().contains("<|im_start|>"));
}

#[test]
fn greedy_ids() {
    let Some(model) = model("smollm2::greedy_ids") else { return };
    for case in json("smollm2/golden.json")["greedy"].as_array().unwrap() {
        let expected = ids(&case["greedy_ids"]);
        let got = Session::new(model).greedy(&ids(&case["prompt_ids"]), expected.len());
        assert_eq!(got, expected, "{}", case["name"]);
    }
}

#[test]
fn logits_of_alice() {
    let Some(model) = model("smollm2::logits_of_alice") else { return };
    let golden = json("smollm2/golden.json");
    let text = ids_u16("smollm2/alice.smollm2.u16");
    let input: Vec<u32> = std::iter::once(0).chain(text).take(512).collect();
    let mut session = Session::new(model);
    let logits = session.pass(&input, Ask::All);
    let mut far = 0f64;
    for case in golden["alice512_logits_top20"].as_array().unwrap() {
        let row = logits.row(case["pos"].as_u64().unwrap() as usize);
        for (id, expected) in ids(&case["ids"]).iter().zip(case["logits"].as_array().unwrap()) {
            far = far.max((f64::from(row[*id as usize]) - expected.as_f64().unwrap()).abs());
        }
        far = far.max((eval::log_sum_exp(row) - case["logsumexp"].as_f64().unwrap()).abs());
        assert_eq!(eval::top1(row), ids(&case["ids"])[0]);
    }
    // Two f32 passes that add in different order; the reference is 6.2e-5 off its f64 twin.
    assert!(far < 5e-4, "{far}");
}

#[test]
fn keys_and_values_of_alice() {
    let Some(model) = model("smollm2::keys_and_values_of_alice") else { return };
    let golden = Golden::open("smollm2/smollm2.alice64.features.f16.safetensors");
    let mut session = Session::new(model);
    session.pass(&golden.ids("tokens"), Ask::None);
    for layer in [0, 14, 29] {
        let (k, v) = session.hooks.rows(layer);
        for (name, got) in [("k", k), ("v", v)] {
            let expected = golden.f32(&format!("layers.{layer}.{name}"));
            assert_eq!(got.len(), expected.len());
            for (i, (a, b)) in got.iter().zip(&expected).enumerate() {
                // The golden values are rounded to f16.
                let allowed = b.abs() / 2048.0 + 2e-4;
                assert!((a - b).abs() <= allowed, "layer {layer} {name}[{i}]: {a} {b}");
            }
        }
    }
}

#[test]
fn perplexity_of_alice() {
    let Some(model) = model("smollm2::perplexity_of_alice") else { return };
    let ppl = p_chunk(model, &ids_u16("smollm2/alice.smollm2.u16"), 0, 512, 4);
    assert!((ppl - 24.422).abs() < 1e-3, "{ppl}");
}
