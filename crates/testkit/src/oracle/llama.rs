//! `NaiveLlama`: a Llama forward pass in f64, row by row and head by head.
//!
//! RoPE turns adjacent pairs (2i, 2i + 1) by `pos * theta^(-2i / D)`; keys and values are kept before RoPE, `[K * D]` a row.

/// A matrix `[rows, cols]`, row after row.
#[derive(Clone, Debug)]
pub struct Mat {
    /// Inputs.
    pub cols: usize,
    /// Numbers.
    pub data: Vec<f64>,
}

impl Mat {
    /// A matrix of f32 numbers.
    pub fn new(cols: usize, data: &[f32]) -> Self {
        Self { cols, data: data.iter().map(|&x| f64::from(x)).collect() }
    }

    /// Row `i`.
    pub fn row(&self, i: usize) -> &[f64] {
        &self.data[i * self.cols..(i + 1) * self.cols]
    }

    /// `W x`.
    pub fn mul(&self, x: &[f64]) -> Vec<f64> {
        assert_eq!(x.len(), self.cols, "inputs of a product");
        self.data.chunks_exact(self.cols).map(|row| dot(row, x)).collect()
    }
}

/// Weights of one layer.
#[derive(Clone, Debug)]
pub struct LayerWeights {
    /// Norm before attention.
    pub att_norm: Vec<f64>,
    /// Queries.
    pub wq: Mat,
    /// Keys.
    pub wk: Mat,
    /// Values.
    pub wv: Mat,
    /// Output of attention.
    pub wo: Mat,
    /// Norm before the feed-forward block.
    pub ffn_norm: Vec<f64>,
    /// Gate, inside the silu.
    pub gate: Mat,
    /// Back to the residual stream.
    pub down: Mat,
    /// The other factor.
    pub up: Mat,
}

/// All weights of a Llama.
#[derive(Clone, Debug)]
pub struct Weights {
    /// H.
    pub heads: usize,
    /// K.
    pub kv_heads: usize,
    /// D.
    pub head_dim: usize,
    /// Added to the mean square of a norm.
    pub eps: f64,
    /// Base of the rotation.
    pub theta: f64,
    /// `[vocab, dim]`.
    pub emb: Mat,
    /// Layers.
    pub layers: Vec<LayerWeights>,
    /// Last norm.
    pub norm: Vec<f64>,
    /// `[vocab, dim]`.
    pub output: Mat,
}

/// One row of numbers.
pub type Row = Vec<f64>;

/// Which keys a query sees, by position.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum See {
    /// Its own position and before.
    Causal,
    /// All.
    Full,
}

impl See {
    /// A query at `q` sees a key at `k`.
    pub fn sees(self, q: u32, k: u32) -> bool {
        self == Self::Full || k <= q
    }
}

/// Queries, keys, values of some rows, before RoPE.
#[derive(Clone, Debug)]
pub struct Qkv {
    /// `[rows][H * D]`.
    pub q: Vec<Row>,
    /// `[rows][K * D]`.
    pub k: Vec<Row>,
    /// `[rows][K * D]`.
    pub v: Vec<Row>,
}

/// Keys and values of one layer for all positions, before RoPE.
#[derive(Clone, Debug, Default)]
pub struct Kv {
    /// `[T][K * D]`.
    pub k: Vec<Row>,
    /// `[T][K * D]`.
    pub v: Vec<Row>,
}

/// What a forward pass went through.
#[derive(Clone, Debug, Default)]
pub struct Trace {
    /// `[L][T][dim]`: what entered each layer.
    pub x: Vec<Vec<Row>>,
    /// Keys and values of each layer.
    pub kv: Vec<Kv>,
    /// `[T][vocab]`.
    pub logits: Vec<Row>,
}

/// Sum of products.
pub fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// Softmax.
pub fn softmax(x: &[f64]) -> Row {
    let most = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let e: Row = x.iter().map(|x| (x - most).exp()).collect();
    let sum: f64 = e.iter().sum();
    e.iter().map(|x| x / sum).collect()
}

/// Index of the largest number, the first of equals.
pub fn argmax(x: &[f64]) -> u32 {
    let best =
        x.iter().enumerate().fold((0, f64::NEG_INFINITY), |b, (i, &v)| if v > b.1 { (i, v) } else { b });
    best.0 as u32
}

/// Turns the adjacent pairs of every head of a row to position `pos`.
pub fn rotate(row: &[f64], head_dim: usize, theta: f64, pos: u32) -> Row {
    let mut out = row.to_vec();
    for head in out.chunks_exact_mut(head_dim) {
        for (i, pair) in head.chunks_exact_mut(2).enumerate() {
            let angle = f64::from(pos) * theta.powf(-2.0 * i as f64 / head_dim as f64);
            let (sin, cos) = angle.sin_cos();
            let (a, b) = (pair[0], pair[1]);
            pair[0] = a * cos - b * sin;
            pair[1] = a * sin + b * cos;
        }
    }
    out
}

/// A Llama in f64.
#[derive(Clone, Debug)]
pub struct NaiveLlama {
    /// Its weights.
    pub w: Weights,
}

impl NaiveLlama {
    /// The bundled model of a GGUF file, see [`Weights::from_gguf`].
    pub fn from_gguf(path: impl AsRef<std::path::Path>) -> Self {
        let path = path.as_ref();
        let bytes = std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        Self { w: Weights::from_gguf(&bytes) }
    }

    /// L.
    pub fn layers(&self) -> usize {
        self.w.layers.len()
    }

    fn norm(&self, x: &[f64], weight: &[f64]) -> Row {
        let mean = dot(x, x) / x.len() as f64;
        let r = 1.0 / (mean + self.w.eps).sqrt();
        x.iter().zip(weight).map(|(x, w)| x * r * w).collect()
    }

    /// Rows that enter layer 0.
    pub fn embed(&self, ids: &[u32]) -> Vec<Row> {
        ids.iter().map(|&id| self.w.emb.row(id as usize).to_vec()).collect()
    }

    /// Norm and projections of a layer.
    pub fn qkv(&self, layer: usize, x: &[Row]) -> Qkv {
        let l = &self.w.layers[layer];
        let h: Vec<Row> = x.iter().map(|x| self.norm(x, &l.att_norm)).collect();
        let all = |w: &Mat| h.iter().map(|h| w.mul(h)).collect();
        Qkv { q: all(&l.wq), k: all(&l.wk), v: all(&l.wv) }
    }

    /// Attention probabilities `[H][keys]` of one query over the keys listed in `over` (indices into `k`), each at `k_pos`.
    pub fn probs(&self, q: &[f64], q_pos: u32, k: &[Row], k_pos: &[u32], over: &[usize]) -> Vec<Row> {
        let (d, group) = (self.w.head_dim, self.w.heads / self.w.kv_heads);
        let q = rotate(q, d, self.w.theta, q_pos);
        let k: Vec<Row> = over.iter().map(|&i| rotate(&k[i], d, self.w.theta, k_pos[i])).collect();
        let scale = 1.0 / (d as f64).sqrt();
        (0..self.w.heads)
            .map(|h| {
                let q = &q[h * d..][..d];
                let scores: Row = k.iter().map(|k| scale * dot(q, &k[h / group * d..][..d])).collect();
                softmax(&scores)
            })
            .collect()
    }

    /// Attention of one query over the keys it sees: output `[H * D]`, probabilities `[H][T]` with zero where it sees nothing.
    pub fn attend(&self, q: &[f64], q_pos: u32, kv: &Kv, k_pos: &[u32], see: See) -> (Row, Vec<Row>) {
        let over: Vec<usize> = (0..k_pos.len()).filter(|&i| see.sees(q_pos, k_pos[i])).collect();
        let (d, group) = (self.w.head_dim, self.w.heads / self.w.kv_heads);
        let mut out = vec![0.0; self.w.heads * d];
        let mut full = vec![vec![0.0; k_pos.len()]; self.w.heads];
        for (h, p) in self.probs(q, q_pos, &kv.k, k_pos, &over).iter().enumerate() {
            for (&i, p) in over.iter().zip(p) {
                full[h][i] = *p;
                for c in 0..d {
                    out[h * d + c] += p * kv.v[i][h / group * d + c];
                }
            }
        }
        (out, full)
    }

    /// Output projection and feed-forward block: adds both to the residual rows `x`; `o` is what attention gave.
    pub fn finish(&self, layer: usize, x: &mut [Row], o: &[Row]) {
        let l = &self.w.layers[layer];
        for (x, o) in x.iter_mut().zip(o) {
            add(x, &l.wo.mul(o));
            let h = self.norm(x, &l.ffn_norm);
            let act: Row =
                l.gate.mul(&h).iter().zip(l.up.mul(&h)).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect();
            add(x, &l.down.mul(&act));
        }
    }

    /// Logits of a row that left the last layer.
    pub fn logits(&self, x: &[f64]) -> Row {
        self.w.output.mul(&self.norm(x, &self.w.norm))
    }

    /// A whole pass over `ids` at positions 0, 1, ….
    pub fn forward(&self, ids: &[u32], see: See) -> Trace {
        let pos: Vec<u32> = (0..ids.len() as u32).collect();
        let mut x = self.embed(ids);
        let mut trace = Trace::default();
        for layer in 0..self.layers() {
            let Qkv { q, k, v } = self.qkv(layer, &x);
            let kv = Kv { k, v };
            let o: Vec<Row> = q.iter().zip(&pos).map(|(q, &p)| self.attend(q, p, &kv, &pos, see).0).collect();
            trace.x.push(x.clone());
            trace.kv.push(kv);
            self.finish(layer, &mut x, &o);
        }
        trace.logits = x.iter().map(|x| self.logits(x)).collect();
        trace
    }
}

fn add(x: &mut [f64], y: &[f64]) {
    x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bundled_model_gives_the_golden_ids_and_logits() {
        let root = concat!(env!("CARGO_MANIFEST_DIR"), "/../../testdata/");
        let model = NaiveLlama::from_gguf(format!("{root}models/stories260K-f32.gguf"));
        let text =
            std::fs::read_to_string(format!("{root}golden/stories260K.greedy.json")).expect("golden file");
        let golden: serde_json::Value = serde_json::from_str(&text).expect("golden json");
        for case in golden.as_array().expect("a list") {
            let ids = |key: &str| -> Vec<u32> {
                case[key].as_array().expect("ids").iter().map(|x| x.as_u64().expect("id") as u32).collect()
            };
            let (prompt, greedy) = (ids("prompt_ids"), ids("greedy_ids"));
            let greedy = &greedy[..40];
            let all = [&prompt[..], greedy].concat();
            let trace = model.forward(&all, See::Causal);
            for (i, &id) in greedy.iter().enumerate() {
                assert_eq!(argmax(&trace.logits[prompt.len() - 1 + i]), id, "{} step {i}", case["prompt"]);
            }
            let first = &trace.logits[prompt.len() - 1];
            for top in case["first_step_top5"].as_array().expect("top 5") {
                let (id, want) = (top[0].as_u64().expect("id") as usize, top[1].as_f64().expect("logit"));
                assert!((first[id] - want).abs() < 1e-4, "{} id {id}: {} {want}", case["prompt"], first[id]);
            }
        }
    }

    #[test]
    fn turning_twice_adds_the_positions() {
        let row: Row = (0..16).map(|i| f64::from(i) - 7.0).collect();
        let twice = rotate(&rotate(&row, 8, 1e4, 5), 8, 1e4, 9);
        let once = rotate(&row, 8, 1e4, 14);
        assert!(twice.iter().zip(&once).all(|(a, b)| (a - b).abs() < 1e-12));
    }
}
