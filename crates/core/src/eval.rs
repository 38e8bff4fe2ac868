//! Measures over rows of logits, in f64: negative log-likelihood, Kullback-Leibler divergence, argmax.
//!
//! A row with a NaN gives NaN (and argmax the first id); the sampler is what refuses it.

/// ln of the sum of exponentials.
pub fn log_sum_exp(row: &[f32]) -> f64 {
    let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    if max == f32::NEG_INFINITY {
        return f64::NEG_INFINITY;
    }
    let max = f64::from(max);
    max + row.iter().map(|&x| (f64::from(x) - max).exp()).sum::<f64>().ln()
}

/// `-ln p(target)` in nats. `target` must be an id of the row.
pub fn nll(row: &[f32], target: u32) -> f64 {
    log_sum_exp(row) - f64::from(row[target as usize])
}

/// `KL(p || q)` in nats of the distributions of two rows of logits of one vocabulary.
pub fn kl(p: &[f32], q: &[f32]) -> f64 {
    assert_eq!(p.len(), q.len(), "rows of one vocabulary");
    let (zp, zq) = (log_sum_exp(p), log_sum_exp(q));
    let sum: f64 = p
        .iter()
        .zip(q)
        .map(|(&a, &b)| {
            let (lp, lq) = (f64::from(a) - zp, f64::from(b) - zq);
            // 0 ln 0 = 0
            if lp == f64::NEG_INFINITY { 0.0 } else { lp.exp() * (lp - lq) }
        })
        .sum();
    // Equal rows may give a rounding error below zero.
    if sum < 0.0 { 0.0 } else { sum }
}

/// The id with the largest logit; the lowest of equals.
pub fn top1(row: &[f32]) -> u32 {
    let mut best = 0;
    for (i, x) in row.iter().enumerate() {
        if *x > row[best] {
            best = i;
        }
    }
    best as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn measures_of_small_rows() {
        let p = [0.0f32, 2.0f32.ln(), 5.0f32.ln()]; // 1/8, 2/8, 5/8
        assert!((nll(&p, 0) - 8f64.ln()).abs() < 1e-7);
        assert!((nll(&p, 2) - (8.0f64 / 5.0).ln()).abs() < 1e-7);
        // A shift of all logits changes nothing, however large.
        let shifted = p.map(|x| x + 1000.0);
        assert!((nll(&shifted, 0) - 8f64.ln()).abs() < 1e-3);
        assert_eq!(kl(&p, &p), 0.0);
        let q = [0.0f32, 0.0, 0.0];
        let expected = 3f64.ln() - (0.125 * 8f64.ln() + 0.25 * 4f64.ln() + 0.625 * 1.6f64.ln());
        assert!((kl(&p, &q) - expected).abs() < 1e-7, "{} {expected}", kl(&p, &q));
        assert_eq!(top1(&[1.0, 3.0, 3.0]), 1);
    }

    #[test]
    fn hidden_ids_count_nothing() {
        let p = [0.0, f32::NEG_INFINITY];
        assert_eq!(kl(&p, &[0.0, 0.0]), 2f64.ln());
        assert_eq!(kl(&[0.0, 0.0], &p), f64::INFINITY);
    }
}
