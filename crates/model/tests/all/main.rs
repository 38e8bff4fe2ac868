//! Tests of the model runner against golden values, and of its readers against hostile files.

#![allow(clippy::unwrap_used)] // clippy.toml covers test functions, not their helpers

mod files;
mod forward;
mod hooks;
mod smollm2;
mod stories;
mod support;
mod write;
