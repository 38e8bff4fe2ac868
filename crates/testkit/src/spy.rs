//! A spy between model and cache: counts the rows that pass each point, so that a test can assert how many rows each layer
//! and part really computed.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use kvasir_core::{Batch, Buf, Go, Hooks, Layout, Logits, Model, Part, Point, Result, Rows};

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

/// Rows by layer and part.
pub type Counts = BTreeMap<(u16, Part), Seen>;

/// Rows computed per layer in `part`, layers ascending.
pub fn computed(counts: &Counts, part: Part) -> Vec<u32> {
    counts.iter().filter(|((_, p), _)| *p == part).map(|(_, s)| s.computed).collect()
}

/// A model that runs as it is, behind a spy: for drivers that bring their own hooks.
pub struct Watched<'a> {
    inner: &'a dyn Model,
    seen: Mutex<Counts>,
}

impl<'a> Watched<'a> {
    /// Watches `inner`.
    pub fn new(inner: &'a dyn Model) -> Self {
        Self { inner, seen: Mutex::new(Counts::new()) }
    }

    /// Rows seen since the last call.
    pub fn take(&self) -> Counts {
        std::mem::take(&mut *self.seen.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Model for Watched<'_> {
    fn layout(&self) -> &Layout {
        self.inner.layout()
    }

    fn forward(&self, batch: &Batch, hooks: &mut dyn Hooks, out: &mut Logits) -> Result<()> {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let mut spy = Spy { inner: hooks, seen: std::mem::take(&mut *seen) };
        let done = self.inner.forward(batch, &mut spy, out);
        *seen = spy.seen;
        done
    }
}

/// Hooks that count and pass everything on.
pub struct Spy<'a> {
    inner: &'a mut dyn Hooks,
    seen: Counts,
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

    /// Everything seen so far; counting starts anew.
    pub fn take(&mut self) -> Counts {
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

#[cfg(test)]
mod tests {
    use super::*;
    use kvasir_core::Error;

    /// Halves the rows at layer 1 and skips its feed-forward block.
    struct Halve;

    impl Hooks for Halve {
        fn enter(&mut self, at: Point, x: &mut Rows, _: Option<&Buf>) -> Result<Go> {
            if at == Point::attention(1) {
                x.pos.truncate(x.pos.len() / 2);
            }
            Ok(if at == Point::mlp(1) { Go::Skip } else { Go::Run })
        }
        fn attend(&mut self, _: Point, q: &Rows, _: &Rows, _: &Rows, out: &mut Rows) -> Result<()> {
            out.pos.clone_from(&q.pos);
            Ok(())
        }
    }

    /// Two layers of nothing.
    struct Walk(Layout);

    impl Model for Walk {
        fn layout(&self) -> &Layout {
            &self.0
        }
        fn forward(&self, batch: &Batch, hooks: &mut dyn Hooks, _: &mut Logits) -> Result<()> {
            let data = Buf::new(std::sync::Arc::new(()), 0);
            let mut x = Rows { data, dim: 1, pos: batch.pos.clone(), of: batch.of.clone() };
            for layer in 0..2 {
                for at in [Point::attention(layer), Point::mlp(layer)] {
                    if hooks.enter(at, &mut x, None)? == Go::Run {
                        if at.part == Part::Attention {
                            let mut out = x.clone();
                            hooks.attend(at, &x, &x, &x, &mut out)?;
                        }
                        hooks.leave(at, &mut x.clone())?;
                    }
                }
            }
            Err(Error::Cancelled)
        }
    }

    #[test]
    fn rows_are_counted_even_when_the_pass_fails() {
        let walk = Walk(Layout { layers: Vec::new(), sides: Vec::new(), context: 0, fingerprint: [0; 32] });
        let watched = Watched::new(&walk);
        for _ in 0..2 {
            let batch = Batch::one(&[1, 2, 3, 4], 0, kvasir_core::Ask::None);
            assert!(watched.forward(&batch, &mut Halve, &mut Logits::default()).is_err());
        }
        let counts = watched.take();
        assert_eq!(computed(&counts, Part::Attention), [8, 4]);
        assert_eq!(computed(&counts, Part::Mlp), [8, 0]);
        let halved = counts[&(1, Part::Attention)];
        assert_eq!(halved, Seen { entered: 8, computed: 4, attended: 4, left: 4, skipped: 0 });
        assert_eq!(counts[&(1, Part::Mlp)].skipped, 2);
        assert!(watched.take().is_empty());
    }
}
