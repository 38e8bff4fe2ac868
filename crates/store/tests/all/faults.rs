//! A disk that is full, or broken, at any operation of a commit: a typed error, nothing half written, earlier commits whole.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use kvasir_store::{CodecId, Disk, DiskOptions, Miss, Options, Store};

use crate::hooked::Hooked;
use crate::util::{chain, key, readable, record, text, with_drafts};

fn strays(dir: &Path) -> usize {
    let names = std::fs::read_dir(dir.join(key("a").tag().hex())).into_iter().flatten();
    names.filter(|e| e.as_ref().unwrap().path().extension().is_some_and(|x| x == "tmp")).count()
}

#[test]
fn a_failure_at_any_operation_of_a_commit_is_typed_and_leaves_nothing_behind() {
    for (kind, code) in [(io::ErrorKind::StorageFull, "StoreFull"), (io::ErrorKind::PermissionDenied, "Io")] {
        let mut failed = 0;
        for fail_at in 1.. {
            let dir = tempfile::tempdir().unwrap();
            let ids = text(1, 64 * 4);
            let first = chain(&key("a"), &ids[..128]);
            let calm = Disk::open(dir.path(), DiskOptions::default()).unwrap();
            with_drafts(&first, &ids, CodecId::EXACT, |d| calm.put(d)).unwrap();
            calm.put_record(&mut record(&key("a"), "s", &first, &ids[..128])).unwrap();

            // Counts down to the failure; far away until the store is open.
            let count = Arc::new(AtomicU64::new(u64::MAX / 2));
            let counter = Arc::clone(&count);
            let hook = move |point: &str| {
                // Cleaning up works: a disk that refuses even that is the next test.
                if !point.starts_with("remove") && counter.fetch_sub(1, Ordering::Relaxed) == 1 {
                    return Err(io::Error::from(kind));
                }
                Ok(())
            };
            let fs = Arc::new(Hooked(Arc::new(hook)));
            let disk = Disk::open(dir.path(), DiskOptions { fs, limit_bytes: None }).unwrap();
            count.store(fail_at, Ordering::Relaxed);
            let all = chain(&key("a"), &ids);
            let result = with_drafts(&all, &ids, CodecId::EXACT, |d| disk.put(d)).map(|_| ());
            let packed = result.is_ok();
            let result =
                result.and_then(|()| disk.put_record(&mut record(&key("a"), "s", &all, &ids)).map(|_| ()));
            // More failures were ordered than there are operations.
            let done = count.load(Ordering::Relaxed).wrapping_sub(1) < u64::MAX / 2;
            match result {
                Ok(()) => assert!(done),
                Err(e) => {
                    assert_eq!(e.code(), code, "{e}");
                    failed += 1;
                }
            }
            // The stray that "create is done" leaves is a file its writer never learned of; opening again removes it.
            let again = Disk::open(dir.path(), DiskOptions::default()).unwrap();
            assert_eq!(strays(dir.path()), 0, "operation {fail_at}");
            assert_eq!(again.stats().corrupt, 0);
            assert!(readable(&again, &first, &ids) == 2, "the first commit is whole");
            let there = readable(&again, &all, &ids);
            assert!(there == if packed { 4 } else { 2 }, "operation {fail_at}: {there}");
            let r = again.record(key("a").tag(), key("a").session("s")).unwrap();
            assert!([128, 256].contains(&r.ids.len()) && r.ids == ids[..r.ids.len()]);
            // And the same process goes on as soon as the disk does.
            count.store(u64::MAX / 2, Ordering::Relaxed);
            with_drafts(&all, &ids, CodecId::EXACT, |d| disk.put(d)).unwrap();
            assert_eq!(readable(&disk, &all, &ids), 4);
            if done {
                break;
            }
        }
        assert!(failed >= 18, "a commit has at least 18 operations that can fail, {failed} did");
    }
}

#[test]
fn a_refused_commit_can_be_kept_in_memory() {
    let dir = tempfile::tempdir().unwrap();
    let full = Arc::new(AtomicU64::new(1));
    let flag = Arc::clone(&full);
    let hook = move |point: &str| {
        let fails = flag.load(Ordering::Relaxed) == 1 && point == "write begins";
        if fails { Err(io::ErrorKind::StorageFull.into()) } else { Ok(()) }
    };
    let options = Options {
        dir: Some(dir.path().into()),
        key: Some([1; 32]),
        fs: Arc::new(Hooked(Arc::new(hook))),
        ..Options::default()
    };
    let store = Store::<()>::open(options).unwrap();
    let tenant = store.tenant("t").unwrap();
    let ids = text(1, 100);
    let c = chain(&tenant, &ids);
    let mut r = record(&tenant, "s", &c, &ids);
    let err = with_drafts(&c, &ids, CodecId::EXACT, |d| store.commit(d, &mut r)).unwrap_err();
    assert_eq!(err.code(), "StoreFull");
    assert_eq!(store.record(&tenant, "s"), Err(Miss::NotFound));
    store.keep(&mut r);
    assert_eq!(store.record(&tenant, "s").unwrap(), r);
    assert_eq!(store.stats().host_records, 1);

    full.store(0, Ordering::Relaxed);
    with_drafts(&c, &ids, CodecId::EXACT, |d| store.commit(d, &mut r)).unwrap();
    assert_eq!(store.stats().host_records, 0);
    assert_eq!(store.record(&tenant, "s").unwrap(), r);
}
