//! Attention as a fold over runs.
//!
//! Query vectors are rotated and scaled to log2 units once and laid out `[K, n, G, D]`, so that all vectors that read one kv
//! head lie together. A unit of work is (sequence, kv head, block of query rows). It folds the head's tiles in chunks of
//! [`CHUNK`] tiles, counted over all runs; each chunk starts afresh, and chunk results are merged in index order. With few
//! units the chunks run in parallel, otherwise one after another: the arithmetic, and so the bits, are the same.
//!
//! Per tile: keys are decoded once to `[D, 32]` f32 (rotated there if stored plain), scores of the whole block, masks,
//! weights, then values decoded to `[32, Dv]` and summed. Tiles that no query of the block sees are skipped.
//!
//! State per unit: `rows * G * (2 Dv + 34)` f32, and `32 (D + Dv)` f32 for the decoded tile.

use kvasir_core::{Attend, Buf, Error, HIDDEN, KeySpace, Mask, Pos, Result, TILE_ROWS, check, tile::pi};

use super::columns;
use super::tiles::Shape;
use crate::Cpu;
use crate::arch::{Kernels, Store, UNSEEN};
use crate::mem::{self, Pieces};
use crate::pool::scratch;
use crate::rope::{Pairing, RopeTable};

/// Tiles of a chunk.
pub(super) const CHUNK: usize = 32;
/// Query vectors of a block, if one row does not have more: enough to make decoding a tile cheap beside its use.
const VECTORS: usize = 96;

/// One tile that queries may read.
pub(super) struct TileRef<'a> {
    /// Run of the table.
    pub(super) run: usize,
    /// Tile of the run.
    pub(super) index: usize,
    parts: [&'a [u8]; 2],
    stores: [Store; 2],
    /// Keys are rotated when read.
    turn: bool,
    bias: Option<&'a [f32]>,
    scale: [Option<&'a [f32]>; 2],
    pos: &'a Pos,
    /// Rows present.
    rows: usize,
    /// Smallest and largest position.
    lo: u32,
    hi: u32,
}

impl TileRef<'_> {
    /// Rows present.
    pub(super) fn rows(&self) -> usize {
        self.rows
    }

    /// Position of row `t` of the tile.
    pub(super) fn pos(&self, t: usize) -> u32 {
        self.pos.at(self.index * TILE_ROWS + t)
    }
}

/// Which positions a query sees.
#[derive(Clone, Copy)]
pub(super) struct Sight {
    causal: bool,
    window: Option<u32>,
}

impl Sight {
    fn sees(self, q: u32, k: u32) -> bool {
        (!self.causal || k <= q) && self.window.is_none_or(|w| q.saturating_sub(k) < w)
    }

    /// Every position of `lo..=hi` is seen.
    fn sees_all(self, q: u32, lo: u32, hi: u32) -> bool {
        (!self.causal || hi <= q) && self.window.is_none_or(|w| q.saturating_sub(lo) < w)
    }

    /// No position of `lo..=hi` is seen by any query of `first..=last`.
    fn misses(self, [first, last]: [u32; 2], lo: u32, hi: u32) -> bool {
        (self.causal && lo > last) || self.window.is_some_and(|w| first.saturating_sub(hi) >= w)
    }
}

/// Lengths of a call.
#[derive(Clone, Copy)]
pub(super) struct Dims {
    /// Query rows.
    pub(super) n: usize,
    /// Query heads, kv heads, query heads per kv head.
    pub(super) h: usize,
    pub(super) k: usize,
    pub(super) g: usize,
    /// Channels.
    pub(super) d: usize,
    pub(super) dv: usize,
}

/// What all parts of one call share.
pub(super) struct Job<'a> {
    pub(super) kernels: &'static Kernels,
    pub(super) dims: Dims,
    pub(super) sight: Sight,
    rope: Option<RopeTable>,
    /// `[K, n, G, D]`, rotated, in log2 units.
    q: Vec<f32>,
    pub(super) q_pos: &'a [u32],
    /// `[seq][head][tile]`.
    pub(super) tiles: Vec<Vec<Vec<TileRef<'a>>>>,
}

/// Rows that one kv head's vectors of some query rows need while a tile is folded.
pub(super) struct Decoded<'s> {
    pub(super) keys: &'s mut [f32],
    pub(super) values: &'s mut [f32],
    pub(super) scores: &'s mut [f32],
}

pub(super) fn attend(cpu: &Cpu, a: &Attend) -> Result<()> {
    let dims = dims(a)?;
    let Dims { n, h, k: heads, g, d, dv } = dims;
    mem::disjoint("attend.out", &a.out, &[&a.q])?;
    let q = mem::f32s("attend.q", &a.q, mem::size("attend.q", &[n, h, d])?)?;
    check::finite("attend.q", q, h * d)?;
    check::equal("attend.qRope", "positions", n, a.q_rope.len())?;
    if !a.scale.is_finite() {
        return Err(Error::invalid("attend.scale", "a finite factor", a.scale));
    }
    rows_are_disjoint(a, n)?;
    let mut last = a.q_rope.iter().copied().max().unwrap_or(0);
    let tiles = tiles(a, dims, &mut last)?;
    let written: Vec<&Buf> = std::iter::once(&a.out).chain(a.lse.as_ref()).collect();
    for run in a.seqs.iter().flat_map(|s| s.heads.iter().flatten()) {
        for out in &written {
            for t in run.tiles.iter() {
                mem::disjoint("attend.out", out, &[&t.codes])?;
            }
            for beside in run.meta.bias.iter().chain(run.meta.scale.iter().flatten()) {
                mem::disjoint("attend.out", out, &[beside])?;
            }
        }
    }
    if let Some(lse) = &a.lse {
        mem::disjoint("attend.lse", lse, &[&a.q, &a.out])?;
        mem::f32s("attend.lse", lse, n * h)?;
    }
    columns::check(a, dims)?;
    let rope = cpu.ropes.get("attend.rope", a.rope.as_ref(), d, last)?;
    let out = mem::f32s_mut("attend.out", &a.out, mem::size("attend.out", &[n, h, dv])?)?;

    let q = queries(q, dims, &a.q_rope, rope.as_ref(), a.scale * std::f32::consts::LOG2_E);
    let sight = Sight { causal: a.mask == Mask::Causal, window: a.window };
    let job = Job { kernels: cpu.kernels, dims, sight, rope, q, q_pos: &a.q_pos, tiles };
    if a.seqs.iter().map(|s| s.rows.len()).sum::<usize>() < n {
        out.fill(0.0);
    }
    // [K, n, G, 2]: reference and sum of each query vector.
    let mut stats = vec![0.0f32; heads * n * g * 2];
    stats.chunks_exact_mut(2).for_each(|s| s[0] = HIDDEN);
    job.run(cpu, a, out, &mut stats);

    if let Some(lse) = &a.lse {
        let lse = mem::f32s_mut("attend.lse", lse, n * h)?;
        for (i, lse) in lse.iter_mut().enumerate() {
            let (row, head) = (i / h, i % h);
            let at = (((head / g) * n + row) * g + head % g) * 2;
            *lse = match stats[at + 1] {
                0.0 => HIDDEN,
                l => (stats[at] + l.log2()) * std::f32::consts::LN_2,
            };
        }
    }
    let updates = columns::measure(cpu, &job, a, &stats);
    drop(job);
    columns::apply(a, &updates)
}

fn dims(a: &Attend) -> Result<Dims> {
    let (h, k) = (a.q_heads as usize, a.kv_heads as usize);
    check::at_least("attend.kvHeads", k, 1)?;
    check::at_least("attend.qHeads", h, 1)?;
    check::at_least("attend.kDim", a.k_dim as usize, 1)?;
    check::at_least("attend.vDim", a.v_dim as usize, 1)?;
    if !h.is_multiple_of(k) {
        return Err(Error::invalid("attend.qHeads", format_args!("a multiple of {k}"), h));
    }
    Ok(Dims { n: a.q_pos.len(), h, k, g: h / k, d: a.k_dim as usize, dv: a.v_dim as usize })
}

/// Sequences own rows inside `0..n`, and no row twice: their outputs are written at the same time.
fn rows_are_disjoint(a: &Attend, n: usize) -> Result<()> {
    let mut ranges: Vec<_> = a.seqs.iter().map(|s| s.rows.clone()).collect();
    ranges.sort_by_key(|r| r.start);
    let mut end = 0;
    for r in ranges {
        if r.start > r.end || r.end as usize > n || (r.start < end && r.start < r.end) {
            return Err(Error::invalid(
                "attend.seqs.rows",
                format_args!("separate ranges in 0..{n}"),
                format_args!("{r:?}"),
            ));
        }
        end = end.max(r.end);
    }
    Ok(())
}

/// All tiles of the call; `last` becomes the largest position that a plain key is rotated by.
fn tiles<'a>(a: &'a Attend, dims: Dims, last: &mut u32) -> Result<Vec<Vec<Vec<TileRef<'a>>>>> {
    let rotates = a.rope.is_some();
    let mut all = Vec::with_capacity(a.seqs.len());
    for (s, seq) in a.seqs.iter().enumerate() {
        check::equal(&format!("attend.seqs[{s}].heads"), "kv heads", dims.k, seq.heads.len())?;
        let mut heads = Vec::with_capacity(dims.k);
        for (h, runs) in seq.heads.iter().enumerate() {
            let mut tiles = Vec::with_capacity(runs.iter().map(|r| r.tiles.len()).sum());
            for (r, run) in runs.iter().enumerate() {
                let at = |f: &str| format!("attend.seqs[{s}].heads[{h}].runs[{r}].{f}");
                let shape = Shape::new("attend", &run.codes, a.k_dim, a.v_dim)?;
                let rows = run.rows as usize;
                let count = rows.div_ceil(TILE_ROWS);
                if run.tiles.len() < count {
                    return Err(Error::invalid(at("tiles"), format_args!("{count} tiles"), run.tiles.len()));
                }
                let placed = match &run.meta.pos {
                    Pos::From(p) => p.checked_add(run.rows).is_some(),
                    Pos::List(l) => l.len() >= rows,
                };
                if !placed {
                    return Err(Error::invalid(at("meta.pos"), format_args!("{rows} positions"), "fewer"));
                }
                let beside = |name: &str, buf: &'a Option<Buf>| {
                    buf.as_ref().map(|b| mem::f32s_prefix(name, b, count * TILE_ROWS)).transpose()
                };
                let bias = beside("attend.bias", &run.meta.bias)?;
                let scale = [
                    beside("attend.scale", &run.meta.scale[0])?,
                    beside("attend.scale", &run.meta.scale[1])?,
                ];
                let turn = rotates && run.codes[0].space == KeySpace::Plain;
                for (index, tile) in run.tiles.iter().take(count).enumerate() {
                    let rows = run.rows_of_tile(index);
                    let first = index * TILE_ROWS;
                    let (lo, hi) = match &run.meta.pos {
                        Pos::From(p) => (p + first as u32, p + (first + rows - 1) as u32),
                        Pos::List(l) => {
                            let list = &l[first..first + rows];
                            list.iter().fold((u32::MAX, 0), |(lo, hi), &p| (lo.min(p), hi.max(p)))
                        }
                    };
                    if turn {
                        *last = (*last).max(hi);
                    }
                    let numbers = |all: Option<&'a [f32]>| all.map(|all| &all[first..first + TILE_ROWS]);
                    tiles.push(TileRef {
                        run: r,
                        index,
                        parts: shape.parts("attend.tile", &tile.codes)?,
                        stores: shape.stores,
                        turn,
                        bias: numbers(bias),
                        scale: scale.map(numbers),
                        pos: &run.meta.pos,
                        rows,
                        lo,
                        hi,
                    });
                }
            }
            heads.push(tiles);
        }
        all.push(heads);
    }
    Ok(all)
}

/// `[n, H, D]` to `[K, n, G, D]`, rotated and scaled.
fn queries(q: &[f32], dims: Dims, pos: &[u32], rope: Option<&RopeTable>, scale: f32) -> Vec<f32> {
    let Dims { n, h, g, d, .. } = dims;
    let mut out = vec![0.0f32; q.len()];
    let mut spare = Vec::new();
    for (i, q) in q.chunks_exact(d).enumerate() {
        let (row, head) = (i / h, i % h);
        let to = &mut out[(((head / g) * n + row) * g + head % g) * d..][..d];
        to.copy_from_slice(q);
        if let Some(rope) = rope {
            rope.rotate(to, pos[row], &mut spare);
        }
        for x in to {
            *x *= scale;
        }
    }
    out
}

/// Sequence, kv head, query rows.
struct Unit {
    seq: usize,
    head: usize,
    from: usize,
    rows: usize,
}

/// Sums of some query vectors over some tiles.
struct Partial<'s> {
    /// `[vectors, Dv]`, not divided by the sums of weights.
    out: &'s mut [f32],
    /// `[vectors, 2]`: reference, sum of weights.
    stats: &'s mut [f32],
}

impl Partial<'_> {
    fn clear(&mut self) {
        self.out.fill(0.0);
        self.stats.chunks_exact_mut(2).for_each(|s| s.copy_from_slice(&[HIDDEN, 0.0]));
    }

    /// Adds the sums of a later chunk.
    fn merge(&mut self, other: &Partial<'_>, dv: usize) {
        let vectors = self.stats.chunks_exact_mut(2).zip(self.out.chunks_exact_mut(dv));
        let others = other.stats.chunks_exact(2).zip(other.out.chunks_exact(dv));
        for ((s, out), (t, from)) in vectors.zip(others) {
            if t[1] == 0.0 {
                continue;
            }
            if s[1] == 0.0 {
                s.copy_from_slice(t);
                out.copy_from_slice(from);
                continue;
            }
            let m = s[0].max(t[0]);
            let (a, b) = ((s[0] - m).exp2(), (t[0] - m).exp2());
            s[0] = m;
            s[1] = s[1] * a + t[1] * b;
            for (o, x) in out.iter_mut().zip(from) {
                *o = *o * a + x * b;
            }
        }
    }
}

impl Job<'_> {
    fn run(&self, cpu: &Cpu, a: &Attend, out: &mut [f32], stats: &mut [f32]) {
        let Dims { g, d, dv, .. } = self.dims;
        let block = (VECTORS / g).max(1);
        let mut units = Vec::new();
        let (mut operations, mut chunks) = (0usize, 0usize);
        for (seq, s) in a.seqs.iter().enumerate() {
            for head in 0..self.dims.k {
                let tiles = self.tiles[seq][head].len();
                operations += s.rows.len() * g * tiles * TILE_ROWS * (d + dv);
                let end = s.rows.end as usize;
                for from in (s.rows.start as usize..end).step_by(block) {
                    units.push(Unit { seq, head, from, rows: block.min(end - from) });
                    chunks += tiles.div_ceil(CHUNK);
                }
            }
        }
        let (out, stats) = (Pieces::new(out), Pieces::new(stats));
        let wide = dv + 2;
        if units.len() >= 2 * cpu.pool.threads() || chunks <= units.len() {
            cpu.pool.each(units.len(), operations, |u| {
                let unit = &units[u];
                let vectors = unit.rows * g;
                let mut sums = vec![0.0; 2 * vectors * wide];
                let (total, part) = sums.split_at_mut(vectors * wide);
                let (mut total, mut part) = (partial(total, dv), partial(part, dv));
                total.clear();
                for chunk in 0..self.tiles[unit.seq][unit.head].len().div_ceil(CHUNK) {
                    self.chunk(unit, chunk, &mut part);
                    total.merge(&part, dv);
                }
                self.finish(unit, &total, &out, &stats);
            });
            return;
        }
        // Few units: their chunks side by side, each into its own slot.
        let mut items = Vec::with_capacity(chunks);
        let mut slots = vec![0];
        for (u, unit) in units.iter().enumerate() {
            for chunk in 0..self.tiles[unit.seq][unit.head].len().div_ceil(CHUNK) {
                items.push((u, chunk));
                slots.push(slots[slots.len() - 1] + unit.rows * g * wide);
            }
        }
        let mut sums = vec![0.0f32; slots[items.len()]];
        let pieces = Pieces::new(&mut sums);
        cpu.pool.each(items.len(), operations, |i| {
            let (u, chunk) = items[i];
            // SAFETY: slot `i` belongs to item `i`.
            let slot = unsafe { pieces.piece(slots[i], slots[i + 1] - slots[i]) };
            self.chunk(&units[u], chunk, &mut partial(slot, dv));
        });
        let mut next = 0;
        for (u, unit) in units.iter().enumerate() {
            let mut own = vec![0.0f32; unit.rows * g * wide];
            let mut total = partial(&mut own, dv);
            total.clear();
            while next < items.len() && items[next].0 == u {
                total.merge(&partial(&mut sums[slots[next]..slots[next + 1]], dv), dv);
                next += 1;
            }
            self.finish(unit, &total, &out, &stats);
        }
    }

    /// Writes the outputs of a unit.
    fn finish(&self, unit: &Unit, total: &Partial<'_>, out: &Pieces<'_, f32>, stats: &Pieces<'_, f32>) {
        let Dims { n, h, g, dv, .. } = self.dims;
        let sums = total.stats.chunks_exact(2).zip(total.out.chunks_exact(dv));
        for (i, (s, sum)) in sums.enumerate() {
            let (row, head) = (unit.from + i / g, unit.head * g + i % g);
            // SAFETY: units own their rows and heads: sequences have separate rows, blocks and heads do not overlap.
            let to = unsafe { out.piece((row * h + head) * dv, dv) };
            let factor = if s[1] == 0.0 { 0.0 } else { 1.0 / s[1] };
            for (o, x) in to.iter_mut().zip(sum) {
                *o = x * factor;
            }
        }
        // SAFETY: as above.
        let to = unsafe { stats.piece((unit.head * n + unit.from) * g * 2, unit.rows * g * 2) };
        to.copy_from_slice(total.stats);
    }

    /// Query vectors of some rows of a kv head.
    pub(super) fn vectors(&self, head: usize, from: usize, rows: usize) -> &[f32] {
        let Dims { n, g, d, .. } = self.dims;
        &self.q[(head * n + from) * g * d..][..rows * g * d]
    }

    /// Smallest and largest position of some query rows.
    pub(super) fn span(&self, from: usize, rows: usize) -> [u32; 2] {
        let pos = &self.q_pos[from..from + rows];
        pos.iter().fold([u32::MAX, 0], |[lo, hi], &p| [lo.min(p), hi.max(p)])
    }

    /// No query of the span sees the tile.
    pub(super) fn skips(&self, span: [u32; 2], tile: &TileRef<'_>) -> bool {
        tile.rows == 0 || self.sight.misses(span, tile.lo, tile.hi)
    }

    /// Scratch for the vectors of `rows` query rows.
    pub(super) fn with_scratch<R>(&self, rows: usize, f: impl FnOnce(Decoded<'_>) -> R) -> R {
        let Dims { g, d, dv, .. } = self.dims;
        scratch(TILE_ROWS * (d + dv + rows * g), |all| {
            let (keys, rest) = all.split_at_mut(TILE_ROWS * d);
            let (values, scores) = rest.split_at_mut(TILE_ROWS * dv);
            f(Decoded { keys, values, scores })
        })
    }

    /// Folds the tiles of one chunk.
    fn chunk(&self, unit: &Unit, chunk: usize, to: &mut Partial<'_>) {
        let Dims { g, d, dv, .. } = self.dims;
        to.clear();
        let tiles = &self.tiles[unit.seq][unit.head];
        let tiles = &tiles[chunk * CHUNK..tiles.len().min((chunk + 1) * CHUNK)];
        let span = self.span(unit.from, unit.rows);
        if tiles.iter().all(|t| self.skips(span, t)) {
            return;
        }
        let q = self.vectors(unit.head, unit.from, unit.rows);
        self.with_scratch(unit.rows, |Decoded { keys, values, scores }| {
            for (i, tile) in tiles.iter().enumerate().filter(|(_, t)| !self.skips(span, t)) {
                self.keys(tile, keys);
                (self.kernels.scores)(q, d, keys, scores);
                let base = base(tile);
                let mut masked = [0.0f32; TILE_ROWS];
                // Vectors that see a row of the tile, as runs of neighbours: the others must not be touched.
                let mut active: Vec<std::ops::Range<usize>> = Vec::new();
                for row in 0..unit.rows {
                    let bias = self.bias(tile, base.as_ref(), self.q_pos[unit.from + row], &mut masked);
                    for v in row * g..(row + 1) * g {
                        let s = &mut scores[v * TILE_ROWS..][..TILE_ROWS];
                        let [m, l] = &mut to.stats[v * 2..][..2] else { continue };
                        let Some(factor) = (self.kernels.fold)(s, bias, m, l) else { continue };
                        if factor != 1.0 {
                            to.out[v * dv..][..dv].iter_mut().for_each(|o| *o *= factor);
                        }
                        match active.last_mut() {
                            Some(r) if r.end == v => r.end = v + 1,
                            _ => active.push(v..v + 1),
                        }
                    }
                }
                if active.is_empty() {
                    continue;
                }
                self.values(tile, tiles.get(i + 1).map_or(&[], |t| t.parts[0]), values);
                for r in active {
                    let p = &scores[r.start * TILE_ROWS..r.end * TILE_ROWS];
                    (self.kernels.accumulate)(p, values, dv, &mut to.out[r.start * dv..r.end * dv]);
                }
            }
        });
    }

    /// Keys of a tile as `[D, 32]`: decoded, scaled, rotated if stored plain.
    pub(super) fn keys(&self, tile: &TileRef<'_>, keys: &mut [f32]) {
        // The values of the tile come next, or another tile's keys if there is nothing to sum.
        (self.kernels.decode_keys)(tile.stores[0], tile.parts[0], tile.parts[1], self.dims.d, keys);
        if let Some(scale) = tile.scale[0] {
            for row in keys.chunks_exact_mut(TILE_ROWS) {
                row.iter_mut().zip(scale).for_each(|(x, s)| *x *= s);
            }
        }
        if tile.rows < TILE_ROWS {
            // What lies in slots that hold no row is nobody's; it must not become NaN.
            for row in keys.chunks_exact_mut(TILE_ROWS) {
                (tile.rows..TILE_ROWS).for_each(|t| row[pi(t)] = 0.0);
            }
        }
        if let Some(rope) = self.rope.as_ref().filter(|_| tile.turn) {
            // Positions beyond the table are computed here; absent rows turn with row 0, being zero.
            let mut far: Vec<Vec<f32>> = vec![Vec::new(); TILE_ROWS];
            for t in (0..tile.rows).filter(|&t| rope.known(tile.pos(t)).is_none()) {
                rope.compute(tile.pos(t), &mut far[t]);
            }
            let row = |t: usize| rope.known(tile.pos(t)).unwrap_or(&far[t]);
            let mut angles = [row(0); TILE_ROWS];
            (1..tile.rows).for_each(|t| angles[pi(t)] = row(t));
            (self.kernels.rotate)(keys, rope.pairing == Pairing::Adjacent, &angles);
        }
    }

    /// Values of a tile as `[32, Dv]`.
    fn values(&self, tile: &TileRef<'_>, next: &[u8], values: &mut [f32]) {
        let dv = self.dims.dv;
        (self.kernels.decode_values)(tile.stores[1], tile.parts[1], next, dv, values);
        if let Some(scale) = tile.scale[1] {
            for (row, s) in values.chunks_exact_mut(dv).zip(scale) {
                for x in row {
                    *x *= s;
                }
            }
        }
        for t in tile.rows..TILE_ROWS {
            values[pi(t) * dv..][..dv].fill(0.0);
        }
    }

    /// What is added to the scores of the query at `pos`: `base`, with rows that it does not see hidden.
    pub(super) fn bias<'m>(
        &self,
        tile: &TileRef<'_>,
        base: Option<&'m [f32; TILE_ROWS]>,
        pos: u32,
        masked: &'m mut [f32; TILE_ROWS],
    ) -> Option<&'m [f32; TILE_ROWS]> {
        if self.sight.sees_all(pos, tile.lo, tile.hi) {
            return base;
        }
        *masked = base.copied().unwrap_or([0.0; TILE_ROWS]);
        for t in 0..tile.rows {
            if !self.sight.sees(pos, tile.pos(t)) {
                masked[pi(t)] = HIDDEN;
            }
        }
        Some(masked)
    }
}

/// The bias of a tile, with absent rows hidden; nothing if all rows are there and none has a bias.
pub(super) fn base(tile: &TileRef<'_>) -> Option<[f32; TILE_ROWS]> {
    if tile.bias.is_none() && tile.rows == TILE_ROWS {
        return None;
    }
    let mut base = [0.0; TILE_ROWS];
    if let Some(bias) = tile.bias {
        base.copy_from_slice(bias);
        for b in base.iter_mut().filter(|b| b.is_nan() || **b <= UNSEEN) {
            *b = HIDDEN;
        }
    }
    (tile.rows..TILE_ROWS).for_each(|t| base[pi(t)] = HIDDEN);
    Some(base)
}

fn partial(all: &mut [f32], dv: usize) -> Partial<'_> {
    let vectors = all.len() / (dv + 2);
    let (out, stats) = all.split_at_mut(vectors * dv);
    Partial { out, stats }
}
