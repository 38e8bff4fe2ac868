//! A point to which a session can go back: a prefill of many passes is all or nothing.
//!
//! Costs handles only: tiles are shared, and rows appended behind the point do not change those before it.

use serde_json::Value as Json;

use std::collections::VecDeque;

use kvasir_core::{Buf, Table, Want};

use crate::Result;
use crate::commit::Owner;
use crate::session::{PlanStats, Session, disown};

/// What a session was.
pub(crate) struct Point {
    tables: Vec<Vec<Table>>,
    ids: usize,
    seen: u32,
    exact_to: u32,
    private: Option<&'static str>,
    wants: VecDeque<Want>,
    logits: Option<Vec<f32>>,
    probes: Vec<Option<(Buf, Vec<u32>)>>,
    stats: PlanStats,
    policies: Json,
    owner: Option<Owner>,
}

impl Session {
    /// The session as it is now. Its passes until the way back may add ids but not change them.
    pub(crate) fn point(&self) -> Point {
        Point {
            tables: self.tables.clone(),
            ids: self.ids.len(),
            seen: self.seen,
            exact_to: self.exact_to,
            private: self.private,
            wants: self.wants.clone(),
            logits: self.logits.clone(),
            probes: self.probes.clone(),
            stats: self.stats,
            policies: self.save_policies(),
            owner: self.owner.clone(),
        }
    }

    /// Goes back.
    pub(crate) fn back_to(&mut self, point: Point) -> Result<()> {
        for (slot, saved) in self.stack.slots.iter_mut().zip(point.policies.as_array().into_iter().flatten())
        {
            slot.policy.load(saved)?;
        }
        self.tables = point.tables;
        // A tile that was open at the point may have been shared since: it is copied before it is written again.
        for run in self.tables.iter_mut().flatten().flat_map(|t| &mut t.runs) {
            disown(run);
        }
        self.ids.truncate(point.ids);
        self.seen = point.seen;
        self.exact_to = point.exact_to;
        self.private = point.private;
        self.wants = point.wants;
        self.logits = point.logits;
        self.probes = point.probes;
        self.stats = point.stats;
        self.owner = point.owner;
        Ok(())
    }
}
