//! `Cancel`: stops a running call and tells how far it is. Clones are handles of the same call.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use kvasir_core::{Error, Result};

/// A flag that stops work at its next checkpoint (a layer, or a pass), and counters of its rows.
#[derive(Clone, Debug, Default)]
pub struct Cancel(Arc<State>);

#[derive(Debug, Default)]
struct State {
    cancelled: AtomicBool,
    done: AtomicU32,
    total: AtomicU32,
}

impl Cancel {
    /// Stops the work; what was under way is discarded.
    pub fn cancel(&self) {
        self.0.cancelled.store(true, Ordering::Relaxed);
    }

    /// `Cancelled` once `cancel` was called.
    pub fn check(&self) -> Result<()> {
        if self.0.cancelled.load(Ordering::Relaxed) { Err(Error::Cancelled) } else { Ok(()) }
    }

    /// Rows done so far.
    pub fn done(&self) -> u32 {
        self.0.done.load(Ordering::Relaxed)
    }

    /// Rows in all, 0 while it is not known.
    pub fn total(&self) -> u32 {
        self.0.total.load(Ordering::Relaxed)
    }

    /// Says how much there is to do.
    pub fn expect(&self, rows: usize) {
        self.0.total.store(rows as u32, Ordering::Relaxed);
    }

    /// Says that `rows` more are done.
    pub fn advance(&self, rows: usize) {
        self.0.done.fetch_add(rows as u32, Ordering::Relaxed);
    }
}
