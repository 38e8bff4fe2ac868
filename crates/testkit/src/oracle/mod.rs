//! Naive f64 versions of the runner and of whole methods: written from the papers, without hooks, engine, tiles or columns.

pub mod flows;
mod gguf;
mod llama;

pub use llama::{
    Kv, LayerWeights, Mat, NaiveLlama, Qkv, Row, See, Trace, Weights, argmax, dot, rotate, softmax,
};
