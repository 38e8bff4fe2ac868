//! A spy between model and cache: counts the rows that pass each point, so that a test can assert how many rows each layer
//! and part really computed.

use std::collections::BTreeMap;

use kvasir_core::{Buf, Go, Hooks, Part, Point, Result, Rows};

/// Rows at one point, summed over the passes since the last [`Spy::take`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// Rows the model brought to `enter`.
    pub entered: u32,
    /// Rows after `enter`: norm and projections of the part ran for these, unless `skipped`.
    pub computed: u32,
    /// Rows `attend` gave back; the output projection ran for these.
    pub attended: u32,
    /// Rows at `leave`.
    pub left: u32,
    /// Calls of `enter` that answered `Skip`.
    pub skipped: u32,
}

/// Hooks that count and pass everything on.
pub struct Spy<'a> {
    inner: &'a mut dyn Hooks,
    seen: BTreeMap<(u16, Part), Seen>,
}

impl<'a> Spy<'a> {
    /// A spy in front of `inner`.
    pub fn new(inner: &'a mut dyn Hooks) -> Self {
        Self { inner, seen: BTreeMap::new() }
    }

    /// What was seen at a point.
    pub fn at(&self, layer: u16, part: Part) -> Seen {
        self.seen.get(&(layer, part)).copied().unwrap_or_default()
    }

    /// Rows computed per layer in `part`, layers ascending.
    pub fn computed(&self, part: Part) -> Vec<u32> {
        self.seen.iter().filter(|((_, p), _)| *p == part).map(|(_, s)| s.computed).collect()
    }

    /// Rows that `attend` gave back per layer, layers ascending.
    pub fn attended(&self) -> Vec<u32> {
        self.seen.iter().filter(|((_, p), _)| *p == Part::Attention).map(|(_, s)| s.attended).collect()
    }

    /// Everything seen so far; counting starts anew.
    pub fn take(&mut self) -> BTreeMap<(u16, Part), Seen> {
        std::mem::take(&mut self.seen)
    }
}

impl Hooks for Spy<'_> {
    fn enter(&mut self, at: Point, x: &mut Rows, gate: Option<&Buf>) -> Result<Go> {
        let before = x.len() as u32;
        let go = self.inner.enter(at, x, gate)?;
        let seen = self.seen.entry((at.layer, at.part)).or_default();
        seen.entered += before;
        match go {
            Go::Run => seen.computed += x.len() as u32,
            Go::Skip => seen.skipped += 1,
        }
        Ok(go)
    }

    fn attend(&mut self, at: Point, q: &Rows, k: &Rows, v: &Rows, out: &mut Rows) -> Result<()> {
        self.inner.attend(at, q, k, v, out)?;
        self.seen.entry((at.layer, at.part)).or_default().attended += out.len() as u32;
        Ok(())
    }

    fn leave(&mut self, at: Point, y: &mut Rows) -> Result<()> {
        self.seen.entry((at.layer, at.part)).or_default().left += y.len() as u32;
        self.inner.leave(at, y)
    }
}
