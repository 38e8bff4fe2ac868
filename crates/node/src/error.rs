//! What JavaScript sees of an error: `kvasir-error:{"code", "message", "details"}` as the message of what is thrown.

use std::panic::{AssertUnwindSafe, catch_unwind};

use kvasir_core::Error as Core;
use kvasir_engine::Error as Engine;
use kvasir_store::Error as Store;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value as Json, json};

pub(crate) type Result<T> = std::result::Result<T, Error>;

/// What went wrong on the way through the binding.
#[derive(Debug)]
pub(crate) enum Error {
    Engine(Engine),
    /// Right, but not now.
    State(&'static str),
    /// A defect of ours, caught.
    Panic(String),
}

impl From<Engine> for Error {
    fn from(e: Engine) -> Self {
        Self::Engine(e)
    }
}

impl From<Core> for Error {
    fn from(e: Core) -> Self {
        Self::Engine(e.into())
    }
}

impl From<Store> for Error {
    fn from(e: Store) -> Self {
        Self::Engine(e.into())
    }
}

impl Error {
    fn body(&self) -> Json {
        match self {
            Self::Engine(e) => json!({ "code": e.code(), "message": e.to_string(), "details": details(e) }),
            Self::State(what) => json!({ "code": "InvalidState", "message": what, "details": {} }),
            Self::Panic(what) => json!({ "code": "Panic", "message": what, "details": {} }),
        }
    }
}

impl From<Error> for napi::Error {
    fn from(e: Error) -> Self {
        Self::from_reason(format!("kvasir-error:{}", e.body()))
    }
}

/// The numbers and names behind a message.
fn details(e: &Engine) -> Json {
    match e {
        Engine::Core(Core::Invalid { field, expected, got }) => {
            json!({ "field": field, "expected": expected, "got": got })
        }
        Engine::Core(Core::Unsupported { what }) => json!({ "what": what }),
        Engine::Core(Core::NonFinite { what, row }) => json!({ "what": what, "row": row }),
        Engine::Core(Core::Malformed { what, reason }) => json!({ "what": what, "reason": reason }),
        Engine::Core(Core::OutOfMemory { what, bytes }) => json!({ "what": what, "bytes": bytes }),
        Engine::Core(Core::Io { path, .. }) => json!({ "path": path }),
        Engine::Store(Store::Invalid { field, expected, got }) => {
            json!({ "field": field, "expected": expected, "got": got })
        }
        Engine::Store(Store::StoreFull { wanted_bytes, free_bytes, path }) => {
            json!({ "wantedBytes": wanted_bytes, "freeBytes": free_bytes, "path": path })
        }
        Engine::Store(Store::Io { op, path, .. }) => json!({ "op": op, "path": path }),
        Engine::Store(Store::Malformed { path, reason }) => json!({ "path": path, "reason": reason }),
        Engine::NoSession { id } => json!({ "id": id }),
        Engine::Mismatch { id, field, stored, given } => {
            json!({ "id": id, "field": field, "stored": stored, "given": given })
        }
        Engine::ContextOverflow { limit, got } => json!({ "limit": limit, "got": got }),
        _ => json!({}),
    }
}

/// Runs an entry; an unwind becomes an error with code `Panic`.
pub(crate) fn guard<T>(entry: impl FnOnce() -> Result<T>) -> napi::Result<T> {
    let caught = catch_unwind(AssertUnwindSafe(entry)).unwrap_or_else(|payload| {
        let text = payload.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| payload.downcast_ref::<&str>().copied()).unwrap_or("no message");
        Err(Error::Panic(format!("a defect of kvasir, please report it: {text}")))
    });
    caught.map_err(Into::into)
}

/// Options from JSON. Unknown fields and wrong types are refused by name.
pub(crate) fn from_json<T: DeserializeOwned>(what: &str, text: &str) -> Result<T> {
    serde_json::from_str(text)
        .map_err(|e| Core::invalid(what, "the documented fields and types", e.to_string()).into())
}

/// A report as JSON.
pub(crate) fn to_json(report: &impl Serialize) -> Result<String> {
    serde_json::to_string(report).map_err(|e| Core::malformed("report", e).into())
}
