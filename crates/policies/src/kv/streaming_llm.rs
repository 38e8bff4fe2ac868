//! StreamingLLM: keep the first rows (attention sinks) and the most recent ones.
//!
//! Paper: Xiao et al., "Efficient Streaming Language Models with Attention Sinks", ICLR 2024, arXiv 2309.17453.
//!
//! - Reads: no columns.
//! - Plans: when a table is longer than sinks and window together, drops what lies between them; the same rows everywhere.
//! - State: none; 2 D numbers per kept row and kv head, `sinks + recent` rows however long the session is.
//! - Deviations: rows keep their original positions unless `packed` is asked for (the paper packs: a row's position is its
//!   index in the cache, which unbounded streams need); plans between passes, so the queries of a long pass also see the
//!   rows that it will drop.

use kvasir_core::{
    At, Budget, KvPolicy, KvSpec, Layout, Pick, Plan, Positions, Result, Trigger, View, Wake, check,
};

options! {
    /// Parameters of StreamingLLM; defaults are the paper's 4 sinks in a cache of 1024 rows.
    pub struct StreamingLlm {
        /// First rows that are always kept.
        pub sinks: u32 = 4,
        /// Most recent rows that are kept.
        pub recent: u32 = 1020,
        /// Rows above `sinks + recent` that are tolerated before the next plan; more means fewer compactions.
        pub slack_rows: u32 = 0,
        /// Position of a kept row: the one it was computed at, or its index among the kept rows (`packed`, which stores keys
        /// before RoPE). Choose `packed` for streams longer than the model's context.
        pub positions: Positions = Positions::Original,
    }
}

impl KvPolicy for StreamingLlm {
    fn spec(&self, _: &Layout) -> Result<KvSpec> {
        check::at_least("streaming-llm.recent", self.recent as usize, 1)?;
        let budget = Budget::Rows(self.sinks.saturating_add(self.recent));
        let wake = Trigger::Over { budget, slack_rows: self.slack_rows };
        Ok(KvSpec::dense().wake(wake).positions(self.positions).evicts())
    }

    fn plan(&mut self, _: Wake, _: &View<'_>, plan: &mut Plan) -> Result<()> {
        plan.keep(At::all(), Pick::First(self.sinks).or(Pick::Last(self.recent)));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvasir_testkit::resolve;

    #[test]
    fn keeps_the_sinks_and_the_recent_window() {
        let policy = StreamingLlm { sinks: 2, recent: 3, ..StreamingLlm::default() };
        assert_eq!(resolve(policy.clone(), &[0.0; 9]), [0, 1, 6, 7, 8]);
        assert_eq!(resolve(policy.clone(), &[0.0; 5]), [0, 1, 2, 3, 4], "nothing to drop");
        assert_eq!(resolve(StreamingLlm { sinks: 0, ..policy }, &[0.0; 9]), [6, 7, 8], "a pure window");
    }

    #[test]
    fn a_window_of_nothing_is_refused() {
        let policy = StreamingLlm { recent: 0, ..StreamingLlm::default() };
        let layout = Layout { layers: vec![], sides: vec![], context: 0, fingerprint: [0; 32] };
        let text = policy.spec(&layout).unwrap_err().to_string();
        assert_eq!(text, "streaming-llm.recent: expected at least 1, got 0");
    }
}
