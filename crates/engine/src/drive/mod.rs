//! Drivers run the model and serve the wants of policies. They own the loop; nothing below them calls the model.

mod evaluate;
mod generate;
mod probe;

pub use evaluate::{EvaluateOptions, Evaluation, evaluate};
pub use generate::{PASS_ROWS, prefill, step};
pub use probe::serve_probes;
