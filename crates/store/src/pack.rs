//! Packs: the immutable file of one commit.
//!
//! `header (64) | block … | footer: head (16), entry (96) …, checksum (16) | trailer (48)`; every block starts and ends at
//! a multiple of 64 bytes, and so does its payload. See `docs/format.md`; the fields are in `field.rs`.
//!
//! A block costs 240 bytes plus 4 per token id and 4 per part, padded to 64, and 96 in the footer. Reading checks sizes
//! before it allocates, then the checksum, then the header against the request. No input makes it panic.

use std::io;
use std::ops::Range;

use crate::field::{
    self, Encoder, Out, Reader, Span, footer_end, footer_entry, footer_head, pack_header, pad_to_64, require,
    sum_is_right, trailer,
};
use crate::{BLOCK_TOKENS, Chain, CodecId, Error, FileRead, Identity, Lineage, Miss, Name, Result, Tag};

/// Version of packs and records written by this build.
pub const FORMAT_VERSION: u32 = 1;

/// Layout tag of T32 tiles: 32 rows of one column in the order kernels read.
pub const LAYOUT_T32: u16 = 1;

const PACK_MAGIC: [u8; 8] = *b"KVASIRPK";
const BLOCK_MAGIC: [u8; 4] = *b"KVBL";
const FOOTER_MAGIC: [u8; 4] = *b"KVFT";
const TRAILER_MAGIC: [u8; 4] = *b"KVND";

/// What a stored block is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum Kind {
    /// 64 tokens, shared by whoever can name them.
    #[default]
    Rows,
    /// State of one session only: the open tile, or everything of a session whose rows were evicted or merged.
    Snapshot,
}

impl Kind {
    fn byte(self) -> u8 {
        match self {
            Self::Rows => 0,
            Self::Snapshot => 1,
        }
    }

    fn from_byte(b: u8) -> Option<Self> {
        match b {
            0 => Some(Self::Rows),
            1 => Some(Self::Snapshot),
            _ => None,
        }
    }
}

/// A block to be written. Parts are the engine's business: tiles, parameters, positions, in an order it knows.
#[derive(Clone, Copy, Debug)]
pub struct Draft<'a> {
    /// Whose folder it goes to.
    pub owner: Tag,
    /// Shared rows or private state.
    pub kind: Kind,
    /// Its name.
    pub name: Name,
    /// Name of the block in front of it.
    pub parent: Name,
    /// Model and number type.
    pub identity: Identity,
    /// How its rows came to be.
    pub lineage: Lineage,
    /// The code the payload is in.
    pub codec: CodecId,
    /// Order of the bytes inside tiles.
    pub layout_tag: u16,
    /// Token ids.
    pub tokens: &'a [u32],
    /// The payload.
    pub parts: &'a [&'a [u8]],
}

impl<'a> Draft<'a> {
    /// Block `i` of `chain`; `ids` are all ids of the session. `None` where the chain or the ids are shorter.
    pub fn block(
        chain: &Chain,
        i: usize,
        ids: &'a [u32],
        codec: CodecId,
        parts: &'a [&'a [u8]],
    ) -> Option<Self> {
        Some(Self {
            owner: *chain.owners().get(i)?,
            kind: Kind::Rows,
            name: *chain.names().get(i)?,
            parent: chain.parent(i),
            identity: *chain.identity(),
            lineage: *chain.lineages().get(i)?,
            codec,
            layout_tag: LAYOUT_T32,
            tokens: ids.get(i * BLOCK_TOKENS..(i + 1) * BLOCK_TOKENS)?,
            parts,
        })
    }

    /// Private state behind the last block of `chain`, under a fresh random name.
    pub fn snapshot(
        chain: &Chain,
        lineage: Lineage,
        tokens: &'a [u32],
        codec: CodecId,
        parts: &'a [&'a [u8]],
    ) -> Result<Self> {
        Ok(Self {
            owner: chain.key().tag(),
            kind: Kind::Snapshot,
            name: Name::random()?,
            parent: chain.tip(),
            identity: *chain.identity(),
            lineage,
            codec,
            layout_tag: LAYOUT_T32,
            tokens,
            parts,
        })
    }

    /// Bytes the payload takes, without header.
    pub fn payload_len(&self) -> u64 {
        self.parts.iter().map(|p| p.len() as u64).sum()
    }

    fn header_len(&self) -> u64 {
        let open = (field::block::FIXED + 4 * self.tokens.len() + 4 * self.parts.len()) as u64;
        open + pad_to_64(open)
    }

    /// Bytes the block takes in a pack, without its footer entry.
    pub fn stored_len(&self) -> u64 {
        let open = self.header_len() + self.payload_len() + 16;
        open + pad_to_64(open)
    }

    fn check(&self) -> Result<()> {
        if self.kind == Kind::Rows && self.tokens.len() != BLOCK_TOKENS {
            return Err(Error::invalid(
                "block.tokens",
                format_args!("{BLOCK_TOKENS} token ids"),
                self.tokens.len(),
            ));
        }
        if let Some(p) = self.parts.iter().find(|p| u32::try_from(p.len()).is_err()) {
            return Err(Error::invalid("block.parts", "less than 4 GiB in a part", p.len()));
        }
        if self.tokens.len().max(self.parts.len()) > (u32::MAX / 16) as usize {
            return Err(Error::invalid("block.parts", "fewer than 2^28 tokens and parts", self.parts.len()));
        }
        if self.name == Name::NONE {
            return Err(Error::invalid("block.name", "a name", "none"));
        }
        Ok(())
    }
}

/// What a request demands of a block. Anything else is a miss.
#[derive(Clone, Copy, Debug)]
pub struct Expect<'a> {
    /// Whose block.
    pub owner: Tag,
    /// Shared rows or private state.
    pub kind: Kind,
    /// Its name.
    pub name: Name,
    /// Name of the block in front of it.
    pub parent: Name,
    /// Model and number type.
    pub identity: Identity,
    /// How its rows must have come to be.
    pub lineage: Lineage,
    /// Order of the bytes inside tiles.
    pub layout_tag: u16,
    /// Its token ids, all of them.
    pub tokens: &'a [u32],
    /// Which copies will do.
    pub copies: Copies,
}

impl<'a> Expect<'a> {
    /// Block `i` of `chain`; `ids` are all ids of the session. `None` where the chain or the ids are shorter.
    pub fn block(chain: &Chain, i: usize, ids: &'a [u32], copies: Copies) -> Option<Self> {
        Some(Self {
            owner: *chain.owners().get(i)?,
            kind: Kind::Rows,
            name: *chain.names().get(i)?,
            parent: chain.parent(i),
            identity: *chain.identity(),
            lineage: *chain.lineages().get(i)?,
            layout_tag: LAYOUT_T32,
            tokens: ids.get(i * BLOCK_TOKENS..(i + 1) * BLOCK_TOKENS)?,
            copies,
        })
    }
}

/// Which copies of the same rows a reader accepts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Copies {
    /// Rows as they were computed.
    Exact,
    /// Rows in this code; where there are none, rows as they were computed (the reader can code them itself).
    Coded(CodecId),
}

impl Copies {
    /// The code looked for first.
    pub fn first(self) -> CodecId {
        match self {
            Self::Exact => CodecId::EXACT,
            Self::Coded(c) => c,
        }
    }

    pub(crate) fn accepts(self, codec: CodecId) -> bool {
        codec.is_exact() || codec == self.first()
    }
}

/// A block as it was read and verified.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Block {
    /// Whose it is.
    pub owner: Tag,
    /// Shared rows or private state.
    pub kind: Kind,
    /// Its name.
    pub name: Name,
    /// Name of the block in front of it.
    pub parent: Name,
    /// Model and number type.
    pub identity: Identity,
    /// How its rows came to be.
    pub lineage: Lineage,
    /// The code the payload is in.
    pub codec: CodecId,
    /// Order of the bytes inside tiles.
    pub layout_tag: u16,
    /// Token ids.
    pub tokens: Vec<u32>,
    part_lens: Vec<u32>,
    bytes: Vec<u8>,
    payload: Range<usize>,
}

impl Block {
    /// All parts, one after the other.
    pub fn payload(&self) -> &[u8] {
        &self.bytes[self.payload.clone()]
    }

    /// The parts, in the order they were written.
    pub fn parts(&self) -> impl ExactSizeIterator<Item = &[u8]> {
        let mut rest = self.payload();
        self.part_lens.iter().map(move |&n| {
            let (part, after) = rest.split_at(n as usize);
            rest = after;
            part
        })
    }

    /// Bytes read from the medium.
    pub fn stored_len(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn check(&self, want: &Expect<'_>) -> Result<(), Miss> {
        let same = [
            ("name", self.name == want.name),
            ("owner", self.owner == want.owner),
            ("kind", self.kind == want.kind),
            ("parent", self.parent == want.parent),
            ("layout_tag", self.layout_tag == want.layout_tag),
            ("fingerprint", self.identity.fingerprint == want.identity.fingerprint),
            ("layout", self.identity.layout == want.identity.layout),
            ("key_space", self.identity.key_space == want.identity.key_space),
            ("dtype", self.identity.dtype == want.identity.dtype),
            ("lineage", self.lineage == want.lineage),
            ("ids", self.tokens == want.tokens),
        ];
        if let Some((field, _)) = same.iter().find(|(_, ok)| !ok) {
            return Err(Miss::Foreign { field });
        }
        if !want.copies.accepts(self.codec) {
            return Err(Miss::LossyCopy { codec: self.codec.0 });
        }
        Ok(())
    }
}

/// One line of a pack's index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The block.
    pub name: Name,
    /// The block in front of it.
    pub parent: Name,
    /// Where it starts in the file.
    pub offset: u64,
    /// Bytes it takes.
    pub len: u64,
    /// The code its payload is in.
    pub codec: CodecId,
    /// Shared rows or private state.
    pub kind: Kind,
}

/// What is known of a pack without its payload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PackIndex {
    /// Random id; also the file's name.
    pub id: [u8; 16],
    /// Whose blocks they are.
    pub owner: Tag,
    /// Bytes of the file.
    pub file_len: u64,
    /// Its blocks, in file order.
    pub entries: Vec<Entry>,
}

/// Write a pack of `blocks` (all of `owner`) to `out`. Returns its index.
pub(crate) fn write_pack(
    out: &mut Out<'_>,
    id: [u8; 16],
    owner: Tag,
    blocks: &[&Draft<'_>],
    spans: Option<&mut Vec<Span>>,
) -> Result<PackIndex, WriteError> {
    for b in blocks {
        b.check().map_err(WriteError::Draft)?;
    }
    let mut e = Encoder::new(out, spans.is_some());
    e.begin(0);
    e.put(&pack_header::MAGIC, &PACK_MAGIC)?;
    e.put(&pack_header::VERSION, &FORMAT_VERSION.to_le_bytes())?;
    e.put(&pack_header::HEADER_LEN, &(pack_header::FIXED as u32).to_le_bytes())?;
    e.put(&pack_header::PACK_ID, &id)?;
    e.put(&pack_header::OWNER, &owner.0)?;
    e.sum(&pack_header::SUM)?;

    let mut entries = Vec::with_capacity(blocks.len());
    for (i, b) in blocks.iter().enumerate() {
        let offset = e.at();
        write_block(&mut e, i, b)?;
        assert_eq!(e.at() - offset, b.stored_len());
        let Draft { name, parent, codec, kind, .. } = **b;
        entries.push(Entry { name, parent, offset, len: e.at() - offset, codec, kind });
    }

    let footer_offset = e.at();
    e.begin(0);
    e.put(&footer_head::MAGIC, &FOOTER_MAGIC)?;
    e.put(&footer_head::ENTRY_COUNT, &(entries.len() as u32).to_le_bytes())?;
    e.put(&footer_head::ENTRY_LEN, &(footer_entry::FIXED as u32).to_le_bytes())?;
    e.put(&footer_head::RESERVED, &[0; 4])?;
    for (i, x) in entries.iter().enumerate() {
        e.next_piece(i);
        e.put(&footer_entry::NAME, &x.name.0)?;
        e.put(&footer_entry::PARENT, &x.parent.0)?;
        e.put(&footer_entry::OFFSET, &x.offset.to_le_bytes())?;
        e.put(&footer_entry::LEN, &x.len.to_le_bytes())?;
        e.put(&footer_entry::CODEC, &x.codec.0.to_le_bytes())?;
        e.put(&footer_entry::KIND, &[x.kind.byte()])?;
        e.put(&footer_entry::RESERVED, &[0; 7])?;
    }
    e.next_piece(0);
    e.sum(&footer_end::SUM)?;
    let footer_len = e.at() - footer_offset;

    let file_len = e.at() + trailer::FIXED as u64;
    e.begin(0);
    e.put(&trailer::FOOTER_OFFSET, &footer_offset.to_le_bytes())?;
    e.put(&trailer::FOOTER_LEN, &footer_len.to_le_bytes())?;
    e.put(&trailer::FILE_LEN, &file_len.to_le_bytes())?;
    e.put(&trailer::VERSION, &FORMAT_VERSION.to_le_bytes())?;
    e.put(&trailer::MAGIC, &TRAILER_MAGIC)?;
    e.sum(&trailer::SUM)?;
    let (_, seen) = e.finish()?;
    if let Some(spans) = spans {
        *spans = seen;
    }
    Ok(PackIndex { id, owner, file_len, entries })
}

/// A bad draft is the caller's fault, a failed write the disk's.
#[derive(Debug)]
pub(crate) enum WriteError {
    Draft(Error),
    Io(io::Error),
}

impl From<io::Error> for WriteError {
    fn from(e: io::Error) -> Self {
        Self::Io(e)
    }
}

fn write_block(e: &mut Encoder<'_>, index: usize, b: &Draft<'_>) -> io::Result<()> {
    use field::block as f;
    let (lineage_kind, lineage) = b.lineage.parts();
    e.begin(index);
    e.put(&f::MAGIC, &BLOCK_MAGIC)?;
    e.put(&f::VERSION, &(FORMAT_VERSION as u16).to_le_bytes())?;
    e.put(&f::LAYOUT_TAG, &b.layout_tag.to_le_bytes())?;
    e.put(&f::HEADER_LEN, &(b.header_len() as u32).to_le_bytes())?;
    e.put(&f::KIND, &[b.kind.byte()])?;
    e.put(&f::KEY_SPACE, &[b.identity.key_space])?;
    e.put(&f::DTYPE, &[b.identity.dtype])?;
    e.put(&f::LINEAGE_KIND, &[lineage_kind])?;
    e.put(&f::CODEC, &b.codec.0.to_le_bytes())?;
    e.put(&f::TOTAL_LEN, &b.stored_len().to_le_bytes())?;
    e.put(&f::PAYLOAD_LEN, &b.payload_len().to_le_bytes())?;
    e.put(&f::TOKEN_COUNT, &(b.tokens.len() as u32).to_le_bytes())?;
    e.put(&f::PART_COUNT, &(b.parts.len() as u32).to_le_bytes())?;
    e.put(&f::OWNER, &b.owner.0)?;
    e.put(&f::NAME, &b.name.0)?;
    e.put(&f::PARENT, &b.parent.0)?;
    e.put(&f::FINGERPRINT, &b.identity.fingerprint)?;
    e.put(&f::LAYOUT, &b.identity.layout)?;
    e.put(&f::LINEAGE, &lineage)?;
    e.put(&f::IDS, &le_bytes(b.tokens.iter().copied()))?;
    e.put(&f::PART_LENS, &le_bytes(b.parts.iter().map(|p| p.len() as u32)))?;
    e.pad(&f::HEADER_PAD, 0)?;
    e.put_pieces(&f::PAYLOAD, b.parts.iter().copied())?;
    e.pad(&f::PAYLOAD_PAD, 16)?;
    e.sum(&f::SUM)
}

pub(crate) fn le_bytes(values: impl Iterator<Item = u32>) -> Vec<u8> {
    values.flat_map(u32::to_le_bytes).collect()
}

pub(crate) fn from_le_bytes(bytes: &[u8]) -> Vec<u32> {
    bytes.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
}

/// Read header, trailer and footer of a pack; the payload is not touched.
pub fn read_index(file: &dyn FileRead) -> Result<PackIndex, Miss> {
    let len = file.size().map_err(|e| Miss::io("size", &e))?;
    let least = (pack_header::FIXED + footer_head::FIXED + footer_end::FIXED + trailer::FIXED) as u64;
    if len < least {
        return Err(Miss::Truncated { expected: least, got: len });
    }
    // Most footers fit into the last 4 KB, so that opening a pack costs two reads.
    let guess = len.min(4096);
    let mut tail = read(file, len - guess, guess)?;
    let end = Reader(&tail[tail.len() - trailer::FIXED..]);
    require(end.bytes(&trailer::MAGIC)? == TRAILER_MAGIC, "trailer.magic")?;
    if !sum_is_right(end.0) {
        return Err(Miss::Checksum { region: "trailer" });
    }
    known(end.u32(&trailer::VERSION)?)?;
    let file_len = end.u64(&trailer::FILE_LEN)?;
    if file_len != len {
        return Err(Miss::Truncated { expected: file_len, got: len });
    }
    let (offset, footer_len) = (end.u64(&trailer::FOOTER_OFFSET)?, end.u64(&trailer::FOOTER_LEN)?);
    let ends = offset.checked_add(footer_len).and_then(|n| n.checked_add(trailer::FIXED as u64));
    require(ends == Some(len) && offset >= pack_header::FIXED as u64, "trailer.footer_offset")?;
    if footer_len + trailer::FIXED as u64 > guess {
        tail = read(file, offset, footer_len)?;
    } else {
        let from = tail.len() - trailer::FIXED - footer_len as usize;
        tail = tail[from..from + footer_len as usize].to_vec();
    }
    let entries = parse_footer(&tail, offset)?;
    let head = read(file, 0, pack_header::FIXED as u64)?;
    let (id, owner) = parse_header(&head)?;
    Ok(PackIndex { id, owner, file_len, entries })
}

fn parse_header(head: &[u8]) -> Result<([u8; 16], Tag), Miss> {
    let h = Reader(head);
    require(h.bytes(&pack_header::MAGIC)? == PACK_MAGIC, "pack.magic")?;
    if !sum_is_right(&head[..pack_header::FIXED]) {
        return Err(Miss::Checksum { region: "pack header" });
    }
    known(h.u32(&pack_header::VERSION)?)?;
    require(h.u32(&pack_header::HEADER_LEN)? as usize == pack_header::FIXED, "pack.header_len")?;
    Ok((h.bytes(&pack_header::PACK_ID)?, Tag(h.bytes(&pack_header::OWNER)?)))
}

/// `blocks_end` is where the footer starts: no block may reach into it.
fn parse_footer(footer: &[u8], blocks_end: u64) -> Result<Vec<Entry>, Miss> {
    let head = Reader(footer);
    require(head.bytes(&footer_head::MAGIC)? == FOOTER_MAGIC, "footer.magic")?;
    if !sum_is_right(footer) {
        return Err(Miss::Checksum { region: "footer" });
    }
    require(head.u32(&footer_head::ENTRY_LEN)? as usize == footer_entry::FIXED, "footer.entry_len")?;
    let count = head.u32(&footer_head::ENTRY_COUNT)? as u64;
    let expected = (footer_head::FIXED + footer_end::FIXED) as u64 + count * footer_entry::FIXED as u64;
    require(expected == footer.len() as u64, "footer.entry_count")?;
    let body = &footer[footer_head::FIXED..footer.len() - footer_end::FIXED];
    let entry = |bytes| {
        let x = Reader(bytes);
        let (offset, len) = (x.u64(&footer_entry::OFFSET)?, x.u64(&footer_entry::LEN)?);
        let inside = offset.checked_add(len).is_some_and(|end| end <= blocks_end);
        require(inside && offset >= pack_header::FIXED as u64 && offset % 64 == 0, "footer.offset")?;
        require(len >= field::block::FIXED as u64 + 16 && len % 64 == 0, "footer.len")?;
        Ok(Entry {
            name: Name(x.bytes(&footer_entry::NAME)?),
            parent: Name(x.bytes(&footer_entry::PARENT)?),
            offset,
            len,
            codec: CodecId(x.u64(&footer_entry::CODEC)?),
            kind: Kind::from_byte(x.u8(&footer_entry::KIND)?)
                .ok_or(Miss::Malformed { field: "footer.kind" })?,
        })
    };
    body.chunks_exact(footer_entry::FIXED).map(entry).collect()
}

/// Read the block at `offset` and check it against `want`.
pub fn read_block(file: &dyn FileRead, offset: u64, len: u64, want: &Expect<'_>) -> Result<Block, Miss> {
    let there = file.size().map_err(|e| Miss::io("size", &e))?;
    // The index may come from a footer that lies: what is not in the file is not allocated.
    match offset.checked_add(len) {
        Some(end) if end <= there => {}
        end => return Err(Miss::Truncated { expected: end.unwrap_or(u64::MAX), got: there }),
    }
    let block = parse_block(read(file, offset, len)?)?;
    block.check(want)?;
    Ok(block)
}

/// Take a block apart. Any bytes may come in; only a block that its own checksum vouches for comes out.
pub fn parse_block(bytes: Vec<u8>) -> Result<Block, Miss> {
    use field::block as f;
    let h = Reader(&bytes);
    require(h.bytes(&f::MAGIC)? == BLOCK_MAGIC, "block.magic")?;
    if !sum_is_right(&bytes) {
        return Err(Miss::Checksum { region: "block" });
    }
    known(u32::from(h.u16(&f::VERSION)?))?;
    let total = bytes.len() as u64;
    require(h.u64(&f::TOTAL_LEN)? == total, "block.total_len")?;
    let (tokens, parts) = (h.u32(&f::TOKEN_COUNT)? as u64, h.u32(&f::PART_COUNT)? as u64);
    let ids_end = f::FIXED as u64 + 4 * tokens;
    let lens_end = ids_end + 4 * parts;
    let header_len = h.u32(&f::HEADER_LEN)? as u64;
    require(header_len == lens_end + pad_to_64(lens_end) && header_len <= total, "block.header_len")?;
    let payload_len = h.u64(&f::PAYLOAD_LEN)?;
    let end = header_len.checked_add(payload_len).filter(|&end| end <= total);
    let end = end.ok_or(Miss::Malformed { field: "block.payload_len" })?;
    require(end + 16 + pad_to_64(end + 16) == total, "block.payload_len")?;

    let (ids_end, lens_end) = (ids_end as usize, lens_end as usize);
    let ids = from_le_bytes(&bytes[f::FIXED..ids_end]);
    let part_lens = from_le_bytes(&bytes[ids_end..lens_end]);
    // At most 2^32 numbers below 2^32: no overflow.
    require(part_lens.iter().map(|&n| n as u64).sum::<u64>() == payload_len, "block.part_lens")?;
    let kind = Kind::from_byte(h.u8(&f::KIND)?).ok_or(Miss::Malformed { field: "block.kind" })?;
    let lineage = Lineage::from_parts(h.u8(&f::LINEAGE_KIND)?, h.bytes(&f::LINEAGE)?);
    Ok(Block {
        owner: Tag(h.bytes(&f::OWNER)?),
        kind,
        name: Name(h.bytes(&f::NAME)?),
        parent: Name(h.bytes(&f::PARENT)?),
        identity: Identity {
            fingerprint: h.bytes(&f::FINGERPRINT)?,
            layout: h.bytes(&f::LAYOUT)?,
            key_space: h.u8(&f::KEY_SPACE)?,
            dtype: h.u8(&f::DTYPE)?,
        },
        lineage: lineage.ok_or(Miss::Malformed { field: "block.lineage_kind" })?,
        codec: CodecId(h.u64(&f::CODEC)?),
        layout_tag: h.u16(&f::LAYOUT_TAG)?,
        tokens: ids,
        part_lens,
        payload: header_len as usize..end as usize,
        bytes,
    })
}

pub(crate) fn known(version: u32) -> Result<(), Miss> {
    if version == FORMAT_VERSION { Ok(()) } else { Err(Miss::Version { got: version }) }
}

pub(crate) fn read(file: &dyn FileRead, offset: u64, len: u64) -> Result<Vec<u8>, Miss> {
    let mut bytes = vec![0; len as usize];
    match file.read_at(offset, &mut bytes) {
        Ok(()) => Ok(bytes),
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => {
            let got = file.size().unwrap_or(0);
            Err(Miss::Truncated { expected: offset.saturating_add(len), got })
        }
        Err(e) => Err(Miss::io("read", &e)),
    }
}

/// Encode a pack in memory and say where each field landed: for tests that damage every field in turn.
pub fn encode_pack(id: [u8; 16], owner: Tag, blocks: &[Draft<'_>]) -> Result<(Vec<u8>, Vec<Span>)> {
    let (mut file, mut spans) = (Vec::new(), Vec::new());
    let mut out = |b: &[u8]| {
        file.extend_from_slice(b);
        Ok(())
    };
    let blocks: Vec<_> = blocks.iter().collect();
    match write_pack(&mut out, id, owner, &blocks, Some(&mut spans)) {
        Ok(_) => Ok((file, spans)),
        Err(WriteError::Draft(e)) => Err(e),
        Err(WriteError::Io(e)) => Err(Error::io("encode", std::path::Path::new("memory"), 0, e)),
    }
}
