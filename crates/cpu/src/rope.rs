//! Rotation by position. Angles are taken in f64 and their cosines and sines rounded to f32 once, so that every path sees
//! the same numbers. Tables grow with the positions seen; far positions are computed when they come.

use std::sync::{Arc, Mutex, PoisonError};

use kvasir_core::{Error, Result, Rope, RopeArg, check};

/// Bytes a table may grow to.
const TABLE_BYTES: usize = 32 << 20;
/// Tables kept; models have one or two.
const TABLES: usize = 8;

/// Which channels turn together.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Pairing {
    /// `(i, i + D/2)`.
    Half,
    /// `(2i, 2i + 1)`.
    Adjacent,
}

/// Cosines and sines of one set of frequencies.
#[derive(Clone)]
pub(crate) struct RopeTable {
    pub(crate) pairing: Pairing,
    inv_freq: Arc<[f32]>,
    /// `[positions, 2, D / 2]`: cosines, then sines.
    table: Arc<Vec<f32>>,
}

fn push_row(inv_freq: &[f32], pos: u32, out: &mut Vec<f32>) {
    let angle = |f: &f32| f64::from(pos) * f64::from(*f);
    out.extend(inv_freq.iter().map(|f| angle(f).cos() as f32));
    out.extend(inv_freq.iter().map(|f| angle(f).sin() as f32));
}

impl RopeTable {
    /// Cosines, then sines, of a position; `spare` holds them if the table does not.
    pub(crate) fn at<'a>(&'a self, pos: u32, spare: &'a mut Vec<f32>) -> &'a [f32] {
        self.known(pos).unwrap_or_else(|| {
            spare.clear();
            push_row(&self.inv_freq, pos, spare);
            spare
        })
    }

    /// Cosines, then sines, of a position that the table holds.
    pub(crate) fn known(&self, pos: u32) -> Option<&[f32]> {
        let row = 2 * self.inv_freq.len();
        let from = pos as usize * row;
        self.table.get(from..from + row)
    }

    /// Computes the cosines and sines of a position into a row.
    pub(crate) fn compute(&self, pos: u32, row: &mut Vec<f32>) {
        row.clear();
        push_row(&self.inv_freq, pos, row);
    }

    /// Rotates one row in place.
    pub(crate) fn rotate(&self, row: &mut [f32], pos: u32, spare: &mut Vec<f32>) {
        let (cos, sin) = self.at(pos, spare).split_at(self.inv_freq.len());
        match self.pairing {
            Pairing::Half => {
                let (a, b) = row.split_at_mut(cos.len());
                for (((x, y), c), s) in a.iter_mut().zip(b).zip(cos).zip(sin) {
                    (*x, *y) = (*x * c - *y * s, *y * c + *x * s);
                }
            }
            Pairing::Adjacent => {
                for ((pair, c), s) in row.chunks_exact_mut(2).zip(cos).zip(sin) {
                    (pair[0], pair[1]) = (pair[0] * c - pair[1] * s, pair[1] * c + pair[0] * s);
                }
            }
        }
    }
}

/// Tables of a backend.
#[derive(Default)]
pub(crate) struct RopeCache(Mutex<Vec<Known>>);

/// Frequencies and their table.
type Known = (Arc<[f32]>, Arc<Vec<f32>>);

impl RopeCache {
    /// The rotation of rows of `dim` channels, with positions up to `last` in its table where that is affordable.
    pub(crate) fn get(
        &self,
        field: &str,
        arg: Option<&RopeArg>,
        dim: usize,
        last: u32,
    ) -> Result<Option<RopeTable>> {
        let Some(arg) = arg else { return Ok(None) };
        let pairing = match arg.kind {
            Rope::None => return Ok(None),
            Rope::Half(_) => Pairing::Half,
            Rope::Adjacent(_) => Pairing::Adjacent,
        };
        if !dim.is_multiple_of(2) {
            return Err(Error::invalid(field, "an even number of channels", dim));
        }
        check::equal(field, "inverse frequencies", dim / 2, arg.inv_freq.len())?;
        check::finite(field, &arg.inv_freq, dim)?;
        let row = dim;
        let rows = (last as usize + 1).next_power_of_two().max(256).min(TABLE_BYTES / (4 * row));
        let mut tables = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let found = tables.iter().position(|(f, _)| Arc::ptr_eq(f, &arg.inv_freq) || **f == *arg.inv_freq);
        let at = found.unwrap_or_else(|| {
            if tables.len() == TABLES {
                tables.remove(0);
            }
            tables.push((Arc::clone(&arg.inv_freq), Arc::new(Vec::new())));
            tables.len() - 1
        });
        let table = &mut tables[at].1;
        let have = table.len() / row;
        // Grow only when asked for a position that is missing.
        if have < rows && (last as usize) >= have {
            let mut longer = Vec::with_capacity(rows * row);
            longer.extend_from_slice(table);
            (have..rows).for_each(|p| push_row(&arg.inv_freq, p as u32, &mut longer));
            *table = Arc::new(longer);
        }
        Ok(Some(RopeTable { pairing, inv_freq: Arc::clone(&tables[at].0), table: Arc::clone(&tables[at].1) }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvasir_core::SideId;

    #[test]
    fn far_positions_use_the_same_numbers_as_the_table() {
        let inv_freq: Arc<[f32]> = [1.0, 0.1, 0.01].into();
        let arg = RopeArg { kind: Rope::Half(SideId(0)), inv_freq };
        let cache = RopeCache::default();
        let small = cache.get("rope", Some(&arg), 6, 0).unwrap().unwrap();
        let large = cache.get("rope", Some(&arg), 6, 5000).unwrap().unwrap();
        let row = [1.0, 2.0, 3.0, -4.0, 5.0, 6.0];
        for pos in [0, 1, 255, 256, 5000] {
            let (mut a, mut b) = (row, row);
            small.rotate(&mut a, pos, &mut Vec::new());
            large.rotate(&mut b, pos, &mut Vec::new());
            assert_eq!(a, b);
            let angle = f64::from(pos);
            let want = row[0] as f64 * angle.cos() - row[3] as f64 * angle.sin();
            assert!((f64::from(a[0]) - want).abs() < 1e-5);
        }
        assert!(cache.get("rope", Some(&arg), 6, u32::MAX).is_ok());
        assert!(cache.get("rope", Some(&arg), 8, 0).is_err());
    }
}
