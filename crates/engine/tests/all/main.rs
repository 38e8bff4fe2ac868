//! Tests of the engine on the bundled small model.

#![allow(clippy::unwrap_used)] // tests

mod apply;
mod deferred;
mod foreign;
mod gate;
mod reuse;
mod smollm2;
mod support;
