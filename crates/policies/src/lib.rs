//! Published cache methods, one file each, and the registry that names them.
//!
//! A policy sees `core` and what two policies share, and nothing else: no backend, no store, no other policy. Its file starts
//! with a header (what it does, paper, what it reads, plans and keeps, where it deviates), declares its parameters with
//! [`options!`](options) and implements [`KvPolicy`](kvasir_core::KvPolicy). One line of `registry.rs` makes it reachable:
//! the modules below are declared from that table.

#![forbid(unsafe_code)]

#[macro_use]
pub mod options;
#[macro_use]
pub mod registry;

pub use options::{OptionDoc, Options};
pub use registry::{METHODS, Method, Track, find, methods_json};

methods!(declare_modules);
