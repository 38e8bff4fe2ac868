//! Argument checks that return the field, what was expected and what came.

use crate::{Error, Result};

/// `value` lies in (0, 1].
pub fn share(field: &str, value: f32) -> Result<()> {
    if value > 0.0 && value <= 1.0 { Ok(()) } else { Err(Error::invalid(field, "a share in (0, 1]", value)) }
}

/// `value` is at least `least`.
pub fn at_least(field: &str, value: usize, least: usize) -> Result<()> {
    if value >= least { Ok(()) } else { Err(Error::invalid(field, format_args!("at least {least}"), value)) }
}

/// `got` equals `expected`, both counts of `unit`.
pub fn equal(field: &str, unit: &str, expected: usize, got: usize) -> Result<()> {
    if expected == got {
        Ok(())
    } else {
        Err(Error::invalid(field, format_args!("{expected} {unit}"), format_args!("{got} {unit}")))
    }
}

/// Every value is finite; `dim` values make a row.
pub fn finite(what: &str, values: &[f32], dim: usize) -> Result<()> {
    match values.iter().position(|x| !x.is_finite()) {
        None => Ok(()),
        Some(i) => Err(Error::NonFinite { what: what.into(), row: i / dim.max(1) }),
    }
}
