//! Applies a plan: resolve picks, build new runs aside, measure the floor while old and new rows both exist, swap.
//!
//! An error before the swap changes nothing. Tiles that do not change are shared, never copied; coded rows move between
//! tiles bit by bit and are never coded again.

use std::sync::Arc;

use kvasir_core::{
    At, Buf, Call, Codes, ColId, Error as CoreError, HIDDEN, Op, Pick, Plan, Pos, Run, TILE_ROWS, Table,
    Tile, tile,
};

use crate::Result;
use crate::pick::{no_column, resolve};
use crate::session::Session;

/// A tile to code: source, destination, rows present.
type Pair = (Buf, Buf, u8);

/// Coded tiles put together behind a partly filled one: sources, their rows, destinations.
type Join = (Vec<Tile>, Arc<[u32]>, Vec<Buf>);

/// One row of a table that a query may see.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RowAt {
    pub(crate) run: usize,
    pub(crate) idx: usize,
    pub(crate) pos: u32,
}

impl Session {
    /// Rows of a table (or of one run) in position order, hidden slots left out.
    pub(crate) fn visible(&self, table: &Table, only: Option<usize>) -> Vec<RowAt> {
        let mut rows = Vec::with_capacity(table.rows() as usize);
        for (run, r) in table.runs.iter().enumerate().filter(|(i, _)| only.is_none_or(|o| o == *i)) {
            for idx in 0..r.rows as usize {
                let pos = r.meta.pos.at(idx);
                if !self.stack.hides(run, pos) {
                    rows.push(RowAt { run, idx, pos });
                }
            }
        }
        rows.sort_by_key(|r| r.pos);
        rows
    }

    /// Values of a column, per run, in row order.
    pub(crate) fn column_values(&self, table: &Table, col: ColId) -> Result<Vec<Vec<f32>>> {
        let of_run = |run: &Run| -> Result<Vec<f32>> {
            if run.rows == 0 {
                return Ok(Vec::new());
            }
            let buf = &run.meta.cols.iter().find(|c| c.0 == col).ok_or_else(|| no_column(col))?.1;
            let raw = self.backend.read_f32(buf)?;
            Ok((0..run.rows as usize)
                .map(|i| raw[i / TILE_ROWS * TILE_ROWS + tile::pi(i % TILE_ROWS)])
                .collect())
        };
        table.runs.iter().map(of_run).collect()
    }

    /// Applies what the policy of slot `s` planned.
    pub(crate) fn apply(&mut self, s: usize, plan: &Plan) -> Result<()> {
        for op in &plan.ops {
            let mut next = self.tables.clone();
            match op {
                Op::Keep(at, pick) => self.keep(s, at, pick, &mut next)?,
                Op::Move(at, pick, to) => self.move_rows(s, at, pick, to.0, &mut next)?,
                other => return Err(CoreError::unsupported(format!("op {other:?}")).into()),
            }
            if let Some(bound) = self.stack.slots[s].floor {
                // No query has been seen to measure with: the policy plans again after the next pass.
                if self.probes.iter().all(Option::is_none) {
                    continue;
                }
                let error = self.floor_error(&next)?;
                tracing::debug!(error, bound, "floor");
                if error > bound {
                    self.stats.refused += 1;
                    continue;
                }
            }
            if matches!(op, Op::Keep(..)) {
                self.private = self.private.or(Some("rows were evicted"));
            }
            self.tables = next;
            self.stats.applied += 1;
        }
        Ok(())
    }

    /// Picks of one layer, as indices into the visible rows of each head.
    fn picked(&self, s: usize, layer: usize, at: &At, pick: &Pick) -> Result<Vec<(Vec<RowAt>, Vec<bool>)>> {
        let only = at.run.map(|r| self.stack.slots[s].run(r.0));
        let rows: Vec<Vec<RowAt>> = self.tables[layer].iter().map(|t| self.visible(t, only)).collect();
        let counts: Vec<usize> = rows.iter().map(Vec::len).collect();
        let slot = &self.stack.slots[s];
        let col = |h: usize, c: ColId| {
            let values = self.column_values(&self.tables[layer][h], slot.col(c)).map_err(|_| no_column(c))?;
            Ok(rows[h].iter().map(|r| values[r.run][r.idx]).collect())
        };
        let held = resolve(pick, &counts, &col)?;
        Ok(rows.into_iter().zip(held).collect())
    }

    fn keep(&mut self, s: usize, at: &At, pick: &Pick, next: &mut [Vec<Table>]) -> Result<()> {
        for layer in 0..next.len() {
            for (head, (rows, held)) in self.picked(s, layer, at, pick)?.into_iter().enumerate() {
                if !at.has(layer as u16, head as u16) || held.iter().all(|&k| k) {
                    continue;
                }
                let runs = next[layer][head].runs.len();
                let mut kept = vec![Vec::new(); runs];
                let mut touched = vec![false; runs];
                for (row, &held) in rows.iter().zip(&held) {
                    if held {
                        kept[row.run].push(row.idx as u32);
                    } else {
                        touched[row.run] = true;
                    }
                }
                for (r, idx) in kept.into_iter().enumerate().filter(|(r, _)| touched[*r]) {
                    let mut idx = idx;
                    idx.sort_unstable();
                    next[layer][head].runs[r] = self.take(layer, head, r, &idx)?;
                }
            }
        }
        Ok(())
    }

    fn move_rows(&mut self, s: usize, at: &At, pick: &Pick, to: u8, next: &mut [Vec<Table>]) -> Result<()> {
        let to = self.stack.slots[s].run(to);
        if to == 0 || to >= self.stack.runs.len() {
            return Err(CoreError::invalid("plan.move.run", "a run of the policy", to).into());
        }
        for layer in 0..next.len() {
            let picked = self.picked(s, layer, at, pick)?;
            let mut seals: Vec<(usize, Vec<Pair>)> = Vec::new();
            let mut joins = Vec::new();
            for (head, (rows, held)) in picked.into_iter().enumerate() {
                if !at.has(layer as u16, head as u16) {
                    continue;
                }
                // Only whole tiles move, so that no coded tile is ever opened again.
                let mut left = held.iter().filter(|&&k| k).count() / TILE_ROWS * TILE_ROWS;
                let mut by_run = vec![Vec::new(); next[layer][head].runs.len()];
                for (row, &held) in rows.iter().zip(&held) {
                    if held && left > 0 && row.run != to {
                        by_run[row.run].push(row.idx as u32);
                        left -= 1;
                    }
                }
                for (from, mut idx) in by_run.into_iter().enumerate() {
                    idx.sort_unstable();
                    idx.truncate(idx.len() / TILE_ROWS * TILE_ROWS);
                    if idx.is_empty() || Some(from) == self.stack.sink_run {
                        continue;
                    }
                    let moved = self.take(layer, head, from, &idx)?;
                    let stay: Vec<u32> = (0..self.tables[layer][head].runs[from].rows)
                        .filter(|i| idx.binary_search(i).is_err())
                        .collect();
                    let rest = self.take(layer, head, from, &stay)?;
                    if let Some(sink) = self.stack.sink_run {
                        let sinks = (0..moved.rows)
                            .filter(|&i| moved.meta.pos.at(i as usize) < self.stack.sinks)
                            .collect::<Vec<_>>();
                        if !sinks.is_empty() {
                            self.add_sinks(layer, head, sink, &moved, &sinks, next)?;
                        }
                    }
                    let (pairs, join) = self.extend(layer, head, to, &moved, next)?;
                    seals.push((from, pairs));
                    joins.extend(join);
                    next[layer][head].runs[from] = rest;
                }
            }
            let dims = &self.layout.layers[layer];
            for (from, tiles) in seals {
                self.backend.submit(Call::Seal {
                    from_codes: self.stack.runs[from].clone(),
                    to_codes: self.stack.runs[to].clone(),
                    k_dim: dims.k_dim,
                    v_dim: dims.v_dim,
                    tiles,
                })?;
            }
            for (src, idx, dst) in joins {
                self.backend.submit(Call::Compact {
                    codes: self.stack.runs[to].clone(),
                    k_dim: dims.k_dim,
                    v_dim: dims.v_dim,
                    src,
                    idx,
                    dst,
                })?;
            }
        }
        Ok(())
    }

    /// Appends room for `moved` to run `to`; returns the tile pairs to seal and, where evictions left the run with a partly
    /// filled tile, what to join once they are sealed.
    fn extend(
        &mut self,
        layer: usize,
        head: usize,
        to: usize,
        moved: &Run,
        next: &mut [Vec<Table>],
    ) -> Result<(Vec<Pair>, Option<Join>)> {
        let codes = self.stack.runs[to].clone();
        let mut pairs = Vec::with_capacity(moved.tiles.len());
        let mut fresh = Vec::with_capacity(moved.tiles.len());
        for (i, t) in moved.tiles.iter().enumerate() {
            let tile = self.new_tile(layer, head, to, &codes)?;
            pairs.push((t.codes.clone(), tile.codes.clone(), moved.rows_of_tile(i) as u8));
            fresh.push(tile);
        }
        let hides: Vec<bool> =
            (0..moved.rows as usize).map(|i| self.stack.hides(to, moved.meta.pos.at(i))).collect();
        let old_rows = next[layer][head].runs[to].rows;
        let partial = old_rows % TILE_ROWS as u32;
        let mut joined = Vec::new();
        if partial > 0 {
            for _ in 0..(partial + moved.rows).div_ceil(TILE_ROWS as u32) {
                joined.push(self.new_tile(layer, head, to, &codes)?);
            }
        }
        let run = &mut next[layer][head].runs[to];
        let old_tiles = run.tiles.len();
        for i in 0..moved.rows as usize {
            run.meta.pos.push(run.rows as usize + i, moved.meta.pos.at(i));
        }
        run.rows += moved.rows;
        let tiles = old_tiles + fresh.len();
        // Rows of the old tiles and of the new ones behind them, counted from the first row of tile `skip`.
        let rows_from = |skip: usize| -> Arc<[u32]> {
            let (skip, end) = ((skip * TILE_ROWS) as u32, (old_tiles * TILE_ROWS) as u32);
            (0..old_rows - skip).chain((0..moved.rows).map(|i| end - skip + i)).collect()
        };
        let mut join = None;
        let list = Arc::make_mut(&mut run.tiles);
        if partial > 0 {
            let src = list.split_off(old_tiles - 1).into_iter().chain(fresh).collect();
            join = Some((src, rows_from(old_tiles - 1), joined.iter().map(|t| t.codes.clone()).collect()));
            list.extend(joined);
        } else {
            list.extend(fresh);
        }
        let held = list.len();
        let grown = |old: Option<&Buf>, tail: Option<&Buf>| -> Result<Buf> {
            let buf = self.backend.alloc(tiles * TILE_ROWS * 4)?;
            for (src, offset) in [(old, 0), (tail, old_tiles * TILE_ROWS * 4)] {
                if let Some(src) = src {
                    let dst = buf.slice(offset..offset + src.bytes())?;
                    self.backend.submit(Call::Copy { src: src.clone(), dst })?;
                }
            }
            if partial == 0 {
                return Ok(buf);
            }
            let dst = self.backend.alloc(held * TILE_ROWS * 4)?;
            self.backend.submit(Call::CompactColumn { src: buf, idx: rows_from(0), dst: dst.clone() })?;
            Ok(dst)
        };
        if run.meta.bias.is_some() || hides.contains(&true) {
            let mut tail = vec![0.0f32; (tiles - old_tiles) * TILE_ROWS];
            for (i, _) in hides.iter().enumerate().filter(|(_, h)| **h) {
                tail[i / TILE_ROWS * TILE_ROWS + tile::pi(i % TILE_ROWS)] = HIDDEN;
            }
            let tail = self.backend.upload_f32(&tail)?;
            run.meta.bias = Some(grown(run.meta.bias.as_ref(), Some(&tail))?);
        }
        for c in 0..self.stack.columns.len() {
            let id = ColId(c as u16);
            let of = |r: &Run| r.meta.cols.iter().find(|x| x.0 == id).map(|x| x.1.clone());
            let (old, tail) = (of(run), of(moved));
            if old.is_some() || tail.is_some() {
                let buf = grown(old.as_ref(), tail.as_ref())?;
                run.meta.cols.retain(|x| x.0 != id);
                run.meta.cols.push((id, buf));
            }
        }
        Ok((pairs, join))
    }

    /// Copies the first rows of a dense run, which stay exact, into the sink run.
    fn add_sinks(
        &mut self,
        layer: usize,
        head: usize,
        sink: usize,
        moved: &Run,
        rows: &[u32],
        next: &mut [Vec<Table>],
    ) -> Result<()> {
        let mut run = next[layer][head].runs[sink].clone();
        let codes = run.codes.clone();
        if moved.codes != codes || run.rows != 0 {
            return Err(CoreError::unsupported("sinks that arrive in more than one move").into());
        }
        let tile = self.new_tile(layer, head, sink, &codes)?;
        self.compact(layer, &codes, moved, rows, vec![tile.codes.clone()])?;
        run.tiles = Arc::new(vec![tile]);
        run.rows = rows.len() as u32;
        run.meta.pos = Pos::from_list(rows.iter().map(|&i| moved.meta.pos.at(i as usize)).collect());
        self.copy_columns(moved, rows, &mut run)?;
        next[layer][head].runs[sink] = run;
        Ok(())
    }

    fn compact(&self, layer: usize, codes: &Codes, src: &Run, idx: &[u32], dst: Vec<Buf>) -> Result<()> {
        let dims = &self.layout.layers[layer];
        self.backend.submit(Call::Compact {
            codes: codes.clone(),
            k_dim: dims.k_dim,
            v_dim: dims.v_dim,
            src: src.tiles.to_vec(),
            idx: idx.into(),
            dst,
        })?;
        Ok(())
    }

    fn copy_columns(&self, from: &Run, idx: &[u32], to: &mut Run) -> Result<()> {
        to.meta.cols.clear();
        for (id, src) in &from.meta.cols {
            let dst = self.backend.alloc(to.tiles.len().max(1) * TILE_ROWS * 4)?;
            self.backend.submit(Call::CompactColumn {
                src: src.clone(),
                idx: idx.into(),
                dst: dst.clone(),
            })?;
            to.meta.cols.push((*id, dst));
        }
        Ok(())
    }

    /// The rows `idx` (ascending) of a run as a run of the same codes. Leading whole tiles that are kept are shared.
    fn take(&mut self, layer: usize, head: usize, r: usize, idx: &[u32]) -> Result<Run> {
        let src = self.tables[layer][head].runs[r].clone();
        let mut run = Run::new(src.codes.clone());
        let Some(&first) = idx.first() else { return Ok(run) };
        run.rows = idx.len() as u32;
        run.meta.pos = Pos::from_list(idx.iter().map(|&i| src.meta.pos.at(i as usize)).collect());
        let whole = idx.len() as u32 == src.rows - first && idx[idx.len() - 1] == src.rows - 1;
        let contiguous = idx[idx.len() - 1] - first + 1 == idx.len() as u32;
        if first as usize % TILE_ROWS == 0 && contiguous && (whole || idx.len() % TILE_ROWS == 0) {
            let tiles = first as usize / TILE_ROWS..(first as usize + idx.len()).div_ceil(TILE_ROWS);
            run.tiles = Arc::new(src.tiles[tiles.clone()].to_vec());
            let bytes = tiles.start * TILE_ROWS * 4..tiles.end * TILE_ROWS * 4;
            for (id, col) in &src.meta.cols {
                run.meta.cols.push((*id, col.slice(bytes.clone())?));
            }
            run.meta.bias = src.meta.bias.as_ref().map(|b| b.slice(bytes)).transpose()?;
            return Ok(run);
        }
        // Leading tiles that stay whole are shared; the rest is copied row by row.
        let same = idx.iter().enumerate().take_while(|&(i, &x)| i as u32 == x).count() / TILE_ROWS;
        let mut tiles: Vec<Tile> = src.tiles[..same].to_vec();
        let copied = &idx[same * TILE_ROWS..];
        let mut fresh = Vec::new();
        for _ in 0..copied.len().div_ceil(TILE_ROWS) {
            fresh.push(self.new_tile(layer, head, r, &src.codes)?);
        }
        if !copied.is_empty() {
            self.compact(layer, &src.codes, &src, copied, fresh.iter().map(|t| t.codes.clone()).collect())?;
        }
        tiles.extend(fresh);
        run.tiles = Arc::new(tiles);
        self.copy_columns(&src, idx, &mut run)?;
        if let Some(bias) = &src.meta.bias
            && (0..idx.len()).any(|i| self.stack.hides(r, run.meta.pos.at(i)))
        {
            let dst = self.backend.alloc(run.tiles.len() * TILE_ROWS * 4)?;
            self.backend.submit(Call::CompactColumn {
                src: bias.clone(),
                idx: idx.into(),
                dst: dst.clone(),
            })?;
            run.meta.bias = Some(dst);
        }
        Ok(run)
    }
}
