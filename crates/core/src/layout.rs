//! What a model's cache looks like, and where a thing sits inside a model.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::{Error, Result, check};

/// Index of a side tensor (inverse frequencies, a basis, scales) in the table of its owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct SideId(pub u16);

/// Rotary position embedding of one layer. The side tensor holds the inverse frequencies, one per pair of
/// channels, so that scaled RoPE is data and not another kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Rope {
    /// Keys carry no rotation.
    None,
    /// Pairs `(i, i + D/2)`: the form of Hugging Face exports.
    Half(SideId),
    /// Pairs `(2i, 2i + 1)`: the form of llama.cpp's `llama` architecture.
    Adjacent(SideId),
}

/// Shape of one layer's keys and values.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct LayerLayout {
    /// H, query heads.
    pub q_heads: u16,
    /// K, kv heads; divides `q_heads`.
    pub kv_heads: u16,
    /// Channels of a key and of a query.
    pub k_dim: u16,
    /// Channels of a value.
    pub v_dim: u16,
    /// How keys are rotated.
    pub rope: Rope,
    /// Attention window in tokens, the query included; `None` sees everything.
    pub window: Option<u32>,
}

impl LayerLayout {
    /// G, query heads that read one kv head.
    pub fn group(&self) -> usize {
        self.q_heads as usize / self.kv_heads as usize
    }
}

/// What a model's cache looks like, layer by layer.
#[derive(Clone, Debug, PartialEq)]
pub struct Layout {
    /// One entry per transformer layer.
    pub layers: Vec<LayerLayout>,
    /// Side tensors named by `SideId`.
    pub sides: Vec<Arc<[f32]>>,
    /// Tokens the model was trained to see at once.
    pub context: u32,
    /// Digest of the model's hyperparameters and weights: two models share blocks only if it is equal.
    pub fingerprint: [u8; 32],
}

impl Layout {
    /// The layout of a Llama-like model whose layers are all alike.
    pub fn uniform(layers: usize, layer: LayerLayout, inv_freq: Arc<[f32]>, context: u32) -> Self {
        Self { layers: vec![layer; layers], sides: vec![inv_freq], context, fingerprint: [0; 32] }
    }

    /// Layer `i`.
    pub fn layer(&self, i: usize) -> Result<&LayerLayout> {
        let count = self.layers.len();
        self.layers.get(i).ok_or_else(|| Error::invalid("layer", format_args!("an index below {count}"), i))
    }

    /// The side tensor `id`.
    pub fn side(&self, id: SideId) -> Result<&Arc<[f32]>> {
        let count = self.sides.len();
        self.sides
            .get(id.0 as usize)
            .ok_or_else(|| Error::invalid("layout.sides", format_args!("an index below {count}"), id.0))
    }

    /// Every layer is possible: heads divide, dims are even where rotated, side tensors have the right length.
    pub fn check(&self) -> Result<()> {
        check::at_least("layout.layers", self.layers.len(), 1)?;
        for (i, l) in self.layers.iter().enumerate() {
            let at = |f: &str| format!("layout.layers[{i}].{f}");
            check::at_least(&at("kvHeads"), l.kv_heads as usize, 1)?;
            check::at_least(&at("queryHeads"), l.q_heads as usize, 1)?;
            if l.q_heads % l.kv_heads != 0 {
                return Err(Error::invalid(
                    at("queryHeads"),
                    format_args!("a multiple of {}", l.kv_heads),
                    l.q_heads,
                ));
            }
            for (name, dim) in [("keyDim", l.k_dim), ("valueDim", l.v_dim)] {
                if dim == 0 || dim > 1024 {
                    return Err(Error::invalid(at(name), "1 to 1024 channels", dim));
                }
            }
            if let Rope::Half(id) | Rope::Adjacent(id) = l.rope {
                check::equal(&at("rope"), "inverse frequencies", l.k_dim as usize / 2, self.side(id)?.len())?;
                if l.k_dim % 2 != 0 {
                    return Err(Error::invalid(at("keyDim"), "an even number of channels", l.k_dim));
                }
            }
        }
        Ok(())
    }

    /// The bytes that stand for the shape (not the weights) in names and headers: canonical and stable.
    pub fn shape_bytes(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(self.layers.len() * 16);
        for l in &self.layers {
            for x in [l.q_heads, l.kv_heads, l.k_dim, l.v_dim] {
                out.extend_from_slice(&x.to_le_bytes());
            }
            let (kind, side) = match l.rope {
                Rope::None => (0u8, None),
                Rope::Half(s) => (1, Some(s)),
                Rope::Adjacent(s) => (2, Some(s)),
            };
            out.push(kind);
            for f in side.and_then(|s| self.sides.get(s.0 as usize)).into_iter().flat_map(|s| s.iter()) {
                out.extend_from_slice(&f.to_le_bytes());
            }
            out.extend_from_slice(&l.window.unwrap_or(u32::MAX).to_le_bytes());
        }
        out
    }
}

/// Part of a layer that a hook is called at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Part {
    /// The attention block: norm, projections, attention, output projection.
    Attention,
    /// The feed-forward block.
    Mlp,
    /// The whole layer, for models whose blocks are cached as one.
    Block,
}

/// A place in a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Point {
    /// Stream, for models with several (text and image, conditional and not).
    pub stream: u16,
    /// Layer.
    pub layer: u16,
    /// Part of the layer.
    pub part: Part,
}

impl Point {
    /// The attention block of `layer` in stream 0.
    pub fn attention(layer: usize) -> Self {
        Self { stream: 0, layer: layer as u16, part: Part::Attention }
    }

    /// The feed-forward block of `layer` in stream 0.
    pub fn mlp(layer: usize) -> Self {
        Self { stream: 0, layer: layer as u16, part: Part::Mlp }
    }
}
