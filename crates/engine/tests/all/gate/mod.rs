//! The first gate: five methods that a cache below the model cannot do, through `Model`, `Hooks`, wants and drivers, on the
//! bundled model and the scalar backend, against f64 versions that know none of these. Each runs at its exact end and at a
//! middle setting; a spy counts the rows that each layer and part computed.
//!
//! The flows are test code; their words (passes, wants, columns, hooks) are the product's.

#![allow(clippy::unwrap_used)] // helpers of tests

mod cacheblend;
mod dkv;
mod elastic;
mod epicache;
mod kvshare;

use std::sync::Arc;

use kvasir_core::{
    Ask, Backend, Batch, Hooks, KeySpace, KvPolicy, KvSpec, Layout, Logits, Mask, Model, Part, Plan, Point,
    Result, Rows, View, Wake, Want,
};
use kvasir_cpu::Isa;
use kvasir_engine::{Dtype, Pass, Passes, Recipe, Session, SessionOptions, select};
use kvasir_model::Llama;
use kvasir_testkit::oracle::{Kv, NaiveLlama, Row};
use kvasir_testkit::{Watched, computed};

use crate::support;

/// Largest difference between f32 and f64 arithmetic allowed, in logits, keys and values (all of order 1 to 10).
const TOLERANCE: f64 = 2e-4;

/// Every choice of the oracle must be this clear, so that f32 arithmetic cannot choose otherwise.
const CLEAR: f64 = 5e-4;

struct Bench {
    backend: Arc<dyn Backend>,
    model: Llama,
    naive: NaiveLlama,
}

fn bench() -> Bench {
    let (backend, model) = support::model(Isa::Scalar);
    Bench { backend, model, naive: NaiveLlama::from_gguf(support::testdata("models/stories260K-f32.gguf")) }
}

/// Tokens of a book.
fn text(range: std::ops::Range<usize>) -> Vec<u32> {
    let bytes = std::fs::read(support::testdata("golden/alice.tok512.u16")).unwrap();
    range.map(|i| u32::from(u16::from_le_bytes([bytes[2 * i], bytes[2 * i + 1]]))).collect()
}

/// Every query sees every key.
struct FullMask;

impl KvPolicy for FullMask {
    fn spec(&self, _: &Layout) -> Result<KvSpec> {
        Ok(KvSpec { mask: Mask::Full, ..KvSpec::dense() })
    }
    fn plan(&mut self, _: Wake, _: &View<'_>, _: &mut Plan) -> Result<()> {
        Ok(())
    }
}

impl Bench {
    /// A session with f32 rows and keys before RoPE.
    fn session(&self, policies: Vec<Box<dyn KvPolicy>>) -> Session {
        let options = SessionOptions { dtype: Dtype::F32, keys: KeySpace::Plain, recipe: Recipe::default() };
        let layout = Arc::new(self.model.layout().clone());
        Session::with_policies(Arc::clone(&self.backend), layout, options, policies).unwrap()
    }

    fn layers(&self) -> usize {
        self.model.layout().layers.len()
    }

    /// Puts rows of another session, from position `from` on, behind the rows of `session`, as an engine brings rows that it
    /// computed elsewhere. Keys are not rotated yet, so they may move.
    fn bring(&self, session: &mut Session, ids: &[u32], source: &Session, from: usize) {
        let pos: Vec<u32> = (session.len()..session.len() + ids.len() as u32).collect();
        let mut pass = Pass::begin(session, ids, &pos).unwrap();
        for layer in 0..self.layers() {
            let (k, v) = rows_of(source, layer);
            let rows = |x: &[Vec<f32>]| {
                let data = self.backend.upload_f32(&x[from..from + ids.len()].concat()).unwrap();
                let of = std::iter::once(0..ids.len() as u32).collect();
                Rows { data, dim: x[0].len() as u32, pos: pos.clone(), of }
            };
            pass.append(session, layer, &rows(&k), &rows(&v)).unwrap();
        }
        pass.end(session, false).unwrap();
    }
}

/// Keys and values of a layer, `[T][K * D]`, in position order.
fn rows_of(session: &Session, layer: usize) -> (Vec<Vec<f32>>, Vec<Vec<f32>>) {
    let (mut keys, mut values): (Vec<Vec<f32>>, Vec<Vec<f32>>) = (Vec::new(), Vec::new());
    for head in 0..session.layout().layers[layer].kv_heads as usize {
        let (pos, k, v) = session.read_rows(layer, head, 0).unwrap();
        let n = pos.len();
        assert_eq!(pos, (0..n as u32).collect::<Vec<_>>(), "rows of layer {layer}, head {head}");
        keys.resize(n, Vec::new());
        values.resize(n, Vec::new());
        for (i, (k, v)) in k.chunks(k.len() / n).zip(v.chunks(v.len() / n)).enumerate() {
            keys[i].extend_from_slice(k);
            values[i].extend_from_slice(v);
        }
    }
    (keys, values)
}

fn wide(rows: &[Vec<f32>]) -> Vec<Row> {
    rows.iter().map(|r| r.iter().map(|&x| f64::from(x)).collect()).collect()
}

fn floats(rows: &Rows, backend: &Arc<dyn Backend>) -> Vec<Vec<f32>> {
    let all = backend.read_f32(&rows.data).unwrap();
    all.chunks(rows.dim as usize).map(<[f32]>::to_vec).collect()
}

fn far(got: &[f32], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len());
    got.iter().zip(want).fold(0.0, |m, (g, w)| m.max((f64::from(*g) - w).abs()))
}

fn close(what: &str, got: &[f32], want: &[f64]) {
    let off = far(got, want);
    assert!(off < TOLERANCE, "{what}: {off:.1e} from the oracle");
}

/// The first `rows` keys and values of all layers are those of the oracle.
fn close_rows(what: &str, session: &Session, want: &[Kv], rows: usize) {
    for (layer, want) in want.iter().enumerate() {
        let (k, v) = rows_of(session, layer);
        for t in 0..rows {
            close(&format!("{what}: key {t} of layer {layer}"), &k[t], &want.k[t]);
            close(&format!("{what}: value {t} of layer {layer}"), &v[t], &want.v[t]);
        }
    }
}

/// The first `rows` rows of two sessions are the same bits.
fn same_rows(what: &str, a: &Session, b: &Session, rows: usize) {
    for layer in 0..a.layout().layers.len() {
        let (a, b) = (rows_of(a, layer), rows_of(b, layer));
        assert!(a.0[..rows] == b.0[..rows] && a.1[..rows] == b.1[..rows], "{what}: layer {layer} differs");
    }
}

/// One pass of one session with `hooks` around it; gives the logits asked for.
fn pass(model: &dyn Model, batch: &Batch, session: &mut Session) -> Logits {
    let begun = Pass::begin(session, &batch.ids, &batch.pos).unwrap();
    let mut passes = Passes::new(vec![(begun, session)]);
    let mut logits = Logits::default();
    model.forward(batch, &mut passes, &mut logits).unwrap();
    passes.end(false).unwrap();
    logits
}

/// What a step gave equals, bit for bit, what a session without a past computes over all `ids`.
fn uncached(what: &str, b: &Bench, ids: &[u32], session: &Session, logits: &Logits) {
    let mut fresh = b.session(vec![Box::new(FullMask)]);
    let all = pass(&b.model, &Batch::one(ids, 0, Ask::All), &mut fresh);
    assert_eq!(logits.data, all.data, "{what}: bits of an uncached step");
    assert_eq!(session.digest().unwrap(), fresh.digest().unwrap(), "{what}: rows of an uncached step");
}

/// Rows that each layer computed are `want`, in both parts.
fn count(what: &str, watched: &Watched<'_>, attention: &[u32], mlp: &[u32]) {
    let counts = watched.take();
    assert_eq!(computed(&counts, Part::Attention), attention, "{what}: rows of the attention blocks");
    assert_eq!(computed(&counts, Part::Mlp), mlp, "{what}: rows of the feed-forward blocks");
}

/// Which positions go on, decided at the check layer from fresh and cached rows.
type Choose<'a> = dyn FnMut(&Session, &Rows, &Rows, &Rows) -> Vec<u32> + 'a;

/// Where the rows shrink.
#[derive(Clone, Copy, PartialEq)]
enum Shrink {
    /// In the attention of the check layer: fewer queries than keys.
    Queries,
    /// Before the next layer, by a want that the pass serves.
    Want,
}

/// Hooks of CacheBlend and KVShare: compare at layer 1, then go on with fewer rows.
struct Blend<'a, 'b> {
    passes: Passes<'a>,
    choose: &'b mut Choose<'b>,
    shrink: Shrink,
}

impl Hooks for Blend<'_, '_> {
    fn enter(&mut self, at: Point, x: &mut Rows, gate: Option<&kvasir_core::Buf>) -> Result<kvasir_core::Go> {
        self.passes.enter(at, x, gate)
    }

    fn attend(&mut self, at: Point, q: &Rows, k: &Rows, v: &Rows, out: &mut Rows) -> Result<()> {
        if at.layer != 1 {
            return self.passes.attend(at, q, k, v, out);
        }
        let session = self.passes.session(0);
        let pos = (self.choose)(session, q, k, v);
        if self.shrink == Shrink::Want {
            session.wants().push_back(Want::Rows { pos, from_layer: 2 });
            return self.passes.attend(at, q, k, v, out);
        }
        let idx: Vec<u32> = (0..q.len() as u32).filter(|&i| pos.contains(&q.pos[i as usize])).collect();
        let q = select(session.backend(), q, &idx)?;
        out.data = out.data.slice(0..idx.len() * out.dim as usize * 4)?;
        out.pos.clone_from(&q.pos);
        out.of.clone_from(&q.of);
        self.passes.attend(at, &q, k, v, out)
    }
}

/// Runs `batch` with rows that shrink after the check layer.
fn blend(
    model: &dyn Model,
    batch: &Batch,
    session: &mut Session,
    shrink: Shrink,
    choose: &mut Choose<'_>,
) -> Logits {
    let begun = Pass::begin(session, &batch.ids, &batch.pos).unwrap();
    let mut hooks = Blend { passes: Passes::new(vec![(begun, session)]), choose, shrink };
    let mut logits = Logits::default();
    model.forward(batch, &mut hooks, &mut logits).unwrap();
    hooks.passes.end(true).unwrap();
    logits
}

/// The `k` largest, the older where equal, ascending.
fn top(score: &[f64], k: usize) -> Vec<u32> {
    let mut order: Vec<u32> = (0..score.len() as u32).collect();
    order.sort_by(|&a, &b| score[b as usize].total_cmp(&score[a as usize]).then(a.cmp(&b)));
    order.truncate(k);
    order.sort_unstable();
    order
}
