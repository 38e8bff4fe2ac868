//! dKV-Cache (arXiv 2505.15781), variant "decode": a masked language model computes a subset of rows per step, with a full mask;
//! rows of known tokens are kept one step after they were committed.

use kvasir_core::{Ask, Batch};
use kvasir_engine::Session;
use kvasir_testkit::Watched;
use kvasir_testkit::oracle::flows::{self, Commit, MASK_ID, Step};
use kvasir_testkit::oracle::{argmax, softmax};

use super::{Bench, CLEAR, FullMask, bench, close, count, pass, text, top, uncached, wide};

const MASKS: usize = 14;
const STEPS: usize = 6;

fn prompt() -> Vec<u32> {
    text(2000..2012)
}

/// The flow. Each step must compute the rows, commit the tokens and give the logits of `want`; `exact`: and the bits of a pass
/// without a cache.
fn run(b: &Bench, reload: usize, want: &[Step], exact: bool) {
    let watched = Watched::new(&b.model);
    let mut session: Session = b.session(vec![Box::new(FullMask)]);
    let mut ids = [prompt(), vec![MASK_ID; MASKS]].concat();
    let n = ids.len() as u32;
    let known_at_start: Vec<u32> = (0..n - MASKS as u32).collect();
    let mut known = vec![known_at_start];
    for (i, want) in want.iter().enumerate() {
        let what = format!("reload {reload}, step {i}");
        let full = i < 2 || i % reload == 0;
        let pos: Vec<u32> = (0..n).filter(|p| full || !known[i - 1].contains(p)).collect();
        assert_eq!(pos, want.rows, "{what}: rows");
        let rows = std::iter::once(0..pos.len() as u32).collect();
        let of_pos = pos.iter().map(|&p| ids[p as usize]).collect();
        let batch = Batch { ids: of_pos, pos: pos.clone(), of: rows, ask: Ask::All };
        let logits = pass(&watched, &batch, &mut session);
        count(&what, &watched, &want.computed, &want.computed);
        for (r, want) in want.logits.iter().enumerate() {
            close(&format!("{what}: logits of row {r}"), logits.row(r), want);
        }
        if exact {
            uncached(&what, b, &ids, &session, &logits);
        }
        let current = known.last().unwrap();
        let open: Vec<usize> = (0..pos.len()).filter(|&r| !current.contains(&pos[r])).collect();
        let rows = wide(&open.iter().map(|&r| logits.row(r).to_vec()).collect::<Vec<_>>());
        let sure: Vec<(u32, f64)> =
            rows.iter().map(|l| (argmax(l), softmax(l)[argmax(l) as usize])).collect();
        let n_commit = MASKS / STEPS + usize::from(i < MASKS % STEPS);
        let picked = top(&sure.iter().map(|s| s.1).collect::<Vec<_>>(), n_commit);
        let commits: Vec<Commit> =
            picked.iter().map(|&j| Commit { pos: pos[open[j as usize]], id: sure[j as usize].0 }).collect();
        assert_eq!(commits, want.commits, "{what}: committed tokens");
        let mut next = current.clone();
        for c in &commits {
            ids[c.pos as usize] = c.id;
            next.push(c.pos);
        }
        known.push(next);
    }
    assert_eq!(known.last().unwrap().len(), n as usize, "every mask is gone");
}

fn clear(steps: &[Step]) {
    let margin = steps.iter().fold(f64::INFINITY, |m, s| m.min(s.margin));
    assert!(margin > CLEAR, "a near tie: {margin}");
}

#[test]
fn reloading_always_is_the_plain_sampler_bit_for_bit() {
    let b = bench();
    let want = flows::dkv(&b.naive, &prompt(), MASKS, STEPS, 1);
    clear(&want);
    assert!(want.iter().all(|s| s.computed == [26; 5]));
    run(&b, 1, &want, true);
}

#[test]
fn reloading_every_fourth_step_computes_few_rows_between() {
    let b = bench();
    let want = flows::dkv(&b.naive, &prompt(), MASKS, STEPS, 4);
    clear(&want);
    let rows: Vec<usize> = want.iter().map(|s| s.rows.len()).collect();
    assert_eq!(rows, [26, 26, 11, 8, 26, 4]);
    run(&b, 4, &want, false);
}
