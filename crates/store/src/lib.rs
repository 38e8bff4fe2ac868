//! The store: names, packs, records, and the RAM and disk tiers that hold them.
//!
//! It deals in bytes and knows nothing of models. A [`Chain`] names the blocks of a text under a [`TenantKey`]; a [`Draft`] is
//! a block to be written, an [`Expect`] what a reader demands of one; a [`Record`] brings a session back. [`Store`] ties the
//! tiers together:
//!
//! - commit: [`Store::commit`] writes the blocks that are not stored yet as one pack, then the record, each durable before
//!   the next.
//! - resume: [`Store::record`], then [`Disk::get`] for each block of the record's chain until one is missing.
//! - prefix: [`Store::has`], then the same reads.
//!
//! A read is exactly what was written, or a typed [`Miss`]. The files are described byte by byte in `docs/format.md`, the
//! reasons for block size and pack layout in `docs/design/store.md`.

#![forbid(unsafe_code)]

mod disk;
mod error;
pub mod field;
mod fs;
mod index;
mod key;
mod mem;
mod name;
pub mod pack;
mod record;
mod store;

pub use disk::{Disk, DiskOptions, DiskStats, Forgotten, PutReport};
pub use error::{Error, Miss, Result};
pub use fs::{FileRead, FileWrite, Fs, OsFs};
pub use mem::{BlockKey, Evict, Lease, Lru, Mem, MemStats};
pub use name::{BLOCK_TOKENS, Chain, CodecId, Identity, Lineage, Name, Tag, TenantKey, block_name};
pub use pack::{Block, Copies, Draft, Expect, FORMAT_VERSION, Kind, LAYOUT_T32};
pub use record::{BlockRef, Record, encode_record, parse_record};
pub use store::{Commit, Options, Stats, Store};
