//! CacheBlend (arXiv 2405.16444): chunks prefilled each alone, put in a row, a few of their rows computed anew. Rows shrink
//! between layers; queries are scattered; old rows are replaced.

use kvasir_core::{Ask, Batch, Call};
use kvasir_engine::{Cancel, Session, drive};
use kvasir_testkit::Watched;
use kvasir_testkit::oracle::flows;

use super::{Bench, CLEAR, Shrink, bench, blend, close, close_rows, count, rows_of, same_rows, text, top};

fn chunks() -> ([Vec<u32>; 2], Vec<u32>) {
    ([text(0..41), text(700..730)], text(730..741))
}

/// The flow: gives the session and the logits of the last token.
fn run(b: &Bench, watched: &Watched<'_>, ratio: f64, shrink: Shrink) -> (Session, Vec<f32>, Vec<u32>) {
    let (chunks, suffix) = chunks();
    let mut session = b.session(Vec::new());
    for chunk in &chunks {
        let mut alone = b.session(Vec::new());
        drive::prefill(&b.model, &mut alone, chunk, &Cancel::default()).unwrap();
        b.bring(&mut session, chunk, &alone, 0);
    }
    let reused = session.len();
    let ids = [chunks.concat(), suffix].concat();
    let n = ids.len() as u32;
    let mut selected = Vec::new();
    let logits =
        blend(watched, &Batch::one(&ids, 0, Ask::Last), &mut session, shrink, &mut |session, _, _, v| {
            // How far each reused value moved, by the backend's own call.
            let old = rows_of(session, 1).1[..reused as usize].concat();
            let out = b.backend.alloc(4 * reused as usize).unwrap();
            let call = Call::RowDistance {
                a: v.data.slice(0..old.len() * 4).unwrap(),
                b: b.backend.upload_f32(&old).unwrap(),
                dim: v.dim,
                out: out.clone(),
            };
            b.backend.submit(call).unwrap();
            let moved: Vec<f64> = b.backend.read_f32(&out).unwrap().iter().map(|&x| f64::from(x)).collect();
            selected = top(&moved, (f64::from(reused) * ratio).floor() as usize);
            selected.extend(reused..n);
            selected.clone()
        });
    (session, logits.row(0).to_vec(), selected)
}

#[test]
fn everything_computed_anew_is_a_full_prefill_bit_for_bit() {
    let b = bench();
    let watched = Watched::new(&b.model);
    let (session, logits, _) = run(&b, &watched, 1.0, Shrink::Queries);
    count("ratio 1", &watched, &[82; 5], &[82; 5]);
    let (chunks, suffix) = chunks();
    let ids = [chunks.concat(), suffix.clone()].concat();
    let mut full = b.session(Vec::new());
    drive::prefill(&b.model, &mut full, &ids, &Cancel::default()).unwrap();
    assert_eq!(session.digest().unwrap(), full.digest().unwrap());
    assert_eq!(logits, full.logits().unwrap());
    let oracle = flows::cacheblend(&b.naive, &chunks, &suffix, 1.0);
    close("ratio 1: logits", &logits, &oracle.logits);
    close_rows("ratio 1", &session, &oracle.kv, 82);
}

#[test]
fn a_quarter_computed_anew_is_what_the_paper_says() {
    let b = bench();
    let watched = Watched::new(&b.model);
    let (chunks, suffix) = chunks();
    let oracle = flows::cacheblend(&b.naive, &chunks, &suffix, 0.25);
    assert!(oracle.margin > CLEAR, "a near tie: {}", oracle.margin);
    let (session, logits, selected) = run(&b, &watched, 0.25, Shrink::Queries);
    assert_eq!(selected, oracle.selected);
    // 71 reused rows: 17 of them and the suffix of 11 go on. The check layer projects all, attends for those.
    count("ratio 1/4", &watched, &oracle.projected, &oracle.attended);
    assert_eq!(
        (&oracle.projected[..], &oracle.attended[..]),
        (&[82, 82, 28, 28, 28][..], &[82, 28, 28, 28, 28][..])
    );
    close("ratio 1/4: logits", &logits, &oracle.logits);
    close_rows("ratio 1/4", &session, &oracle.kv, 82);

    // The same through a want: the check layer attends for all rows, the next one begins with fewer.
    let (by_want, logits_by_want, _) = run(&b, &watched, 0.25, Shrink::Want);
    count("by a want", &watched, &[82, 82, 28, 28, 28], &[82, 82, 28, 28, 28]);
    same_rows("by a want", &session, &by_want, 82);
    assert_eq!(logits, logits_by_want);
}
