//! GGUF files, versions 2 and 3: metadata as JSON, and where each tensor lies.
//!
//! Layout of a file, little-endian: `GGUF`, u32 version, u64 tensors, u64 keys; the keys (string, u32 type, value); the
//! tensors (string, u32 dimensions, u64 each, u32 type, u64 offset); padding to `general.alignment`; the data.
//!
//! Every byte is hostile: a count or a length is compared with what is left of the file before anything is allocated, and
//! the whole header may hold at most [`MAX_VALUES`] array values, so that its memory stays a small multiple of its size.
//!
//! Errors: `Malformed` for a broken rule, `Unsupported` for other versions, byte orders and split files, `Io`.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use kvasir_core::{Error, Result, WeightType};
use serde_json::{Map, Value as Json};

use crate::source::{ElementType, TensorInfo, Tensors};

/// Most array values in all keys together: four times the lists of a vocabulary of 256,000 ids.
pub const MAX_VALUES: u64 = 1 << 22;

/// Longest name of a key or of a tensor.
const MAX_NAME: u64 = 65_535;

/// Deepest array of arrays.
const MAX_DEPTH: u32 = 4;

/// Names of ggml's tensor types by number, for refusals.
const TYPE_NAMES: [(u32, &str); 33] = [
    (0, "F32"),
    (1, "F16"),
    (2, "Q4_0"),
    (3, "Q4_1"),
    (6, "Q5_0"),
    (7, "Q5_1"),
    (8, "Q8_0"),
    (9, "Q8_1"),
    (10, "Q2_K"),
    (11, "Q3_K"),
    (12, "Q4_K"),
    (13, "Q5_K"),
    (14, "Q6_K"),
    (15, "Q8_K"),
    (16, "IQ2_XXS"),
    (17, "IQ2_XS"),
    (18, "IQ3_XXS"),
    (19, "IQ1_S"),
    (20, "IQ4_NL"),
    (21, "IQ3_S"),
    (22, "IQ2_S"),
    (23, "IQ4_XS"),
    (24, "I8"),
    (25, "I16"),
    (26, "I32"),
    (27, "I64"),
    (28, "F64"),
    (29, "IQ1_M"),
    (30, "BF16"),
    (34, "TQ1_0"),
    (35, "TQ2_0"),
    (39, "MXFP4"),
    (40, "NVFP4"),
];

/// The block type of a ggml type number, or its name.
fn element_type(tag: u32) -> ElementType {
    match tag {
        0 => ElementType::Weight(WeightType::F32),
        1 => ElementType::Weight(WeightType::F16),
        2 => ElementType::Weight(WeightType::Q4_0),
        3 => ElementType::Weight(WeightType::Q4_1),
        8 => ElementType::Weight(WeightType::Q8_0),
        30 => ElementType::Weight(WeightType::Bf16),
        _ => ElementType::Other(
            TYPE_NAMES
                .iter()
                .find(|(t, _)| *t == tag)
                .map_or_else(|| format!("ggml type {tag}"), |(_, name)| (*name).to_owned()),
        ),
    }
}

/// What stands in front of the data of a GGUF file.
#[derive(Debug)]
pub struct Header {
    /// 2 or 3.
    pub version: u32,
    /// Every key; integers and floats as JSON numbers, arrays as JSON arrays.
    pub metadata: Map<String, Json>,
    /// Tensors by name, with offsets from the start of the file.
    pub tensors: HashMap<String, TensorInfo>,
}

impl Header {
    /// Reads the header of a file of `file_bytes` bytes. `what` names the file in errors.
    pub fn read(input: &mut dyn Read, file_bytes: u64, what: &str) -> Result<Self> {
        let mut r = Reader { input, at: 0, len: file_bytes, values: 0, what };
        if &r.take::<4>("the magic")? != b"GGUF" {
            return Err(r.bad("does not start with `GGUF`"));
        }
        let version = r.u32("the version")?;
        if version.swap_bytes() == 2 || version.swap_bytes() == 3 {
            return Err(Error::unsupported(format!("{what}: big-endian GGUF")));
        }
        if version != 2 && version != 3 {
            return Err(Error::unsupported(format!("{what}: GGUF version {version}; 2 and 3 can be read")));
        }
        let tensor_count = r.u64("the number of tensors")?;
        let key_count = r.u64("the number of keys")?;
        // A key takes at least 8 + 4 + 1 bytes, a tensor 8 + 4 + 8 + 4 + 8.
        r.fits(key_count, 13, "keys")?;
        r.fits(tensor_count, 32, "tensors")?;

        let mut metadata = Map::new();
        for _ in 0..key_count {
            let key = r.string(MAX_NAME, "a key")?;
            let kind = r.u32(&key)?;
            let value = r.value(kind, &key, 0)?;
            if metadata.insert(key.clone(), value).is_some() {
                return Err(r.bad(format_args!("key {key:?} appears twice")));
            }
        }
        let split = metadata.get("split.count").and_then(Json::as_u64).unwrap_or(0);
        if split > 1 {
            return Err(Error::unsupported(format!("{what}: a GGUF split into {split} files")));
        }
        let alignment = match metadata.get("general.alignment") {
            None => 32,
            Some(v) => v
                .as_u64()
                .filter(|a| a.is_power_of_two() && (8..=1 << 20).contains(a))
                .ok_or_else(|| r.bad(format_args!("general.alignment is {v}")))?,
        };

        let mut found = Vec::new();
        for _ in 0..tensor_count {
            found.push(r.tensor()?);
        }
        let data = r.at.next_multiple_of(alignment);
        let mut tensors = HashMap::with_capacity(found.len());
        let mut spans = Vec::with_capacity(found.len());
        for (name, mut info) in found {
            if info.offset % alignment != 0 {
                return Err(r.bad(format_args!("tensor {name}: offset {} is not aligned", info.offset)));
            }
            info.offset = info
                .offset
                .checked_add(data)
                .filter(|o| o.checked_add(info.bytes).is_some_and(|end| end <= file_bytes))
                .ok_or_else(|| r.bad(format_args!("tensor {name}: data beyond the end of the file")))?;
            spans.push((info.offset, info.offset + info.bytes));
            if tensors.insert(name.clone(), info).is_some() {
                return Err(r.bad(format_args!("tensor {name} appears twice")));
            }
        }
        // Tensors that share bytes would let a small file claim any amount of weights.
        spans.sort_unstable();
        if spans.windows(2).any(|w| w[0].1 > w[1].0) {
            return Err(r.bad("tensors overlap"));
        }
        Ok(Self { version, metadata, tensors })
    }
}

/// A GGUF file, open.
#[derive(Debug)]
pub struct Gguf {
    /// What stands in front of the data.
    pub header: Header,
    path: PathBuf,
    file: File,
}

impl Gguf {
    /// Opens a file and reads its header.
    pub fn open(path: &Path) -> Result<Self> {
        let io = |e| Error::io(path, e);
        let file = File::open(path).map_err(io)?;
        let bytes = file.metadata().map_err(io)?.len();
        let header =
            Header::read(&mut BufReader::with_capacity(1 << 16, &file), bytes, &path.display().to_string())?;
        Ok(Self { header, path: path.to_owned(), file })
    }
}

impl Tensors for Gguf {
    fn what(&self) -> String {
        self.path.display().to_string()
    }

    fn names(&self) -> Vec<String> {
        self.header.tensors.keys().cloned().collect()
    }

    fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.header.tensors.get(name)
    }

    fn read(&self, name: &str) -> Result<Vec<u8>> {
        let info = self
            .info(name)
            .ok_or_else(|| Error::malformed(self.what(), format_args!("tensor {name} is missing")))?;
        read_span(&self.file, &self.path, info.offset, info.bytes)
    }
}

/// Bytes `offset .. offset + bytes` of a file; the caller has compared them with its length.
pub(crate) fn read_span(mut file: &File, path: &Path, offset: u64, bytes: u64) -> Result<Vec<u8>> {
    let io = |e| Error::io(path, e);
    file.seek(SeekFrom::Start(offset)).map_err(io)?;
    let mut out = vec![0; bytes as usize];
    file.read_exact(&mut out).map_err(io)?;
    Ok(out)
}

/// A reader that knows how much of the file is left.
struct Reader<'a> {
    input: &'a mut dyn Read,
    at: u64,
    len: u64,
    values: u64,
    what: &'a str,
}

impl Reader<'_> {
    fn bad(&self, reason: impl std::fmt::Display) -> Error {
        Error::malformed(self.what, reason)
    }

    /// `count` things of at least `each` bytes may still follow.
    fn fits(&self, count: u64, each: u64, of: &str) -> Result<()> {
        let left = self.len.saturating_sub(self.at);
        if count.checked_mul(each).is_none_or(|n| n > left) {
            return Err(self.bad(format_args!("{of}: {count} announced, {left} bytes left")));
        }
        Ok(())
    }

    fn bytes(&mut self, out: &mut [u8], of: &str) -> Result<()> {
        self.fits(out.len() as u64, 1, of)?;
        self.input.read_exact(out).map_err(|e| match e.kind() {
            std::io::ErrorKind::UnexpectedEof => self.bad(format_args!("{of}: the file ends")),
            _ => Error::io(self.what, e),
        })?;
        self.at += out.len() as u64;
        Ok(())
    }

    fn take<const N: usize>(&mut self, of: &str) -> Result<[u8; N]> {
        let mut out = [0; N];
        self.bytes(&mut out, of)?;
        Ok(out)
    }

    fn u32(&mut self, of: &str) -> Result<u32> {
        Ok(u32::from_le_bytes(self.take(of)?))
    }

    fn u64(&mut self, of: &str) -> Result<u64> {
        Ok(u64::from_le_bytes(self.take(of)?))
    }

    fn string(&mut self, most: u64, of: &str) -> Result<String> {
        let len = self.u64(of)?;
        if len > most {
            return Err(self.bad(format_args!("{of}: a string of {len} bytes")));
        }
        self.fits(len, 1, of)?;
        let mut out = vec![0; len as usize];
        self.bytes(&mut out, of)?;
        String::from_utf8(out).map_err(|_| self.bad(format_args!("{of}: a string that is not UTF-8")))
    }

    fn float(&self, value: f64, of: &str) -> Result<Json> {
        serde_json::Number::from_f64(value)
            .map(Json::Number)
            .ok_or_else(|| self.bad(format_args!("{of}: a number that is not finite")))
    }

    fn value(&mut self, kind: u32, of: &str, depth: u32) -> Result<Json> {
        Ok(match kind {
            0 => u8::from_le_bytes(self.take(of)?).into(),
            1 => i8::from_le_bytes(self.take(of)?).into(),
            2 => u16::from_le_bytes(self.take(of)?).into(),
            3 => i16::from_le_bytes(self.take(of)?).into(),
            4 => self.u32(of)?.into(),
            5 => i32::from_le_bytes(self.take(of)?).into(),
            6 => {
                let x = f32::from_le_bytes(self.take(of)?);
                self.float(f64::from(x), of)?
            }
            7 => match self.take::<1>(of)?[0] {
                0 => Json::Bool(false),
                1 => Json::Bool(true),
                x => return Err(self.bad(format_args!("{of}: {x} is not a bool"))),
            },
            8 => Json::String(self.string(u64::MAX, of)?),
            9 => {
                let kind = self.u32(of)?;
                let count = self.u64(of)?;
                // An array in an array takes 12 bytes, a string 8.
                let each = match kind {
                    0 | 1 | 7 => 1,
                    2 | 3 => 2,
                    4..=6 => 4,
                    8 | 10..=12 => 8,
                    _ => 12,
                };
                self.fits(count, each, of)?;
                self.values += count;
                if self.values > MAX_VALUES || depth == MAX_DEPTH {
                    return Err(self.bad(format_args!("{of}: arrays too large or too deep")));
                }
                let mut out = Vec::with_capacity(count as usize);
                for _ in 0..count {
                    out.push(self.value(kind, of, depth + 1)?);
                }
                Json::Array(out)
            }
            10 => self.u64(of)?.into(),
            11 => i64::from_le_bytes(self.take(of)?).into(),
            12 => {
                let x = f64::from_le_bytes(self.take(of)?);
                self.float(x, of)?
            }
            _ => return Err(self.bad(format_args!("{of}: value type {kind} does not exist"))),
        })
    }

    fn tensor(&mut self) -> Result<(String, TensorInfo)> {
        let name = self.string(MAX_NAME, "a tensor name")?;
        let dims = self.u32(&name)?;
        if !(1..=4).contains(&dims) {
            return Err(self.bad(format_args!("tensor {name}: {dims} dimensions")));
        }
        // The file has the fastest dimension first; shapes here have it last.
        let mut shape = Vec::with_capacity(4);
        for _ in 0..dims {
            shape.push(self.u64(&name)?);
        }
        shape.reverse();
        let kind = element_type(self.u32(&name)?);
        let offset = self.u64(&name)?;
        let elements = shape
            .iter()
            .try_fold(1u64, |n, &d| n.checked_mul(d))
            .filter(|&n| n > 0)
            .ok_or_else(|| self.bad(format_args!("tensor {name}: shape {shape:?}")))?;
        // Only the size of types that can be read is known; the others are refused before their data is touched.
        let bytes = match kind {
            ElementType::Other(_) => 0,
            ElementType::Weight(t) => {
                let (block, block_bytes) = t.block();
                if shape[shape.len() - 1] % block as u64 != 0 {
                    return Err(
                        self.bad(format_args!("tensor {name}: rows of {shape:?} are no whole blocks"))
                    );
                }
                (elements / block as u64)
                    .checked_mul(block_bytes as u64)
                    .ok_or_else(|| self.bad(format_args!("tensor {name}: shape {shape:?}")))?
            }
        };
        Ok((name, TensorInfo { kind, shape, offset, bytes }))
    }
}
