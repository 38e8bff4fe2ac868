//! Five methods in which rows are skipped, shrink or grow inside a pass, in plain f64 loops over [`NaiveLlama`].
//!
//! | flow | paper | what is hard about it |
//! |---|---|---|
//! | [`cacheblend`] | arXiv 2405.16444 | rows shrink after the check layer; scattered queries; old rows replaced |
//! | [`elastic`] | arXiv 2510.14973 | rows grow at the layer where attention drifts; full mask |
//! | [`dkv`] | arXiv 2505.15781 | a subset of rows per step; new and cached rows mixed; full mask |
//! | [`kvshare`] | arXiv 2503.16525 | repair rows ride in the decode batch |
//! | [`probe`] | EpiCache, arXiv 2509.17396 | queries that look and leave nothing behind |
//!
//! Where a choice hangs on a comparison (top k, argmax, a threshold), the result carries the margin, so that a test with f32
//! arithmetic can tell a wrong choice from a near tie.

use super::llama::{Kv, NaiveLlama, Qkv, Row, See, argmax, dot, softmax};

/// The `k` largest of `score`, the lower index where equal, ascending; and how far the last one in is ahead of the first one out,
/// relative to the larger.
fn top(score: &[f64], k: usize) -> (Vec<u32>, f64) {
    let mut order: Vec<usize> = (0..score.len()).collect();
    order.sort_by(|&a, &b| score[b].total_cmp(&score[a]).then(a.cmp(&b)));
    let margin = match (k.checked_sub(1).and_then(|i| order.get(i)), order.get(k)) {
        (Some(&a), Some(&b)) => (score[a] - score[b]) / score[a].abs().max(f64::MIN_POSITIVE),
        _ => f64::INFINITY,
    };
    let mut picked: Vec<u32> = order.iter().take(k).map(|&i| i as u32).collect();
    picked.sort_unstable();
    (picked, margin)
}

/// Rows `at` of a list.
fn rows_at(rows: &[Row], at: &[u32]) -> Vec<Row> {
    at.iter().map(|&i| rows[i as usize].clone()).collect()
}

/// Writes new rows over old ones.
fn put(kv: &mut Kv, at: &[u32], new: &Qkv) {
    for (i, &p) in at.iter().enumerate() {
        kv.k[p as usize].clone_from(&new.k[i]);
        kv.v[p as usize].clone_from(&new.v[i]);
    }
}

/// Attention of queries at positions `at` over all rows of `kv` at positions 0, 1, ….
fn attend_all(m: &NaiveLlama, q: &[Row], at: &[u32], kv: &Kv, see: See) -> (Vec<Row>, Vec<Vec<Row>>) {
    let pos: Vec<u32> = (0..kv.k.len() as u32).collect();
    q.iter().zip(at).map(|(q, &p)| m.attend(q, p, kv, &pos, see)).unzip()
}

/// What [`cacheblend`] gives.
#[derive(Clone, Debug)]
pub struct Blend {
    /// Logits of the last token.
    pub logits: Row,
    /// `[L]`: keys (before RoPE) and values of all tokens.
    pub kv: Vec<Kv>,
    /// Positions computed above the check layer, ascending; the suffix included.
    pub selected: Vec<u32>,
    /// `[L]`: rows that got q, k, v.
    pub projected: Vec<u32>,
    /// `[L]`: rows that went through attention and the feed-forward block.
    pub attended: Vec<u32>,
    /// Relative distance of the last row selected from the first one left out.
    pub margin: f64,
}

/// CacheBlend: `chunks` prefilled each alone are put in a row, `suffix` follows; layers 0 and 1 see all rows, the layers above
/// only those whose value moved most and the suffix. The check layer is layer 1.
pub fn cacheblend(m: &NaiveLlama, chunks: &[Vec<u32>], suffix: &[u32], ratio: f64) -> Blend {
    assert!(!suffix.is_empty(), "the last row must be computed");
    let mut old = vec![Kv::default(); m.layers()];
    for chunk in chunks {
        for (old, new) in old.iter_mut().zip(m.forward(chunk, See::Causal).kv) {
            old.k.extend(new.k);
            old.v.extend(new.v);
        }
    }
    let ids = [chunks.concat().as_slice(), suffix].concat();
    let n = ids.len();
    let reused = n - suffix.len();
    let all: Vec<u32> = (0..n as u32).collect();
    let mut selected = all.clone();
    let mut margin = f64::INFINITY;
    let mut x = m.embed(&ids);
    let mut out = Blend {
        logits: Row::new(),
        kv: Vec::new(),
        selected: Vec::new(),
        projected: Vec::new(),
        attended: Vec::new(),
        margin: 0.0,
    };
    for (layer, old) in old.iter().enumerate() {
        let at = if layer < 2 { all.clone() } else { selected.clone() };
        let fresh = m.qkv(layer, &x);
        out.projected.push(at.len() as u32);
        let mut kv = old.clone();
        kv.k.resize(n, Row::new());
        kv.v.resize(n, Row::new());
        put(&mut kv, &at, &fresh);
        let mut q = fresh.q;
        if layer == 1 && reused > 0 {
            let moved: Row = (0..reused)
                .map(|t| fresh.v[t].iter().zip(&old.v[t]).map(|(a, b)| (a - b).powi(2)).sum())
                .collect();
            (selected, margin) = top(&moved, (reused as f64 * ratio).floor() as usize);
            selected.extend(reused as u32..n as u32);
            q = rows_at(&q, &selected);
            x = rows_at(&x, &selected);
        }
        let at = if layer == 0 { &all } else { &selected };
        let (o, _) = attend_all(m, &q, at, &kv, See::Causal);
        m.finish(layer, &mut x, &o);
        out.attended.push(at.len() as u32);
        out.kv.push(kv);
    }
    out.logits = m.logits(x.last().expect("the suffix is not empty"));
    out.selected = selected;
    out.margin = margin;
    out
}

/// A token put in place of a mask.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Commit {
    /// Position.
    pub pos: u32,
    /// Token.
    pub id: u32,
}

/// One denoising step of a masked language model.
#[derive(Clone, Debug)]
pub struct Step {
    /// Tokens committed, by position.
    pub commits: Vec<Commit>,
    /// Positions that had rows at the end of the model, ascending.
    pub rows: Vec<u32>,
    /// `[rows][vocab]`.
    pub logits: Vec<Row>,
    /// `[L]`: rows computed.
    pub computed: Vec<u32>,
    /// Smallest distance of anything compared from changing the outcome: argmax gaps (in logits), confidences (relative to
    /// one), drift, tracked rows.
    pub margin: f64,
    /// Elastic-Cache: first layer that computed all rows; the number of layers if none did.
    pub start_reset: u32,
    /// Elastic-Cache: `(layer, cosine)` of each drift test made.
    pub drift: Vec<(u32, f64)>,
    /// Elastic-Cache: rows whose attention the next step watches.
    pub tracked: Vec<u32>,
}

/// Settings of Elastic-Cache.
#[derive(Clone, Copy, Debug)]
pub struct Elastic {
    /// beta: masked positions that a step looks at.
    pub window: usize,
    /// gamma: cosine below which attention has drifted; above 1 every step computes everything.
    pub gamma: f64,
    /// epsilon: confidence that is enough to commit.
    pub epsilon: f64,
    /// Steps at most.
    pub steps: usize,
}

/// State of a sequence that is being unmasked.
struct Masked {
    ids: Vec<u32>,
    masked: Vec<bool>,
}

/// Stands for a token that is not known yet.
pub const MASK_ID: u32 = 0;

impl Masked {
    fn new(prompt: &[u32], masks: usize) -> Self {
        let ids = [prompt, &vec![MASK_ID; masks]].concat();
        let masked = (0..ids.len()).map(|i| i >= prompt.len()).collect();
        Self { ids, masked }
    }

    fn positions(&self, masked: bool) -> Vec<u32> {
        (0..self.ids.len() as u32).filter(|&i| self.masked[i as usize] == masked).collect()
    }

    fn commit(&mut self, commits: &[Commit]) {
        for c in commits {
            self.ids[c.pos as usize] = c.id;
            self.masked[c.pos as usize] = false;
        }
    }
}

/// Argmax, its probability, and how far the second is behind in logits.
fn confidence(logits: &[f64]) -> (u32, f64, f64) {
    let id = argmax(logits);
    let best = logits[id as usize];
    let second =
        logits.iter().enumerate().filter(|x| x.0 != id as usize).fold(f64::NEG_INFINITY, |m, x| m.max(*x.1));
    (id, softmax(logits)[id as usize], best - second)
}

/// Elastic-Cache for masked language models, without blocks and without end-of-text handling.
///
/// Step 0 computes everything. A later step computes the watched rows, the rows committed in the step before and the window;
/// at the first layer after one in which the attention of the watched rows has drifted, all rows join in with the hidden rows
/// last seen at that layer. Hidden rows, queries, keys and values are kept per layer for all positions.
pub fn elastic(m: &NaiveLlama, prompt: &[u32], masks: usize, set: Elastic) -> Vec<Step> {
    let layers = m.layers();
    let mut state = Masked::new(prompt, masks);
    let n = state.ids.len();
    let all: Vec<u32> = (0..n as u32).collect();
    let mut x_cache = vec![vec![Row::new(); n]; layers];
    let mut q_cache = x_cache.clone();
    let mut kv = vec![Kv { k: vec![Row::new(); n], v: vec![Row::new(); n] }; layers];
    let (mut tracked, mut last): (Vec<u32>, Vec<u32>) = (Vec::new(), Vec::new());
    let mut steps: Vec<Step> = Vec::new();
    while steps.len() < set.steps && state.masked.contains(&true) {
        let window: Vec<u32> = state.positions(true).into_iter().take(set.window).collect();
        let known = state.positions(false);
        let mut start_reset = if steps.is_empty() || set.gamma > 1.0 { 0 } else { layers };
        let mut at = if start_reset == 0 { all.clone() } else { [&tracked[..], &last, &window].concat() };
        at.sort_unstable();
        at.dedup();
        let mut x = m.embed(&at.iter().map(|&p| state.ids[p as usize]).collect::<Vec<_>>());
        let mut step = Step {
            commits: Vec::new(),
            rows: Vec::new(),
            logits: Vec::new(),
            computed: Vec::new(),
            margin: f64::INFINITY,
            start_reset: 0,
            drift: Vec::new(),
            tracked: Vec::new(),
        };
        for layer in 0..layers {
            for (x, &p) in x.iter().zip(&at) {
                x_cache[layer][p as usize].clone_from(x);
            }
            if layer == start_reset && at.len() < n {
                x.clone_from(&x_cache[layer]);
                at.clone_from(&all);
            }
            let old = Kv { k: kv[layer].k.clone(), v: Vec::new() };
            let old_q = rows_at(&q_cache[layer], &tracked);
            let new = m.qkv(layer, &x);
            put(&mut kv[layer], &at, &new);
            for (q, &p) in new.q.iter().zip(&at) {
                q_cache[layer][p as usize].clone_from(q);
            }
            let (o, probs) = attend_all(m, &new.q, &at, &kv[layer], See::Full);
            let row_of = |p: u32| at.binary_search(&p).expect("a row of this step");
            if layer < start_reset {
                // Mean over watched rows and heads of the cosine between attention as it was and as it is.
                let mut cosines = Vec::new();
                for (q, &p) in old_q.iter().zip(&tracked) {
                    let over: Vec<usize> = (0..n).collect();
                    let before = m.probs(q, p, &old.k, &all, &over);
                    for (a, b) in before.iter().zip(&probs[row_of(p)]) {
                        cosines.push(dot(a, b) / (dot(a, a) * dot(b, b)).sqrt());
                    }
                }
                let cosine = cosines.iter().sum::<f64>() / cosines.len() as f64;
                step.drift.push((layer as u32, cosine));
                step.margin = step.margin.min((cosine - set.gamma).abs());
                if cosine < set.gamma {
                    start_reset = layer + 1;
                }
            }
            // Known positions by the attention they receive from the window.
            let received: Row = known
                .iter()
                .map(|&j| window.iter().flat_map(|&p| &probs[row_of(p)]).map(|head| head[j as usize]).sum())
                .collect();
            let (first, margin) = top(&received, 1);
            step.margin = step.margin.min(margin);
            step.tracked.extend(first.iter().map(|&i| known[i as usize]));
            step.computed.push(at.len() as u32);
            m.finish(layer, &mut x, &o);
        }
        step.tracked.sort_unstable();
        step.tracked.dedup();
        step.logits = x.iter().map(|x| m.logits(x)).collect();
        let sure: Vec<(u32, f64, f64)> = window
            .iter()
            .map(|&p| confidence(&step.logits[at.binary_search(&p).expect("the window has rows")]))
            .collect();
        let best = sure.iter().fold(0.0, |m: f64, s| m.max(s.1));
        let enough = set.epsilon.min(best);
        for (&pos, &(id, sure, gap)) in window.iter().zip(&sure) {
            if sure >= enough {
                step.commits.push(Commit { pos, id });
                step.margin = step.margin.min(gap);
            }
            if sure != best {
                step.margin = step.margin.min((sure - enough).abs());
            }
        }
        state.commit(&step.commits);
        last = step.commits.iter().map(|c| c.pos).collect();
        tracked.clone_from(&step.tracked);
        step.start_reset = start_reset as u32;
        step.rows = at;
        steps.push(step);
    }
    steps
}

/// dKV-Cache, variant "decode": one block of `masks` tokens in `steps` steps, low-confidence order, temperature 0. A position's
/// rows are kept one step after it was committed; every `reload` steps everything is computed anew.
pub fn dkv(m: &NaiveLlama, prompt: &[u32], masks: usize, steps: usize, reload: usize) -> Vec<Step> {
    let layers = m.layers();
    let mut state = Masked::new(prompt, masks);
    let n = state.ids.len();
    let all: Vec<u32> = (0..n as u32).collect();
    let mut kv = vec![Kv { k: vec![Row::new(); n], v: vec![Row::new(); n] }; layers];
    // Known positions after each step: known[0] before step 0, known[i + 1] = C_i.
    let mut known = vec![state.positions(false)];
    let mut out: Vec<Step> = Vec::new();
    for i in 0..steps {
        let full = i < 2 || i % reload == 0;
        let at: Vec<u32> = if full {
            all.clone()
        } else {
            all.iter().copied().filter(|p| !known[i - 1].contains(p)).collect()
        };
        let mut x = m.embed(&at.iter().map(|&p| state.ids[p as usize]).collect::<Vec<_>>());
        let mut step = Step {
            commits: Vec::new(),
            rows: at.clone(),
            logits: Vec::new(),
            computed: vec![at.len() as u32; layers],
            margin: f64::INFINITY,
            start_reset: 0,
            drift: Vec::new(),
            tracked: Vec::new(),
        };
        for (layer, kv) in kv.iter_mut().enumerate() {
            let new = m.qkv(layer, &x);
            put(kv, &at, &new);
            let (o, _) = attend_all(m, &new.q, &at, kv, See::Full);
            m.finish(layer, &mut x, &o);
        }
        step.logits = x.iter().map(|x| m.logits(x)).collect();
        // The first `masks % steps` steps commit one more.
        let count = masks / steps + usize::from(i < masks % steps);
        let open: Vec<usize> = (0..at.len()).filter(|&r| state.masked[at[r] as usize]).collect();
        let sure: Vec<(u32, f64, f64)> = open.iter().map(|&r| confidence(&step.logits[r])).collect();
        let (picked, margin) = top(&sure.iter().map(|s| s.1).collect::<Row>(), count);
        step.margin = margin;
        for j in picked {
            let (id, _, gap) = sure[j as usize];
            step.commits.push(Commit { pos: at[open[j as usize]], id });
            step.margin = step.margin.min(gap);
        }
        state.commit(&step.commits);
        known.push(state.positions(false));
        out.push(step);
    }
    out
}

/// Settings of [`kvshare`].
#[derive(Clone, Debug)]
pub struct Share {
    /// Where the reused run lies in the prompt.
    pub reused: std::ops::Range<usize>,
    /// Where its tokens lie in the source prompt.
    pub source_from: usize,
    /// Share of the reused rows recomputed at prefill; 0 is none, otherwise at least one.
    pub has_ratio: f64,
    /// Rows repaired in each decode step.
    pub per_step: usize,
    /// Decode steps.
    pub steps: usize,
}

/// What [`kvshare`] gives.
#[derive(Clone, Debug)]
pub struct Shared {
    /// Logits of the last prompt token after prefill.
    pub first: Row,
    /// Rows recomputed at prefill although reused, ascending.
    pub has: Vec<u32>,
    /// Positions computed above the check layer at prefill, ascending.
    pub selected: Vec<u32>,
    /// Token fed in each decode step.
    pub ids: Vec<u32>,
    /// `[steps]`: rows repaired.
    pub repaired: Vec<Vec<u32>>,
    /// `[steps][vocab]`: logits of the decode row.
    pub logits: Vec<Row>,
    /// `[L]`: keys (before RoPE) and values of all positions at the end.
    pub kv: Vec<Kv>,
    /// Smallest distance of a choice from changing: `has` (relative), argmax gaps (logits).
    pub margin: f64,
}

/// KVShare: one run of a prompt is taken from another prompt; layers 0 and 1 see all rows, the layers above only the rest, the
/// most important reused rows and the last token. The other reused rows (the last token too, if it was reused: it was computed on
/// stale context) wait in a queue, ascending, and ride in the decode steps.
pub fn kvshare(m: &NaiveLlama, prompt: &[u32], source: &[u32], set: &Share) -> Shared {
    let (n, run) = (prompt.len(), set.reused.clone());
    assert_eq!(prompt[run.clone()], source[set.source_from..][..run.len()], "the reused tokens are equal");
    let old = m.forward(source, See::Causal).kv;
    let all: Vec<u32> = (0..n as u32).collect();
    let mut selected = all.clone();
    let (mut has, mut margin) = (Vec::new(), f64::INFINITY);
    let mut kv: Vec<Kv> = Vec::new();
    let mut x = m.embed(prompt);
    for (layer, source) in old.iter().enumerate() {
        let at = if layer < 2 { &all } else { &selected };
        let fresh = m.qkv(layer, &x);
        let mut now = Kv { k: vec![Row::new(); n], v: vec![Row::new(); n] };
        for (i, p) in run.clone().enumerate() {
            now.k[p].clone_from(&source.k[set.source_from + i]);
            now.v[p].clone_from(&source.v[set.source_from + i]);
        }
        let stale = now.v.clone();
        put(&mut now, at, &fresh);
        let mut q = fresh.q.clone();
        if layer == 1 {
            if set.has_ratio > 0.0 {
                let over: Vec<usize> = run.clone().collect();
                let p = m.probs(&fresh.q[n - 2], n as u32 - 2, &now.k, &all, &over);
                let score: Row = over
                    .iter()
                    .enumerate()
                    .map(|(i, &t)| {
                        let drawn = p.iter().map(|head| head[i]).sum::<f64>() / p.len() as f64;
                        let moved: f64 = fresh.v[t].iter().zip(&stale[t]).map(|(a, b)| (a - b).abs()).sum();
                        drawn * moved
                    })
                    .collect();
                let k = ((run.len() as f64 * set.has_ratio) as usize).max(1);
                let (picked, gap) = top(&score, k);
                has = picked.iter().map(|i| i + run.start as u32).collect();
                margin = gap;
            }
            selected.retain(|&p| !run.contains(&(p as usize)) || has.contains(&p) || p as usize + 1 == n);
            q = rows_at(&q, &selected);
            x = rows_at(&x, &selected);
        }
        let at = if layer == 0 { &all } else { &selected };
        let (o, _) = attend_all(m, &q, at, &now, See::Causal);
        m.finish(layer, &mut x, &o);
        kv.push(now);
    }
    let first = m.logits(x.last().expect("the last token is computed"));
    let queue: Vec<u32> = run.map(|p| p as u32).filter(|p| !has.contains(p)).collect();
    let mut out = Shared {
        first: first.clone(),
        has,
        selected,
        ids: Vec::new(),
        repaired: Vec::new(),
        logits: Vec::new(),
        kv,
        margin,
    };
    let mut row = first;
    let mut waiting = queue.chunks(set.per_step);
    for step in 0..set.steps {
        let (id, _, gap) = confidence(&row);
        out.margin = out.margin.min(gap);
        out.ids.push(id);
        let repair = waiting.next().unwrap_or_default().to_vec();
        let at = [&repair[..], &[(n + step) as u32]].concat();
        let ids: Vec<u32> = at.iter().map(|&p| *prompt.get(p as usize).unwrap_or(&id)).collect();
        let mut x = m.embed(&ids);
        for (layer, kv) in out.kv.iter_mut().enumerate() {
            kv.k.push(Row::new());
            kv.v.push(Row::new());
            let new = m.qkv(layer, &x);
            // All rows of the step are written before any of them looks.
            put(kv, &at, &new);
            let (o, _) = attend_all(m, &new.q, &at, kv, See::Causal);
            m.finish(layer, &mut x, &o);
        }
        row = m.logits(x.last().expect("the decode row"));
        out.repaired.push(repair);
        out.logits.push(row.clone());
    }
    out
}

/// What [`probe`] gives.
#[derive(Clone, Debug)]
pub struct Probed {
    /// `[L][K][T]`: the largest attention a past key draws from any probe row and head of its group, softmax over past keys only.
    pub score: Vec<Vec<Row>>,
    /// Logits of the last probe row, which sees the past and the probe.
    pub logits: Row,
}

/// EpiCache's probe: `tokens` run as queries behind the cached `prompt`; their own keys take part in the pass, but not in the
/// scores.
pub fn probe(m: &NaiveLlama, prompt: &[u32], tokens: &[u32]) -> Probed {
    let n = prompt.len();
    let past = m.forward(prompt, See::Causal).kv;
    let at: Vec<u32> = (n as u32..(n + tokens.len()) as u32).collect();
    let over: Vec<usize> = (0..n).collect();
    let pos: Vec<u32> = (0..n as u32).collect();
    let (group, mut x) = (m.w.heads / m.w.kv_heads, m.embed(tokens));
    let mut score = Vec::new();
    for (layer, past) in past.iter().enumerate() {
        let new = m.qkv(layer, &x);
        let mut best = vec![vec![0.0f64; n]; m.w.kv_heads];
        for (q, &p) in new.q.iter().zip(&at) {
            for (h, probs) in m.probs(q, p, &past.k, &pos, &over).iter().enumerate() {
                best[h / group].iter_mut().zip(probs).for_each(|(best, p)| *best = best.max(*p));
            }
        }
        score.push(best);
        let kv = Kv { k: [&past.k[..], &new.k].concat(), v: [&past.v[..], &new.v].concat() };
        let (o, _) = attend_all(m, &new.q, &at, &kv, See::Causal);
        m.finish(layer, &mut x, &o);
    }
    Probed { score, logits: m.logits(x.last().expect("the probe is not empty")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model() -> NaiveLlama {
        NaiveLlama::from_gguf(concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../../testdata/models/stories260K-f32.gguf"
        ))
    }

    fn text(range: std::ops::Range<usize>) -> Vec<u32> {
        let bytes =
            std::fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/../../testdata/golden/alice.tok512.u16"));
        let bytes = bytes.expect("testdata/golden/alice.tok512.u16");
        range.map(|i| u32::from(u16::from_le_bytes([bytes[2 * i], bytes[2 * i + 1]]))).collect()
    }

    fn far(a: &[f64], b: &[f64]) -> f64 {
        assert_eq!(a.len(), b.len());
        a.iter().zip(b).fold(0.0, |m, (a, b)| m.max((a - b).abs()))
    }

    fn far_kv(a: &[Kv], b: &[Kv], rows: usize) -> f64 {
        let one = |a: &Kv, b: &Kv| {
            (0..rows).fold(0.0f64, |m, t| m.max(far(&a.k[t], &b.k[t])).max(far(&a.v[t], &b.v[t])))
        };
        a.iter().zip(b).fold(0.0, |m, (a, b)| m.max(one(a, b)))
    }

    #[test]
    fn blending_everything_is_a_full_prefill_and_less_is_not() {
        let m = model();
        let (chunks, suffix) = ([text(0..20), text(40..65)], text(65..71));
        let full = m.forward(&[chunks.concat(), suffix.clone()].concat(), See::Causal);
        let last = full.logits.last().expect("rows");
        let all = cacheblend(&m, &chunks, &suffix, 1.0);
        assert!(far(&all.logits, last) < 1e-12 && far_kv(&all.kv, &full.kv, 51) < 1e-12);
        let some = cacheblend(&m, &chunks, &suffix, 0.25);
        let none = cacheblend(&m, &chunks, &suffix, 0.0);
        assert_eq!((some.selected.len(), none.selected.len()), (11 + 6, 6));
        assert_eq!(some.attended, [51, 17, 17, 17, 17]);
        assert_eq!(some.projected, [51, 51, 17, 17, 17]);
        let (far_some, far_none) = (far(&some.logits, last), far(&none.logits, last));
        assert!(0.0 < far_some && far_some < far_none, "{far_some} {far_none}");
        // A first chunk at position 0 is an exact prefix.
        let exact = cacheblend(&m, &chunks[..1], &chunks[1], 0.0);
        let full = m.forward(&chunks.concat(), See::Causal);
        assert!(far(&exact.logits, full.logits.last().expect("rows")) < 1e-12);
    }

    #[test]
    fn elastic_without_reuse_is_the_plain_windowed_decoder() {
        let m = model();
        let set = Elastic { window: 6, gamma: 1.5, epsilon: 0.9, steps: 8 };
        let steps = elastic(&m, &text(0..12), 16, set);
        let mut state = Masked::new(&text(0..12), 16);
        for step in &steps {
            let logits = m.forward(&state.ids, See::Full).logits;
            let window: Vec<u32> = state.positions(true).into_iter().take(6).collect();
            let sure: Vec<_> = window.iter().map(|&p| confidence(&logits[p as usize])).collect();
            let best = sure.iter().fold(0.0, |m: f64, s| m.max(s.1));
            let want: Vec<Commit> = window
                .iter()
                .zip(&sure)
                .filter(|x| x.1.1 >= best.min(0.9))
                .map(|(&pos, s)| Commit { pos, id: s.0 })
                .collect();
            assert_eq!(step.commits, want);
            assert_eq!(step.computed, [28; 5]);
            state.commit(&want);
        }
    }

    #[test]
    fn a_lower_threshold_never_computes_more() {
        let m = model();
        let rows = |gamma| {
            let set = Elastic { window: 6, gamma, epsilon: 0.9, steps: 2 };
            elastic(&m, &text(0..12), 16, set)[1].computed.iter().sum::<u32>()
        };
        let list = [1.5, 0.9999, 0.99, 0.9, -1.0].map(rows);
        assert!(list.windows(2).all(|w| w[0] >= w[1]) && list[4] < list[1], "{list:?}");
    }

    #[test]
    fn dkv_that_always_reloads_is_the_plain_sampler() {
        let m = model();
        let prompt = text(0..10);
        let mut state = Masked::new(&prompt, 14);
        for (i, step) in dkv(&m, &prompt, 14, 6, 1).iter().enumerate() {
            let trace = m.forward(&state.ids, See::Full);
            assert_eq!(step.rows.len(), 24);
            assert!(far(&step.logits[20], &trace.logits[20]) < 1e-12);
            assert_eq!(step.commits.len(), if i < 2 { 3 } else { 2 });
            state.commit(&step.commits);
        }
        assert!(!state.masked.contains(&true));
        // Rows of the first block: G - (i - 1) n, here with 14 masks in 7 steps of two.
        let steps = dkv(&m, &prompt, 14, 7, 4);
        let rows: Vec<usize> = steps.iter().map(|s| s.rows.len()).collect();
        assert_eq!(rows, [24, 24, 12, 10, 24, 6, 4]);
    }

    #[test]
    fn a_drained_queue_leaves_the_rows_of_a_full_prefill() {
        let m = model();
        let run = text(100..120);
        let prompt = [text(0..9), run.clone()].concat();
        let source = [text(300..317), run].concat();
        let set = Share { reused: 9..29, source_from: 17, has_ratio: 0.0, per_step: 3, steps: 8 };
        let shared = kvshare(&m, &prompt, &source, &set);
        let full = m.forward(&prompt, See::Causal);
        assert!(far_kv(&shared.kv, &full.kv, 29) < 1e-12);
        assert_eq!(shared.repaired.iter().map(Vec::len).collect::<Vec<_>>(), [3, 3, 3, 3, 3, 3, 2, 0]);
        assert_eq!(shared.selected, (0..9).chain([28]).collect::<Vec<u32>>());
        // Half way it is not exact, and important rows first is closer than nothing.
        let stale = far(&shared.first, &full.logits[28]);
        assert!(stale > 1e-3, "{stale}");
        let half = kvshare(&m, &prompt, &source, &Share { steps: 3, ..set.clone() });
        assert!(far_kv(&half.kv, &full.kv, 18) < 1e-12 && far_kv(&half.kv, &full.kv, 29) > 1e-3);
        let some = kvshare(&m, &prompt, &source, &Share { has_ratio: 0.15, ..set });
        assert_eq!((some.has.len(), some.selected.len()), (3, 9 + 3 + usize::from(!some.has.contains(&28))));
    }

    #[test]
    fn a_probe_scores_past_keys_only() {
        let m = model();
        let probed = probe(&m, &text(0..30), &text(50..57));
        for head in probed.score.iter().flatten() {
            assert_eq!(head.len(), 30);
            assert!(head.iter().all(|&s| s > 0.0 && s <= 1.0));
            // A maximum over rows and heads of distributions sums to at least one.
            assert!(head.iter().sum::<f64>() > 1.0 - 1e-12);
        }
        let full = m.forward(&text(0..30).into_iter().chain(text(50..57)).collect::<Vec<_>>(), See::Causal);
        assert!(far(&probed.logits, full.logits.last().expect("rows")) < 1e-12);
    }
}
