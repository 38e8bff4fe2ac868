//! The seam to the model: three hooks, `enter / attend / leave`.

use std::ops::Range;

use crate::{Buf, Layout, Point, Result};

/// Rows of a batch at one point of the model. Sequence `s` owns the rows `of[s]`.
#[derive(Clone, Debug)]
pub struct Rows {
    /// `[rows, dim]` f32.
    pub data: Buf,
    /// Numbers in a row.
    pub dim: u32,
    /// Position of each row.
    pub pos: Vec<u32>,
    /// Rows of each sequence.
    pub of: Vec<Range<u32>>,
}

impl Rows {
    /// Number of rows.
    pub fn len(&self) -> usize {
        self.pos.len()
    }

    /// No rows.
    pub fn is_empty(&self) -> bool {
        self.pos.is_empty()
    }
}

/// What the model does at a point.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Go {
    /// Compute the point.
    Run,
    /// The hook has already applied the point's contribution to the rows.
    Skip,
}

/// Where the cache meets the model. Per layer: `enter(attention)`, `attend`, `leave(attention)`, `enter(mlp)`, `leave(mlp)`.
///
/// `enter` may replace `x` by fewer or more rows; the model goes on with what it finds. `attend` may give fewer rows in
/// `out` (a subset of the query rows, in order); the model then goes on with those rows only. Positions stay ascending
/// inside a sequence. No hook calls the model.
pub trait Hooks {
    /// Before a point. `x` is the residual stream; `gate` is the modulation a diffusion block will apply.
    fn enter(&mut self, _at: Point, _x: &mut Rows, _gate: Option<&Buf>) -> Result<Go> {
        Ok(Go::Run)
    }

    /// Attention. `q` `[rows, H * D]`, `k` `[rows, K * D]`, `v` `[rows, K * Dv]`, none rotated; `out` `[rows, H * Dv]`.
    fn attend(&mut self, at: Point, q: &Rows, k: &Rows, v: &Rows, out: &mut Rows) -> Result<()>;

    /// After a point, before its contribution `y` is gated and added to the residual stream.
    fn leave(&mut self, _at: Point, _y: &mut Rows) -> Result<()> {
        Ok(())
    }
}

/// Which rows of a pass give logits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ask {
    /// None.
    None,
    /// The last row of each sequence.
    Last,
    /// Every row that reaches the end of the model.
    All,
}

/// One run of the model over new rows of one or more sequences.
#[derive(Clone, Debug)]
pub struct Batch {
    /// Token ids, sequence after sequence.
    pub ids: Vec<u32>,
    /// Positions, ascending inside a sequence.
    pub pos: Vec<u32>,
    /// Rows of each sequence.
    pub of: Vec<Range<u32>>,
    /// Which rows give logits.
    pub ask: Ask,
}

impl Batch {
    /// Consecutive tokens of one sequence.
    pub fn one(ids: &[u32], from: u32, ask: Ask) -> Self {
        let n = ids.len() as u32;
        Self { ids: ids.to_vec(), pos: (from..from + n).collect(), of: std::iter::once(0..n).collect(), ask }
    }
}

/// Logits of the rows asked for.
#[derive(Clone, Debug, Default)]
pub struct Logits {
    /// `[rows, vocab]` f32.
    pub data: Vec<f32>,
    /// Ids of the vocabulary.
    pub vocab: usize,
    /// Sequence and position of each row.
    pub rows: Vec<(u32, u32)>,
}

impl Logits {
    /// Logits of row `i`.
    pub fn row(&self, i: usize) -> &[f32] {
        &self.data[i * self.vocab..(i + 1) * self.vocab]
    }
}

/// A transformer that meets the cache through `Hooks`.
pub trait Model: Send + Sync {
    /// What its cache looks like.
    fn layout(&self) -> &Layout;
    /// Runs the batch.
    fn forward(&self, batch: &Batch, hooks: &mut dyn Hooks, out: &mut Logits) -> Result<()>;
}
