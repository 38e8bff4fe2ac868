//! The RAM tier: blocks in whatever form the engine holds them, least recently used out first.
//!
//! Generic over the value, so that a hit hands out the engine's own shared tiles and copies nothing. Each lookup is one hash
//! of a name and one move in a linked list: its cost does not depend on how much is held. Memory beside the values: about
//! 160 bytes a block.
//!
//! A run of blocks is touched from its last to its first, so that of one text the tail always goes before the head: a
//! missing head would make everything behind it useless.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::{CodecId, Copies, Name, Tag};

/// What is looked up: a name in one of its codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockKey {
    /// The block.
    pub name: Name,
    /// The code it is held in.
    pub codec: CodecId,
}

/// Order of eviction.
pub trait Evict: Send {
    /// `key` was used, or has come in.
    fn touch(&mut self, key: &BlockKey);
    /// `key` is gone.
    fn remove(&mut self, key: &BlockKey);
    /// What should go next, of what is not `held`.
    fn victim(&mut self, held: &dyn Fn(&BlockKey) -> bool) -> Option<BlockKey>;
}

/// Least recently used first. All operations take constant time, but for [`Evict::victim`], which walks over what is held
/// at the cold end.
#[derive(Debug, Default)]
pub struct Lru {
    at: HashMap<BlockKey, u32>,
    nodes: Vec<Node>,
    free: Vec<u32>,
    /// Coldest and hottest node.
    ends: [Option<u32>; 2],
}

#[derive(Clone, Copy, Debug)]
struct Node {
    key: BlockKey,
    /// Towards the cold end, towards the hot end.
    next: [Option<u32>; 2],
}

const COLD: usize = 0;
const HOT: usize = 1;

impl Lru {
    fn unlink(&mut self, i: u32) {
        let next = self.nodes[i as usize].next;
        for side in [COLD, HOT] {
            match next[side] {
                Some(n) => self.nodes[n as usize].next[1 - side] = next[1 - side],
                None => self.ends[side] = next[1 - side],
            }
        }
    }

    fn link_hot(&mut self, i: u32) {
        let was = self.ends[HOT].replace(i);
        self.nodes[i as usize].next = [was, None];
        match was {
            Some(n) => self.nodes[n as usize].next[HOT] = Some(i),
            None => self.ends[COLD] = Some(i),
        }
    }
}

impl Evict for Lru {
    fn touch(&mut self, key: &BlockKey) {
        if let Some(&i) = self.at.get(key) {
            self.unlink(i);
            return self.link_hot(i);
        }
        let node = Node { key: *key, next: [None; 2] };
        let i = if let Some(i) = self.free.pop() {
            self.nodes[i as usize] = node;
            i
        } else {
            self.nodes.push(node);
            self.nodes.len() as u32 - 1
        };
        self.at.insert(*key, i);
        self.link_hot(i);
    }

    fn remove(&mut self, key: &BlockKey) {
        if let Some(i) = self.at.remove(key) {
            self.unlink(i);
            self.free.push(i);
        }
    }

    fn victim(&mut self, held: &dyn Fn(&BlockKey) -> bool) -> Option<BlockKey> {
        let mut at = self.ends[COLD];
        while let Some(i) = at {
            let node = &self.nodes[i as usize];
            if !held(&node.key) {
                return Some(node.key);
            }
            at = node.next[HOT];
        }
        None
    }
}

/// While it lives, the block it was taken on is not evicted.
#[derive(Debug)]
pub struct Lease(Arc<AtomicU32>);

impl Lease {
    pub(crate) fn on(pins: &Arc<AtomicU32>) -> Self {
        pins.fetch_add(1, Ordering::AcqRel);
        Self(Arc::clone(pins))
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

struct Slot<V> {
    value: V,
    bytes: u64,
    owner: Tag,
    pins: Arc<AtomicU32>,
}

struct Inner<V> {
    slots: HashMap<BlockKey, Slot<V>>,
    order: Box<dyn Evict>,
    bytes: u64,
}

/// Blocks in host memory, up to a number of bytes.
pub struct Mem<V> {
    inner: Mutex<Inner<V>>,
    limit_bytes: u64,
    hits: AtomicU64,
    misses: AtomicU64,
    evicted: AtomicU64,
}

/// State and history of a RAM tier.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "camelCase")]
pub struct MemStats {
    /// Blocks held.
    pub blocks: u64,
    /// Bytes held, as their owners counted them.
    pub bytes: u64,
    /// The limit.
    pub limit_bytes: u64,
    /// Lookups that found their block.
    pub hits: u64,
    /// Lookups that did not.
    pub misses: u64,
    /// Blocks that had to go.
    pub evicted: u64,
}

impl<V: Clone> Mem<V> {
    /// An empty tier of at most `limit_bytes`, least recently used out first.
    pub fn new(limit_bytes: u64) -> Self {
        Self::with_order(limit_bytes, Box::new(Lru::default()))
    }

    /// An empty tier with another order of eviction.
    pub fn with_order(limit_bytes: u64, order: Box<dyn Evict>) -> Self {
        Self {
            inner: Mutex::new(Inner { slots: HashMap::new(), order, bytes: 0 }),
            limit_bytes,
            hits: AtomicU64::new(0),
            misses: AtomicU64::new(0),
            evicted: AtomicU64::new(0),
        }
    }

    /// Hold `value`, which its owner says takes `bytes`. False where it has no place because all the rest is leased, or
    /// because it is larger than the tier. A value of the same key is replaced.
    pub fn put(&self, owner: Tag, key: BlockKey, bytes: u64, value: V) -> bool {
        let mut gone = Vec::new();
        let mut guard = self.lock();
        let inner = &mut *guard;
        let replaced = inner.slots.get(&key).map_or(0, |s| s.bytes);
        if bytes > self.limit_bytes {
            return false;
        }
        while inner.bytes - replaced + bytes > self.limit_bytes {
            let slots = &inner.slots;
            let held =
                |k: &BlockKey| *k == key || slots.get(k).is_some_and(|s| s.pins.load(Ordering::Acquire) > 0);
            let Some(victim) = inner.order.victim(&held) else { return false };
            inner.order.remove(&victim);
            if let Some(slot) = inner.slots.remove(&victim) {
                inner.bytes -= slot.bytes;
                gone.push(slot);
            }
        }
        self.evicted.fetch_add(gone.len() as u64, Ordering::Relaxed);
        inner.order.touch(&key);
        inner.bytes = inner.bytes - replaced + bytes;
        match inner.slots.entry(key) {
            // Leases on the block stay good.
            std::collections::hash_map::Entry::Occupied(mut e) => {
                let slot = e.get_mut();
                (slot.value, slot.bytes, slot.owner) = (value, bytes, owner);
            }
            std::collections::hash_map::Entry::Vacant(e) => {
                e.insert(Slot { value, bytes, owner, pins: Arc::default() });
            }
        }
        // Values may be large; their memory is given back outside the lock.
        drop(guard);
        drop(gone);
        true
    }

    /// The block in an acceptable code, and that code.
    pub fn get(&self, name: &Name, copies: Copies) -> Option<(CodecId, V)> {
        let mut inner = self.lock();
        let found = inner.find(name, copies).map(|key| {
            inner.order.touch(&key);
            (key.codec, inner.slots[&key].value.clone())
        });
        let counter = if found.is_some() { &self.hits } else { &self.misses };
        counter.fetch_add(1, Ordering::Relaxed);
        found
    }

    /// The leading blocks of `names` that are held, each in an acceptable code.
    pub fn get_run(&self, names: &[Name], copies: Copies) -> Vec<(CodecId, V)> {
        let mut inner = self.lock();
        let keys: Vec<_> = names.iter().map_while(|n| inner.find(n, copies)).collect();
        for key in keys.iter().rev() {
            inner.order.touch(key);
        }
        self.hits.fetch_add(keys.len() as u64, Ordering::Relaxed);
        self.misses.fetch_add((names.len() - keys.len()) as u64, Ordering::Relaxed);
        keys.iter().map(|k| (k.codec, inner.slots[k].value.clone())).collect()
    }

    /// True if the block is held in an acceptable code. Changes nothing.
    pub fn has(&self, name: &Name, copies: Copies) -> bool {
        self.lock().find(name, copies).is_some()
    }

    /// Keep the block while the lease lives.
    pub fn lease(&self, key: &BlockKey) -> Option<Lease> {
        self.lock().slots.get(key).map(|s| Lease::on(&s.pins))
    }

    /// Drop a block, leased or not.
    pub fn remove(&self, key: &BlockKey) -> Option<V> {
        let mut inner = self.lock();
        let slot = inner.slots.remove(key)?;
        inner.order.remove(key);
        inner.bytes -= slot.bytes;
        Some(slot.value)
    }

    /// Drop everything of `owner`. Returns blocks and bytes. Takes time in proportion to what the tier holds.
    pub fn forget(&self, owner: Tag) -> (u64, u64) {
        let mut guard = self.lock();
        let inner = &mut *guard;
        let keys: Vec<_> = inner.slots.iter().filter(|(_, s)| s.owner == owner).map(|(k, _)| *k).collect();
        let mut gone = Vec::with_capacity(keys.len());
        for key in &keys {
            inner.order.remove(key);
            gone.extend(inner.slots.remove(key));
        }
        let bytes = gone.iter().map(|s| s.bytes).sum();
        inner.bytes -= bytes;
        drop(guard);
        (keys.len() as u64, bytes)
    }

    /// State and history.
    pub fn stats(&self) -> MemStats {
        let inner = self.lock();
        MemStats {
            blocks: inner.slots.len() as u64,
            bytes: inner.bytes,
            limit_bytes: self.limit_bytes,
            hits: self.hits.load(Ordering::Relaxed),
            misses: self.misses.load(Ordering::Relaxed),
            evicted: self.evicted.load(Ordering::Relaxed),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner<V>> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<V> Inner<V> {
    fn find(&self, name: &Name, copies: Copies) -> Option<BlockKey> {
        [copies.first(), CodecId::EXACT]
            .into_iter()
            .map(|codec| BlockKey { name: *name, codec })
            .find(|k| self.slots.contains_key(k))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWNER: Tag = Tag([1; 16]);

    fn key(i: u8) -> BlockKey {
        BlockKey { name: Name([i; 32]), codec: CodecId::EXACT }
    }

    fn mem(limit: u64) -> Mem<u8> {
        Mem::new(limit)
    }

    #[test]
    fn the_least_recently_used_goes_first() {
        let m = mem(30);
        for i in 1..=3 {
            assert!(m.put(OWNER, key(i), 10, i));
        }
        assert_eq!(m.get(&Name([1; 32]), Copies::Exact), Some((CodecId::EXACT, 1)));
        assert!(m.put(OWNER, key(4), 10, 4));
        let held: Vec<_> = (1..=4).filter(|&i| m.has(&Name([i; 32]), Copies::Exact)).collect();
        assert_eq!(held, [1, 3, 4]);
        assert_eq!((m.stats().bytes, m.stats().evicted), (30, 1));
    }

    #[test]
    fn of_a_run_the_tail_goes_first() {
        let m = mem(40);
        let names: Vec<_> = (1..=4).map(|i| Name([i; 32])).collect();
        for i in 1..=4 {
            m.put(OWNER, key(i), 10, i);
        }
        assert_eq!(m.get_run(&names, Copies::Exact).len(), 4);
        m.put(OWNER, key(9), 10, 9);
        assert_eq!(m.get_run(&names, Copies::Exact).len(), 3);
    }

    #[test]
    fn leases_are_honoured() {
        let m = mem(20);
        m.put(OWNER, key(1), 10, 1);
        m.put(OWNER, key(2), 10, 2);
        let lease = m.lease(&key(1)).unwrap();
        assert!(m.put(OWNER, key(3), 10, 3));
        assert!(m.has(&Name([1; 32]), Copies::Exact) && !m.has(&Name([2; 32]), Copies::Exact));
        let other = m.lease(&key(3)).unwrap();
        assert!(!m.put(OWNER, key(4), 10, 4), "all is leased");
        drop((lease, other));
        assert!(m.put(OWNER, key(4), 10, 4));
        assert!(!m.put(OWNER, key(5), 21, 5), "larger than the tier");
    }

    #[test]
    fn replacing_counts_bytes_once_and_forgetting_takes_only_the_owner() {
        let m = mem(100);
        m.put(OWNER, key(1), 10, 1);
        m.put(OWNER, key(1), 30, 2);
        m.put(Tag([2; 16]), key(2), 5, 3);
        assert_eq!(m.stats().bytes, 35);
        assert_eq!(m.forget(OWNER), (1, 30));
        assert_eq!((m.stats().bytes, m.stats().blocks), (5, 1));
        assert_eq!(m.remove(&key(2)), Some(3));
        assert_eq!(m.stats().bytes, 0);
    }

    #[test]
    fn a_coded_reader_takes_its_code_first_and_exact_rows_else() {
        let m = mem(100);
        let (name, int8, int4) = (Name([1; 32]), CodecId::of(b"int8"), CodecId::of(b"int4"));
        m.put(OWNER, BlockKey { name, codec: int8 }, 1, 8);
        assert_eq!(m.get(&name, Copies::Exact), None);
        assert_eq!(m.get(&name, Copies::Coded(int8)), Some((int8, 8)));
        assert_eq!(m.get(&name, Copies::Coded(int4)), None);
        m.put(OWNER, BlockKey { name, codec: CodecId::EXACT }, 1, 16);
        assert_eq!(m.get(&name, Copies::Coded(int4)), Some((CodecId::EXACT, 16)));
        assert_eq!(m.get(&name, Copies::Coded(int8)), Some((int8, 8)));
    }

    proptest::proptest! {
        #[test]
        fn lru_agrees_with_a_list(ops in proptest::collection::vec((0u8..3, 0u8..12), 0..300)) {
            let (mut lru, mut list) = (Lru::default(), Vec::<u8>::new());
            for (op, i) in ops {
                match op {
                    0 => {
                        lru.touch(&key(i));
                        list.retain(|&x| x != i);
                        list.push(i);
                    }
                    1 => {
                        lru.remove(&key(i));
                        list.retain(|&x| x != i);
                    }
                    _ => {
                        let odd = |k: &BlockKey| k.name.0[0] % 2 == 1;
                        let expected = list.iter().find(|&&x| x % 2 == 0).map(|&x| key(x));
                        proptest::prop_assert_eq!(lru.victim(&odd), expected);
                    }
                }
            }
        }
    }
}
