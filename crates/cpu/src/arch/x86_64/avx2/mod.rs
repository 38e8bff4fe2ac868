//! AVX2 with FMA and F16C.

use crate::arch::Kernels;

/// The table, if this machine has the features.
pub(crate) fn kernels() -> Option<&'static Kernels> {
    None
}
