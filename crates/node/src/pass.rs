//! `NativePass`: new rows of a session from an engine that runs its own layers.

use std::sync::{Arc, Mutex, PoisonError};

use kvasir_core::Error as Core;
use kvasir_engine::Pass;
use napi::Env;
use napi::bindgen_prelude::{Float32ArraySlice, Object};
use napi_derive::napi;

use crate::cancel::NativeCancel;
use crate::error::{Error, Result, guard, to_json};
use crate::session::Slot;
use crate::task::promise;

/// See `NativePass` in `ts/native.ts`.
#[napi]
pub struct NativePass {
    slot: Arc<Slot>,
    pass: Mutex<Option<Pass>>,
}

#[napi]
impl NativePass {
    /// Attention of one layer on borrowed views.
    #[napi]
    pub fn attend(
        &self,
        layer: u32,
        q: &[f32],
        k: &[f32],
        v: &[f32],
        mut out: Float32ArraySlice<'_>,
    ) -> napi::Result<()> {
        guard(|| {
            let apart = |x: &[f32]| {
                let (a, b) = (x.as_ptr_range(), out.as_ptr_range());
                a.end <= b.start || b.end <= a.start
            };
            if !(apart(q) && apart(k) && apart(v)) {
                return Err(Core::invalid("out", "memory of its own", "a view of q, k or v").into());
            }
            // SAFETY: JavaScript waits in this call and nobody else writes the array; it overlaps no other argument.
            let out = unsafe { out.as_mut() };
            let lease = self.slot.lease()?;
            let mut pass = self.pass.lock().unwrap_or_else(PoisonError::into_inner);
            let pass = pass.as_mut().ok_or(ENDED)?;
            Ok(pass.attend_host(&mut *lease.session()?, layer as usize, q, k, v, out)?)
        })
    }

    /// Ends it; plans run here.
    #[napi]
    pub fn end<'env>(&self, env: &'env Env, cancel: &NativeCancel) -> napi::Result<Object<'env>> {
        let (lease, pass) = guard(|| Ok((self.slot.lease()?, self.take()?)))?;
        let (cancel, foreign) = (cancel.inner.clone(), self.slot.has_model());
        promise(env, move || {
            let mut session = lease.session()?;
            // Under the fingerprint of our own runner only its rows are named.
            if foreign {
                session.mark_foreign();
            }
            to_json(&pass.finish(&mut session, &cancel)?)
        })
    }

    /// Drops it: the session is as before.
    #[napi]
    pub fn discard(&self) -> napi::Result<()> {
        guard(|| {
            let (lease, pass) = (self.slot.lease()?, self.take()?);
            pass.discard(&mut *lease.session()?);
            Ok(())
        })
    }
}

const ENDED: Error = Error::State("this pass has ended");

impl NativePass {
    pub(crate) fn new(slot: Arc<Slot>, pass: Pass) -> Self {
        Self { slot, pass: Mutex::new(Some(pass)) }
    }

    fn take(&self) -> Result<Pass> {
        self.pass.lock().unwrap_or_else(PoisonError::into_inner).take().ok_or(ENDED)
    }
}

impl Drop for NativePass {
    /// A pass that was forgotten must not keep its session busy for ever.
    fn drop(&mut self) {
        // Not through the door: a call in flight finds the session busy and is over soon.
        if let Ok(pass) = self.take() {
            self.slot.forget(pass);
        }
    }
}
