//! Calls: work for a backend, as data. A call owns what it names (buffers are shared handles), so a backend may queue it.
//!
//! Shapes use H query heads, K kv heads, G = H / K, D key channels, Dv value channels, n rows. Rows are f32.

use std::ops::Range;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::{Buf, Codes, Mask, Probe, Rope, Run, Tile};

/// How a weight matrix is stored: blocks of the model's file, read as they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum WeightType {
    /// 32-bit floats.
    F32,
    /// IEEE half.
    F16,
    /// Brain float.
    Bf16,
    /// 32 signed bytes and an f16 scale: 34 bytes.
    Q8_0,
    /// 32 nibbles and an f16 scale: 18 bytes.
    Q4_0,
    /// 32 nibbles, f16 scale and minimum: 20 bytes.
    Q4_1,
}

impl WeightType {
    /// Numbers in a block, bytes of a block.
    pub fn block(self) -> (usize, usize) {
        match self {
            Self::F32 => (1, 4),
            Self::F16 | Self::Bf16 => (1, 2),
            Self::Q8_0 => (32, 34),
            Self::Q4_0 => (32, 18),
            Self::Q4_1 => (32, 20),
        }
    }

    /// Bytes of a row of `cols` numbers.
    pub fn row_bytes(self, cols: usize) -> usize {
        let (n, b) = self.block();
        cols / n * b
    }
}

/// A weight matrix `[rows, cols]`: `y = W x` has `rows` outputs.
#[derive(Clone, Debug)]
pub struct Weight {
    /// Blocks, row after row.
    pub data: Buf,
    /// Block type.
    pub kind: WeightType,
    /// Outputs.
    pub rows: u32,
    /// Inputs.
    pub cols: u32,
}

/// A rotation by position.
#[derive(Clone, Debug)]
pub struct RopeArg {
    /// Pairing.
    pub kind: Rope,
    /// `[D / 2]` inverse frequencies.
    pub inv_freq: Arc<[f32]>,
}

/// One row that goes into a tile.
#[derive(Clone, Debug)]
pub struct RowWrite {
    /// Row of the call's `k` and `v`.
    pub src: u32,
    /// Kv head.
    pub head: u16,
    /// Row of the tile.
    pub slot: u8,
    /// The tile.
    pub tile: Buf,
}

/// One sequence of an `Attend`: its rows and what they read.
#[derive(Clone, Debug)]
pub struct AttendSeq {
    /// Rows of `q` and `out`.
    pub rows: Range<u32>,
    /// Per kv head: runs to fold, in order of the fold.
    pub heads: Vec<Vec<Run>>,
    /// First position of the rows this pass brought: `Over::Past` and `Mask` need it. Positions below are the past.
    pub pass_from: u32,
}

/// A score column that an `Attend` updates.
#[derive(Clone, Debug)]
pub struct ColumnUpdate {
    /// What to measure.
    pub probe: Probe,
    /// `targets[seq][head][run]`: `[tiles, 32]` f32; `Sum` and `MeanVisible` add, `Max` keeps the larger.
    pub targets: Vec<Vec<Vec<Option<Buf>>>>,
}

/// Attention of the rows of one layer: fold the runs to (max, sum, output), merge by log-sum-exp.
#[derive(Clone, Debug)]
pub struct Attend {
    /// `[n, H, D]` f32, not rotated.
    pub q: Buf,
    /// Position of each row, as the mask counts.
    pub q_pos: Arc<[u32]>,
    /// Position each row is rotated by; equal to `q_pos` unless positions are packed.
    pub q_rope: Arc<[u32]>,
    /// `[n, H, Dv]` f32.
    pub out: Buf,
    /// `[n, H]` f32 natural log of the sum of exponentials.
    pub lse: Option<Buf>,
    /// H.
    pub q_heads: u16,
    /// K.
    pub kv_heads: u16,
    /// D.
    pub k_dim: u16,
    /// Dv.
    pub v_dim: u16,
    /// Factor of the scores, usually 1 / sqrt(D).
    pub scale: f32,
    /// Rotation of q, and of keys in plain space.
    pub rope: Option<RopeArg>,
    /// Who sees whom.
    pub mask: Mask,
    /// Tokens a query sees, itself included.
    pub window: Option<u32>,
    /// Sequences.
    pub seqs: Vec<AttendSeq>,
    /// Columns to update.
    pub columns: Vec<ColumnUpdate>,
}

/// A dot product of activations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `silu(a) * b`.
    SwiGlu,
}

/// Work for a backend.
#[derive(Clone, Debug)]
pub enum Call {
    /// Copies host bytes into `dst`.
    Write {
        /// Destination.
        dst: Buf,
        /// Bytes; as many as `dst` holds.
        data: Arc<[u8]>,
    },
    /// Copies `src` to `dst`, equal lengths.
    Copy {
        /// Source.
        src: Buf,
        /// Destination.
        dst: Buf,
    },
    /// Sets f32 numbers.
    Fill {
        /// Destination.
        dst: Buf,
        /// Value.
        value: f32,
    },
    /// `out[i] = table[ids[i]]`, decoded to f32.
    Embed {
        /// The table.
        table: Weight,
        /// Rows.
        ids: Arc<[u32]>,
        /// `[n, cols]` f32.
        out: Buf,
    },
    /// RMS norm with weight.
    RmsNorm {
        /// `[n, dim]` f32.
        x: Buf,
        /// `[dim]` f32.
        weight: Buf,
        /// Added to the mean square.
        eps: f32,
        /// dim.
        dim: u32,
        /// `[n, dim]` f32.
        out: Buf,
    },
    /// `out = x Wᵀ`, or `out += x Wᵀ` with `add`. Up to 4 rows read the blocks directly; more go through a product of panels.
    MatMul {
        /// `[n, cols]` f32.
        x: Buf,
        /// The matrix.
        w: Weight,
        /// `[n, rows]` f32.
        out: Buf,
        /// Add to `out`.
        add: bool,
    },
    /// Elementwise activation of two buffers.
    Activate {
        /// Function.
        f: Activation,
        /// f32.
        a: Buf,
        /// f32.
        b: Buf,
        /// f32; may be `a`.
        out: Buf,
    },
    /// `x += y`.
    Add {
        /// f32.
        x: Buf,
        /// f32.
        y: Buf,
    },
    /// `dst[i] = src[idx[i]]`, rows of `row_bytes`.
    Gather {
        /// Source.
        src: Buf,
        /// Rows of the source.
        idx: Arc<[u32]>,
        /// Bytes of a row.
        row_bytes: u32,
        /// Destination.
        dst: Buf,
    },
    /// `dst[idx[i]] = src[i]`.
    Scatter {
        /// Source.
        src: Buf,
        /// Rows of the destination.
        idx: Arc<[u32]>,
        /// Bytes of a row.
        row_bytes: u32,
        /// Destination.
        dst: Buf,
    },
    /// Writes k and v rows into dense tiles, rotating keys where the code says so.
    Append {
        /// `[n, K, D]` f32, not rotated.
        k: Buf,
        /// `[n, K, Dv]` f32.
        v: Buf,
        /// K.
        kv_heads: u16,
        /// D.
        k_dim: u16,
        /// Dv.
        v_dim: u16,
        /// Codes of the tiles; dense formats.
        codes: Codes,
        /// Rotation and position of each source row; `None` stores keys as they are.
        rope: Option<(RopeArg, Arc<[u32]>)>,
        /// Rows.
        writes: Vec<RowWrite>,
    },
    /// Attention.
    Attend(Box<Attend>),
    /// Codes the rows of tiles into another format, tile by tile: `from[i]` to `to[i]`.
    Seal {
        /// Codes of the sources.
        from_codes: Codes,
        /// Codes of the destinations.
        to_codes: Codes,
        /// D.
        k_dim: u16,
        /// Dv.
        v_dim: u16,
        /// Source tile, destination tile, rows present.
        tiles: Vec<(Buf, Buf, u8)>,
    },
    /// Decodes one column of a tile to f32 rows `[32, dim]`; rows beyond `rows` are zero.
    Decode {
        /// Codes of the tile.
        codes: Codes,
        /// D.
        k_dim: u16,
        /// Dv.
        v_dim: u16,
        /// The tile.
        tile: Buf,
        /// Rows present.
        rows: u8,
        /// `[32, D]` f32.
        k_out: Buf,
        /// `[32, Dv]` f32.
        v_out: Buf,
    },
    /// Copies rows between tiles of the same codes without recoding them.
    Compact {
        /// Codes of all tiles; parameters must be per row.
        codes: Codes,
        /// D.
        k_dim: u16,
        /// Dv.
        v_dim: u16,
        /// Sources.
        src: Vec<Tile>,
        /// Rows, counted over the sources; row `i` of the result comes from `idx[i]`.
        idx: Arc<[u32]>,
        /// Destinations, `ceil(idx / 32)`.
        dst: Vec<Buf>,
    },
    /// Moves numbers that lie beside tiles (`[tiles, 32]` f32 in row order `pi`): `dst` row `i` = `src` row `idx[i]`.
    CompactColumn {
        /// Source.
        src: Buf,
        /// Rows of the source.
        idx: Arc<[u32]>,
        /// Destination.
        dst: Buf,
    },
    /// Squared distance of rows: `out[i] = sum_c (a[i, c] - b[i, c])^2`.
    RowDistance {
        /// `[n, dim]` f32.
        a: Buf,
        /// `[n, dim]` f32.
        b: Buf,
        /// dim.
        dim: u32,
        /// `[n]` f32.
        out: Buf,
    },
}

impl Call {
    /// Buffers that the call writes completely, without reading them first.
    pub fn pure_outputs(&self) -> Vec<&Buf> {
        match self {
            Self::Write { dst, .. }
            | Self::Copy { dst, .. }
            | Self::Fill { dst, .. }
            | Self::Gather { dst, .. } => vec![dst],
            Self::Embed { out, .. }
            | Self::RmsNorm { out, .. }
            | Self::RowDistance { out, .. }
            | Self::MatMul { out, add: false, .. } => vec![out],
            Self::Activate { a, b, out, .. } if !out.overlaps(a) && !out.overlaps(b) => vec![out],
            Self::Attend(a) => std::iter::once(&a.out).chain(a.lse.as_ref()).collect(),
            Self::Decode { k_out, v_out, .. } => vec![k_out, v_out],
            _ => Vec::new(),
        }
    }
}
