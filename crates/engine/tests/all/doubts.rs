//! Mixed cases: recipes of two methods, copies of one block in two codes, sessions that a resume brought back in part.

use std::collections::HashMap;
use std::sync::Arc;

use kvasir_core::{
    At, Budget, KvPolicy, KvSpec, Layout, Model, Pick, Plan, Positions, Result, Trigger, View, Wake, Want,
};
use kvasir_cpu::Isa;
use kvasir_engine::{Cancel, Dtype, Order, Session, SessionOptions, drive};
use kvasir_store::{CodecId, Copies, Draft};
use serde_json::{Value as Json, json};

use crate::support::{backend, cache, dense, greedy, ids, int8, model, open, options};

/// Position to key and value of the rows in one run of layer 1, head 0.
fn rows_by_position(s: &Session, run: usize) -> HashMap<u32, (Vec<f32>, Vec<f32>)> {
    let (pos, keys, values) = s.read_rows(1, 0, run).unwrap();
    let (d, dv) = (keys.len() / pos.len().max(1), values.len() / pos.len().max(1));
    let row = |(i, &p): (usize, &u32)| {
        (p, (keys[i * d..(i + 1) * d].to_vec(), values[i * dv..(i + 1) * dv].to_vec()))
    };
    pos.iter().enumerate().map(row).collect()
}

/// Rows are what they were when they are coded behind a run that evictions left with a partly filled tile.
#[test]
fn coded_rows_stay_what_they_are_when_some_are_evicted() {
    let (backend, model) = model(Isa::Auto);
    let cache = cache(None, &backend);
    let recipe = json!([{ "use": "int8" }, { "use": "streaming-llm", "sinks": 4, "recent": 50 }]);
    let mut s = open(&cache, &model, "acme", options(Dtype::F16, &recipe));
    s.prefill(&model, &ids(100, 1), &Cancel::default()).unwrap();
    let (mut exact, mut known) = (HashMap::new(), HashMap::new());
    for _ in 0..120 {
        greedy(&model, &mut s, 1);
        exact.extend(rows_by_position(&s, 0));
        for run in s.tables().iter().flatten().flat_map(|t| &t.runs) {
            assert_eq!(run.tiles.len(), (run.rows as usize).div_ceil(32), "no tile without rows");
        }
        assert!(s.rows() <= 54);
        for (p, row) in rows_by_position(&s, 1) {
            if let Some((key, _)) = exact.get(&p) {
                let (most, gap) = key
                    .iter()
                    .zip(&row.0)
                    .fold((0.0f32, 0.0f32), |(m, g), (a, b)| (m.max(a.abs()), g.max((a - b).abs())));
                assert!(gap <= most / 100.0, "row {p} is another row: {gap} of {most}");
            }
            assert_eq!(*known.entry(p).or_insert_with(|| row.clone()), row, "row {p}");
        }
    }
    assert!(known.len() > 100, "rows were coded on the way");
}

#[test]
fn a_prefix_is_taken_before_its_columns_are_known() {
    let (backend, model) = model(Isa::Auto);
    let cache = cache(None, &backend);
    let text = ids(300, 2);
    open(&cache, &model, "acme", dense(Dtype::F16)).prefill(&model, &text, &Cancel::default()).unwrap();
    let recipe = json!([{ "use": "tova", "budget": { "rows": 64 } }]);
    let mut s = open(&cache, &model, "acme", options(Dtype::F16, &recipe));
    let report = s.prefill(&model, &text, &Cancel::default()).unwrap();
    assert_eq!(report.reused, 256, "{}", report.why);
    assert_eq!(s.rows(), 64);
}

#[test]
fn a_floor_holds_for_rows_that_were_found() {
    let (backend, model) = model(Isa::Auto);
    let text = ids(300, 3);
    for first in [dense(Dtype::F16), int8()] {
        let cache = cache(None, &backend);
        open(&cache, &model, "acme", first).prefill(&model, &text, &Cancel::default()).unwrap();
        let floor = options(Dtype::F16, &json!([{ "use": "int8", "floor": 0 }]));
        let mut s = open(&cache, &model, "acme", floor);
        s.prefill(&model, &text, &Cancel::default()).unwrap();
        assert_eq!(s.coded_tiles(), 0, "no lossy row under a floor of 0");
        assert!(s.stats().refused > 0);
    }
}

/// The same tokens are committed dense and coded; each resume finds its own rows, whatever lies in memory or came first.
#[test]
fn each_session_comes_back_in_its_own_code() {
    let (backend, model) = model(Isa::Auto);
    let text = ids(300, 4);
    for order in [["dense", "int8"], ["int8", "dense"]] {
        let dir = tempfile::tempdir().unwrap();
        let make = |id: &str| -> SessionOptions { if id == "int8" { int8() } else { dense(Dtype::F16) } };
        let mut want = HashMap::new();
        {
            let cache = cache(Some(dir.path()), &backend);
            for id in order {
                let mut s = open(&cache, &model, "acme", make(id));
                s.prefill(&model, &text, &Cancel::default()).unwrap();
                s.commit(id, &Json::Null).unwrap();
                want.insert(id, (s.digest().unwrap(), greedy(&model, &mut s, 8)));
            }
        }
        for id in ["dense", "int8", "dense"] {
            let cache = cache(Some(dir.path()), &backend);
            // Rows of the other code are in memory.
            let other = if id == "int8" { dense(Dtype::F16) } else { int8() };
            open(&cache, &model, "acme", other).prefill(&model, &text, &Cancel::default()).unwrap();
            let (mut s, report) = cache.resume(id, "acme", None, Arc::new(model.layout().clone())).unwrap();
            assert_eq!((report.why.as_str(), report.reused), ("complete", 300), "{id} after {order:?}");
            assert_eq!(s.digest().unwrap(), want[id].0, "{id} after {order:?}");
            assert_eq!(greedy(&model, &mut s, 8), want[id].1);
        }
    }
}

#[test]
fn a_session_that_came_back_in_part_takes_nothing_new_before_the_rest() {
    let (backend, model) = model(Isa::Auto);
    let dir = tempfile::tempdir().unwrap();
    let text = ids(100, 5);
    {
        let cache = cache(Some(dir.path()), &backend);
        let mut s = open(&cache, &model, "acme", dense(Dtype::F32));
        s.prefill(&model, &text, &Cancel::default()).unwrap();
        s.commit("c", &Json::Null).unwrap();
    }
    remove_packs(dir.path());
    let cache = cache(Some(dir.path()), &backend);
    let (mut s, report) = cache.resume("c", "acme", None, Arc::new(model.layout().clone())).unwrap();
    assert_eq!(report.reused, 0);
    let none = Cancel::default();
    assert_eq!(s.prefill(&model, &[300], &none).unwrap_err().code(), "Busy");
    assert_eq!(drive::step(&model, &mut [&mut s], &[300], &none).unwrap_err().code(), "Busy");
    assert_eq!(s.commit("c", &Json::Null).unwrap_err().code(), "Busy", "the whole session stays stored");
    assert_eq!(s.recompute(&model, &none).unwrap(), 100);
    s.prefill(&model, &[300], &none).unwrap();
    assert_eq!(s.len(), 101);
}

fn remove_packs(folder: &std::path::Path) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let entry = entry.unwrap();
        if entry.file_type().unwrap().is_dir() {
            remove_packs(&entry.path());
        } else if entry.path().extension().is_some_and(|e| e == "pack") {
            std::fs::remove_file(entry.path()).unwrap();
        }
    }
}

#[test]
fn repairs_of_rows_that_are_gone_are_left_out() {
    let (backend, model) = model(Isa::Auto);
    let cache = cache(None, &backend);
    let recipe = json!([{ "use": "streaming-llm", "sinks": 4, "recent": 28 }]);
    let mut s = open(&cache, &model, "acme", options(Dtype::F32, &recipe));
    s.prefill(&model, &ids(60, 6), &Cancel::default()).unwrap();
    s.wants().push_back(Want::Repair { pos: vec![50, 10, 50, 999], per_step: 8 });
    drive::step(&model, &mut [&mut s], &[300], &Cancel::default()).unwrap();
    assert_eq!(s.len(), 61);
}

/// Positions counted among the rows held.
struct Packed;

impl KvPolicy for Packed {
    fn spec(&self, _: &Layout) -> Result<KvSpec> {
        let wake = Trigger::Over { budget: Budget::Rows(20), slack_rows: 0 };
        Ok(KvSpec::dense().wake(wake).positions(Positions::Packed).evicts())
    }
    fn plan(&mut self, _: Wake, _: &View<'_>, plan: &mut Plan) -> Result<()> {
        plan.keep(At::all(), Pick::Last(20));
        Ok(())
    }
}

#[test]
fn a_pass_of_absurd_length_is_refused() {
    let (backend, model) = model(Isa::Scalar);
    let layout = Arc::new(model.layout().clone());
    let mut s = Session::with_policies(backend, layout, dense(Dtype::F32), vec![Box::new(Packed)]).unwrap();
    for rows in [10_000, u32::MAX] {
        assert_eq!(s.begin(rows, &[]).err().unwrap().code(), "ContextOverflow");
    }
    s.begin(30, &[]).unwrap().discard(&mut s);
}

#[test]
fn a_session_whose_policies_have_no_name_is_not_forked_without_them() {
    let (backend, model) = model(Isa::Scalar);
    let layout = Arc::new(model.layout().clone());
    let mut s = Session::with_policies(backend, layout, dense(Dtype::F32), vec![Box::new(Packed)]).unwrap();
    assert_eq!(s.fork().err().unwrap().code(), "Unsupported");
}

#[test]
fn a_layer_attends_once_in_a_pass() {
    let rope = kvasir_core::Rope::None;
    let layer = kvasir_core::LayerLayout { q_heads: 2, kv_heads: 1, k_dim: 4, v_dim: 4, rope, window: None };
    let layout = Arc::new(Layout::uniform(1, layer, Arc::from([]), 64));
    let mut s = Session::new(backend(Isa::Scalar), layout, dense(Dtype::F16)).unwrap();
    let mut pass = s.begin(2, &[]).unwrap();
    let (q, mut k, v) = (vec![0.5; 16], vec![0.25; 8], vec![1.0; 8]);
    let mut out = vec![0.0; 16];
    // What f16 cannot hold is refused, and may be brought again.
    k[5] = 1e6;
    assert_eq!(pass.attend_host(&mut s, 0, &q, &k, &v, &mut out).unwrap_err().code(), "NonFinite");
    k[5] = 0.25;
    pass.attend_host(&mut s, 0, &q, &k, &v, &mut out).unwrap();
    assert_eq!(s.tables()[0][0].rows(), 2);
    assert_eq!(pass.attend_host(&mut s, 0, &q, &k, &v, &mut out).unwrap_err().code(), "InvalidArgument");
    pass.finish(&mut s, &Cancel::default()).unwrap();
    assert_eq!(s.tables()[0][0].rows(), 2);
}

/// Header fields of a snapshot that no writer writes: a miss with a reason, and no memory for what is not there.
#[test]
fn a_snapshot_that_lies_is_a_miss() {
    let (backend, model) = model(Isa::Auto);
    let dir = tempfile::tempdir().unwrap();
    let cache = cache(Some(dir.path()), &backend);
    let mut s = open(&cache, &model, "acme", int8());
    s.prefill(&model, &ids(150, 7), &Cancel::default()).unwrap();
    s.commit("c", &Json::Null).unwrap();
    let store = cache.store();
    let key = store.tenant("acme").unwrap();
    let good = store.record(&key, "c").unwrap();
    let block = store.disk().unwrap().get(&good.snapshot(Copies::Exact).unwrap()).unwrap();
    let layout = Arc::new(model.layout().clone());
    let lies = [
        ("rows", json!(u32::MAX)),
        ("rows", json!(4_000_000)),
        ("from", json!(u32::MAX - 3)),
        ("from", json!(64)),
        ("from", Json::Null),
        ("list", json!([9, 9])),
        ("inline", json!([5, 4, 3, 2, 1])),
        ("inline", json!([4_000_000_000u32])),
        ("cols", json!([7])),
        ("tags", json!([9, 9])),
        ("bias", json!(true)),
    ];
    for run in 0..3 {
        for (field, value) in &lies {
            let mut header: Json = serde_json::from_slice(block.parts().next().unwrap()).unwrap();
            if header[0][run][*field] == *value || (*field == "list" && header[0][run]["from"] != Json::Null)
            {
                continue;
            }
            header[0][run][*field] = value.clone();
            let header = serde_json::to_vec(&header).unwrap();
            let mut parts: Vec<&[u8]> = block.parts().collect();
            parts[0] = &header;
            let mut record = good.clone();
            let chain = record.chain(&[&key]).unwrap();
            let tail = record.tail().to_vec();
            let draft = Draft::snapshot(&chain, record.lineage, &tail, CodecId::EXACT, &parts).unwrap();
            record.snapshot = Some(draft.name);
            store.commit(&[draft], &mut record).unwrap();
            let (mut again, report) = cache.resume("c", "acme", None, Arc::clone(&layout)).unwrap();
            assert_ne!(report.why, "complete", "run {run}: {field} {value}");
            again.recompute(&model, &Cancel::default()).unwrap();
            assert_eq!(again.len(), 150);
        }
    }
}

#[test]
fn two_methods_in_one_recipe_come_back_as_they_were() {
    let (backend, model) = model(Isa::Auto);
    for second in [
        json!({ "use": "streaming-llm", "sinks": 4, "recent": 50 }),
        json!({ "use": "tova", "budget": { "rows": 50 } }),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let recipe = json!([{ "use": "int8" }, second]);
        let (digest, want) = {
            let cache = cache(Some(dir.path()), &backend);
            let mut s = open(&cache, &model, "acme", options(Dtype::F16, &recipe));
            s.prefill(&model, &ids(90, 8), &Cancel::default()).unwrap();
            greedy(&model, &mut s, 70);
            s.commit("c", &Json::Null).unwrap();
            (s.digest().unwrap(), greedy(&model, &mut s, 40))
        };
        let cache = cache(Some(dir.path()), &backend);
        let (mut s, report) = cache.resume("c", "acme", None, Arc::new(model.layout().clone())).unwrap();
        assert_eq!(report.why, "complete");
        assert_eq!(s.digest().unwrap(), digest);
        assert_eq!(greedy(&model, &mut s, 40), want);
    }
}

#[test]
fn columns_outlast_rows_that_come_without_queries() {
    let rope = kvasir_core::Rope::None;
    let layer = kvasir_core::LayerLayout { q_heads: 2, kv_heads: 1, k_dim: 4, v_dim: 4, rope, window: None };
    let layout = Arc::new(Layout::uniform(1, layer, Arc::from([]), 64));
    let backend = backend(Isa::Scalar);
    let tova = options(Dtype::F16, &json!([{ "use": "tova", "budget": { "rows": 60 } }]));
    let mut s = Session::new(Arc::clone(&backend), layout, tova).unwrap();
    let mut pass = s.begin(3, &[]).unwrap();
    let (q, kv, mut out) = (vec![0.5; 24], vec![0.25; 12], vec![0.0; 24]);
    pass.attend_host(&mut s, 0, &q, &kv, &kv, &mut out).unwrap();
    pass.finish(&mut s, &Cancel::default()).unwrap();
    let column = |s: &Session| backend.read_f32(&s.tables()[0][0].runs[0].meta.cols[0].1).unwrap();
    let before = column(&s);
    assert_eq!(before.iter().filter(|&&x| x > 0.0).count(), 3, "the last query attends to three rows");
    s.ingest(&kv, &kv, 3, Order::Nhd, &[]).unwrap();
    assert_eq!(column(&s), before);
}

#[test]
fn a_recipe_of_hundreds_of_coded_runs_is_refused() {
    let (backend, model) = model(Isa::Scalar);
    let layout = Arc::new(model.layout().clone());
    let many: Vec<Json> = (0..300).map(|_| json!({ "use": "int8" })).collect();
    let made = Session::new(backend, layout, options(Dtype::F16, &Json::Array(many)));
    assert_eq!(made.err().unwrap().code(), "InvalidArgument");
}
