//! `NativeSession`: one sequence with one writer. A call in flight holds the session; every other call is `Busy` until then.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvasir_core::{Error as Core, check};
use kvasir_engine::{Error as Engine, Order, Pass, PrefillReport, Session, SessionReport, drive};
use kvasir_model::{Llama, SampleOptions};
use kvasir_store::BLOCK_TOKENS;
use napi::Env;
use napi::bindgen_prelude::{ClassInstance, Float32Array, Object, Uint32Array};
use napi_derive::napi;
use serde::{Deserialize, Serialize};
use serde_json::{Value as Json, json};

use crate::cancel::NativeCancel;
use crate::door::{Door, Inside};
use crate::error::{Error, Result, from_json, guard, to_json};
use crate::layout::hex;
use crate::pass::NativePass;
use crate::task::promise;

/// See `NativeSession` in `ts/native.ts`.
#[napi]
pub struct NativeSession {
    slot: Arc<Slot>,
}

/// A session and who may use it.
pub(crate) struct Slot {
    door: Door,
    session: Mutex<Session>,
    model: Option<Arc<Llama>>,
    store: Door,
    opened: Option<PrefillReport>,
}

/// The right to use a session until it is dropped.
pub(crate) struct Lease {
    slot: Arc<Slot>,
    _inside: Inside,
}

impl Slot {
    /// Discards a pass that nobody can end any more.
    pub(crate) fn forget(&self, pass: Pass) {
        if let Ok(mut session) = self.session.lock()
            && matches!(session.usable(), Err(Engine::Busy { .. }))
        {
            pass.discard(&mut session);
        }
    }

    /// Our own runner computes its rows.
    pub(crate) fn has_model(&self) -> bool {
        self.model.is_some()
    }

    pub(crate) fn lease(self: &Arc<Self>) -> Result<Lease> {
        Ok(Lease { _inside: self.door.enter()?, slot: Arc::clone(self) })
    }
}

impl Lease {
    pub(crate) fn session(&self) -> Result<MutexGuard<'_, Session>> {
        self.slot.session.lock().map_err(|_| {
            Error::Panic("an earlier call of this session hit a defect of kvasir; close it".to_owned())
        })
    }

    /// The session, if no pass of a foreign engine is open.
    fn idle(&self) -> Result<MutexGuard<'_, Session>> {
        let session = self.session()?;
        session.usable()?;
        Ok(session)
    }

    fn model(&self) -> Result<&Arc<Llama>> {
        let model = self.slot.model.as_ref();
        model.ok_or(Error::State("this session has a layout and no model to run"))
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct IngestOptions {
    rows: u32,
    layout: Order,
    #[serde(default)]
    ids: Vec<u32>,
}

/// See `NativeSessionReport` in `ts/native.ts`.
#[derive(Serialize)]
struct FullReport<'a> {
    #[serde(flatten)]
    session: SessionReport,
    opened: &'a Option<PrefillReport>,
}

/// Appends `ids[i]` to `sessions[i]` in one batch.
#[napi]
pub fn step_many<'env>(
    env: &'env Env,
    sessions: Vec<ClassInstance<'env, NativeSession>>,
    ids: Uint32Array,
    cancel: &NativeCancel,
) -> napi::Result<Object<'env>> {
    let (ids, cancel) = (ids.to_vec(), cancel.inner.clone());
    let leases = guard(|| {
        check::at_least("sessions", sessions.len(), 1)?;
        for (i, s) in sessions.iter().enumerate() {
            if sessions[..i].iter().any(|t| Arc::ptr_eq(&s.slot, &t.slot)) {
                return Err(Core::invalid("sessions", "every session once", "one twice").into());
            }
        }
        sessions.iter().map(|s| s.slot.lease()).collect::<Result<Vec<Lease>>>()
    })?;
    promise(env, move || {
        let model = leases[0].model()?;
        for lease in &leases {
            if !Arc::ptr_eq(lease.model()?, model) {
                return Err(Core::invalid("sessions", "sessions of one model", "several models").into());
            }
        }
        let mut held = leases.iter().map(Lease::idle).collect::<Result<Vec<_>>>()?;
        let mut all: Vec<&mut Session> = held.iter_mut().map(|s| &mut **s).collect();
        Ok(drive::step(&**model, &mut all, &ids, &cancel)?)
    })
}

#[napi]
impl NativeSession {
    /// Appends ids.
    #[napi]
    pub fn prefill<'env>(
        &self,
        env: &'env Env,
        ids: Uint32Array,
        cancel: &NativeCancel,
    ) -> napi::Result<Object<'env>> {
        let lease = guard(|| self.slot.lease())?;
        let (ids, cancel) = (ids.to_vec(), cancel.inner.clone());
        promise(env, move || {
            let model = lease.model()?;
            to_json(&lease.session()?.prefill(&**model, &ids, &cancel)?)
        })
    }

    /// Appends one id.
    #[napi]
    pub fn step<'env>(&self, env: &'env Env, id: u32, cancel: &NativeCancel) -> napi::Result<Object<'env>> {
        let (lease, cancel) = (guard(|| self.slot.lease())?, cancel.inner.clone());
        promise(env, move || {
            let model = lease.model()?;
            Ok(drive::step(&**model, &mut [&mut *lease.session()?], &[id], &cancel)?)
        })
    }

    /// The id that would come next. A draw is numbered by its position, so that a replay gives the same.
    #[napi]
    pub fn sample(&self, options: String) -> napi::Result<u32> {
        guard(|| {
            let options: SampleOptions = from_json("options", &options)?;
            let lease = self.slot.lease()?;
            let session = lease.idle()?;
            Ok(options.choose(logits(&session)?, session.len().into())?)
        })
    }

    /// Copy of the logits behind the last row.
    #[napi]
    pub fn logits(&self) -> napi::Result<Float32Array> {
        guard(|| {
            let lease = self.slot.lease()?;
            let session = lease.idle()?;
            Ok(Float32Array::new(logits(&session)?.to_vec()))
        })
    }

    /// Ids in order.
    #[napi]
    pub fn ids(&self) -> napi::Result<Uint32Array> {
        guard(|| Ok(Uint32Array::new(self.slot.lease()?.idle()?.ids().to_vec())))
    }

    /// Makes the session durable.
    #[napi]
    pub fn commit<'env>(&self, env: &'env Env, id: String) -> napi::Result<Object<'env>> {
        let (lease, store) = guard(|| Ok((self.slot.lease()?, self.slot.store.enter()?)))?;
        promise(env, move || {
            let _store = store;
            let done = lease.session()?.commit(&id, &Json::Null)?;
            to_json(&json!({
                "id": id,
                "tokens": done.tokens,
                "alreadyStored": done.reused_blocks * BLOCK_TOKENS as u64,
                "bytesWritten": done.new_bytes,
                "durable": done.durable,
                "ms": done.ms,
            }))
        })
    }

    /// A second session with the same rows.
    #[napi]
    pub fn fork<'env>(&self, env: &'env Env) -> napi::Result<Object<'env>> {
        let lease = guard(|| self.slot.lease())?;
        promise(env, move || {
            let fork = lease.session()?.fork()?;
            let slot = &lease.slot;
            Ok(NativeSession::new(fork, slot.model.clone(), slot.store.clone(), slot.opened.clone()))
        })
    }

    /// Starts a pass of an engine that runs its own layers.
    #[napi]
    pub fn pass(&self, rows: u32, ids: Uint32Array) -> napi::Result<NativePass> {
        guard(|| {
            let lease = self.slot.lease()?;
            let mut session = lease.session()?;
            let pass = session.begin(rows, &ids)?;
            Ok(NativePass::new(Arc::clone(&self.slot), pass))
        })
    }

    /// Appends rows of all layers at once.
    #[napi]
    pub fn ingest<'env>(
        &self,
        env: &'env Env,
        k: Float32Array,
        v: Float32Array,
        options: String,
    ) -> napi::Result<Object<'env>> {
        let lease = guard(|| self.slot.lease())?;
        // JavaScript may detach the arrays while the job runs, which frees their memory.
        let (k, v) = (k.to_vec(), v.to_vec());
        promise(env, move || {
            let o: IngestOptions = from_json("options", &options)?;
            to_json(&lease.session()?.ingest(&k, &v, o.rows, o.layout, &o.ids)?)
        })
    }

    /// JSON `NativeSessionReport`.
    #[napi]
    pub fn report(&self) -> napi::Result<String> {
        guard(|| {
            let lease = self.slot.lease()?;
            let session = lease.idle()?.report();
            to_json(&FullReport { session, opened: &self.slot.opened })
        })
    }

    /// Digest over all rows as stored.
    #[napi]
    pub fn digest<'env>(&self, env: &'env Env) -> napi::Result<Object<'env>> {
        let lease = guard(|| self.slot.lease())?;
        promise(env, move || Ok(hex(&lease.idle()?.digest()?)))
    }

    /// Waits for the call in flight, then frees.
    #[napi]
    pub fn close<'env>(&self, env: &'env Env) -> napi::Result<Object<'env>> {
        let (deferred, promise) = env.create_deferred()?;
        let slot = Arc::clone(&self.slot);
        self.slot.door.close(Box::new(move || {
            slot.session.lock().unwrap_or_else(PoisonError::into_inner).close();
            deferred.resolve(|_| Ok(()));
        }));
        Ok(promise)
    }
}

impl NativeSession {
    pub(crate) fn new(
        session: Session,
        model: Option<Arc<Llama>>,
        store: Door,
        opened: Option<PrefillReport>,
    ) -> Self {
        let (door, session) = (Door::alone("session"), Mutex::new(session));
        Self { slot: Arc::new(Slot { door, session, model, store, opened }) }
    }
}

fn logits(session: &Session) -> Result<&[f32]> {
    session.logits().ok_or(Error::State("there are no logits yet: prefill at least one id"))
}
