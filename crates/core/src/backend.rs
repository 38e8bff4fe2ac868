//! `Backend`: where bytes live and calls run.

use serde::Serialize;

use crate::{Buf, Call, Result};

/// What a backend is and what it found on this machine.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct BackendInfo {
    /// `cpu`, `cuda`, …
    pub kind: String,
    /// Path chosen: `scalar`, `avx2`, …
    pub isa: String,
    /// Features found.
    pub features: Vec<String>,
    /// Threads of its pool.
    pub threads: usize,
    /// Device name.
    pub device: String,
}

/// A device: cpu, cuda, or the deferred test backend. `submit` enqueues and never waits; `read` is the only wait.
/// Trouble found while a queued call runs is returned by the next `submit` or `read`.
pub trait Backend: Send + Sync {
    /// What it is.
    fn info(&self) -> &BackendInfo;
    /// Zeroed memory, 128-byte aligned.
    fn alloc(&self, bytes: usize) -> Result<Buf>;
    /// Enqueues a call.
    fn submit(&self, call: Call) -> Result<()>;
    /// Waits for all calls that write `src`, then copies its first bytes.
    fn read(&self, src: &Buf, dst: &mut [u8]) -> Result<()>;

    /// Reads f32 numbers.
    fn read_f32(&self, src: &Buf) -> Result<Vec<f32>> {
        let mut bytes = vec![0u8; src.bytes()];
        self.read(src, &mut bytes)?;
        Ok(bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect())
    }

    /// Allocates and fills a buffer.
    fn upload(&self, data: &[u8]) -> Result<Buf> {
        let dst = self.alloc(data.len())?;
        self.submit(Call::Write { dst: dst.clone(), data: data.into() })?;
        Ok(dst)
    }

    /// Allocates and fills a buffer of f32 numbers.
    fn upload_f32(&self, data: &[f32]) -> Result<Buf> {
        let mut bytes = vec![0u8; data.len() * 4];
        for (to, x) in bytes.chunks_exact_mut(4).zip(data) {
            to.copy_from_slice(&x.to_le_bytes());
        }
        self.upload(&bytes)
    }
}
