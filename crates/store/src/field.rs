//! The field table: every byte the store writes is written through a [`Field`], and the documentation and the corruption
//! tests are driven by the same table.
//!
//! Everything is little-endian. A region is a contiguous piece of a file; offsets count from its start. Fields behind the
//! first one of variable length have no fixed offset: they follow their predecessor.

use std::io;
use std::ops::Range;

use twox_hash::XxHash3_128;

use crate::Miss;

/// A contiguous piece of a file, laid out by one part of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Region {
    /// First 64 bytes of a pack.
    PackHeader,
    /// One block of a pack: header, ids, part lengths, payload, checksum.
    Block,
    /// Head of the footer index.
    FooterHead,
    /// One entry of the footer index.
    FooterEntry,
    /// Checksum of the footer index.
    FooterEnd,
    /// Last 48 bytes of a pack.
    Trailer,
    /// A session record: the whole file.
    Record,
}

/// How long a field is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Len {
    /// So many bytes.
    Bytes(u32),
    /// So many bytes for each of what the named field counts.
    Each(u32, &'static str),
    /// As many bytes as the named field says.
    Value(&'static str),
    /// Zero bytes up to the next multiple of 64; the number is what still follows the padding.
    Pad(u32),
}

/// One field of the format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Field {
    /// The piece it belongs to.
    pub region: Region,
    /// Its name, unique in the region.
    pub name: &'static str,
    /// Bytes from the start of the region; `None` behind a field of variable length.
    pub offset: Option<u32>,
    /// Its length.
    pub len: Len,
}

impl Field {
    fn fixed_len(&self) -> usize {
        match self.len {
            Len::Bytes(n) => n as usize,
            _ => 0,
        }
    }
}

/// Where a field landed in a written file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Span {
    /// The field.
    pub field: Field,
    /// Which block, entry or record of the file, from 0.
    pub index: u32,
    /// Bytes of the file.
    pub range: Range<u64>,
}

/// Lays fields out one after the other and gives each a constant.
macro_rules! region {
    ($(#[$doc:meta])* $module:ident = $region:ident { $($body:tt)* }) => {
        $(#[$doc])*
        pub(crate) mod $module {
            use super::{Field, Len, Region};
            region!(@ $region, 0, [] $($body)*);
        }
    };
    (@ $region:ident, $at:expr, [$($done:ident)*] $name:ident: $label:literal, $len:literal; $($rest:tt)*) => {
        pub(crate) const $name: Field =
            Field { region: Region::$region, name: $label, offset: Some($at), len: Len::Bytes($len) };
        region!(@ $region, $at + $len, [$($done)* $name] $($rest)*);
    };
    // From the first field of variable length on, offsets are not fixed.
    (@ $region:ident, $at:expr, [$($done:ident)*] then $name:ident: $label:literal, $len:expr; $($rest:tt)*) => {
        pub(crate) const $name: Field =
            Field { region: Region::$region, name: $label, offset: Some($at), len: $len };
        /// Bytes in front of the first field of variable length.
        pub(crate) const FIXED: usize = $at;
        region!(~ $region, [$($done)* $name] $($rest)*);
    };
    (~ $region:ident, [$($done:ident)*] $name:ident: $label:literal, $len:expr; $($rest:tt)*) => {
        pub(crate) const $name: Field = Field { region: Region::$region, name: $label, offset: None, len: $len };
        region!(~ $region, [$($done)* $name] $($rest)*);
    };
    (~ $region:ident, [$($done:ident)*]) => {
        pub(crate) const ALL: &[Field] = &[$($done),*];
    };
    (@ $region:ident, $at:expr, [$($done:ident)*]) => {
        /// Bytes of the region.
        pub(crate) const FIXED: usize = $at;
        pub(crate) const ALL: &[Field] = &[$($done),*];
    };
}

region!(pack_header = PackHeader {
    MAGIC: "magic", 8;
    VERSION: "version", 4;
    HEADER_LEN: "header_len", 4;
    PACK_ID: "pack_id", 16;
    OWNER: "owner", 16;
    SUM: "sum", 16;
});

region!(block = Block {
    MAGIC: "magic", 4;
    VERSION: "version", 2;
    LAYOUT_TAG: "layout_tag", 2;
    HEADER_LEN: "header_len", 4;
    KIND: "kind", 1;
    KEY_SPACE: "key_space", 1;
    DTYPE: "dtype", 1;
    LINEAGE_KIND: "lineage_kind", 1;
    CODEC: "codec", 8;
    TOTAL_LEN: "total_len", 8;
    PAYLOAD_LEN: "payload_len", 8;
    TOKEN_COUNT: "token_count", 4;
    PART_COUNT: "part_count", 4;
    OWNER: "owner", 16;
    NAME: "name", 32;
    PARENT: "parent", 32;
    FINGERPRINT: "fingerprint", 32;
    LAYOUT: "layout", 32;
    LINEAGE: "lineage", 32;
    then IDS: "ids", Len::Each(4, "token_count");
    PART_LENS: "part_lens", Len::Each(4, "part_count");
    HEADER_PAD: "header_pad", Len::Pad(0);
    PAYLOAD: "payload", Len::Value("payload_len");
    PAYLOAD_PAD: "payload_pad", Len::Pad(16);
    SUM: "sum", Len::Bytes(16);
});

region!(footer_head = FooterHead {
    MAGIC: "magic", 4;
    ENTRY_COUNT: "entry_count", 4;
    ENTRY_LEN: "entry_len", 4;
    RESERVED: "reserved", 4;
});

region!(footer_entry = FooterEntry {
    NAME: "name", 32;
    PARENT: "parent", 32;
    OFFSET: "offset", 8;
    LEN: "len", 8;
    CODEC: "codec", 8;
    KIND: "kind", 1;
    RESERVED: "reserved", 7;
});

region!(footer_end = FooterEnd {
    SUM: "sum", 16;
});

region!(trailer = Trailer {
    FOOTER_OFFSET: "footer_offset", 8;
    FOOTER_LEN: "footer_len", 8;
    FILE_LEN: "file_len", 8;
    VERSION: "version", 4;
    MAGIC: "magic", 4;
    SUM: "sum", 16;
});

region!(record = Record {
    MAGIC: "magic", 8;
    VERSION: "version", 4;
    FILE_LEN: "file_len", 8;
    OWNER: "owner", 16;
    SESSION: "session", 32;
    GENERATION: "generation", 8;
    WRITTEN_MS: "written_ms", 8;
    FINGERPRINT: "fingerprint", 32;
    LAYOUT: "layout", 32;
    KEY_SPACE: "key_space", 1;
    DTYPE: "dtype", 1;
    LINEAGE_KIND: "lineage_kind", 1;
    RESERVED: "reserved", 1;
    LINEAGE: "lineage", 32;
    SNAPSHOT: "snapshot", 32;
    CODEC: "codec", 8;
    BLOCK_COUNT: "block_count", 4;
    TOKEN_COUNT: "token_count", 4;
    STATE_LEN: "state_len", 8;
    then OWNERS: "block_owners", Len::Each(16, "block_count");
    NAMES: "block_names", Len::Each(32, "block_count");
    LINEAGE_KINDS: "block_lineage_kinds", Len::Each(1, "block_count");
    LINEAGES: "block_lineages", Len::Each(32, "block_count");
    IDS: "ids", Len::Each(4, "token_count");
    STATE: "state", Len::Value("state_len");
    SUM: "sum", Len::Bytes(16);
});

/// Every field of packs and records, region by region, in file order.
pub fn fields() -> Vec<Field> {
    [
        pack_header::ALL,
        block::ALL,
        footer_head::ALL,
        footer_entry::ALL,
        footer_end::ALL,
        trailer::ALL,
        record::ALL,
    ]
    .concat()
}

/// Sink of an [`Encoder`].
pub(crate) type Out<'a> = dyn FnMut(&[u8]) -> io::Result<()> + 'a;

/// Writes fields in order, keeps the running checksum, and remembers where each field landed.
pub(crate) struct Encoder<'a> {
    out: &'a mut Out<'a>,
    buffer: Vec<u8>,
    at: u64,
    start: u64,
    index: u32,
    hash: XxHash3_128,
    spans: Option<Vec<Span>>,
}

/// Small writes are gathered up to this size: parts are a few KB, system calls are not free.
const BUFFER: usize = 1 << 20;

impl<'a> Encoder<'a> {
    pub(crate) fn new(out: &'a mut Out<'a>, keep_spans: bool) -> Self {
        Self {
            out,
            buffer: Vec::new(),
            at: 0,
            start: 0,
            index: 0,
            hash: XxHash3_128::new(),
            spans: keep_spans.then(Vec::new),
        }
    }

    /// Start a region: its offsets and its checksum count from here.
    pub(crate) fn begin(&mut self, index: usize) {
        self.start = self.at;
        self.index = index as u32;
        self.hash = XxHash3_128::new();
    }

    /// Start another piece of the same checksum.
    pub(crate) fn next_piece(&mut self, index: usize) {
        self.start = self.at;
        self.index = index as u32;
    }

    pub(crate) fn at(&self) -> u64 {
        self.at
    }

    pub(crate) fn put(&mut self, field: &Field, bytes: &[u8]) -> io::Result<()> {
        self.put_pieces(field, [bytes])
    }

    pub(crate) fn put_pieces<'b>(
        &mut self,
        field: &Field,
        pieces: impl IntoIterator<Item = &'b [u8]>,
    ) -> io::Result<()> {
        let from = self.at;
        // Two compares a field: a byte in the wrong place must not reach a file.
        assert!(field.offset.is_none_or(|o| u64::from(o) == from - self.start), "{field:?}");
        for bytes in pieces {
            self.hash.write(bytes);
            self.raw(bytes)?;
        }
        assert!(!matches!(field.len, Len::Bytes(n) if u64::from(n) != self.at - from), "{field:?}");
        if let Some(spans) = &mut self.spans {
            spans.push(Span { field: *field, index: self.index, range: from..self.at });
        }
        Ok(())
    }

    /// Zeros, so that `after` more bytes end the region at a multiple of 64.
    pub(crate) fn pad(&mut self, field: &Field, after: u64) -> io::Result<()> {
        let n = pad_to_64(self.at - self.start + after) as usize;
        self.put(field, &[0; 64][..n])
    }

    /// The checksum over everything since [`Encoder::begin`].
    pub(crate) fn sum(&mut self, field: &Field) -> io::Result<()> {
        let sum = self.hash.finish_128().to_le_bytes();
        self.put(field, &sum)
    }

    pub(crate) fn finish(self) -> io::Result<(u64, Vec<Span>)> {
        (self.out)(&self.buffer)?;
        Ok((self.at, self.spans.unwrap_or_default()))
    }

    fn raw(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.at += bytes.len() as u64;
        if self.buffer.len() + bytes.len() > BUFFER {
            (self.out)(&self.buffer)?;
            self.buffer.clear();
        }
        if bytes.len() >= BUFFER {
            return (self.out)(bytes);
        }
        self.buffer.extend_from_slice(bytes);
        Ok(())
    }
}

/// Bytes from `at` to the next multiple of 64.
pub(crate) fn pad_to_64(at: u64) -> u64 {
    at.wrapping_neg() % 64
}

/// True if the last 16 of `bytes` are the checksum of the others.
pub(crate) fn sum_is_right(bytes: &[u8]) -> bool {
    let Some(body) = bytes.len().checked_sub(16) else { return false };
    XxHash3_128::oneshot(&bytes[..body]).to_le_bytes() == bytes[body..]
}

/// Reads fixed fields of a region that starts at the first byte of the slice. Never panics.
#[derive(Clone, Copy)]
pub(crate) struct Reader<'a>(pub(crate) &'a [u8]);

impl Reader<'_> {
    pub(crate) fn bytes<const N: usize>(&self, field: &Field) -> Result<[u8; N], Miss> {
        let at = field.offset.unwrap_or(u32::MAX) as usize;
        debug_assert_eq!(field.fixed_len(), N, "{field:?}");
        match at.checked_add(N).and_then(|end| self.0.get(at..end)) {
            Some(b) => Ok(b.try_into().expect("the slice has N bytes")),
            None => Err(Miss::Truncated { expected: (at as u64) + N as u64, got: self.0.len() as u64 }),
        }
    }

    pub(crate) fn u8(&self, field: &Field) -> Result<u8, Miss> {
        self.bytes::<1>(field).map(|b| b[0])
    }

    pub(crate) fn u16(&self, field: &Field) -> Result<u16, Miss> {
        self.bytes(field).map(u16::from_le_bytes)
    }

    pub(crate) fn u32(&self, field: &Field) -> Result<u32, Miss> {
        self.bytes(field).map(u32::from_le_bytes)
    }

    pub(crate) fn u64(&self, field: &Field) -> Result<u64, Miss> {
        self.bytes(field).map(u64::from_le_bytes)
    }
}

/// Fails with the field's name unless `ok`.
pub(crate) fn require(ok: bool, field: &'static str) -> Result<(), Miss> {
    if ok { Ok(()) } else { Err(Miss::Malformed { field }) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn regions_have_the_documented_sizes() {
        assert_eq!(pack_header::FIXED, 64);
        assert_eq!(block::FIXED, 224);
        assert_eq!(footer_head::FIXED, 16);
        assert_eq!(footer_entry::FIXED, 96);
        assert_eq!(footer_end::FIXED, 16);
        assert_eq!(trailer::FIXED, 48);
        assert_eq!(record::FIXED, 240);
    }

    #[test]
    fn names_are_unique_in_their_region() {
        let all = fields();
        let distinct: std::collections::HashSet<_> = all.iter().map(|f| (f.region, f.name)).collect();
        assert_eq!(distinct.len(), all.len());
    }

    #[test]
    fn counts_and_lengths_name_fields_of_the_same_region() {
        for f in fields() {
            if let Len::Each(_, of) | Len::Value(of) = f.len {
                assert!(fields().iter().any(|g| g.region == f.region && g.name == of), "{f:?}");
            }
        }
    }

    #[test]
    fn the_streamed_checksum_equals_the_one_over_the_whole() {
        let mut file = Vec::new();
        let mut out = |b: &[u8]| {
            file.extend_from_slice(b);
            Ok(())
        };
        let mut e = Encoder::new(&mut out, true);
        e.begin(0);
        e.put(&trailer::FOOTER_OFFSET, &[1; 8]).unwrap();
        e.put(&trailer::FOOTER_LEN, &[2; 8]).unwrap();
        e.put(&trailer::FILE_LEN, &[3; 8]).unwrap();
        e.put(&trailer::VERSION, &[4; 4]).unwrap();
        e.put(&trailer::MAGIC, &[5; 4]).unwrap();
        e.sum(&trailer::SUM).unwrap();
        let (len, spans) = e.finish().unwrap();
        assert_eq!((len, spans.len(), spans[5].range.clone()), (48, 6, 32..48));
        assert!(sum_is_right(&file));
        file[3] ^= 1;
        assert!(!sum_is_right(&file));
    }
}
