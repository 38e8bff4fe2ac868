//! Naive resolution of picks, and `resolve`: which rows a policy keeps, for the tests at the bottom of a policy's file.
//!
//! Every pick is evaluated on its own, row by row, straight from the words in `core::Pick`; it shares nothing with the
//! engine's resolver, so the two can be compared.

use std::collections::BTreeSet;

use kvasir_core::{ColId, KvPolicy, LayerLayout, Layout, Op, Per, Pick, Plan, Rope, SideId, View, Wake};

/// Column of a head.
type Columns<'a> = dyn Fn(usize, ColId) -> Vec<f32> + 'a;
/// A row: head, index in position order.
type Row = (usize, u32);

/// Rows picked in each kv head of a layer. `rows[h]` rows are in head `h`; `col(h, id)` gives their values. Ascending.
pub fn pick_heads(pick: &Pick, rows: &[u32], col: &Columns<'_>) -> Vec<Vec<u32>> {
    let picked = eval(pick, rows, col, &BTreeSet::new());
    (0..rows.len()).map(|h| picked.iter().filter(|r| r.0 == h).map(|r| r.1).collect()).collect()
}

/// Rows picked among `rows` rows of one kv head, ascending.
pub fn pick_rows(pick: &Pick, rows: u32, col: &dyn Fn(ColId) -> Vec<f32>) -> Vec<u32> {
    pick_heads(pick, &[rows], &|_, id| col(id)).remove(0)
}

fn all(rows: &[u32]) -> BTreeSet<Row> {
    rows.iter().enumerate().flat_map(|(h, &n)| (0..n).map(move |i| (h, i))).collect()
}

/// Rows of `among` by falling value, the older first where values are equal.
fn by_value(
    among: impl Iterator<Item = Row>,
    col: &dyn Fn(usize) -> Vec<f32>,
    heads: usize,
) -> Vec<(Row, f32)> {
    let values: Vec<Vec<f32>> = (0..heads).map(col).collect();
    let mut list: Vec<(Row, f32)> = among.map(|r| (r, values[r.0][r.1 as usize])).collect();
    list.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.1.cmp(&b.0.1)).then(a.0.0.cmp(&b.0.0)));
    list
}

/// `taken`: rows that the left side of an `Either` around this pick holds; a `Top` does not compete for them.
fn eval(pick: &Pick, rows: &[u32], col: &Columns<'_>, taken: &BTreeSet<Row>) -> BTreeSet<Row> {
    let heads = rows.len();
    let all = all(rows);
    match pick {
        Pick::All => all,
        Pick::First(n) => all.into_iter().filter(|r| r.1 < *n).collect(),
        Pick::Last(n) => all.into_iter().filter(|r| r.1 + n >= rows[r.0]).collect(),
        Pick::Rows(list) => all.into_iter().filter(|r| list.contains(&r.1)).collect(),
        Pick::Top { col: id, n, per } => {
            let free: Vec<Row> = all.difference(taken).copied().collect();
            let value = |h: usize| col(h, *id);
            match per {
                Per::Head => (0..heads)
                    .flat_map(|h| {
                        let mine = free.iter().copied().filter(move |r| r.0 == h);
                        by_value(mine, &value, heads).into_iter().take(*n as usize)
                    })
                    .map(|x| x.0)
                    .collect(),
                Per::Joint => {
                    let list = by_value(free.into_iter(), &value, heads);
                    list.into_iter().take(*n as usize * heads).map(|x| x.0).collect()
                }
            }
        }
        Pick::Mass { col: id, share } => (0..heads)
            .flat_map(|h| {
                let list = by_value((0..rows[h]).map(|i| (h, i)), &|h| col(h, *id), heads);
                let total: f64 = list.iter().map(|x| f64::from(x.1)).sum();
                let mut held = 0.0;
                list.into_iter().take_while(move |x| {
                    let wanted = held < f64::from(*share) * total;
                    held += f64::from(x.1);
                    wanted
                })
            })
            .map(|x| x.0)
            .collect(),
        Pick::Above { col: id, t } => {
            let values: Vec<Vec<f32>> = (0..heads).map(|h| col(h, *id)).collect();
            all.into_iter().filter(|r| values[r.0][r.1 as usize] > *t).collect()
        }
        Pick::Not(p) => &all - &eval(p, rows, col, taken),
        Pick::Both(a, b) => &eval(a, rows, col, taken) & &eval(b, rows, col, taken),
        Pick::Either(a, b) => {
            let left = eval(a, rows, col, taken);
            let right = eval(b, rows, col, &(taken | &left));
            &left | &right
        }
    }
}

/// Rows that a policy keeps of a one-layer, one-head session that has seen `column.len()` rows, when every column it asked
/// for holds `column`: checks its spec, wakes it by its first trigger and applies the first `Keep` of its plan. Without a
/// `Keep` all rows stay.
pub fn resolve(mut policy: impl KvPolicy, column: &[f32]) -> Vec<u32> {
    let layer = LayerLayout {
        q_heads: 1,
        kv_heads: 1,
        k_dim: 8,
        v_dim: 8,
        rope: Rope::Half(SideId(0)),
        window: None,
    };
    let inv_freq: Vec<f32> = (0..4).map(|i| 10_000f32.powf(-f32::from(i as u8) / 4.0)).collect();
    let layout = Layout::uniform(1, layer, inv_freq.into(), 4096);
    let spec = policy.spec(&layout).expect("the policy accepts its parameters");
    assert!(!spec.wake.is_empty(), "the policy wakes on nothing");
    let rows = column.len() as u32;
    let read = |l: u16, h: u16, id: ColId| {
        assert_eq!((l, h), (0, 0), "the session has one table");
        assert!((id.0 as usize) < spec.columns.len(), "column {id:?} was not asked for");
        Ok(column.to_vec())
    };
    let view = View { layout: &layout, seen: rows, rows, open: rows, col: &read };
    let mut plan = Plan::default();
    policy.plan(Wake(0), &view, &mut plan).expect("the policy plans");
    let json = serde_json::to_string(&plan).expect("a plan is JSON");
    assert_eq!(serde_json::from_str::<Plan>(&json).expect("JSON is a plan"), plan);
    let keep = plan.ops.iter().find_map(|op| match op {
        Op::Keep(at, pick) if at.has(0, 0) => Some(pick),
        _ => None,
    });
    keep.map_or_else(|| (0..rows).collect(), |pick| pick_rows(pick, rows, &|_| column.to_vec()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvasir_core::{At, Budget, KvSpec, Probe, Result, Source, Trigger};

    fn top(n: u32, per: Per) -> Pick {
        Pick::Top { col: ColId(0), n, per }
    }

    fn on(pick: &Pick, column: &[f32]) -> Vec<u32> {
        pick_rows(pick, column.len() as u32, &|_| column.to_vec())
    }

    #[test]
    fn a_pick_is_what_its_words_say() {
        let c = [0.5, 0.1, 0.5, 0.2, 0.9];
        assert_eq!(on(&Pick::First(2), &c), [0, 1]);
        assert_eq!(on(&Pick::Last(2), &c), [3, 4]);
        assert_eq!(on(&Pick::Last(9), &c), [0, 1, 2, 3, 4]);
        assert_eq!(on(&top(2, Per::Head), &c), [0, 4], "ties keep the older row");
        assert_eq!(on(&Pick::Above { col: ColId(0), t: 0.2 }, &c), [0, 2, 4]);
        assert_eq!(on(&Pick::Mass { col: ColId(0), share: 0.5 }, &c), [0, 4]);
        assert_eq!(on(&Pick::Mass { col: ColId(0), share: 1.0 }, &[1.0, 2.0]), [0, 1]);
        assert_eq!(on(&Pick::Rows(vec![3, 1, 77]), &c), [1, 3]);
        assert_eq!(on(&Pick::First(1).others(), &c), [1, 2, 3, 4]);
        assert_eq!(on(&Pick::First(3).and(Pick::Last(3)), &c), [2]);
    }

    #[test]
    fn a_top_on_the_right_competes_for_what_is_left() {
        let c = [0.5, 0.1, 0.4, 0.2, 0.9];
        assert_eq!(on(&Pick::Last(1).or(top(1, Per::Head)), &c), [0, 4]);
        assert_eq!(on(&top(1, Per::Head).or(Pick::Last(1)), &c), [4]);
        let three = Pick::Last(1).or(Pick::First(1)).or(top(1, Per::Head));
        assert_eq!(on(&three, &c), [0, 2, 4]);
    }

    #[test]
    fn joint_rows_are_taken_wherever_they_are() {
        let cols = [vec![0.9, 0.8, 0.7], vec![0.1, 0.2, 0.3]];
        let pick = |per| pick_heads(&top(1, per), &[3, 3], &|h, _| cols[h].clone());
        assert_eq!(pick(Per::Head), [vec![0], vec![2]]);
        assert_eq!(pick(Per::Joint), [vec![0, 1], vec![]]);
    }

    struct Newest(u32);

    impl KvPolicy for Newest {
        fn spec(&self, _: &Layout) -> Result<KvSpec> {
            let column = Source::Attention(Probe::all_queries());
            let wake = Trigger::Over { budget: Budget::Rows(self.0), slack_rows: 0 };
            Ok(KvSpec::dense().column(column).wake(wake).evicts())
        }
        fn plan(&mut self, _: Wake, view: &View<'_>, plan: &mut Plan) -> Result<()> {
            assert_eq!((view.col)(0, 0, ColId(0))?.len(), view.rows as usize);
            plan.keep(At::all(), Pick::Last(self.0));
            Ok(())
        }
    }

    #[test]
    fn resolve_runs_the_plan() {
        assert_eq!(resolve(Newest(2), &[0.0; 5]), [3, 4]);
    }
}
