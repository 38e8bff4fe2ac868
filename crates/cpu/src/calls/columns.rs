//! Score columns: attention received, measured in a second pass over the keys once the sums of the queries are known.
//!
//! A group is one kv head, or all kv heads of a layer for `LayerMean`. An item is (group, chunk of tiles); a number of a
//! column is computed by one item, queries in ascending order, so threads change nothing. Numbers are added to the targets
//! on the calling thread, after all reads.
//!
//! Cost: the key half of attention over the queries of the probe; half as much again when probabilities are normalised
//! over a part of the keys, whose sums come from a pass of their own. State: one f32 per row of a group.

use kvasir_core::{
    Attend, Buf, ColumnUpdate, Error, HIDDEN, Heads, Over, Queries, Reduce, Result, TILE_ROWS,
    check as expect, tile::pi,
};

use super::attend::{CHUNK, Decoded, Dims, Job, TileRef, base};
use crate::Cpu;
use crate::arch::{UNSEEN, all::attend::exp2};
use crate::mem::{self, Pieces};

/// Query rows of a block.
const ROWS: usize = 32;

/// Every probe has kernels and every target has room.
pub(super) fn check(a: &Attend, dims: Dims) -> Result<()> {
    for (c, update) in a.columns.iter().enumerate() {
        let at = |f: &str| format!("attend.columns[{c}].{f}");
        let probe = &update.probe;
        let refuse =
            |what: &dyn std::fmt::Debug| Err(Error::unsupported(format!("{}: {what:?}", at("probe"))));
        match &probe.queries {
            Queries::All | Queries::Last(_) | Queries::Wanted => {}
            other => return refuse(other),
        }
        match &probe.reduce {
            Reduce::Sum | Reduce::Max | Reduce::MeanVisible => {}
            other => return refuse(other),
        }
        if let Heads::Only(_) = probe.heads {
            return refuse(&probe.heads);
        }
        expect::equal(&at("targets"), "sequences", a.seqs.len(), update.targets.len())?;
        for (seq, targets) in a.seqs.iter().zip(&update.targets) {
            expect::equal(&at("targets"), "kv heads", dims.k, targets.len())?;
            for (runs, targets) in seq.heads.iter().zip(targets) {
                expect::equal(&at("targets"), "runs", runs.len(), targets.len())?;
                for (run, target) in runs.iter().zip(targets) {
                    let Some(target) = target else { continue };
                    mem::f32s_prefix(&at("targets"), target, run.rows.div_ceil(32) as usize * TILE_ROWS)?;
                    let outs: Vec<&Buf> = [&a.out, &a.q].into_iter().chain(a.lse.as_ref()).collect();
                    mem::disjoint(&at("targets"), target, &outs)?;
                }
            }
            if probe.heads == Heads::LayerMean {
                let rows = |h: usize| seq.heads[h].iter().map(|r| r.rows).collect::<Vec<_>>();
                if (1..dims.k).any(|h| rows(h) != rows(0)) {
                    return Err(Error::invalid(
                        at("probe.heads"),
                        "kv heads of equal lengths",
                        "ragged lengths",
                    ));
                }
            }
        }
    }
    Ok(())
}

/// Heads whose probabilities are folded together.
struct Group {
    seq: usize,
    heads: std::ops::Range<usize>,
    /// Query rows of the probe.
    from: usize,
    rows: usize,
    /// Place of the group's numbers among those of its column.
    at: usize,
}

/// Numbers of one column: `[tiles, 32]` of each group.
pub(super) struct Update {
    groups: Vec<Group>,
    numbers: Vec<f32>,
}

/// Measures all columns of a call.
pub(super) fn measure(cpu: &Cpu, job: &Job<'_>, a: &Attend, stats: &[f32]) -> Vec<Update> {
    a.columns.iter().map(|c| measure_one(cpu, job, a, c, stats)).collect()
}

fn measure_one(cpu: &Cpu, job: &Job<'_>, a: &Attend, update: &ColumnUpdate, stats: &[f32]) -> Update {
    let Dims { n, k, g, d, .. } = job.dims;
    let mut groups = Vec::new();
    let mut len = 0;
    for (seq, s) in a.seqs.iter().enumerate() {
        let all = s.rows.len();
        let rows = match update.probe.queries {
            Queries::Last(n) => all.min(n as usize),
            _ => all,
        };
        let step = if update.probe.heads == Heads::LayerMean { k } else { 1 };
        for head in (0..k).step_by(step) {
            let from = s.rows.end as usize - rows;
            groups.push(Group { seq, heads: head..head + step, from, rows, at: len });
            len += job.tiles[seq][head].len() * TILE_ROWS;
        }
    }
    let operations: usize = groups
        .iter()
        .map(|g| g.rows * g.heads.len() * job.tiles[g.seq][g.heads.start].len() * 32 * d)
        .sum::<usize>()
        * g;

    // Sums over a part of the keys, if the probe asks for them.
    let own_stats = (update.probe.over != Over::All).then(|| {
        let mut own = vec![0.0f32; stats.len()];
        own.chunks_exact_mut(2).for_each(|s| s[0] = HIDDEN);
        let pieces = Pieces::new(&mut own);
        let items: Vec<_> = groups.iter().flat_map(|g| g.heads.clone().map(move |h| (g, h))).collect();
        cpu.pool.each(items.len(), operations, |i| {
            let (group, head) = items[i];
            for from in (group.from..group.from + group.rows).step_by(ROWS) {
                let rows = ROWS.min(group.from + group.rows - from);
                // SAFETY: an item owns the rows of its sequence in its head.
                let to = unsafe { pieces.piece((head * n + from) * g * 2, rows * g * 2) };
                sums(job, a, update.probe.over, group.seq, head, from, rows, to);
            }
        });
        own
    });
    let stats = own_stats.as_deref().unwrap_or(stats);

    let mut numbers = vec![0.0f32; len];
    let pieces = Pieces::new(&mut numbers);
    let items: Vec<_> = groups
        .iter()
        .flat_map(|g| (0..job.tiles[g.seq][g.heads.start].len().div_ceil(CHUNK)).map(move |c| (g, c)))
        .collect();
    cpu.pool.each(items.len(), operations, |i| {
        let (group, chunk) = items[i];
        let tiles = job.tiles[group.seq][group.heads.start].len();
        for t in chunk * CHUNK..tiles.min((chunk + 1) * CHUNK) {
            // SAFETY: tile `t` of the group belongs to this item.
            let to = unsafe { pieces.piece(group.at + t * TILE_ROWS, TILE_ROWS) };
            column(job, a, update, group, t, stats, to);
        }
    });
    Update { groups, numbers }
}

/// What is added to the scores of a tile, with the rows hidden over which the probe does not normalise; nothing if the tile
/// has none of them.
fn part(over: Over, tile: &TileRef<'_>, pass_from: u32) -> Option<[f32; TILE_ROWS]> {
    let mut own = base(tile).unwrap_or([0.0; TILE_ROWS]);
    match over {
        Over::All => Some(own),
        Over::Run(run) => (run.0 as usize == tile.run).then_some(own),
        Over::Past => {
            for t in (0..tile.rows()).filter(|&t| tile.pos(t) >= pass_from) {
                own[pi(t)] = HIDDEN;
            }
            Some(own)
        }
    }
}

/// Reference and sum of the vectors of some query rows over a part of the keys.
fn sums(
    job: &Job<'_>,
    a: &Attend,
    over: Over,
    seq: usize,
    head: usize,
    from: usize,
    rows: usize,
    to: &mut [f32],
) {
    let Dims { g, d, .. } = job.dims;
    let span = job.span(from, rows);
    job.with_scratch(rows, |Decoded { keys, scores, .. }| {
        for tile in &job.tiles[seq][head] {
            if job.skips(span, tile) {
                continue;
            }
            let Some(base) = part(over, tile, a.seqs[seq].pass_from) else { continue };
            job.keys(tile, keys);
            (job.kernels.scores)(job.vectors(head, from, rows), d, keys, scores);
            let mut masked = [0.0; TILE_ROWS];
            for row in 0..rows {
                let bias = job.bias(tile, Some(&base), job.q_pos[from + row], &mut masked);
                for v in row * g..(row + 1) * g {
                    let [m, l] = &mut to[v * 2..][..2] else { continue };
                    (job.kernels.fold)(&mut scores[v * TILE_ROWS..][..TILE_ROWS], bias, m, l);
                }
            }
        }
    });
}

/// The numbers of tile `t` of a group.
fn column(
    job: &Job<'_>,
    a: &Attend,
    update: &ColumnUpdate,
    group: &Group,
    t: usize,
    stats: &[f32],
    to: &mut [f32],
) {
    let Dims { n, g, d, .. } = job.dims;
    let probe = &update.probe;
    let pass_from = a.seqs[group.seq].pass_from;
    let share = 1.0 / (g * group.heads.len()) as f32;
    let mut seen_by = [0u32; TILE_ROWS];
    for from in (group.from..group.from + group.rows).step_by(ROWS) {
        let rows = ROWS.min(group.from + group.rows - from);
        let span = job.span(from, rows);
        // Per query row and key, folded over the heads.
        let mut folded = [[0.0f32; TILE_ROWS]; ROWS];
        let mut seen = [[false; TILE_ROWS]; ROWS];
        for head in group.heads.clone() {
            let tile = &job.tiles[group.seq][head][t];
            if job.skips(span, tile) {
                continue;
            }
            let Some(base) = part(probe.over, tile, pass_from) else { continue };
            job.with_scratch(rows, |Decoded { keys, scores, .. }| {
                job.keys(tile, keys);
                (job.kernels.scores)(job.vectors(head, from, rows), d, keys, scores);
                let mut masked = [0.0; TILE_ROWS];
                for row in 0..rows {
                    let bias = job.bias(tile, Some(&base), job.q_pos[from + row], &mut masked);
                    let shown = |i: usize| bias.is_none_or(|b| b[i] > UNSEEN);
                    (0..TILE_ROWS).for_each(|i| seen[row][i] |= shown(i));
                    for v in row * g..(row + 1) * g {
                        let at = ((head * n + from) * g + v) * 2;
                        let (m, l) = (stats[at], stats[at + 1]);
                        if l == 0.0 {
                            continue;
                        }
                        for (i, f) in folded[row].iter_mut().enumerate() {
                            if !shown(i) {
                                continue;
                            }
                            let s = scores[v * TILE_ROWS + i] + bias.map_or(0.0, |b| b[i]);
                            let p = exp2(s - m) / l;
                            match probe.heads {
                                Heads::KvMax => *f = f.max(p),
                                _ => *f += p * share,
                            }
                        }
                    }
                }
            });
        }
        for row in 0..rows {
            for i in 0..TILE_ROWS {
                seen_by[i] += u32::from(seen[row][i]);
                match probe.reduce {
                    Reduce::Max => to[i] = to[i].max(folded[row][i]),
                    _ => to[i] += folded[row][i],
                }
            }
        }
    }
    if probe.reduce == Reduce::MeanVisible {
        for (x, &count) in to.iter_mut().zip(&seen_by) {
            *x /= count.max(1) as f32;
        }
    }
}

/// Adds the numbers to the targets.
pub(super) fn apply(a: &Attend, updates: &[Update]) -> Result<()> {
    for (update, measured) in a.columns.iter().zip(updates) {
        for group in &measured.groups {
            for head in group.heads.clone() {
                let mut at = group.at;
                for (run, target) in
                    a.seqs[group.seq].heads[head].iter().zip(&update.targets[group.seq][head])
                {
                    let len = run.rows.div_ceil(32) as usize * TILE_ROWS;
                    let from = &measured.numbers[at..at + len];
                    at += len;
                    let Some(target) = target else { continue };
                    let to = mem::f32s_prefix_mut("attend.columns.targets", target, len)?;
                    for (x, y) in to.iter_mut().zip(from) {
                        *x = if update.probe.reduce == Reduce::Max { x.max(*y) } else { *x + y };
                    }
                }
            }
        }
    }
    Ok(())
}
