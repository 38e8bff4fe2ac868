//! Perplexity, KL and top-1 agreement of a recipe against the dense f32 twin, chunk by chunk.
//!
//! A chunk of S ids gives S targets: the input is the leading token (where there is one) and the chunk without its last id.
//! Without a leading token the first id is context only. Passes hold 256 rows; rows are coded or evicted after each pass, so
//! a query sees coded rows of earlier passes and exact rows of its own. With `prefix` P the first P input positions are
//! computed dense, then coded or evicted once; only later positions are measured, over exact rows of their own.

use std::sync::Arc;

use kvasir_core::eval::{kl, nll, top1};
use kvasir_core::{Ask, Backend, Model, check};
use serde::Serialize;

use super::generate::{PASS_ROWS, run};
use crate::cancel::Cancel;
use crate::session::{Dtype, Session, SessionOptions};
use crate::{Error, Result};

/// What to evaluate.
#[derive(Clone, Debug)]
pub struct EvaluateOptions {
    /// Token ids of the text.
    pub ids: Vec<u32>,
    /// Ids of a chunk; 0 is the whole text as one.
    pub chunk: usize,
    /// Chunks; 0 is as many as there are.
    pub chunks: usize,
    /// Input positions computed dense and then transformed.
    pub prefix: usize,
    /// Leading token, context only.
    pub bos: Option<u32>,
    /// How rows are kept.
    pub session: SessionOptions,
    /// Compare with the dense f32 twin; without it `kl` is 0 and `top1` is 1.
    pub dense: bool,
}

/// What was measured.
#[derive(Clone, Debug, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Evaluation {
    /// Targets measured.
    pub tokens: u64,
    /// exp of the mean negative log-likelihood.
    pub perplexity: f64,
    /// Perplexity of the dense twin on the same targets.
    pub dense_perplexity: f64,
    /// Mean KL divergence from the dense twin, nats.
    pub kl: f64,
    /// Share of targets where both rank the same token first.
    pub top1: f64,
    /// Bytes held per position at the end of a chunk, mean.
    pub bytes_per_token: f64,
    /// Tiles in lossy runs, summed over chunks.
    pub coded_tiles: u64,
    /// Ops refused by a floor, summed over chunks.
    pub refused: u64,
    /// Wall time.
    pub ms: f64,
}

/// Evaluates a recipe on a text.
pub fn evaluate(
    model: &dyn Model,
    backend: &Arc<dyn Backend>,
    o: &EvaluateOptions,
    cancel: &Cancel,
) -> Result<Evaluation> {
    let started = std::time::Instant::now();
    let size = if o.chunk == 0 { o.ids.len() } else { o.chunk };
    check::at_least("evaluate.ids", o.ids.len(), size.max(2))?;
    let there = o.ids.len() / size;
    let count = if o.chunks == 0 { there } else { o.chunks };
    check::at_least("evaluate.ids", o.ids.len(), size * count)?;
    let context = model.layout().context as usize;
    if size > context {
        return Err(Error::ContextOverflow { limit: context as u32, got: size as u64 });
    }
    if o.prefix >= size {
        return Err(
            kvasir_core::Error::invalid("evaluate.prefix", format_args!("below {size}"), o.prefix).into()
        );
    }
    cancel.expect(count * (size + o.bos.iter().len() - 1));
    let mut total = Evaluation::default();
    let (mut sum, mut dense_sum, mut kl_sum, mut same) = (0.0, 0.0, 0.0, 0u64);
    for chunk in o.ids.chunks_exact(size).take(count) {
        let mut input: Vec<u32> = o.bos.into_iter().collect();
        input.extend_from_slice(&chunk[..chunk.len() - 1]);
        // Input position i predicts targets[i].
        let targets = if o.bos.is_some() { chunk } else { &chunk[1..] };
        let layout = Arc::new(model.layout().clone());
        let mut lossy = Session::new(Arc::clone(backend), Arc::clone(&layout), o.session.clone())?;
        let twin = SessionOptions { dtype: Dtype::F32, ..SessionOptions::default() };
        let mut dense = Session::new(Arc::clone(backend), layout, twin)?;
        if o.prefix > 0 {
            lossy.freeze(true);
            for pass in input[..o.prefix].chunks(PASS_ROWS) {
                run(model, &mut [&mut lossy], &[pass], Ask::None, false, cancel)?;
                if o.dense {
                    run(model, &mut [&mut dense], &[pass], Ask::None, false, cancel)?;
                }
                cancel.advance(pass.len());
            }
            lossy.freeze(false);
            lossy.wake(true)?;
            super::serve_probes(model, &mut lossy, cancel)?;
            lossy.freeze(true);
        }
        let mut at = o.prefix;
        for pass in input[o.prefix..].chunks(PASS_ROWS) {
            let last = at + pass.len() == input.len();
            let got = run(model, &mut [&mut lossy], &[pass], Ask::All, last, cancel)?;
            let want = if o.dense {
                Some(run(model, &mut [&mut dense], &[pass], Ask::All, last, cancel)?)
            } else {
                None
            };
            for i in 0..pass.len() {
                let (row, target) = (got.row(i), targets[at + i]);
                sum += nll(row, target);
                if let Some(want) = &want {
                    dense_sum += nll(want.row(i), target);
                    kl_sum += kl(want.row(i), row);
                    same += u64::from(top1(want.row(i)) == top1(row));
                }
                total.tokens += 1;
            }
            at += pass.len();
            cancel.advance(pass.len());
        }
        total.bytes_per_token += lossy.bytes_held() as f64 / lossy.len() as f64;
        total.coded_tiles += lossy.coded_tiles();
        total.refused += lossy.stats().refused;
    }
    let n = total.tokens as f64;
    total.perplexity = (sum / n).exp();
    total.dense_perplexity = if o.dense { (dense_sum / n).exp() } else { total.perplexity };
    total.kl = kl_sum / n;
    total.top1 = if o.dense { same as f64 / n } else { 1.0 };
    total.bytes_per_token /= count as f64;
    total.ms = started.elapsed().as_secs_f64() * 1e3;
    Ok(total)
}
