//! `NativeCancel`: stops one running call and tells how far it is.

use kvasir_engine::Cancel;
use napi_derive::napi;

/// See `NativeCancel` in `ts/native.ts`.
#[napi]
#[derive(Default)]
pub struct NativeCancel {
    pub(crate) inner: Cancel,
}

#[napi]
impl NativeCancel {
    /// For a call that has not begun.
    #[napi(constructor)]
    pub fn new() -> Self {
        Self::default()
    }

    /// Asks the work to stop.
    #[napi]
    pub fn cancel(&self) {
        self.inner.cancel();
    }

    /// Rows done.
    #[napi]
    pub fn done(&self) -> u32 {
        self.inner.done()
    }

    /// Rows in all, 0 while unknown.
    #[napi]
    pub fn total(&self) -> u32 {
        self.inner.total()
    }
}
