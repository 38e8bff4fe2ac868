//! The CPU backend of kvasir: every [`Call`] in portable Rust, and in AVX2 where the machine has it.
//!
//! - `submit` runs a call at once on the backend's own thread pool and returns when it is done; `read` copies.
//! - Results are the same bits for any number of threads: work is cut independently of them, partial results are merged in
//!   index order.
//! - On the scalar path a row's result does not depend on the rows computed beside it.
//! - Errors: wrong lengths, shapes, foreign or overlapping buffers are [`Error::Invalid`]; codes without kernels are
//!   [`Error::Unsupported`]; nothing is written then.

#[cfg(not(target_endian = "little"))]
compile_error!("tiles and weights are little-endian; a big-endian port must convert on load and store");

mod arch;
pub mod bench;
mod calls;
mod cpu;
mod mem;
mod pool;
mod rope;

pub use cpu::{Cpu, CpuOptions, Isa};
