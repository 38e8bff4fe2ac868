//! A GGUF writer for files that no exporter would make.

use kvasir_testkit::Noise;

/// A value with its type number.
pub(crate) fn text(s: &str) -> (u32, Vec<u8>) {
    (8, string(s))
}

pub(crate) fn int(x: u32) -> (u32, Vec<u8>) {
    (4, x.to_le_bytes().to_vec())
}

pub(crate) fn real(x: f32) -> (u32, Vec<u8>) {
    (6, x.to_le_bytes().to_vec())
}

fn string(s: &str) -> Vec<u8> {
    let mut out = (s.len() as u64).to_le_bytes().to_vec();
    out.extend(s.as_bytes());
    out
}

#[derive(Clone)]
pub(crate) struct Tensor {
    pub(crate) name: String,
    /// Fastest first, as the file has them.
    pub(crate) dims: Vec<u64>,
    pub(crate) kind: u32,
    pub(crate) data: Vec<u8>,
    /// Instead of the place where the data really is.
    pub(crate) offset: Option<u64>,
}

#[derive(Clone)]
pub(crate) struct File {
    pub(crate) version: u32,
    pub(crate) keys: Vec<(String, (u32, Vec<u8>))>,
    pub(crate) tensors: Vec<Tensor>,
    /// Instead of the real numbers of tensors and keys.
    pub(crate) counts: Option<(u64, u64)>,
}

impl File {
    /// One layer, hidden 32, 2 query heads and 1 kv head of 16 channels, ffn 64, 8 ids; random f32 weights.
    pub(crate) fn tiny() -> Self {
        let mut noise = Noise::new(7);
        let mut tensor = |name: &str, dims: &[u64]| {
            let n: u64 = dims.iter().product();
            let data = (0..n).flat_map(|_| ((noise.uniform() - 0.5) as f32).to_le_bytes()).collect();
            Tensor { name: name.into(), dims: dims.to_vec(), kind: 0, data, offset: None }
        };
        let tensors = vec![
            tensor("token_embd.weight", &[32, 8]),
            tensor("blk.0.attn_norm.weight", &[32]),
            tensor("blk.0.attn_q.weight", &[32, 32]),
            tensor("blk.0.attn_k.weight", &[32, 16]),
            tensor("blk.0.attn_v.weight", &[32, 16]),
            tensor("blk.0.attn_output.weight", &[32, 32]),
            tensor("blk.0.ffn_norm.weight", &[32]),
            tensor("blk.0.ffn_gate.weight", &[32, 64]),
            tensor("blk.0.ffn_up.weight", &[32, 64]),
            tensor("blk.0.ffn_down.weight", &[64, 32]),
            tensor("output_norm.weight", &[32]),
        ];
        let keys = [
            ("general.architecture", text("llama")),
            ("general.name", text("tiny")),
            ("llama.block_count", int(1)),
            ("llama.embedding_length", int(32)),
            ("llama.feed_forward_length", int(64)),
            ("llama.attention.head_count", int(2)),
            ("llama.attention.head_count_kv", int(1)),
            ("llama.attention.layer_norm_rms_epsilon", real(1e-5)),
            ("llama.rope.dimension_count", int(16)),
            ("llama.rope.freq_base", real(10_000.0)),
            ("llama.context_length", int(64)),
        ];
        let keys = keys.map(|(k, v)| (k.to_owned(), v)).to_vec();
        Self { version: 3, keys, tensors, counts: None }
    }

    /// Sets or adds a key.
    pub(crate) fn set(mut self, key: &str, value: (u32, Vec<u8>)) -> Self {
        self.keys.retain(|(k, _)| k != key);
        self.keys.push((key.into(), value));
        self
    }

    pub(crate) fn tensor(&mut self, name: &str) -> &mut Tensor {
        self.tensors.iter_mut().find(|t| t.name == name).unwrap()
    }

    /// The header alone, and the whole file.
    pub(crate) fn bytes(&self) -> (usize, Vec<u8>) {
        let mut out = b"GGUF".to_vec();
        out.extend(self.version.to_le_bytes());
        let (tensors, keys) = self.counts.unwrap_or((self.tensors.len() as u64, self.keys.len() as u64));
        out.extend(tensors.to_le_bytes());
        out.extend(keys.to_le_bytes());
        for (key, (kind, value)) in &self.keys {
            out.extend(string(key));
            out.extend(kind.to_le_bytes());
            out.extend(value);
        }
        let mut at = 0u64;
        for t in &self.tensors {
            out.extend(string(&t.name));
            out.extend((t.dims.len() as u32).to_le_bytes());
            out.extend(t.dims.iter().flat_map(|d| d.to_le_bytes()));
            out.extend(t.kind.to_le_bytes());
            out.extend(t.offset.unwrap_or(at).to_le_bytes());
            at += (t.data.len() as u64).next_multiple_of(32);
        }
        let header = out.len();
        for t in &self.tensors {
            out.resize(out.len().next_multiple_of(32), 0);
            out.extend(&t.data);
        }
        (header, out)
    }
}
