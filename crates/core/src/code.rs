//! How rows are stored: `Code { space, map, format }`. A codec is a value of this type, not a trait.
//!
//! | format | bytes of a 32-row part at D channels (padded to `unit`) | parameters |
//! |---|---|---|
//! | `F32` | 128 D, plain rows | none |
//! | `F16`, `Bf16` | 64 D | none |
//! | `Int { bits: 8, along: Row, group: 0 }` | 32 D + 128 | `{f16 scale, f16 mid}` per row |
//!
//! Errors: a code this build has no kernel for is refused by `check` with its name.

use serde::{Deserialize, Serialize};

use crate::{Error, Result, SideId};

/// Rows of a tile.
pub const TILE_ROWS: usize = 32;

/// Whether stored keys carry their rotation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum KeySpace {
    /// Keys after RoPE: cheapest to read, bound to their position.
    Rotated,
    /// Keys before RoPE: rotated when read, so they may move.
    Plain,
}

/// Linear map in front of the format.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Map {
    /// Rows as they are.
    None,
    /// Walsh-Hadamard rotation over the channels.
    Hadamard,
    /// One factor per channel.
    Scale(SideId),
    /// Coefficients in a basis, `rank` per head.
    Project {
        /// The basis.
        basis: SideId,
        /// Kept coefficients per head.
        rank: Vec<u16>,
    },
    /// Only the channels listed.
    Gather(SideId),
}

/// Direction in which the numbers that share a parameter lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Axis {
    /// Channels of one row share their scale.
    Row,
    /// Rows of one channel share their scale.
    Channel,
}

/// How numbers become bits. Formats are kernels; everything else is a choice of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Format {
    /// 32-bit floats, plain rows.
    F32,
    /// IEEE half.
    F16,
    /// Brain float.
    Bf16,
    /// 8-bit float, 4 exponent bits.
    E4m3,
    /// Integers with a scale (and a middle) per `group` numbers along `along`; `group` 0 is the whole row.
    Int {
        /// Bits of a code.
        bits: u8,
        /// Who shares a scale.
        along: Axis,
        /// How many share it.
        group: u16,
    },
    /// The `per_row` largest numbers of a row and a bitmap.
    Kept {
        /// Numbers kept in a row.
        per_row: u16,
    },
    /// Two of four numbers.
    TwoOfFour,
}

impl Format {
    /// Symmetric 8-bit integers, absmax / 127 per row and head.
    pub const INT8: Self = Self::Int { bits: 8, along: Axis::Row, group: 0 };

    /// Whether what is read differs from an f32 row by more than its rounding to 16 bits.
    pub fn is_dense(self) -> bool {
        matches!(self, Self::F32 | Self::F16 | Self::Bf16)
    }

    /// Channels are padded with zeros to a multiple of this.
    pub fn unit(self) -> usize {
        match self {
            Self::F32 => 1,
            Self::F16 | Self::Bf16 => 16,
            Self::E4m3 | Self::Int { bits: 8, .. } => 32,
            _ => 64,
        }
    }

    /// Channels as stored.
    pub fn padded(self, dim: usize) -> usize {
        dim.div_ceil(self.unit()) * self.unit()
    }

    /// Bytes of one part (keys or values) of a tile of 32 rows.
    pub fn part_bytes(self, dim: usize) -> Result<usize> {
        let d = self.padded(dim);
        Ok(match self {
            Self::F32 => 4 * TILE_ROWS * d,
            Self::F16 | Self::Bf16 => 2 * TILE_ROWS * d,
            Self::INT8 => TILE_ROWS * d + 4 * TILE_ROWS,
            other => return Err(Error::unsupported(format!("format {other} has no kernel in this build"))),
        })
    }

    /// Stable number of the format in headers.
    pub fn tag(self) -> Result<u8> {
        Ok(match self {
            Self::F32 => 1,
            Self::F16 => 2,
            Self::Bf16 => 3,
            Self::INT8 => 8,
            other => return Err(Error::unsupported(format!("format {other} has no tag"))),
        })
    }

    /// The format behind a tag.
    pub fn from_tag(tag: u8) -> Option<Self> {
        Some(match tag {
            1 => Self::F32,
            2 => Self::F16,
            3 => Self::Bf16,
            8 => Self::INT8,
            _ => return None,
        })
    }
}

impl std::fmt::Display for Format {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::F32 => f.write_str("f32"),
            Self::F16 => f.write_str("f16"),
            Self::Bf16 => f.write_str("bf16"),
            Self::E4m3 => f.write_str("fp8_e4m3"),
            Self::Int { bits, along: Axis::Row, group: 0 } => write!(f, "int{bits}"),
            Self::Int { bits, along, group } => write!(f, "int{bits}-{along:?}-g{group}"),
            Self::Kept { per_row } => write!(f, "kept{per_row}"),
            Self::TwoOfFour => f.write_str("2of4"),
        }
    }
}

/// How a column of a run is stored.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Code {
    /// Keys after or before RoPE; values are always `Plain`.
    pub space: KeySpace,
    /// Linear map in front.
    pub map: Map,
    /// Numbers to bits.
    pub format: Format,
}

impl Code {
    /// Keys after RoPE in `format`, no map.
    pub fn rotated(format: Format) -> Self {
        Self { space: KeySpace::Rotated, map: Map::None, format }
    }

    /// Rows as they are in `format`, no map: values, or keys before RoPE.
    pub fn plain(format: Format) -> Self {
        Self { space: KeySpace::Plain, map: Map::None, format }
    }

    /// This build can store and attend the code.
    pub fn check(&self, field: &str) -> Result<()> {
        if self.map != Map::None {
            return Err(Error::unsupported(format!(
                "{field}: map {:?} has no kernel in this build",
                self.map
            )));
        }
        self.format.part_bytes(64).map(|_| ())
    }
}

/// Codes of the two columns of a kv table: keys, values.
pub type Codes = [Code; 2];

/// Bytes of a tile record: key part, then value part, each padded to 128 bytes.
pub fn tile_bytes(codes: &Codes, k_dim: usize, v_dim: usize) -> Result<usize> {
    Ok(value_offset(codes, k_dim)? + codes[1].format.part_bytes(v_dim)?.next_multiple_of(128))
}

/// Byte offset of the value part in a tile record.
pub fn value_offset(codes: &Codes, k_dim: usize) -> Result<usize> {
    Ok(codes[0].format.part_bytes(k_dim)?.next_multiple_of(128))
}
