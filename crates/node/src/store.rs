//! `NativeStore`: one directory, one secret, many tenants.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use kvasir_core::{Error as Core, Layout, Model};
use kvasir_engine::{Cache, Cancel, Dtype, Error as Engine, PrefillReport, SharedPrefix};
use kvasir_model::Llama;
use kvasir_store::Options;
use napi::Env;
use napi::bindgen_prelude::{ClassInstance, Object};
use napi_derive::napi;
use serde::Deserialize;
use serde_json::{Value as Json, json};

use crate::backend::{self, Path};
use crate::door::Door;
use crate::error::{Result, from_json, guard, to_json};
use crate::layout::{LayoutJson, hex32};
use crate::model::{NativeModel, session_options};
use crate::session::NativeSession;
use crate::task::promise;

/// See `NativeStore` in `ts/native.ts`.
#[napi]
pub struct NativeStore {
    /// Taken out by `close`; sessions keep the store for their blocks in memory.
    cache: Arc<Mutex<Option<Cache>>>,
    door: Door,
}

/// See `NativeStoreOptions` in `ts/native.ts`.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct StoreOptions {
    dir: String,
    #[serde(default)]
    key: Option<String>,
    #[serde(default)]
    host_bytes: Option<u64>,
    #[serde(default)]
    disk_bytes: Option<u64>,
}

/// See `NativeSessionOptions` in `ts/native.ts`.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct SessionJson {
    tenant: String,
    #[serde(default)]
    share_group: Option<String>,
    recipe: Json,
    kv: Dtype,
    #[serde(default)]
    layout: Option<LayoutJson>,
}

/// Opens or makes a store.
#[napi]
pub fn open_store(env: &Env, options: String) -> napi::Result<Object<'_>> {
    promise(env, move || {
        let o: StoreOptions = from_json("options", &options)?;
        let defaults = Options::default();
        let options = Options {
            dir: Some(o.dir.into()),
            key: o.key.map(|k| hex32("key", &k)).transpose()?,
            host_bytes: o.host_bytes.unwrap_or(defaults.host_bytes),
            disk_bytes: o.disk_bytes,
            ..defaults
        };
        let cache = Cache::open(options, backend::backend(None, Path::Auto)?)?;
        Ok(NativeStore { cache: Arc::new(Mutex::new(Some(cache))), door: Door::shared("store") })
    })
}

#[napi]
impl NativeStore {
    /// An empty session.
    #[napi]
    pub fn session<'env>(
        &self,
        env: &'env Env,
        options: String,
        model: Option<ClassInstance<'env, NativeModel>>,
    ) -> napi::Result<Object<'env>> {
        let (cache, inside) = guard(|| Ok((self.cache()?, self.door.enter()?)))?;
        let (model, door) = (guard(|| model.map(|m| m.get()).transpose())?, self.door.clone());
        promise(env, move || {
            let _inside = inside;
            let open = Opening::new(&cache, &options, model)?;
            let session = open.cache.session(&open.options.tenant, open.share, open.layout, open.session)?;
            Ok(NativeSession::new(session, open.model, door, None))
        })
    }

    /// A committed session, brought back.
    #[napi]
    pub fn resume<'env>(
        &self,
        env: &'env Env,
        id: String,
        options: String,
        model: Option<ClassInstance<'env, NativeModel>>,
    ) -> napi::Result<Object<'env>> {
        let (cache, inside) = guard(|| Ok((self.cache()?, self.door.enter()?)))?;
        let (model, door) = (guard(|| model.map(|m| m.get()).transpose())?, self.door.clone());
        promise(env, move || {
            let _inside = inside;
            let started = Instant::now();
            let open = Opening::new(&cache, &options, model)?;
            let tenant = &open.options.tenant;
            let (mut session, found) =
                open.cache.resume_as(&id, tenant, open.share, open.layout, &open.session)?;
            let mut report = PrefillReport {
                reused: found.reused,
                computed: 0,
                why: found.why,
                bytes: found.bytes,
                ms: 0.0,
            };
            if let Some(model) = &open.model {
                report.computed = session.recompute(&**model, &Cancel::default())?;
            }
            report.ms = started.elapsed().as_secs_f64() * 1e3;
            Ok(NativeSession::new(session, open.model, door, Some(report)))
        })
    }

    /// Removes everything of a tenant.
    #[napi]
    pub fn forget<'env>(&self, env: &'env Env, tenant: String) -> napi::Result<Object<'env>> {
        let (cache, inside) = guard(|| Ok((self.cache()?, self.door.enter()?)))?;
        promise(env, move || {
            let _inside = inside;
            let gone = cache.forget(&tenant)?;
            to_json(&json!({
                "records": gone.records,
                "blocks": gone.blocks,
                "bytes": gone.bytes,
                "hostBlocks": gone.host_blocks,
                "hostBytes": gone.host_bytes,
            }))
        })
    }

    /// JSON `NativeStoreStats`.
    #[napi]
    pub fn stats(&self) -> napi::Result<String> {
        guard(|| {
            let stats = self.cache()?.stats();
            let (host, disk) = (stats.host, stats.disk.unwrap_or_default());
            to_json(&json!({
                "hostBytes": host.bytes,
                "diskBytes": disk.bytes,
                "packs": disk.packs,
                "blocks": disk.blocks,
                "records": disk.records + stats.host_records,
                "hits": host.hits + disk.hits,
                // What memory lacks is asked of the disk, which counts what is nowhere.
                "misses": disk.misses.values().sum::<u64>(),
                "evicted": host.evicted + disk.evicted,
                "corrupt": disk.corrupt,
            }))
        })
    }

    /// Waits for work in flight.
    #[napi]
    pub fn close<'env>(&self, env: &'env Env) -> napi::Result<Object<'env>> {
        let (deferred, promise) = env.create_deferred()?;
        let cache = Arc::clone(&self.cache);
        self.door.close(Box::new(move || {
            drop(cache.lock().unwrap_or_else(PoisonError::into_inner).take());
            deferred.resolve(|_| Ok(()));
        }));
        Ok(promise)
    }
}

impl NativeStore {
    fn cache(&self) -> Result<Cache> {
        let cache = self.cache.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(cache.clone().ok_or(Engine::Closed { what: "store" })?)
    }
}

/// What `session` and `resume` have in common.
struct Opening {
    cache: Cache,
    options: SessionJson,
    session: kvasir_engine::SessionOptions,
    share: Option<SharedPrefix>,
    layout: Arc<Layout>,
    model: Option<Arc<Llama>>,
}

impl Opening {
    fn new(cache: &Cache, options: &str, model: Option<Arc<Llama>>) -> Result<Self> {
        let mut options: SessionJson = from_json("options", options)?;
        let (layout, backend) = match (&model, options.layout.take()) {
            (Some(model), None) => (model.layout().clone(), Arc::clone(model.backend())),
            (None, Some(layout)) => (layout.try_into()?, backend::backend(None, Path::Auto)?),
            (model, _) => {
                let got = if model.is_some() { "both" } else { "neither" };
                return Err(Core::invalid("model", "either a model or a layout", got).into());
            }
        };
        // Every whole block of a session in a group is the group's.
        let group = options.share_group.as_deref().map(|id| cache.store().group(id)).transpose()?;
        Ok(Self {
            cache: cache.on(backend),
            session: session_options(options.kv, &options.recipe)?,
            share: group.map(|key| SharedPrefix { key, tokens: u32::MAX }),
            layout: Arc::new(layout),
            options,
            model,
        })
    }
}
