//! The disk tier: a folder per owner, immutable packs and session records in it.
//!
//! ```text
//! dir/secret                       32 bytes, mode 0600 (unless the caller brings a key)
//! dir/<owner tag>/<pack id>.pack
//! dir/<owner tag>/<session>.session
//! dir/<owner tag>/<random>.tmp     being written; locked while its writer lives
//! ```
//!
//! Several processes may share the folder. Each keeps its own index of it and looks again when a name is missing and the
//! folder has changed. A block is verified at every read: sizes, checksum, header against the request. What is damaged is
//! dropped from the index, so that the next commit writes it anew.
//!
//! Bytes are limited by evicting whole packs, least recently used, never one that another pack's blocks follow. Use is
//! remembered by this process only; after a restart packs are as old as their files. Records are not evicted: they are small,
//! and with their token ids everything else can be computed again.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Instant;

use crate::fs::{TEMPORARY, now_ms, write_durably};
use crate::index::{Index, PackNo};
use crate::mem::Lease;
use crate::name::{hex, random_bytes};
use crate::pack::{self, PackIndex, WriteError};
use crate::record::{parse_record, write_record};
use crate::{
    Block, Chain, CodecId, Copies, Draft, Error, Expect, FileRead, Fs, Kind, Miss, Name, OsFs, Record,
    Result, Tag,
};

const PACK: &str = ".pack";
const SESSION: &str = ".session";

/// A change of a folder within this time of a look may carry the same time stamp: the look is not trusted then.
const CLOCK_GRAIN_MS: u64 = 50;

/// How often `forget` empties a folder that another process keeps filling.
const FORGET_TRIES: u32 = 64;

/// Open pack files kept for the next read.
const OPEN_FILES: usize = 16;

/// How a folder is used.
#[derive(Clone)]
pub struct DiskOptions {
    /// Most bytes of packs and records; `None` for as much as there is.
    pub limit_bytes: Option<u64>,
    /// The file system.
    pub fs: Arc<dyn Fs>,
}

impl Default for DiskOptions {
    fn default() -> Self {
        Self { limit_bytes: None, fs: Arc::new(OsFs) }
    }
}

/// What a write did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "camelCase")]
pub struct PutReport {
    /// Blocks written.
    pub written: u64,
    /// Blocks that were there already.
    pub already_stored: u64,
    /// Bytes of the files written.
    pub bytes: u64,
}

/// What was removed on behalf of a tenant.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Forgotten {
    /// Session records.
    pub records: u64,
    /// Blocks on disk.
    pub blocks: u64,
    /// Pack files.
    pub packs: u64,
    /// Bytes on disk.
    pub bytes: u64,
    /// Blocks in memory.
    pub host_blocks: u64,
    /// Bytes in memory.
    pub host_bytes: u64,
}

/// State and history of a disk tier.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "camelCase")]
pub struct DiskStats {
    /// Pack files known.
    pub packs: u64,
    /// Blocks in them.
    pub blocks: u64,
    /// Session records.
    pub records: u64,
    /// Bytes of packs and records.
    pub bytes: u64,
    /// The limit, if any.
    pub limit_bytes: Option<u64>,
    /// Heap bytes of the index.
    pub index_bytes: u64,
    /// Reads that gave a block or a record.
    pub hits: u64,
    /// Bytes of those reads.
    pub bytes_read: u64,
    /// Reads that gave none, by [`Miss::code`]; files passed over while looking through a folder count too.
    pub misses: BTreeMap<&'static str, u64>,
    /// Of those, the ones that came from damage.
    pub corrupt: u64,
    /// Packs removed to make room.
    pub evicted: u64,
    /// Bytes of those.
    pub evicted_bytes: u64,
    /// Files written.
    pub files_written: u64,
    /// Bytes of those.
    pub bytes_written: u64,
}

#[derive(Default)]
struct Counters {
    hits: AtomicU64,
    bytes_read: AtomicU64,
    misses: Mutex<BTreeMap<&'static str, u64>>,
    corrupt: AtomicU64,
    evicted: AtomicU64,
    evicted_bytes: AtomicU64,
    files_written: AtomicU64,
    bytes_written: AtomicU64,
}

type OpenFile = (PackNo, Arc<dyn FileRead>);

/// A folder of packs and records.
pub struct Disk {
    dir: PathBuf,
    fs: Arc<dyn Fs>,
    limit_bytes: Option<u64>,
    index: Mutex<Index>,
    /// Writers share it; `forget` has it alone, so that nothing of the forgotten owner lands behind its back.
    gate: RwLock<()>,
    open: Mutex<Vec<OpenFile>>,
    count: Counters,
}

impl Disk {
    /// Open or make the store in `dir`: reads the footers of all packs and removes strays of writers that died.
    pub fn open(dir: &Path, options: DiskOptions) -> Result<Self> {
        let DiskOptions { limit_bytes, fs } = options;
        fs.create_dir(dir).map_err(|e| Error::io("create_dir", dir, 0, e))?;
        let disk = Self {
            dir: dir.to_owned(),
            fs,
            limit_bytes,
            index: Mutex::default(),
            gate: RwLock::default(),
            open: Mutex::default(),
            count: Counters::default(),
        };
        let names = disk.fs.list(dir).map_err(|e| Error::io("list", dir, 0, e))?;
        disk.remove_strays(dir, &names);
        for owner in names.iter().filter_map(|n| Tag::from_hex(n)) {
            disk.look(owner, true)?;
        }
        Ok(disk)
    }

    /// Where it is.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Write the blocks that are not stored yet, one pack per owner. Durable when it returns. Snapshots are always written.
    pub fn put(&self, blocks: &[Draft<'_>]) -> Result<PutReport> {
        let _gate = self.gate.read().unwrap_or_else(PoisonError::into_inner);
        let mut owners: Vec<Tag> = Vec::new();
        for b in blocks {
            if !owners.contains(&b.owner) {
                owners.push(b.owner);
            }
        }
        let mut report = PutReport::default();
        for owner in owners {
            let mut seen = HashSet::new();
            let of_owner: Vec<_> = blocks.iter().filter(|b| b.owner == owner).collect();
            self.drop_vanished(&of_owner);
            let fresh: Vec<_> = {
                let index = self.index();
                let stored =
                    |b: &Draft<'_>| b.kind == Kind::Rows && index.has(&b.name, Copies::Coded(b.codec));
                of_owner.iter().filter(|b| !stored(b) && seen.insert((b.name, b.codec))).copied().collect()
            };
            report.already_stored += (of_owner.len() - fresh.len()) as u64;
            report.written += fresh.len() as u64;
            if !fresh.is_empty() {
                let keep: Vec<_> = of_owner.iter().flat_map(|b| [b.name, b.parent]).collect();
                report.bytes += self.write_pack(owner, &fresh, &keep)?;
            }
        }
        Ok(report)
    }

    /// Packs that another process has evicted must not count as stored.
    fn drop_vanished(&self, blocks: &[&Draft<'_>]) {
        let rows = blocks.iter().filter(|b| b.kind == Kind::Rows);
        let packs: Vec<_> = {
            let index = self.index();
            let packs: BTreeSet<_> =
                rows.flat_map(|b| index.packs_of(&b.name, Copies::Coded(b.codec))).collect();
            packs
                .into_iter()
                .filter_map(|no| index.pack(no).map(|p| (no, self.pack_path(p.owner, p.id))))
                .collect()
        };
        let is_gone =
            |path: &Path| self.fs.modified_ms(path).is_err_and(|e| e.kind() == io::ErrorKind::NotFound);
        let gone: Vec<_> = packs.iter().filter(|(_, path)| is_gone(path)).map(|(no, _)| *no).collect();
        self.index().remove(&gone);
    }

    fn write_pack(&self, owner: Tag, blocks: &[&Draft<'_>], keep: &[Name]) -> Result<u64> {
        let bytes = blocks.iter().map(|b| b.stored_len() + 96).sum::<u64>() + 144;
        self.make_room(bytes, keep)?;
        let id = random_bytes()?;
        let (dir, name) = (self.folder(owner), format!("{}{PACK}", hex(&id)));
        let written = write_durably(&*self.fs, &dir, &name, bytes, |out| {
            pack::write_pack(out, id, owner, blocks, None).map_err(|e| write_error(e, &dir, bytes))
        });
        let mut index = self.index();
        index.reserved -= bytes;
        let pack = match written {
            Ok(pack) => pack,
            Err(e) => {
                drop(index);
                // Only matters if the last sync failed: what is not acknowledged is not left either.
                _ = self.fs.remove(&dir.join(&name));
                return Err(e);
            }
        };
        index.add(&pack);
        drop(index);
        self.wrote(bytes);
        Ok(bytes)
    }

    /// Reserve `bytes` under the limit, evicting if needed.
    fn make_room(&self, bytes: u64, keep: &[Name]) -> Result<()> {
        let gone = {
            let mut index = self.index();
            let Some(limit) = self.limit_bytes else {
                index.reserved += bytes;
                return Ok(());
            };
            let Some(gone) = index.victims(bytes, limit, keep) else {
                let free_bytes = limit.saturating_sub(index.totals().bytes + index.reserved);
                let path = self.dir.display().to_string();
                return Err(Error::StoreFull { wanted_bytes: bytes, free_bytes, path });
            };
            index.reserved += bytes;
            self.take_out(&mut index, &gone)
        };
        for (path, bytes) in &gone {
            self.remove_file(path);
            self.count.evicted.fetch_add(1, Ordering::Relaxed);
            self.count.evicted_bytes.fetch_add(*bytes, Ordering::Relaxed);
        }
        if !gone.is_empty() {
            tracing::debug!(packs = gone.len(), "evicted");
        }
        Ok(())
    }

    /// Out of the index first: a reader that comes now sees a miss, not a vanishing file.
    fn take_out(&self, index: &mut Index, gone: &[PackNo]) -> Vec<(PathBuf, u64)> {
        let path =
            |no: &PackNo| index.pack(*no).map(|p| (self.pack_path(p.owner, p.id), index.bytes_of(*no)));
        let files = gone.iter().filter_map(path).collect();
        index.remove(gone);
        self.open_files().retain(|(no, _)| !gone.contains(no));
        files
    }

    fn remove_file(&self, path: &Path) {
        match self.fs.remove(path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(path = %path.display(), error = %e, "cannot remove");
            }
            _ => {}
        }
    }

    /// Read a block and verify it: exactly what was written and asked for, or a reason.
    pub fn get(&self, want: &Expect<'_>) -> Result<Block, Miss> {
        let got = self.try_get(want);
        match &got {
            Ok(block) => self.hit(block.stored_len()),
            Err(miss) => self.missed(miss),
        }
        got
    }

    fn try_get(&self, want: &Expect<'_>) -> Result<Block, Miss> {
        let mut first = None;
        for again in [false, true] {
            if again && !self.refresh(want.owner) {
                break;
            }
            let found = self.index().find(&want.name, want.copies);
            for loc in found {
                let read = self
                    .pack_file(loc.pack)
                    .and_then(|file| pack::read_block(&*file, loc.offset(), loc.len(), want));
                match read {
                    Ok(block) => {
                        self.index().touch(loc.pack);
                        return Ok(block);
                    }
                    Err(miss) => {
                        match &miss {
                            // The file is gone: another process evicted it.
                            Miss::NotFound => self.index().remove(&[loc.pack]),
                            Miss::Io { .. } => {}
                            damage if damage.is_damage() => self.index().drop_copy(&want.name, loc),
                            _ => {}
                        }
                        first.get_or_insert(miss);
                    }
                }
            }
        }
        if let Some(miss) = first {
            return Err(miss);
        }
        match self.index().any(&want.name) {
            Some(loc) => Err(Miss::LossyCopy { codec: loc.codec().0 }),
            None => Err(Miss::NotFound),
        }
    }

    /// The leading blocks of `chain` that seem to be stored: probes by doubling, then bisects, so that a long text costs few
    /// look-ups. The caller reads them one by one; the first that turns out not to be there cuts the run.
    pub fn has(&self, chain: &Chain, copies: Copies) -> usize {
        let run = || {
            let index = self.index();
            leading_run(chain.len(), |i| index.has(&chain.names()[i], copies))
        };
        let found = run();
        if found == chain.len() {
            return found;
        }
        if self.refresh_if_cheap(chain.owners()[found]) { run() } else { found }
    }

    /// As [`Disk::refresh`], but at most a twentieth of the time goes into it: nearly every prompt ends in something that is
    /// not stored, and a folder may have very many files. So a new pack of another process may take a moment to be found.
    pub fn refresh_if_cheap(&self, owner: Tag) -> bool {
        let looked = self.index().folders.get(&owner).and_then(|f| f.looked);
        if looked.is_some_and(|(when, took)| when.elapsed() < took * 20) {
            return false;
        }
        self.refresh(owner)
    }

    /// True if the index knows the block in an acceptable code.
    pub fn has_block(&self, name: &Name, copies: Copies) -> bool {
        self.index().has(name, copies)
    }

    /// True if the index knows a copy of the block in this very code.
    pub fn has_coded(&self, name: &Name, codec: CodecId) -> bool {
        self.index().find(name, Copies::Coded(codec)).first().is_some_and(|l| l.codec() == codec)
    }

    /// The block was used from memory: its pack is not the next to go.
    pub fn touch(&self, names: &[Name]) {
        let mut index = self.index();
        for loc in names.iter().rev().filter_map(|n| index.any(n)).collect::<Vec<_>>() {
            index.touch(loc.pack);
        }
    }

    /// Keep this process from evicting the pack of a block while the lease lives.
    pub fn lease(&self, name: &Name, copies: Copies) -> Option<Lease> {
        self.index().lease(name, copies)
    }

    /// Write a session's record, in place of its last one. Durable when it returns. What it speaks of must be durable before.
    /// Fills in generation and time. A snapshot belongs to one record: the one of the last commit is removed if it has its
    /// pack to itself (else it goes with that pack).
    pub fn put_record(&self, record: &mut Record) -> Result<u64> {
        let _gate = self.gate.read().unwrap_or_else(PoisonError::into_inner);
        let last = self.read_record(record.owner, record.session).ok();
        record.generation = last.as_ref().map_or(0, |r| r.generation) + 1;
        record.written_ms = now_ms();
        let (dir, name) = (self.folder(record.owner), format!("{}{SESSION}", record.session.hex()));
        let wanted = (record.ids.len() * 4 + record.blocks.len() * 81 + record.state.len() + 256) as u64;
        let keep: Vec<_> = record.blocks.iter().map(|b| b.name).chain(record.snapshot).collect();
        self.make_room(wanted, &keep)?;
        let written = write_durably(&*self.fs, &dir, &name, wanted, |out| {
            write_record(out, record, None).map_err(|e| write_error(e, &dir, wanted))
        });
        let gone = {
            let mut index = self.index();
            index.reserved -= wanted;
            let bytes = *written.as_ref().map_err(|_| ()).unwrap_or(&0);
            if bytes > 0 {
                index.set_record(record.owner, record.session, Some(bytes));
            }
            let old = last.and_then(|r| r.snapshot).filter(|s| bytes > 0 && Some(*s) != record.snapshot);
            let old: Vec<_> = old.and_then(|s| index.lone_snapshot(&s)).into_iter().collect();
            self.take_out(&mut index, &old)
        };
        let bytes = written?;
        for (path, _) in &gone {
            self.remove_file(path);
        }
        self.wrote(bytes);
        Ok(bytes)
    }

    /// The record of a session.
    pub fn record(&self, owner: Tag, session: Name) -> Result<Record, Miss> {
        let got = self.read_record(owner, session);
        match &got {
            Ok(r) => self.hit((r.ids.len() * 4) as u64),
            Err(miss) => self.missed(miss),
        }
        got
    }

    fn read_record(&self, owner: Tag, session: Name) -> Result<Record, Miss> {
        let path = self.record_path(owner, session);
        let file = self.fs.open(&path).map_err(|e| Miss::io("open", &e))?;
        let len = file.size().map_err(|e| Miss::io("size", &e))?;
        let record = parse_record(&pack::read(&*file, 0, len)?)?;
        for (field, same) in [("owner", record.owner == owner), ("session", record.session == session)] {
            if !same {
                return Err(Miss::Foreign { field });
            }
        }
        Ok(record)
    }

    /// Remove a session's record and its private state. False if there was none.
    pub fn remove_record(&self, owner: Tag, session: Name) -> Result<bool> {
        let _gate = self.gate.read().unwrap_or_else(PoisonError::into_inner);
        let last = self.read_record(owner, session).ok();
        let path = self.record_path(owner, session);
        match self.fs.remove(&path) {
            Ok(()) => {}
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(false),
            Err(e) => return Err(Error::io("remove", &path, 0, e)),
        }
        let gone = {
            let mut index = self.index();
            index.set_record(owner, session, None);
            let lone = last.and_then(|r| r.snapshot).and_then(|s| index.lone_snapshot(&s));
            self.take_out(&mut index, &lone.into_iter().collect::<Vec<_>>())
        };
        for (path, _) in &gone {
            self.remove_file(path);
        }
        let dir = self.folder(owner);
        self.fs.sync_dir(&dir).map_err(|e| Error::io("sync_dir", &dir, 0, e))?;
        Ok(true)
    }

    /// Remove every file of `owner`, and say what that was. Durable when it returns. Other processes see it at their next
    /// look; what they hold in memory is theirs to drop.
    pub fn forget(&self, owner: Tag) -> Result<Forgotten> {
        let _gate = self.gate.write().unwrap_or_else(PoisonError::into_inner);
        self.look(owner, false)?;
        let dir = self.folder(owner);
        let mut out = Forgotten::default();
        {
            let mut index = self.index();
            (out.blocks, out.bytes) = index.owned(owner);
            if let Some(folder) = index.folders.get(&owner) {
                out.packs = folder.packs.len() as u64;
                out.records = folder.records.len() as u64;
                out.bytes += folder.records.values().sum::<u64>();
                let gone: Vec<_> = folder.packs.values().copied().collect();
                let sessions: Vec<_> = folder.records.keys().copied().collect();
                index.remove(&gone);
                for session in sessions {
                    index.set_record(owner, session, None);
                }
                index.folders.remove(&owner);
                self.open_files().retain(|(no, _)| !gone.contains(no));
            }
        }
        // Again and again: another process may be writing one more file right now. One that never stops is an error.
        let mut result = Ok(());
        for _ in 0..FORGET_TRIES {
            result = Ok(());
            let names = match self.fs.list(&dir) {
                Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(out),
                other => other.map_err(|e| Error::io("list", &dir, 0, e))?,
            };
            for path in names.iter().map(|n| dir.join(n)) {
                match self.fs.remove(&path) {
                    Err(e) if e.kind() != io::ErrorKind::NotFound => {
                        result = Err(Error::io("remove", &path, 0, e));
                    }
                    _ => {}
                }
            }
            match self.fs.remove_dir(&dir) {
                Ok(()) => break,
                Err(e) if result.is_ok() => result = Err(Error::io("remove_dir", &dir, 0, e)),
                Err(_) => {}
            }
        }
        self.fs.sync_dir(&self.dir).map_err(|e| Error::io("sync_dir", &self.dir, 0, e))?;
        result.map(|()| out)
    }

    /// State and history.
    pub fn stats(&self) -> DiskStats {
        let (totals, index_bytes) = {
            let index = self.index();
            (index.totals(), index.memory())
        };
        let load = |c: &AtomicU64| c.load(Ordering::Relaxed);
        DiskStats {
            packs: totals.packs,
            blocks: totals.blocks,
            records: totals.records,
            bytes: totals.bytes,
            limit_bytes: self.limit_bytes,
            index_bytes,
            hits: load(&self.count.hits),
            bytes_read: load(&self.count.bytes_read),
            misses: self.count.misses.lock().unwrap_or_else(PoisonError::into_inner).clone(),
            corrupt: load(&self.count.corrupt),
            evicted: load(&self.count.evicted),
            evicted_bytes: load(&self.count.evicted_bytes),
            files_written: load(&self.count.files_written),
            bytes_written: load(&self.count.bytes_written),
        }
    }

    /// Look for what other processes have written or removed in an owner's folder, if it has changed since the last look.
    /// False if there was nothing to look for. [`Disk::get`] does this before it says that something is missing.
    pub fn refresh(&self, owner: Tag) -> bool {
        let changed = self.fs.modified_ms(&self.folder(owner)).ok();
        let as_of = self.index().folders.get(&owner).and_then(|f| f.as_of_ms);
        if changed.is_none() && as_of.is_none() && !self.index().folders.contains_key(&owner) {
            return false;
        }
        if changed.is_some() && changed == as_of {
            return false;
        }
        // A folder that cannot be listed gives misses, which is what it is worth now.
        self.look(owner, false).is_ok()
    }

    /// Bring the index up to date with an owner's folder.
    fn look(&self, owner: Tag, clean: bool) -> Result<()> {
        let dir = self.folder(owner);
        let (began, start) = (now_ms(), Instant::now());
        let changed = self.fs.modified_ms(&dir).ok();
        let names = match self.fs.list(&dir) {
            Ok(names) => names,
            Err(e) if e.kind() == io::ErrorKind::NotFound => Vec::new(),
            Err(e) => return Err(Error::io("list", &dir, 0, e)),
        };
        if clean {
            self.remove_strays(&dir, &names);
        }
        let mut packs = HashSet::new();
        let mut records = HashSet::new();
        let mut fresh = Vec::new();
        {
            let index = self.index();
            let known = index.folders.get(&owner);
            for name in &names {
                if let Some(id) = name.strip_suffix(PACK).and_then(Tag::from_hex) {
                    packs.insert(id.0);
                    if known.is_none_or(|f| !f.packs.contains_key(&id.0)) {
                        fresh.push((name.clone(), id.0));
                    }
                } else if let Some(session) = name.strip_suffix(SESSION).and_then(name_from_hex) {
                    records.insert(session);
                }
            }
        }
        // Oldest first, so that the order of use starts with the order of commits.
        fresh.sort_by_cached_key(|(name, _)| self.fs.modified_ms(&dir.join(name)).unwrap_or(0));
        for (name, id) in fresh {
            if let Some(pack) = self.read_pack(&dir.join(name), owner, id) {
                self.index().add(&pack);
            }
        }
        let sized: Vec<_> = {
            let index = self.index();
            let known = index.folders.get(&owner);
            records.iter().filter(|s| known.is_none_or(|f| !f.records.contains_key(s))).copied().collect()
        };
        for session in sized {
            let len = self.fs.open(&self.record_path(owner, session)).and_then(|f| f.size());
            self.index().set_record(owner, session, len.ok());
        }
        let mut index = self.index();
        let Some(folder) = index.folders.get_mut(&owner) else { return Ok(()) };
        folder.looked = Some((Instant::now(), start.elapsed()));
        folder.as_of_ms = changed.filter(|c| began > c + CLOCK_GRAIN_MS);
        let gone: Vec<_> =
            folder.packs.iter().filter(|(id, _)| !packs.contains(*id)).map(|(_, no)| *no).collect();
        let ended: Vec<_> = folder.records.keys().filter(|s| !records.contains(*s)).copied().collect();
        // What this process wrote since the list was made is missing from the list only.
        let gone: Vec<_> = gone
            .into_iter()
            .filter(|&no| {
                index.pack(no).is_some_and(|p| self.fs.modified_ms(&self.pack_path(p.owner, p.id)).is_err())
            })
            .collect();
        index.remove(&gone);
        self.open_files().retain(|(no, _)| !gone.contains(no));
        for session in ended {
            if self.fs.modified_ms(&self.record_path(owner, session)).is_err() {
                index.set_record(owner, session, None);
            }
        }
        Ok(())
    }

    /// The index of a pack file. One that cannot be read has no blocks, but takes room and can be evicted.
    fn read_pack(&self, path: &Path, owner: Tag, id: [u8; 16]) -> Option<PackIndex> {
        let file = self.fs.open(path);
        let read = file.as_ref().map_err(|e| Miss::io("open", e)).and_then(|f| pack::read_index(&**f));
        let read = read.and_then(|p| match (p.owner == owner, p.id == id) {
            (true, true) => Ok(p),
            (false, _) => Err(Miss::Foreign { field: "owner" }),
            (_, false) => Err(Miss::Foreign { field: "pack_id" }),
        });
        match read {
            Ok(pack) => Some(pack),
            // Removed since it was listed.
            Err(Miss::NotFound) => None,
            Err(miss) => {
                tracing::warn!(path = %path.display(), reason = %miss, "passed over a pack");
                self.missed(&miss);
                let file_len = file.and_then(|f| f.size()).unwrap_or(0);
                Some(PackIndex { id, owner, file_len, entries: Vec::new() })
            }
        }
    }

    fn remove_strays(&self, dir: &Path, names: &[String]) {
        for path in names.iter().filter(|n| n.ends_with(TEMPORARY)).map(|n| dir.join(n)) {
            if let Ok(true) = self.fs.remove_stray(&path) {
                tracing::debug!(path = %path.display(), "removed a stray of a writer that died");
            }
        }
    }

    fn pack_file(&self, no: PackNo) -> Result<Arc<dyn FileRead>, Miss> {
        let (owner, id) = self.index().pack(no).map(|p| (p.owner, p.id)).ok_or(Miss::NotFound)?;
        let mut open = self.open_files();
        if let Some(i) = open.iter().position(|(n, _)| *n == no) {
            let hot = open.remove(i);
            let file = Arc::clone(&hot.1);
            open.push(hot);
            return Ok(file);
        }
        drop(open);
        let file = self.fs.open(&self.pack_path(owner, id)).map_err(|e| Miss::io("open", &e))?;
        let file: Arc<dyn FileRead> = file.into();
        let mut open = self.open_files();
        if open.len() >= OPEN_FILES {
            open.remove(0);
        }
        open.push((no, Arc::clone(&file)));
        Ok(file)
    }

    fn folder(&self, owner: Tag) -> PathBuf {
        self.dir.join(owner.hex())
    }

    fn pack_path(&self, owner: Tag, id: [u8; 16]) -> PathBuf {
        self.folder(owner).join(format!("{}{PACK}", hex(&id)))
    }

    fn record_path(&self, owner: Tag, session: Name) -> PathBuf {
        self.folder(owner).join(format!("{}{SESSION}", session.hex()))
    }

    fn index(&self) -> MutexGuard<'_, Index> {
        self.index.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn open_files(&self) -> MutexGuard<'_, Vec<OpenFile>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn hit(&self, bytes: u64) {
        self.count.hits.fetch_add(1, Ordering::Relaxed);
        self.count.bytes_read.fetch_add(bytes, Ordering::Relaxed);
    }

    fn missed(&self, miss: &Miss) {
        *self.count.misses.lock().unwrap_or_else(PoisonError::into_inner).entry(miss.code()).or_default() +=
            1;
        if miss.is_damage() {
            self.count.corrupt.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn wrote(&self, bytes: u64) {
        self.count.files_written.fetch_add(1, Ordering::Relaxed);
        self.count.bytes_written.fetch_add(bytes, Ordering::Relaxed);
    }
}

fn write_error(e: WriteError, dir: &Path, wanted: u64) -> Error {
    match e {
        WriteError::Draft(e) => e,
        WriteError::Io(e) => Error::io("write", dir, wanted, e),
    }
}

fn name_from_hex(s: &str) -> Option<Name> {
    let (a, b) = s.split_at_checked(32)?;
    let mut out = [0; 32];
    out[..16].copy_from_slice(&Tag::from_hex(a)?.0);
    out[16..].copy_from_slice(&Tag::from_hex(b)?.0);
    Some(Name(out))
}

/// Length of the leading run of `0..len` that is `there`, if what is there is a leading run. Probes 0, 1, 3, 7, … and bisects.
pub(crate) fn leading_run(len: usize, there: impl Fn(usize) -> bool) -> usize {
    // Everything below `low` is there, `high` is not.
    let (mut low, mut high) = (0, len);
    let mut probe = 0;
    while probe < len {
        if !there(probe) {
            high = probe;
            break;
        }
        low = probe + 1;
        probe = 2 * probe + 1;
    }
    while low < high {
        let middle = low + (high - low) / 2;
        if there(middle) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    low
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    #[test]
    fn probing_finds_the_run_in_few_looks() {
        for len in [0usize, 1, 2, 3, 7, 8, 100, 1000] {
            for run in 0..=len {
                let looks = Cell::new(0);
                let found = leading_run(len, |i| {
                    looks.set(looks.get() + 1);
                    i < run
                });
                assert_eq!(found, run);
                assert!(looks.get() <= 2 * (usize::BITS - len.leading_zeros()) + 1, "{len} {run}");
            }
        }
    }
}
