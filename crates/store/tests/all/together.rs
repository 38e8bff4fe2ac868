//! Several handles on one folder, as several processes would have, writing, reading, evicting and forgetting at once.

use kvasir_store::{CodecId, Copies, Disk, DiskOptions};

use crate::util::{Random, chain, key, read, record, text, with_drafts};

#[test]
fn handles_that_share_a_folder_read_what_is_right_or_nothing() {
    let dir = tempfile::tempdir().unwrap();
    // Room for about half of what is written.
    let options = || DiskOptions { limit_bytes: Some(60_000), ..DiskOptions::default() };
    let disks = [Disk::open(dir.path(), options()).unwrap(), Disk::open(dir.path(), options()).unwrap()];
    let hits: usize = std::thread::scope(|s| {
        let jobs: Vec<_> = (0..4u64)
            .map(|worker| {
                let disk = &disks[worker as usize % 2];
                s.spawn(move || {
                    let mut r = Random(worker);
                    let mut hits = 0;
                    for turn in 0..150 {
                        let tenant = key(["a", "b"][r.below(2) as usize]);
                        let ids = text(r.below(6), 64 * (1 + r.below(8) as usize) + 5);
                        let c = chain(&tenant, &ids);
                        // `read` compares every byte.
                        hits += (0..c.len())
                            .take_while(|&i| read(disk, &c, i, &ids, Copies::Exact).is_ok())
                            .count();
                        let put = with_drafts(&c, &ids, CodecId::EXACT, |d| disk.put(d)).and_then(|_| {
                            disk.put_record(&mut record(&tenant, &format!("s{}", r.below(3)), &c, &ids))
                        });
                        match put {
                            Ok(_) => {}
                            // The other handle forgot the owner, or has filled the folder, in the middle of it.
                            Err(e) => assert!(["Io", "StoreFull"].contains(&e.code()), "{e}"),
                        }
                        if worker == 3 && turn % 40 == 39 {
                            // The other handle may write faster than this one removes; that is said, not hidden.
                            if let Err(e) = disk.forget(tenant.tag()) {
                                assert_eq!(e.code(), "Io", "{e}");
                            }
                        }
                    }
                    hits
                })
            })
            .collect();
        jobs.into_iter().map(|j| j.join().unwrap()).sum()
    });
    assert!(hits > 100, "reuse happened: {hits}");
    for disk in &disks {
        let stats = disk.stats();
        assert_eq!(stats.corrupt, 0, "{stats:?}");
        assert!(stats.evicted > 0);
    }
}
