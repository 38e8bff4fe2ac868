//! Names: who may have a block, and how its rows came to be.
//!
//! `name = blake3_keyed(key; fingerprint | layout | key space | compute dtype | lineage | parent | ids)`, one per block of
//! 64 tokens, chained through `parent`, so that equal names mean equal text from the first token on. The key is that of a
//! tenant or of a share group; there is no unkeyed name, so nobody can ask for a block whose key he does not hold, and
//! equal texts of two tenants have unrelated names.
//!
//! Cost: one blake3 over 64 + 140 bytes per 4 tokens' worth of ids (396 bytes a block); a [`Chain`] keeps 32 bytes a block
//! and hashes each block once.

use std::fmt;

use crate::{Error, Result};

/// Tokens of a stored block: two tiles.
pub const BLOCK_TOKENS: usize = 64;

const TENANT_CONTEXT: &str = "kvasir store v1: tenant key from store secret and tenant id";
const GROUP_CONTEXT: &str = "kvasir store v1: share group key";
const LOCAL_GROUP_CONTEXT: &str = "kvasir store v1: share group key from store secret and group id";
const NAMES_CONTEXT: &str = "kvasir store v1: block names";
const TAG_CONTEXT: &str = "kvasir store v1: owner tag";
const SESSION_CONTEXT: &str = "kvasir store v1: session ids";
const CODEC_CONTEXT: &str = "kvasir store v1: codec id";

/// Id of a block, a snapshot or a session record. All zero stands for "none" (the parent of a first block).
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Name(pub [u8; 32]);

impl Name {
    /// The parent of a first block.
    pub const NONE: Self = Self([0; 32]);

    /// A private name for what nobody else may find: a snapshot.
    pub fn random() -> Result<Self> {
        random_bytes().map(Self)
    }

    /// 64 hex digits.
    pub fn hex(&self) -> String {
        hex(&self.0)
    }
}

impl fmt::Debug for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Name({})", hex(&self.0[..6]))
    }
}

/// Keyed hash of the owner of a file; the only trace of a tenant on disk.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Tag(pub [u8; 16]);

impl Tag {
    /// 32 hex digits: the name of the owner's folder.
    pub fn hex(&self) -> String {
        hex(&self.0)
    }

    pub(crate) fn from_hex(s: &str) -> Option<Self> {
        let mut out = [0; 16];
        if s.len() != 32 {
            return None;
        }
        for (o, pair) in out.iter_mut().zip(s.as_bytes().chunks_exact(2)) {
            let digit = |c: u8| (c as char).to_digit(16).filter(|_| !c.is_ascii_uppercase());
            *o = (digit(pair[0])? * 16 + digit(pair[1])?) as u8;
        }
        Some(Self(out))
    }
}

impl fmt::Debug for Tag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tag({})", self.hex())
    }
}

/// The keys of one tenant or one share group. Whoever holds it can name its blocks; it is never written anywhere.
#[derive(Clone)]
pub struct TenantKey {
    names: [u8; 32],
    sessions: [u8; 32],
    tag: Tag,
}

impl TenantKey {
    /// The key of tenant `id` in the store of this secret.
    pub fn tenant(secret: &[u8; 32], id: &str) -> Self {
        Self::from_secret(TENANT_CONTEXT, secret, id)
    }

    /// The key of a share group. `key` is the members' own secret: the store's secret plays no part, so a group can
    /// span stores.
    pub fn group(key: &[u8; 32]) -> Self {
        Self::from_root(&blake3::derive_key(GROUP_CONTEXT, key))
    }

    /// The key of a share group of the store of this secret; unrelated to a tenant of the same id.
    pub fn local_group(secret: &[u8; 32], id: &str) -> Self {
        Self::from_secret(LOCAL_GROUP_CONTEXT, secret, id)
    }

    fn from_secret(context: &str, secret: &[u8; 32], id: &str) -> Self {
        let mut h = blake3::Hasher::new_derive_key(context);
        h.update(secret).update(id.as_bytes());
        Self::from_root(h.finalize().as_bytes())
    }

    fn from_root(root: &[u8; 32]) -> Self {
        let tag = blake3::derive_key(TAG_CONTEXT, root);
        let mut short = [0; 16];
        short.copy_from_slice(&tag[..16]);
        Self {
            names: blake3::derive_key(NAMES_CONTEXT, root),
            sessions: blake3::derive_key(SESSION_CONTEXT, root),
            tag: Tag(short),
        }
    }

    /// What stands for the owner on disk.
    pub fn tag(&self) -> Tag {
        self.tag
    }

    /// The keyed hash of a session id: the name of its record.
    pub fn session(&self, id: &str) -> Name {
        Name(*blake3::keyed_hash(&self.sessions, id.as_bytes()).as_bytes())
    }
}

impl fmt::Debug for TenantKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TenantKey({}, keys hidden)", self.tag.hex())
    }
}

/// How the rows of a block came to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum Lineage {
    /// Every read that produced them went over dense rows of the compute dtype.
    #[default]
    Exact,
    /// Something lossy came before: hash of the recipe and the engine build.
    Derived([u8; 32]),
}

impl Lineage {
    pub(crate) fn parts(&self) -> (u8, [u8; 32]) {
        match self {
            Self::Exact => (0, [0; 32]),
            Self::Derived(h) => (1, *h),
        }
    }

    pub(crate) fn from_parts(kind: u8, hash: [u8; 32]) -> Option<Self> {
        match kind {
            0 if hash == [0; 32] => Some(Self::Exact),
            1 => Some(Self::Derived(hash)),
            _ => None,
        }
    }
}

/// What rows of one session have in common: the model, the shape of its cache, and the numbers they are made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Identity {
    /// Digest of the model's hyperparameters and weights.
    pub fingerprint: [u8; 32],
    /// Digest of the layout's shape bytes.
    pub layout: [u8; 32],
    /// Keys after (0) or before (1) RoPE.
    pub key_space: u8,
    /// Number type the model computes its cache in: 0 f32, 1 f16, 2 bf16.
    pub dtype: u8,
}

impl Identity {
    /// The identity of rows of a model; `shape` is its layout in the layout's own canonical bytes.
    pub fn new(fingerprint: [u8; 32], shape: &[u8], key_space: u8, dtype: u8) -> Self {
        Self { fingerprint, layout: *blake3::hash(shape).as_bytes(), key_space, dtype }
    }
}

/// Which code the payload of a block is in. Two copies of the same rows have the same name and differ here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct CodecId(pub u64);

impl CodecId {
    /// The rows as they were computed, in the compute dtype.
    pub const EXACT: Self = Self(0);

    /// The id of a code, from any canonical description of it (its JSON, say). Never [`CodecId::EXACT`].
    pub fn of(description: &[u8]) -> Self {
        let digest = blake3::derive_key(CODEC_CONTEXT, description);
        let mut first = [0; 8];
        first.copy_from_slice(&digest[..8]);
        Self(u64::from_le_bytes(first).max(1))
    }

    /// True for rows as they were computed.
    pub fn is_exact(self) -> bool {
        self == Self::EXACT
    }
}

/// Name of the block that follows `parent`. Any number of ids is hashed; the store itself uses [`BLOCK_TOKENS`].
pub fn block_name(key: &TenantKey, of: &Identity, lineage: Lineage, parent: &Name, ids: &[u32]) -> Name {
    let (kind, hash) = lineage.parts();
    let mut h = blake3::Hasher::new_keyed(&key.names);
    // Every part in front of the ids has a fixed length, so no two inputs can run together.
    h.update(&of.fingerprint).update(&of.layout).update(&[of.key_space, of.dtype, kind]);
    h.update(&hash).update(&parent.0);
    let mut le = [0u8; 4 * BLOCK_TOKENS];
    for some in ids.chunks(BLOCK_TOKENS) {
        for (to, id) in le.chunks_exact_mut(4).zip(some) {
            to.copy_from_slice(&id.to_le_bytes());
        }
        h.update(&le[..4 * some.len()]);
    }
    Name(*h.finalize().as_bytes())
}

/// The names of a session's full blocks, in order. Forking a session clones it.
#[derive(Clone, Debug)]
pub struct Chain {
    key: TenantKey,
    identity: Identity,
    names: Vec<Name>,
    lineages: Vec<Lineage>,
    owners: Vec<Tag>,
}

impl Chain {
    /// The chain of an empty session.
    pub fn new(key: &TenantKey, identity: Identity) -> Self {
        Self { key: key.clone(), identity, names: Vec::new(), lineages: Vec::new(), owners: Vec::new() }
    }

    /// Name the next block. `ids` are its 64 token ids.
    pub fn push(&mut self, lineage: Lineage, ids: &[u32]) -> Result<Name> {
        if ids.len() != BLOCK_TOKENS {
            return Err(Error::invalid("block.ids", format_args!("{BLOCK_TOKENS} token ids"), ids.len()));
        }
        Ok(self.name_next(lineage, ids))
    }

    /// Name every full block of `ids` (all ids of the session, from its first) that has no name yet, with `lineage`.
    /// Blocks named before are not hashed again. Returns the new names.
    pub fn extend(&mut self, lineage: Lineage, ids: &[u32]) -> &[Name] {
        let from = self.names.len();
        for block in ids.chunks_exact(BLOCK_TOKENS).skip(from) {
            self.name_next(lineage, block);
        }
        &self.names[from..]
    }

    fn name_next(&mut self, lineage: Lineage, ids: &[u32]) -> Name {
        let name = block_name(&self.key, &self.identity, lineage, &self.tip(), ids);
        self.names.push(name);
        self.lineages.push(lineage);
        self.owners.push(self.key.tag());
        name
    }

    /// Blocks from here on belong to another owner: the way from a share group's prompt to a tenant's own turns.
    pub fn set_key(&mut self, key: &TenantKey) {
        self.key = key.clone();
    }

    /// Forget the names behind the first `blocks`: the text was rewound, or the reader found a hole there.
    pub fn truncate(&mut self, blocks: usize) {
        self.names.truncate(blocks);
        self.lineages.truncate(blocks);
        self.owners.truncate(blocks);
    }

    /// Names of all blocks.
    pub fn names(&self) -> &[Name] {
        &self.names
    }

    /// Lineage of each block.
    pub fn lineages(&self) -> &[Lineage] {
        &self.lineages
    }

    /// Owner of each block.
    pub fn owners(&self) -> &[Tag] {
        &self.owners
    }

    /// Name of block `i`'s predecessor.
    pub fn parent(&self, i: usize) -> Name {
        i.checked_sub(1).and_then(|j| self.names.get(j)).copied().unwrap_or(Name::NONE)
    }

    /// Name of the last block, or [`Name::NONE`].
    pub fn tip(&self) -> Name {
        self.names.last().copied().unwrap_or(Name::NONE)
    }

    /// Number of blocks named.
    pub fn len(&self) -> usize {
        self.names.len()
    }

    /// True before the first full block.
    pub fn is_empty(&self) -> bool {
        self.names.is_empty()
    }

    /// Whose names they are.
    pub fn key(&self) -> &TenantKey {
        &self.key
    }

    /// The model and number type they stand for.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }
}

pub(crate) fn random_bytes<const N: usize>() -> Result<[u8; N]> {
    let mut out = [0; N];
    getrandom::fill(&mut out).map_err(|e| Error::Random(e.to_string()))?;
    Ok(out)
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    bytes.iter().flat_map(|b| [b >> 4, b & 15]).map(|d| DIGITS[d as usize] as char).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity() -> Identity {
        Identity::new([7; 32], b"shape", 0, 1)
    }

    #[test]
    fn a_name_depends_on_everything_it_stands_for() {
        let secret = [1; 32];
        let key = TenantKey::tenant(&secret, "acme");
        let ids: Vec<u32> = (0..64).collect();
        let mut other = ids.clone();
        other[63] += 1;
        let of = identity();
        let name = |k: &TenantKey, of: &Identity, l, p: &Name, i: &[u32]| block_name(k, of, l, p, i);
        let all = [
            name(&key, &of, Lineage::Exact, &Name::NONE, &ids),
            name(&TenantKey::tenant(&secret, "acm"), &of, Lineage::Exact, &Name::NONE, &ids),
            name(&TenantKey::tenant(&[2; 32], "acme"), &of, Lineage::Exact, &Name::NONE, &ids),
            name(&TenantKey::group(&secret), &of, Lineage::Exact, &Name::NONE, &ids),
            name(&key, &Identity { fingerprint: [8; 32], ..of }, Lineage::Exact, &Name::NONE, &ids),
            name(&key, &Identity::new([7; 32], b"shapes", 0, 1), Lineage::Exact, &Name::NONE, &ids),
            name(&key, &Identity { key_space: 1, ..of }, Lineage::Exact, &Name::NONE, &ids),
            name(&key, &Identity { dtype: 0, ..of }, Lineage::Exact, &Name::NONE, &ids),
            name(&key, &of, Lineage::Derived([0; 32]), &Name::NONE, &ids),
            name(&key, &of, Lineage::Derived([1; 32]), &Name::NONE, &ids),
            name(&key, &of, Lineage::Exact, &Name([1; 32]), &ids),
            name(&key, &of, Lineage::Exact, &Name::NONE, &other),
            name(&key, &of, Lineage::Exact, &Name::NONE, &ids[..63]),
        ];
        let distinct: std::collections::HashSet<_> = all.iter().collect();
        assert_eq!(distinct.len(), all.len());
    }

    #[test]
    fn names_are_frozen() {
        // The format's anchor: a change of this value orphans every store on disk.
        let key = TenantKey::tenant(&[3; 32], "acme");
        let ids: Vec<u32> = (0..64).collect();
        let name = block_name(&key, &identity(), Lineage::Exact, &Name::NONE, &ids);
        assert_eq!((key.tag().hex().as_str(), name.hex().as_str()), FROZEN);
    }

    const FROZEN: (&str, &str) = (
        "b8a617d44e3630b2bec666a84c2c716d",
        "79ab1041d440683d4095d0909354d614a1cca24b9cd0b864dbe9147d2639c241",
    );

    #[test]
    fn extending_in_pieces_equals_naming_at_once() {
        let key = TenantKey::tenant(&[0; 32], "t");
        let ids: Vec<u32> = (0..64 * 5 + 17).map(|i| i * 31).collect();
        let mut whole = Chain::new(&key, identity());
        assert_eq!(whole.extend(Lineage::Exact, &ids).len(), 5);
        let mut pieces = Chain::new(&key, identity());
        for end in [10, 64, 65, 200, ids.len()] {
            pieces.extend(Lineage::Exact, &ids[..end]);
        }
        assert_eq!(whole.names(), pieces.names());
        let mut pushed = Chain::new(&key, identity());
        for block in ids.chunks_exact(64) {
            pushed.push(Lineage::Exact, block).unwrap();
        }
        assert_eq!(whole.names(), pushed.names());
        assert!(pushed.push(Lineage::Exact, &ids[..3]).is_err());
    }

    #[test]
    fn a_derived_block_changes_all_names_behind_it() {
        let key = TenantKey::tenant(&[0; 32], "t");
        let ids: Vec<u32> = (0..64 * 3).collect();
        let mut exact = Chain::new(&key, identity());
        exact.extend(Lineage::Exact, &ids);
        let mut mixed = Chain::new(&key, identity());
        mixed.extend(Lineage::Exact, &ids[..64]);
        mixed.push(Lineage::Derived([9; 32]), &ids[64..128]).unwrap();
        mixed.extend(Lineage::Exact, &ids);
        assert_eq!(exact.names()[0], mixed.names()[0]);
        assert_ne!(exact.names()[1], mixed.names()[1]);
        assert_ne!(exact.names()[2], mixed.names()[2]);
    }

    #[test]
    fn no_key_shows_in_debug_output() {
        let key = TenantKey::tenant(&[5; 32], "secret-tenant");
        let shown = format!("{key:?}");
        assert!(!shown.contains("secret-tenant") && !shown.contains(&hex(&key.names)));
    }

    #[test]
    fn tags_round_trip_through_hex() {
        let tag = TenantKey::tenant(&[5; 32], "x").tag();
        assert_eq!(Tag::from_hex(&tag.hex()), Some(tag));
        for bad in
            ["", "zz", &"G".repeat(32), &"A".repeat(32), &"0".repeat(33), "é0000000000000000000000000000000"]
        {
            assert_eq!(Tag::from_hex(bad), None);
        }
    }
}
