//! Elastic-Cache for masked language models (arXiv 2510.14973): each step computes a window of rows; at the first layer after
//! one where attention has drifted, all rows join in. Rows grow inside a pass, from hidden rows kept per layer; the mask is full.

use std::sync::Arc;

use kvasir_core::{Ask, Batch, Buf, Call, Go, Hooks, Logits, Part, Point, Result, Rows};
use kvasir_engine::{Pass, Passes, Session};
use kvasir_testkit::Watched;
use kvasir_testkit::oracle::flows::{self, Commit, Elastic, MASK_ID, Step};
use kvasir_testkit::oracle::{NaiveLlama, Row, argmax, dot, softmax};

use super::{Bench, CLEAR, FullMask, bench, close, count, floats, rows_of, text, top, uncached, wide};

const MASKS: usize = 16;

fn prompt() -> Vec<u32> {
    text(0..12)
}

/// What lives from step to step.
struct Kept {
    /// `[L]`: `[n, dim]` rows that entered each layer.
    hidden: Vec<Buf>,
    /// `[L][n]`: queries before RoPE.
    queries: Vec<Vec<Row>>,
    tracked: Vec<u32>,
}

/// One step.
struct Growing<'a, 'b> {
    passes: Passes<'a>,
    kept: &'b mut Kept,
    /// Turns queries and keys into probabilities; shares nothing with the engine.
    naive: &'b NaiveLlama,
    n: u32,
    /// First layer that computes all rows.
    start: usize,
    gamma: f64,
    window: Vec<u32>,
    known: Vec<u32>,
    drift: Vec<(u32, f64)>,
    track_next: Vec<u32>,
}

impl Growing<'_, '_> {
    /// Attention of a query over all rows of a layer as they are now, `[H][n]`.
    fn probs(&mut self, layer: usize, queries: &[(u32, Row)]) -> Vec<Vec<Row>> {
        let keys = wide(&rows_of(self.passes.session(0), layer).0);
        let pos: Vec<u32> = (0..self.n).collect();
        let over: Vec<usize> = (0..self.n as usize).collect();
        queries.iter().map(|(p, q)| self.naive.probs(q, *p, &keys, &pos, &over)).collect()
    }
}

impl Hooks for Growing<'_, '_> {
    fn enter(&mut self, at: Point, x: &mut Rows, gate: Option<&Buf>) -> Result<Go> {
        let layer = at.layer as usize;
        if at.part == Part::Attention {
            let backend = Arc::clone(self.passes.session(0).backend());
            let hidden = self.kept.hidden[layer].clone();
            let (idx, row_bytes) = (x.pos.clone().into(), x.dim * 4);
            backend.submit(Call::Scatter { src: x.data.clone(), idx, row_bytes, dst: hidden.clone() })?;
            if layer == self.start && x.len() < self.n as usize {
                // A copy: the model adds to the rows it is given.
                let data = backend.alloc(hidden.bytes())?;
                backend.submit(Call::Copy { src: hidden, dst: data.clone() })?;
                *x = Rows {
                    data,
                    dim: x.dim,
                    pos: (0..self.n).collect(),
                    of: std::iter::once(0..self.n).collect(),
                };
            }
        }
        self.passes.enter(at, x, gate)
    }

    fn attend(&mut self, at: Point, q: &Rows, k: &Rows, v: &Rows, out: &mut Rows) -> Result<()> {
        let layer = at.layer as usize;
        let tracked = self.kept.tracked.clone();
        let reused = layer < self.start;
        let mut old = Vec::new();
        if reused {
            let queries: Vec<(u32, Row)> =
                tracked.iter().map(|&p| (p, self.kept.queries[layer][p as usize].clone())).collect();
            old = self.probs(layer, &queries);
        }
        let backend = Arc::clone(self.passes.session(0).backend());
        for (row, &p) in wide(&floats(q, &backend)).into_iter().zip(&q.pos) {
            self.kept.queries[layer][p as usize] = row;
        }
        self.passes.attend(at, q, k, v, out)?;
        let watch = |list: &[u32], kept: &Kept| -> Vec<(u32, Row)> {
            list.iter().map(|&p| (p, kept.queries[layer][p as usize].clone())).collect()
        };
        if reused {
            let queries = watch(&tracked, self.kept);
            let new = self.probs(layer, &queries);
            let cosines: Vec<f64> = old
                .iter()
                .flatten()
                .zip(new.iter().flatten())
                .map(|(a, b)| dot(a, b) / (dot(a, a) * dot(b, b)).sqrt())
                .collect();
            let cosine = cosines.iter().sum::<f64>() / cosines.len() as f64;
            self.drift.push((at.layer.into(), cosine));
            if cosine < self.gamma {
                self.start = layer + 1;
            }
        }
        let queries = watch(&self.window, self.kept);
        let probs = self.probs(layer, &queries);
        let received: Vec<f64> =
            self.known.iter().map(|&j| probs.iter().flatten().map(|head| head[j as usize]).sum()).collect();
        self.track_next.push(self.known[top(&received, 1)[0] as usize]);
        Ok(())
    }

    fn leave(&mut self, at: Point, y: &mut Rows) -> Result<()> {
        self.passes.leave(at, y)
    }
}

/// The flow against the oracle, step by step; `exact`: and against the bits of passes without a cache.
fn run(b: &Bench, set: Elastic, want: &[Step], exact: bool) {
    let watched = Watched::new(&b.model);
    let layers = b.layers();
    let mut session: Session = b.session(vec![Box::new(FullMask)]);
    let mut ids = [prompt(), vec![MASK_ID; MASKS]].concat();
    let n = ids.len() as u32;
    let mut masked: Vec<u32> = (n - MASKS as u32..n).collect();
    let dim = b.naive.w.emb.cols;
    let mut kept = Kept {
        hidden: (0..layers).map(|_| b.backend.alloc(4 * n as usize * dim).unwrap()).collect(),
        queries: vec![vec![Row::new(); n as usize]; layers],
        tracked: Vec::new(),
    };
    let mut last: Vec<u32> = Vec::new();
    for (i, want) in want.iter().enumerate() {
        let what = format!("gamma {}, step {i}", set.gamma);
        let window: Vec<u32> = masked.iter().copied().take(set.window).collect();
        let known: Vec<u32> = (0..n).filter(|p| !masked.contains(p)).collect();
        let start = if i == 0 || set.gamma > 1.0 { 0 } else { layers };
        let mut pos =
            if start == 0 { (0..n).collect() } else { [&kept.tracked[..], &last, &window].concat() };
        pos.sort_unstable();
        pos.dedup();
        let batch = Batch {
            ids: pos.iter().map(|&p| ids[p as usize]).collect(),
            pos: pos.clone(),
            of: std::iter::once(0..pos.len() as u32).collect(),
            ask: Ask::All,
        };
        // The pass may come to compute every row, so it speaks of all positions.
        let begun = Pass::begin(&mut session, &ids, &(0..n).collect::<Vec<_>>()).unwrap();
        let mut hooks = Growing {
            passes: Passes::new(vec![(begun, &mut session)]),
            kept: &mut kept,
            naive: &b.naive,
            n,
            start,
            gamma: set.gamma,
            window: window.clone(),
            known,
            drift: Vec::new(),
            track_next: Vec::new(),
        };
        let mut logits = Logits::default();
        kvasir_core::Model::forward(&watched, &batch, &mut hooks, &mut logits).unwrap();
        let Growing { passes, start, drift, mut track_next, .. } = hooks;
        passes.end(false).unwrap();

        assert_eq!(start as u32, want.start_reset, "{what}: first layer with all rows");
        count(&what, &watched, &want.computed, &want.computed);
        assert_eq!(drift.len(), want.drift.len());
        for (got, want) in drift.iter().zip(&want.drift) {
            assert!(
                got.0 == want.0 && (got.1 - want.1).abs() < 1e-4,
                "{what}: drift {got:?}, wanted {want:?}"
            );
        }
        assert_eq!(logits.rows.iter().map(|r| r.1).collect::<Vec<_>>(), want.rows, "{what}: rows at the end");
        for (r, want) in want.logits.iter().enumerate() {
            close(&format!("{what}: logits of row {r}"), logits.row(r), want);
        }
        if exact {
            uncached(&what, b, &ids, &session, &logits);
        }
        track_next.sort_unstable();
        track_next.dedup();
        assert_eq!(track_next, want.tracked, "{what}: rows to watch");
        kept.tracked = track_next;

        let rows: Vec<Vec<f32>> =
            window.iter().map(|p| logits.row(want.rows.binary_search(p).unwrap()).to_vec()).collect();
        let sure: Vec<(u32, f64)> =
            wide(&rows).iter().map(|l| (argmax(l), softmax(l)[argmax(l) as usize])).collect();
        let enough = sure.iter().fold(0.0, |m: f64, s| m.max(s.1)).min(set.epsilon);
        let commits: Vec<Commit> = window
            .iter()
            .zip(&sure)
            .filter(|(_, s)| s.1 >= enough)
            .map(|(&pos, s)| Commit { pos, id: s.0 })
            .collect();
        assert_eq!(commits, want.commits, "{what}: committed tokens");
        last.clear();
        for c in &commits {
            ids[c.pos as usize] = c.id;
            masked.retain(|&p| p != c.pos);
            last.push(c.pos);
        }
    }
}

fn oracle(b: &Bench, set: Elastic) -> Vec<Step> {
    let steps = flows::elastic(&b.naive, &prompt(), MASKS, set);
    let margin = steps.iter().fold(f64::INFINITY, |m, s| m.min(s.margin));
    assert!(margin > CLEAR, "a near tie: {margin}");
    steps
}

#[test]
fn a_threshold_above_one_is_the_uncached_decoder_bit_for_bit() {
    let b = bench();
    let set = Elastic { window: 6, gamma: 1.5, epsilon: 0.2, steps: 12 };
    let want = oracle(&b, set);
    assert!(want.iter().all(|s| s.computed == [28; 5] && s.drift.is_empty()));
    assert!(want.iter().any(|s| s.commits.len() > 1), "some step commits several tokens");
    run(&b, set, &want, true);
}

#[test]
fn rows_grow_where_attention_drifts() {
    let b = bench();
    let set = Elastic { window: 6, gamma: 0.9, epsilon: 0.9, steps: 10 };
    let want = oracle(&b, set);
    // Growth right above the first layer, further up, and not at all.
    let starts: Vec<u32> = want.iter().map(|s| s.start_reset).collect();
    assert_eq!(starts, [0, 2, 5, 5, 1, 5, 5, 1, 1, 5]);
    assert!(want[1].computed[1] < 28 && want[1].computed[2] == 28);
    run(&b, set, &want, false);
}
