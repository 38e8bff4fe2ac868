//! A session: one sequence with its tables, columns and policies, owned by one tenant, written by one writer.
//!
//! State in bytes: tiles of all tables, score columns (4 B per row, kv head and column), bias (4 B per row where rows are
//! hidden), 4 B per token for its id, one row of logits.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use kvasir_core::{
    Backend, Buf, Call, ColId, Error as CoreError, Format, Home, KeySpace, KvPolicy, Layout, Life, Positions,
    Run, Table, Tile, Trigger, View, Wake, Want, tile_bytes,
};
use serde::{Deserialize, Serialize};
use serde_json::Value as Json;

use crate::recipe::{Policies, Recipe, Slot, Stack};
use crate::{Error, Result};

/// Number type of dense rows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    /// 32-bit floats.
    F32,
    /// IEEE half, the default.
    #[default]
    F16,
    /// Brain float.
    Bf16,
}

impl From<Dtype> for Format {
    fn from(d: Dtype) -> Self {
        match d {
            Dtype::F32 => Self::F32,
            Dtype::F16 => Self::F16,
            Dtype::Bf16 => Self::Bf16,
        }
    }
}

/// How a session keeps its rows.
#[derive(Clone, Debug)]
pub struct SessionOptions {
    /// Number type of dense rows.
    pub dtype: Dtype,
    /// Keys after or before RoPE in the dense run; before lets rows move.
    pub keys: KeySpace,
    /// Policies in order of effect.
    pub recipe: Recipe,
}

impl Default for SessionOptions {
    fn default() -> Self {
        Self { dtype: Dtype::F16, keys: KeySpace::Rotated, recipe: Recipe::default() }
    }
}

/// One kv head's spare tiles, cut from larger allocations so that neighbours lie together.
#[derive(Default)]
struct Spare {
    tiles: Vec<Buf>,
    chunk: usize,
}

/// What policies did so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PlanStats {
    /// Plans that held at least one op.
    pub plans: u64,
    /// Ops applied.
    pub applied: u64,
    /// Ops refused by their floor.
    pub refused: u64,
}

/// One sequence. See the module header.
pub struct Session {
    pub(crate) backend: Arc<dyn Backend>,
    pub(crate) layout: Arc<Layout>,
    pub(crate) options: SessionOptions,
    pub(crate) stack: Stack,
    /// `[layer][kv head]`.
    pub(crate) tables: Vec<Vec<Table>>,
    spare: HashMap<(usize, usize, usize), Spare>,
    /// Token of each position; shorter than `seen` when an engine brought rows without ids.
    pub(crate) ids: Vec<u32>,
    /// Positions computed so far, evicted ones included.
    pub(crate) seen: u32,
    /// Positions below were computed while every read went over dense rows.
    pub(crate) exact_to: u32,
    /// Tokens that a resume could not bring back.
    pub(crate) pending: Vec<u32>,
    /// Rows were dropped, overwritten or brought from outside: no block of this session may be named.
    pub(crate) private: Option<&'static str>,
    pub(crate) wants: VecDeque<Want>,
    /// Logits behind the last position, while they are known.
    pub(crate) logits: Option<Vec<f32>>,
    /// Policies sleep.
    pub(crate) frozen: bool,
    /// Per layer: the last real queries `[n, H, D]` and their positions, kept where a floor is set.
    pub(crate) probes: Vec<Option<(Buf, Vec<u32>)>>,
    pub(crate) stats: PlanStats,
    pub(crate) owner: Option<crate::commit::Owner>,
    pub(crate) closed: bool,
    pub(crate) in_pass: bool,
}

impl Session {
    /// An empty session without a store.
    pub fn new(backend: Arc<dyn Backend>, layout: Arc<Layout>, options: SessionOptions) -> Result<Self> {
        let policies = options.recipe.policies()?;
        Self::build(backend, layout, options, policies)
    }

    /// An empty session with policies that are not in the registry. Its rows are private: they have no recipe to be
    /// named after.
    pub fn with_policies(
        backend: Arc<dyn Backend>,
        layout: Arc<Layout>,
        options: SessionOptions,
        policies: Vec<Box<dyn KvPolicy>>,
    ) -> Result<Self> {
        let policies = policies.into_iter().map(|p| (p, None)).collect();
        let mut session = Self::build(backend, layout, options, policies)?;
        session.private = Some("policies outside the registry");
        Ok(session)
    }

    fn build(
        backend: Arc<dyn Backend>,
        layout: Arc<Layout>,
        options: SessionOptions,
        policies: Policies,
    ) -> Result<Self> {
        layout.check()?;
        let stack = Stack::new(policies, &layout, options.dtype.into(), options.keys)?;
        let table = |l: usize, h: u16| Table {
            home: Home::Head(l as u16, h),
            runs: stack.runs.iter().map(|codes| Run::new(codes.clone())).collect(),
            life: Life::Sequence,
        };
        let tables = layout
            .layers
            .iter()
            .enumerate()
            .map(|(l, at)| (0..at.kv_heads).map(|h| table(l, h)).collect())
            .collect();
        Ok(Self {
            probes: vec![None; layout.layers.len()],
            backend,
            layout,
            options,
            stack,
            tables,
            spare: HashMap::new(),
            ids: Vec::new(),
            seen: 0,
            exact_to: 0,
            pending: Vec::new(),
            private: None,
            wants: VecDeque::new(),
            logits: None,
            frozen: false,
            stats: PlanStats::default(),
            owner: None,
            closed: false,
            in_pass: false,
        })
    }

    /// Positions computed so far, evicted ones included.
    pub fn len(&self) -> u32 {
        self.seen
    }

    /// Nothing was computed yet.
    pub fn is_empty(&self) -> bool {
        self.seen == 0
    }

    /// Token ids of the positions, as far as they are known.
    pub fn ids(&self) -> &[u32] {
        &self.ids
    }

    /// What its cache looks like.
    pub fn layout(&self) -> &Arc<Layout> {
        &self.layout
    }

    /// How it keeps its rows.
    pub fn options(&self) -> &SessionOptions {
        &self.options
    }

    /// The backend that holds its rows.
    pub fn backend(&self) -> &Arc<dyn Backend> {
        &self.backend
    }

    /// Logits behind the last position, while they are known.
    pub fn logits(&self) -> Option<&[f32]> {
        self.logits.as_deref()
    }

    /// The tables, `[layer][kv head]`.
    pub fn tables(&self) -> &[Vec<Table>] {
        &self.tables
    }

    /// What policies did so far.
    pub fn stats(&self) -> PlanStats {
        self.stats
    }

    /// Work for the model that policies asked for and no driver has done yet.
    pub fn wants(&mut self) -> &mut VecDeque<Want> {
        &mut self.wants
    }

    /// Puts policies to sleep or wakes them up: while they sleep rows stay in the run they arrived in.
    pub fn freeze(&mut self, frozen: bool) {
        self.frozen = frozen;
    }

    /// Tiles in runs whose format is lossy.
    pub fn coded_tiles(&self) -> u64 {
        let coded = |r: &&Run| !r.codes[0].format.is_dense() || !r.codes[1].format.is_dense();
        self.each_run().filter(coded).map(|r| r.tiles.len() as u64).sum()
    }

    /// Bytes of tiles, columns and biases. Tiles shared with other sessions count here as well.
    pub fn bytes_held(&self) -> u64 {
        let beside = |r: &Run| {
            r.meta.bias.iter().chain(r.meta.cols.iter().map(|c| &c.1)).map(|b| b.bytes() as u64).sum::<u64>()
        };
        self.each_run().map(|r| r.tiles.iter().map(|t| t.codes.bytes() as u64).sum::<u64>() + beside(r)).sum()
    }

    fn each_run(&self) -> impl Iterator<Item = &Run> {
        self.tables.iter().flatten().flat_map(|t| &t.runs)
    }

    /// Rows of the longest table that a query may see.
    pub fn rows(&self) -> u32 {
        self.tables.iter().flatten().map(|t| self.visible_rows(t)).max().unwrap_or(0)
    }

    pub(crate) fn visible_rows(&self, table: &Table) -> u32 {
        // Hidden slots are those of the sinks: the first of their run.
        let hidden = |(r, run): (usize, &Run)| match run.meta.bias {
            None => 0,
            Some(_) => {
                (0..run.rows as usize).take_while(|&i| self.stack.hides(r, run.meta.pos.at(i))).count() as u32
            }
        };
        table.rows() - table.runs.iter().enumerate().map(hidden).sum::<u32>()
    }

    /// Digest of every row of every table: codes, positions and decoded numbers. Two sessions with equal digests answer alike.
    pub fn digest(&self) -> Result<[u8; 32]> {
        let mut h = blake3::Hasher::new();
        for (l, heads) in self.tables.iter().enumerate() {
            let at = &self.layout.layers[l];
            let (dk, dv) = (at.k_dim as usize * 128, at.v_dim as usize * 128);
            for run in heads.iter().flat_map(|t| &t.runs) {
                h.update(&[run.codes[0].format.tag()?, run.codes[1].format.tag()?]);
                h.update(&run.rows.to_le_bytes());
                for p in run.meta.pos.to_vec(run.rows as usize) {
                    h.update(&p.to_le_bytes());
                }
                if run.tiles.is_empty() {
                    continue;
                }
                let out = self.backend.alloc(run.tiles.len() * (dk + dv))?;
                for (i, tile) in run.tiles.iter().enumerate() {
                    let o = i * (dk + dv);
                    self.backend.submit(Call::Decode {
                        codes: run.codes.clone(),
                        k_dim: at.k_dim,
                        v_dim: at.v_dim,
                        tile: tile.codes.clone(),
                        rows: run.rows_of_tile(i) as u8,
                        k_out: out.slice(o..o + dk)?,
                        v_out: out.slice(o + dk..o + dk + dv)?,
                    })?;
                }
                let mut bytes = vec![0; out.bytes()];
                self.backend.read(&out, &mut bytes)?;
                h.update(&bytes);
            }
        }
        Ok(*h.finalize().as_bytes())
    }

    /// Rows of one run as f32: positions, keys `[rows, D]` (in the space of the code), values `[rows, Dv]`.
    pub fn read_rows(&self, layer: usize, head: usize, run: usize) -> Result<(Vec<u32>, Vec<f32>, Vec<f32>)> {
        let at = &self.layout.layers[layer];
        let run = &self.tables[layer][head].runs[run];
        let (mut keys, mut values) = (Vec::new(), Vec::new());
        for (i, tile) in run.tiles.iter().enumerate() {
            let rows = run.rows_of_tile(i);
            let k_out = self.backend.alloc(at.k_dim as usize * 128)?;
            let v_out = self.backend.alloc(at.v_dim as usize * 128)?;
            self.backend.submit(Call::Decode {
                codes: run.codes.clone(),
                k_dim: at.k_dim,
                v_dim: at.v_dim,
                tile: tile.codes.clone(),
                rows: rows as u8,
                k_out: k_out.clone(),
                v_out: v_out.clone(),
            })?;
            keys.extend_from_slice(&self.backend.read_f32(&k_out)?[..rows * at.k_dim as usize]);
            values.extend_from_slice(&self.backend.read_f32(&v_out)?[..rows * at.v_dim as usize]);
        }
        Ok((run.meta.pos.to_vec(run.rows as usize), keys, values))
    }

    /// A second session that shares every tile until one of them writes.
    pub fn fork(&mut self) -> Result<Self> {
        self.usable()?;
        let mut fork = Self::new(Arc::clone(&self.backend), Arc::clone(&self.layout), self.options.clone())?;
        if fork.stack.slots.len() != self.stack.slots.len() {
            return Err(CoreError::unsupported("fork of a session whose policies have no recipe").into());
        }
        for run in self.tables.iter_mut().flatten().flat_map(|t| &mut t.runs) {
            disown(run);
        }
        for (to, from) in fork.stack.slots.iter_mut().zip(&self.stack.slots) {
            to.policy.load(&from.policy.save())?;
        }
        fork.tables.clone_from(&self.tables);
        fork.ids.clone_from(&self.ids);
        fork.seen = self.seen;
        fork.exact_to = self.exact_to;
        fork.pending.clone_from(&self.pending);
        fork.private = self.private;
        fork.wants.clone_from(&self.wants);
        fork.logits.clone_from(&self.logits);
        fork.frozen = self.frozen;
        fork.stats = self.stats;
        fork.owner.clone_from(&self.owner);
        Ok(fork)
    }

    /// Ends the session: its memory goes back, later use is `Closed`.
    pub fn close(&mut self) {
        self.closed = true;
        self.tables.clear();
        self.spare.clear();
        self.logits = None;
    }

    /// `Closed` after `close`, `Busy` while a pass has not ended.
    pub fn usable(&self) -> Result<()> {
        if self.closed {
            return Err(Error::Closed { what: "session" });
        }
        if self.in_pass {
            return Err(Error::Busy { what: "a pass has not ended".into() });
        }
        Ok(())
    }

    /// `Busy` as long as tokens that a resume could not bring back are missing: what comes next comes behind them.
    pub(crate) fn whole(&self) -> Result<()> {
        self.usable()?;
        match self.pending.len() {
            0 => Ok(()),
            n => Err(Error::Busy { what: format!("{n} of its tokens are still to be computed again") }),
        }
    }

    /// A pass of `new` more rows stays inside the model's context. With packed positions only the rows held count: a stream
    /// may go on for ever.
    pub(crate) fn fits(&self, new: usize) -> Result<()> {
        let limit = self.layout.context;
        let held = if self.is_packed() { self.rows() } else { self.seen };
        let got = held as u64 + new as u64;
        if got > limit as u64 || self.seen as u64 + new as u64 > u32::MAX as u64 {
            return Err(Error::ContextOverflow { limit, got });
        }
        Ok(())
    }

    /// As `fits`, for rows that come in passes; a packed session evicts between them.
    pub(crate) fn fits_in_passes(&self, new: usize) -> Result<()> {
        self.fits(if self.is_packed() { new.min(crate::drive::PASS_ROWS) } else { new })
    }

    pub(crate) fn is_packed(&self) -> bool {
        self.stack.positions == Positions::Packed
    }

    /// A fresh tile for a run of a head. Tiles come from chunks that grow to eight, so that a head's tiles lie together.
    pub(crate) fn new_tile(
        &mut self,
        layer: usize,
        head: usize,
        run: usize,
        codes: &kvasir_core::Codes,
    ) -> Result<Tile> {
        let at = &self.layout.layers[layer];
        let bytes = tile_bytes(codes, at.k_dim as usize, at.v_dim as usize)?;
        let spare = self.spare.entry((layer, head, run)).or_default();
        if spare.tiles.is_empty() {
            spare.chunk = (spare.chunk * 2).clamp(1, 8);
            let chunk = self.backend.alloc(spare.chunk * bytes)?;
            for i in (0..spare.chunk).rev() {
                spare.tiles.push(chunk.slice(i * bytes..(i + 1) * bytes)?);
            }
        }
        let codes = spare.tiles.pop().expect("just filled");
        Ok(Tile { codes, own: true })
    }

    /// Wakes policies whose triggers are due and applies what they plan. `prefill_end` is true after the pass that ends one.
    pub(crate) fn wake(&mut self, prefill_end: bool) -> Result<()> {
        self.wake_some(prefill_end, |_| true)
    }

    /// As `wake`, before any pass: policies that read columns wait until one has filled them.
    pub(crate) fn wake_found(&mut self) -> Result<()> {
        self.wake_some(false, |slot| slot.spec.columns.is_empty())
    }

    fn wake_some(&mut self, prefill_end: bool, of: impl Fn(&Slot) -> bool) -> Result<()> {
        if self.frozen {
            return Ok(());
        }
        for s in 0..self.stack.slots.len() {
            if !of(&self.stack.slots[s]) {
                continue;
            }
            for w in 0..self.stack.slots[s].spec.wake.len() {
                let due = match self.stack.slots[s].spec.wake[w] {
                    Trigger::PassEnd => true,
                    Trigger::PrefillEnd => prefill_end,
                    Trigger::Over { budget, slack_rows } => self.rows() > budget.rows(self.seen) + slack_rows,
                    Trigger::Open { rows } => self.open_rows() >= rows,
                    Trigger::Wanted => false,
                };
                if due {
                    self.wake_one(s, Wake(w))?;
                }
            }
        }
        Ok(())
    }

    fn open_rows(&self) -> u32 {
        self.tables.iter().flatten().map(|t| t.runs[0].rows).max().unwrap_or(0)
    }

    /// Tells the policies that wait for it that a want has been served.
    pub(crate) fn wake_wanted(&mut self) -> Result<()> {
        for s in 0..self.stack.slots.len() {
            for w in 0..self.stack.slots[s].spec.wake.len() {
                if self.stack.slots[s].spec.wake[w] == Trigger::Wanted {
                    self.wake_one(s, Wake(w))?;
                }
            }
        }
        Ok(())
    }

    fn wake_one(&mut self, s: usize, why: Wake) -> Result<()> {
        let mut plan = kvasir_core::Plan::default();
        let mut policy = std::mem::replace(&mut self.stack.slots[s].policy, Box::new(Asleep));
        let planned = {
            let slot = &self.stack.slots[s];
            let col = |l: u16, h: u16, c: ColId| {
                if c.0 as usize >= slot.spec.columns.len() {
                    return Err(CoreError::invalid(
                        "col",
                        format_args!("an index below {}", slot.spec.columns.len()),
                        c.0,
                    ));
                }
                self.read_column(l as usize, h as usize, slot.col(c)).map_err(|e| match e {
                    Error::Core(e) => e,
                    other => CoreError::unsupported(other.to_string()),
                })
            };
            let view = View {
                layout: &self.layout,
                seen: self.seen,
                rows: self.rows(),
                open: self.open_rows(),
                col: &col,
            };
            policy.plan(why, &view, &mut plan)
        };
        self.stack.slots[s].policy = policy;
        planned?;
        self.wants.extend(plan.wants.iter().cloned());
        if !plan.ops.is_empty() {
            self.stats.plans += 1;
            self.apply(s, &plan)?;
        }
        Ok(())
    }

    /// Values of a column in position order.
    fn read_column(&self, layer: usize, head: usize, col: ColId) -> Result<Vec<f32>> {
        let rows = self.visible(&self.tables[layer][head], None);
        let per_run = self.column_values(&self.tables[layer][head], col)?;
        Ok(rows.iter().map(|r| per_run[r.run][r.idx]).collect())
    }

    /// Policy states, for a commit.
    pub(crate) fn save_policies(&self) -> Json {
        self.stack.slots.iter().map(|s| s.policy.save()).collect()
    }
}

/// Stands in for a policy while it plans.
struct Asleep;

impl KvPolicy for Asleep {
    fn spec(&self, _: &Layout) -> kvasir_core::Result<kvasir_core::KvSpec> {
        Ok(kvasir_core::KvSpec::dense())
    }
    fn plan(&mut self, _: Wake, _: &View<'_>, _: &mut kvasir_core::Plan) -> kvasir_core::Result<()> {
        Ok(())
    }
}

/// Others may read the tiles from now on: they are copied before a write.
pub(crate) fn disown(run: &mut Run) {
    if run.tiles.iter().any(|t| t.own) {
        for tile in Arc::make_mut(&mut run.tiles) {
            tile.own = false;
        }
    }
}
