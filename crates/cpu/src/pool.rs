//! The thread pool of a backend: its own rayon pool with named threads, never the global one.
//!
//! Work is cut into items whose number and borders do not depend on the number of threads, and no item reads what another
//! writes; so results are the same bits for any number of threads.

use std::cell::RefCell;

use kvasir_core::{Error, Result};
use rayon::prelude::*;

/// Arithmetic below which waking threads costs more than it saves: some 30 us of one core.
pub(crate) const SMALL: usize = 500_000;

/// Threads of a backend.
pub(crate) struct Pool {
    /// Absent with one thread: everything runs on the caller.
    pool: Option<rayon::ThreadPool>,
    threads: usize,
}

impl Pool {
    pub(crate) fn new(threads: usize) -> Result<Self> {
        let pool = match threads {
            0 | 1 => None,
            n => Some(
                rayon::ThreadPoolBuilder::new()
                    .num_threads(n)
                    .thread_name(|i| format!("kvasir-cpu-{i}"))
                    .build()
                    .map_err(|e| Error::unsupported(format!("a pool of {n} threads: {e}")))?,
            ),
        };
        Ok(Self { pool, threads: threads.max(1) })
    }

    pub(crate) fn threads(&self) -> usize {
        self.threads
    }

    /// Runs items `0..n`, on the caller alone if all of them together are less than [`SMALL`] operations.
    pub(crate) fn each(&self, n: usize, operations: usize, item: impl Fn(usize) + Sync) {
        match &self.pool {
            Some(pool) if n > 1 && operations >= SMALL => {
                pool.install(|| (0..n).into_par_iter().with_max_len(1).for_each(&item));
            }
            _ => (0..n).for_each(item),
        }
    }
}

thread_local! {
    static SCRATCH: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// Lends `len` f32 numbers of unspecified content that live as long as the thread. Items do not nest.
pub(crate) fn scratch<R>(len: usize, f: impl FnOnce(&mut [f32]) -> R) -> R {
    SCRATCH.with_borrow_mut(|s| {
        if s.len() < len {
            s.resize(len, 0.0);
        }
        f(&mut s[..len])
    })
}
