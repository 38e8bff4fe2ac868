//! TOVA: keep the rows that the newest query attends to most.
//!
//! Paper: Oren et al., "Transformers are Multi-State RNNs", EMNLP 2024, arXiv 2401.06104.
//!
//! - Reads: one column `[T]` f32: attention of the last query of the pass, mean over all heads of the layer.
//! - Plans: when a table is over the budget, keeps its heaviest rows; one list per layer, shared by its kv heads.
//! - State: 4 bytes per cached row and kv head (the column, taken anew by each pass); nothing accumulates.
//! - Deviations: the newest row stays (as in kvpress; `keep_last` off gives the paper's rule, by which it may leave at once);
//!   rows keep their original positions; ties keep the older row; plans between passes, so a pass of many rows drops many
//!   at once by the attention of its last query.

use kvasir_core::{
    At, Budget, ColId, KvPolicy, KvSpec, Layout, Per, Pick, Plan, Probe, Result, Source, Trigger, View, Wake,
};

options! {
    /// Parameters of TOVA.
    pub struct Tova {
        /// Rows kept per kv head, as a count or as a share of the rows seen.
        pub budget: Budget = Budget::Rows(1024),
        /// Rows above the budget that are tolerated before the next plan; more means fewer compactions.
        pub slack_rows: u32 = 0,
        /// Always keep the newest row, whatever it scored.
        pub keep_last: bool = true,
    }
}

const ATTENTION: ColId = ColId(0);

impl KvPolicy for Tova {
    fn spec(&self, _: &Layout) -> Result<KvSpec> {
        self.budget.check("tova.budget")?;
        let wake = Trigger::Over { budget: self.budget, slack_rows: self.slack_rows };
        Ok(KvSpec::dense().column(Source::Attention(Probe::last_queries(1).layer_mean())).wake(wake).evicts())
    }

    fn plan(&mut self, _: Wake, view: &View<'_>, plan: &mut Plan) -> Result<()> {
        let last = u32::from(self.keep_last);
        let n = self.budget.rows(view.seen).saturating_sub(last);
        plan.keep(At::all(), Pick::Last(last).or(Pick::Top { col: ATTENTION, n, per: Per::Head }));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvasir_testkit::resolve;

    const LAST_QUERY: [f32; 6] = [0.30, 0.05, 0.25, 0.05, 0.31, 0.04];

    #[test]
    fn keeps_what_the_last_query_attends_to_and_the_newest_row() {
        let three = Tova { budget: Budget::Rows(3), ..Tova::default() };
        assert_eq!(resolve(three.clone(), &LAST_QUERY), [0, 4, 5]);
        let half = Tova { budget: Budget::Ratio(0.5), ..three };
        assert_eq!(resolve(half, &LAST_QUERY), [0, 4, 5], "a share of the rows seen");
    }

    #[test]
    fn the_rule_of_the_paper_may_drop_the_newest_row() {
        let policy = Tova { budget: Budget::Rows(3), keep_last: false, ..Tova::default() };
        assert_eq!(resolve(policy, &LAST_QUERY), [0, 2, 4]);
    }

    #[test]
    fn a_budget_of_one_keeps_the_newest_row() {
        let policy = Tova { budget: Budget::Rows(1), ..Tova::default() };
        assert_eq!(resolve(policy, &LAST_QUERY), [5]);
    }

    #[test]
    fn ties_keep_the_older_row() {
        let policy = Tova { budget: Budget::Rows(2), keep_last: false, ..Tova::default() };
        assert_eq!(resolve(policy, &[0.2, 0.4, 0.2, 0.2]), [0, 1]);
    }
}
