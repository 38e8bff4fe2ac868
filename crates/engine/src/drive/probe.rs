//! Serves `Want::Probe`: runs its tokens as queries behind the cached rows, fills the column, drops the rows, wakes the
//! policy again.

use kvasir_core::{Ask, Batch, Logits, Model, Want};

use crate::Result;
use crate::cancel::Cancel;
use crate::pass::{Pass, Passes};
use crate::session::Session;

/// Runs every probe the session's policies want.
pub fn serve_probes(model: &dyn Model, session: &mut Session, cancel: &Cancel) -> Result<()> {
    while let Some(i) = session.wants.iter().position(|w| matches!(w, Want::Probe { .. })) {
        let Some(Want::Probe { tokens, into }) = session.wants.remove(i) else { break };
        let batch = Batch::one(&tokens, session.len(), Ask::None);
        let pass = Pass::probe(session, &tokens, into)?;
        let mut passes = Passes::new(vec![(pass, session)]).with_cancel(cancel);
        match model.forward(&batch, &mut passes, &mut Logits::default()) {
            Ok(()) => passes.end(false)?,
            Err(e) => {
                passes.discard();
                return Err(e.into());
            }
        }
    }
    Ok(())
}
