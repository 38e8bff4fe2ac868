//! What the two file formats have in common: named tensors that can be read one by one.

use kvasir_core::{Error, Result, Weight, WeightType};

/// How the numbers of a tensor are stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ElementType {
    /// Blocks this build can read.
    Weight(WeightType),
    /// Anything else, by the name its format gives it.
    Other(String),
}

/// Where a tensor lies and what it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// Storage.
    pub kind: ElementType,
    /// Dimensions, the fastest last: `[rows, cols]`.
    pub shape: Vec<u64>,
    /// First byte in its file.
    pub offset: u64,
    /// Length in bytes; 0 for a type this build cannot read.
    pub bytes: u64,
}

/// Named tensors of a model on disk.
pub trait Tensors {
    /// The file or folder, for errors.
    fn what(&self) -> String;
    /// Every name.
    fn names(&self) -> Vec<String>;
    /// A tensor, if there is one of that name.
    fn info(&self, name: &str) -> Option<&TensorInfo>;
    /// Its bytes.
    fn read(&self, name: &str) -> Result<Vec<u8>>;
}

/// Name of a block type as files and `doctor` show it.
pub fn type_name(kind: WeightType) -> &'static str {
    match kind {
        WeightType::F32 => "F32",
        WeightType::F16 => "F16",
        WeightType::Bf16 => "BF16",
        WeightType::Q8_0 => "Q8_0",
        WeightType::Q4_0 => "Q4_0",
        WeightType::Q4_1 => "Q4_1",
    }
}

/// The type and bytes of tensor `name`, which must have exactly this shape.
pub(crate) fn fetch(src: &dyn Tensors, name: &str, shape: &[u64]) -> Result<(WeightType, Vec<u8>)> {
    let info = src
        .info(name)
        .ok_or_else(|| Error::malformed(src.what(), format_args!("tensor {name} is missing")))?;
    let ElementType::Weight(kind) = info.kind else {
        return Err(refuse_type(name, &info.kind));
    };
    if info.shape != shape {
        return Err(Error::malformed(
            src.what(),
            format_args!("tensor {name}: expected shape {shape:?}, got {:?}", info.shape),
        ));
    }
    Ok((kind, src.read(name)?))
}

/// The refusal of a storage type.
pub(crate) fn refuse_type(name: &str, kind: &ElementType) -> Error {
    let named = match kind {
        ElementType::Weight(k) => type_name(*k),
        ElementType::Other(n) => n,
    };
    Error::unsupported(format!(
        "tensor {name} has type {named}; this build reads F32, F16, BF16, Q8_0, Q4_0 and Q4_1"
    ))
}

/// Numbers of an F32, F16 or BF16 tensor.
pub(crate) fn to_f32(name: &str, kind: WeightType, bytes: &[u8]) -> Result<Vec<f32>> {
    let pairs = || bytes.chunks_exact(2).map(|b| [b[0], b[1]]);
    Ok(match kind {
        WeightType::F32 => {
            bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
        }
        WeightType::F16 => pairs().map(|b| half::f16::from_le_bytes(b).to_f32()).collect(),
        WeightType::Bf16 => pairs().map(|b| half::bf16::from_le_bytes(b).to_f32()).collect(),
        other => {
            return Err(Error::unsupported(format!(
                "tensor {name} has type {}; a norm must be F32, F16 or BF16",
                type_name(other)
            )));
        }
    })
}

/// Bytes a matrix takes.
pub(crate) fn weight_bytes(w: &Weight) -> usize {
    w.kind.row_bytes(w.cols as usize) * w.rows as usize
}
