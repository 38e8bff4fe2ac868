//! Plans: what a policy says. Symbolic ops for the engine, wants for the model. A plan is JSON, which is also how tests
//! compare it.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::{Point, RunId, SideId};

/// Index of a score column among those a policy asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ColId(pub u16);

/// Where a column's numbers come from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Source {
    /// Attention probability received.
    Attention(Probe),
    /// Euclidean norm of the key.
    KeyNorm,
    /// Cosine of a key with the next one.
    NextCosine,
    /// A small network over the row's own q, k, v.
    Mlp(SideId),
    /// Angle between the rows of two layers.
    PairAngle {
        /// The lower layer.
        below: u16,
    },
    /// Squared distance between a reused row and its fresh twin.
    Moved(Role),
    /// Probability of the token the model would put there.
    Confidence,
}

/// Which column of a kv table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Role {
    /// Keys: scored by a dot product.
    Key,
    /// Values: summed.
    Value,
}

/// How attention becomes one number per row.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Probe {
    /// Whose attention.
    pub queries: Queries,
    /// Normalised over which keys.
    pub over: Over,
    /// Over queries.
    pub reduce: Reduce,
    /// Over heads.
    pub heads: Heads,
}

/// Queries of a probe. `All` accumulates over the session; the others are taken anew by each pass.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Queries {
    /// Every query since the row arrived.
    All,
    /// The newest queries of the pass.
    Last(u32),
    /// Recent and random queries of the pass.
    Sampled {
        /// Share taken from the end.
        recent: f32,
        /// Share taken at random.
        random: f32,
        /// Seed of the choice.
        seed: u64,
    },
    /// Queries of a `Want::Probe` pass.
    Wanted,
    /// Rows tracked by a column.
    Tracked(ColId),
}

/// Keys over which the probabilities of a probe sum to one.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Over {
    /// All that the query sees.
    All,
    /// Rows that were there before the pass.
    Past,
    /// Rows of one run.
    Run(RunId),
}

/// How a probe folds queries.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Reduce {
    /// Sum.
    Sum,
    /// Mean over the queries that can see the row.
    MeanVisible,
    /// Largest.
    Max,
    /// Sums at fixed distances.
    Strips(Vec<i32>),
    /// Sums per chunk of queries that starts at these rows.
    PerChunk(Vec<u32>),
}

/// How a probe folds heads.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Heads {
    /// Mean over the query heads of the kv head.
    KvMean,
    /// Largest of them.
    KvMax,
    /// Mean over all heads of the layer, the same for each kv head.
    LayerMean,
    /// Only the heads of a mask.
    Only(SideId),
}

impl Probe {
    /// Attention of all queries, summed, mean over the group.
    pub fn all_queries() -> Self {
        Self { queries: Queries::All, over: Over::All, reduce: Reduce::Sum, heads: Heads::KvMean }
    }

    /// Attention of the newest `n` queries, summed, mean over the group.
    pub fn last_queries(n: u32) -> Self {
        Self { queries: Queries::Last(n), ..Self::all_queries() }
    }

    /// The same, with one number for the whole layer.
    #[must_use]
    pub fn layer_mean(mut self) -> Self {
        self.heads = Heads::LayerMean;
        self
    }
}

/// A number of rows: a count, or a share of the rows seen.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Budget {
    /// Rows per kv head.
    Rows(u32),
    /// Share of the rows the session has seen, in (0, 1].
    Ratio(f32),
}

impl Budget {
    /// Rows, when `seen` rows have passed.
    pub fn rows(self, seen: u32) -> u32 {
        match self {
            Self::Rows(n) => n,
            // 0.1 as f32 is a little more than a tenth: a tenth of 230 rows is 23 all the same.
            Self::Ratio(r) => (f64::from(r) * f64::from(seen) * (1.0 - 1e-6)).ceil() as u32,
        }
    }

    /// A positive count or a share in (0, 1].
    pub fn check(self, field: &str) -> crate::Result<()> {
        match self {
            Self::Rows(n) => crate::check::at_least(field, n as usize, 1),
            Self::Ratio(r) => crate::check::share(field, r),
        }
    }
}

/// Tables an op speaks of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct At {
    /// Layers; `None` is all.
    pub layers: Option<Range<u16>>,
    /// Kv heads; `None` is all.
    pub heads: Option<Range<u16>>,
    /// Run; `None` is all rows of the table in position order.
    pub run: Option<RunId>,
}

impl At {
    /// Every table, every run.
    pub fn all() -> Self {
        Self { layers: None, heads: None, run: None }
    }

    /// One run of every table.
    pub fn run(run: RunId) -> Self {
        Self { run: Some(run), ..Self::all() }
    }

    /// One layer, every head and run.
    pub fn layer(layer: u16) -> Self {
        Self { layers: Some(layer..layer + 1), ..Self::all() }
    }

    /// The op speaks of this head.
    pub fn has(&self, layer: u16, head: u16) -> bool {
        self.layers.as_ref().is_none_or(|r| r.contains(&layer))
            && self.heads.as_ref().is_none_or(|r| r.contains(&head))
    }
}

/// Over which heads a `Top` competes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Per {
    /// `n` rows in each kv head.
    Head,
    /// `n` rows times the kv heads of the layer, wherever they are.
    Joint,
}

/// Rows, said symbolically. Rows are counted in position order among those the `At` speaks of.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Pick {
    /// All.
    All,
    /// The oldest.
    First(u32),
    /// The newest.
    Last(u32),
    /// By index.
    Rows(Vec<u32>),
    /// The largest of a column; ties keep the older row.
    Top {
        /// Column.
        col: ColId,
        /// Rows.
        n: u32,
        /// Over which heads they compete.
        per: Per,
    },
    /// The fewest rows that hold this share of the column's sum.
    Mass {
        /// Column.
        col: ColId,
        /// Share in (0, 1].
        share: f32,
    },
    /// Rows whose column is above a threshold.
    Above {
        /// Column.
        col: ColId,
        /// Threshold.
        t: f32,
    },
    /// The others.
    Not(Box<Pick>),
    /// In both.
    Both(Box<Pick>, Box<Pick>),
    /// In one of them. A `Top` on the right side competes among the rows the left side does not hold.
    Either(Box<Pick>, Box<Pick>),
}

impl Pick {
    /// These rows or those.
    #[must_use]
    pub fn or(self, other: Self) -> Self {
        Self::Either(Box::new(self), Box::new(other))
    }

    /// All but these.
    #[must_use]
    pub fn others(self) -> Self {
        Self::Not(Box::new(self))
    }

    /// In both.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self::Both(Box::new(self), Box::new(other))
    }
}

/// Which rows a merge puts together.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Groups {
    /// All picked rows into this one.
    Into(u32),
    /// Neighbours whose column stays above a threshold, at most `cap` in a group.
    Runs {
        /// Column.
        col: ColId,
        /// Threshold.
        above: f32,
        /// Largest group.
        cap: u32,
    },
}

/// How merged rows are weighted.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Weights {
    /// Mean of all rows ever folded in.
    Mean,
    /// Gaussian of the key distance.
    Gauss(f32),
}

/// What a fit computes into a side tensor.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Fit {
    /// Balance of query and key magnitudes per channel.
    Balance,
    /// The channels that matter most.
    Channels {
        /// How many are kept.
        keep: u16,
    },
    /// Principal directions.
    Basis {
        /// How many.
        rank: u16,
    },
}

/// What stands for a group of rows when a query chooses which to read.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum UnitKind {
    /// Smallest and largest per channel over `rows` rows.
    MinMax {
        /// Rows of a unit.
        rows: u32,
    },
    /// Mean over `rows` rows.
    Mean {
        /// Rows of a unit.
        rows: u32,
    },
}

/// An op for the engine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Op {
    /// Drop all rows but these.
    Keep(At, Pick),
    /// Move rows into a colder run, coding them.
    Move(At, Pick, RunId),
    /// Fold rows together.
    Merge(At, Groups, Weights),
    /// Share the rows of two layers.
    Pair {
        /// Upper layer.
        upper: u16,
        /// Lower layer.
        lower: u16,
        /// Interpolation.
        t: f32,
        /// Rows that stay apart.
        retain: Pick,
    },
    /// Compute a side tensor from rows.
    Fit(At, SideId, Fit),
    /// Build unit keys.
    Units(At, UnitKind),
    /// Standing: attend only these units.
    Visit(At, Pick),
    /// Map the rows of another session into this one.
    Fuse {
        /// Source.
        from: Point,
        /// The map.
        by: SideId,
    },
}

/// Work for the model. A policy never calls it; a driver does.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Want {
    /// Compute these positions from a layer on. Above the running layer it is served by the pass itself, in `enter`.
    Rows {
        /// Positions, ascending.
        pos: Vec<u32>,
        /// First layer.
        from_layer: u16,
    },
    /// Run these tokens as queries behind the cached rows; their own rows are dropped.
    Probe {
        /// Tokens.
        tokens: Vec<u32>,
        /// Column that takes their attention.
        into: ColId,
    },
    /// Recompute these positions, a few riding in each decode step.
    Repair {
        /// Positions, in the order of repair.
        pos: Vec<u32>,
        /// Rows per step.
        per_step: u8,
    },
    /// Compute these positions once more at time `t` and keep their rows.
    Write {
        /// Positions.
        pos: Vec<u32>,
        /// Time.
        t: f32,
    },
    /// Compute these tokens of the prompt.
    Tokens(Range<u32>),
}

/// What a policy answers when it wakes.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Plan {
    /// Ops, in order of effect.
    pub ops: Vec<Op>,
    /// Wants, in order.
    pub wants: Vec<Want>,
}

impl Plan {
    /// Adds `Keep`.
    pub fn keep(&mut self, at: At, pick: Pick) {
        self.ops.push(Op::Keep(at, pick));
    }

    /// Adds `Move`.
    pub fn move_to(&mut self, at: At, pick: Pick, run: RunId) {
        self.ops.push(Op::Move(at, pick, run));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_rounds_up_from_what_was_written() {
        for (share, seen, rows) in [(0.1, 230, 23), (0.1, 231, 24), (1.0, 7, 7), (0.5, 1, 1), (0.25, 0, 0)] {
            assert_eq!(Budget::Ratio(share).rows(seen), rows, "{share} of {seen}");
        }
    }
}
