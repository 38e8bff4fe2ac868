//! What block size and pack layout cost: replays a request trace and a made-up load of chats against the real store.
//!
//! `cargo run --release -p kvasir-store --example replay -- testdata/traces/mooncake_conversation_first9000.jsonl`
//!
//! Real: names, headers, footers, index, folders, files, opens. Scaled: payload bytes, to a thousandth of the 23,040 bytes a
//! token of SmolLM2-135M takes in f16 (30 layers, 3 kv heads, K and V of 64); byte columns are converted back exactly.
//! Syncs are counted, not waited for; the last table times some.
//! Token ids are made up: from the hash of the block in the trace (one per 512 tokens), from a seed in the chats.
//!
//! Two layouts: *pack*, one file per commit, as the store writes it; *segment*, commits appended to files of 64 MiB (of
//! unscaled bytes), each with its own footer, one sync per commit.

#![allow(clippy::print_stdout)] // a table is what it is for
#![allow(clippy::unwrap_used)] // a measurement that cannot go on stops

use std::any::Any;
use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use kvasir_store::pack::{encode_pack, read_index};
use kvasir_store::{
    BlockKey, CodecId, Disk, DiskOptions, Draft, Evict, FileRead, FileWrite, Fs, Identity, Kind, LAYOUT_T32,
    Lineage, Lru, Name, OsFs, Tag, TenantKey, block_name,
};

const BYTES_PER_TOKEN: u64 = 23_040;
const SCALE: u64 = 1000;
/// One part per layer, K and V.
const PARTS: usize = 60;
const SEGMENT_BYTES: u64 = 64 << 20;
const SIZES: [usize; 4] = [64, 128, 256, 512];

/// The real file system, counting; syncs return at once.
#[derive(Default)]
struct Counting {
    files: AtomicU64,
    syncs: AtomicU64,
}

struct CountingFile(Box<dyn FileWrite>, Arc<Counting>);

impl FileWrite for CountingFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.0.write(bytes)
    }

    fn sync(&mut self) -> io::Result<()> {
        self.1.syncs.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}

#[derive(Clone)]
struct CountingFs(Arc<Counting>);

impl Fs for CountingFs {
    fn create_dir(&self, path: &Path) -> io::Result<()> {
        OsFs.create_dir(path)
    }

    fn create(&self, path: &Path) -> io::Result<Box<dyn FileWrite>> {
        let file = OsFs.create(path)?;
        self.0.files.fetch_add(1, Ordering::Relaxed);
        Ok(Box::new(CountingFile(file, Arc::clone(&self.0))))
    }

    fn open(&self, path: &Path) -> io::Result<Box<dyn FileRead>> {
        OsFs.open(path)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        OsFs.rename(from, to)
    }

    fn sync_dir(&self, _: &Path) -> io::Result<()> {
        self.0.syncs.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        OsFs.remove(path)
    }

    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        OsFs.remove_dir(path)
    }

    fn remove_stray(&self, path: &Path) -> io::Result<bool> {
        OsFs.remove_stray(path)
    }

    fn list(&self, path: &Path) -> io::Result<Vec<String>> {
        OsFs.list(path)
    }

    fn modified_ms(&self, path: &Path) -> io::Result<u64> {
        OsFs.modified_ms(path)
    }

    fn lock(&self, path: &Path) -> io::Result<Box<dyn Any + Send>> {
        OsFs.lock(path)
    }
}

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn within(&mut self, low: u64, high: u64) -> usize {
        (low + self.next() % (high - low + 1)) as usize
    }

    fn ids(&mut self, n: usize) -> Vec<u32> {
        (0..n).map(|_| (self.next() % 49_152) as u32).collect()
    }
}

/// One request: its prompt, and what is committed afterwards (prompt and answer, where the trace knows the answer).
struct Request {
    ids: Vec<u32>,
    prompt: usize,
}

/// The trace's requests, as hashes and lengths.
fn trace(path: &Path) -> Vec<(usize, Vec<u64>)> {
    let text = std::fs::read_to_string(path).unwrap();
    let request = |line| {
        let v: serde_json::Value = serde_json::from_str(line).unwrap();
        let hashes = v["hash_ids"].as_array().unwrap().iter().map(|h| h.as_u64().unwrap()).collect();
        (v["input_length"].as_u64().unwrap() as usize, hashes)
    };
    text.lines().map(request).collect()
}

fn trace_request((tokens, hashes): &(usize, Vec<u64>)) -> Request {
    let mut ids: Vec<u32> = hashes.iter().flat_map(|h| Random(*h).ids(512)).collect();
    ids.truncate(*tokens);
    Request { prompt: ids.len(), ids }
}

/// 400 chats of one tenant: 8 system prompts of 200 to 3,000 tokens, 1 to 12 turns of 20 to 300 tokens with answers of 50 to 500,
/// interleaved.
fn chats() -> Vec<Request> {
    let mut r = Random(1);
    let systems: Vec<_> = (0..8)
        .map(|_| {
            let n = r.within(200, 3000);
            r.ids(n)
        })
        .collect();
    let mut open: Vec<(Vec<u32>, usize)> =
        (0..400).map(|i| (systems[i % 8].clone(), r.within(1, 12))).collect();
    let mut out = Vec::new();
    while !open.is_empty() {
        let i = r.within(0, open.len() as u64 - 1);
        let (question, answer) = (r.within(20, 300), r.within(50, 500));
        let (ids, turns) = &mut open[i];
        ids.extend(r.ids(question));
        let prompt = ids.len();
        ids.extend(r.ids(answer));
        out.push(Request { ids: ids.clone(), prompt });
        *turns -= 1;
        if *turns == 0 {
            open.swap_remove(i);
        }
    }
    out
}

/// Where commits go.
trait Layout {
    fn has(&self, name: &Name) -> bool;
    fn commit(&mut self, blocks: &[Draft<'_>]);
    /// Files and syncs so far.
    fn cost(&self) -> (u64, u64);
    fn bytes(&self) -> u64;
}

struct Packs {
    disk: Disk,
    count: Arc<Counting>,
}

impl Packs {
    fn open(dir: &Path, limit_bytes: Option<u64>) -> Self {
        let count = Arc::<Counting>::default();
        let fs = Arc::new(CountingFs(Arc::clone(&count)));
        Self { disk: Disk::open(dir, DiskOptions { limit_bytes, fs }).unwrap(), count }
    }
}

impl Layout for Packs {
    fn has(&self, name: &Name) -> bool {
        self.disk.has_block(name, kvasir_store::Copies::Exact)
    }

    fn commit(&mut self, blocks: &[Draft<'_>]) {
        self.disk.put(blocks).unwrap();
    }

    fn cost(&self) -> (u64, u64) {
        (self.count.files.load(Ordering::Relaxed), self.count.syncs.load(Ordering::Relaxed))
    }

    fn bytes(&self) -> u64 {
        self.disk.stats().bytes
    }
}

/// The other layout, as far as it is needed to measure it: append, look up, open.
struct Segments {
    dir: PathBuf,
    names: HashSet<Name>,
    file: Option<File>,
    /// Unscaled bytes in the last segment.
    full: u64,
    files: u64,
    syncs: u64,
    bytes: u64,
}

impl Segments {
    fn new(dir: &Path) -> Self {
        std::fs::create_dir_all(dir).unwrap();
        let (names, dir) = (HashSet::new(), dir.to_owned());
        Self { dir, names, file: None, full: 0, files: 0, syncs: 0, bytes: 0 }
    }

    /// Read the footers of all commits of all segments, from the end of each file backwards.
    fn open(dir: &Path) -> HashMap<Name, (u32, u32, u32, CodecId)> {
        struct Before<'a>(&'a dyn FileRead, u64);
        impl FileRead for Before<'_> {
            fn size(&self) -> io::Result<u64> {
                Ok(self.1)
            }
            fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
                self.0.read_at(offset, buf)
            }
        }
        /// A commit inside a segment: its end is known, its length stands in its trailer.
        struct Tail<'a>(&'a dyn FileRead, u64, u64);
        impl FileRead for Tail<'_> {
            fn size(&self) -> io::Result<u64> {
                Ok(self.2)
            }
            fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
                self.0.read_at(self.1 + offset, buf)
            }
        }
        let mut names = HashMap::new();
        for (no, path) in OsFs.list(dir).unwrap().iter().map(|n| dir.join(n)).enumerate() {
            let file = OsFs.open(&path).unwrap();
            let mut end = file.size().unwrap();
            while end > 0 {
                let mut len = [0; 8];
                Before(&*file, end).read_at(end - 32, &mut len).unwrap();
                let len = u64::from_le_bytes(len);
                let index = read_index(&Tail(&*file, end - len, len)).unwrap();
                for e in index.entries {
                    names.insert(e.name, (no as u32, (e.offset / 64) as u32, (e.len / 64) as u32, e.codec));
                }
                end -= len;
            }
        }
        names
    }
}

impl Layout for Segments {
    fn has(&self, name: &Name) -> bool {
        self.names.contains(name)
    }

    fn commit(&mut self, blocks: &[Draft<'_>]) {
        if self.full > SEGMENT_BYTES || self.file.is_none() {
            self.file = Some(File::create(self.dir.join(format!("{}.segment", self.files))).unwrap());
            self.files += 1;
            self.syncs += 1;
            self.full = 0;
        }
        let (bytes, _) = encode_pack([0; 16], blocks[0].owner, blocks).unwrap();
        self.file.as_mut().unwrap().write_all(&bytes).unwrap();
        self.syncs += 1;
        self.bytes += bytes.len() as u64;
        self.full += unscaled(bytes.len() as u64, blocks.iter().map(|b| b.tokens.len() as u64).sum());
        self.names.extend(blocks.iter().map(|b| b.name));
    }

    fn cost(&self) -> (u64, u64) {
        (self.files, self.syncs)
    }

    fn bytes(&self) -> u64 {
        self.bytes
    }
}

fn scaled_payload(tokens: u64) -> u64 {
    (tokens * BYTES_PER_TOKEN / SCALE / PARTS as u64) * PARTS as u64
}

fn unscaled(bytes: u64, tokens: u64) -> u64 {
    // Every block has a multiple of 64 tokens, so the scaled payload of many is that of one times their number.
    bytes - tokens / 64 * scaled_payload(64) + tokens * BYTES_PER_TOKEN
}

fn key() -> TenantKey {
    TenantKey::tenant(&[1; 32], "replay")
}

fn identity() -> Identity {
    Identity::new([1; 32], b"smollm2", 0, 1)
}

fn names(key: &TenantKey, ids: &[u32], per_name: usize) -> Vec<Name> {
    let identity = identity();
    let mut parent = Name::NONE;
    let name = |block| {
        parent = block_name(key, &identity, Lineage::Exact, &parent, block);
        parent
    };
    ids.chunks_exact(per_name).map(name).collect()
}

/// Calls `then` with a draft for each block from `from` on. `Kind::Snapshot` because a draft of rows has 64 tokens, always; the
/// bytes are the same.
fn drafts<T>(
    owner: Tag,
    ids: &[u32],
    names: &[Name],
    per_name: usize,
    from: usize,
    then: impl FnOnce(&[Draft<'_>]) -> T,
) -> T {
    let part = vec![0x5a; scaled_payload(64) as usize * per_name / 64 / PARTS];
    let parts = vec![&part[..]; PARTS];
    let drafts: Vec<_> = (from..names.len())
        .map(|i| Draft {
            owner,
            kind: Kind::Snapshot,
            name: names[i],
            parent: if i == 0 { Name::NONE } else { names[i - 1] },
            identity: identity(),
            lineage: Lineage::Exact,
            codec: CodecId::EXACT,
            layout_tag: LAYOUT_T32,
            tokens: &ids[i * per_name..(i + 1) * per_name],
            parts: &parts,
        })
        .collect();
    then(&drafts)
}

#[derive(Default)]
struct Totals {
    prompt_tokens: u64,
    hit_tokens: u64,
    stored_tokens: u64,
    blocks: u64,
    commits: u64,
    seconds: f64,
}

fn replay(requests: impl Iterator<Item = Request>, per_name: usize, layout: &mut dyn Layout) -> Totals {
    let key = key();
    let mut t = Totals::default();
    for request in requests {
        let names = names(&key, &request.ids, per_name);
        let start = Instant::now();
        let stored = names.iter().take_while(|n| layout.has(n)).count();
        // Never all of the prompt: the last token has to be computed for its logits.
        let usable = stored.min((request.prompt - 1) / per_name);
        t.prompt_tokens += request.prompt as u64;
        t.hit_tokens += (usable * per_name) as u64;
        if stored < names.len() {
            drafts(key.tag(), &request.ids, &names, per_name, stored, |d| layout.commit(d));
            t.commits += 1;
            t.blocks += (names.len() - stored) as u64;
            t.stored_tokens += ((names.len() - stored) * per_name) as u64;
        }
        t.seconds += start.elapsed().as_secs_f64();
    }
    t
}

fn row(load: &str, layout: &str, per_name: usize, t: &Totals, l: &dyn Layout, index_bytes: u64) {
    let (files, syncs) = l.cost();
    let full = unscaled(l.bytes(), t.stored_tokens);
    let overhead = full - t.stored_tokens * BYTES_PER_TOKEN;
    println!(
        "| {load} | {layout} | {per_name} | {:.2} % | {} | {} | {files} | {syncs} | {:.1} | {:.3} % | {:.1} |",
        100.0 * t.hit_tokens as f64 / t.prompt_tokens as f64,
        t.commits,
        t.blocks,
        full as f64 / 1e9,
        100.0 * overhead as f64 / full as f64,
        index_bytes as f64 / 1e6,
    );
}

/// The trace's own measure: hits of blocks by hash, under the protocol "touch all blocks of a request in order, then evict the
/// least recently used beyond C". Checked against the published counts before anything else is believed.
fn lru(trace: &[(usize, Vec<u64>)], capacity: usize, tail_first: bool) -> u64 {
    let block = |h: u64| {
        let mut name = [0; 32];
        name[..8].copy_from_slice(&h.to_le_bytes());
        BlockKey { name: Name(name), codec: CodecId::EXACT }
    };
    let (mut order, mut held) = (Lru::default(), HashSet::new());
    let mut hits = 0;
    for (_, hashes) in trace {
        hits += hashes.iter().take_while(|h| held.contains(&block(**h))).count() as u64;
        let mut touch = |h: &u64| {
            order.touch(&block(*h));
            held.insert(block(*h));
            while held.len() > capacity {
                let victim = order.victim(&|_| false).unwrap();
                order.remove(&victim);
                held.remove(&victim);
            }
        };
        if tail_first {
            hashes.iter().rev().for_each(&mut touch);
        } else {
            hashes.iter().for_each(&mut touch);
        }
    }
    hits
}

/// Segments of a byte limit: the least recently used segment goes as a whole, whatever else is in it.
fn segment_hits(trace: &[(usize, Vec<u64>)], capacity: usize) -> u64 {
    let per_segment = (SEGMENT_BYTES / (512 * BYTES_PER_TOKEN)) as usize + 1;
    let mut segments: Vec<(u64, Vec<u64>)> = Vec::new();
    let (mut place, mut held, mut hits, mut open) = (HashMap::<u64, u64>::new(), 0, 0, 0u64);
    let mut alive = HashMap::<u64, usize>::new();
    for (tick, (_, hashes)) in trace.iter().enumerate() {
        let run = hashes.iter().take_while(|h| place.contains_key(h)).count();
        hits += run as u64;
        for h in &hashes[..run] {
            segments[alive[&place[h]]].0 = tick as u64;
        }
        for &h in &hashes[run..] {
            if place.contains_key(&h) {
                continue;
            }
            let fits = alive.get(&open).is_some_and(|&i| segments[i].1.len() < per_segment);
            if !fits {
                open += 1;
                alive.insert(open, segments.len());
                segments.push((tick as u64, Vec::new()));
            }
            segments[alive[&open]].1.push(h);
            segments[alive[&open]].0 = tick as u64;
            place.insert(h, open);
            held += 1;
        }
        while held > capacity {
            let (&no, &i) = alive.iter().min_by_key(|(no, i)| (segments[**i].0, **no)).unwrap();
            for h in std::mem::take(&mut segments[i].1) {
                place.remove(&h);
                held -= 1;
            }
            alive.remove(&no);
        }
    }
    hits
}

/// Blocks of 512 tokens found by the store itself under a byte limit that holds `capacity` of them.
fn pack_hits(trace: &[(usize, Vec<u64>)], capacity: u64) -> u64 {
    let dir = tempfile::tempdir().unwrap();
    let key = key();
    let probe = Random(0).ids(512);
    let one = drafts(key.tag(), &probe, &names(&key, &probe, 512), 512, 0, |d| d[0].stored_len() + 96);
    let mut packs = Packs::open(dir.path(), Some(capacity * one));
    let t = replay(trace.iter().map(trace_request), 512, &mut packs);
    t.hit_tokens / 512
}

fn loads(trace: &[(usize, Vec<u64>)]) {
    println!(
        "\n| load | layout | tokens per name | prompt tokens found | commits | blocks | files | syncs | GB | of it not payload | index MB |"
    );
    println!("|---|---|---|---|---|---|---|---|---|---|---|");
    for per_name in SIZES {
        for load in ["trace", "chats"] {
            let requests = || -> Box<dyn Iterator<Item = Request>> {
                if load == "trace" {
                    Box::new(trace.iter().map(trace_request))
                } else {
                    Box::new(chats().into_iter())
                }
            };
            let dir = tempfile::tempdir().unwrap();
            let mut packs = Packs::open(dir.path(), None);
            let t = replay(requests(), per_name, &mut packs);
            let index = packs.disk.stats().index_bytes;
            row(load, "pack", per_name, &t, &packs, index);
            let dir = tempfile::tempdir().unwrap();
            let mut segments = Segments::new(dir.path());
            let t = replay(requests(), per_name, &mut segments);
            // The same table of names, without one entry per pack.
            let entry = size_of::<(Name, (u32, u32, u32, CodecId))>() as u64 + 1;
            let slots = (segments.names.capacity() * 8 / 7) as u64;
            row(load, "segment", per_name, &t, &segments, slots * entry);
        }
    }
}

fn opening() {
    println!("\n| layout | tokens per name | blocks | commits | files | open ms | index bytes a block |");
    println!("|---|---|---|---|---|---|---|");
    let key = key();
    for (per_name, per_commit) in [(64, 1), (64, 10), (64, 100), (512, 1), (512, 10)] {
        let commits = 100_000 / per_commit;
        let (packs_dir, segments_dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let mut packs = Packs::open(packs_dir.path(), None);
        let mut segments = Segments::new(segments_dir.path());
        for commit in 0..commits {
            let ids = Random(commit).ids(per_name * per_commit as usize);
            let names = names(&key, &ids, per_name);
            drafts(key.tag(), &ids, &names, per_name, 0, |d| {
                packs.commit(d);
                segments.commit(d);
            });
        }
        drop(packs);
        let best = |run: &dyn Fn() -> u64| {
            let time = || {
                let start = Instant::now();
                let n = run();
                (start.elapsed().as_secs_f64() * 1e3, n)
            };
            (0..3).map(|_| time()).min_by(|a, b| a.0.total_cmp(&b.0)).unwrap()
        };
        let (ms, index) = best(&|| {
            let stats = Disk::open(packs_dir.path(), DiskOptions::default()).unwrap().stats();
            assert_eq!(stats.blocks, 100_000);
            stats.index_bytes
        });
        let a_block = index as f64 / 1e5;
        println!("| pack | {per_name} | 100000 | {commits} | {commits} | {ms:.0} | {a_block:.0} |");
        let files = segments.files;
        let (ms, _) = best(&|| {
            let names = Segments::open(segments_dir.path());
            assert_eq!(names.len(), 100_000);
            0
        });
        println!("| segment | {per_name} | 100000 | {commits} | {files} | {ms:.0} | |");
    }
}

/// A commit of 10 blocks of 64 tokens with its whole payload (14.7 MB), synced for real.
fn syncing() {
    let key = key();
    let part = vec![0x5a; 64 * BYTES_PER_TOKEN as usize / PARTS];
    let parts = vec![&part[..]; PARTS];
    let dir = tempfile::tempdir().unwrap();
    let disk = Disk::open(dir.path(), DiskOptions::default()).unwrap();
    let mut segment = File::create(dir.path().join("segment")).unwrap();
    let (mut pack_ms, mut segment_ms) = (Vec::new(), Vec::new());
    for commit in 0..40 {
        let ids = Random(commit).ids(640);
        let names = names(&key, &ids, 64);
        drafts(key.tag(), &ids, &names, 64, 0, |d| {
            let d: Vec<_> = d.iter().map(|d| Draft { parts: &parts, ..*d }).collect();
            let start = Instant::now();
            disk.put(&d).unwrap();
            pack_ms.push(start.elapsed().as_secs_f64() * 1e3);
            let start = Instant::now();
            let (bytes, _) = encode_pack([0; 16], key.tag(), &d).unwrap();
            segment.write_all(&bytes).unwrap();
            segment.sync_data().unwrap();
            segment_ms.push(start.elapsed().as_secs_f64() * 1e3);
        });
    }
    let median = |v: &mut Vec<f64>| {
        v.sort_by(f64::total_cmp);
        v[v.len() / 2]
    };
    println!(
        "\nA commit of 14.7 MB, synced: pack {:.1} ms, segment {:.1} ms (medians of 40).",
        median(&mut pack_ms),
        median(&mut segment_ms)
    );
}

fn main() {
    let path = std::env::args().nth(1).expect("usage: replay <trace.jsonl>");
    let trace = trace(Path::new(&path));
    println!(
        "## Which block goes\n\nBlocks of 512 tokens found, of {}.\n",
        trace.iter().map(|r| r.1.len()).sum::<usize>()
    );
    println!(
        "| room for | block by block, head first | block by block, tail first | whole packs, tail first | whole segments |"
    );
    println!("|---|---|---|---|---|");
    for (capacity, published) in [(1_000, 9_742), (10_000, 45_046), (50_000, 75_705), (usize::MAX, 77_295)] {
        let head = lru(&trace, capacity, false);
        assert_eq!(head, published, "the replay does not follow the protocol of the trace");
        let tail = lru(&trace, capacity, true);
        let (packs, segments) = if capacity == usize::MAX {
            (pack_hits(&trace, 1 << 40), segment_hits(&trace, capacity))
        } else {
            (pack_hits(&trace, capacity as u64), segment_hits(&trace, capacity))
        };
        let room = if capacity == usize::MAX { "all".to_owned() } else { capacity.to_string() };
        println!("| {room} | {head} | {tail} | {packs} | {segments} |");
    }
    println!("\n## Size of a block, layout of packs");
    loads(&trace);
    println!("\n## Opening a store of 100,000 blocks");
    opening();
    syncing();
}
