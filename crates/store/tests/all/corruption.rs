//! Every field of every region, taken from the writer's own record of where it put it, is damaged in every way; what comes
//! back is a typed reason, or (for blocks that were not touched) the right data.
//!
//! `cargo test --release -p kvasir-store corruption -- --nocapture` prints the table.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use kvasir_store::field::{Region, Span, fields};
use kvasir_store::pack::encode_pack;
use kvasir_store::{Chain, CodecId, Copies, Draft, Expect, Lineage, Miss, Record, encode_record};
use twox_hash::XxHash3_128;

use crate::util::{assert_right, block_ids, chain, key, open, payload, record, slices, text, with_drafts};

const ID: [u8; 16] = [0xab; 16];

struct Fixture {
    ids: Vec<u32>,
    chain: Chain,
    record: Record,
    pack: Vec<u8>,
    pack_spans: Vec<Span>,
    session: Vec<u8>,
    session_spans: Vec<Span>,
}

impl Fixture {
    fn new() -> Self {
        let ids = text(5, 64 * 2 + 7);
        let mut c = chain(&key("a"), &ids[..64]);
        c.push(Lineage::Derived([6; 32]), &ids[64..128]).unwrap();
        let mut r = record(&key("a"), "chat", &c, &ids);
        r.lineage = Lineage::Derived([6; 32]);
        r.generation = 3;
        r.written_ms = 1_700_000_000_000;
        let data = payload(&ids[128..], 0);
        let parts = slices(&data);
        let (pack, pack_spans) = with_drafts(&c, &ids, CodecId::EXACT, |d| {
            let snapshot = Draft::snapshot(&c, r.lineage, &ids[128..], CodecId::EXACT, &parts).unwrap();
            r.snapshot = Some(snapshot.name);
            encode_pack(ID, key("a").tag(), &[d, &[snapshot]].concat()).unwrap()
        });
        let (session, session_spans) = encode_record(&r).unwrap();
        Self { ids, chain: c, record: r, pack, pack_spans, session, session_spans }
    }

    fn write(&self, dir: &Path, pack: &[u8], session: &[u8]) {
        let folder = dir.join(key("a").tag().hex());
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join(format!("{}.pack", "ab".repeat(16))), pack).unwrap();
        fs::write(folder.join(format!("{}.session", self.record.session.hex())), session).unwrap();
    }

    fn wants(&self) -> Vec<Expect<'_>> {
        let block = |i| Expect::block(&self.chain, i, &self.ids, Copies::Exact).unwrap();
        vec![block(0), block(1), self.record.snapshot(Copies::Exact).unwrap()]
    }

    /// Open the folder and read all blocks: right data or a reason for each, and what the look through the folder counted.
    fn read_blocks(&self, dir: &Path) -> (Vec<Result<(), Miss>>, BTreeMap<&'static str, u64>) {
        let disk = open(dir);
        let looked = disk.stats().misses;
        let tail = &self.ids[128..];
        let wants = self.wants();
        let got = wants.iter().enumerate().map(|(i, want)| {
            let ids = if i < 2 { block_ids(&self.ids, i) } else { tail };
            disk.get(want).map(|block| assert_right(&block, ids))
        });
        (got.collect(), looked)
    }
}

type Damage = (&'static str, fn(&mut Vec<u8>, std::ops::Range<usize>));

const DAMAGE: [Damage; 5] = [
    ("first bit", |b, r| b[r.start] ^= 1),
    ("last bit", |b, r| b[r.end - 1] ^= 0x80),
    ("zeros", |b, r| b[r].fill(0)),
    ("ones", |b, r| b[r].fill(0xff)),
    ("cut off", |b, r| b.truncate(r.start)),
];

fn range(span: &Span) -> std::ops::Range<usize> {
    span.range.start as usize..span.range.end as usize
}

#[test]
fn damage_to_any_field_of_a_pack_is_a_typed_miss_of_what_it_touches() {
    let f = Fixture::new();
    let dir = tempfile::tempdir().unwrap();
    f.write(dir.path(), &f.pack, &f.session);
    assert_eq!(f.read_blocks(dir.path()).0, [Ok(()), Ok(()), Ok(())], "sound before");

    let mut seen = std::collections::HashSet::new();
    let mut table = BTreeMap::<(Region, u32, &str), Vec<String>>::new();
    for span in &f.pack_spans {
        seen.insert((span.field.region, span.field.name));
        for (how, damage) in DAMAGE {
            let row = table.entry((span.field.region, span.range.start as u32, span.field.name)).or_default();
            let mut bytes = f.pack.clone();
            if range(span).is_empty() {
                row.push("empty".into());
                continue;
            }
            damage(&mut bytes, range(span));
            if bytes == f.pack {
                row.push("same".into());
                continue;
            }
            f.write(dir.path(), &bytes, &f.session);
            let (got, looked) = f.read_blocks(dir.path());
            let whole_pack = span.field.region != Region::Block || how == "cut off";
            for (i, result) in got.iter().enumerate() {
                let touched = whole_pack || i == span.index as usize;
                assert_eq!(result.is_err(), touched, "{span:?} {how}: block {i}: {result:?}");
            }
            let reason = if whole_pack {
                assert_eq!(
                    looked.len(),
                    1,
                    "{span:?} {how}: the pack was passed over for one reason: {looked:?}"
                );
                (*looked.keys().next().unwrap()).to_owned()
            } else {
                got[span.index as usize].as_ref().unwrap_err().code().to_owned()
            };
            assert_ne!(reason, "not-found", "{span:?} {how}");
            row.push(reason);
        }
    }
    print_table(&table);
    let all: Vec<_> = fields().into_iter().filter(|x| x.region != Region::Record).collect();
    assert!(all.iter().all(|x| seen.contains(&(x.region, x.name))), "every field of the table was damaged");
}

#[test]
fn damage_to_any_field_of_a_record_is_a_typed_miss() {
    let f = Fixture::new();
    let dir = tempfile::tempdir().unwrap();
    let mut table = BTreeMap::<(Region, u32, &str), Vec<String>>::new();
    for span in &f.session_spans {
        for (how, damage) in DAMAGE {
            let row = table.entry((span.field.region, span.range.start as u32, span.field.name)).or_default();
            let mut bytes = f.session.clone();
            damage(&mut bytes, range(span));
            if bytes == f.session {
                row.push("same".into());
                continue;
            }
            f.write(dir.path(), &f.pack, &bytes);
            let got = open(dir.path()).record(key("a").tag(), key("a").session("chat"));
            let miss = got.expect_err(&format!("{span:?} {how}"));
            assert!(miss.is_damage(), "{span:?} {how}: {miss}");
            row.push(miss.code().into());
        }
    }
    print_table(&table);
    assert_eq!(table.len(), fields().iter().filter(|x| x.region == Region::Record).count());
}

/// A checksum is no seal: it keeps accidents out, not forgers. But a file that was forged, or written by another version or
/// a defective writer, must not pass for something else than it is.
#[test]
fn a_header_field_that_lies_under_a_right_checksum_is_a_typed_miss() {
    let f = Fixture::new();
    let dir = tempfile::tempdir().unwrap();
    let block: Vec<_> =
        f.pack_spans.iter().filter(|s| s.field.region == Region::Block && s.index == 1).collect();
    let (start, end) = (range(block[0]).start, range(block[block.len() - 1]).end);
    let mut reasons = BTreeMap::new();
    for span in &block {
        let name = span.field.name;
        if ["payload", "payload_pad", "header_pad", "sum"].contains(&name) {
            continue;
        }
        for (how, damage) in &DAMAGE[..4] {
            let mut bytes = f.pack.clone();
            damage(&mut bytes, range(span));
            if bytes == f.pack {
                continue;
            }
            let sum = XxHash3_128::oneshot(&bytes[start..end - 16]).to_le_bytes();
            bytes[end - 16..end].copy_from_slice(&sum);
            f.write(dir.path(), &bytes, &f.session);
            let (got, _) = f.read_blocks(dir.path());
            let miss = got[1].clone().expect_err(&format!("{name} {how}"));
            assert_eq!((&got[0], &got[2]), (&Ok(()), &Ok(())));
            reasons.entry(name).or_insert(miss.code());
        }
    }
    assert_eq!((reasons["version"], reasons["codec"], reasons["ids"]), ("version", "lossy-copy", "foreign"));
    assert_eq!(
        (reasons["total_len"], reasons["part_lens"], reasons["name"]),
        ("malformed", "malformed", "foreign")
    );
    println!("{reasons:?}");
}

#[test]
fn a_pack_under_a_wrong_name_or_in_another_owners_folder_is_passed_over() {
    let f = Fixture::new();
    let dir = tempfile::tempdir().unwrap();
    for (owner, id) in [(key("a"), "cd"), (key("b"), "ab")] {
        let folder = dir.path().join(owner.tag().hex());
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join(format!("{}.pack", id.repeat(16))), &f.pack).unwrap();
        let disk = open(dir.path());
        assert_eq!(disk.stats().misses["foreign"], 1);
        assert!(f.wants().iter().all(|w| disk.get(w) == Err(Miss::NotFound)));
        disk.forget(owner.tag()).unwrap();
        assert!(!folder.exists());
    }
}

#[test]
fn a_damaged_block_is_written_anew_by_the_next_commit() {
    let f = Fixture::new();
    let dir = tempfile::tempdir().unwrap();
    let payload = f.pack_spans.iter().find(|s| s.field.name == "payload").unwrap();
    let mut bytes = f.pack.clone();
    bytes[range(payload).start + 9] ^= 4;
    f.write(dir.path(), &bytes, &f.session);
    let disk = open(dir.path());
    let want = Expect::block(&f.chain, 0, &f.ids, Copies::Exact).unwrap();
    assert_eq!(disk.get(&want), Err(Miss::Checksum { region: "block" }));
    assert_eq!(disk.get(&want), Err(Miss::NotFound), "nobody is sent there again");
    assert_eq!(disk.has(&f.chain, Copies::Exact), 0);
    assert_eq!(disk.stats().corrupt, 1);
    let report = with_drafts(&f.chain, &f.ids, CodecId::EXACT, |d| disk.put(d)).unwrap();
    assert_eq!((report.written, report.already_stored), (1, 1));
    assert_right(&disk.get(&want).unwrap(), block_ids(&f.ids, 0));
    // A process that starts now meets both copies, and ends with the right one.
    let again = open(dir.path());
    assert_right(&again.get(&want).unwrap(), block_ids(&f.ids, 0));
}

fn print_table(table: &BTreeMap<(Region, u32, &str), Vec<String>>) {
    println!("\n| region | at | field | {} |", DAMAGE.map(|d| d.0).join(" | "));
    for ((region, at, name), row) in table {
        println!("| {region:?} | {at} | {name} | {} |", row.join(" | "));
    }
}
