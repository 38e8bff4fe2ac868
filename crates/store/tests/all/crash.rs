//! A child process commits sessions and is killed (SIGKILL) at a named point inside a commit; the parent then opens the
//! folder and reads everything.
//!
//! Promise: what was acknowledged is there; what is there is right; no stray is left. The kill is exact: the child stops at
//! the point, says so, and waits for the end. (Losing what was written but not synced needs a file system that can forget;
//! the order of syncs and renames is what this test walks through.)

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use kvasir_store::{CodecId, Copies, Draft, Lineage, Options, Store};

use crate::hooked::Hooked;
use crate::util::{chain, payload, readable, record, slices, text, with_drafts};

const DIR: &str = "KVASIR_CRASH_DIR";
const AT: &str = "KVASIR_CRASH_AT";
const SESSIONS: u64 = 3;
const ROUNDS: u64 = 140;

/// Ids of a session after so many commits: every commit adds less than a block, so tails and blocks take turns.
fn ids(session: u64, generation: u64) -> Vec<u32> {
    text(session, 40 + 37 * generation as usize)
}

fn say(line: &str) {
    let mut out = std::io::stdout().lock();
    writeln!(out, "\n{line}").unwrap();
    out.flush().unwrap();
}

fn commit(store: &Store<()>, session: u64, generation: u64) {
    let tenant = store.tenant("tenant").unwrap();
    let ids = ids(session, generation);
    let c = chain(&tenant, &ids);
    let mut r = record(&tenant, &format!("s{session}"), &c, &ids);
    let data = payload(r.tail(), 0);
    let parts = slices(&data);
    with_drafts(&c, &ids, CodecId::EXACT, |d| {
        let snapshot =
            Draft::snapshot(&c, Lineage::Exact, &ids[c.len() * 64..], CodecId::EXACT, &parts).unwrap();
        r.snapshot = Some(snapshot.name);
        let done = store.commit(&[d, &[snapshot]].concat(), &mut r).unwrap();
        assert!(done.durable && done.generation == generation);
    });
}

/// The child. Not a test of its own: it runs until it is killed.
#[test]
#[ignore = "started by `what_was_acknowledged_survives_a_kill_anywhere_in_a_commit`"]
fn child() {
    let dir = std::env::var(DIR).expect("the parent names the folder");
    let at: u64 = std::env::var(AT).expect("the parent names the point").parse().unwrap();
    // Points count from the first commit on, not from the opening of the store.
    let armed = Arc::new(AtomicBool::new(false));
    let (points, counts) = (AtomicU64::new(0), Arc::clone(&armed));
    let hook = move |point: &str| {
        if counts.load(Ordering::Relaxed) && points.fetch_add(1, Ordering::Relaxed) + 1 == at {
            say(&format!("AT {point}"));
            loop {
                std::thread::park();
            }
        }
        Ok(())
    };
    let options =
        Options { dir: Some(dir.into()), fs: Arc::new(Hooked(Arc::new(hook))), ..Options::default() };
    let options = Options { key: Some([9; 32]), ..options };
    let store = Store::<()>::open(options).unwrap();
    let tenant = store.tenant("tenant").unwrap();
    armed.store(true, Ordering::Relaxed);
    for turn in at.. {
        let session = turn % SESSIONS;
        let last = store.record(&tenant, &format!("s{session}")).map_or(0, |r| r.generation);
        say(&format!("BEGIN {session} {}", last + 1));
        commit(&store, session, last + 1);
        say(&format!("ACK {session} {}", last + 1));
    }
}

/// Generation of every session that can be read; asserts that all of it is right.
fn check(dir: &Path) -> BTreeMap<u64, u64> {
    let options = Options { dir: Some(dir.into()), key: Some([9; 32]), ..Options::default() };
    let store = Store::<()>::open(options).unwrap();
    let disk = store.disk().unwrap();
    let tenant = store.tenant("tenant").unwrap();
    let mut found = BTreeMap::new();
    for session in 0..SESSIONS {
        let Ok(r) = store.record(&tenant, &format!("s{session}")) else { continue };
        assert_eq!(r.ids, ids(session, r.generation));
        let c = r.chain(&[&tenant]).unwrap();
        assert_eq!(c.len(), r.ids.len() / 64);
        assert_eq!(readable(disk, &c, &r.ids), c.len(), "a record speaks of what is durable");
        let tail = disk.get(&r.snapshot(Copies::Exact).unwrap()).unwrap();
        assert!(tail.parts().eq(slices(&payload(r.tail(), 0))));
        found.insert(session, r.generation);
    }
    let stats = disk.stats();
    assert_eq!(stats.corrupt, 0, "no file is half written");
    let folder = dir.join(tenant.tag().hex());
    for name in std::fs::read_dir(folder).into_iter().flatten().map(|e| e.unwrap().file_name()) {
        assert!(!name.to_string_lossy().ends_with(".tmp"), "a stray is left: {}", name.display());
    }
    found
}

#[test]
fn what_was_acknowledged_survives_a_kill_anywhere_in_a_commit() {
    let dir = tempfile::tempdir().unwrap();
    let mut acknowledged = BTreeMap::new();
    let mut points = BTreeMap::<String, u64>::new();
    for round in 0..ROUNDS {
        // 1 to 67, in an order that visits neighbours far apart: every point of the first two commits of a child.
        let at = 1 + round * 29 % 67;
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["crash::child", "--exact", "--ignored", "--nocapture"])
            .env(DIR, dir.path())
            .env(AT, at.to_string())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut begun = None;
        let mut point = None;
        for line in BufReader::new(child.stdout.take().unwrap()).lines() {
            let line = line.unwrap();
            let numbers = |s: &str| -> Vec<u64> { s.split(' ').map(|n| n.parse().unwrap()).collect() };
            if let Some(p) = line.strip_prefix("AT ") {
                point = Some(p.to_owned());
                child.kill().unwrap();
            } else if let Some(n) = line.strip_prefix("BEGIN ").map(numbers) {
                begun = Some((n[0], n[1]));
            } else if let Some(n) = line.strip_prefix("ACK ").map(numbers) {
                acknowledged.insert(n[0], n[1]);
                begun = None;
            }
        }
        assert!(!child.wait().unwrap().success());
        *points.entry(point.expect("the child was killed at its point")).or_default() += 1;
        let begun = begun.expect("the kill was inside a commit");

        let found = check(dir.path());
        for session in 0..SESSIONS {
            let (there, acked) =
                (found.get(&session).copied().unwrap_or(0), acknowledged.get(&session).copied());
            let acked = acked.unwrap_or(0);
            // The commit that was cut off may have become durable before its acknowledgement.
            let possible = if begun == (session, acked + 1) { acked..=acked + 1 } else { acked..=acked };
            assert!(possible.contains(&there), "session {session}: {there} found, {acked} acknowledged");
            acknowledged.insert(session, there);
        }
    }
    for (point, kills) in &points {
        println!("{kills:4} kills at: {point}");
    }
    let expected: BTreeSet<_> = [
        "create begins",
        "create is done",
        "rename to pack begins",
        "rename to pack is done",
        "rename to session begins",
        "rename to session is done",
        "remove of pack begins",
        "remove of pack is done",
        "sync begins",
        "sync is done",
        "sync_dir begins",
        "sync_dir is done",
        "write begins",
        "write is half done",
        "write is done",
    ]
    .into();
    let seen: BTreeSet<_> = points.keys().map(String::as_str).collect();
    assert!(expected.is_subset(&seen), "points never reached: {:?}", expected.difference(&seen));
    assert_eq!(points.values().sum::<u64>(), ROUNDS);
}
