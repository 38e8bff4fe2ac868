//! The Node binding: converts and delegates. One file per JavaScript class; its functions below.
//!
//! Options and reports cross as JSON strings, tensors as typed arrays. Whatever may take over a millisecond is a promise that
//! is settled from our own threads (`task`); libuv's four stay free for the host's files and name lookups. Every entry catches
//! unwinding. Errors: see `error`.

#![allow(clippy::needless_pass_by_value, reason = "arguments arrive by value from JavaScript")]

mod backend;
mod bench;
mod cancel;
mod door;
mod error;
mod layout;
mod model;
mod pass;
mod session;
mod store;
mod task;

use kvasir_core::Backend;
use napi_derive::napi;
use serde_json::json;

use error::{guard, to_json};

pub use bench::bench;
pub use model::load_model;
pub use session::step_many;
pub use store::open_store;

/// Version of the crates.
#[napi]
pub fn version() -> String {
    env!("CARGO_PKG_VERSION").to_owned()
}

/// The registry of methods, JSON.
#[napi]
pub fn methods() -> napi::Result<String> {
    guard(|| to_json(&kvasir_engine::methods_json()))
}

/// What calls run on, JSON.
#[napi]
pub fn backend_info() -> napi::Result<String> {
    guard(|| {
        let cpu = backend::cpu(None, backend::Path::Auto)?;
        let info = cpu.info();
        to_json(&json!({
            "backend": info.kind,
            "device": info.device,
            "isa": info.isa,
            "available": backend::available(),
            "threads": info.threads,
            "os": std::env::consts::OS,
            "arch": std::env::consts::ARCH,
            "features": info.features,
        }))
    })
}
