//! Tests of the engine on the bundled small model.

mod apply;
mod gate;
mod deferred;
mod reuse;
mod smollm2;
mod support;
