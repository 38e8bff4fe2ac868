//! What a user of the crate relies on: blocks and sessions come back as written, or not at all and with a reason.

use std::fs;
use std::path::Path;

use kvasir_store::{
    BlockKey, Chain, CodecId, Copies, Disk, DiskOptions, Draft, Expect, Identity, Lineage, Miss, Name,
    Options, Store,
};

use crate::util::{chain, identity, key, open, payload, read, readable, record, slices, text, with_drafts};

fn files(dir: &Path, ending: &str) -> Vec<std::path::PathBuf> {
    let mut out = Vec::new();
    for entry in fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()) {
        if entry.is_dir() {
            out.extend(files(&entry, ending));
        } else if entry.to_string_lossy().ends_with(ending) {
            out.push(entry);
        }
    }
    out
}

#[test]
fn blocks_come_back_from_another_process_as_they_were_written() {
    let dir = tempfile::tempdir().unwrap();
    let ids = text(1, 64 * 5 + 9);
    let c = chain(&key("a"), &ids);
    let first = open(dir.path());
    let report = with_drafts(&c, &ids, CodecId::EXACT, |d| first.put(d)).unwrap();
    assert_eq!((report.written, report.already_stored), (5, 0));
    let on_disk: u64 = files(dir.path(), ".pack").iter().map(|p| fs::metadata(p).unwrap().len()).sum();
    assert_eq!((report.bytes, first.stats().bytes), (on_disk, on_disk));

    let second = open(dir.path());
    assert_eq!(second.has(&c, Copies::Exact), 5);
    assert_eq!(readable(&second, &c, &ids), 5);
    let stats = second.stats();
    assert_eq!((stats.packs, stats.blocks, stats.hits, stats.bytes), (1, 5, 5, on_disk));
}

#[test]
fn stored_blocks_are_not_written_again() {
    let dir = tempfile::tempdir().unwrap();
    let disk = open(dir.path());
    let ids = text(1, 64 * 5);
    let c = chain(&key("a"), &ids[..64 * 3]);
    with_drafts(&c, &ids, CodecId::EXACT, |d| disk.put(d)).unwrap();
    let c = chain(&key("a"), &ids);
    let report = with_drafts(&c, &ids, CodecId::EXACT, |d| disk.put(d)).unwrap();
    assert_eq!((report.written, report.already_stored), (2, 3));
    let report = with_drafts(&c, &ids, CodecId::EXACT, |d| disk.put(d)).unwrap();
    assert_eq!((report.written, report.bytes), (0, 0));
    assert_eq!(files(dir.path(), ".pack").len(), 2);
}

#[test]
fn a_process_sees_what_another_one_commits_and_evicts() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = (open(dir.path()), open(dir.path()));
    let ids = text(1, 64 * 3);
    let c = chain(&key("a"), &ids);
    assert_eq!(b.has(&c, Copies::Exact), 0);
    with_drafts(&c, &ids, CodecId::EXACT, |d| a.put(d)).unwrap();
    // A read looks again by itself; a probe does too, but not if it has just looked.
    assert_eq!(readable(&b, &c, &ids), 3);
    assert_eq!(b.has(&c, Copies::Exact), 3);
    fs::remove_file(&files(dir.path(), ".pack")[0]).unwrap();
    // Fresh handle: one that was open keeps reading an unlinked file, which is sound.
    let third = open(dir.path());
    assert_eq!(read(&third, &c, 0, &ids, Copies::Exact), Err(Miss::NotFound));
    // And the first, which still has the pack in its index, writes it again rather than believe itself.
    let report = with_drafts(&c, &ids, CodecId::EXACT, |d| a.put(d)).unwrap();
    assert_eq!(report.written, 3);
    assert_eq!(readable(&third, &c, &ids), 3);
}

#[test]
fn every_field_of_the_request_is_checked() {
    let dir = tempfile::tempdir().unwrap();
    let disk = open(dir.path());
    let ids = text(1, 64);
    let c = chain(&key("a"), &ids);
    with_drafts(&c, &ids, CodecId::EXACT, |d| disk.put(d)).unwrap();
    let good = Expect::block(&c, 0, &ids, Copies::Exact).unwrap();
    assert!(disk.get(&good).is_ok());
    let other_ids = text(2, 64);
    let cases = [
        ("owner", Expect { owner: key("b").tag(), ..good }),
        ("fingerprint", Expect { identity: Identity { fingerprint: [0; 32], ..identity() }, ..good }),
        ("layout", Expect { identity: Identity { layout: [0; 32], ..identity() }, ..good }),
        ("key_space", Expect { identity: Identity { key_space: 1, ..identity() }, ..good }),
        ("dtype", Expect { identity: Identity { dtype: 0, ..identity() }, ..good }),
        ("lineage", Expect { lineage: Lineage::Derived([1; 32]), ..good }),
        ("parent", Expect { parent: Name([1; 32]), ..good }),
        ("layout_tag", Expect { layout_tag: 0, ..good }),
        ("ids", Expect { tokens: &other_ids, ..good }),
        ("kind", Expect { kind: kvasir_store::Kind::Snapshot, ..good }),
    ];
    for (field, want) in cases {
        assert_eq!(disk.get(&want), Err(Miss::Foreign { field }));
    }
    assert_eq!(disk.stats().misses["foreign"], 10);
    assert!(disk.get(&good).is_ok(), "a foreign request harms nobody");
}

#[test]
fn other_tenants_lineages_and_number_types_do_not_find_a_block() {
    let dir = tempfile::tempdir().unwrap();
    let disk = open(dir.path());
    let ids = text(1, 64 * 2);
    // The first half of the text was prefilled over int8: its rows are fine by themselves, what follows is derived.
    let mut lossy = Chain::new(&key("a"), identity());
    let recipe = Lineage::Derived([9; 32]);
    lossy.push(recipe, &ids[..64]).unwrap();
    lossy.push(recipe, &ids[64..]).unwrap();
    with_drafts(&lossy, &ids, CodecId::of(b"int8"), |d| disk.put(d)).unwrap();
    assert_eq!(disk.has(&lossy, Copies::Coded(CodecId::of(b"int8"))), 2);

    let exact = chain(&key("a"), &ids);
    assert_eq!(disk.has(&exact, Copies::Exact), 0);
    assert_eq!(read(&disk, &exact, 0, &ids, Copies::Exact), Err(Miss::NotFound));
    let mut other = Chain::new(&key("b"), identity());
    other.extend(recipe, &ids);
    assert_eq!(disk.has(&other, Copies::Coded(CodecId::of(b"int8"))), 0);
}

#[test]
fn a_lossy_copy_of_exact_rows_is_a_miss_for_who_wants_them_exact() {
    let dir = tempfile::tempdir().unwrap();
    let disk = open(dir.path());
    let int8 = CodecId::of(b"int8");
    let ids = text(1, 64);
    let c = chain(&key("a"), &ids);
    with_drafts(&c, &ids, int8, |d| disk.put(d)).unwrap();
    assert_eq!(disk.has(&c, Copies::Exact), 0);
    assert_eq!(read(&disk, &c, 0, &ids, Copies::Exact), Err(Miss::LossyCopy { codec: int8.0 }));
    assert_eq!(read(&disk, &c, 0, &ids, Copies::Coded(int8)).unwrap().codec, int8);
    let other = Copies::Coded(CodecId::of(b"int4"));
    assert_eq!(read(&disk, &c, 0, &ids, other), Err(Miss::LossyCopy { codec: int8.0 }));
    // The exact rows may be added; each reader then gets what it asked for.
    let report = with_drafts(&c, &ids, CodecId::EXACT, |d| disk.put(d)).unwrap();
    assert_eq!(report.written, 1);
    assert!(read(&disk, &c, 0, &ids, Copies::Exact).unwrap().codec.is_exact());
    assert_eq!(read(&disk, &c, 0, &ids, Copies::Coded(int8)).unwrap().codec, int8);
    assert!(read(&disk, &c, 0, &ids, other).unwrap().codec.is_exact());
}

#[test]
fn a_session_comes_back_with_blocks_tail_and_state() {
    let dir = tempfile::tempdir().unwrap();
    let store = || Store::<()>::open(Options { dir: Some(dir.path().into()), ..Options::default() }).unwrap();
    let ids = text(1, 64 * 2 + 10);
    let first = store();
    let tenant = first.tenant("acme").unwrap();
    let c = chain(&tenant, &ids);
    let mut r = record(&tenant, "chat", &c, &ids);
    let tail = payload(&ids[128..], 0);
    let commit = with_drafts(&c, &ids, CodecId::EXACT, |d| {
        let parts = slices(&tail);
        let snapshot = Draft::snapshot(&c, Lineage::Exact, &ids[128..], CodecId::EXACT, &parts).unwrap();
        r.snapshot = Some(snapshot.name);
        first.commit(&[d, &[snapshot]].concat(), &mut r).unwrap()
    });
    assert_eq!((commit.written, commit.durable, commit.generation), (3, true, 1));

    let again = store();
    let tenant = again.tenant("acme").unwrap();
    let back = again.record(&tenant, "chat").unwrap();
    assert_eq!(back, r);
    let c = back.chain(&[&tenant]).unwrap();
    let disk = again.disk().unwrap();
    assert_eq!((c.len(), readable(disk, &c, &back.ids)), (2, 2));
    let got = disk.get(&back.snapshot(Copies::Exact).unwrap()).unwrap();
    assert!(got.parts().eq(slices(&tail)));
    assert_eq!(again.record(&again.tenant("other").unwrap(), "chat"), Err(Miss::NotFound));
    assert_eq!(again.record(&tenant, "chat2"), Err(Miss::NotFound));
}

#[test]
fn a_snapshot_of_the_last_commit_is_removed_with_its_pack() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::<()>::open(Options { dir: Some(dir.path().into()), ..Options::default() }).unwrap();
    let tenant = store.tenant("acme").unwrap();
    let ids = text(1, 40);
    let c = chain(&tenant, &ids);
    for generation in 1..=3 {
        let data = payload(&ids, generation);
        let parts = slices(&data);
        let snapshot = Draft::snapshot(&c, Lineage::Exact, &ids, CodecId::EXACT, &parts).unwrap();
        let mut r = record(&tenant, "chat", &c, &ids);
        r.snapshot = Some(snapshot.name);
        assert_eq!(store.commit(&[snapshot], &mut r).unwrap().generation, generation);
        let got = store.disk().unwrap().get(&r.snapshot(Copies::Exact).unwrap()).unwrap();
        assert!(got.parts().eq(slices(&data)));
        assert_eq!(files(dir.path(), ".pack").len(), 1);
    }
    assert!(store.remove(&tenant, "chat").unwrap());
    assert!(!store.remove(&tenant, "chat").unwrap());
    assert!(files(dir.path(), ".pack").is_empty() && files(dir.path(), ".session").is_empty());
}

#[test]
fn without_a_folder_sessions_live_as_long_as_the_store() {
    let store = Store::<u8>::open(Options::default()).unwrap();
    let tenant = store.tenant("a").unwrap();
    let ids = text(1, 64);
    let c = chain(&tenant, &ids);
    store.mem().put(tenant.tag(), BlockKey { name: c.tip(), codec: CodecId::EXACT }, 10, 42);
    let mut r = record(&tenant, "s", &c, &ids);
    let commit = store.commit(&[], &mut r).unwrap();
    assert!(!commit.durable);
    assert_eq!(store.record(&tenant, "s").unwrap(), r);
    assert_eq!(store.has(&c, Copies::Exact), 1);
    let gone = store.forget(&tenant).unwrap();
    assert_eq!((gone.records, gone.host_blocks, gone.host_bytes), (1, 1, 10));
    assert_eq!(store.record(&tenant, "s"), Err(Miss::NotFound));
    assert_eq!(store.has(&c, Copies::Exact), 0);
}

#[test]
fn the_byte_limit_is_kept_by_dropping_tails() {
    let dir = tempfile::tempdir().unwrap();
    let ids = text(1, 64 * 8);
    let one = {
        let c = chain(&key("probe"), &ids[..64]);
        with_drafts(&c, &ids, CodecId::EXACT, |d| open(dir.path()).put(d)).unwrap().bytes
    };
    open(dir.path()).forget(key("probe").tag()).unwrap();

    let limit = one * 5;
    let options = DiskOptions { limit_bytes: Some(limit), ..DiskOptions::default() };
    let disk = Disk::open(dir.path(), options).unwrap();
    // One text in five packs, then another of two blocks.
    for blocks in 1..=5 {
        let c = chain(&key("a"), &ids[..64 * blocks]);
        with_drafts(&c, &ids, CodecId::EXACT, |d| disk.put(d)).unwrap();
    }
    let other = text(2, 128);
    let c = chain(&key("b"), &other);
    with_drafts(&c, &other, CodecId::EXACT, |d| disk.put(d)).unwrap();
    let on_disk: u64 = files(dir.path(), ".pack").iter().map(|p| fs::metadata(p).unwrap().len()).sum();
    assert!(on_disk <= limit && on_disk == disk.stats().bytes);
    assert_eq!(readable(&disk, &c, &other), 2);
    let first = chain(&key("a"), &ids[..64 * 5]);
    let left = readable(&disk, &first, &ids);
    assert!((1..5).contains(&left), "the head stays, the tail went: {left}");
    assert!((left..5).all(|i| read(&disk, &first, i, &ids, Copies::Exact).is_err()));

    let big = text(3, 64 * 8);
    let c = chain(&key("c"), &big);
    let err = with_drafts(&c, &big, CodecId::EXACT, |d| disk.put(d)).unwrap_err();
    assert_eq!(err.code(), "StoreFull");
    assert_eq!(readable(&disk, &first, &ids), left, "a commit that can never fit evicts nothing");
}

#[test]
fn forgetting_a_tenant_leaves_nothing_of_it() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::<u8>::open(Options { dir: Some(dir.path().into()), ..Options::default() }).unwrap();
    let ids = text(1, 64 * 3);
    for name in ["acme-corporation", "globex-corporation"] {
        let tenant = store.tenant(name).unwrap();
        let c = chain(&tenant, &ids);
        with_drafts(&c, &ids, CodecId::EXACT, |d| {
            store.commit(d, &mut record(&tenant, "private-session-id", &c, &ids)).unwrap();
            store.commit(&[], &mut record(&tenant, "second", &c, &ids)).unwrap();
        });
        store.mem().put(tenant.tag(), BlockKey { name: c.tip(), codec: CodecId::EXACT }, 10, 1);
    }
    let acme = store.tenant("acme-corporation").unwrap();
    let before = store.stats().disk.unwrap();
    let gone = store.forget(&acme).unwrap();
    assert_eq!((gone.records, gone.packs, gone.blocks, gone.host_blocks), (2, 1, 3, 1));
    let after = store.stats().disk.unwrap();
    assert_eq!(before.bytes - after.bytes, gone.bytes);
    assert!(gone.bytes > 0 && after.bytes == gone.bytes, "two tenants with equal content");

    // No file, folder or byte of the directory speaks of it any more: neither its tag, nor a name of its blocks, nor its id,
    // nor (but for the other tenant, who has the same text) more than one copy of the payload.
    let c = chain(&acme, &ids);
    let tag = acme.tag();
    let needle = payload(&ids[..64], 0)[0].clone();
    let mut copies = 0;
    for path in files(dir.path(), "") {
        let shown = path.to_string_lossy().into_owned();
        assert!(!shown.contains(&tag.hex()), "{shown}");
        let bytes = fs::read(&path).unwrap();
        let found = |n: &[u8]| bytes.windows(n.len()).filter(|w| *w == n).count();
        for needle in [&tag.0[..], b"acme-corporation", &c.names()[0].0, &c.names()[2].0] {
            assert_eq!(found(needle), 0, "{shown}");
        }
        assert_eq!(found(b"globex"), 0, "tenant ids are never in clear");
        // The state this test put into the record is the engine's own bytes; only the hash of the id is the store's.
        copies += found(&needle);
    }
    assert_eq!(copies, 1);
    assert!(!dir.path().join(tag.hex()).exists());
    assert_eq!(store.record(&acme, "second"), Err(Miss::NotFound));
    let globex = store.tenant("globex-corporation").unwrap();
    assert!(store.record(&globex, "second").is_ok());
    assert_eq!(readable(store.disk().unwrap(), &chain(&globex, &ids), &ids), 3);
    assert_eq!(store.forget(&acme).unwrap(), kvasir_store::Forgotten::default());
}

#[test]
fn a_share_group_serves_two_tenants_and_its_prompt_outlives_one() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::<()>::open(Options { dir: Some(dir.path().into()), ..Options::default() }).unwrap();
    let (a, b, group) =
        (store.tenant("a").unwrap(), store.tenant("b").unwrap(), store.group("prompts").unwrap());
    assert_ne!(group.tag(), store.tenant("prompts").unwrap().tag());
    let ids = text(1, 64 * 4);
    let with_prompt = |tenant| {
        let mut c = Chain::new(&group, identity());
        c.extend(Lineage::Exact, &ids[..128]);
        c.set_key(tenant);
        c.extend(Lineage::Exact, &ids);
        c
    };
    let of_a = with_prompt(&a);
    with_drafts(&of_a, &ids, CodecId::EXACT, |d| {
        store.commit(d, &mut record(&a, "s", &of_a, &ids)).unwrap();
    });
    let of_b = with_prompt(&b);
    assert_eq!(store.has(&of_b, Copies::Exact), 2, "the prompt is shared, the turns are not");
    let back = store.record(&a, "s").unwrap();
    assert_eq!(back.chain(&[&group, &a]).unwrap().names(), of_a.names());
    assert_eq!(back.chain(&[&a]).unwrap().len(), 0);
    store.forget(&a).unwrap();
    assert_eq!(store.has(&of_b, Copies::Exact), 2);
    assert_eq!(readable(store.disk().unwrap(), &of_a, &ids), 2);
}

#[test]
fn another_secret_finds_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let open = |key| {
        Store::<()>::open(Options { dir: Some(dir.path().into()), key: Some(key), ..Options::default() })
            .unwrap()
    };
    let ids = text(1, 64);
    let store = open([1; 32]);
    let tenant = store.tenant("a").unwrap();
    let c = chain(&tenant, &ids);
    with_drafts(&c, &ids, CodecId::EXACT, |d| store.commit(d, &mut record(&tenant, "s", &c, &ids)).unwrap());
    let other = open([2; 32]);
    let tenant = other.tenant("a").unwrap();
    assert_eq!(other.record(&tenant, "s"), Err(Miss::NotFound));
    assert_eq!(other.has(&chain(&tenant, &ids), Copies::Exact), 0);
    assert!(!dir.path().join("secret").exists());
    assert!(other.tenant("").is_err() && other.group("").is_err());
}
