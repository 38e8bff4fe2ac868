//! Resolves symbolic picks: one layer at a time, because a `Per::Joint` lets its heads compete.

use kvasir_core::{ColId, Error, Per, Pick, Result};

/// Column values of one head of the layer, in the order of its rows.
pub(crate) type HeadColumn<'a> = dyn Fn(usize, ColId) -> Result<Vec<f32>> + 'a;

/// Which rows a pick holds, per head. `rows[h]` is the number of rows of head `h`.
pub(crate) fn resolve(pick: &Pick, rows: &[usize], col: &HeadColumn<'_>) -> Result<Vec<Vec<bool>>> {
    let none: Vec<Vec<bool>> = rows.iter().map(|&n| vec![false; n]).collect();
    resolve_among(pick, rows, col, &none)
}

/// `taken` rows do not compete in a `Top`.
fn resolve_among(
    pick: &Pick,
    rows: &[usize],
    col: &HeadColumn<'_>,
    taken: &[Vec<bool>],
) -> Result<Vec<Vec<bool>>> {
    let each = |f: &dyn Fn(usize, usize) -> bool| -> Vec<Vec<bool>> {
        rows.iter().map(|&n| (0..n).map(|i| f(i, n)).collect()).collect()
    };
    Ok(match pick {
        Pick::All => each(&|_, _| true),
        Pick::First(k) => each(&|i, _| i < *k as usize),
        Pick::Last(k) => each(&|i, n| i + *k as usize >= n),
        Pick::Rows(list) => each(&|i, _| list.contains(&(i as u32))),
        Pick::Top { col: c, n, per } => {
            let mut candidates = Vec::new();
            for (h, taken) in taken.iter().enumerate() {
                let values = col(h, *c)?;
                let mut of_head: Vec<(f32, usize, usize)> =
                    values.iter().enumerate().filter(|&(i, _)| !taken[i]).map(|(i, &v)| (v, h, i)).collect();
                if *per == Per::Head {
                    largest(&mut of_head, *n as usize);
                }
                candidates.extend(of_head);
            }
            if *per == Per::Joint {
                largest(&mut candidates, *n as usize * rows.len());
            }
            let mut out = each(&|_, _| false);
            for (_, h, i) in candidates {
                out[h][i] = true;
            }
            out
        }
        Pick::Mass { col: c, share } => {
            let mut out = each(&|_, _| false);
            for (h, out) in out.iter_mut().enumerate() {
                let values = col(h, *c)?;
                let total: f64 = values.iter().map(|&v| f64::from(v)).sum();
                let mut order: Vec<(f32, usize, usize)> =
                    values.iter().enumerate().map(|(i, &v)| (v, h, i)).collect();
                largest(&mut order, values.len());
                let mut sum = 0.0;
                for (v, _, i) in order {
                    if sum >= total * f64::from(*share) {
                        break;
                    }
                    sum += f64::from(v);
                    out[i] = true;
                }
            }
            out
        }
        Pick::Above { col: c, t } => {
            let mut out = each(&|_, _| false);
            for (h, out) in out.iter_mut().enumerate() {
                for (held, v) in out.iter_mut().zip(col(h, *c)?) {
                    *held = v > *t;
                }
            }
            out
        }
        Pick::Not(a) => {
            let mut a = resolve_among(a, rows, col, taken)?;
            a.iter_mut().flatten().for_each(|x| *x = !*x);
            a
        }
        Pick::Both(a, b) => {
            zip(resolve_among(a, rows, col, taken)?, &resolve_among(b, rows, col, taken)?, |x, y| x && y)
        }
        Pick::Either(a, b) => {
            let a = resolve_among(a, rows, col, taken)?;
            let held = zip(taken.to_vec(), &a, |x, y| x || y);
            let b = resolve_among(b, rows, col, &held)?;
            zip(a, &b, |x, y| x || y)
        }
    })
}

fn zip(mut a: Vec<Vec<bool>>, b: &[Vec<bool>], f: impl Fn(bool, bool) -> bool) -> Vec<Vec<bool>> {
    for (a, b) in a.iter_mut().flatten().zip(b.iter().flatten()) {
        *a = f(*a, *b);
    }
    a
}

/// Keeps the `n` largest, the older row first among equals.
fn largest(list: &mut Vec<(f32, usize, usize)>, n: usize) {
    list.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.2.cmp(&b.2)).then(a.1.cmp(&b.1)));
    list.truncate(n);
}

/// The column does not exist.
pub(crate) fn no_column(col: ColId) -> Error {
    Error::invalid("pick.col", "a column that has been filled by a pass", col.0)
}
