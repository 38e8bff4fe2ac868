//! Recipes and the stack of policies built from them.
//!
//! A recipe is a JSON list of `{ "use": slug, …options }` in order of effect; its hash is the lineage of rows computed
//! under it. Two options belong to the engine and are allowed in every entry: `floor`, the largest relative error of the
//! attention output an op of this policy may cause (the op is refused above it), and nothing else.

use kvasir_core::{
    Codes, ColId, Error, Format, KeySpace, KvPolicy, KvSpec, Layout, Mask, Positions, Result, Source,
};
use serde_json::{Map, Value as Json};

/// Runs are numbered in a byte; the open run and the one of the sinks are among them.
const MOST_RUNS: usize = 200;

/// Policies and their floors, in order of effect.
pub(crate) type Policies = Vec<(Box<dyn KvPolicy>, Option<f32>)>;

/// A composition of policies, as data.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Recipe(Vec<Map<String, Json>>);

impl Recipe {
    /// Checks the shape, fills in defaults and builds every policy once, so that a misspelt option cannot pass.
    pub fn parse(json: &Json) -> Result<Self> {
        let list = json.as_array().ok_or_else(|| Error::invalid("recipe", "a list of { use, … }", json))?;
        let mut steps = Vec::with_capacity(list.len());
        for (i, step) in list.iter().enumerate() {
            let step =
                step.as_object().ok_or_else(|| Error::invalid(format!("recipe[{i}]"), "an object", step))?;
            steps.push(step.clone());
        }
        let recipe = Self(steps);
        recipe.policies()?;
        let canonical = |step: &Map<String, Json>| -> Result<Map<String, Json>> {
            let mut options = step.clone();
            let own: Vec<(String, Json)> =
                ["use", "floor"].iter().filter_map(|k| options.remove_entry(*k)).collect();
            let slug = step["use"].as_str().unwrap_or_default();
            let mut full = match (kvasir_policies::find(slug)?.canonical)(&Json::Object(options))? {
                Json::Object(full) => full,
                other => return Err(Error::invalid("recipe", "options", other)),
            };
            full.extend(own);
            Ok(full)
        };
        Ok(Self(recipe.0.iter().map(canonical).collect::<Result<_>>()?))
    }

    /// The recipe as JSON.
    pub fn to_json(&self) -> Json {
        Json::Array(self.0.iter().cloned().map(Json::Object).collect())
    }

    /// No policy: rows stay as they were computed.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Digest of the canonical JSON (keys sorted) and of the engine's build.
    pub fn hash(&self) -> [u8; 32] {
        let mut h = blake3::Hasher::new_derive_key("kvasir recipe lineage v1");
        h.update(env!("CARGO_PKG_VERSION").as_bytes());
        h.update(self.to_json().to_string().as_bytes());
        *h.finalize().as_bytes()
    }

    /// The policies and their floors, in order of effect.
    pub(crate) fn policies(&self) -> Result<Policies> {
        let build = |(i, step): (usize, &Map<String, Json>)| {
            let mut options = step.clone();
            let slug = match options.remove("use") {
                Some(Json::String(s)) => s,
                other => {
                    let got = other.map_or("nothing".to_owned(), |o| o.to_string());
                    return Err(Error::invalid(format!("recipe[{i}].use"), "the slug of a method", got));
                }
            };
            let floor = match options.remove("floor") {
                None => None,
                Some(f) => match f.as_f64() {
                    Some(x) if x >= 0.0 => Some(x as f32),
                    _ => {
                        return Err(Error::invalid(
                            format!("recipe[{i}].floor"),
                            "a relative error of 0 or more",
                            f,
                        ));
                    }
                },
            };
            Ok(((kvasir_policies::find(&slug)?.build)(&Json::Object(options))?, floor))
        };
        self.0.iter().enumerate().map(build).collect()
    }
}

/// One policy of a stack and where its own run and column numbers begin.
pub(crate) struct Slot {
    pub(crate) policy: Box<dyn KvPolicy>,
    pub(crate) spec: KvSpec,
    pub(crate) floor: Option<f32>,
    pub(crate) first_run: u8,
    pub(crate) first_col: u16,
}

/// The policies of a session and their united needs.
pub(crate) struct Stack {
    pub(crate) slots: Vec<Slot>,
    /// Codes of run 0, of the policies' runs, and of the sink run where there is one.
    pub(crate) runs: Vec<Codes>,
    pub(crate) columns: Vec<Source>,
    pub(crate) positions: Positions,
    pub(crate) mask: Mask,
    /// First rows kept exact beside lossy runs.
    pub(crate) sinks: u32,
    /// Index of the run that holds them.
    pub(crate) sink_run: Option<usize>,
}

impl Stack {
    pub(crate) fn new(policies: Policies, layout: &Layout, dtype: Format, keys: KeySpace) -> Result<Self> {
        let mut slots: Vec<Slot> = Vec::with_capacity(policies.len());
        let (mut positions, mut mask, mut sinks) = (Positions::Original, Mask::Causal, 0);
        let mut coded: Vec<Codes> = Vec::new();
        let mut columns = Vec::new();
        for (policy, floor) in policies {
            let spec = policy.spec(layout)?;
            for (i, code) in spec.runs.iter().flatten().enumerate() {
                code.check(&format!("recipe.runs[{i}]"))?;
            }
            if spec.positions == Positions::Packed {
                positions = Positions::Packed;
            }
            if spec.mask == Mask::Full {
                mask = Mask::Full;
            }
            sinks = sinks.max(spec.sinks);
            slots.push(Slot {
                first_run: coded.len() as u8,
                first_col: columns.len() as u16,
                policy,
                floor,
                spec: spec.clone(),
            });
            coded.extend(spec.runs);
            columns.extend(spec.columns);
        }
        if coded.len() > MOST_RUNS {
            return Err(Error::invalid(
                "recipe",
                format_args!("at most {MOST_RUNS} coded runs"),
                coded.len(),
            ));
        }
        let space = if positions == Positions::Packed { KeySpace::Plain } else { keys };
        if positions == Positions::Packed {
            if let Some([key, _]) = coded.iter().find(|c| c[0].space == KeySpace::Rotated) {
                return Err(Error::invalid(
                    "recipe",
                    "un-rotated keys, since positions are packed",
                    format!("{key:?}"),
                ));
            }
            // Packed positions count rows in the order of the runs, which is not their own where there are several.
            if !coded.is_empty() {
                return Err(Error::unsupported("coded runs under packed positions"));
            }
            if slots.iter().any(|s| s.floor.is_some()) {
                return Err(Error::invalid(
                    "recipe.floor",
                    "no floor, since positions are packed",
                    "a floor",
                ));
            }
            if sinks > 0 {
                return Err(Error::invalid("recipe.sinkRows", "0, since positions are packed", sinks));
            }
        }
        let open =
            [kvasir_core::Code { space, ..kvasir_core::Code::plain(dtype) }, kvasir_core::Code::plain(dtype)];
        let mut runs = vec![open.clone()];
        runs.extend(coded);
        let lossy = runs.iter().flatten().any(|c| !c.format.is_dense());
        let sink_run = (sinks > 0 && lossy).then_some(runs.len());
        if sink_run.is_some() {
            runs.push(open);
        }
        Ok(Self { slots, runs, columns, positions, mask, sinks: if lossy { sinks } else { 0 }, sink_run })
    }

    /// Rows of `run` at positions below `sinks` live in the sink run; their slots here are hidden.
    pub(crate) fn hides(&self, run: usize, pos: u32) -> bool {
        pos < self.sinks && self.sink_run.is_some_and(|s| s != run) && !self.runs[run][0].format.is_dense()
    }

    /// Some policy may change what a query reads.
    pub(crate) fn is_lossy(&self) -> bool {
        self.slots.iter().any(|s| s.spec.evicts) || self.runs.iter().flatten().any(|c| !c.format.is_dense())
    }
}

impl Slot {
    pub(crate) fn run(&self, local: u8) -> usize {
        // A policy's own runs are 1-based; run 0 is everybody's open run.
        if local == 0 { 0 } else { (self.first_run + local) as usize }
    }

    pub(crate) fn col(&self, local: ColId) -> ColId {
        ColId(self.first_col + local.0)
    }
}
