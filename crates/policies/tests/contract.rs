//! What every method must hold, whatever it does. One row of the table per method, with a mild and a harsh setting; a plan is
//! applied by naive rules to a session of two layers with two kv heads each.

#![allow(clippy::unwrap_used)] // a panic is how a test fails

use std::collections::BTreeSet;

use kvasir_core::{
    ColId, Error, KvPolicy, KvSpec, LayerLayout, Layout, Op, Plan, Positions, Rope, RunId, SideId, TILE_ROWS,
    Trigger, View, Wake,
};
use kvasir_policies::{METHODS, find};
use kvasir_testkit::{Noise, pick_heads};
use serde_json::{Value, json};

/// A setting, and the rows per kv head that it allows once its plan is applied, as a function of the rows seen.
type Setting = (Value, fn(u32) -> u32);

/// The table, alphabetical.
fn table() -> Vec<(&'static str, Setting, Setting)> {
    vec![
        // slug, mild setting, harsh setting
        ("int8", (json!({ "sinkRows": 32 }), |seen| seen), (json!({ "sinkRows": 0 }), |seen| seen)),
        (
            "streaming-llm",
            (json!({ "recent": 60 }), |seen| seen.min(64)),
            (json!({ "sinks": 1, "recent": 1, "positions": "packed" }), |seen| seen.min(2)),
        ),
        (
            "tova",
            (json!({ "budget": { "rows": 96 } }), |seen| seen.min(96)),
            (json!({ "budget": { "ratio": 0.1 } }), |seen| seen.div_ceil(10)),
        ),
    ]
}

const LAYERS: usize = 2;
const HEADS: usize = 2;
/// Rows of each pass: one row, a prefill that is no multiple of a tile, decode steps.
const PASSES: [u32; 12] = [1, 31, 1, 100, 1, 1, 1, 27, 1, 64, 1, 1];

/// A row of a table: position and run.
type Row = (u32, RunId);

/// A policy and the rows of its session.
struct Session {
    policy: Box<dyn KvPolicy>,
    spec: KvSpec,
    layout: Layout,
    /// `[L * K]` tables in position order.
    tables: Vec<Vec<Row>>,
    seen: u32,
}

fn layout() -> Layout {
    let rope = Rope::Half(SideId(0));
    let layer = LayerLayout { q_heads: 4, kv_heads: HEADS as u16, k_dim: 8, v_dim: 8, rope, window: None };
    Layout::uniform(LAYERS, layer, vec![1.0, 0.1, 0.01, 0.001].into(), 4096)
}

/// The score of a position; each layer has its own.
fn score(layer: usize, position: u32) -> f32 {
    (Noise::new(7 + layer as u64).bits_at(u64::from(position)) >> 40) as f32
}

impl Session {
    fn new(slug: &str, options: &Value) -> Self {
        let policy = (find(slug).unwrap().build)(options).unwrap();
        let layout = layout();
        let spec = policy.spec(&layout).unwrap();
        Self { policy, spec, layout, tables: vec![Vec::new(); LAYERS * HEADS], seen: 0 }
    }

    /// Appends `rows`, wakes the policy by each trigger that fires and applies what it says. Returns the plans.
    fn pass(&mut self, rows: u32) -> Vec<Plan> {
        for table in &mut self.tables {
            table.extend((self.seen..self.seen + rows).map(|p| (p, RunId::OPEN)));
        }
        self.seen += rows;
        let mut plans = Vec::new();
        for i in 0..self.spec.wake.len() {
            let open = |t: &Vec<Row>| t.iter().filter(|r| r.1 == RunId::OPEN).count() as u32;
            let held = self.tables.iter().map(Vec::len).max().unwrap_or(0) as u32;
            let longest = self.tables.iter().map(open).max().unwrap_or(0);
            let fires = match self.spec.wake[i] {
                Trigger::PassEnd => true,
                Trigger::PrefillEnd => rows > 1,
                Trigger::Over { budget, slack_rows } => held > budget.rows(self.seen) + slack_rows,
                Trigger::Open { rows } => longest >= rows,
                Trigger::Wanted => false,
            };
            if fires {
                let mut plan = Plan::default();
                let (tables, columns) = (&self.tables, self.spec.columns.len());
                let col = |l: u16, h: u16, id: ColId| {
                    assert!((id.0 as usize) < columns, "{id:?} was not asked for");
                    let table = &tables[l as usize * HEADS + h as usize];
                    Ok(table.iter().map(|r| score(l as usize, r.0)).collect())
                };
                let view =
                    View { layout: &self.layout, seen: self.seen, rows: held, open: longest, col: &col };
                self.policy.plan(Wake(i), &view, &mut plan).unwrap();
                self.apply(&plan);
                plans.push(plan);
            }
        }
        plans
    }

    fn apply(&mut self, plan: &Plan) {
        for op in &plan.ops {
            let (Op::Keep(at, pick) | Op::Move(at, pick, _)) = op else {
                panic!("{op:?}: teach this test the op")
            };
            for layer in 0..LAYERS {
                let tables = &mut self.tables[layer * HEADS..(layer + 1) * HEADS];
                // Indices of the rows the op speaks of, per head; the pick counts among them.
                let of: Vec<Vec<usize>> = tables
                    .iter()
                    .map(|t| (0..t.len()).filter(|&i| at.run.is_none_or(|run| t[i].1 == run)).collect())
                    .collect();
                let rows: Vec<u32> = of.iter().map(|list| list.len() as u32).collect();
                let columns = self.spec.columns.len();
                let col = |h: usize, id: ColId| {
                    assert!((id.0 as usize) < columns, "{id:?} was not asked for");
                    of[h].iter().map(|&i| score(layer, tables[h][i].0)).collect()
                };
                for (h, picked) in pick_heads(pick, &rows, &col).into_iter().enumerate() {
                    if !at.has(layer as u16, h as u16) {
                        continue;
                    }
                    let picked: BTreeSet<usize> = picked.iter().map(|&i| of[h][i as usize]).collect();
                    match op {
                        Op::Keep(..) => {
                            let of: BTreeSet<usize> = of[h].iter().copied().collect();
                            let mut i = 0;
                            tables[h].retain(|_| {
                                i += 1;
                                !of.contains(&(i - 1)) || picked.contains(&(i - 1))
                            });
                        }
                        Op::Move(_, _, to) => {
                            assert!(
                                (1..=self.spec.runs.len()).contains(&(to.0 as usize)),
                                "{to:?} was not declared"
                            );
                            for &i in &picked {
                                assert!(tables[h][i].1 < *to, "rows move only towards colder runs");
                                tables[h][i].1 = *to;
                            }
                        }
                        _ => {}
                    }
                }
            }
        }
    }
}

/// Every setting with its slug, and how messages call it.
fn settings() -> impl Iterator<Item = (&'static str, String, Setting)> {
    table().into_iter().flat_map(|(slug, mild, harsh)| {
        [(slug, format!("{slug} {}", mild.0), mild), (slug, format!("{slug} {}", harsh.0), harsh)]
    })
}

#[test]
fn every_method_has_a_row() {
    let rows: Vec<_> = table().iter().map(|r| r.0).collect();
    let methods: Vec<_> = METHODS.iter().map(|m| m.slug).collect();
    assert_eq!(rows, methods);
}

#[test]
fn options_survive_a_round_trip_and_defaults_are_spelled_out() {
    for (slug, name, (options, _)) in settings() {
        let method = find(slug).unwrap();
        let full = (method.canonical)(&options).unwrap();
        assert_eq!((method.canonical)(&full).unwrap(), full, "{name}");
        for (key, value) in options.as_object().unwrap() {
            assert_eq!(&full[key], value, "{name}");
        }
        let docs = (method.options)();
        let names: BTreeSet<_> = docs.iter().map(|d| d.name.clone()).collect();
        assert_eq!(full.as_object().unwrap().keys().cloned().collect::<BTreeSet<_>>(), names, "{name}");
        let defaults = (method.canonical)(&json!({})).unwrap();
        for doc in &docs {
            assert_eq!(defaults[&doc.name], doc.default, "{slug}.{}", doc.name);
        }
        (method.build)(&json!({})).unwrap().spec(&layout()).unwrap();
    }
}

#[test]
fn wrong_options_are_refused_by_name() {
    for method in METHODS {
        let refused = |options: &Value| match (method.build)(options) {
            Err(Error::Invalid { field, expected, .. }) => (field, expected),
            other => panic!("{}: {options} gave {:?}", method.slug, other.map(|_| "a policy")),
        };
        let (field, expected) = refused(&json!({ "noSuchOption": 1 }));
        assert_eq!(field, format!("{}.noSuchOption", method.slug));
        for doc in (method.options)() {
            assert!(expected.contains(&doc.name), "{}: {expected} does not name {}", method.slug, doc.name);
            let (field, expected) = refused(&json!({ &doc.name: [null] }));
            assert_eq!((field, expected), (format!("{}.{}", method.slug, doc.name), doc.kind.clone()));
            let choices = doc.kind.strip_prefix("enum(").and_then(|k| k.strip_suffix(')'));
            for choice in choices.into_iter().flat_map(|c| c.split('|')) {
                assert!(
                    (method.build)(&json!({ &doc.name: choice })).is_ok(),
                    "{}.{} {choice}",
                    method.slug,
                    doc.name
                );
            }
        }
        refused(&json!("options"));
    }
}

#[test]
fn tables_stay_inside_the_budget_and_only_evicting_methods_lose_rows() {
    for (slug, name, (options, most)) in settings() {
        let mut s = Session::new(slug, &options);
        assert!(s.spec.positions == Positions::Original || s.spec.evicts, "{name}: nothing to pack");
        for rows in PASSES {
            s.pass(rows);
            for table in &s.tables {
                assert!(table.len() as u32 <= most(s.seen), "{name}: {} rows of {}", table.len(), s.seen);
                assert!(table.windows(2).all(|w| w[0].0 < w[1].0), "{name}: positions ascend");
                assert!(s.spec.evicts || table.len() as u32 == s.seen, "{name}: rows were lost");
                assert_eq!(table.last().map(|r| r.0), Some(s.seen - 1), "{name}: the newest row stays");
                for run in 1..=s.spec.runs.len() {
                    let coded = table.iter().filter(|r| r.1 == RunId(run as u8)).count();
                    assert!(s.spec.evicts || coded % TILE_ROWS == 0, "{name}: coded tiles are full");
                }
            }
        }
        let lost = s.tables.iter().any(|t| (t.len() as u32) < s.seen);
        let coded = s.tables.iter().flatten().any(|r| r.1 != RunId::OPEN);
        assert!(lost || coded, "{name}: the setting changes nothing");
    }
}

#[test]
fn the_harsh_setting_differs_from_the_mild_one() {
    for (slug, mild, harsh) in table() {
        let spec = |o: &Value| Session::new(slug, o).spec;
        let rows = |o: &Value| {
            let mut s = Session::new(slug, o);
            for n in PASSES {
                s.pass(n);
            }
            s.tables
        };
        assert!(spec(&mild.0) != spec(&harsh.0) || rows(&mild.0) != rows(&harsh.0), "{slug}");
    }
}

#[test]
fn the_same_session_gives_the_same_plans_also_when_saved_halfway() {
    for (slug, name, (options, _)) in settings() {
        let mut one = Session::new(slug, &options);
        let mut two = Session::new(slug, &options);
        for (i, &rows) in PASSES.iter().enumerate() {
            if i == PASSES.len() / 2 {
                let state: Value = serde_json::from_str(&two.policy.save().to_string()).unwrap();
                two.policy = (find(slug).unwrap().build)(&options).unwrap();
                two.policy.load(&state).unwrap();
            }
            let plans = one.pass(rows);
            assert_eq!(two.pass(rows), plans, "{name}");
            let text = serde_json::to_string(&plans).unwrap();
            assert_eq!(serde_json::from_str::<Vec<Plan>>(&text).unwrap(), plans, "{name}: a plan is JSON");
        }
        assert_eq!(one.tables, two.tables, "{name}");
    }
}

#[test]
fn no_row_and_one_row_are_fine() {
    for (slug, name, (options, most)) in settings() {
        let mut s = Session::new(slug, &options);
        s.pass(0);
        assert!(s.tables.iter().all(Vec::is_empty), "{name}");
        s.pass(1);
        assert!(s.tables.iter().all(|t| t.len() == 1), "{name}");
        // Asked without need, as by a driver that wakes it early.
        let col = |_: u16, _: u16, _: ColId| Ok(vec![0.0]);
        let view = View { layout: &s.layout, seen: 1, rows: 1, open: 1, col: &col };
        let mut plan = Plan::default();
        s.policy.plan(Wake(0), &view, &mut plan).unwrap();
        s.apply(&plan);
        assert!(s.tables.iter().all(|t| t.len() as u32 <= most(1)), "{name}");
    }
}
