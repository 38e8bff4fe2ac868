//! Our own threads, and promises settled from them.
//!
//! Threads start when the first job comes. They only wait for the backend's pool, files and locks, so there are more of them
//! than cores; a job may wait for a backend but never for another job.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use napi::Env;
use napi::bindgen_prelude::{Object, ToNapiValue};

use crate::error::{Result, guard};

pub(crate) type Job = Box<dyn FnOnce() + Send>;

const THREADS: usize = 8;

static QUEUE: OnceLock<Sender<Job>> = OnceLock::new();

/// Runs a job on one of our threads.
pub(crate) fn spawn(job: Job) {
    let queue = QUEUE.get_or_init(|| {
        let (queue, jobs) = channel::<Job>();
        let jobs = Arc::new(Mutex::new(jobs));
        for i in 0..THREADS {
            let jobs = Arc::clone(&jobs);
            let named = std::thread::Builder::new().name(format!("kvasir-task-{i}"));
            // A machine that has no thread left runs jobs with fewer of them.
            drop(named.spawn(move || work(&jobs)));
        }
        queue
    });
    // With no thread at all the job is dropped here, and its promise stays pending until the process ends.
    drop(queue.send(job));
}

fn work(jobs: &Mutex<Receiver<Job>>) {
    loop {
        let job = jobs.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(job) = job else { return };
        // Jobs report their own panics; this keeps the thread for the next one.
        drop(catch_unwind(AssertUnwindSafe(job)));
    }
}

/// A promise of what `job` returns. What the job holds is let go before the promise is settled.
pub(crate) fn promise<T: ToNapiValue + Send + 'static>(
    env: &Env,
    job: impl FnOnce() -> Result<T> + Send + 'static,
) -> napi::Result<Object<'_>> {
    let (deferred, promise) = env.create_deferred()?;
    spawn(Box::new(move || match guard(job) {
        Ok(value) => deferred.resolve(move |_| Ok(value)),
        Err(e) => deferred.reject(e),
    }));
    Ok(promise)
}
