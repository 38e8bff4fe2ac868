//! Random attention calls and their naive f64 answer: tiles by the packer of the test kit, no code of the backend.

use std::sync::Arc;

use kvasir_core::{
    Attend, AttendSeq, Backend, Buf, Call, Code, Codes, ColumnUpdate, Format, HIDDEN, Heads, KeySpace, Mask,
    Meta, Over, Pos, Probe, Queries, Reduce, Rope, RopeArg, Run, SideId, Tile,
};
use kvasir_testkit::Noise;
use kvasir_testkit::pack::{beside, in_row_order, pack, unpack};

/// Rows of one run as the oracle sees them.
#[derive(Clone, Debug)]
pub(crate) struct SceneRun {
    pub(crate) codes: Codes,
    pub(crate) pos: Vec<u32>,
    k: Vec<f32>,
    v: Vec<f32>,
    bias: Option<Vec<f32>>,
    scale: [Option<Vec<f32>>; 2],
}

#[derive(Clone, Debug)]
pub(crate) struct SceneSeq {
    /// Position of each query row.
    pub(crate) rows: Vec<u32>,
    pub(crate) pass_from: u32,
    pub(crate) heads: Vec<Vec<SceneRun>>,
}

#[derive(Clone, Debug)]
pub(crate) struct Scene {
    pub(crate) kv_heads: usize,
    pub(crate) group: usize,
    pub(crate) d: usize,
    pub(crate) dv: usize,
    pub(crate) rope: Rope,
    inv_freq: Arc<[f32]>,
    pub(crate) mask: Mask,
    pub(crate) window: Option<u32>,
    pub(crate) seqs: Vec<SceneSeq>,
    q: Vec<f32>,
    pub(crate) probes: Vec<Probe>,
}

/// What shapes a scene may take.
#[derive(Clone, Debug)]
pub(crate) struct Spec {
    pub(crate) seed: u64,
    pub(crate) kv_heads: usize,
    pub(crate) group: usize,
    pub(crate) d: usize,
    pub(crate) dv: usize,
    /// Query rows of each sequence.
    pub(crate) rows: Vec<usize>,
    /// Past rows of each run, and the codes.
    pub(crate) runs: Vec<(usize, Codes)>,
    pub(crate) rope: Rope,
    pub(crate) mask: Mask,
    pub(crate) window: Option<u32>,
    pub(crate) bias: bool,
    pub(crate) scale: bool,
    /// Heads hold different numbers of rows.
    pub(crate) ragged: bool,
    pub(crate) probes: Vec<Probe>,
}

pub(crate) fn codes(space: KeySpace, k: Format, v: Format) -> Codes {
    let key = if space == KeySpace::Rotated { Code::rotated(k) } else { Code::plain(k) };
    [key, Code::plain(v)]
}

/// Outputs of a call.
#[derive(Debug, PartialEq)]
pub(crate) struct Answer {
    pub(crate) out: Vec<f32>,
    pub(crate) lse: Vec<f32>,
    /// `[probe][seq][head][run]` rows in row order.
    pub(crate) columns: Vec<Vec<Vec<Vec<Vec<f32>>>>>,
}

impl Scene {
    /// The open run (the first) gets the rows of the pass behind its past rows.
    pub(crate) fn random(spec: &Spec) -> Self {
        let mut noise = Noise::new(spec.seed);
        let pairs = spec.d / 2;
        let inv_freq = (0..pairs).map(|i| 10_000f32.powf(-(i as f32) / pairs as f32)).collect();
        let h = spec.kv_heads * spec.group;
        let mut seqs = Vec::new();
        for &n in &spec.rows {
            let past: usize = spec.runs.iter().map(|r| r.0).sum();
            let mut heads = Vec::new();
            for head in 0..spec.kv_heads {
                let mut runs = Vec::new();
                // Colder runs hold older positions; the open run comes last in time.
                let mut next = 0u32;
                let mut spans = vec![Vec::new(); spec.runs.len()];
                for (r, (rows, _)) in spec.runs.iter().enumerate().rev() {
                    for _ in 0..*rows {
                        // Gaps and neighbours: positions of evicted rows are missing.
                        if spec.ragged && (noise.bits() + head as u64).is_multiple_of(5) {
                            next += 1;
                            continue;
                        }
                        spans[r].push(next);
                        next += 1;
                    }
                }
                for (r, (_, codes)) in spec.runs.iter().enumerate() {
                    let mut pos = spans[r].clone();
                    if r == 0 {
                        pos.extend((0..n).map(|i| (past + i) as u32));
                    }
                    let rows = pos.len();
                    let bias = spec.bias.then(|| {
                        let bias =
                            |_| if noise.bits().is_multiple_of(4) { HIDDEN } else { noise.normal() as f32 };
                        (0..rows).map(bias).collect()
                    });
                    let mut factor =
                        || spec.scale.then(|| (0..rows).map(|_| 1.0 + 0.2 * noise.normal() as f32).collect());
                    let scale = [factor(), factor()];
                    let (k, v) = (noise.normals(rows * spec.d), noise.normals(rows * spec.dv));
                    runs.push(SceneRun { codes: codes.clone(), pos, k, v, bias, scale });
                }
                heads.push(runs);
            }
            seqs.push(SceneSeq {
                rows: (past as u32..(past + n) as u32).collect(),
                pass_from: past as u32,
                heads,
            });
        }
        let n: usize = spec.rows.iter().sum();
        Self {
            kv_heads: spec.kv_heads,
            group: spec.group,
            d: spec.d,
            dv: spec.dv,
            rope: spec.rope,
            inv_freq,
            mask: spec.mask,
            window: spec.window,
            seqs,
            q: noise.normals(n * h * spec.d).iter().map(|x| x * 1.5).collect(),
            probes: spec.probes.clone(),
        }
    }

    pub(crate) fn n(&self) -> usize {
        self.seqs.iter().map(|s| s.rows.len()).sum()
    }

    fn run_of(&self, backend: &dyn Backend, r: &SceneRun) -> Run {
        let rows = r.pos.len();
        let tiles =
            r.k.chunks(32 * self.d)
                .zip(r.v.chunks(32 * self.dv))
                .map(|(k, v)| {
                    let bytes = pack(&r.codes, self.d, self.dv, k, v);
                    Tile { codes: backend.upload(&bytes).expect("upload"), own: true }
                })
                .collect();
        // Beyond the rows anything may lie.
        let beside =
            |x: &Option<Vec<f32>>| x.as_ref().map(|x| backend.upload_f32(&beside(x, 3.0)).expect("upload"));
        Run {
            codes: r.codes.clone(),
            tiles: Arc::new(tiles),
            rows: rows as u32,
            meta: Meta {
                pos: Pos::from_list(r.pos.clone()),
                bias: beside(&r.bias),
                scale: [beside(&r.scale[0]), beside(&r.scale[1])],
                cols: Vec::new(),
            },
        }
    }

    /// The call, on fresh buffers.
    pub(crate) fn call(&self, backend: &dyn Backend) -> Attend {
        let (n, h) = (self.n(), self.kv_heads * self.group);
        let mut from = 0;
        let seqs: Vec<AttendSeq> = self
            .seqs
            .iter()
            .map(|s| {
                let rows = from..from + s.rows.len() as u32;
                from = rows.end;
                let heads = s
                    .heads
                    .iter()
                    .map(|runs| runs.iter().map(|r| self.run_of(backend, r)).collect())
                    .collect();
                AttendSeq { rows, heads, pass_from: s.pass_from }
            })
            .collect();
        let target = |run: &Run| Some(backend.alloc(run.tiles.len() * 128).expect("alloc"));
        let columns = self
            .probes
            .iter()
            .map(|probe| ColumnUpdate {
                probe: probe.clone(),
                targets: seqs
                    .iter()
                    .map(|s| s.heads.iter().map(|runs| runs.iter().map(target).collect()).collect())
                    .collect(),
            })
            .collect();
        let pos: Arc<[u32]> = self.seqs.iter().flat_map(|s| s.rows.iter().copied()).collect();
        Attend {
            q: backend.upload_f32(&self.q).expect("upload"),
            q_pos: Arc::clone(&pos),
            q_rope: pos,
            out: backend.alloc(n * h * self.dv * 4).expect("alloc"),
            lse: Some(backend.alloc(n * h * 4).expect("alloc")),
            q_heads: h as u16,
            kv_heads: self.kv_heads as u16,
            k_dim: self.d as u16,
            v_dim: self.dv as u16,
            scale: 1.0 / (self.d as f32).sqrt(),
            rope: (self.rope != Rope::None)
                .then(|| RopeArg { kind: self.rope, inv_freq: Arc::clone(&self.inv_freq) }),
            mask: self.mask,
            window: self.window,
            seqs,
            columns,
        }
    }

    /// Runs the call and reads everything back.
    pub(crate) fn run(&self, backend: &dyn Backend) -> Answer {
        let call = self.call(backend);
        backend.submit(Call::Attend(Box::new(call.clone()))).expect("attend");
        let read = |b: &Buf| backend.read_f32(b).expect("read");
        let columns = call
            .columns
            .iter()
            .map(|c| {
                let seqs = c.targets.iter().zip(&self.seqs);
                seqs.map(|(heads, s)| {
                    let heads = heads.iter().zip(&s.heads);
                    heads
                        .map(|(runs, s)| {
                            let runs = runs.iter().zip(s);
                            runs.map(|(b, r)| in_row_order(&read(b.as_ref().expect("a target")), r.pos.len()))
                                .collect()
                        })
                        .collect()
                })
                .collect()
            })
            .collect();
        Answer { out: read(&call.out), lse: read(call.lse.as_ref().expect("lse")), columns }
    }

    fn rotate(&self, row: &[f64], pos: u32) -> Vec<f64> {
        let half = row.len() / 2;
        let mut out = row.to_vec();
        for i in 0..half {
            let (a, b) = match self.rope {
                Rope::None => return out,
                Rope::Half(_) => (i, i + half),
                Rope::Adjacent(_) => (2 * i, 2 * i + 1),
            };
            let (sin, cos) = (f64::from(pos) * f64::from(self.inv_freq[i])).sin_cos();
            out[a] = row[a] * cos - row[b] * sin;
            out[b] = row[b] * cos + row[a] * sin;
        }
        out
    }

    /// The naive answer. Also returns the largest of what the tolerance has to scale with: absolute sums of columns.
    pub(crate) fn oracle(&self) -> Answer {
        let h = self.kv_heads * self.group;
        let (mut out, mut lse) = (Vec::new(), Vec::new());
        // columns[probe][seq][head][run][row]
        let mut columns: Vec<Vec<Vec<Vec<Vec<f32>>>>> = vec![Vec::new(); self.probes.len()];
        let mut q_rows = self.q.chunks_exact(h * self.d);
        for s in &self.seqs {
            // Keys of each head: decoded, scaled, rotated; values; position; bias; run.
            struct Key {
                k: Vec<f64>,
                v: Vec<f64>,
                pos: u32,
                bias: f64,
                hidden: bool,
                run: usize,
            }
            let keys: Vec<Vec<Key>> = s
                .heads
                .iter()
                .map(|runs| {
                    let mut keys = Vec::new();
                    for (run, r) in runs.iter().enumerate() {
                        for (t, (k, v)) in r.k.chunks(32 * self.d).zip(r.v.chunks(32 * self.dv)).enumerate() {
                            let rows = k.len() / self.d;
                            let bytes = pack(&r.codes, self.d, self.dv, k, v);
                            let (k, v) = unpack(&r.codes, self.d, self.dv, &bytes, rows);
                            for i in 0..rows {
                                let at = t * 32 + i;
                                let factor =
                                    |s: &Option<Vec<f32>>| s.as_ref().map_or(1.0, |s| f64::from(s[at]));
                                let row = |x: &[f32], d: usize, f: f64| -> Vec<f64> {
                                    x[i * d..][..d].iter().map(|x| f64::from(*x) * f).collect()
                                };
                                let pos = r.pos[at];
                                let k = row(&k, self.d, factor(&r.scale[0]));
                                let k = if r.codes[0].space == KeySpace::Plain {
                                    self.rotate(&k, pos)
                                } else {
                                    k
                                };
                                let bias = r.bias.as_ref().map_or(0.0, |b| f64::from(b[at]));
                                keys.push(Key {
                                    k,
                                    v: row(&v, self.dv, factor(&r.scale[1])),
                                    pos,
                                    bias,
                                    hidden: bias < -1e29,
                                    run,
                                });
                            }
                        }
                    }
                    keys
                })
                .collect();
            // scores[row][head][key], natural log units, None where not seen.
            let mut scores = Vec::new();
            for &pos in &s.rows {
                let q = q_rows.next().expect("a row");
                let mut heads = Vec::new();
                for head in 0..h {
                    let q: Vec<f64> = q[head * self.d..][..self.d].iter().map(|x| f64::from(*x)).collect();
                    let q = self.rotate(&q, pos);
                    let of_head: Vec<Option<f64>> = keys[head / self.group]
                        .iter()
                        .map(|key| {
                            let seen = !key.hidden
                                && (self.mask == Mask::Full || key.pos <= pos)
                                && self.window.is_none_or(|w| pos.saturating_sub(key.pos) < w);
                            let dot: f64 = q.iter().zip(&key.k).map(|(a, b)| a * b).sum();
                            seen.then_some(dot / (self.d as f64).sqrt() + key.bias * std::f64::consts::LN_2)
                        })
                        .collect();
                    let total: f64 = of_head.iter().flatten().map(|s| s.exp()).sum();
                    lse.push(if total == 0.0 { HIDDEN } else { total.ln() as f32 });
                    for c in 0..self.dv {
                        let sum: f64 = of_head
                            .iter()
                            .zip(&keys[head / self.group])
                            .filter_map(|(s, key)| s.map(|s| s.exp() * key.v[c]))
                            .sum();
                        out.push(if total == 0.0 { 0.0 } else { (sum / total) as f32 });
                    }
                    heads.push(of_head);
                }
                scores.push(heads);
            }
            for (probe, columns) in self.probes.iter().zip(&mut columns) {
                let rows = match probe.queries {
                    Queries::Last(n) => s.rows.len().saturating_sub(n as usize)..s.rows.len(),
                    _ => 0..s.rows.len(),
                };
                let inside = |key: &Key| match probe.over {
                    Over::All => true,
                    Over::Past => key.pos < s.pass_from,
                    Over::Run(r) => key.run == r.0 as usize,
                };
                let p_of = |row: usize, head: usize, i: usize| -> Option<f64> {
                    let keys = &keys[head / self.group];
                    let part = || {
                        scores[row][head].iter().zip(keys).filter(|(_, k)| inside(k)).filter_map(|(s, _)| *s)
                    };
                    let total: f64 = part().map(f64::exp).sum();
                    scores[row][head][i].filter(|_| inside(&keys[i])).map(|s| s.exp() / total)
                };
                let of_heads = (0..self.kv_heads)
                    .map(|kv| {
                        let mut runs: Vec<Vec<f32>> = s.heads[kv].iter().map(|_| Vec::new()).collect();
                        for (i, key) in keys[kv].iter().enumerate() {
                            let (mut folded, mut seen) = (0.0f64, 0u32);
                            for row in rows.clone() {
                                let heads = match probe.heads {
                                    Heads::LayerMean => 0..h,
                                    _ => kv * self.group..(kv + 1) * self.group,
                                };
                                let p: Vec<Option<f64>> = heads.map(|head| p_of(row, head, i)).collect();
                                seen += u32::from(p.iter().any(Option::is_some));
                                let p: Vec<f64> = p.into_iter().map(Option::unwrap_or_default).collect();
                                let one = match probe.heads {
                                    Heads::KvMax => p.iter().copied().fold(0.0, f64::max),
                                    _ => p.iter().sum::<f64>() / p.len() as f64,
                                };
                                match probe.reduce {
                                    Reduce::Max => folded = folded.max(one),
                                    _ => folded += one,
                                }
                            }
                            if probe.reduce == Reduce::MeanVisible {
                                folded /= f64::from(seen.max(1));
                            }
                            runs[key.run].push(folded as f32);
                        }
                        runs
                    })
                    .collect();
                columns.push(of_heads);
            }
        }
        Answer { out, lse, columns }
    }
}

/// Largest difference of two answers.
pub(crate) fn distance(a: &Answer, b: &Answer) -> f32 {
    let flat = |x: &Answer| -> Vec<f32> {
        x.out
            .iter()
            .chain(&x.lse)
            .chain(x.columns.iter().flatten().flatten().flatten().flatten())
            .copied()
            .collect()
    };
    let (a, b) = (flat(a), flat(b));
    assert_eq!(a.len(), b.len());
    a.iter()
        .zip(&b)
        .map(|(x, y)| if x == y { 0.0 } else { (x - y).abs() })
        .fold(0.0, |m, x| if x > m || x.is_nan() { x } else { m })
}

pub(crate) const HALF: Rope = Rope::Half(SideId(0));
pub(crate) const ADJACENT: Rope = Rope::Adjacent(SideId(0));
