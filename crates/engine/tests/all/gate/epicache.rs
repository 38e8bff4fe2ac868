//! EpiCache (arXiv 2509.17396): a probe runs behind the cached rows, scores them and leaves nothing behind; then the rows it looked at
//! most stay.

use std::sync::{Arc, Mutex};

use kvasir_core::{
    At, ColId, Heads, KvPolicy, KvSpec, Layout, Over, Per, Pick, Plan, Probe, Queries, Reduce, Result,
    Source, Trigger, View, Wake, Want,
};
use kvasir_engine::{Cancel, Session, drive};
use kvasir_testkit::oracle::flows;
use kvasir_testkit::{Watched, pick_heads};

use super::{bench, close, count, text};

const SCORE: ColId = ColId(0);

/// Values of the column, `[L][K][T]`.
type Scores = Arc<Mutex<Vec<Vec<Vec<f32>>>>>;

/// Notes the scores of a probe, and keeps the best rows where a budget is set.
struct Episode {
    scores: Scores,
    keep: Option<u32>,
}

impl KvPolicy for Episode {
    fn spec(&self, _: &Layout) -> Result<KvSpec> {
        let probe =
            Probe { queries: Queries::Wanted, over: Over::Past, reduce: Reduce::Max, heads: Heads::KvMax };
        let spec = KvSpec::dense().column(Source::Attention(probe)).wake(Trigger::Wanted);
        Ok(if self.keep.is_some() { spec.evicts() } else { spec })
    }

    fn plan(&mut self, _: Wake, view: &View<'_>, plan: &mut Plan) -> Result<()> {
        let mut scores = Vec::new();
        for (l, layer) in view.layout.layers.iter().enumerate() {
            let head = |h| (view.col)(l as u16, h, SCORE);
            scores.push((0..layer.kv_heads).map(head).collect::<Result<_>>()?);
        }
        *self.scores.lock().unwrap() = scores;
        if let Some(n) = self.keep {
            plan.keep(At::all(), Pick::Top { col: SCORE, n, per: Per::Joint });
        }
        Ok(())
    }
}

/// Every byte of every tile with its positions.
fn bytes_of(session: &Session) -> Vec<(Vec<u32>, Vec<u8>)> {
    let mut all = Vec::new();
    for run in session.tables().iter().flatten().flat_map(|t| &t.runs) {
        for tile in run.tiles.iter() {
            let mut bytes = vec![0; tile.codes.bytes()];
            session.backend().read(&tile.codes, &mut bytes).unwrap();
            all.push((run.meta.pos.to_vec(run.rows as usize), bytes));
        }
    }
    all
}

fn texts() -> (Vec<u32>, Vec<u32>) {
    // 45 rows: the probe's rows would fit behind them in the second tile.
    (text(0..45), text(600..611))
}

#[test]
fn a_probe_scores_the_past_and_changes_no_byte() {
    let b = bench();
    let watched = Watched::new(&b.model);
    let (prompt, tokens) = texts();
    let scores = Scores::default();
    let mut session = b.session(vec![Box::new(Episode { scores: Arc::clone(&scores), keep: None })]);
    drive::prefill(&b.model, &mut session, &prompt, &Cancel::default()).unwrap();
    let (bytes, digest, logits) =
        (bytes_of(&session), session.digest().unwrap(), session.logits().unwrap().to_vec());

    session.wants().push_back(Want::Probe { tokens: tokens.clone(), into: SCORE });
    drive::serve_probes(&watched, &mut session, &Cancel::default()).unwrap();
    count("probe", &watched, &[11; 5], &[11; 5]);
    let want = flows::probe(&b.naive, &prompt, &tokens);
    for (l, (got, want)) in scores.lock().unwrap().iter().zip(&want.score).enumerate() {
        for (h, (got, want)) in got.iter().zip(want).enumerate() {
            close(&format!("scores of layer {l}, head {h}"), got, want);
        }
    }
    assert_eq!(scores.lock().unwrap().len(), 5);
    assert!(session.wants().is_empty());
    assert!(bytes_of(&session) == bytes, "a tile changed");
    assert_eq!(session.digest().unwrap(), digest);
    assert_eq!((session.len(), session.logits().unwrap()), (45, &logits[..]));

    // A session that never was probed goes on with the same bits.
    let mut twin = b.session(Vec::new());
    drive::prefill(&b.model, &mut twin, &prompt, &Cancel::default()).unwrap();
    for id in text(45..50) {
        drive::step(&b.model, &mut [&mut session, &mut twin], &[id, id], &Cancel::default()).unwrap();
        assert_eq!(session.logits(), twin.logits());
    }
    assert_eq!(session.digest().unwrap(), twin.digest().unwrap());
}

#[test]
fn the_rows_a_probe_looked_at_stay() {
    let b = bench();
    let (prompt, tokens) = texts();
    let episode = Episode { scores: Scores::default(), keep: Some(11) };
    let mut session = b.session(vec![Box::new(episode)]);
    drive::prefill(&b.model, &mut session, &prompt, &Cancel::default()).unwrap();
    session.wants().push_back(Want::Probe { tokens: tokens.clone(), into: SCORE });
    drive::serve_probes(&b.model, &mut session, &Cancel::default()).unwrap();
    let want = flows::probe(&b.naive, &prompt, &tokens);
    let pick = Pick::Top { col: SCORE, n: 11, per: Per::Joint };
    for (l, score) in want.score.iter().enumerate() {
        let column = |h: usize, _: ColId| score[h].iter().map(|&x| x as f32).collect();
        let kept = pick_heads(&pick, &[45; 4], &column);
        assert_eq!(kept.iter().map(Vec::len).sum::<usize>(), 44);
        for (h, kept) in kept.iter().enumerate() {
            let (pos, ..) = session.read_rows(l, h, 0).unwrap();
            assert_eq!(&pos, kept, "layer {l}, head {h}");
        }
    }
}
