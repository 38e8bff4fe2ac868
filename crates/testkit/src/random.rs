//! Counter-based random numbers: number `i` of a seed is a function of both, so a failure repeats whatever ran before it.

/// A stream of random numbers, addressed by a counter that only this stream moves.
#[derive(Clone, Debug)]
pub struct Noise {
    seed: u64,
    next: u64,
}

/// The finalizer of splitmix64: every output bit depends on every input bit.
fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

impl Noise {
    /// The stream of a seed.
    pub fn new(seed: u64) -> Self {
        Self { seed: mix(seed.wrapping_add(0x9E37_79B9_7F4A_7C15)), next: 0 }
    }

    /// Number `i` of the stream, without moving it.
    pub fn bits_at(&self, i: u64) -> u64 {
        mix(self.seed ^ mix(i.wrapping_mul(0x9E37_79B9_7F4A_7C15).wrapping_add(1)))
    }

    /// 64 random bits.
    pub fn bits(&mut self) -> u64 {
        self.next += 1;
        self.bits_at(self.next - 1)
    }

    /// Uniform in 0..n.
    pub fn below(&mut self, n: u32) -> u32 {
        ((u128::from(self.bits()) * u128::from(n)) >> 64) as u32
    }

    /// Uniform in [0, 1).
    pub fn uniform(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Normal, mean 0, variance 1.
    pub fn normal(&mut self) -> f64 {
        let (u, v) = (1.0 - self.uniform(), self.uniform());
        (-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos()
    }

    /// `n` normal numbers in f32.
    pub fn normals(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.normal() as f32).collect()
    }

    /// `n` ascending numbers below `end`.
    pub fn ascending(&mut self, n: usize, end: u32) -> Vec<u32> {
        assert!(n <= end as usize, "{n} different numbers below {end}");
        let mut all: Vec<u32> = (0..end).collect();
        for i in 0..n {
            let j = i + self.below(end - i as u32) as usize;
            all.swap(i, j);
        }
        all.truncate(n);
        all.sort_unstable();
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_counter_gives_the_same_number() {
        let (mut a, b) = (Noise::new(7), Noise::new(7));
        let first = a.bits();
        assert_eq!(first, b.bits_at(0));
        assert_ne!(first, Noise::new(8).bits_at(0));
    }

    #[test]
    fn normals_have_mean_zero_and_variance_one() {
        let x = Noise::new(1).normals(40_000);
        let mean = x.iter().map(|&v| f64::from(v)).sum::<f64>() / 4e4;
        let var = x.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>() / 4e4;
        assert!(mean.abs() < 0.02 && (var - 1.0).abs() < 0.03, "mean {mean}, variance {var}");
    }

    #[test]
    fn ascending_numbers_are_different_and_in_range() {
        let x = Noise::new(3).ascending(50, 60);
        assert!(x.windows(2).all(|w| w[0] < w[1]) && x[49] < 60);
    }
}
