//! `bench`: attention over each code against the memory of this machine.

use kvasir_cpu::CpuOptions;
use kvasir_cpu::bench::{BenchOptions, bench_attention};
use napi::Env;
use napi::bindgen_prelude::Object;
use napi_derive::napi;
use serde::Deserialize;

use crate::cancel::NativeCancel;
use crate::error::{from_json, to_json};
use crate::task::promise;

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Options {
    quick: bool,
    #[serde(default)]
    threads: Option<usize>,
}

/// JSON of `kvasir_cpu::bench::BenchReport`. A run takes seconds and is cancelled only before it starts.
#[napi]
pub fn bench<'env>(env: &'env Env, options: String, cancel: &NativeCancel) -> napi::Result<Object<'env>> {
    let cancel = cancel.inner.clone();
    promise(env, move || {
        let o: Options = from_json("options", &options)?;
        cancel.check()?;
        let full = BenchOptions {
            cpu: CpuOptions { threads: o.threads, ..CpuOptions::default() },
            ..BenchOptions::default()
        };
        let quick =
            BenchOptions { tokens: 2048, rounds: 3, head_dims: vec![64], groups: vec![1, 3], ..full.clone() };
        to_json(&bench_attention(if o.quick { &quick } else { &full })?)
    })
}
