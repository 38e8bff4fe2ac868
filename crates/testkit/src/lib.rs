//! Test helpers of kvasir: naive f64 versions of what the product computes, backends that catch a class of mistakes, and the
//! suite that every backend must pass. Nothing here is fast and nothing here is shared with the code under test, except
//! the tile addresses of `core`, which are the format itself.

#![forbid(unsafe_code)]

mod clock;
pub mod contract;
mod deferred;
pub mod oracle;
pub mod pack;
mod random;
mod resolve;
mod spy;
mod synthetic;

pub use clock::Clock;
pub use deferred::Deferred;
pub use random::Noise;
pub use resolve::{pick_heads, pick_rows, resolve};
pub use spy::{Counts, Seen, Spy, Watched, computed};
pub use synthetic::Synthetic;
