//! Engines that run their own layers, and prefills that are cut off between passes.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use kvasir_core::{Batch, Hooks, LayerLayout, Layout, Logits, Model, Rope, SideId};
use kvasir_cpu::Isa;
use kvasir_engine::{Cancel, Dtype, Order, Session};
use kvasir_model::Llama;

use crate::support::{backend, cache, dense, ids, int8, model, open};

const ROWS: usize = 40;

fn layout() -> Arc<Layout> {
    let rope = Rope::Half(SideId(0));
    let layer = LayerLayout { q_heads: 4, kv_heads: 2, k_dim: 8, v_dim: 6, rope, window: None };
    Arc::new(Layout::uniform(2, layer, Arc::from([1.0, 0.3, 0.1, 0.03]), 64))
}

fn noise(n: usize, seed: usize) -> Vec<f32> {
    (0..n).map(|i| ((i * 7 + seed * 13) as f32 * 0.61).sin()).collect()
}

fn empty() -> Session {
    Session::new(backend(Isa::Scalar), layout(), dense(Dtype::F32)).unwrap()
}

/// `[L, T, K, D]` to `[L, K, T, D]`.
fn by_head(x: &[f32], d: usize) -> Vec<f32> {
    let mut out = Vec::new();
    for layer in x.chunks(ROWS * 2 * d) {
        for h in 0..2 {
            out.extend(layer.chunks(2 * d).flat_map(|token| &token[h * d..][..d]));
        }
    }
    out
}

#[test]
fn rows_are_the_same_layer_by_layer_and_all_at_once() {
    let (k, v) = (noise(2 * ROWS * 2 * 8, 1), noise(2 * ROWS * 2 * 6, 2));
    let mut stepped = empty();
    let mut pass = stepped.begin(ROWS as u32, &[]).unwrap();
    let q = noise(ROWS * 4 * 8, 3);
    let mut out = vec![0.0; ROWS * 4 * 6];
    for layer in 0..2 {
        let (k, v) = (&k[layer * ROWS * 16..][..ROWS * 16], &v[layer * ROWS * 12..][..ROWS * 12]);
        pass.attend_host(&mut stepped, layer, &q, k, v, &mut out).unwrap();
    }
    // The first query sees its own row only, so it gets its value back.
    let own = &v[ROWS * 12..][..6];
    assert!(out[..6].iter().zip(own).all(|(a, b)| (a - b).abs() < 1e-6));
    let report = pass.finish(&mut stepped, &Cancel::default()).unwrap();
    assert_eq!((report.computed, stepped.len()), (ROWS as u32, ROWS as u32));

    let mut at_once = empty();
    at_once.ingest(&k, &v, ROWS as u32, Order::Nhd, &[]).unwrap();
    assert_eq!(at_once.digest().unwrap(), stepped.digest().unwrap());
    let mut by_heads = empty();
    by_heads.ingest(&by_head(&k, 8), &by_head(&v, 6), ROWS as u32, Order::Hnd, &[]).unwrap();
    assert_eq!(by_heads.digest().unwrap(), stepped.digest().unwrap());
    assert_eq!(at_once.report().private.as_deref(), Some("rows of another engine"));
    assert_ne!(at_once.report().lineage, "exact");
}

#[test]
fn refused_rows_leave_nothing() {
    let (k, v) = (noise(2 * 3 * 16, 1), noise(2 * 3 * 12, 2));
    let mut session = empty();
    let before = session.digest().unwrap();
    // The first layer is in when the second turns out to hold a NaN.
    let mut bad = v.clone();
    bad[3 * 12 + 5] = f32::NAN;
    assert_eq!(session.ingest(&k, &bad, 3, Order::Nhd, &[]).unwrap_err().code(), "NonFinite");
    for (rows, code) in [(0, "InvalidArgument"), (2, "InvalidArgument"), (65, "InvalidArgument")] {
        assert_eq!(session.ingest(&k, &v, rows, Order::Nhd, &[]).unwrap_err().code(), code);
    }
    assert_eq!(session.ingest(&k, &v, 3, Order::Nhd, &[1]).unwrap_err().code(), "InvalidArgument");
    assert_eq!(session.begin(65, &[]).err().unwrap().code(), "ContextOverflow");
    assert_eq!((session.len(), session.digest().unwrap()), (0, before));
    assert_eq!((session.report().private, session.report().lineage.as_str()), (None, "exact"));
    let pass = session.begin(1, &[]).unwrap();
    assert_eq!(pass.finish(&mut session, &Cancel::default()).unwrap_err().code(), "InvalidArgument");
    session.ingest(&k, &v, 3, Order::Nhd, &[7, 8, 9]).unwrap();
    assert_eq!(session.ids(), [7, 8, 9]);
}

/// Asks for an end when the second pass begins.
struct CutOff<'a> {
    inner: &'a Llama,
    passes: AtomicU32,
    cancel: Cancel,
}

impl Model for CutOff<'_> {
    fn layout(&self) -> &Layout {
        self.inner.layout()
    }

    fn forward(&self, batch: &Batch, hooks: &mut dyn Hooks, out: &mut Logits) -> kvasir_core::Result<()> {
        if self.passes.fetch_add(1, Ordering::Relaxed) == 1 {
            self.cancel.cancel();
        }
        self.inner.forward(batch, hooks, out)
    }
}

#[test]
fn a_prefill_cut_off_between_passes_never_was() {
    let (backend, model) = model(Isa::Auto);
    let text = ids(500, 9);
    for make in [int8 as fn() -> _, || dense(Dtype::F16)] {
        let cache = cache(None, &backend);
        let mut session = open(&cache, &model, "acme", make());
        session.prefill(&model, &text[..100], &Cancel::default()).unwrap();
        let before = (session.digest().unwrap(), session.report(), session.logits().unwrap().to_vec());
        let cancel = Cancel::default();
        let cut = CutOff { inner: &model, passes: AtomicU32::new(0), cancel: cancel.clone() };
        let error = session.prefill(&cut, &text[100..], &cancel).unwrap_err();
        assert_eq!((error.code(), cancel.done(), cancel.total()), ("Cancelled", 256, 400));
        assert_eq!(session.ids(), &text[..100]);
        assert_eq!((session.digest().unwrap(), session.report(), session.logits().unwrap().to_vec()), before);

        session.prefill(&model, &text[100..], &Cancel::default()).unwrap();
        let mut twin = open(&cache, &model, "another", make());
        twin.prefill(&model, &text[..100], &Cancel::default()).unwrap();
        twin.prefill(&model, &text[100..], &Cancel::default()).unwrap();
        assert_eq!(session.digest().unwrap(), twin.digest().unwrap());
        assert_eq!(session.logits(), twin.logits());
    }
}
