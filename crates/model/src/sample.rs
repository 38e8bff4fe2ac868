//! Choice of the next id from a row of logits.
//!
//! Temperature 0 takes the largest logit, the lowest id of equals. Otherwise candidates are taken in order of logit (lowest
//! id first among equals) until `top_k` of them, or a share `top_p` of the probability, is in hand, and one is drawn.
//!
//! Draw `n` of seed `s` is `mix(s + (n + 1) * 0x9E3779B97F4A7C15)`, the (n + 1)th output of SplitMix64 (Steele, Lea,
//! Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014); its top 53 bits are a number in [0, 1). So a draw
//! depends on seed and count only, and the whole state of a [`Sampler`] is that count.
//!
//! Errors: `NonFinite` for a NaN, an infinite logit, or a row in which everything is hidden (`-inf`).

use std::cmp::Ordering;
use std::collections::BinaryHeap;

use kvasir_core::{Error, Result, check};
use serde::{Deserialize, Serialize};
use serde_json::{Value as Json, json};

use kvasir_core::eval::top1;

/// How ids are chosen. The default is greedy.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct SampleOptions {
    /// Divides the logits; 0 is greedy.
    pub temperature: f32,
    /// Candidates kept; 0 keeps all.
    pub top_k: u32,
    /// Share of the probability kept, in (0, 1]; 1 keeps all.
    pub top_p: f32,
    /// Seed of the draws.
    pub seed: u64,
}

impl Default for SampleOptions {
    fn default() -> Self {
        Self { temperature: 0.0, top_k: 0, top_p: 1.0, seed: 0 }
    }
}

impl SampleOptions {
    /// Every parameter is in its range.
    pub fn check(&self) -> Result<()> {
        if !(self.temperature.is_finite() && self.temperature >= 0.0) {
            return Err(Error::invalid("temperature", "a number of at least 0", self.temperature));
        }
        check::share("topP", self.top_p)
    }

    /// Chooses an id with draw number `draw`.
    pub fn choose(&self, logits: &[f32], draw: u64) -> Result<u32> {
        self.check()?;
        check::at_least("logits", logits.len(), 1)?;
        let usable = logits.iter().all(|x| *x < f32::INFINITY);
        let best = top1(logits);
        if !usable || logits[best as usize] == f32::NEG_INFINITY {
            return Err(Error::NonFinite { what: "logits".into(), row: 0 });
        }
        if self.temperature == 0.0 {
            return Ok(best);
        }
        let (max, t) = (f64::from(logits[best as usize]), f64::from(self.temperature));
        let weight = |x: f32| ((f64::from(x) - max) / t).exp();
        let total: f64 = logits.iter().map(|&x| weight(x)).sum();
        // (id, weight) in the order in which a draw runs through them.
        let mut kept = Vec::new();
        let mut mass = 0.0;
        if self.top_k == 0 && self.top_p == 1.0 {
            kept.extend(logits.iter().enumerate().map(|(i, &x)| (i as u32, weight(x))));
            mass = total;
        } else {
            let most = if self.top_k == 0 { usize::MAX } else { self.top_k as usize };
            let mut heap: BinaryHeap<Candidate> =
                logits.iter().enumerate().map(|(i, &logit)| Candidate { logit, id: i as u32 }).collect();
            // top_p is measured inside the top_k candidates, as common samplers do.
            let mut first = Vec::new();
            while first.len() < most
                && let Some(c) = heap.pop()
            {
                let w = weight(c.logit);
                first.push((c.id, w));
                mass += w;
                // Without top_k the share is known to be reached: no need to pop the rest.
                if self.top_k == 0 && mass >= f64::from(self.top_p) * total {
                    break;
                }
            }
            let enough = if self.top_k == 0 { f64::INFINITY } else { f64::from(self.top_p) * mass };
            mass = 0.0;
            for (id, w) in first {
                kept.push((id, w));
                mass += w;
                if mass >= enough {
                    break;
                }
            }
        }
        let mut at = uniform(self.seed, draw) * mass;
        for &(id, w) in &kept {
            at -= w;
            if at < 0.0 {
                return Ok(id);
            }
        }
        // Rounding left the draw just behind the last candidate; the largest logit is always among them.
        Ok(best)
    }
}

/// Draw number `draw` of `seed`, in [0, 1).
fn uniform(seed: u64, draw: u64) -> f64 {
    let mut z = seed.wrapping_add(draw.wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15));
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^= z >> 31;
    (z >> 11) as f64 / (1u64 << 53) as f64
}

/// Larger logits first, then lower ids. Logits are no NaN.
struct Candidate {
    logit: f32,
    id: u32,
}

impl Ord for Candidate {
    fn cmp(&self, other: &Self) -> Ordering {
        self.logit.total_cmp(&other.logit).then(other.id.cmp(&self.id))
    }
}

impl PartialOrd for Candidate {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Candidate {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Candidate {}

/// Options and the number of draws made.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampler {
    options: SampleOptions,
    draws: u64,
}

impl Sampler {
    /// A sampler that has drawn nothing yet.
    pub fn new(options: SampleOptions) -> Result<Self> {
        options.check()?;
        Ok(Self { options, draws: 0 })
    }

    /// Chooses the next id. A greedy choice counts as a draw, an error does not.
    pub fn sample(&mut self, logits: &[f32]) -> Result<u32> {
        let id = self.options.choose(logits, self.draws)?;
        self.draws += 1;
        Ok(id)
    }

    /// Options and count, to be committed with a session.
    pub fn save(&self) -> Json {
        json!({ "options": self.options, "draws": self.draws })
    }

    /// Takes back what `save` gave.
    pub fn load(state: &Json) -> Result<Self> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct State {
            options: SampleOptions,
            draws: u64,
        }
        let state = State::deserialize(state).map_err(|e| Error::malformed("sampler state", e))?;
        state.options.check()?;
        Ok(Self { options: state.options, draws: state.draws })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(options: SampleOptions, logits: &[f32], draws: u64) -> Vec<u32> {
        let mut n = vec![0; logits.len()];
        for d in 0..draws {
            n[options.choose(logits, d).unwrap() as usize] += 1;
        }
        n
    }

    #[test]
    fn draws_are_those_of_splitmix64() {
        // First outputs for seed 1234567 as published with the reference code, cut to 53 bits.
        for (n, expected) in [6_457_827_717_110_365_317u64, 3_203_168_211_198_807_973].iter().enumerate() {
            assert_eq!(uniform(1_234_567, n as u64), (expected >> 11) as f64 / (1u64 << 53) as f64);
        }
    }

    #[test]
    fn greedy_takes_the_lowest_of_equals() {
        assert_eq!(SampleOptions::default().choose(&[0.0, 2.0, 2.0], 7).unwrap(), 1);
    }

    #[test]
    fn frequencies_follow_the_probabilities() {
        let logits = [1f32.ln(), 2f32.ln(), 5f32.ln(), f32::NEG_INFINITY];
        let n = counts(SampleOptions { temperature: 1.0, seed: 3, ..Default::default() }, &logits, 8000);
        for (i, expected) in [1000.0, 2000.0, 5000.0, 0.0].iter().enumerate() {
            // Four standard deviations of the largest count.
            assert!((f64::from(n[i]) - expected).abs() < 180.0, "{n:?}");
        }
        let sharp = counts(SampleOptions { temperature: 0.1, seed: 3, ..Default::default() }, &logits, 1000);
        assert!(sharp[2] > 990, "{sharp:?}");
    }

    #[test]
    fn top_k_and_top_p_cut_the_tail() {
        let logits = [1f32.ln(), 2f32.ln(), 5f32.ln(), 2f32.ln()];
        let base = SampleOptions { temperature: 1.0, seed: 1, ..Default::default() };
        let k = counts(SampleOptions { top_k: 2, ..base }, &logits, 1000);
        assert!(k[0] == 0 && k[3] == 0 && k[1] > 200 && k[2] > 600, "{k:?}");
        // 5/10 is the first candidate; a share of 0.5 is reached by it alone, 0.6 needs the second.
        let p = counts(SampleOptions { top_p: 0.49, ..base }, &logits, 1000);
        assert_eq!(p, [0, 0, 1000, 0]);
        let p = counts(SampleOptions { top_p: 0.6, ..base }, &logits, 1000);
        assert!(p[0] == 0 && p[3] == 0 && p[1] > 200, "{p:?}");
        // Inside two candidates with 5/7 and 2/7, a share of 0.7 is the first alone.
        let both = counts(SampleOptions { top_k: 2, top_p: 0.7, ..base }, &logits, 1000);
        assert_eq!(both, [0, 0, 1000, 0]);
    }

    #[test]
    fn state_survives_json() {
        let logits: Vec<f32> = (0..50).map(|i| (i as f32 * 0.37).sin()).collect();
        let options = SampleOptions { temperature: 0.8, top_k: 20, top_p: 0.9, seed: u64::MAX };
        let mut a = Sampler::new(options).unwrap();
        for _ in 0..5 {
            a.sample(&logits).unwrap();
        }
        let text = a.save().to_string();
        let mut b = Sampler::load(&serde_json::from_str(&text).unwrap()).unwrap();
        for _ in 0..20 {
            assert_eq!(a.sample(&logits).unwrap(), b.sample(&logits).unwrap());
        }
        assert_eq!(Sampler::load(&json!({ "draws": 1 })).unwrap_err().code(), "Malformed");
    }

    #[test]
    fn what_is_no_number_is_refused() {
        for bad in [[0.0, f32::NAN], [f32::NAN, 0.0], [0.0, f32::INFINITY], [f32::NEG_INFINITY; 2]] {
            for temperature in [0.0, 1.0] {
                let e = SampleOptions { temperature, ..Default::default() }.choose(&bad, 0).unwrap_err();
                assert_eq!(e.code(), "NonFinite");
            }
        }
        for options in [
            SampleOptions { temperature: -1.0, ..Default::default() },
            SampleOptions { temperature: f32::NAN, ..Default::default() },
            SampleOptions { top_p: 0.0, ..Default::default() },
            SampleOptions { top_p: 1.5, ..Default::default() },
        ] {
            assert_eq!(Sampler::new(options).unwrap_err().code(), "InvalidArgument");
        }
    }
}
