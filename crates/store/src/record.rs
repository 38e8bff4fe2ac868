//! Session records: what brings a committed session back.
//!
//! One small file per session, replaced as a whole at every commit, after the pack it speaks of is durable. It holds all
//! token ids, so that whatever the store has lost can be computed again, and the state of policies and sampler as opaque
//! bytes. Size: 256 bytes, 81 per block, 4 per token, and the state.

use std::io;

use crate::field::{Encoder, Out, Reader, Span, record as f, require, sum_is_right};
use crate::pack::{FORMAT_VERSION, Kind, LAYOUT_T32, WriteError, from_le_bytes, known, le_bytes};
use crate::{
    BLOCK_TOKENS, Chain, CodecId, Copies, Error, Expect, Identity, Lineage, Miss, Name, Result, Tag,
    TenantKey,
};

const MAGIC: [u8; 8] = *b"KVASIRSR";

/// One block of a recorded session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockRef {
    /// The tenant, or the share group it belongs to.
    pub owner: Tag,
    /// Its name.
    pub name: Name,
    /// How its rows came to be.
    pub lineage: Lineage,
}

/// A committed session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// Whose it is.
    pub owner: Tag,
    /// Keyed hash of the session id.
    pub session: Name,
    /// Counts the commits of this session, from 1.
    pub generation: u64,
    /// When it was written, ms since 1970.
    pub written_ms: u64,
    /// Model and number type.
    pub identity: Identity,
    /// Lineage of the rows behind the last block, and of what comes next.
    pub lineage: Lineage,
    /// The code the session holds its rows in.
    pub codec: CodecId,
    /// State behind the last block.
    pub snapshot: Option<Name>,
    /// Its full blocks, in order.
    pub blocks: Vec<BlockRef>,
    /// All its token ids.
    pub ids: Vec<u32>,
    /// Policies, sampler, recipe: the engine's own bytes.
    pub state: Vec<u8>,
}

impl Record {
    /// The record of a session whose blocks are those of `chain`. Generation and time are filled in when it is written.
    pub fn new(key: &TenantKey, session: &str, chain: &Chain, ids: Vec<u32>) -> Self {
        let of = chain.owners().iter().zip(chain.names()).zip(chain.lineages());
        Self {
            owner: key.tag(),
            session: key.session(session),
            generation: 0,
            written_ms: 0,
            identity: *chain.identity(),
            lineage: Lineage::Exact,
            codec: CodecId::EXACT,
            snapshot: None,
            blocks: of.map(|((&owner, &name), &lineage)| BlockRef { owner, name, lineage }).collect(),
            ids,
            state: Vec::new(),
        }
    }

    /// The chain of its blocks, named anew from ids and keys and compared; it ends before the first block whose name does
    /// not come out as recorded or whose owner's key is not among `keys`. The last key given names what comes next when
    /// there is no block.
    pub fn chain(&self, keys: &[&TenantKey]) -> Option<Chain> {
        let key_of = |owner: Tag| keys.iter().find(|k| k.tag() == owner).copied();
        let mut chain = Chain::new(keys.last()?, self.identity);
        for (block, ids) in self.blocks.iter().zip(self.ids.chunks_exact(BLOCK_TOKENS)) {
            let Some(key) = key_of(block.owner) else { break };
            chain.set_key(key);
            if chain.push(block.lineage, ids).ok()? != block.name {
                chain.truncate(chain.len() - 1);
                break;
            }
        }
        chain.set_key(key_of(self.owner).unwrap_or(keys.last()?));
        Some(chain)
    }

    /// Token ids behind the last full block: those the snapshot stands for.
    pub fn tail(&self) -> &[u32] {
        self.ids.get(self.blocks.len() * BLOCK_TOKENS..).unwrap_or(&[])
    }

    /// What its snapshot must look like, if it has one.
    pub fn snapshot(&self, copies: Copies) -> Option<Expect<'_>> {
        Some(Expect {
            owner: self.owner,
            kind: Kind::Snapshot,
            name: self.snapshot?,
            parent: self.blocks.last().map_or(Name::NONE, |b| b.name),
            layout_tag: LAYOUT_T32,
            identity: self.identity,
            lineage: self.lineage,
            tokens: self.tail(),
            copies,
        })
    }

    fn check(&self) -> Result<()> {
        if self.blocks.len() * BLOCK_TOKENS > self.ids.len() {
            let least = self.blocks.len() * BLOCK_TOKENS;
            return Err(Error::invalid("record.ids", format_args!("at least {least} ids"), self.ids.len()));
        }
        if u32::try_from(self.ids.len()).is_err() {
            return Err(Error::invalid("record.ids", "fewer than 2^32 ids", self.ids.len()));
        }
        Ok(())
    }

    fn stored_len(&self) -> u64 {
        (f::FIXED + self.blocks.len() * (16 + 32 + 1 + 32) + 4 * self.ids.len() + self.state.len() + 16)
            as u64
    }
}

pub(crate) fn write_record(
    out: &mut Out<'_>,
    r: &Record,
    spans: Option<&mut Vec<Span>>,
) -> Result<u64, WriteError> {
    r.check().map_err(WriteError::Draft)?;
    let (lineage_kind, lineage) = r.lineage.parts();
    let mut e = Encoder::new(out, spans.is_some());
    e.begin(0);
    e.put(&f::MAGIC, &MAGIC)?;
    e.put(&f::VERSION, &FORMAT_VERSION.to_le_bytes())?;
    e.put(&f::FILE_LEN, &r.stored_len().to_le_bytes())?;
    e.put(&f::OWNER, &r.owner.0)?;
    e.put(&f::SESSION, &r.session.0)?;
    e.put(&f::GENERATION, &r.generation.to_le_bytes())?;
    e.put(&f::WRITTEN_MS, &r.written_ms.to_le_bytes())?;
    e.put(&f::FINGERPRINT, &r.identity.fingerprint)?;
    e.put(&f::LAYOUT, &r.identity.layout)?;
    e.put(&f::KEY_SPACE, &[r.identity.key_space])?;
    e.put(&f::DTYPE, &[r.identity.dtype])?;
    e.put(&f::LINEAGE_KIND, &[lineage_kind])?;
    e.put(&f::RESERVED, &[0])?;
    e.put(&f::LINEAGE, &lineage)?;
    e.put(&f::SNAPSHOT, &r.snapshot.unwrap_or(Name::NONE).0)?;
    e.put(&f::CODEC, &r.codec.0.to_le_bytes())?;
    e.put(&f::BLOCK_COUNT, &(r.blocks.len() as u32).to_le_bytes())?;
    e.put(&f::TOKEN_COUNT, &(r.ids.len() as u32).to_le_bytes())?;
    e.put(&f::STATE_LEN, &(r.state.len() as u64).to_le_bytes())?;
    e.put_pieces(&f::OWNERS, r.blocks.iter().map(|b| &b.owner.0[..]))?;
    e.put_pieces(&f::NAMES, r.blocks.iter().map(|b| &b.name.0[..]))?;
    let lineages: Vec<_> = r.blocks.iter().map(|b| b.lineage.parts()).collect();
    e.put_pieces(&f::LINEAGE_KINDS, lineages.iter().map(|l| std::slice::from_ref(&l.0)))?;
    e.put_pieces(&f::LINEAGES, lineages.iter().map(|l| &l.1[..]))?;
    e.put(&f::IDS, &le_bytes(r.ids.iter().copied()))?;
    e.put(&f::STATE, &r.state)?;
    e.sum(&f::SUM)?;
    let (len, seen) = e.finish()?;
    if let Some(spans) = spans {
        *spans = seen;
    }
    Ok(len)
}

/// Take a record apart. Any bytes may come in; only a record that its own checksum vouches for comes out.
pub fn parse_record(bytes: &[u8]) -> Result<Record, Miss> {
    let h = Reader(bytes);
    let len = bytes.len() as u64;
    require(h.bytes(&f::MAGIC)? == MAGIC, "record.magic")?;
    let file_len = h.u64(&f::FILE_LEN)?;
    if file_len > len {
        return Err(Miss::Truncated { expected: file_len, got: len });
    }
    if !sum_is_right(bytes) {
        return Err(Miss::Checksum { region: "record" });
    }
    known(h.u32(&f::VERSION)?)?;
    let blocks = h.u32(&f::BLOCK_COUNT)? as u64;
    let tokens = h.u32(&f::TOKEN_COUNT)? as u64;
    let state_len = h.u64(&f::STATE_LEN)?;
    let fixed = f::FIXED as u64 + blocks * (16 + 32 + 1 + 32) + 4 * tokens + 16;
    require(fixed.checked_add(state_len) == Some(len) && file_len == len, "record.file_len")?;
    require(blocks * BLOCK_TOKENS as u64 <= tokens, "record.block_count")?;

    let blocks = blocks as usize;
    let mut rest = &bytes[f::FIXED..bytes.len() - 16];
    let mut take = |n: usize| {
        let (head, tail) = rest.split_at(n);
        rest = tail;
        head
    };
    let (owners, names) = (take(16 * blocks), take(32 * blocks));
    let (kinds, hashes) = (take(blocks), take(32 * blocks));
    let ids = from_le_bytes(take(4 * tokens as usize));
    let state = take(state_len as usize).to_vec();
    let lineage =
        |kind, hash| Lineage::from_parts(kind, hash).ok_or(Miss::Malformed { field: "record.lineage_kind" });
    let block = |i: usize| {
        Ok(BlockRef {
            owner: Tag(array(owners, i)),
            name: Name(array(names, i)),
            lineage: lineage(kinds[i], array(hashes, i))?,
        })
    };
    let snapshot = Name(h.bytes(&f::SNAPSHOT)?);
    Ok(Record {
        owner: Tag(h.bytes(&f::OWNER)?),
        session: Name(h.bytes(&f::SESSION)?),
        generation: h.u64(&f::GENERATION)?,
        written_ms: h.u64(&f::WRITTEN_MS)?,
        identity: Identity {
            fingerprint: h.bytes(&f::FINGERPRINT)?,
            layout: h.bytes(&f::LAYOUT)?,
            key_space: h.u8(&f::KEY_SPACE)?,
            dtype: h.u8(&f::DTYPE)?,
        },
        lineage: lineage(h.u8(&f::LINEAGE_KIND)?, h.bytes(&f::LINEAGE)?)?,
        codec: CodecId(h.u64(&f::CODEC)?),
        snapshot: (snapshot != Name::NONE).then_some(snapshot),
        blocks: (0..blocks).map(block).collect::<Result<_, Miss>>()?,
        ids,
        state,
    })
}

/// Element `i` of an array of `N` bytes each, laid end to end.
fn array<const N: usize>(bytes: &[u8], i: usize) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(&bytes[i * N..(i + 1) * N]);
    out
}

/// Encode a record in memory and say where each field landed: for tests that damage every field in turn.
pub fn encode_record(record: &Record) -> Result<(Vec<u8>, Vec<Span>)> {
    let (mut file, mut spans) = (Vec::new(), Vec::new());
    let mut out = |b: &[u8]| -> io::Result<()> {
        file.extend_from_slice(b);
        Ok(())
    };
    match write_record(&mut out, record, Some(&mut spans)) {
        Ok(_) => Ok((file, spans)),
        Err(WriteError::Draft(e)) => Err(e),
        Err(WriteError::Io(e)) => Err(Error::io("encode", std::path::Path::new("memory"), 0, e)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(key: &TenantKey, tokens: u32) -> Record {
        let ids: Vec<u32> = (0..tokens).collect();
        let mut chain = Chain::new(key, Identity::new([1; 32], b"s", 0, 1));
        chain.extend(Lineage::Exact, &ids[..64]);
        chain.extend(Lineage::Derived([4; 32]), &ids);
        let mut r = Record::new(key, "chat", &chain, ids);
        r.state = br#"{"cursor":3}"#.to_vec();
        r.snapshot = Some(Name([8; 32]));
        r.lineage = Lineage::Derived([4; 32]);
        r.generation = 7;
        r
    }

    #[test]
    fn comes_back_as_it_was_written() {
        let r = record(&TenantKey::tenant(&[0; 32], "t"), 64 * 3 + 5);
        let (bytes, _) = encode_record(&r).unwrap();
        assert_eq!(bytes.len() as u64, r.stored_len());
        assert_eq!(parse_record(&bytes).unwrap(), r);
        assert_eq!(r.tail(), [192, 193, 194, 195, 196]);
    }

    #[test]
    fn its_chain_is_recomputed_and_stops_at_a_name_that_does_not_come_out() {
        let key = TenantKey::tenant(&[0; 32], "t");
        let mut r = record(&key, 64 * 3 + 5);
        assert_eq!(r.chain(&[&key]).unwrap().len(), 3);
        r.ids[70] += 1;
        assert_eq!(r.chain(&[&key]).unwrap().len(), 1);
        assert_eq!(r.chain(&[&TenantKey::tenant(&[0; 32], "u")]).unwrap().len(), 0);
        assert!(r.chain(&[]).is_none());
    }

    #[test]
    fn more_blocks_than_ids_is_refused() {
        let mut r = record(&TenantKey::tenant(&[0; 32], "t"), 128);
        r.ids.truncate(100);
        assert_eq!(encode_record(&r).unwrap_err().code(), "InvalidArgument");
    }
}
