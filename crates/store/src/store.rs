//! [`Store`]: the secret, the RAM tier and, if there is a folder, the disk tier.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use crate::disk::leading_run;
use crate::fs::now_ms;
use crate::name::random_bytes;
use crate::{
    Chain, Copies, Disk, DiskOptions, DiskStats, Draft, Error, Forgotten, Fs, Mem, MemStats, Miss, Name,
    OsFs, Record, Result, Tag, TenantKey, key,
};

/// How a store is opened.
#[derive(Clone)]
pub struct Options {
    /// Folder of the disk tier; without one everything is in memory and ends with the process.
    pub dir: Option<PathBuf>,
    /// Most bytes of blocks in memory.
    pub host_bytes: u64,
    /// Most bytes on disk; `None` for as much as there is.
    pub disk_bytes: Option<u64>,
    /// The store's secret; without one it is read from `dir/secret`, which is made on first use.
    pub key: Option<[u8; 32]>,
    /// The file system.
    pub fs: Arc<dyn Fs>,
}

impl Default for Options {
    /// In memory, up to 1 GiB.
    fn default() -> Self {
        Self { dir: None, host_bytes: 1 << 30, disk_bytes: None, key: None, fs: Arc::new(OsFs) }
    }
}

/// What a commit did.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Commit {
    /// Blocks written.
    pub written: u64,
    /// Blocks that were stored already.
    pub already_stored: u64,
    /// Bytes of all files written.
    pub bytes: u64,
    /// True if it survives the process and a power cut.
    pub durable: bool,
    /// How many commits this session has had.
    pub generation: u64,
    /// Time taken.
    pub ms: f64,
}

/// State and history of a store.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Stats {
    /// The RAM tier.
    pub host: MemStats,
    /// The disk tier.
    pub disk: Option<DiskStats>,
    /// Session records that are in memory only.
    pub host_records: u64,
}

/// Blocks and sessions of many tenants. `V` is what the engine holds a block as in memory.
pub struct Store<V> {
    secret: [u8; 32],
    mem: Mem<V>,
    disk: Option<Disk>,
    /// Records of a store without a folder, and those the disk refused.
    records: Mutex<HashMap<(Tag, Name), Record>>,
}

impl<V: Clone> Store<V> {
    /// Open or make a store.
    pub fn open(options: Options) -> Result<Self> {
        let Options { dir, host_bytes, disk_bytes, key, fs } = options;
        let disk = dir
            .map(|dir| Disk::open(&dir, DiskOptions { limit_bytes: disk_bytes, fs: Arc::clone(&fs) }))
            .transpose()?;
        let secret = match (key, &disk) {
            (Some(key), _) => key,
            (None, Some(disk)) => key::secret(&*fs, disk.dir())?,
            // Names mean nothing outside this process.
            (None, None) => random_bytes()?,
        };
        Ok(Self { secret, mem: Mem::new(host_bytes), disk, records: Mutex::default() })
    }

    /// The keys of a tenant. There is no tenant without an id.
    pub fn tenant(&self, id: &str) -> Result<TenantKey> {
        if id.is_empty() {
            return Err(Error::invalid("tenant", "a tenant id", "an empty string"));
        }
        Ok(TenantKey::tenant(&self.secret, id))
    }

    /// The keys of a share group that is local to this store and known by a name. Members of a group that spans stores bring
    /// their own secret to [`TenantKey::group`].
    pub fn group(&self, id: &str) -> Result<TenantKey> {
        if id.is_empty() {
            return Err(Error::invalid("shareGroup", "a group id", "an empty string"));
        }
        Ok(TenantKey::local_group(&self.secret, id))
    }

    /// The RAM tier.
    pub fn mem(&self) -> &Mem<V> {
        &self.mem
    }

    /// The disk tier, if there is one.
    pub fn disk(&self) -> Option<&Disk> {
        self.disk.as_ref()
    }

    /// The leading blocks of `chain` that seem to be in some tier. Read them one by one: the first that is not there cuts the
    /// run.
    pub fn has(&self, chain: &Chain, copies: Copies) -> usize {
        let names = chain.names();
        let in_mem = |i: usize| self.mem.has(&names[i], copies);
        let Some(disk) = &self.disk else { return leading_run(names.len(), in_mem) };
        let run = || leading_run(names.len(), |i| in_mem(i) || disk.has_block(&names[i], copies));
        let found = run();
        // Another process may have written more.
        if found < names.len() && disk.refresh_if_cheap(chain.owners()[found]) { run() } else { found }
    }

    /// Write the blocks that are not stored yet, then the record. Durable when it returns, unless there is no folder: then the
    /// record lives as long as the store, and the blocks as long as the RAM tier keeps them.
    pub fn commit(&self, blocks: &[Draft<'_>], record: &mut Record) -> Result<Commit> {
        let start = Instant::now();
        let ms = || start.elapsed().as_secs_f64() * 1e3;
        let Some(disk) = &self.disk else {
            self.keep(record);
            return Ok(Commit { generation: record.generation, ms: ms(), ..Commit::default() });
        };
        let put = disk.put(blocks)?;
        let bytes = put.bytes + disk.put_record(record)?;
        self.records().remove(&(record.owner, record.session));
        Ok(Commit {
            written: put.written,
            already_stored: put.already_stored,
            bytes,
            durable: true,
            generation: record.generation,
            ms: ms(),
        })
    }

    /// Keep a record in memory: what is left to do when the disk refused the commit. The next commit that succeeds replaces it.
    pub fn keep(&self, record: &mut Record) {
        let mut records = self.records();
        let key = (record.owner, record.session);
        record.generation = records.get(&key).map_or(0, |r| r.generation) + 1;
        record.written_ms = now_ms();
        records.insert(key, record.clone());
    }

    /// The last commit of a session.
    pub fn record(&self, tenant: &TenantKey, session: &str) -> Result<Record, Miss> {
        let key = (tenant.tag(), tenant.session(session));
        if let Some(record) = self.records().get(&key) {
            return Ok(record.clone());
        }
        self.disk.as_ref().ok_or(Miss::NotFound)?.record(key.0, key.1)
    }

    /// Remove a session's record and private state; blocks stay, for other sessions. False if there was none.
    pub fn remove(&self, tenant: &TenantKey, session: &str) -> Result<bool> {
        let key = (tenant.tag(), tenant.session(session));
        let in_mem = self.records().remove(&key).is_some();
        let on_disk = self.disk.as_ref().map_or(Ok(false), |d| d.remove_record(key.0, key.1))?;
        Ok(in_mem || on_disk)
    }

    /// Remove everything of a tenant (or of a share group) from all tiers, and say what that was.
    pub fn forget(&self, tenant: &TenantKey) -> Result<Forgotten> {
        let owner = tenant.tag();
        let mut out = self.disk.as_ref().map_or(Ok(Forgotten::default()), |d| d.forget(owner))?;
        let mut records = self.records();
        let before = records.len();
        records.retain(|(tag, _), _| *tag != owner);
        out.records += (before - records.len()) as u64;
        (out.host_blocks, out.host_bytes) = self.mem.forget(owner);
        Ok(out)
    }

    /// State and history.
    pub fn stats(&self) -> Stats {
        Stats {
            host: self.mem.stats(),
            disk: self.disk.as_ref().map(Disk::stats),
            host_records: self.records().len() as u64,
        }
    }

    fn records(&self) -> MutexGuard<'_, HashMap<(Tag, Name), Record>> {
        self.records.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
