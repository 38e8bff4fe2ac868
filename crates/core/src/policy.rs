//! `KvPolicy` and what it sees.

use serde::{Deserialize, Serialize};
use serde_json::Value as Json;

use crate::{Budget, Codes, ColId, Layout, Plan, Result, Source};

/// When a policy wakes. Checked between passes; costs a compare.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Trigger {
    /// After every pass.
    PassEnd,
    /// After the pass that ends a prefill.
    PrefillEnd,
    /// When a table holds more than `budget + slack_rows` rows.
    Over {
        /// Rows allowed.
        budget: Budget,
        /// Rows tolerated above.
        slack_rows: u32,
    },
    /// When the open run holds at least this many rows.
    Open {
        /// Rows.
        rows: u32,
    },
    /// When a want of the policy has been served.
    Wanted,
}

/// Why a policy was woken: index into its own triggers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wake(pub usize);

/// How positions are given to keys and queries.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Positions {
    /// Rows keep the position they were computed at.
    #[default]
    Original,
    /// A row's position is its index among the kept rows; needs keys before RoPE.
    Packed,
}

/// Which keys a query sees.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mask {
    /// Keys at its own position or before.
    #[default]
    Causal,
    /// Every key.
    Full,
}

/// What a policy needs from the engine.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct KvSpec {
    /// Colder runs it moves rows into; its own run `i` is `RunId(i + 1)`, renumbered when several policies meet.
    pub runs: Vec<Codes>,
    /// Columns it reads, by `ColId`.
    pub columns: Vec<Source>,
    /// When it wakes.
    pub wake: Vec<Trigger>,
    /// Position mode.
    pub positions: Positions,
    /// Mask.
    pub mask: Mask,
    /// It drops rows.
    pub evicts: bool,
    /// First rows of the session that stay exact whatever the ops say about coding: attention sinks.
    pub sinks: u32,
}

impl KvSpec {
    /// Dense rows, no columns, never woken.
    pub fn dense() -> Self {
        Self::default()
    }

    /// Adds a column.
    #[must_use]
    pub fn column(mut self, source: Source) -> Self {
        self.columns.push(source);
        self
    }

    /// Adds a trigger.
    #[must_use]
    pub fn wake(mut self, trigger: Trigger) -> Self {
        self.wake.push(trigger);
        self
    }

    /// Adds a colder run.
    #[must_use]
    pub fn run(mut self, codes: Codes) -> Self {
        self.runs.push(codes);
        self
    }

    /// Sets the position mode.
    #[must_use]
    pub fn positions(mut self, positions: Positions) -> Self {
        self.positions = positions;
        self
    }

    /// Keeps the first `n` rows of the session exact.
    #[must_use]
    pub fn sinks(mut self, n: u32) -> Self {
        self.sinks = n;
        self
    }

    /// Says that rows will be dropped.
    #[must_use]
    pub fn evicts(mut self) -> Self {
        self.evicts = true;
        self
    }
}

/// Column read-out: layer, kv head, column; values in position order.
pub type ReadColumn<'a> = dyn Fn(u16, u16, ColId) -> Result<Vec<f32>> + 'a;

/// What a policy sees when it plans.
pub struct View<'a> {
    /// The model's cache.
    pub layout: &'a Layout,
    /// Tokens the session has seen, evicted ones included.
    pub seen: u32,
    /// Rows held by the longest table.
    pub rows: u32,
    /// Rows in the longest open run.
    pub open: u32,
    /// Values of a column; waits for the device.
    pub col: &'a ReadColumn<'a>,
}

/// A kv method: names columns, wakes on triggers, emits a plan. It never touches bytes and never calls the model.
pub trait KvPolicy: Send {
    /// What it needs. Checks its parameters.
    fn spec(&self, layout: &Layout) -> Result<KvSpec>;
    /// Answers a trigger.
    fn plan(&mut self, why: Wake, view: &View<'_>, plan: &mut Plan) -> Result<()>;
    /// Cursors and counters: committed and forked with the session.
    fn save(&self) -> Json {
        Json::Null
    }
    /// Takes back what `save` gave.
    fn load(&mut self, _state: &Json) -> Result<()> {
        Ok(())
    }
}
