//! Synthetic attention: q, k, v rows of a layer by position, seeded, with the two structures that cache methods live on: a
//! sink at position 0 and heavy hitters every few rows.
//!
//! A head's queries lean towards one direction `u`; the keys of the sink and of the heavy hitters lean towards it too, all
//! others are noise. So the heavy rows are known without computing attention.

use crate::Noise;

/// Seeded q, k, v rows.
#[derive(Clone, Debug)]
pub struct Synthetic {
    /// Seed of everything.
    pub seed: u64,
    /// H.
    pub q_heads: usize,
    /// K.
    pub kv_heads: usize,
    /// D, of keys and of values.
    pub dim: usize,
    /// Every so many rows there is a heavy hitter; 0 is never.
    pub heavy_every: u32,
    /// How far sink and heavy keys lean towards the queries, in standard deviations of the score.
    pub strength: f32,
}

impl Synthetic {
    /// Rows without structure.
    pub fn noise(seed: u64, q_heads: usize, kv_heads: usize, dim: usize) -> Self {
        Self { seed, q_heads, kv_heads, dim, heavy_every: 0, strength: 0.0 }
    }

    fn stream(&self, kind: u64, layer: usize, pos: u32) -> Noise {
        Noise::new(self.seed ^ (kind << 60) ^ ((layer as u64) << 40) ^ u64::from(pos))
    }

    /// Unit direction of a kv head.
    fn direction(&self, layer: usize, head: usize) -> Vec<f32> {
        let u = self.stream(3, layer, head as u32).normals(self.dim);
        let norm = u.iter().map(|x| x * x).sum::<f32>().sqrt();
        u.iter().map(|x| x / norm).collect()
    }

    /// The row draws much attention.
    pub fn is_heavy(&self, pos: u32) -> bool {
        self.heavy_every > 0 && pos.is_multiple_of(self.heavy_every)
    }

    /// `[H, D]`.
    pub fn q(&self, layer: usize, pos: u32) -> Vec<f32> {
        let mut q = self.stream(0, layer, pos).normals(self.q_heads * self.dim);
        for (h, row) in q.chunks_exact_mut(self.dim).enumerate() {
            let u = self.direction(layer, h * self.kv_heads / self.q_heads);
            row.iter_mut().zip(u).for_each(|(x, u)| *x += self.strength * u);
        }
        q
    }

    /// `[K, D]`.
    pub fn k(&self, layer: usize, pos: u32) -> Vec<f32> {
        let mut k = self.stream(1, layer, pos).normals(self.kv_heads * self.dim);
        if self.is_heavy(pos) {
            let lean = (self.dim as f32).sqrt();
            for (h, row) in k.chunks_exact_mut(self.dim).enumerate() {
                let u = self.direction(layer, h);
                row.iter_mut().zip(u).for_each(|(x, u)| *x += lean * u);
            }
        }
        k
    }

    /// `[K, D]`.
    pub fn v(&self, layer: usize, pos: u32) -> Vec<f32> {
        self.stream(2, layer, pos).normals(self.kv_heads * self.dim)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heavy_rows_draw_the_attention() {
        let s = Synthetic { heavy_every: 10, strength: 6.0, ..Synthetic::noise(1, 4, 2, 64) };
        let q = s.q(0, 99);
        for h in 0..4 {
            let q = &q[h * 64..][..64];
            let p: Vec<f32> = (0..40)
                .map(|pos| {
                    let k = s.k(0, pos);
                    (q.iter().zip(&k[h / 2 * 64..]).map(|(a, b)| a * b).sum::<f32>() / 8.0).exp()
                })
                .collect();
            let heavy: f32 = p.iter().step_by(10).sum();
            assert!(heavy > 0.8 * p.iter().sum::<f32>(), "head {h}: {heavy} of {}", p.iter().sum::<f32>());
        }
    }

    #[test]
    fn a_row_depends_on_seed_layer_and_position_only() {
        let s = Synthetic::noise(1, 4, 2, 8);
        assert_eq!(s.k(1, 5), s.clone().k(1, 5));
        assert_ne!(s.k(1, 5), s.k(0, 5));
        assert_ne!(s.k(1, 5), s.v(1, 5));
    }
}
