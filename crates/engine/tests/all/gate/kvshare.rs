//! KVShare (arXiv 2503.16525): a run of a prompt comes from another prompt; what is not computed anew at prefill waits in a queue and
//! rides in the decode batch, three rows a step.

use kvasir_core::{Ask, Batch, Want};
use kvasir_engine::{Cancel, Session, drive};
use kvasir_testkit::Watched;
use kvasir_testkit::oracle::argmax;
use kvasir_testkit::oracle::flows::{self, Share, Shared};

use super::{
    Bench, CLEAR, Shrink, bench, blend, close, close_rows, count, floats, rows_of, same_rows, text, top, wide,
};

/// The flow, compared with the oracle at every step.
fn run(b: &Bench, prompt: &[u32], source: &[u32], set: &Share, want: &Shared) -> Session {
    let watched = Watched::new(&b.model);
    let run = set.reused.clone();
    let (start, n) = (run.start, prompt.len());
    let mut other = b.session(Vec::new());
    drive::prefill(&b.model, &mut other, source, &Cancel::default()).unwrap();

    let mut session = b.session(Vec::new());
    drive::prefill(&watched, &mut session, &prompt[..start], &Cancel::default()).unwrap();
    count("prefix", &watched, &[start as u32; 5], &[start as u32; 5]);
    b.bring(&mut session, &prompt[run.clone()], &other, set.source_from);

    let mut has: Vec<u32> = Vec::new();
    let batch = Batch::one(&prompt[start..], start as u32, Ask::Last);
    let first = blend(&watched, &batch, &mut session, Shrink::Queries, &mut |session, q, k, v| {
        if set.has_ratio > 0.0 {
            // Attention of the second-last query over the reused keys, times how far their values moved.
            let (keys, values) = (wide(&floats(k, &b.backend)), wide(&floats(v, &b.backend)));
            let (queries, stale) = (wide(&floats(q, &b.backend)), wide(&rows_of(session, 1).1));
            let over: Vec<usize> = (0..run.len()).collect();
            let p = b.naive.probs(&queries[n - 2 - start], n as u32 - 2, &keys, &k.pos, &over);
            let score: Vec<f64> = over
                .iter()
                .map(|&i| {
                    let drawn = p.iter().map(|head| head[i]).sum::<f64>() / p.len() as f64;
                    let moved =
                        values[i].iter().zip(&stale[start + i]).map(|(a, b)| (a - b).abs()).sum::<f64>();
                    drawn * moved
                })
                .collect();
            let k = ((run.len() as f64 * set.has_ratio) as usize).max(1);
            has = top(&score, k).iter().map(|i| i + start as u32).collect();
        }
        let goes_on = |p: &u32| !run.contains(&(*p as usize)) || has.contains(p) || *p as usize + 1 == n;
        q.pos.iter().copied().filter(goes_on).collect()
    });
    assert_eq!(has, want.has);
    let (all, few) = ((n - start) as u32, (want.selected.len() - start) as u32);
    count("prefill", &watched, &[all, all, few, few, few], &[all, few, few, few, few]);
    close("first logits", first.row(0), &want.first);

    let queue: Vec<u32> = run.map(|p| p as u32).filter(|p| !has.contains(p)).collect();
    session.wants().push_back(Want::Repair { pos: queue, per_step: set.per_step as u8 });
    let mut logits = first.row(0).to_vec();
    for (i, (want_id, want_logits)) in want.ids.iter().zip(&want.logits).enumerate() {
        let id = argmax(&wide(&[logits])[0]);
        assert_eq!(id, *want_id, "token of step {i}");
        drive::step(&watched, &mut [&mut session], &[id], &Cancel::default()).unwrap();
        let rows = want.repaired[i].len() as u32 + 1;
        assert!(rows <= 4);
        count(&format!("step {i}"), &watched, &[rows; 5], &[rows; 5]);
        logits = session.logits().unwrap().to_vec();
        close(&format!("logits of step {i}"), &logits, want_logits);
    }
    close_rows("at the end", &session, &want.kv, n + want.ids.len());
    session
}

#[test]
fn a_drained_queue_leaves_the_rows_of_a_full_prefill() {
    let b = bench();
    let shared = text(100..120);
    let prompt = [text(0..9), shared.clone()].concat();
    let source = [text(300..317), shared].concat();
    let set = Share { reused: 9..29, source_from: 17, has_ratio: 0.0, per_step: 3, steps: 9 };
    let want = flows::kvshare(&b.naive, &prompt, &source, &set);
    assert!(want.margin > CLEAR, "a near tie: {}", want.margin);
    let mut session = run(&b, &prompt, &source, &set, &want);
    assert!(session.wants().is_empty(), "the queue is drained");

    let mut full = b.session(Vec::new());
    drive::prefill(&b.model, &mut full, &prompt, &Cancel::default()).unwrap();
    same_rows("after the queue", &session, &full, prompt.len());
}

#[test]
fn half_way_the_queue_is_where_the_paper_says() {
    let b = bench();
    let shared = text(100..140);
    // Fresh tokens behind the reused run, computed on stale context, as the method has it.
    let prompt = [text(0..9), shared.clone(), text(500..507)].concat();
    let source = [text(300..317), shared].concat();
    let set = Share { reused: 9..49, source_from: 17, has_ratio: 0.15, per_step: 3, steps: 5 };
    let want = flows::kvshare(&b.naive, &prompt, &source, &set);
    assert!(want.margin > CLEAR, "a near tie: {}", want.margin);
    assert_eq!((want.has.len(), want.selected.len()), (6, 9 + 6 + 7));
    let mut session = run(&b, &prompt, &source, &set, &want);
    let Some(Want::Repair { pos, .. }) = session.wants().front() else { panic!("the queue is not empty") };
    assert_eq!(pos.len(), 34 - 15);
}
