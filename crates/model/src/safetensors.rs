//! Hugging Face folders: `config.json` and `model.safetensors`, or the shards of `model.safetensors.index.json`.
//!
//! A safetensors file is a u64 length, that many bytes of JSON, then the data without gaps. Lengths are compared with the
//! file before anything is allocated; the header may have 100 MB, as upstream allows; config and index 16 MB.
//!
//! Errors: `Malformed` for a broken rule, `Io`.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::Read;
use std::path::{Component, Path, PathBuf};

use ::safetensors::tensor::{Dtype, Metadata};
use kvasir_core::{Error, Result, WeightType};
use serde::Deserialize;
use serde_json::Value as Json;

use crate::gguf::read_span;
use crate::source::{ElementType, TensorInfo, Tensors};

/// Largest header of a safetensors file.
const MAX_HEADER: u64 = 100_000_000;

/// Largest `config.json` or index.
const MAX_JSON: u64 = 16 << 20;

/// A folder with a model, open.
#[derive(Debug)]
pub struct Folder {
    /// Content of `config.json`.
    pub config: Json,
    path: PathBuf,
    files: Vec<(PathBuf, File)>,
    tensors: HashMap<String, (usize, TensorInfo)>,
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl Folder {
    /// Opens a folder and reads the headers of its files.
    pub fn open(path: &Path) -> Result<Self> {
        let config = read_json(&path.join("config.json"))?;
        let mut folder = Self { config, path: path.to_owned(), files: Vec::new(), tensors: HashMap::new() };
        let index = path.join("model.safetensors.index.json");
        if !path.join("model.safetensors").exists() && index.exists() {
            let map: Index = serde_json::from_value(read_json(&index)?)
                .map_err(|e| Error::malformed(index.display().to_string(), e))?;
            let mut shards: Vec<&String> = map.weight_map.values().collect();
            shards.sort_unstable();
            shards.dedup();
            for shard in shards {
                // A shard lies in the folder itself: an index must not make us read elsewhere.
                let parts: Vec<_> = Path::new(shard).components().collect();
                if !matches!(parts[..], [Component::Normal(_)]) {
                    return Err(Error::malformed(
                        index.display().to_string(),
                        format_args!("{shard:?} is not a file name"),
                    ));
                }
                folder.add(&path.join(shard))?;
            }
            for (name, shard) in &map.weight_map {
                let there =
                    folder.tensors.get(name).is_some_and(|(i, _)| folder.files[*i].0 == path.join(shard));
                if !there {
                    return Err(Error::malformed(
                        index.display().to_string(),
                        format_args!("tensor {name} is not in {shard}"),
                    ));
                }
            }
        } else {
            folder.add(&path.join("model.safetensors"))?;
        }
        Ok(folder)
    }

    fn add(&mut self, path: &Path) -> Result<()> {
        let io = |e| Error::io(path, e);
        let bad = |reason: &dyn std::fmt::Display| Error::malformed(path.display().to_string(), reason);
        let mut file = File::open(path).map_err(io)?;
        let bytes = file.metadata().map_err(io)?.len();
        let mut word = [0; 8];
        if bytes < 8 {
            return Err(bad(&"shorter than its header length"));
        }
        file.read_exact(&mut word).map_err(io)?;
        let header_bytes = u64::from_le_bytes(word);
        if header_bytes > MAX_HEADER || header_bytes > bytes - 8 {
            return Err(bad(&format_args!("a header of {header_bytes} bytes in a file of {bytes}")));
        }
        let mut header = vec![0; header_bytes as usize];
        file.read_exact(&mut header).map_err(io)?;
        // Deserializing checks that the tensors follow each other without gaps and fit their shapes.
        let meta: Metadata = serde_json::from_slice(&header).map_err(|e| bad(&e))?;
        let data = 8 + header_bytes;
        if data.checked_add(meta.data_len() as u64) != Some(bytes) {
            return Err(bad(&format_args!(
                "{} bytes of data expected, {} there",
                meta.data_len(),
                bytes - data
            )));
        }
        for (name, info) in meta.tensors() {
            let kind = match info.dtype {
                Dtype::F32 => ElementType::Weight(WeightType::F32),
                Dtype::F16 => ElementType::Weight(WeightType::F16),
                Dtype::BF16 => ElementType::Weight(WeightType::Bf16),
                other => ElementType::Other(format!("{other:?}")),
            };
            let info = TensorInfo {
                kind,
                shape: info.shape.iter().map(|&d| d as u64).collect(),
                offset: data + info.data_offsets.0 as u64,
                bytes: (info.data_offsets.1 - info.data_offsets.0) as u64,
            };
            if self.tensors.insert(name.clone(), (self.files.len(), info)).is_some() {
                return Err(bad(&format_args!("tensor {name} is also in another shard")));
            }
        }
        self.files.push((path.to_owned(), file));
        Ok(())
    }
}

impl Tensors for Folder {
    fn what(&self) -> String {
        self.path.display().to_string()
    }

    fn names(&self) -> Vec<String> {
        self.tensors.keys().cloned().collect()
    }

    fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.get(name).map(|(_, info)| info)
    }

    fn read(&self, name: &str) -> Result<Vec<u8>> {
        let (file, info) = self
            .tensors
            .get(name)
            .ok_or_else(|| Error::malformed(self.what(), format_args!("tensor {name} is missing")))?;
        let (path, file) = &self.files[*file];
        read_span(file, path, info.offset, info.bytes)
    }
}

fn read_json(path: &Path) -> Result<Json> {
    let io = |e| Error::io(path, e);
    let file = File::open(path).map_err(io)?;
    let bytes = file.metadata().map_err(io)?.len();
    let what = || path.display().to_string();
    if bytes > MAX_JSON {
        return Err(Error::malformed(what(), format_args!("{bytes} bytes; at most {MAX_JSON} are read")));
    }
    let mut text = Vec::new();
    file.take(MAX_JSON).read_to_end(&mut text).map_err(io)?;
    serde_json::from_slice(&text).map_err(|e| Error::malformed(what(), e))
}
