//! Who may use a thing: one at a time or many, until it is closed; closing waits for those inside without blocking a thread.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvasir_engine::Error as Engine;

use crate::error::Result;
use crate::task::{Job, spawn};

/// Clones are the same door.
#[derive(Clone)]
pub(crate) struct Door(Arc<Mutex<State>>);

struct State {
    what: &'static str,
    alone: bool,
    closed: bool,
    inside: usize,
    /// Runs when the door is closed and nobody is inside.
    after: Vec<Job>,
}

/// Somebody inside; leaves when dropped.
pub(crate) struct Inside(Door);

impl Door {
    /// Many at a time.
    pub(crate) fn shared(what: &'static str) -> Self {
        Self::new(what, false)
    }

    /// One at a time; a second is `Busy`.
    pub(crate) fn alone(what: &'static str) -> Self {
        Self::new(what, true)
    }

    fn new(what: &'static str, alone: bool) -> Self {
        Self(Arc::new(Mutex::new(State { what, alone, closed: false, inside: 0, after: Vec::new() })))
    }

    pub(crate) fn enter(&self) -> Result<Inside> {
        let mut state = self.state();
        if state.closed {
            return Err(Engine::Closed { what: state.what }.into());
        }
        if state.alone && state.inside > 0 {
            return Err(Engine::Busy { what: "another call of it is in flight".into() }.into());
        }
        state.inside += 1;
        Ok(Inside(self.clone()))
    }

    /// Nobody enters any more; `after` runs on one of our threads once the last one has left.
    pub(crate) fn close(&self, after: Job) {
        let mut state = self.state();
        state.closed = true;
        if state.inside > 0 {
            state.after.push(after);
        } else {
            spawn(after);
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        let mut state = self.0.state();
        state.inside -= 1;
        if state.inside == 0 && state.closed {
            state.after.drain(..).for_each(spawn);
        }
    }
}
