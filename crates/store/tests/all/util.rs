//! Texts, chains and payloads that every test can make again and compare.

use kvasir_store::{
    BLOCK_TOKENS, Block, Chain, CodecId, Copies, Disk, DiskOptions, Draft, Expect, Identity, Lineage, Miss,
    Record, TenantKey,
};

pub(crate) fn key(tenant: &str) -> TenantKey {
    TenantKey::tenant(&[7; 32], tenant)
}

pub(crate) fn identity() -> Identity {
    Identity::new([3; 32], b"two layers", 0, 1)
}

/// Small numbers that differ for every seed: SplitMix64.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
}

pub(crate) fn text(seed: u64, tokens: usize) -> Vec<u32> {
    let mut r = Random(seed);
    (0..tokens).map(|_| r.below(50_000) as u32).collect()
}

pub(crate) fn chain(key: &TenantKey, ids: &[u32]) -> Chain {
    let mut c = Chain::new(key, identity());
    c.extend(Lineage::Exact, ids);
    c
}

/// The payload that block `i` of a text must have: a function of its ids, in three parts of different sizes, one empty.
pub(crate) fn payload(ids: &[u32], salt: u64) -> Vec<Vec<u8>> {
    let seed = ids.iter().fold(salt, |h, &id| h.wrapping_mul(31).wrapping_add(u64::from(id)));
    let mut r = Random(seed);
    [700, 0, 129].iter().map(|&n| (0..n).map(|_| r.next() as u8).collect()).collect()
}

pub(crate) fn slices(parts: &[Vec<u8>]) -> Vec<&[u8]> {
    parts.iter().map(Vec::as_slice).collect()
}

pub(crate) fn block_ids(ids: &[u32], i: usize) -> &[u32] {
    &ids[i * BLOCK_TOKENS..(i + 1) * BLOCK_TOKENS]
}

/// Calls `then` with drafts of all blocks of `chain`.
pub(crate) fn with_drafts<T>(
    chain: &Chain,
    ids: &[u32],
    codec: CodecId,
    then: impl FnOnce(&[Draft<'_>]) -> T,
) -> T {
    let payloads: Vec<_> = (0..chain.len()).map(|i| payload(block_ids(ids, i), codec.0)).collect();
    let parts: Vec<_> = payloads.iter().map(|p| slices(p)).collect();
    let drafts: Vec<_> =
        (0..chain.len()).map(|i| Draft::block(chain, i, ids, codec, &parts[i]).unwrap()).collect();
    then(&drafts)
}

pub(crate) fn read(disk: &Disk, chain: &Chain, i: usize, ids: &[u32], copies: Copies) -> Result<Block, Miss> {
    let got = disk.get(&Expect::block(chain, i, ids, copies).unwrap());
    if let Ok(block) = &got {
        assert_right(block, block_ids(ids, i));
    }
    got
}

/// The block holds exactly what was written for these ids.
pub(crate) fn assert_right(block: &Block, ids: &[u32]) {
    let expected = payload(ids, block.codec.0);
    assert_eq!(block.tokens, ids);
    assert!(block.parts().eq(expected.iter().map(Vec::as_slice)), "wrong data came back");
}

pub(crate) fn readable(disk: &Disk, chain: &Chain, ids: &[u32]) -> usize {
    (0..chain.len()).take_while(|&i| read(disk, chain, i, ids, Copies::Exact).is_ok()).count()
}

pub(crate) fn open(dir: &std::path::Path) -> Disk {
    Disk::open(dir, DiskOptions::default()).unwrap()
}

pub(crate) fn record(key: &TenantKey, session: &str, chain: &Chain, ids: &[u32]) -> Record {
    let mut r = Record::new(key, session, chain, ids.to_vec());
    r.state = format!("{{\"session\":\"{session}\"}}").into_bytes();
    r
}
