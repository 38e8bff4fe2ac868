//! Attention over runs: the calls that everything else is for.

use std::sync::Arc;

use kvasir_core::{
    Attend, AttendSeq, Backend, Buf, Call, Code, Codes, ColumnUpdate, Format, HIDDEN, Heads, KeySpace, Mask,
    Meta, Over, Pos, Probe, Queries, Reduce, RopeArg, Run, RunId, TILE_ROWS, Tile,
};

use super::tiles::{ropes, turn};
use super::{Bench, close, tolerance};
use crate::{Noise, pack};

/// A run as uploaded, and as represented.
struct Twin {
    run: Run,
    pos: Vec<u32>,
    /// `[rows][D]`, as stored.
    k: Vec<Vec<f64>>,
    /// `[rows][Dv]`.
    v: Vec<Vec<f64>>,
    bias: Vec<f64>,
}

/// One case: everything an `Attend` needs, and its twin in f64.
struct Case {
    what: String,
    q_heads: usize,
    k_dim: usize,
    v_dim: usize,
    rope: Option<RopeArg>,
    mask: Mask,
    window: Option<u32>,
    /// Per sequence: positions of its rows, first position of the pass, runs per kv head.
    seqs: Vec<(Vec<u32>, u32, Vec<Vec<Twin>>)>,
    probes: Vec<Probe>,
    q: Vec<f32>,
    tolerance: f64,
}

fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| f64::from(x)).collect()
}

fn dense(format: Format) -> Codes {
    [Code::rotated(format), Code::plain(format)]
}

/// Uploads rows as a run. Slots behind the last row hold stale rows, as after a run was cut.
fn twin(b: &Bench<'_>, codes: &Codes, dims: (usize, usize), pos: Vec<u32>, k: &[f32], v: &[f32]) -> Twin {
    let (kd, vd) = dims;
    let mut tiles = Vec::new();
    let (mut ks, mut vs) = (Vec::new(), Vec::new());
    for (k, v) in k.chunks(TILE_ROWS * kd).zip(v.chunks(TILE_ROWS * vd)) {
        let rows = k.len() / kd;
        let (mut k, mut v) = (k.to_vec(), v.to_vec());
        k.resize(TILE_ROWS * kd, 30.0);
        v.resize(TILE_ROWS * vd, -50.0);
        let bytes = pack::pack(codes, kd, vd, &k, &v);
        let (k, v) = pack::unpack(codes, kd, vd, &bytes, rows);
        ks.extend(k.chunks(kd).map(wide));
        vs.extend(v.chunks(vd).map(wide));
        tiles.push(Tile { codes: b.up_bytes(&bytes), own: true });
    }
    let run = Run {
        codes: codes.clone(),
        tiles: Arc::new(tiles),
        rows: pos.len() as u32,
        meta: Meta { pos: Pos::from_list(pos.clone()), bias: None, scale: [None, None], cols: Vec::new() },
    };
    let bias = vec![0.0; pos.len()];
    Twin { run, pos, k: ks, v: vs, bias }
}

fn random(b: &Bench<'_>, noise: &mut Noise, codes: &Codes, dims: (usize, usize), pos: Vec<u32>) -> Twin {
    let (k, v) = (noise.normals(pos.len() * dims.0), noise.normals(pos.len() * dims.1));
    twin(b, codes, dims, pos, &k, &v)
}

impl Twin {
    /// Adds a bias to scores, in log2 units.
    fn with_bias(mut self, b: &Bench<'_>, bias: &[f32]) -> Self {
        self.bias = wide(bias);
        self.run.meta.bias = Some(b.up(&pack::beside(bias, 0.0)));
        self
    }

    /// Gives every row a factor of its key and of its value.
    fn with_scale(mut self, b: &Bench<'_>, scale: [&[f32]; 2]) -> Self {
        for (rows, scale) in [&mut self.k, &mut self.v].into_iter().zip(scale) {
            for (row, &s) in rows.iter_mut().zip(scale) {
                for x in row {
                    *x *= f64::from(s);
                }
            }
        }
        self.run.meta.scale = scale.map(|s| Some(b.up(&pack::beside(s, 1.0))));
        self
    }
}

/// Scores of one query head over the runs of its kv head, in natural log units; `None` where the key is not seen.
fn scores(case: &Case, q: &[f32], pos: u32, runs: &[Twin]) -> Vec<Vec<Option<f64>>> {
    let scale = 1.0 / (case.k_dim as f64).sqrt();
    let q = wide(q);
    let q = case.rope.as_ref().map_or(q.clone(), |r| turn(r, &q, pos));
    let one = |run: &Twin, i: usize| {
        let seen = case.mask == Mask::Full || run.pos[i] <= pos;
        let near = case.window.is_none_or(|w| run.pos[i] + w > pos);
        let key = match (&case.rope, run.run.codes[0].space) {
            (Some(r), KeySpace::Plain) => turn(r, &run.k[i], run.pos[i]),
            _ => run.k[i].clone(),
        };
        let dot: f64 = q.iter().zip(&key).map(|(a, b)| a * b).sum();
        (seen && near && run.bias[i] > -1e20).then(|| dot * scale + run.bias[i] * std::f64::consts::LN_2)
    };
    runs.iter().map(|run| (0..run.pos.len()).map(|i| one(run, i)).collect()).collect()
}

/// Softmax over the keys that `over` lets through; log of the sum of exponentials (without them all: minus infinity).
fn probabilities(scores: &[Vec<Option<f64>>], over: impl Fn(usize, usize) -> bool) -> (Vec<Vec<f64>>, f64) {
    let let_through = |r: usize, i: usize| scores[r][i].filter(|_| over(r, i));
    let each = || (0..scores.len()).flat_map(|r| (0..scores[r].len()).map(move |i| (r, i)));
    let most = each().filter_map(|(r, i)| let_through(r, i)).fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = each().filter_map(|(r, i)| let_through(r, i)).map(|s| (s - most).exp()).sum();
    let p = (0..scores.len())
        .map(|r| {
            let one = |i| let_through(r, i).map_or(0.0, |s| (s - most).exp() / sum);
            (0..scores[r].len()).map(one).collect()
        })
        .collect();
    (p, most + sum.ln())
}

impl Case {
    fn kv_heads(&self) -> usize {
        self.seqs[0].2.len()
    }

    fn call(&self, b: &Bench<'_>, out: &Buf, lse: Option<&Buf>, columns: &[ColumnUpdate]) -> Attend {
        let q_pos: Vec<u32> = self.seqs.iter().flat_map(|s| s.0.clone()).collect();
        assert_eq!(self.q.len(), q_pos.len() * self.q_heads * self.k_dim, "{}: the case is sound", self.what);
        let mut seqs = Vec::new();
        let mut row = 0;
        for (pos, pass_from, heads) in &self.seqs {
            let rows = row..row + pos.len() as u32;
            row = rows.end;
            let heads = heads.iter().map(|h| h.iter().map(|t| t.run.clone()).collect()).collect();
            seqs.push(AttendSeq { rows, heads, pass_from: *pass_from });
        }
        Attend {
            q: b.up(&self.q),
            q_pos: q_pos.clone().into(),
            q_rope: q_pos.into(),
            out: out.clone(),
            lse: lse.cloned(),
            q_heads: self.q_heads as u16,
            kv_heads: self.kv_heads() as u16,
            k_dim: self.k_dim as u16,
            v_dim: self.v_dim as u16,
            scale: (1.0 / (self.k_dim as f64).sqrt()) as f32,
            rope: self.rope.clone(),
            mask: self.mask,
            window: self.window,
            seqs,
            columns: columns.to_vec(),
        }
    }

    fn check(&self, b: &Bench<'_>) {
        let (h_count, kd, vd) = (self.q_heads, self.k_dim, self.v_dim);
        let group = h_count / self.kv_heads();
        let n: usize = self.seqs.iter().map(|s| s.0.len()).sum();
        // Outputs start as garbage; columns start at numbers that must be kept.
        let (out, lse) = (b.up(&vec![7.0; n * h_count * vd]), b.up(&vec![7.0; n * h_count]));
        let start = |r: usize, i: usize| 0.25 * (r + 1) as f32 + i as f32 / 1024.0;
        let columns: Vec<ColumnUpdate> = self
            .probes
            .iter()
            .map(|probe| ColumnUpdate { probe: probe.clone(), targets: self.targets(b, start) })
            .collect();
        let call = self.call(b, &out, Some(&lse), &columns);
        b.submit(&self.what, Call::Attend(Box::new(call.clone())));
        let got = b.read(&self.what, &out);
        let got_lse = b.read(&self.what, &lse);

        let (mut want, mut want_lse) = (Vec::new(), Vec::new());
        let mut row = 0;
        // [probe][seq][kv head][run][row]
        let mut want_cols: Vec<Vec<Vec<Vec<Vec<f64>>>>> = Vec::new();
        for _ in &self.probes {
            let column = |r: usize, t: &Twin| (0..t.pos.len()).map(|i| f64::from(start(r, i))).collect();
            let head = |h: &Vec<Twin>| h.iter().enumerate().map(|(r, t)| column(r, t)).collect();
            want_cols.push(self.seqs.iter().map(|s| s.2.iter().map(head).collect()).collect());
        }
        for (s, (pos, pass_from, heads)) in self.seqs.iter().enumerate() {
            for (i, &p) in pos.iter().enumerate() {
                let all: Vec<_> = (0..h_count)
                    .map(|h| scores(self, &self.q[(row * h_count + h) * kd..][..kd], p, &heads[h / group]))
                    .collect();
                for (h, score) in all.iter().enumerate() {
                    let (prob, log) = probabilities(score, |_, _| true);
                    let mut o = vec![0.0; vd];
                    for (run, prob) in heads[h / group].iter().zip(&prob) {
                        for (v, p) in run.v.iter().zip(prob) {
                            o.iter_mut().zip(v).for_each(|(o, v)| *o += p * v);
                        }
                    }
                    want.extend(o);
                    want_lse.push(log);
                }
                for (c, probe) in self.probes.iter().enumerate() {
                    let newest = |n: u32| i + n as usize >= pos.len();
                    if matches!(probe.queries, Queries::Last(n) if !newest(n)) {
                        continue;
                    }
                    let probs: Vec<_> = all
                        .iter()
                        .enumerate()
                        .map(|(h, score)| {
                            let past = |r: usize, i: usize| heads[h / group][r].pos[i] < *pass_from;
                            match probe.over {
                                Over::All => probabilities(score, |_, _| true),
                                Over::Past => probabilities(score, past),
                                Over::Run(id) => probabilities(score, |r, _| r == id.0 as usize),
                            }
                            .0
                        })
                        .collect();
                    fold(probe, group, &probs, &mut want_cols[c][s]);
                }
                row += 1;
            }
        }
        close(&format!("{}: output", self.what), &got, &want, |_| self.tolerance);
        for (i, (&g, &w)) in got_lse.iter().zip(&want_lse).enumerate() {
            let what = format!("{}: log-sum-exp {i}", self.what);
            if w.is_finite() {
                close(&what, &[g], &[w], |_| self.tolerance);
            } else {
                assert!(g < -1e20, "{what}: nothing was seen, got {g}");
            }
        }
        for (c, (column, want)) in columns.iter().zip(&want_cols).enumerate() {
            for (s, want) in want.iter().enumerate() {
                for (h, want) in want.iter().enumerate() {
                    for (r, want) in want.iter().enumerate() {
                        let what = format!("{}: column {c}, sequence {s}, head {h}, run {r}", self.what);
                        if let Some(buf) = &column.targets[s][h][r] {
                            let got = pack::in_row_order(&b.read(&what, buf), want.len());
                            close(&what, &got, want, |_| self.tolerance);
                        }
                    }
                }
            }
        }
        // The same call gives the same bits.
        b.submit(&self.what, Call::Attend(Box::new(Attend { columns: Vec::new(), lse: None, ..call })));
        assert!(b.read(&self.what, &out) == got, "{}: a second call gives other bits", self.what);
    }

    fn targets(&self, b: &Bench<'_>, start: impl Fn(usize, usize) -> f32) -> Vec<Vec<Vec<Option<Buf>>>> {
        let one = |r: usize, t: &Twin| {
            let values: Vec<f32> = (0..t.pos.len()).map(|i| start(r, i)).collect();
            (!values.is_empty()).then(|| b.up(&pack::beside(&values, 0.0)))
        };
        let head = |h: &Vec<Twin>| h.iter().enumerate().map(|(r, t)| one(r, t)).collect();
        self.seqs.iter().map(|s| s.2.iter().map(head).collect()).collect()
    }
}

/// Folds the probabilities of one query, `[H][run][row]`, into the columns of its sequence, `[K][run][row]`.
fn fold(probe: &Probe, group: usize, probs: &[Vec<Vec<f64>>], into: &mut [Vec<Vec<f64>>]) {
    for (kv, runs) in into.iter_mut().enumerate() {
        let heads = match probe.heads {
            Heads::LayerMean => 0..probs.len(),
            _ => kv * group..(kv + 1) * group,
        };
        for (r, run) in runs.iter_mut().enumerate() {
            for (i, x) in run.iter_mut().enumerate() {
                let drawn = heads.clone().map(|h| probs[h][r][i]);
                let one = match probe.heads {
                    Heads::KvMax => drawn.fold(0.0, f64::max),
                    _ => drawn.sum::<f64>() / heads.len() as f64,
                };
                match probe.reduce {
                    Reduce::Max => *x = x.max(one),
                    _ => *x += one,
                }
            }
        }
    }
}

const FORMATS: [Format; 4] = [Format::F32, Format::F16, Format::Bf16, Format::INT8];

pub(super) fn run(backend: &dyn Backend) {
    let b = Bench { backend };
    shapes(&b);
    runs_and_sequences(&b);
    masks(&b);
    keys_before_rope(&b);
    columns(&b);
    sinks(&b);
    edges(&b);
    refusals(&b);
}

/// Every group size, head dim and format, ragged heads, one query (decode) and several (prefill).
fn shapes(b: &Bench<'_>) {
    for group in [1, 3, 4, 8] {
        for dim in [8, 64, 80, 128] {
            for (f, format) in FORMATS.into_iter().enumerate() {
                for n in [1u32, 6] {
                    let mut noise = Noise::new((group * 1000 + dim * 10 + f) as u64 + u64::from(n));
                    let lengths = [1 + n, 31 + n, 96 + n];
                    let heads = lengths
                        .iter()
                        .map(|&t| vec![random(b, &mut noise, &dense(format), (dim, dim), (0..t).collect())])
                        .collect();
                    let from = 40;
                    Case {
                        what: format!("attend {format} D {dim} group {group}, {n} queries, ragged heads"),
                        q_heads: 3 * group,
                        k_dim: dim,
                        v_dim: dim,
                        rope: None,
                        mask: Mask::Causal,
                        window: None,
                        q: noise.normals(n as usize * 3 * group * dim),
                        seqs: vec![((from..from + n).collect(), from, heads)],
                        probes: Vec::new(),
                        tolerance: tolerance(format),
                    }
                    .check(b);
                }
            }
        }
    }
}

/// Runs of different codes merge; sequences of one batch do not see each other; key and value dims and codes differ.
fn runs_and_sequences(b: &Bench<'_>) {
    let mut noise = Noise::new(42);
    for (kd, vd) in [(64, 64), (80, 64), (128, 128)] {
        let mixed = [Code::rotated(Format::INT8), Code::plain(Format::F16)];
        let seq = |noise: &mut Noise, lengths: [[u32; 3]; 2]| {
            lengths
                .iter()
                .map(|l| {
                    let ends = [l[0], l[0] + l[1], l[0] + l[1] + l[2]];
                    vec![
                        random(b, noise, &dense(Format::INT8), (kd, vd), (0..ends[0]).collect()),
                        random(b, noise, &mixed, (kd, vd), (ends[0]..ends[1]).collect()),
                        random(b, noise, &dense(Format::F32), (kd, vd), (ends[1]..ends[2]).collect()),
                    ]
                })
                .collect::<Vec<_>>()
        };
        let seqs = vec![
            ((70..75).collect(), 70, seq(&mut noise, [[32, 33, 10], [0, 64, 11]])),
            (vec![3], 3, seq(&mut noise, [[0, 0, 4], [1, 1, 2]])),
            ((200..240).collect(), 200, seq(&mut noise, [[128, 64, 48], [160, 0, 80]])),
        ];
        Case {
            what: format!("attend three runs in three sequences, D {kd} Dv {vd}"),
            q_heads: 6,
            k_dim: kd,
            v_dim: vd,
            rope: None,
            mask: Mask::Causal,
            window: None,
            q: noise.normals(46 * 6 * kd),
            seqs,
            probes: Vec::new(),
            tolerance: 2e-4,
        }
        .check(b);
    }
}

/// Causal by position where rows lie in any order; full; windows; hidden rows; bias.
fn masks(b: &Bench<'_>) {
    let mut noise = Noise::new(6);
    for format in FORMATS {
        for (mask, window) in
            [(Mask::Causal, None), (Mask::Causal, Some(1)), (Mask::Causal, Some(50)), (Mask::Full, None)]
        {
            let dim = 64;
            let mut heads = Vec::new();
            for _ in 0..2 {
                let scattered = noise.ascending(70, 300);
                // Newer rows may lie before older ones.
                let (mut old, mut new): (Vec<u32>, Vec<u32>) = scattered.iter().partition(|&&p| p % 3 == 0);
                old.reverse();
                new.rotate_left(9);
                // Every query has a key at its own position, as after an append.
                let own = vec![5, 120, 121, 299];
                let bias: Vec<f32> =
                    (0..new.len()).map(|i| if i % 5 == 0 { HIDDEN } else { noise.normal() as f32 }).collect();
                heads.push(vec![
                    random(b, &mut noise, &dense(format), (dim, dim), old),
                    random(b, &mut noise, &dense(format), (dim, dim), new).with_bias(b, &bias),
                    random(b, &mut noise, &dense(format), (dim, dim), own),
                ]);
            }
            Case {
                what: format!(
                    "attend {format} {mask:?}, window {window:?}, scattered positions, hidden rows"
                ),
                q_heads: 4,
                k_dim: dim,
                v_dim: dim,
                rope: None,
                mask,
                window,
                q: noise.normals(4 * 4 * dim),
                seqs: vec![(vec![5, 120, 121, 299], 5, heads)],
                probes: Vec::new(),
                tolerance: tolerance(format),
            }
            .check(b);
        }
    }
}

/// Keys stored before RoPE turn when they are read; keys stored after it do not; both pairings.
fn keys_before_rope(b: &Bench<'_>) {
    let mut noise = Noise::new(15);
    for dim in [8, 64, 80] {
        for rope in ropes(dim) {
            for format in FORMATS {
                let plain = [Code::plain(format), Code::plain(format)];
                let heads = (0..2)
                    .map(|_| {
                        let (cold, hot) = (noise.ascending(40, 300), (300..345).collect());
                        vec![
                            random(b, &mut noise, &plain, (dim, dim), cold),
                            random(b, &mut noise, &dense(Format::F32), (dim, dim), hot),
                        ]
                    })
                    .collect();
                Case {
                    what: format!("attend {format} keys before {:?} beside rotated ones, D {dim}", rope.kind),
                    q_heads: 6,
                    k_dim: dim,
                    v_dim: dim,
                    rope: Some(rope.clone()),
                    mask: Mask::Causal,
                    window: None,
                    q: noise.normals(5 * 6 * dim),
                    seqs: vec![((340..345).collect(), 340, heads)],
                    probes: Vec::new(),
                    tolerance: 2.0 * tolerance(format),
                }
                .check(b);
            }
        }
    }
}

fn columns(b: &Bench<'_>) {
    let base = Probe::all_queries();
    let probes = vec![
        base.clone(),
        Probe { queries: Queries::Last(1), ..base.clone() },
        Probe { queries: Queries::Last(3), ..base.clone() }.layer_mean(),
        Probe { over: Over::Past, reduce: Reduce::Max, heads: Heads::KvMax, ..base.clone() },
        Probe { over: Over::Past, queries: Queries::Wanted, ..base.clone() },
        Probe { over: Over::Run(RunId(1)), ..base.clone() },
        base.layer_mean(),
    ];
    let mut noise = Noise::new(23);
    for format in FORMATS {
        for n in [1u32, 5, 40] {
            let dim = 64;
            // A mean over the layer needs heads of equal length.
            let (cold, hot) = (noise.ascending(50, 90), (90..100 + n).collect::<Vec<_>>());
            let heads = (0..2)
                .map(|_| {
                    vec![
                        random(b, &mut noise, &dense(format), (dim, dim), cold.clone()),
                        random(b, &mut noise, &dense(Format::F32), (dim, dim), hot.clone()),
                    ]
                })
                .collect();
            let other = (0..2)
                .map(|_| vec![random(b, &mut noise, &dense(Format::F32), (dim, dim), (0..9).collect())])
                .collect::<Vec<_>>();
            Case {
                what: format!("columns over {format}, {n} queries"),
                q_heads: 6,
                k_dim: dim,
                v_dim: dim,
                rope: None,
                mask: Mask::Causal,
                window: None,
                q: noise.normals((n as usize + 2) * 6 * dim),
                seqs: vec![
                    ((100..100 + n).collect(), 100, heads),
                    // A sequence whose heads have one run only; `Over::Run` finds nothing there.
                    (vec![7, 8], 7, other),
                ],
                probes: probes.clone(),
                // Forty queries add up.
                tolerance: 4.0 * tolerance(format),
            }
            .check(b);
        }
    }
}

/// One key 0 to 20 log2 units above 4095 others; the others' values must still count, or not, exactly as much as they do.
fn sinks(b: &Bench<'_>) {
    let dim = 128;
    for format in FORMATS {
        for sigma in [1.0f32, 0.005] {
            for above in [0.0f64, 4.0, 8.0, 12.0, 16.0, 20.0] {
                let mut noise = Noise::new(9);
                let n = 4096;
                let (mut k, mut v) = (noise.normals(n * dim), noise.normals(n * dim));
                for x in &mut v {
                    *x *= sigma;
                }
                // Only channel 0 counts in the query: the score is the key's channel 0.
                for t in 0..n {
                    k[t * dim] = 0.0;
                }
                let units = std::f64::consts::LN_2 * (dim as f64).sqrt();
                k[1000 * dim] = (above * units / 8.0) as f32;
                let mut q = vec![0.0; dim];
                q[0] = 8.0;
                let run = twin(b, &dense(format), (dim, dim), (0..n as u32).collect(), &k, &v);
                Case {
                    what: format!("attend {format}, a sink {above} log2 units above, value sigma {sigma}"),
                    q_heads: 1,
                    k_dim: dim,
                    v_dim: dim,
                    rope: None,
                    mask: Mask::Causal,
                    window: None,
                    q,
                    seqs: vec![(vec![n as u32 - 1], n as u32 - 1, vec![vec![run]])],
                    probes: Vec::new(),
                    tolerance: if format.is_dense() { 2e-6 } else { 5e-5 },
                }
                .check(b);
            }
        }
    }
}

/// Nothing visible; a single key; scores that dwarf all others; factors of rows.
fn edges(b: &Bench<'_>) {
    let mut noise = Noise::new(2);
    let dim = 64;
    let case = |what: &str, noise: &mut Noise, pos: Vec<u32>, heads: Vec<Vec<Twin>>| Case {
        what: what.into(),
        q_heads: 2,
        k_dim: dim,
        v_dim: dim,
        rope: None,
        mask: Mask::Causal,
        window: None,
        q: noise.normals(pos.len() * 2 * dim),
        seqs: vec![(pos.clone(), pos[0], heads)],
        probes: Vec::new(),
        tolerance: 2e-5,
    };
    for format in [Format::F32, Format::F16] {
        let runs = vec![random(b, &mut noise, &dense(format), (dim, dim), (10..50).collect())];
        case("attend where the first query sees nothing", &mut noise, vec![5, 12], vec![runs]).check(b);
    }
    case("attend over no rows at all", &mut noise, vec![0], vec![vec![]]).check(b);
    let empty = twin(b, &dense(Format::F16), (dim, dim), Vec::new(), &[], &[]);
    case("attend over an empty run", &mut noise, vec![0], vec![vec![empty]]).check(b);
    let mut k = noise.normals(100 * dim);
    for x in &mut k {
        *x *= 40.0;
    }
    let loud = twin(b, &dense(Format::F32), (dim, dim), (0..100).collect(), &k, &noise.normals(100 * dim));
    let mut loud = case("attend with loud keys", &mut noise, vec![99], vec![vec![loud]]);
    loud.tolerance = 2e-4;
    loud.check(b);

    // Factors of rows: applied, or refused; never passed over in silence.
    let scale: Vec<f32> = (0..40).map(|i| 0.5 + i as f32 / 20.0).collect();
    let run = random(b, &mut noise, &dense(Format::F32), (dim, dim), (0..40).collect());
    let run = run.with_scale(b, [&scale, &scale]);
    let scaled = case("attend with factors of rows", &mut noise, vec![39], vec![vec![run]]);
    let out = b.zeros(2 * dim);
    let call = Call::Attend(Box::new(scaled.call(b, &out, None, &[])));
    match b.backend.submit(call).and_then(|()| b.backend.read(&out, &mut [0; 4])) {
        Ok(()) => scaled.check(b),
        Err(e) => assert_eq!(e.code(), "Unsupported", "factors of rows are refused by name: {e}"),
    }
}

fn refusals(b: &Bench<'_>) {
    let mut noise = Noise::new(4);
    let good = random(b, &mut noise, &dense(Format::F16), (64, 64), (0..40).collect()).run;
    let attend = |q_heads: u16, q: usize, run: Run, rows: u32| {
        let out = b.zeros(2 * 64);
        let call = Attend {
            q: b.zeros(q),
            q_pos: vec![39].into(),
            q_rope: vec![39].into(),
            out: out.clone(),
            lse: None,
            q_heads,
            kv_heads: 1,
            k_dim: 64,
            v_dim: 64,
            scale: 0.125,
            rope: None,
            mask: Mask::Causal,
            window: None,
            seqs: vec![AttendSeq { rows: 0..rows, heads: vec![vec![run]], pass_from: 39 }],
            columns: Vec::new(),
        };
        (Call::Attend(Box::new(call)), out)
    };
    let refuse = |what: &str, (call, out): (Call, Buf)| b.refuses(what, call, &out);
    refuse("attend with a short q", attend(2, 64, good.clone(), 1));
    refuse("attend of rows that are not there", attend(2, 128, good.clone(), 2));
    let longer = Run { rows: 65, ..good.clone() };
    refuse("attend of more rows than there are tiles", attend(2, 128, longer, 1));
    let mut short = good.clone();
    let cut = short.tiles[0].codes.slice(0..128).expect("a slice");
    short.tiles = Arc::new(vec![Tile { codes: cut, own: true }, good.tiles[1].clone()]);
    refuse("attend over a short tile", attend(2, 128, short, 1));
    let mut unknown = good;
    unknown.codes[1].format = Format::E4m3;
    refuse("attend over a format without kernel", attend(2, 128, unknown, 1));
}
