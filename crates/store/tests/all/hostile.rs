//! Parsers against bytes that nobody wrote, or that somebody bent: they return, and never with data that was not written.

use std::io;

use kvasir_store::pack::{encode_pack, parse_block, read_block, read_index};
use kvasir_store::{CodecId, Copies, Expect, FileRead, encode_record, parse_record};
use proptest::prelude::*;
use twox_hash::XxHash3_128;

use crate::util::{assert_right, block_ids, chain, key, record, text, with_drafts};

struct Bytes(Vec<u8>);

impl FileRead for Bytes {
    fn size(&self) -> io::Result<u64> {
        Ok(self.0.len() as u64)
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let from = usize::try_from(offset).map_err(io::Error::other)?;
        let end = from.checked_add(buf.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
        buf.copy_from_slice(self.0.get(from..end).ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }
}

/// Replace, insert, delete or repeat bytes.
#[derive(Clone, Debug)]
enum Bend {
    Set(usize, u8),
    Word(usize, u64),
    Cut(usize, usize),
    Insert(usize, Vec<u8>),
    Copy(usize, usize, usize),
}

fn bends() -> impl Strategy<Value = Vec<Bend>> {
    let at = 0usize..6000;
    let word = prop_oneof![Just(0), Just(u64::MAX), Just(1 << 32), 0u64..10_000, any::<u64>()];
    let one = prop_oneof![
        (at.clone(), any::<u8>()).prop_map(|(a, b)| Bend::Set(a, b)),
        (at.clone(), word).prop_map(|(a, w)| Bend::Word(a, w)),
        (at.clone(), 1usize..200).prop_map(|(a, n)| Bend::Cut(a, n)),
        (at.clone(), proptest::collection::vec(any::<u8>(), 1..80)).prop_map(|(a, v)| Bend::Insert(a, v)),
        (at.clone(), at, 1usize..300).prop_map(|(a, b, n)| Bend::Copy(a, b, n)),
    ];
    proptest::collection::vec(one, 1..6)
}

fn bend(mut bytes: Vec<u8>, by: &[Bend]) -> Vec<u8> {
    for b in by {
        let len = bytes.len().max(1);
        match b {
            Bend::Set(a, v) => {
                if let Some(x) = bytes.get_mut(a % len) {
                    *x = *v;
                }
            }
            Bend::Word(a, w) => {
                let a = a % len;
                let n = 8.min(bytes.len() - a.min(bytes.len()));
                bytes[a..a + n].copy_from_slice(&w.to_le_bytes()[..n]);
            }
            Bend::Cut(a, n) => {
                let a = (a % len).min(bytes.len());
                bytes.drain(a..(a + n).min(bytes.len()));
            }
            Bend::Insert(a, v) => {
                let a = (a % len).min(bytes.len());
                bytes.splice(a..a, v.iter().copied());
            }
            Bend::Copy(a, b, n) => {
                let (a, b) = (a % len, b % len);
                let n = (*n).min(bytes.len() - a.max(b).min(bytes.len()));
                bytes.copy_within(a..a + n, b);
            }
        }
    }
    bytes
}

/// The last 16 bytes become the checksum of the rest, so that what is behind the checksum is reached.
fn reseal(bytes: &mut [u8]) {
    if let Some(body) = bytes.len().checked_sub(16) {
        let sum = XxHash3_128::oneshot(&bytes[..body]).to_le_bytes();
        bytes[body..].copy_from_slice(&sum);
    }
}

fn pack_bytes(ids: &[u32]) -> Vec<u8> {
    let c = chain(&key("a"), ids);
    with_drafts(&c, ids, CodecId::EXACT, |d| encode_pack([1; 16], key("a").tag(), d).unwrap().0)
}

/// Read everything an index promises; sound blocks must be right.
fn read_all(bytes: Vec<u8>, ids: &[u32]) -> usize {
    let file = Bytes(bytes);
    let Ok(index) = read_index(&file) else { return 0 };
    let c = chain(&key("a"), ids);
    let mut sound = 0;
    for e in index.entries {
        for i in 0..c.len() {
            let want = Expect::block(&c, i, ids, Copies::Exact).unwrap();
            if let Ok(block) = read_block(&file, e.offset, e.len, &want) {
                assert_right(&block, block_ids(ids, i));
                sound += 1;
            }
        }
    }
    sound
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn random_bytes_are_refused(bytes in proptest::collection::vec(any::<u8>(), 0..3000)) {
        prop_assert!(parse_block(bytes.clone()).is_err());
        prop_assert!(parse_record(&bytes).is_err());
        prop_assert!(read_index(&Bytes(bytes)).is_err());
    }

    #[test]
    fn bent_packs_give_right_data_or_none(by in bends()) {
        let ids = text(3, 64 * 3);
        read_all(bend(pack_bytes(&ids), &by), &ids);
    }

    #[test]
    fn bent_footers_under_right_checksums_give_right_data_or_none(
        by in bends(),
        footer in 0usize..320,
        word in prop_oneof![0u64..10_000, any::<u64>()],
    ) {
        let ids = text(3, 64 * 3);
        let mut bytes = pack_bytes(&ids);
        let len = bytes.len();
        let footer_len = 16 + 3 * 96 + 16;
        let from = len - 48 - footer_len;
        // One number of the footer, then one of the trailer, both sealed again.
        let at = from + footer.min(footer_len - 24);
        bytes[at..at + 8].copy_from_slice(&word.to_le_bytes());
        reseal(&mut bytes[from..len - 48]);
        read_all(bytes.clone(), &ids);
        let trailer = bend(bytes[len - 48..].to_vec(), &by);
        bytes.splice(len - 48.., trailer);
        let len = bytes.len();
        reseal(&mut bytes[len - 48..]);
        read_all(bytes, &ids);
    }

    #[test]
    fn bent_blocks_and_records_under_right_checksums_do_not_panic(by in bends()) {
        let ids = text(4, 64 + 9);
        let pack = pack_bytes(&ids);
        let first = read_index(&Bytes(pack.clone())).unwrap().entries[0];
        let block = pack[first.offset as usize..(first.offset + first.len) as usize].to_vec();
        prop_assert!(parse_block(block.clone()).is_ok());
        let mut bent = bend(block, &by);
        reseal(&mut bent);
        if let Ok(b) = parse_block(bent) {
            prop_assert_eq!(b.parts().map(<[u8]>::len).sum::<usize>(), b.payload().len());
        }

        let c = chain(&key("a"), &ids);
        let (bytes, _) = encode_record(&record(&key("a"), "s", &c, &ids)).unwrap();
        let mut bent = bend(bytes, &by);
        reseal(&mut bent);
        if let Ok(r) = parse_record(&bent) {
            let named = r.chain(&[&key("a")]).unwrap().len();
            prop_assert!(named <= r.blocks.len() && r.blocks.len() * 64 + r.tail().len() == r.ids.len());
        }
    }
}
