//! Tests of the engine on the bundled small model.

mod apply;
mod reuse;
mod smollm2;
mod support;
