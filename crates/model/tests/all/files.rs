//! What the readers refuse, and how: by name, without a panic, without memory that the file does not pay for.

use std::path::Path;

use kvasir_core::{Ask, Error, Result};
use kvasir_cpu::Isa;
use kvasir_model::Llama;
use kvasir_model::gguf::Header;
use kvasir_testkit::Noise;
use serde_json::{Value as Json, json};

use crate::support::{Session, cpu, data, distance};
use crate::write::{File, Tensor, int, real, text};

fn load_bytes(bytes: &[u8]) -> Result<Llama> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    std::fs::write(&path, bytes).unwrap();
    Llama::load(path, cpu(Isa::Scalar))
}

/// The file is refused with this code, and the message says `part`.
#[track_caller]
fn refused(file: &File, code: &str, part: &str) {
    expect_error(load_bytes(&file.bytes().1), code, part);
}

#[track_caller]
fn expect_error(result: Result<Llama>, code: &str, part: &str) {
    let e = result.map(|_| ()).unwrap_err();
    assert!(e.code() == code && e.to_string().contains(part), "expected {code} with {part:?}, got {e:?}");
}

#[test]
fn a_tiny_file_runs() {
    for version in [2, 3] {
        let model = load_bytes(&File { version, ..File::tiny() }.bytes().1).unwrap();
        let logits = Session::new(&model).pass(&[0, 3, 7], Ask::All).clone();
        assert_eq!((logits.vocab, logits.rows.len()), (8, 3));
        assert!(logits.data.iter().all(|x| x.is_finite()));
    }
}

#[test]
fn what_is_not_supported_is_named() {
    let tiny = File::tiny;
    let mut file = tiny();
    let t = file.tensor("blk.0.ffn_up.weight");
    (t.kind, t.dims) = (12, vec![256, 8]);
    refused(&file, "Unsupported", "blk.0.ffn_up.weight has type Q4_K");
    file.tensor("blk.0.ffn_up.weight").kind = 14;
    refused(&file, "Unsupported", "Q6_K");
    file.tensor("blk.0.ffn_up.weight").kind = 999;
    refused(&file, "Unsupported", "ggml type 999");

    refused(&tiny().set("general.architecture", text("qwen2")), "Unsupported", "qwen2");
    refused(&tiny().set("llama.attention.sliding_window", int(4096)), "Unsupported", "sliding_window = 4096");
    refused(
        &tiny().set("llama.rope.scaling.type", text("yarn")),
        "Unsupported",
        "rope.scaling.type = \"yarn\"",
    );
    refused(&tiny().set("llama.rope.scaling.factor", real(4.0)), "Unsupported", "rope.scaling.factor = 4.0");
    refused(&tiny().set("llama.expert_count", int(8)), "Unsupported", "expert_count = 8");
    refused(
        &tiny().set("llama.rope.dimension_count", int(8)),
        "Unsupported",
        "a rotation of 8 of 16 channels",
    );
    refused(&tiny().set("llama.attention.value_length", int(8)), "Unsupported", "values of 8 channels");
    refused(&tiny().set("split.count", int(2)), "Unsupported", "split into 2 files");
    refused(&File { version: 1, ..tiny() }, "Unsupported", "version 1");
    refused(&File { version: 3u32.swap_bytes(), ..tiny() }, "Unsupported", "big-endian");

    // Harmless values of the same keys pass.
    let file = tiny().set("llama.expert_count", int(0)).set("llama.rope.scaling.type", text("none"));
    load_bytes(&file.bytes().1).unwrap();

    for name in ["blk.0.attn_q.bias", "rope_freqs.weight", "blk.1.attn_q.weight"] {
        let mut file = tiny();
        let extra = Tensor { name: name.into(), dims: vec![32], kind: 0, data: vec![0; 128], offset: None };
        file.tensors.push(extra);
        refused(&file, "Unsupported", name);
    }
}

#[test]
fn what_is_broken_is_named() {
    let tiny = File::tiny;
    let mut file = tiny();
    file.tensors.retain(|t| t.name != "blk.0.attn_k.weight");
    refused(&file, "Malformed", "blk.0.attn_k.weight is missing");
    let mut file = tiny();
    file.tensors.retain(|t| t.name != "token_embd.weight");
    refused(&file, "Malformed", "token_embd.weight");
    let mut file = tiny();
    file.tensor("blk.0.attn_k.weight").dims = vec![16, 32];
    refused(&file, "Malformed", "expected shape [16, 32], got [32, 16]");
    let mut file = tiny();
    let t = file.tensor("output_norm.weight");
    (t.kind, t.data) = (8, vec![0; 34]);
    refused(&file, "Unsupported", "output_norm.weight has type Q8_0");
    let mut file = tiny();
    let twice = file.tensors[1].clone();
    file.tensors.push(twice);
    refused(&file, "Malformed", "blk.0.attn_norm.weight appears twice");
    let mut file = tiny();
    file.tensor("blk.0.attn_q.weight").offset = Some(0);
    refused(&file, "Malformed", "overlap");
    file.tensor("blk.0.attn_q.weight").offset = Some(33);
    refused(&file, "Malformed", "not aligned");
    file.tensor("blk.0.attn_q.weight").offset = Some(u64::MAX - 31);
    refused(&file, "Malformed", "beyond the end");
    let mut file = tiny();
    file.keys.push(file.keys[0].clone());
    refused(&file, "Malformed", "general.architecture\" appears twice");
    let mut file = tiny();
    file.keys.remove(0);
    refused(&file, "Malformed", "general.architecture: expected a name, got nothing");

    refused(&tiny().set("llama.block_count", int(0)), "Malformed", "llama.block_count");
    refused(&tiny().set("llama.block_count", int(2)), "Malformed", "blk.1.attn_norm.weight is missing");
    refused(&tiny().set("llama.block_count", int(u32::MAX)), "Malformed", "llama.block_count");
    refused(&tiny().set("llama.attention.head_count", int(0)), "Malformed", "head_count");
    refused(&tiny().set("llama.attention.head_count", int(64)), "Malformed", "key_length");
    refused(&tiny().set("llama.attention.head_count_kv", int(3)), "InvalidArgument", "queryHeads");
    refused(&tiny().set("llama.embedding_length", text("32")), "Malformed", "embedding_length");
    refused(&tiny().set("llama.rope.freq_base", real(-1.0)), "Malformed", "freq_base");
    refused(&tiny().set("llama.rope.freq_base", real(f32::NAN)), "Malformed", "not finite");
    refused(&tiny().set("llama.vocab_size", int(9)), "Malformed", "vocab_size");
    refused(&tiny().set("tokenizer.ggml.eos_token_id", int(8)), "Malformed", "eos_token_id");
    refused(&tiny().set("general.alignment", int(24)), "Malformed", "alignment");
    refused(&tiny().set("x", (7, vec![2])), "Malformed", "2 is not a bool");
    refused(&tiny().set("x", (13, vec![])), "Malformed", "value type 13");
    refused(&tiny().set("x", (8, [&1u64.to_le_bytes()[..], &[0xFF]].concat())), "Malformed", "UTF-8");

    expect_error(load_bytes(b""), "Malformed", "magic");
    expect_error(load_bytes(b"GGML and more of it"), "Malformed", "does not start with `GGUF`");
    expect_error(Llama::load("/nowhere/model.gguf", cpu(Isa::Scalar)), "Io", "/nowhere/model.gguf");
}

#[test]
fn wild_counts_are_refused_before_they_are_believed() {
    let tiny = File::tiny;
    for wild in [u64::MAX, 1 << 63, 1 << 40, 1 << 20] {
        refused(&File { counts: Some((wild, 11)), ..tiny() }, "Malformed", "tensors");
        refused(&File { counts: Some((11, wild)), ..tiny() }, "Malformed", "keys");
        let count = wild.to_le_bytes().to_vec();
        refused(&tiny().set("x", (8, count.clone())), "Malformed", "x: ");
        for kind in 0..=12u32 {
            let array = [&kind.to_le_bytes()[..], &count].concat();
            refused(&tiny().set("x", (9, array)), "Malformed", "x: ");
        }
        let mut file = tiny();
        file.tensor("blk.0.attn_q.weight").dims = vec![wild, 32];
        assert_eq!(load_bytes(&file.bytes().1).unwrap_err().code(), "Malformed");
        file.tensor("blk.0.attn_q.weight").dims = vec![32, wild, wild, 4];
        assert_eq!(load_bytes(&file.bytes().1).unwrap_err().code(), "Malformed");
    }
    let mut file = tiny();
    file.tensor("blk.0.attn_q.weight").dims = vec![1; 5];
    refused(&file, "Malformed", "5 dimensions");
    file.tensor("blk.0.attn_q.weight").dims = vec![0, 32];
    refused(&file, "Malformed", "attn_q");
    // Arrays of arrays of arrays …
    let one = |kind: u32| [&kind.to_le_bytes()[..], &1u64.to_le_bytes()].concat();
    let deep = [one(9), one(9), one(9), one(9), one(9), one(9), one(0), vec![1]].concat();
    refused(&tiny().set("x", (9, deep)), "Malformed", "too deep");
    // Many empty arrays take 12 bytes each; their number is bounded all the same.
    let empty = [&0u32.to_le_bytes()[..], &0u64.to_le_bytes()].concat();
    let many = (1u64 << 22) + 1;
    let mut array = [&9u32.to_le_bytes()[..], &many.to_le_bytes()].concat();
    for _ in 0..many {
        array.extend(&empty);
    }
    refused(&tiny().set("x", (9, array)), "Malformed", "too large");
}

#[test]
fn a_truncated_file_is_an_error_at_every_length() {
    let (header, bytes) = File::tiny().bytes();
    for len in 0..header {
        let e = Header::read(&mut &bytes[..len], len as u64, "cut").unwrap_err();
        assert_eq!(e.code(), "Malformed", "{len}: {e}");
        // A file that lost bytes while it was read.
        let e = Header::read(&mut &bytes[..len], bytes.len() as u64, "cut").unwrap_err();
        assert_eq!(e.code(), "Malformed", "{len}: {e}");
    }
    for len in [header, header + 40, bytes.len() - 1] {
        expect_error(load_bytes(&bytes[..len]), "Malformed", "beyond the end of the file");
    }
}

#[test]
fn mutated_headers_never_panic() {
    let real = std::fs::read(data("models/random-h64-f16.gguf")).unwrap();
    let (tiny_header, tiny) = File::tiny().bytes();
    let mut noise = Noise::new(11);
    let mut outcomes = [0u32; 2];
    for round in 0..6000u32 {
        let (bytes, header) = if round % 4 == 0 { (&real, 16_000) } else { (&tiny, tiny_header) };
        let mut changed = bytes[..header].to_vec();
        for _ in 0..=noise.below(3) {
            // Every second change goes into the first bytes, where the counts are.
            let most = if noise.below(2) == 0 { header as u32 } else { 200 };
            let at = noise.below(most) as usize;
            changed[at] = match noise.below(3) {
                0 => 0xFF,
                1 => noise.below(256) as u8,
                _ => changed[at] ^ (1 << noise.below(8)),
            };
        }
        changed.extend(&bytes[header..]);
        let ok = Header::read(&mut changed.as_slice(), changed.len() as u64, "mutated").is_ok();
        outcomes[usize::from(ok)] += 1;
        if ok && round % 8 == 1 {
            // What still parses goes all the way.
            if let Err(e) = load_bytes(&changed) {
                assert_ne!(e.code(), "OutOfMemory", "{e}");
            }
        }
    }
    assert!(outcomes.iter().all(|&n| n > 200), "mutations too mild or too harsh: {outcomes:?}");
}

#[test]
fn fingerprints_follow_weights_and_not_names() {
    let print = |f: &File| load_bytes(&f.bytes().1).unwrap().fingerprint();
    let tiny = File::tiny();
    assert_eq!(print(&tiny), print(&tiny.clone().set("general.name", text("other"))));
    assert_ne!(print(&tiny), print(&tiny.clone().set("llama.rope.freq_base", real(20_000.0))));
    assert_ne!(print(&tiny), print(&tiny.clone().set("llama.attention.layer_norm_rms_epsilon", real(1e-6))));
    let mut changed = tiny.clone();
    changed.tensor("blk.0.ffn_down.weight").data[100] ^= 1;
    assert_ne!(print(&tiny), print(&changed));
}

#[test]
fn an_own_output_matrix_is_used() {
    let mut file = File::tiny();
    let mut output = file.tensor("token_embd.weight").clone();
    output.name = "output.weight".into();
    for b in output.data.chunks_exact_mut(4) {
        let x = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
        b.copy_from_slice(&(2.0 * x).to_le_bytes());
    }
    let tied = load_bytes(&file.bytes().1).unwrap();
    file.tensors.push(output);
    let own = load_bytes(&file.bytes().1).unwrap();
    let once = Session::new(&tied).pass(&[1, 2], Ask::All).data.clone();
    let twice = Session::new(&own).pass(&[1, 2], Ask::All).data.clone();
    assert_eq!(once.iter().map(|x| 2.0 * x).collect::<Vec<_>>(), twice);
    assert_ne!(tied.fingerprint(), own.fingerprint());
}

// ---- Hugging Face folders ----

const HF: &str = "models/stories260K-hf";

fn config() -> Json {
    serde_json::from_slice(&std::fs::read(data(HF).join("config.json")).unwrap()).unwrap()
}

fn folder(config: &Json, weights: &[u8]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    std::fs::write(dir.path().join("model.safetensors"), weights).unwrap();
    dir
}

fn load_dir(dir: &Path) -> Result<Llama> {
    Llama::load(dir, cpu(Isa::Scalar))
}

fn weights() -> Vec<u8> {
    std::fs::read(data(HF).join("model.safetensors")).unwrap()
}

#[test]
fn a_config_that_is_not_supported_is_named() {
    let weights = weights();
    let with = |key: &str, value: Json| {
        let mut c = config();
        c[key] = value;
        load_dir(folder(&c, &weights).path())
    };
    for (key, value, part) in [
        ("attention_bias", json!(true), "attention_bias = true"),
        ("mlp_bias", json!(true), "mlp_bias = true"),
        ("hidden_act", json!("gelu"), "hidden_act = \"gelu\""),
        ("sliding_window", json!(4096), "sliding_window = 4096"),
        ("rope_scaling", json!({"rope_type": "llama3", "factor": 8.0}), "rope_scaling"),
        ("rope_scaling", json!({"type": "linear", "factor": 2.0}), "rope_scaling"),
        ("rope_parameters", json!({"rope_type": "yarn", "rope_theta": 1e4}), "rope_parameters"),
        ("quantization_config", json!({"quant_method": "gptq"}), "quantization_config"),
        ("partial_rotary_factor", json!(0.5), "partial_rotary_factor = 0.5"),
        ("model_type", json!("mistral"), "mistral"),
        ("architectures", json!(["Qwen2ForCausalLM"]), "Qwen2ForCausalLM"),
    ] {
        expect_error(with(key, value), "Unsupported", part);
    }
    for (key, value, part) in [
        ("architectures", json!([]), "architectures"),
        ("hidden_size", json!(-1), "hidden_size"),
        ("hidden_size", json!(1e300), "hidden_size"),
        ("hidden_size", json!(65), "expected shape [512, 65]"),
        ("num_hidden_layers", json!(1_000_000), "num_hidden_layers"),
        ("num_hidden_layers", json!(6), "model.layers.5.input_layernorm.weight is missing"),
        ("tie_word_embeddings", json!(false), "lm_head.weight is missing"),
        ("tie_word_embeddings", json!("yes"), "tie_word_embeddings"),
        ("vocab_size", json!(0), "vocab_size"),
        ("rms_norm_eps", json!(0), "rms_norm_eps"),
    ] {
        expect_error(with(key, value), "Malformed", part);
    }
    // Fewer layers than the file has: the others may not be ignored.
    expect_error(with("num_hidden_layers", json!(4)), "Unsupported", "model.layers.4.");
    // The way newer exports write an unscaled rotation.
    let model = with("rope_parameters", json!({"rope_type": "default", "rope_theta": 10_000.0})).unwrap();
    assert_eq!(model.fingerprint(), load_dir(&data(HF)).unwrap().fingerprint());
}

#[test]
fn a_broken_safetensors_file_is_an_error() {
    let good = weights();
    let n = u64::from_le_bytes(good[..8].try_into().unwrap()) as usize;
    let load = |bytes: &[u8]| load_dir(folder(&config(), bytes).path());
    for wild in [u64::MAX, 1 << 40, good.len() as u64, 0] {
        let mut bytes = good.clone();
        bytes[..8].copy_from_slice(&wild.to_le_bytes());
        assert_eq!(load(&bytes).unwrap_err().code(), "Malformed", "{wild}");
    }
    for len in [0, 7, 8, 100, n + 7, n + 8, good.len() - 1] {
        assert_eq!(load(&good[..len]).unwrap_err().code(), "Malformed", "{len}");
    }
    let mut longer = good.clone();
    longer.push(0);
    expect_error(load(&longer), "Malformed", "bytes of data expected");
    let mut noise = Noise::new(5);
    for _ in 0..300 {
        let mut bytes = good.clone();
        for _ in 0..=noise.below(3) {
            bytes[8 + noise.below(n as u32) as usize] = noise.below(256) as u8;
        }
        if let Err(e) = load(&bytes) {
            assert!(matches!(e, Error::Malformed { .. } | Error::Unsupported { .. }), "{e:?}");
        }
    }
    let dir = folder(&config(), &good);
    std::fs::write(dir.path().join("config.json"), "{").unwrap();
    expect_error(load_dir(dir.path()), "Malformed", "config.json");
    std::fs::remove_file(dir.path().join("config.json")).unwrap();
    expect_error(load_dir(dir.path()), "Io", "config.json");
}

#[test]
fn shards_and_16_bit_floats() {
    let bytes = weights();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), config().to_string()).unwrap();
    let (mut shards, mut map) = ([Vec::new(), Vec::new()], serde_json::Map::new());
    for (i, (name, view)) in file.tensors().into_iter().enumerate() {
        map.insert(name.clone(), format!("part-{}.safetensors", i % 2).into());
        shards[i % 2].push((name, view));
    }
    for (i, shard) in shards.into_iter().enumerate() {
        let out = safetensors::serialize(shard, None).unwrap();
        std::fs::write(dir.path().join(format!("part-{i}.safetensors")), out).unwrap();
    }
    let index = dir.path().join("model.safetensors.index.json");
    let write = |map: &serde_json::Map<String, Json>| {
        std::fs::write(&index, json!({ "weight_map": map }).to_string()).unwrap();
    };
    write(&map);
    let whole = load_dir(&data(HF)).unwrap();
    assert_eq!(load_dir(dir.path()).unwrap().fingerprint(), whole.fingerprint());
    for bad in ["../part-0.safetensors", "/etc/passwd", "a/b", "..", ""] {
        let mut map = map.clone();
        map.insert("model.norm.weight".into(), bad.into());
        write(&map);
        expect_error(load_dir(dir.path()), "Malformed", "is not a file name");
    }
    let mut elsewhere = map.clone();
    elsewhere.insert("model.embed.weight".into(), "part-0.safetensors".into());
    write(&elsewhere);
    expect_error(load_dir(dir.path()), "Malformed", "model.embed.weight is not in part-0.safetensors");

    // bf16 keeps 8 bits: logits move, the argmax of a sure step does not.
    let narrow: Vec<(String, Vec<usize>, Vec<u8>)> = file
        .tensors()
        .into_iter()
        .map(|(name, view)| {
            let four = view.data().chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]));
            let data = four.flat_map(|x| half::bf16::from_f32(x).to_le_bytes()).collect();
            (name, view.shape().to_vec(), data)
        })
        .collect();
    let views = narrow.iter().map(|(name, shape, data)| {
        (name, safetensors::tensor::TensorView::new(safetensors::Dtype::BF16, shape.clone(), data).unwrap())
    });
    let bytes = safetensors::serialize(views, None).unwrap();
    let narrow = load_dir(folder(&config(), &bytes).path()).unwrap();
    let a = Session::new(&whole).pass(&[1, 410, 469, 347], Ask::Last).data.clone();
    let b = Session::new(&narrow).pass(&[1, 410, 469, 347], Ask::Last).data.clone();
    let far = distance(&a, &b);
    assert!(far > 0.0 && far < 0.5, "{far}");
    assert_eq!(narrow.weight_types().keys().collect::<Vec<_>>(), [&"BF16"]);
}
