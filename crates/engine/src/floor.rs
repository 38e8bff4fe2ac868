//! The quality floor: how far the attention output of the last real queries would move if new rows replaced the old.
//!
//! Measured while both exist: per layer |new - old| / |old| over the kept queries and all heads; the largest layer counts.

use std::sync::Arc;

use kvasir_core::{Attend, AttendSeq, Buf, Call, Table};

use crate::Result;
use crate::pass::rope_of;
use crate::session::Session;

impl Session {
    /// Largest relative error over the layers; 0 while no query has been seen.
    pub(crate) fn floor_error(&self, next: &[Vec<Table>]) -> Result<f32> {
        let mut worst = 0.0f64;
        for (layer, probe) in self.probes.iter().enumerate() {
            let Some((q, pos)) = probe else { continue };
            let old = self.attend_with(layer, q, pos, &self.tables[layer])?;
            let new = self.attend_with(layer, q, pos, &next[layer])?;
            let square = |x: f64| x * x;
            let norm: f64 = old.iter().map(|&x| square(x.into())).sum();
            let gap: f64 = old.iter().zip(&new).map(|(&a, &b)| square(f64::from(a) - f64::from(b))).sum();
            // What cannot be measured is not within any bound.
            if gap.is_nan() {
                return Ok(f32::INFINITY);
            }
            if gap > 0.0 {
                worst = worst.max((gap / norm).sqrt());
            }
        }
        Ok(worst as f32)
    }

    fn attend_with(&self, layer: usize, q: &Buf, pos: &[u32], tables: &[Table]) -> Result<Vec<f32>> {
        let at = &self.layout.layers[layer];
        let rope = rope_of(self, layer)?;
        let out = self.backend.alloc(pos.len() * at.q_heads as usize * at.v_dim as usize * 4)?;
        let q_pos: Arc<[u32]> = pos.into();
        self.backend.submit(Call::Attend(Box::new(Attend {
            q: q.clone(),
            q_rope: Arc::clone(&q_pos),
            q_pos,
            out: out.clone(),
            lse: None,
            q_heads: at.q_heads,
            kv_heads: at.kv_heads,
            k_dim: at.k_dim,
            v_dim: at.v_dim,
            scale: 1.0 / f32::from(at.k_dim).sqrt(),
            rope,
            mask: self.stack.mask,
            window: at.window,
            seqs: vec![AttendSeq {
                rows: 0..pos.len() as u32,
                heads: tables.iter().map(|t| t.runs.clone()).collect(),
                pass_from: self.seen,
            }],
            columns: Vec::new(),
        })))?;
        Ok(self.backend.read_f32(&out)?)
    }
}
