//! Prefill and decode. Repair rows that a policy wants ride in the decode batch, a few per step.

use kvasir_core::{Ask, Batch, Error as CoreError, Logits, Model, Want, check};

use crate::cancel::Cancel;
use crate::pass::{Pass, Passes};
use crate::session::Session;
use crate::{Error, Result};

/// Rows of one pass of a prefill.
pub const PASS_ROWS: usize = 256;

/// Computes `ids` behind what the session holds, in passes of [`PASS_ROWS`]; keeps the logits of the last row. A cancelled
/// prefill keeps the passes that ended.
pub fn prefill(model: &dyn Model, session: &mut Session, ids: &[u32], cancel: &Cancel) -> Result<()> {
    session.whole()?;
    session.fits_in_passes(ids.len())?;
    let chunks = ids.chunks(PASS_ROWS);
    let last = chunks.len().saturating_sub(1);
    for (i, chunk) in chunks.enumerate() {
        let ask = if i == last { Ask::Last } else { Ask::None };
        let logits = run(model, &mut [session], &[chunk], ask, i == last, cancel)?;
        cancel.advance(chunk.len());
        if i == last {
            session.logits = Some(logits.row(0).to_vec());
        }
    }
    super::serve_probes(model, session, cancel)
}

/// One decode step: token `tokens[i]` goes behind session `i`; each session keeps the logits that follow.
pub fn step(model: &dyn Model, sessions: &mut [&mut Session], tokens: &[u32], cancel: &Cancel) -> Result<()> {
    check::equal("step.tokens", "tokens", sessions.len(), tokens.len())?;
    for s in sessions.iter() {
        s.whole()?;
        s.fits(1)?;
    }
    let chunks: Vec<&[u32]> = tokens.chunks(1).collect();
    let logits = run(model, sessions, &chunks, Ask::Last, false, cancel)?;
    for (i, s) in sessions.iter_mut().enumerate() {
        s.logits = Some(logits.row(i).to_vec());
        super::serve_probes(model, s, cancel)?;
    }
    Ok(())
}

/// One pass over new tokens of several sessions, repair rows included.
pub(super) fn run(
    model: &dyn Model,
    sessions: &mut [&mut Session],
    chunks: &[&[u32]],
    ask: Ask,
    prefill_end: bool,
    cancel: &Cancel,
) -> Result<Logits> {
    cancel.check()?;
    let mut batch = Batch { ids: Vec::new(), pos: Vec::new(), of: Vec::new(), ask };
    let mut seqs: Vec<(Pass, &mut Session)> = Vec::with_capacity(sessions.len());
    let mut begun = Ok(());
    for (session, chunk) in sessions.iter_mut().zip(chunks) {
        let start = batch.pos.len();
        if session.layout().as_ref() != model.layout() {
            begun = Err(CoreError::invalid(
                "model",
                "the model this session was opened for",
                "another layout or fingerprint",
            )
            .into());
            break;
        }
        let (taken, repairs) = if chunk.len() == 1 { next_repairs(session) } else { (0, Vec::new()) };
        for &p in &repairs {
            batch.ids.push(session.ids[p as usize]);
            batch.pos.push(p);
        }
        batch.pos.extend(session.len()..session.len() + chunk.len() as u32);
        batch.ids.extend_from_slice(chunk);
        batch.of.push(start as u32..batch.pos.len() as u32);
        match Pass::begin(session, &batch.ids[start..], &batch.pos[start..]) {
            Ok(pass) => {
                // If the pass is discarded, they are wanted again.
                forget_repairs(session, taken);
                seqs.push((pass, session));
            }
            Err(e) => {
                begun = Err(e);
                break;
            }
        }
    }
    let mut passes = Passes::new(seqs).with_cancel(cancel);
    let mut logits = Logits::default();
    let ran = begun.and_then(|()| model.forward(&batch, &mut passes, &mut logits).map_err(Error::from));
    match ran {
        Ok(()) => passes.end(prefill_end).map(|()| logits),
        Err(e) => {
            passes.discard();
            Err(e)
        }
    }
}

/// How many positions this step takes off the queue, and those of them to repair, ascending. A row that is gone or coded, or
/// whose token nobody knows, cannot be computed anew.
fn next_repairs(session: &Session) -> (usize, Vec<u32>) {
    let queue = session.wants.iter().find_map(|w| match w {
        Want::Repair { pos, per_step } => Some(&pos[..pos.len().min((*per_step).into())]),
        _ => None,
    });
    let queue = queue.unwrap_or_default();
    let known = |p: &u32| (*p as usize) < session.ids.len() && Pass::can_patch(session, *p);
    let mut now: Vec<u32> = queue.iter().copied().filter(known).collect();
    now.sort_unstable();
    now.dedup();
    (queue.len(), now)
}

/// Takes the first `n` positions off the queue.
fn forget_repairs(session: &mut Session, n: usize) {
    let Some(i) = session.wants.iter().position(|w| matches!(w, Want::Repair { .. })) else { return };
    if let Some(Want::Repair { pos, .. }) = session.wants.get_mut(i) {
        pos.drain(..n);
        if pos.is_empty() {
            session.wants.remove(i);
        }
    }
}
