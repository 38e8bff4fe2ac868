//! A minimal GGUF reader: F32 tensors and the numbers of the header, for the bundled model only. It trusts its input.

use std::collections::HashMap;

use super::llama::{LayerWeights, Mat, Weights};

struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl Cursor<'_> {
    fn take(&mut self, n: usize) -> &[u8] {
        self.at += n;
        &self.bytes[self.at - n..self.at]
    }

    fn uint(&mut self, n: usize) -> u64 {
        self.take(n).iter().rev().fold(0, |x, &b| (x << 8) | u64::from(b))
    }

    fn string(&mut self) -> String {
        let n = self.uint(8) as usize;
        String::from_utf8_lossy(self.take(n)).into_owned()
    }

    /// A value as a number; strings and arrays are passed over and give 0.
    fn value(&mut self, kind: u64) -> f64 {
        match kind {
            0 | 1 | 7 => self.uint(1) as f64,
            2 | 3 => self.uint(2) as f64,
            4 | 5 => self.uint(4) as f64,
            6 => f64::from(f32::from_bits(self.uint(4) as u32)),
            8 => {
                self.string();
                0.0
            }
            9 => {
                let (of, n) = (self.uint(4), self.uint(8));
                for _ in 0..n {
                    self.value(of);
                }
                0.0
            }
            10 | 11 => self.uint(8) as f64,
            12 => f64::from_bits(self.uint(8)),
            other => panic!("gguf: value type {other}"),
        }
    }
}

impl Weights {
    /// Reads a GGUF file of architecture `llama` whose tensors are all F32.
    pub fn from_gguf(bytes: &[u8]) -> Self {
        let mut c = Cursor { bytes, at: 0 };
        assert_eq!(c.take(4), b"GGUF");
        assert!(c.uint(4) >= 2, "gguf version");
        let (tensors, keys) = (c.uint(8), c.uint(8));
        let mut meta = HashMap::new();
        let mut align = 32.0;
        for _ in 0..keys {
            let key = c.string();
            let kind = c.uint(4);
            let value = c.value(kind);
            if key == "general.alignment" {
                align = value;
            }
            meta.insert(key, value);
        }
        let mut found = HashMap::new();
        for _ in 0..tensors {
            let name = c.string();
            let dims: Vec<usize> = (0..c.uint(4)).map(|_| c.uint(8) as usize).collect();
            assert_eq!(c.uint(4), 0, "{name} is not F32");
            found.insert(name, (dims, c.uint(8) as usize));
        }
        let base = c.at.next_multiple_of(align as usize);
        let get = |name: &str| -> Mat {
            let (dims, offset) = found.get(name).unwrap_or_else(|| panic!("gguf: no tensor {name}"));
            let n: usize = dims.iter().product();
            let data = bytes[base + offset..][..4 * n]
                .chunks_exact(4)
                .map(|b| f64::from(f32::from_le_bytes([b[0], b[1], b[2], b[3]])))
                .collect();
            // The first dimension of GGUF is the one that lies together.
            Mat { cols: dims[0], data }
        };
        let num = |key: &str| meta.get(&format!("llama.{key}")).copied();
        let need = |key: &str| num(key).unwrap_or_else(|| panic!("gguf: no llama.{key}"));
        let (dim, heads) = (need("embedding_length") as usize, need("attention.head_count") as usize);
        let layers = (0..need("block_count") as usize)
            .map(|i| {
                let at = |name: &str| get(&format!("blk.{i}.{name}.weight"));
                LayerWeights {
                    att_norm: at("attn_norm").data,
                    wq: at("attn_q"),
                    wk: at("attn_k"),
                    wv: at("attn_v"),
                    wo: at("attn_output"),
                    ffn_norm: at("ffn_norm").data,
                    gate: at("ffn_gate"),
                    down: at("ffn_down"),
                    up: at("ffn_up"),
                }
            })
            .collect();
        let emb = get("token_embd.weight");
        let output = if found.contains_key("output.weight") { get("output.weight") } else { emb.clone() };
        Self {
            heads,
            kv_heads: num("attention.head_count_kv").unwrap_or(heads as f64) as usize,
            head_dim: dim / heads,
            eps: need("attention.layer_norm_rms_epsilon"),
            theta: num("rope.freq_base").unwrap_or(10_000.0),
            emb,
            layers,
            norm: get("output_norm.weight").data,
            output,
        }
    }
}
