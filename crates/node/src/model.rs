//! `NativeModel`: a loaded model.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use kvasir_core::Model;
use kvasir_engine::drive::{EvaluateOptions, evaluate};
use kvasir_engine::{Dtype, Error as Engine, Recipe, SessionOptions};
use kvasir_model::Llama;
use napi::Env;
use napi::bindgen_prelude::{Object, Uint32Array};
use napi_derive::napi;
use serde::Deserialize;
use serde_json::{Value as Json, json};

use crate::backend::{self, Path};
use crate::cancel::NativeCancel;
use crate::error::{Result, from_json, guard, to_json};
use crate::layout::{LayoutJson, hex};
use crate::task::promise;

/// See `NativeModel` in `ts/native.ts`.
#[napi]
pub struct NativeModel {
    inner: Mutex<Option<Arc<Llama>>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct LoadOptions {
    #[serde(default)]
    threads: Option<usize>,
    #[serde(default)]
    isa: Path,
}

/// See `NativeEvalOptions` in `ts/native.ts`.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct EvalOptions {
    recipe: Json,
    kv: Dtype,
    chunk: usize,
    chunks: usize,
    prefix: usize,
    lead: Option<u32>,
    reference: bool,
}

/// Loads a GGUF file or a Hugging Face folder.
#[napi]
pub fn load_model<'env>(
    env: &'env Env,
    path: String,
    options: String,
    cancel: &NativeCancel,
) -> napi::Result<Object<'env>> {
    let cancel = cancel.inner.clone();
    promise(env, move || {
        let options: LoadOptions = from_json("options", &options)?;
        let backend = backend::backend(options.threads, options.isa)?;
        let mut watch = |_: usize, total: usize| {
            cancel.expect(total);
            cancel.advance(1);
            cancel.check()
        };
        let model = Llama::load_watched(PathBuf::from(path), backend, &mut watch)?;
        Ok(NativeModel { inner: Mutex::new(Some(Arc::new(model))) })
    })
}

#[napi]
impl NativeModel {
    /// JSON `NativeModelInfo`.
    #[napi]
    pub fn info(&self) -> napi::Result<String> {
        guard(|| {
            let model = self.get()?;
            to_json(&json!({
                "architecture": model.architecture(),
                "vocabSize": model.vocab(),
                "context": model.context(),
                "fingerprint": hex(&model.fingerprint()),
                "weights": model.weight_types(),
                "weightBytes": model.weights_bytes(),
                "layout": LayoutJson::try_from(model.layout())?,
            }))
        })
    }

    /// JSON: the file's own metadata.
    #[napi]
    pub fn metadata(&self) -> napi::Result<String> {
        guard(|| to_json(self.get()?.metadata_json()))
    }

    /// Measures a recipe on a text.
    #[napi]
    pub fn evaluate<'env>(
        &self,
        env: &'env Env,
        ids: Uint32Array,
        options: String,
        cancel: &NativeCancel,
    ) -> napi::Result<Object<'env>> {
        let model = guard(|| self.get())?;
        let (ids, cancel) = (ids.to_vec(), cancel.inner.clone());
        promise(env, move || {
            let o: EvalOptions = from_json("options", &options)?;
            let options = EvaluateOptions {
                ids,
                chunk: o.chunk,
                chunks: o.chunks,
                prefix: o.prefix,
                bos: o.lead,
                session: session_options(o.kv, &o.recipe)?,
                dense: o.reference,
            };
            to_json(&evaluate(&*model, model.backend(), &options, &cancel)?)
        })
    }

    /// Lets go of the weights once nobody uses them.
    #[napi]
    pub fn close(&self) {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner).take();
    }
}

impl NativeModel {
    pub(crate) fn get(&self) -> Result<Arc<Llama>> {
        let inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(inner.clone().ok_or(Engine::Closed { what: "model" })?)
    }
}

/// Options of the engine from those of the binding.
pub(crate) fn session_options(kv: Dtype, recipe: &Json) -> Result<SessionOptions> {
    Ok(SessionOptions { dtype: kv, recipe: Recipe::parse(recipe)?, ..SessionOptions::default() })
}
