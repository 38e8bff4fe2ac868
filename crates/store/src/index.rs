//! What is on disk, by name: a cache rebuilt from footers. The files are the truth.
//!
//! 61 to 121 bytes a block, depending on how full the hash table is, and about 160 a pack. A name may have several copies:
//! other codes, or the same block committed by two processes at once; the first lives in the table, the rest aside.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use crate::mem::Lease;
use crate::pack::PackIndex;
use crate::{CodecId, Copies, Kind, Name, Tag};

/// Number of a pack in this process; none is given twice, so that a stale one finds nothing.
pub(crate) type PackNo = u32;

/// Where a copy of a block is. Offsets and lengths are multiples of 64 bytes, so 32 bits reach 256 GiB into a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Loc {
    pub(crate) pack: PackNo,
    at: u32,
    len: u32,
    codec: [u32; 2],
}

impl Loc {
    pub(crate) fn offset(&self) -> u64 {
        u64::from(self.at) * 64
    }

    pub(crate) fn len(&self) -> u64 {
        u64::from(self.len) * 64
    }

    pub(crate) fn codec(&self) -> CodecId {
        CodecId(u64::from(self.codec[0]) | u64::from(self.codec[1]) << 32)
    }
}

/// A pack file.
#[derive(Debug)]
pub(crate) struct Pack {
    pub(crate) owner: Tag,
    pub(crate) id: [u8; 16],
    bytes: u64,
    blocks: u32,
    snapshots: u32,
    /// Tick of the last use.
    used: u64,
    /// Blocks of other packs that blocks of this one follow.
    parents: Box<[Name]>,
    pins: Arc<AtomicU32>,
}

/// What one owner's folder holds, as of the last look.
#[derive(Debug, Default)]
pub(crate) struct Folder {
    pub(crate) packs: HashMap<[u8; 16], PackNo>,
    /// Bytes of each session record.
    pub(crate) records: BTreeMap<Name, u64>,
    /// The folder's time of change at that look, if a later change is sure to show in it.
    pub(crate) as_of_ms: Option<u64>,
    /// When that look ended, and how long it took.
    pub(crate) looked: Option<(Instant, Duration)>,
}

#[derive(Debug, Default)]
pub(crate) struct Index {
    by_name: HashMap<Name, Loc>,
    more: HashMap<Name, Vec<Loc>>,
    packs: HashMap<PackNo, Pack>,
    next: PackNo,
    pub(crate) folders: HashMap<Tag, Folder>,
    bytes: u64,
    /// Bytes of writes under way.
    pub(crate) reserved: u64,
    tick: u64,
    blocks: u64,
}

/// Totals for reports.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Totals {
    pub(crate) packs: u64,
    pub(crate) blocks: u64,
    pub(crate) records: u64,
    pub(crate) bytes: u64,
}

impl Index {
    /// Take in a pack. False if it is known already.
    pub(crate) fn add(&mut self, pack: &PackIndex) -> bool {
        let folder = self.folders.entry(pack.owner).or_default();
        if folder.packs.contains_key(&pack.id) {
            return false;
        }
        let inside: HashSet<_> = pack.entries.iter().map(|e| e.name).collect();
        let mut parents: Vec<_> = pack
            .entries
            .iter()
            .map(|e| e.parent)
            .filter(|p| *p != Name::NONE && !inside.contains(p))
            .collect();
        parents.sort_unstable();
        parents.dedup();
        self.tick += 1;
        let entry = Pack {
            owner: pack.owner,
            id: pack.id,
            bytes: pack.file_len,
            blocks: pack.entries.len() as u32,
            snapshots: pack.entries.iter().filter(|e| e.kind == Kind::Snapshot).count() as u32,
            used: self.tick,
            parents: parents.into(),
            pins: Arc::default(),
        };
        let no = self.next;
        self.next += 1;
        self.packs.insert(no, entry);
        folder.packs.insert(pack.id, no);
        self.bytes += pack.file_len;
        self.blocks += pack.entries.len() as u64;
        for e in &pack.entries {
            // Beyond 256 GiB in one file a block is not indexed, hence a miss.
            let (Ok(at), Ok(len)) = (u32::try_from(e.offset / 64), u32::try_from(e.len / 64)) else {
                continue;
            };
            let loc = Loc { pack: no, at, len, codec: [e.codec.0 as u32, (e.codec.0 >> 32) as u32] };
            match self.by_name.entry(e.name) {
                std::collections::hash_map::Entry::Vacant(v) => {
                    v.insert(loc);
                }
                std::collections::hash_map::Entry::Occupied(_) => {
                    self.more.entry(e.name).or_default().push(loc);
                }
            }
        }
        true
    }

    fn locs(&self, name: &Name) -> impl Iterator<Item = &Loc> {
        self.by_name.get(name).into_iter().chain(self.more.get(name).into_iter().flatten())
    }

    /// Acceptable copies, best first.
    pub(crate) fn find(&self, name: &Name, copies: Copies) -> Vec<Loc> {
        let mut found: Vec<_> = self.locs(name).filter(|l| copies.accepts(l.codec())).copied().collect();
        found.sort_by_key(|l| l.codec() != copies.first());
        found
    }

    /// Packs that hold acceptable copies.
    pub(crate) fn packs_of(&self, name: &Name, copies: Copies) -> impl Iterator<Item = PackNo> {
        self.locs(name).filter(move |l| copies.accepts(l.codec())).map(|l| l.pack)
    }

    pub(crate) fn has(&self, name: &Name, copies: Copies) -> bool {
        self.locs(name).any(|l| copies.accepts(l.codec()))
    }

    /// Any copy at all.
    pub(crate) fn any(&self, name: &Name) -> Option<Loc> {
        self.locs(name).next().copied()
    }

    /// The pack was used just now.
    pub(crate) fn touch(&mut self, no: PackNo) {
        self.tick += 1;
        let tick = self.tick;
        if let Some(p) = self.packs.get_mut(&no) {
            p.used = tick;
        }
    }

    pub(crate) fn pack(&self, no: PackNo) -> Option<&Pack> {
        self.packs.get(&no)
    }

    pub(crate) fn lease(&self, name: &Name, copies: Copies) -> Option<Lease> {
        let loc = self.locs(name).find(|l| copies.accepts(l.codec()))?;
        self.pack(loc.pack).map(|p| Lease::on(&p.pins))
    }

    /// A copy turned out to be damaged: nobody is sent there again, and the next commit writes it anew.
    pub(crate) fn drop_copy(&mut self, name: &Name, loc: Loc) {
        self.retain(name, |l| *l != loc);
    }

    fn retain(&mut self, name: &Name, keep: impl Fn(&Loc) -> bool) {
        let mut rest = self.more.remove(name).unwrap_or_default();
        rest.retain(&keep);
        if self.by_name.get(name).is_some_and(|l| !keep(l)) {
            if rest.is_empty() {
                self.by_name.remove(name);
            } else {
                self.by_name.insert(*name, rest.remove(0));
            }
        }
        if !rest.is_empty() {
            self.more.insert(*name, rest);
        }
    }

    /// These packs are gone. One pass over the table, however many packs.
    pub(crate) fn remove(&mut self, gone: &[PackNo]) {
        let mut set = HashSet::new();
        for &no in gone {
            let Some(pack) = self.packs.remove(&no) else { continue };
            self.bytes -= pack.bytes;
            self.blocks -= u64::from(pack.blocks);
            if let Some(folder) = self.folders.get_mut(&pack.owner) {
                folder.packs.remove(&pack.id);
            }
            set.insert(no);
        }
        if set.is_empty() {
            return;
        }
        self.more.retain(|_, locs| {
            locs.retain(|l| !set.contains(&l.pack));
            !locs.is_empty()
        });
        let more = &mut self.more;
        self.by_name.retain(|name, loc| {
            if !set.contains(&loc.pack) {
                return true;
            }
            let Some(rest) = more.get_mut(name) else { return false };
            *loc = rest.remove(0);
            if rest.is_empty() {
                more.remove(name);
            }
            true
        });
    }

    /// Packs to remove so that `wanted` more bytes fit under `limit`, with some slack so that not every commit evicts; `None`
    /// if that cannot be. Least recently used first, and never a pack whose blocks another pack's blocks follow: the tail of
    /// a text goes before its head. Packs of the blocks in `keep` stay.
    pub(crate) fn victims(&self, wanted: u64, limit: u64, keep: &[Name]) -> Option<Vec<PackNo>> {
        let held = self.bytes + self.reserved;
        let must = (held + wanted).saturating_sub(limit);
        if must == 0 {
            return Some(Vec::new());
        }
        let goal = must.max((held + wanted).saturating_sub(limit - limit / 20));

        let parents = |p: &Pack| -> Vec<PackNo> {
            p.parents.iter().filter_map(|n| self.any(n)).map(|l| l.pack).collect()
        };
        let mut children: HashMap<PackNo, u32> = HashMap::new();
        for p in self.packs.values() {
            for no in parents(p) {
                *children.entry(no).or_default() += 1;
            }
        }
        let kept: HashSet<_> = keep.iter().flat_map(|n| self.locs(n)).map(|l| l.pack).collect();
        let free = |no: PackNo, p: &Pack| !kept.contains(&no) && p.pins.load(Ordering::Acquire) == 0;
        let mut leaves: BinaryHeap<_> = self
            .packs
            .iter()
            .map(|(&no, p)| (no, p))
            .filter(|&(no, p)| !children.contains_key(&no) && free(no, p))
            .map(|(no, p)| Reverse((p.used, no)))
            .collect();
        let (mut out, mut freed) = (Vec::new(), 0);
        while freed < goal {
            let Some(Reverse((_, no))) = leaves.pop() else { break };
            let pack = self.pack(no)?;
            out.push(no);
            freed += pack.bytes;
            for up in parents(pack) {
                let left = children.get_mut(&up)?;
                *left -= 1;
                if let (0, Some(p)) = (*left, self.pack(up))
                    && free(up, p)
                {
                    leaves.push(Reverse((p.used, up)));
                }
            }
        }
        (freed >= must).then_some(out)
    }

    /// The pack of this snapshot, if nothing but snapshots is in it and nobody holds it.
    pub(crate) fn lone_snapshot(&self, name: &Name) -> Option<PackNo> {
        let loc = self.any(name)?;
        let pack = self.pack(loc.pack)?;
        (pack.blocks == 1 && pack.snapshots == 1 && pack.pins.load(Ordering::Acquire) == 0)
            .then_some(loc.pack)
    }

    pub(crate) fn set_record(&mut self, owner: Tag, session: Name, bytes: Option<u64>) {
        let folder = self.folders.entry(owner).or_default();
        let was = match bytes {
            Some(n) => folder.records.insert(session, n),
            None => folder.records.remove(&session),
        };
        self.bytes = self.bytes - was.unwrap_or(0) + bytes.unwrap_or(0);
    }

    pub(crate) fn bytes_of(&self, no: PackNo) -> u64 {
        self.pack(no).map_or(0, |p| p.bytes)
    }

    /// Blocks, bytes of the packs of an owner.
    pub(crate) fn owned(&self, owner: Tag) -> (u64, u64) {
        let packs = self.folders.get(&owner).into_iter().flat_map(|f| f.packs.values());
        packs.filter_map(|&no| self.pack(no)).fold((0, 0), |(n, b), p| (n + u64::from(p.blocks), b + p.bytes))
    }

    pub(crate) fn totals(&self) -> Totals {
        Totals {
            packs: self.packs.len() as u64,
            blocks: self.blocks,
            records: self.folders.values().map(|f| f.records.len() as u64).sum(),
            bytes: self.bytes,
        }
    }

    /// Heap bytes of the tables, from their capacities.
    pub(crate) fn memory(&self) -> u64 {
        // A hash table keeps one control byte per slot and has 8/7 as many slots as it says it can hold.
        let table = |capacity: usize, entry: usize| (capacity * 8 / 7 * (entry + 1)) as u64;
        let names = table(self.by_name.capacity(), size_of::<(Name, Loc)>());
        let more = table(self.more.capacity(), size_of::<(Name, Vec<Loc>)>());
        let packs = table(self.packs.capacity(), size_of::<(PackNo, Pack)>());
        let parents: usize = self.packs.values().map(|p| p.parents.len() * 32 + 16).sum();
        let folders: u64 = self
            .folders
            .values()
            .map(|f| {
                table(f.packs.capacity(), 20) + (f.records.len() * 56) as u64 + size_of::<Folder>() as u64
            })
            .sum();
        names + more + packs + parents as u64 + folders
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pack::Entry;

    fn name(i: u8) -> Name {
        Name([i; 32])
    }

    /// A pack of 100 bytes with one block `i` that follows `parent`.
    fn pack(id: u8, i: u8, parent: u8, codec: u64) -> PackIndex {
        let entry = Entry {
            name: name(i),
            parent: name(parent),
            offset: 64,
            len: 320,
            codec: CodecId(codec),
            kind: Kind::Rows,
        };
        PackIndex { id: [id; 16], owner: Tag([1; 16]), file_len: 100, entries: vec![entry] }
    }

    #[test]
    fn tails_go_before_heads_and_the_used_stay() {
        let mut x = Index::default();
        // 1 <- 2 <- 3, and 4 alone.
        for (i, parent) in [(1, 0), (2, 1), (3, 2), (4, 0)] {
            assert!(x.add(&pack(i, i, parent, 0)));
        }
        let ids = |v: Vec<PackNo>| v.iter().map(|&n| x.pack(n).unwrap().id[0]).collect::<Vec<_>>();
        assert_eq!(ids(x.victims(0, 300, &[]).unwrap()), [3, 2], "slack takes one more");
        assert_eq!(ids(x.victims(100, 1000, &[]).unwrap()), [] as [u8; 0]);
        assert_eq!(ids(x.victims(0, 1, &[]).unwrap()), [3, 2, 1, 4]);
        assert_eq!(ids(x.victims(0, 300, &[name(3)]).unwrap()), [4]);
        assert!(x.victims(0, 100, &[name(3)]).is_none(), "3 keeps 2 and 1");
        let lease = x.lease(&name(3), Copies::Exact).unwrap();
        assert_eq!(ids(x.victims(0, 300, &[]).unwrap()), [4]);
        drop(lease);
        let first = x.any(&name(3)).unwrap().pack;
        x.touch(first);
        assert_eq!(x.pack(x.victims(0, 300, &[]).unwrap()[0]).unwrap().id[0], 4);
    }

    #[test]
    fn a_second_copy_takes_over() {
        let mut x = Index::default();
        x.add(&pack(1, 1, 0, 0));
        x.add(&pack(2, 1, 0, 0));
        x.add(&pack(3, 1, 0, 9));
        assert!(!x.add(&pack(3, 1, 0, 9)), "known already");
        assert_eq!(x.find(&name(1), Copies::Coded(CodecId(9))).len(), 3);
        assert_eq!(x.find(&name(1), Copies::Coded(CodecId(9)))[0].codec(), CodecId(9));
        let exact = x.find(&name(1), Copies::Exact);
        assert_eq!(exact.len(), 2);
        x.drop_copy(&name(1), exact[0]);
        assert_eq!(x.find(&name(1), Copies::Exact), exact[1..]);
        x.remove(&[exact[1].pack]);
        assert!(!x.has(&name(1), Copies::Exact) && x.has(&name(1), Copies::Coded(CodecId(9))));
        assert_eq!((x.totals().packs, x.totals().bytes), (2, 200));
    }
}
