//! int8: dense rows in 8 bits, the strongest simple baseline.
//!
//! Paper: common practice; absmax scaling of rows as in Dettmers et al., "LLM.int8(): 8-bit Matrix Multiplication for
//! Transformers at Scale", NeurIPS 2022, arXiv 2208.07339.
//!
//! - Reads: no columns.
//! - Plans: after each pass, codes the oldest rows of the open run, 32 at a time.
//! - State: none. A coded row takes D + 4 bytes for its key and as many for its value, D padded to a multiple of 32.
//! - Deviations: one scale per row and kv head, keys after RoPE, no outlier channels; the first rows stay exact, since
//!   attention sinks carry the largest keys.

use kvasir_core::{
    At, Code, Error, Format, KvPolicy, KvSpec, Layout, Pick, Plan, Result, RunId, TILE_ROWS, Trigger, View,
    Wake,
};

options! {
    /// Parameters of int8.
    pub struct Int8 {
        /// First rows of the session that stay exact (attention sinks), at most one tile of 32. 0 codes every row.
        pub sink_rows: u32 = 4,
    }
}

const CODED: RunId = RunId(1);

impl KvPolicy for Int8 {
    fn spec(&self, _: &Layout) -> Result<KvSpec> {
        if self.sink_rows as usize > TILE_ROWS {
            return Err(Error::invalid("int8.sinkRows", format_args!("at most {TILE_ROWS}"), self.sink_rows));
        }
        let codes = [Code::rotated(Format::INT8), Code::plain(Format::INT8)];
        Ok(KvSpec::dense().run(codes).sinks(self.sink_rows).wake(Trigger::PassEnd))
    }

    fn plan(&mut self, _: Wake, view: &View<'_>, plan: &mut Plan) -> Result<()> {
        // Whole tiles only: a sealed tile is never coded again, so a part of one would stay small for ever.
        let rows = view.open - view.open % TILE_ROWS as u32;
        if rows > 0 {
            plan.move_to(At::run(RunId::OPEN), Pick::First(rows), CODED);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvasir_core::Op;

    fn plan(open: u32) -> Plan {
        let layout = Layout { layers: vec![], sides: vec![], context: 0, fingerprint: [0; 32] };
        let view =
            View { layout: &layout, seen: 100, rows: 100, open, col: &|_, _, _| unreachable!("no column") };
        let mut plan = Plan::default();
        Int8::default().plan(Wake(0), &view, &mut plan).unwrap();
        plan
    }

    #[test]
    fn codes_whole_tiles_and_leaves_the_rest_open() {
        assert_eq!(plan(31), Plan::default());
        assert_eq!(plan(100).ops, [Op::Move(At::run(RunId::OPEN), Pick::First(96), RunId(1))]);
    }

    #[test]
    fn sinks_fill_one_tile_at_most() {
        let layout = Layout { layers: vec![], sides: vec![], context: 0, fingerprint: [0; 32] };
        assert_eq!(Int8 { sink_rows: 32 }.spec(&layout).unwrap().sinks, 32);
        let text = Int8 { sink_rows: 33 }.spec(&layout).unwrap_err().to_string();
        assert_eq!(text, "int8.sinkRows: expected at most 32, got 33");
    }
}
