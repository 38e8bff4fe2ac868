//! Plans: what they change, what a floor refuses.

use std::sync::Arc;

use kvasir_core::{
    At, Budget, ColId, KvPolicy, KvSpec, Layout, Model, Per, Pick, Plan, Positions, Probe, Result, Source,
    Trigger, View, Wake,
};
use kvasir_cpu::Isa;
use kvasir_engine::{Cancel, Dtype, Session, drive};
use serde_json::json;

use crate::support::{cache, dense, greedy, ids, int8, model, open, options};

/// Keeps the newest rows and those that drew most attention from all queries.
struct Heavy {
    budget: u32,
    recent: u32,
}

impl KvPolicy for Heavy {
    fn spec(&self, _: &Layout) -> Result<KvSpec> {
        let wake = Trigger::Over { budget: Budget::Rows(self.budget), slack_rows: 8 };
        Ok(KvSpec::dense().column(Source::Attention(Probe::all_queries())).wake(wake).evicts())
    }
    fn plan(&mut self, _: Wake, _: &View<'_>, plan: &mut Plan) -> Result<()> {
        let heavy = Pick::Top { col: ColId(0), n: self.budget - self.recent, per: Per::Head };
        plan.keep(At::all(), Pick::Last(self.recent).or(heavy));
        Ok(())
    }
}

#[test]
fn an_evicting_policy_stays_within_budget_and_slack() {
    let (backend, model) = model(Isa::Auto);
    let layout = Arc::new(model.layout().clone());
    let policy = Box::new(Heavy { budget: 40, recent: 10 });
    let mut s = Session::with_policies(backend, layout, dense(Dtype::F16), vec![policy]).unwrap();
    drive::prefill(&model, &mut s, &ids(100, 1), &Cancel::default()).unwrap();
    assert_eq!(s.rows(), 40);
    for _ in 0..30 {
        greedy(&model, &mut s, 1);
        assert!(s.rows() <= 48);
        for table in s.tables().iter().flatten() {
            let (run, last) = (&table.runs[0], s.len() - 1);
            let kept = run.meta.pos.to_vec(run.rows as usize);
            assert!(kept.windows(2).all(|w| w[0] < w[1]), "rows stay in order");
            assert_eq!(kept.last(), Some(&last), "the newest row stays");
        }
    }
    assert!(s.stats().applied > 1);
    let heads: std::collections::HashSet<Vec<u32>> =
        s.tables().iter().flatten().map(|t| t.runs[0].meta.pos.to_vec(t.runs[0].rows as usize)).collect();
    assert!(heads.len() > 1, "heads keep different rows");
}

#[test]
fn a_budget_that_is_never_reached_changes_nothing() {
    let (backend, model) = model(Isa::Scalar);
    let layout = Arc::new(model.layout().clone());
    let text = ids(90, 2);
    let mut plain = Session::new(Arc::clone(&backend), Arc::clone(&layout), dense(Dtype::F32)).unwrap();
    let policy = Box::new(Heavy { budget: 200, recent: 10 });
    let mut watched = Session::with_policies(backend, layout, dense(Dtype::F32), vec![policy]).unwrap();
    for s in [&mut plain, &mut watched] {
        drive::prefill(&model, s, &text, &Cancel::default()).unwrap();
    }
    assert_eq!(plain.digest().unwrap(), watched.digest().unwrap());
    assert_eq!(greedy(&model, &mut plain, 10), greedy(&model, &mut watched, 10));
}

#[test]
fn int8_keeps_sinks_exact_and_counts_coded_tiles() {
    let (backend, model) = model(Isa::Auto);
    let cache = cache(None, &backend);
    let mut s = open(&cache, &model, "acme", int8());
    s.prefill(&model, &ids(300, 3), &Cancel::default()).unwrap();
    let table = &s.tables()[0][0];
    assert_eq!(table.runs.iter().map(|r| r.rows).collect::<Vec<_>>(), [300 % 32, 288, 4]);
    assert_eq!(s.rows(), 300, "hidden slots do not count");
    assert_eq!(s.coded_tiles(), 9 * 5 * 4);
    let mut exact = open(&cache, &model, "other", dense(Dtype::F16));
    exact.prefill(&model, &ids(300, 3), &Cancel::default()).unwrap();
    let (pos, keys, values) = s.read_rows(0, 0, 2).unwrap();
    let (_, all_keys, all_values) = exact.read_rows(0, 0, 0).unwrap();
    assert_eq!(pos, [0, 1, 2, 3]);
    assert_eq!(keys, all_keys[..keys.len()]);
    assert_eq!(values, all_values[..values.len()]);
}

#[test]
fn an_impossible_floor_ends_bit_identical_to_dense() {
    let (backend, model) = model(Isa::Scalar);
    let cache = cache(None, &backend);
    let text = ids(280, 4);
    let floor = options(Dtype::F16, &json!([{ "use": "int8", "floor": 0 }]));
    let mut refused = open(&cache, &model, "a", floor);
    let mut plain = open(&cache, &model, "b", dense(Dtype::F16));
    for s in [&mut refused, &mut plain] {
        s.prefill(&model, &text, &Cancel::default()).unwrap();
    }
    assert_eq!(refused.coded_tiles(), 0);
    assert!(refused.stats().refused > 0);
    assert_eq!(refused.stats().applied, 0);
    assert_eq!(refused.logits(), plain.logits());

    let generous = options(Dtype::F16, &json!([{ "use": "int8", "floor": 0.5 }]));
    let mut accepted = open(&cache, &model, "c", generous);
    accepted.prefill(&model, &text, &Cancel::default()).unwrap();
    assert!(accepted.coded_tiles() > 0);
    assert_eq!(accepted.stats().refused, 0);
}

#[test]
fn a_harsh_recipe_shows_in_kl() {
    let (backend, model) = model(Isa::Auto);
    let text = ids(400, 5);
    let evaluate = |session| {
        let o = drive::EvaluateOptions {
            ids: text.clone(),
            chunk: 0,
            chunks: 1,
            prefix: 0,
            bos: Some(1),
            session,
            dense: true,
        };
        drive::evaluate(&model, &backend, &o, &Cancel::default()).unwrap()
    };
    let lossless = evaluate(dense(Dtype::F32));
    assert_eq!((lossless.kl, lossless.top1, lossless.coded_tiles), (0.0, 1.0, 0));
    assert_eq!(lossless.tokens, 400);
    let coded = evaluate(int8());
    assert!(coded.kl > 0.0 && coded.coded_tiles > 0, "{coded:?}");
    assert!(coded.kl < 0.05, "{coded:?}");
}

/// StreamingLLM's shape: sinks and a window, positions counted among the kept rows.
struct Window {
    rows: u32,
}

impl KvPolicy for Window {
    fn spec(&self, _: &Layout) -> Result<KvSpec> {
        let wake = Trigger::Over { budget: Budget::Rows(self.rows), slack_rows: 4 };
        Ok(KvSpec::dense().wake(wake).positions(Positions::Packed).evicts())
    }
    fn plan(&mut self, _: Wake, _: &View<'_>, plan: &mut Plan) -> Result<()> {
        plan.keep(At::all(), Pick::First(4).or(Pick::Last(self.rows - 4)));
        Ok(())
    }
}

#[test]
fn packed_positions_stream_past_the_context() {
    let (backend, model) = model(Isa::Auto);
    let layout = Arc::new(model.layout().clone());
    let text = ids(100, 6);
    let mut plain = Session::new(Arc::clone(&backend), Arc::clone(&layout), dense(Dtype::F32)).unwrap();
    let new = |rows| {
        let window = vec![Box::new(Window { rows }) as Box<dyn KvPolicy>];
        Session::with_policies(Arc::clone(&backend), Arc::clone(&layout), dense(Dtype::F32), window).unwrap()
    };
    // While nothing is dropped, packed and original positions are the same.
    let mut roomy = new(300);
    for s in [&mut plain, &mut roomy] {
        drive::prefill(&model, s, &text, &Cancel::default()).unwrap();
        greedy(&model, s, 5);
    }
    let gap = plain
        .logits()
        .unwrap()
        .iter()
        .zip(roomy.logits().unwrap())
        .map(|(a, b)| (a - b).abs())
        .fold(0.0, f32::max);
    assert!(gap < 1e-3, "gap {gap}");

    let mut stream = new(64);
    drive::prefill(&model, &mut stream, &ids(900, 7), &Cancel::default()).unwrap();
    greedy(&model, &mut stream, 20);
    assert_eq!(stream.len(), 920);
    assert!(stream.rows() <= 68);
    assert!(stream.logits().unwrap().iter().all(|x| x.is_finite()));
    let kept = stream.tables()[0][0].runs[0].meta.pos.to_vec(4);
    assert_eq!(kept, [0, 1, 2, 3]);
}
