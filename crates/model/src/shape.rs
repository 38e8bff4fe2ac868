//! Hyperparameters of a Llama-type decoder, and the refusal of everything that is not one.
//!
//! GGUF keys and Hugging Face fields are looked at one by one; a field that would change the arithmetic and is not known
//! here is refused by its name rather than ignored.

use kvasir_core::{Error, LayerLayout, Layout, Result, Rope, SideId, check};
use serde::Serialize;
use serde_json::{Map, Value as Json};

/// Numbers that shape the model.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Shape {
    /// Transformer layers.
    pub layers: u32,
    /// Width of the residual stream.
    pub hidden: u32,
    /// Width of the feed-forward part.
    pub ffn: u32,
    /// H.
    pub q_heads: u16,
    /// K.
    pub kv_heads: u16,
    /// D, of keys, queries and values.
    pub head_dim: u16,
    /// Ids.
    pub vocab: u32,
    /// Tokens the model was trained to see at once.
    pub context: u32,
    /// Base of the rotation.
    pub rope_theta: f64,
    /// Pairs of the rotation: adjacent (GGUF) or half-split (Hugging Face).
    pub adjacent: bool,
    /// Added to the mean square in norms.
    pub eps: f32,
    /// The output matrix is the embedding.
    pub tied: bool,
    /// Token that begins a text.
    pub bos: Option<u32>,
    /// Tokens that end a text.
    pub eos: Vec<u32>,
}

/// Fields of a JSON object, with errors that name them.
struct Fields<'a> {
    map: &'a Map<String, Json>,
    what: &'a str,
    prefix: &'static str,
}

impl Fields<'_> {
    fn get(&self, key: &str) -> Option<&Json> {
        self.map.get(&format!("{}{key}", self.prefix)).filter(|v| !v.is_null())
    }

    fn bad(&self, key: &str, expected: &str) -> Error {
        let got = match self.get(key) {
            None => "nothing".to_owned(),
            Some(Json::Array(a)) => format!("an array of {}", a.len()),
            Some(v) => v.to_string(),
        };
        Error::malformed(self.what, format_args!("{}{key}: expected {expected}, got {got}", self.prefix))
    }

    /// An integer in `1..=most`.
    fn count(&self, key: &str, most: u64, default: Option<u64>) -> Result<u64> {
        let value = match self.get(key) {
            None => default,
            Some(v) => v.as_u64(),
        };
        value
            .filter(|n| (1..=most).contains(n))
            .ok_or_else(|| self.bad(key, &format!("an integer from 1 to {most}")))
    }

    /// A finite number above zero.
    fn number(&self, key: &str, default: f64) -> Result<f64> {
        match self.get(key) {
            None => Ok(default),
            Some(v) => v
                .as_f64()
                .filter(|x| x.is_finite() && *x > 0.0)
                .ok_or_else(|| self.bad(key, "a number above 0")),
        }
    }

    /// A field that must be absent or one of the harmless values.
    fn only(&self, key: &str, harmless: &[Json]) -> Result<()> {
        match self.get(key) {
            None => Ok(()),
            Some(v) if harmless.iter().any(|h| h == v || (h.as_f64() == v.as_f64() && h.is_number())) => {
                Ok(())
            }
            Some(v) => Err(Error::unsupported(format!("{}: {}{key} = {}", self.what, self.prefix, brief(v)))),
        }
    }
}

/// A value for an error message.
fn brief(v: &Json) -> String {
    let text = v.to_string();
    if text.chars().count() <= 80 { text } else { text.chars().take(80).chain("…".chars()).collect() }
}

impl Shape {
    /// Reads the metadata of a GGUF file.
    pub fn from_gguf(meta: &Map<String, Json>, vocab: u64, tied: bool, what: &str) -> Result<Self> {
        let general = Fields { map: meta, what, prefix: "general." };
        match general.get("architecture").and_then(Json::as_str) {
            Some("llama") => {}
            Some(other) => {
                return Err(Error::unsupported(format!(
                    "architecture {other}; this build runs llama (general.architecture of {what})"
                )));
            }
            None => return Err(general.bad("architecture", "a name")),
        }
        let f = Fields { map: meta, what, prefix: "llama." };
        f.only("attention.sliding_window", &[0.into()])?;
        f.only("expert_count", &[0.into()])?;
        f.only("expert_used_count", &[0.into()])?;
        f.only("rope.scaling.type", &["none".into()])?;
        f.only("rope.scaling.factor", &[1.into(), 0.into()])?;
        f.only("rope.scale_linear", &[1.into(), 0.into()])?;
        f.only("attention.causal", &[true.into()])?;
        f.only("attention.scale", &[])?;
        f.only("attention.max_alibi_bias", &[0.into()])?;
        f.only("attention.clamp_kqv", &[0.into()])?;
        f.only("attn_logit_softcapping", &[])?;
        f.only("final_logit_softcapping", &[])?;
        f.only("use_parallel_residual", &[false.into()])?;
        f.only("logit_scale", &[1.into()])?;
        f.only("residual_scale", &[1.into()])?;
        f.only("embedding_scale", &[1.into()])?;
        let hidden = f.count("embedding_length", 1 << 20, None)?;
        let heads = f.count("attention.head_count", 4096, None)?;
        let head_dim = f.count("attention.key_length", 1024, Some(hidden / heads))?;
        let value_dim = f.count("attention.value_length", 1024, Some(hidden / heads))?;
        let rotated = f.count("rope.dimension_count", 1024, Some(head_dim))?;
        check_dims(what, head_dim, value_dim, rotated)?;
        let f_vocab = f.count("vocab_size", u64::from(u32::MAX), Some(vocab))?;
        if f_vocab != vocab {
            return Err(f.bad("vocab_size", &format!("{vocab}, the rows of token_embd.weight")));
        }
        let t = Fields { map: meta, what, prefix: "tokenizer.ggml." };
        let mut eos = Vec::new();
        for key in ["eos_token_id", "eot_token_id", "eom_token_id"] {
            eos.extend(
                special(&t, key, vocab)?.into_iter().filter(|id| !eos.contains(id)).collect::<Vec<_>>(),
            );
        }
        let shape = Self {
            layers: f.count("block_count", 1024, None)? as u32,
            hidden: hidden as u32,
            ffn: f.count("feed_forward_length", 1 << 20, None)? as u32,
            q_heads: heads as u16,
            kv_heads: f.count("attention.head_count_kv", 4096, Some(heads))? as u16,
            head_dim: head_dim as u16,
            vocab: vocab as u32,
            context: f.count("context_length", u64::from(u32::MAX >> 1), None)? as u32,
            rope_theta: f.number("rope.freq_base", 10_000.0)?,
            adjacent: true,
            eps: f.number("attention.layer_norm_rms_epsilon", 1e-5)? as f32,
            tied,
            bos: special(&t, "bos_token_id", vocab)?.first().copied(),
            eos,
        };
        shape.layout().check()?;
        Ok(shape)
    }

    /// Reads the `config.json` of a Hugging Face folder.
    pub fn from_config(config: &Json, what: &str) -> Result<Self> {
        let what = format!("{what}/config.json");
        let map = config.as_object().ok_or_else(|| Error::malformed(&*what, "not an object"))?;
        let f = Fields { map, what: &what, prefix: "" };
        let named = f.get("architectures").and_then(|a| a.get(0)).and_then(Json::as_str);
        match named {
            Some("LlamaForCausalLM") => {}
            Some(other) => {
                return Err(Error::unsupported(format!(
                    "architecture {other}; this build runs LlamaForCausalLM (architectures of {what})"
                )));
            }
            None => return Err(f.bad("architectures", "a list with a name")),
        }
        f.only("model_type", &["llama".into()])?;
        f.only("hidden_act", &["silu".into(), "swish".into()])?;
        f.only("attention_bias", &[false.into()])?;
        f.only("mlp_bias", &[false.into()])?;
        f.only("sliding_window", &[])?;
        f.only("quantization_config", &[])?;
        f.only("partial_rotary_factor", &[1.into()])?;
        f.only("is_causal", &[true.into()])?;
        let mut theta = f.number("rope_theta", 10_000.0)?;
        for key in ["rope_scaling", "rope_parameters"] {
            let Some(v) = f.get(key) else { continue };
            let kind = v.get("rope_type").or_else(|| v.get("type")).and_then(Json::as_str);
            let known = v
                .as_object()
                .is_some_and(|o| o.keys().all(|k| ["rope_type", "type", "rope_theta"].contains(&k.as_str())));
            if kind != Some("default") || !known {
                return Err(Error::unsupported(format!("{what}: {key} = {}", brief(v))));
            }
            if let Some(t) = v.get("rope_theta") {
                theta = t
                    .as_f64()
                    .filter(|x| x.is_finite() && *x > 0.0)
                    .ok_or_else(|| f.bad(key, "a rope_theta above 0"))?;
            }
        }
        let hidden = f.count("hidden_size", 1 << 20, None)?;
        let heads = f.count("num_attention_heads", 4096, None)?;
        let head_dim = f.count("head_dim", 1024, Some(hidden / heads))?;
        check_dims(&what, head_dim, head_dim, head_dim)?;
        let vocab = f.count("vocab_size", u64::from(u32::MAX), None)?;
        let tied = match f.get("tie_word_embeddings") {
            None => false,
            Some(v) => v.as_bool().ok_or_else(|| f.bad("tie_word_embeddings", "a bool"))?,
        };
        let shape = Self {
            layers: f.count("num_hidden_layers", 1024, None)? as u32,
            hidden: hidden as u32,
            ffn: f.count("intermediate_size", 1 << 20, None)? as u32,
            q_heads: heads as u16,
            kv_heads: f.count("num_key_value_heads", 4096, Some(heads))? as u16,
            head_dim: head_dim as u16,
            vocab: vocab as u32,
            context: f.count("max_position_embeddings", u64::from(u32::MAX >> 1), Some(2048))? as u32,
            rope_theta: theta,
            adjacent: false,
            eps: f.number("rms_norm_eps", 1e-6)? as f32,
            tied,
            bos: special(&f, "bos_token_id", vocab)?.first().copied(),
            eos: special(&f, "eos_token_id", vocab)?,
        };
        shape.layout().check()?;
        Ok(shape)
    }

    /// What the model's cache looks like; the fingerprint is still zero.
    pub fn layout(&self) -> Layout {
        let d = self.head_dim as usize;
        let inv_freq: Vec<f32> =
            (0..d / 2).map(|i| self.rope_theta.powf(-2.0 * i as f64 / d as f64) as f32).collect();
        let rope = if self.adjacent { Rope::Adjacent(SideId(0)) } else { Rope::Half(SideId(0)) };
        let layer = LayerLayout {
            q_heads: self.q_heads,
            kv_heads: self.kv_heads,
            k_dim: self.head_dim,
            v_dim: self.head_dim,
            rope,
            window: None,
        };
        Layout::uniform(self.layers as usize, layer, inv_freq.into(), self.context)
    }
}

/// Keys, values and the rotation have one width.
fn check_dims(what: &str, keys: u64, values: u64, rotated: u64) -> Result<()> {
    check::at_least(&format!("{what}: key length"), keys as usize, 2)?;
    if keys != values {
        return Err(Error::unsupported(format!("{what}: keys of {keys} and values of {values} channels")));
    }
    if rotated != keys {
        return Err(Error::unsupported(format!("{what}: a rotation of {rotated} of {keys} channels")));
    }
    Ok(())
}

/// Ids under `key`: a number or a list of numbers below `vocab`.
fn special(f: &Fields<'_>, key: &str, vocab: u64) -> Result<Vec<u32>> {
    let list = match f.get(key) {
        None => return Ok(Vec::new()),
        Some(Json::Array(a)) => a.as_slice(),
        Some(v) => std::slice::from_ref(v),
    };
    list.iter()
        .map(|v| {
            v.as_u64()
                .filter(|&id| id < vocab)
                .map(|id| id as u32)
                .ok_or_else(|| f.bad(key, &format!("ids below {vocab}")))
        })
        .collect()
}
