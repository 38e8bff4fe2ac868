//! Tests of the engine on the bundled small model.

#![allow(clippy::unwrap_used)] // helpers of tests, too
#![allow(clippy::print_stderr, clippy::print_stdout)] // what could not run, and what was measured

mod apply;
mod deferred;
mod doubts;
mod foreign;
mod gate;
mod reuse;
mod smollm2;
mod support;
