//! Model runner of kvasir: reads GGUF files and Hugging Face folders, runs Llama-type decoders over any [`Backend`] and
//! meets the cache through [`Hooks`] only. Tokens come as ids; sampling is in [`sample`], measures in [`eval`].
//!
//! [`Backend`]: kvasir_core::Backend
//! [`Hooks`]: kvasir_core::Hooks

#![forbid(unsafe_code)]

pub use kvasir_core::eval;
pub mod gguf;
mod llama;
pub mod safetensors;
pub mod sample;
mod shape;
mod source;

pub use llama::{FileFormat, Llama, SLAB_ROWS};
pub use sample::{SampleOptions, Sampler};
pub use shape::Shape;
pub use source::{ElementType, TensorInfo, Tensors, type_name};
