//! Llama-type decoders: RMSNorm, grouped-query attention with RoPE, SwiGLU, pre-norm, no biases.
//!
//! `h = x + Wo attend(Wq n(x), Wk n(x), Wv n(x))`, `x' = h + Wd (silu(Wg n(h)) * Wu n(h))`, logits = `Wout n(x)`.
//! Query head h reads kv head `h / G`. Rotation belongs to the cache: `attend` gets q and k before it.
//!
//! Memory: the weights as stored in the file, and in a pass of n rows about `4 n (3 hidden + 2 (H + K) D + 2 ffn)` bytes
//! of scratch, used again by each layer. Logits are computed and read in slabs of [`SLAB_ROWS`] rows, so a decode step
//! waits for the backend once.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use kvasir_core::{
    Activation, Ask, Backend, Batch, Buf, Call, Error, Go, Hooks, Layout, Logits, Model, Point, Result, Rows,
    Weight, WeightType, check,
};
use serde_json::{Value as Json, json};

use crate::gguf::Gguf;
use crate::safetensors::Folder;
use crate::shape::Shape;
use crate::source::{ElementType, Tensors, fetch, refuse_type, to_f32, type_name, weight_bytes};

/// Rows of logits computed and read at once: 49 MB for a vocabulary of 49,152.
pub const SLAB_ROWS: usize = 256;

/// Where a model came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileFormat {
    /// A GGUF file.
    Gguf,
    /// A Hugging Face folder.
    HuggingFace,
}

#[derive(Debug)]
struct Layer {
    attention_norm: Buf,
    q: Weight,
    k: Weight,
    v: Weight,
    o: Weight,
    mlp_norm: Buf,
    gate: Weight,
    up: Weight,
    down: Weight,
}

/// A Llama-type model whose weights lie in a backend.
pub struct Llama {
    backend: Arc<dyn Backend>,
    shape: Shape,
    layout: Layout,
    format: FileFormat,
    metadata: Json,
    embed: Weight,
    layers: Vec<Layer>,
    norm: Buf,
    output: Weight,
    types: BTreeMap<&'static str, u32>,
    bytes: u64,
}

impl std::fmt::Debug for Llama {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Llama")
            .field("shape", &self.shape)
            .field("types", &self.types)
            .finish_non_exhaustive()
    }
}

/// Reads the tensors of a model one by one, hashes them and hands them to the backend.
struct Loader<'a> {
    src: &'a dyn Tensors,
    backend: &'a dyn Backend,
    hash: blake3::Hasher,
    types: BTreeMap<&'static str, u32>,
    bytes: u64,
    left: Vec<String>,
    watch: Watch<'a>,
    done: usize,
    total: usize,
}

/// Told of each tensor read, and of how many there are; an error stops the load.
type Watch<'a> = &'a mut dyn FnMut(usize, usize) -> Result<()>;

impl Loader<'_> {
    /// The tensor `name`; its role, type and bytes go into the fingerprint.
    fn tensor(&mut self, role: &str, name: &str, shape: &[u64]) -> Result<(WeightType, Vec<u8>)> {
        let (kind, data) = fetch(self.src, name, shape)?;
        self.hash.update(role.as_bytes());
        self.hash.update(&[0]);
        self.hash.update(type_name(kind).as_bytes());
        for d in shape {
            self.hash.update(&d.to_le_bytes());
        }
        self.hash.update(&data);
        *self.types.entry(type_name(kind)).or_default() += 1;
        self.bytes += data.len() as u64;
        self.left.retain(|n| n != name);
        self.done += 1;
        (self.watch)(self.done, self.total)?;
        Ok((kind, data))
    }

    fn matrix(&mut self, role: &str, name: &str, rows: usize, cols: usize) -> Result<Weight> {
        let (kind, data) = self.tensor(role, name, &[rows as u64, cols as u64])?;
        if !cols.is_multiple_of(kind.block().0) {
            return Err(Error::malformed(
                self.src.what(),
                format_args!("tensor {name}: {cols} columns in blocks of {}", kind.block().0),
            ));
        }
        let weight = Weight { data: self.upload(data)?, kind, rows: rows as u32, cols: cols as u32 };
        check::equal(name, "bytes", weight_bytes(&weight), weight.data.bytes())?;
        Ok(weight)
    }

    /// A norm, widened to f32.
    fn vector(&mut self, role: &str, name: &str, len: usize) -> Result<Buf> {
        let (kind, data) = self.tensor(role, name, &[len as u64])?;
        self.backend.upload_f32(&to_f32(name, kind, &data)?)
    }

    fn upload(&self, data: Vec<u8>) -> Result<Buf> {
        let dst = self.backend.alloc(data.len())?;
        self.backend.submit(Call::Write { dst: dst.clone(), data: data.into() })?;
        Ok(dst)
    }
}

/// Role of a tensor, its GGUF name and its Hugging Face name inside a layer.
const NAMES: [(&str, &str, &str); 9] = [
    ("attention_norm", "attn_norm", "input_layernorm"),
    ("q", "attn_q", "self_attn.q_proj"),
    ("k", "attn_k", "self_attn.k_proj"),
    ("v", "attn_v", "self_attn.v_proj"),
    ("o", "attn_output", "self_attn.o_proj"),
    ("mlp_norm", "ffn_norm", "post_attention_layernorm"),
    ("gate", "ffn_gate", "mlp.gate_proj"),
    ("up", "ffn_up", "mlp.up_proj"),
    ("down", "ffn_down", "mlp.down_proj"),
];

impl Llama {
    /// Loads a `.gguf` file, or a folder with `config.json` and safetensors.
    pub fn load(path: impl AsRef<Path>, backend: Arc<dyn Backend>) -> Result<Self> {
        Self::load_watched(path, backend, &mut |_, _| Ok(()))
    }

    /// As `load`. `watch` is told of each tensor read, and of how many there are; its error stops the load.
    pub fn load_watched(
        path: impl AsRef<Path>,
        backend: Arc<dyn Backend>,
        watch: &mut dyn FnMut(usize, usize) -> Result<()>,
    ) -> Result<Self> {
        let path = path.as_ref();
        let found = std::fs::metadata(path).map_err(|e| Error::io(path, e))?;
        if found.is_dir() {
            let folder = Folder::open(path)?;
            let shape = Shape::from_config(&folder.config, &folder.what())?;
            let metadata = json!({ "format": "hf", "config": folder.config });
            Self::build(&folder, shape, FileFormat::HuggingFace, metadata, backend, watch)
        } else {
            let file = Gguf::open(path)?;
            let embed = file
                .info("token_embd.weight")
                .filter(|info| info.shape.len() == 2)
                .ok_or_else(|| Error::malformed(file.what(), "no matrix token_embd.weight"));
            let meta = &file.header.metadata;
            let tied = file.info("output.weight").is_none();
            // The architecture is looked at first: another model may well lack this tensor.
            let shape = match embed {
                Ok(e) => Shape::from_gguf(meta, e.shape[0], tied, &file.what())?,
                Err(missing) => {
                    Shape::from_gguf(meta, 1, tied, &file.what())?;
                    return Err(missing);
                }
            };
            let metadata = json!({ "format": "gguf", "metadata": meta });
            Self::build(&file, shape, FileFormat::Gguf, metadata, backend, watch)
        }
    }

    fn build(
        src: &dyn Tensors,
        shape: Shape,
        format: FileFormat,
        metadata: Json,
        backend: Arc<dyn Backend>,
        watch: Watch<'_>,
    ) -> Result<Self> {
        let mut left = src.names();
        left.sort_unstable();
        for name in &left {
            if let Some(info) = src.info(name).filter(|i| matches!(i.kind, ElementType::Other(_))) {
                return Err(refuse_type(name, &info.kind));
            }
        }
        let mut hash = blake3::Hasher::new();
        hash.update(b"kvasir model 1: llama");
        let mut layout = shape.layout();
        hash.update(&layout.shape_bytes());
        for n in [shape.layers, shape.hidden, shape.ffn, shape.vocab, shape.eps.to_bits(), shape.tied.into()]
        {
            hash.update(&n.to_le_bytes());
        }

        let (types, total) = (BTreeMap::new(), left.len());
        let mut l = Loader { src, backend: &*backend, hash, types, bytes: 0, left, watch, done: 0, total };
        let gguf = format == FileFormat::Gguf;
        let top = |g: &'static str, h: &'static str| if gguf { g } else { h };
        let (hidden, ffn, vocab) = (shape.hidden as usize, shape.ffn as usize, shape.vocab as usize);
        let d = shape.head_dim as usize;
        let (qd, kd) = (shape.q_heads as usize * d, shape.kv_heads as usize * d);

        let embed =
            l.matrix("embed", top("token_embd.weight", "model.embed_tokens.weight"), vocab, hidden)?;
        let mut layers = Vec::new();
        for i in 0..shape.layers {
            let name = |role: &str| {
                let (_, g, h) =
                    NAMES.iter().find(|(r, _, _)| *r == role).expect("roles below are of the table");
                if gguf { format!("blk.{i}.{g}.weight") } else { format!("model.layers.{i}.{h}.weight") }
            };
            layers.push(Layer {
                attention_norm: l.vector("attention_norm", &name("attention_norm"), hidden)?,
                q: l.matrix("q", &name("q"), qd, hidden)?,
                k: l.matrix("k", &name("k"), kd, hidden)?,
                v: l.matrix("v", &name("v"), kd, hidden)?,
                o: l.matrix("o", &name("o"), hidden, qd)?,
                mlp_norm: l.vector("mlp_norm", &name("mlp_norm"), hidden)?,
                gate: l.matrix("gate", &name("gate"), ffn, hidden)?,
                up: l.matrix("up", &name("up"), ffn, hidden)?,
                down: l.matrix("down", &name("down"), hidden, ffn)?,
            });
        }
        let norm = l.vector("norm", top("output_norm.weight", "model.norm.weight"), hidden)?;
        let output = if shape.tied {
            // Hugging Face ties the matrices whatever the file holds under this name.
            l.left.retain(|n| n != "lm_head.weight");
            embed.clone()
        } else {
            l.matrix("output", top("output.weight", "lm_head.weight"), vocab, hidden)?
        };
        // Old exports carry the inverse frequencies, which follow from the config. Anything else would take part in the
        // arithmetic: a bias, a factor of the rotation, an adapter.
        l.left.retain(|n| gguf || !n.ends_with(".rotary_emb.inv_freq"));
        if let Some(name) = l.left.first() {
            return Err(Error::unsupported(format!(
                "tensor {name} of {} is no part of a plain Llama model",
                src.what()
            )));
        }
        layout.fingerprint = *l.hash.finalize().as_bytes();
        layout.check()?;
        let (types, bytes) = (l.types, l.bytes);
        Ok(Self { backend, shape, layout, format, metadata, embed, layers, norm, output, types, bytes })
    }

    /// Ids of the vocabulary.
    pub fn vocab(&self) -> usize {
        self.shape.vocab as usize
    }

    /// Tokens the model was trained to see at once.
    pub fn context(&self) -> u32 {
        self.shape.context
    }

    /// `llama`.
    pub fn architecture(&self) -> &'static str {
        "llama"
    }

    /// Where it came from.
    pub fn format(&self) -> FileFormat {
        self.format
    }

    /// Hyperparameters.
    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    /// `{"format": "gguf", "metadata": {every key}}` or `{"format": "hf", "config": config.json}`.
    pub fn metadata_json(&self) -> &Json {
        &self.metadata
    }

    /// Token that begins a text, if the file names one.
    pub fn bos(&self) -> Option<u32> {
        self.shape.bos
    }

    /// Tokens that end a text.
    pub fn eos(&self) -> &[u32] {
        &self.shape.eos
    }

    /// Bytes of all weights as stored.
    pub fn weights_bytes(&self) -> u64 {
        self.bytes
    }

    /// Tensors per storage type.
    pub fn weight_types(&self) -> &BTreeMap<&'static str, u32> {
        &self.types
    }

    /// blake3 over hyperparameters, and type and bytes of every weight as stored and kept.
    pub fn fingerprint(&self) -> [u8; 32] {
        self.layout.fingerprint
    }

    /// The device the weights lie in.
    pub fn backend(&self) -> &Arc<dyn Backend> {
        &self.backend
    }

    fn check_batch(&self, batch: &Batch) -> Result<()> {
        let n = batch.ids.len();
        check::at_least("batch.ids", n, 1)?;
        check::equal("batch.pos", "positions", n, batch.pos.len())?;
        check_rows("batch", n, &batch.pos, &batch.of)?;
        match batch.ids.iter().position(|&id| id >= self.shape.vocab) {
            None => Ok(()),
            Some(i) => Err(Error::invalid(
                format!("batch.ids[{i}]"),
                format_args!("an id below {}", self.shape.vocab),
                batch.ids[i],
            )),
        }
    }

    fn attention(&self, i: usize, pass: &mut Pass<'_>, hooks: &mut dyn Hooks) -> Result<()> {
        let (at, l) = (Point::attention(i), &self.layers[i]);
        if pass.enter(at, hooks)? == Go::Skip || pass.x.is_empty() {
            return Ok(());
        }
        let n = pass.x.len();
        let h = pass.norm(&l.attention_norm)?;
        let q = pass.product("q", &h, &l.q, n)?;
        let k = pass.product("k", &h, &l.k, n)?;
        let v = pass.product("v", &h, &l.v, n)?;
        let out_data = pass.scratch.take("out", n * l.o.cols as usize)?;
        let mut out = pass.rows(out_data, l.o.cols);
        let (q, k, v) = (pass.rows(q, l.q.rows), pass.rows(k, l.k.rows), pass.rows(v, l.v.rows));
        hooks.attend(at, &q, &k, &v, &mut out)?;
        trim(&mut out, "hooks.attend.out", l.o.cols, pass.x.of.len())?;
        pass.shrink_to(&out)?;
        if out.is_empty() {
            return Ok(());
        }
        let y = pass.product("y", &out.data, &l.o, out.len())?;
        pass.leave(at, y, hooks)
    }

    fn mlp(&self, i: usize, pass: &mut Pass<'_>, hooks: &mut dyn Hooks) -> Result<()> {
        let (at, l) = (Point::mlp(i), &self.layers[i]);
        if pass.enter(at, hooks)? == Go::Skip || pass.x.is_empty() {
            return Ok(());
        }
        let n = pass.x.len();
        let h = pass.norm(&l.mlp_norm)?;
        let gate = pass.product("gate", &h, &l.gate, n)?;
        let up = pass.product("up", &h, &l.up, n)?;
        self.backend.submit(Call::Activate {
            f: Activation::SwiGlu,
            a: gate.clone(),
            b: up,
            out: gate.clone(),
        })?;
        let y = pass.product("y", &gate, &l.down, n)?;
        pass.leave(at, y, hooks)
    }

    /// Logits of the rows of `x` that were asked for.
    fn logits(&self, pass: &mut Pass<'_>, ask: &Ask, out: &mut Logits) -> Result<()> {
        out.vocab = self.vocab();
        out.data.clear();
        out.rows.clear();
        let mut asked: Vec<u32> = Vec::new();
        for (s, of) in pass.x.of.iter().enumerate() {
            let rows = match ask {
                Ask::None => of.end..of.end,
                Ask::Last => of.end.saturating_sub(1).max(of.start)..of.end,
                Ask::All => of.clone(),
            };
            out.rows.extend(rows.clone().map(|r| (s as u32, pass.x.pos[r as usize])));
            asked.extend(rows);
        }
        if asked.is_empty() {
            return Ok(());
        }
        if asked.len() < pass.x.len() {
            pass.gather(&asked)?;
        }
        let h = pass.norm(&self.norm)?;
        let row_bytes = 4 * self.shape.hidden as usize;
        out.data.reserve_exact(asked.len() * out.vocab);
        let slab = asked.len().min(SLAB_ROWS);
        let all = self.backend.alloc(4 * slab * out.vocab)?;
        let mut bytes = vec![0; all.bytes()];
        for from in (0..asked.len()).step_by(slab) {
            let n = slab.min(asked.len() - from);
            let x = h.slice(from * row_bytes..(from + n) * row_bytes)?;
            let logits = all.slice(0..4 * n * out.vocab)?;
            self.backend.submit(Call::MatMul {
                x,
                w: self.output.clone(),
                out: logits.clone(),
                add: false,
            })?;
            let bytes = &mut bytes[..logits.bytes()];
            self.backend.read(&logits, bytes)?;
            out.data.extend(bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])));
        }
        Ok(())
    }
}

impl Model for Llama {
    fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Buffers that hooks are given belong to the pass: a hook that wants to keep rows copies them with a call. Buffers
    /// that `enter` puts into `x` are written by the model, which adds to the residual stream in place.
    fn forward(&self, batch: &Batch, hooks: &mut dyn Hooks, out: &mut Logits) -> Result<()> {
        self.check_batch(batch)?;
        let (n, hidden) = (batch.ids.len(), self.shape.hidden);
        let data = self.backend.alloc(4 * n * hidden as usize)?;
        self.backend.submit(Call::Embed {
            table: self.embed.clone(),
            ids: batch.ids.as_slice().into(),
            out: data.clone(),
        })?;
        let x = Rows { data, dim: hidden, pos: batch.pos.clone(), of: batch.of.clone() };
        let scratch = Scratch { backend: &*self.backend, slots: Vec::new() };
        let mut pass = Pass { backend: &*self.backend, eps: self.shape.eps, scratch, x };
        for i in 0..self.layers.len() {
            self.attention(i, &mut pass, hooks)?;
            self.mlp(i, &mut pass, hooks)?;
        }
        self.logits(&mut pass, &batch.ask, out)
    }
}

/// Buffers of one pass by role; a role's buffer grows when more rows come and is used again by the next layer.
struct Scratch<'a> {
    backend: &'a dyn Backend,
    slots: Vec<(&'static str, Buf)>,
}

impl Scratch<'_> {
    /// `floats` f32 numbers whose content is whatever the role held before.
    fn take(&mut self, role: &'static str, floats: usize) -> Result<Buf> {
        let slot = self.slots.iter().position(|(r, _)| *r == role);
        let buf = match slot {
            Some(i) if self.slots[i].1.bytes() >= 4 * floats => &self.slots[i].1,
            _ => {
                let buf = self.backend.alloc(4 * floats)?;
                if let Some(i) = slot {
                    self.slots.swap_remove(i);
                }
                self.slots.push((role, buf));
                &self.slots[self.slots.len() - 1].1
            }
        };
        buf.slice(0..4 * floats)
    }
}

/// The residual stream of a pass on its way through the layers.
struct Pass<'a> {
    backend: &'a dyn Backend,
    eps: f32,
    scratch: Scratch<'a>,
    x: Rows,
}

impl Pass<'_> {
    fn enter(&mut self, at: Point, hooks: &mut dyn Hooks) -> Result<Go> {
        let (dim, seqs) = (self.x.dim, self.x.of.len());
        let go = hooks.enter(at, &mut self.x, None)?;
        trim(&mut self.x, "hooks.enter.x", dim, seqs)?;
        Ok(go)
    }

    fn leave(&mut self, at: Point, y: Buf, hooks: &mut dyn Hooks) -> Result<()> {
        let mut y = self.rows(y, self.x.dim);
        hooks.leave(at, &mut y)?;
        trim(&mut y, "hooks.leave.y", self.x.dim, self.x.of.len())?;
        check::equal("hooks.leave.y", "rows", self.x.len(), y.len())?;
        self.backend.submit(Call::Add { x: self.x.data.clone(), y: y.data })
    }

    /// Rows like those of `x` with other numbers.
    fn rows(&self, data: Buf, dim: u32) -> Rows {
        Rows { data, dim, pos: self.x.pos.clone(), of: self.x.of.clone() }
    }

    fn norm(&mut self, weight: &Buf) -> Result<Buf> {
        let (x, dim) = (self.x.data.clone(), self.x.dim);
        let out = self.scratch.take("norm", self.x.len() * dim as usize)?;
        self.backend.submit(Call::RmsNorm {
            x,
            weight: weight.clone(),
            eps: self.eps,
            dim,
            out: out.clone(),
        })?;
        Ok(out)
    }

    fn product(&mut self, role: &'static str, x: &Buf, w: &Weight, n: usize) -> Result<Buf> {
        let out = self.scratch.take(role, n * w.rows as usize)?;
        self.backend.submit(Call::MatMul { x: x.clone(), w: w.clone(), out: out.clone(), add: false })?;
        Ok(out)
    }

    /// Keeps only the rows of `x` that `out` still has.
    fn shrink_to(&mut self, out: &Rows) -> Result<()> {
        if out.len() == self.x.len() && out.pos == self.x.pos {
            return Ok(());
        }
        let mut idx = Vec::with_capacity(out.len());
        for (mine, theirs) in self.x.of.iter().zip(&out.of) {
            let mut row = mine.start;
            for &pos in &out.pos[theirs.start as usize..theirs.end as usize] {
                while row < mine.end && self.x.pos[row as usize] < pos {
                    row += 1;
                }
                if row == mine.end || self.x.pos[row as usize] != pos {
                    return Err(Error::invalid("hooks.attend.out.pos", "positions of the query rows", pos));
                }
                idx.push(row);
                row += 1;
            }
        }
        self.gather(&idx)?;
        self.x.of.clone_from(&out.of);
        Ok(())
    }

    /// `x` becomes its rows `idx`; the rows of each sequence are left to the caller.
    fn gather(&mut self, idx: &[u32]) -> Result<()> {
        let row_bytes = 4 * self.x.dim;
        self.x.pos = idx.iter().map(|&i| self.x.pos[i as usize]).collect();
        let dst = self.backend.alloc(idx.len() * row_bytes as usize)?;
        if !idx.is_empty() {
            self.backend.submit(Call::Gather {
                src: self.x.data.clone(),
                idx: idx.into(),
                row_bytes,
                dst: dst.clone(),
            })?;
        }
        self.x.data = dst;
        Ok(())
    }
}

/// Positions and sequences fit the number of rows.
fn check_rows(field: &str, n: usize, pos: &[u32], of: &[Range<u32>]) -> Result<()> {
    let mut next = 0;
    for (s, r) in of.iter().enumerate() {
        if r.start != next || r.end < r.start || r.end as usize > n {
            return Err(Error::invalid(
                format!("{field}.of[{s}]"),
                format_args!("a range from {next} inside {n} rows"),
                format_args!("{r:?}"),
            ));
        }
        next = r.end;
        let own = &pos[r.start as usize..r.end as usize];
        if let Some(i) = own.windows(2).position(|w| w[0] >= w[1]) {
            return Err(Error::invalid(
                format!("{field}.pos[{}]", r.start as usize + i + 1),
                format_args!("a position above {}", own[i]),
                own[i + 1],
            ));
        }
    }
    check::equal(&format!("{field}.of"), "rows", n, next as usize)
}

/// What a hook left is possible; the buffer is cut to the rows.
fn trim(rows: &mut Rows, field: &str, dim: u32, seqs: usize) -> Result<()> {
    check::equal(&format!("{field}.dim"), "channels", dim as usize, rows.dim as usize)?;
    check::equal(&format!("{field}.of"), "sequences", seqs, rows.of.len())?;
    check_rows(field, rows.len(), &rows.pos, &rows.of)?;
    let bytes = rows.len() * dim as usize * 4;
    if rows.data.bytes() < bytes {
        return Err(Error::invalid(
            format!("{field}.data"),
            format_args!("{bytes} bytes"),
            format_args!("{} bytes", rows.data.bytes()),
        ));
    }
    if rows.data.bytes() > bytes {
        rows.data = rows.data.slice(0..bytes)?;
    }
    Ok(())
}
