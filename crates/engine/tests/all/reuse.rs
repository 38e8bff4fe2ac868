//! The main job: what was computed is found again, exactly, or it is a miss with a reason.

use std::sync::Arc;

use kvasir_core::Model;
use kvasir_cpu::Isa;
use kvasir_engine::{Cancel, Dtype, Error, drive};
use serde_json::{Value as Json, json};

use crate::support::{cache, dense, greedy, ids, int8, model, open, options};

fn resume_equals_uninterrupted(make: &dyn Fn() -> kvasir_engine::SessionOptions, n: usize) {
    let (backend, model) = model(Isa::Auto);
    let dir = tempfile::tempdir().unwrap();
    let text = ids(n, 7);
    let (digest, want) = {
        let cache = cache(Some(dir.path()), &backend);
        let mut session = open(&cache, &model, "acme", make());
        session.prefill(&model, &text, &Cancel::default()).unwrap();
        let report = session.commit("c", &json!({ "mine": 1 })).unwrap();
        assert!(report.durable);
        assert_eq!(report.tokens as usize, n);
        let digest = session.digest().unwrap();
        (digest, greedy(&model, &mut session, 24))
    };
    let cache = cache(Some(dir.path()), &backend);
    let (mut again, report) = cache.resume("c", "acme", None, Arc::new(model.layout().clone())).unwrap();
    assert_eq!(report.why, "complete");
    assert_eq!(report.reused as usize, n);
    assert_eq!(report.extra, json!({ "mine": 1 }));
    assert_eq!(again.digest().unwrap(), digest);
    assert_eq!(greedy(&model, &mut again, 24), want);
}

#[test]
fn a_resumed_session_is_the_uninterrupted_one() {
    for dtype in [Dtype::F32, Dtype::F16, Dtype::Bf16] {
        for n in [1, 31, 32, 63, 64, 65, 200, 333] {
            resume_equals_uninterrupted(&|| dense(dtype), n);
        }
    }
}

#[test]
fn a_resumed_int8_session_is_the_uninterrupted_one() {
    for n in [3, 64, 96, 300, 400] {
        resume_equals_uninterrupted(&int8, n);
    }
}

#[test]
fn a_second_session_takes_the_prefix_while_the_first_still_runs() {
    let (backend, model) = model(Isa::Auto);
    let cache = cache(None, &backend);
    let text = ids(200, 1);
    let mut first = open(&cache, &model, "acme", dense(Dtype::F32));
    let report = first.prefill(&model, &text, &Cancel::default()).unwrap();
    assert_eq!((report.reused, report.computed), (0, 200));

    let mut longer = text.clone();
    longer.extend(ids(60, 2));
    let mut second = open(&cache, &model, "acme", dense(Dtype::F32));
    let report = second.prefill(&model, &longer, &Cancel::default()).unwrap();
    assert_eq!((report.reused, report.computed), (192, 68), "{}", report.why);

    // Shared tiles are not written by either of them.
    let before = first.digest().unwrap();
    greedy(&model, &mut second, 8);
    assert_eq!(first.digest().unwrap(), before);

    let mut alone = open(&cache, &model, "other", dense(Dtype::F32));
    let report = alone.prefill(&model, &longer, &Cancel::default()).unwrap();
    assert_eq!(report.reused, 0, "another tenant finds nothing");
    let (a, b) = (alone.logits().unwrap(), &greedy_logits(&model, &cache, &longer));
    let gap = a.iter().zip(b).map(|(x, y)| (x - y).abs()).fold(0.0f32, f32::max);
    assert!(gap < 1e-3, "reused and computed prefix differ by {gap}");
}

fn greedy_logits(model: &kvasir_model::Llama, cache: &kvasir_engine::Cache, text: &[u32]) -> Vec<f32> {
    let mut s = open(cache, model, "acme", dense(Dtype::F32));
    s.prefill(model, text, &Cancel::default()).unwrap();
    s.logits().unwrap().to_vec()
}

#[test]
fn rows_computed_over_int8_never_serve_a_lossless_session() {
    let (backend, model) = model(Isa::Auto);
    let dir = tempfile::tempdir().unwrap();
    let text = ids(448, 3);
    let cache = cache(Some(dir.path()), &backend);
    let mut lossy = open(&cache, &model, "acme", int8());
    lossy.prefill(&model, &text[..384], &Cancel::default()).unwrap();
    assert!(lossy.coded_tiles() > 0);
    lossy.commit("half", &Json::Null).unwrap();

    let mut lossless = open(&cache, &model, "acme", dense(Dtype::F16));
    let report = lossless.prefill(&model, &text, &Cancel::default()).unwrap();
    assert_eq!(report.reused, 0, "{}", report.why);

    let mut same = open(&cache, &model, "acme", int8());
    let report = same.prefill(&model, &text, &Cancel::default()).unwrap();
    assert_eq!(report.reused, 384, "the same recipe finds them: {}", report.why);
    assert!(same.coded_tiles() > 0);
}

/// The second half is dense, but was computed over coded rows, so its numbers are not those of a lossless run. Only its
/// lineage tells it from rows that anybody may have.
#[test]
fn dense_rows_computed_over_int8_have_another_name() {
    let (backend, model) = model(Isa::Auto);
    let text = ids(448, 3);
    let cache = cache(None, &backend);
    open(&cache, &model, "acme", dense(Dtype::F16))
        .prefill(&model, &text[..260], &Cancel::default())
        .unwrap();
    let mut lossy = open(&cache, &model, "acme", int8());
    lossy.prefill(&model, &text[..256], &Cancel::default()).unwrap();
    assert!(lossy.coded_tiles() > 0);
    lossy.freeze(true);
    lossy.prefill(&model, &text[256..400], &Cancel::default()).unwrap();
    assert!(lossy.tables()[0][0].runs[0].rows >= 128, "the second half stays dense");

    let mut lossless = open(&cache, &model, "acme", dense(Dtype::F16));
    let report = lossless.prefill(&model, &text, &Cancel::default()).unwrap();
    assert_eq!(report.reused, 256, "{}", report.why);
}

#[test]
fn exact_rows_serve_a_lossy_session() {
    let (backend, model) = model(Isa::Auto);
    let cache = cache(None, &backend);
    let text = ids(300, 4);
    open(&cache, &model, "acme", dense(Dtype::F16)).prefill(&model, &text, &Cancel::default()).unwrap();
    let mut lossy = open(&cache, &model, "acme", int8());
    let report = lossy.prefill(&model, &text, &Cancel::default()).unwrap();
    assert_eq!(report.reused, 256, "{}", report.why);
    assert!(lossy.coded_tiles() > 0);
}

#[test]
fn a_fork_goes_its_own_way() {
    let (backend, model) = model(Isa::Auto);
    let cache = cache(None, &backend);
    for make in [int8 as fn() -> _, || dense(Dtype::F16)] {
        let mut trunk = open(&cache, &model, "acme", make());
        trunk.prefill(&model, &ids(77, 5), &Cancel::default()).unwrap();
        let mut branch = trunk.fork().unwrap();
        assert_eq!(trunk.digest().unwrap(), branch.digest().unwrap());
        let want = {
            let mut twin = trunk.fork().unwrap();
            greedy(&model, &mut twin, 12)
        };
        drive::step(&model, &mut [&mut branch], &[300], &Cancel::default()).unwrap();
        let of_branch = branch.digest().unwrap();
        assert_eq!(greedy(&model, &mut trunk, 12), want);
        assert_eq!(branch.digest().unwrap(), of_branch, "the trunk writes into no row of its branch");
        assert_ne!(trunk.digest().unwrap(), branch.digest().unwrap());
    }
}

#[test]
fn several_sequences_in_one_step_are_each_alone() {
    let (backend, model) = model(Isa::Scalar);
    let cache = cache(None, &backend);
    let mut sessions: Vec<_> = (0..3)
        .map(|i| {
            let mut s = open(&cache, &model, "acme", dense(Dtype::F32));
            s.prefill(&model, &ids(20 + 31 * i, 40 + i as u32), &Cancel::default()).unwrap();
            s
        })
        .collect();
    let mut alone: Vec<_> = sessions.iter_mut().map(|s| s.fork().unwrap()).collect();
    let tokens = [270, 271, 272];
    let mut refs: Vec<_> = sessions.iter_mut().collect();
    drive::step(&model, &mut refs, &tokens, &Cancel::default()).unwrap();
    for ((together, one), token) in sessions.iter().zip(&mut alone).zip(tokens) {
        drive::step(&model, &mut [&mut *one], &[token], &Cancel::default()).unwrap();
        assert_eq!(together.logits(), one.logits());
    }
}

#[test]
fn a_cancelled_pass_never_was() {
    let (backend, model) = model(Isa::Auto);
    let cache = cache(None, &backend);
    let mut session = open(&cache, &model, "acme", dense(Dtype::F16));
    session.prefill(&model, &ids(50, 6), &Cancel::default()).unwrap();
    let before = session.digest().unwrap();
    let cancel = Cancel::default();
    cancel.cancel();
    let error = drive::step(&model, &mut [&mut session], &[300], &cancel).unwrap_err();
    assert_eq!(error.code(), "Cancelled");
    assert_eq!(session.digest().unwrap(), before);
    assert_eq!(session.len(), 50);
    drive::step(&model, &mut [&mut session], &[300], &Cancel::default()).unwrap();
}

#[test]
fn wrong_use_is_a_typed_error() {
    let (backend, model) = model(Isa::Auto);
    let dir = tempfile::tempdir().unwrap();
    let cache = cache(Some(dir.path()), &backend);
    let layout = Arc::new(model.layout().clone());
    assert_eq!(cache.resume("nobody", "acme", None, Arc::clone(&layout)).err().unwrap().code(), "NoSession");
    assert_eq!(
        cache.session("", None, Arc::clone(&layout), dense(Dtype::F16)).err().unwrap().code(),
        "InvalidArgument"
    );

    let mut session = open(&cache, &model, "acme", dense(Dtype::F16));
    assert_eq!(session.prefill(&model, &[], &Cancel::default()).unwrap_err().code(), "InvalidArgument");
    assert_eq!(
        session.prefill(&model, &[1, 9999], &Cancel::default()).unwrap_err().code(),
        "InvalidArgument"
    );
    assert_eq!(session.len(), 0, "a refused prefill leaves nothing");
    let long = ids(layout.context as usize + 1, 1);
    assert!(matches!(session.prefill(&model, &long, &Cancel::default()), Err(Error::ContextOverflow { .. })));
    session.prefill(&model, &ids(70, 8), &Cancel::default()).unwrap();
    session.commit("c", &Json::Null).unwrap();

    let mut other = (*layout).clone();
    other.fingerprint[0] ^= 1;
    assert_eq!(cache.resume("c", "acme", None, Arc::new(other)).err().unwrap().code(), "Mismatch");
    assert_eq!(cache.resume("c", "rival", None, layout).err().unwrap().code(), "NoSession");
    session.close();
    assert_eq!(session.commit("c", &Json::Null).unwrap_err().code(), "Closed");
}

#[test]
fn a_lost_pack_is_recomputed_and_said() {
    let (backend, model) = model(Isa::Auto);
    let dir = tempfile::tempdir().unwrap();
    let text = ids(300, 9);
    let want = {
        let cache = cache(Some(dir.path()), &backend);
        let mut s = open(&cache, &model, "acme", dense(Dtype::F32));
        s.prefill(&model, &text[..150], &Cancel::default()).unwrap();
        s.commit("c", &Json::Null).unwrap();
        s.prefill(&model, &text[150..], &Cancel::default()).unwrap();
        s.commit("c", &Json::Null).unwrap();
        greedy(&model, &mut s, 8)
    };
    // The newest pack goes: blocks of the first commit are still there.
    let mut packs = Vec::new();
    let mut folders = vec![dir.path().to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let entry = entry.unwrap();
            if entry.file_type().unwrap().is_dir() {
                folders.push(entry.path());
            } else if entry.path().extension().is_some_and(|e| e == "pack") {
                packs.push((entry.metadata().unwrap().modified().unwrap(), entry.path()));
            }
        }
    }
    packs.sort();
    std::fs::remove_file(&packs.last().unwrap().1).unwrap();
    let cache = cache(Some(dir.path()), &backend);
    let (mut s, report) = cache.resume("c", "acme", None, Arc::new(model.layout().clone())).unwrap();
    assert_eq!(report.reused, 128, "{}", report.why);
    assert_ne!(report.why, "complete");
    assert_eq!(s.recompute(&model, &Cancel::default()).unwrap(), 172);
    assert_eq!(greedy(&model, &mut s, 8), want);
}

#[test]
fn recipes_are_checked_when_they_are_built() {
    for (recipe, field) in [
        (json!({ "use": "int8" }), "recipe"),
        (json!([{ "sinkRows": 4 }]), "recipe[0].use"),
        (json!([{ "use": "int9" }]), "int8"),
        (json!([{ "use": "int8", "sinkrows": 4 }]), "sinkrows"),
        (json!([{ "use": "int8", "floor": -1 }]), "floor"),
    ] {
        let error = kvasir_engine::Recipe::parse(&recipe).unwrap_err();
        assert_eq!(error.code(), "InvalidArgument");
        assert!(error.to_string().contains(field), "{error}");
    }
    let short = options(Dtype::F16, &json!([{ "use": "int8" }]));
    let long = options(Dtype::F16, &json!([{ "use": "int8", "sinkRows": 4 }]));
    assert_eq!(short.recipe.hash(), long.recipe.hash(), "defaults are part of the recipe");
}
