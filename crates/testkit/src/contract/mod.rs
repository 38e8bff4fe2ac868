//! The contract of a backend: every call against a naive f64 version, on seeded inputs. A backend passes all of it.
//!
//! | what | largest error allowed, `e (1 + \|wanted\|)` |
//! |---|---|
//! | moves, fills, gathers, compaction, decode, dense append without rotation, dense seal | bytes equal |
//! | int8 seal | scale equal, codes within one step and the number within half a step |
//! | matrix products | e = 4e-6 times the sum of magnitudes of the products |
//! | norm, activation, sums | e = 4e-6 |
//! | rotation | e = 1e-5, positions below 1,000 |
//! | attention over f32, f16, bf16, as represented | e = 2e-5; with a sink 2e-6 |
//! | attention over int8, as represented (queries and probabilities in 16 bits) | e = 2e-4; with a sink 5e-5 |
//! | log-sum-exp, columns | as attention |
//!
//! Trouble may come from `submit` or from the next `read`; afterwards the backend works on.

mod attention;
mod linear;
mod tiles;

use kvasir_core::{Backend, Buf, Call, Error, Format, Result};

/// Runs the whole contract. Panics with what was called, where it differs and by how much.
pub fn run(backend: &dyn Backend) {
    linear::run(backend);
    tiles::run(backend);
    attention::run(backend);
}

/// A backend with the words of a test around it.
struct Bench<'a> {
    backend: &'a dyn Backend,
}

impl Bench<'_> {
    fn up(&self, data: &[f32]) -> Buf {
        self.backend.upload_f32(data).unwrap_or_else(|e| panic!("upload of {} numbers: {e}", data.len()))
    }

    fn up_bytes(&self, data: &[u8]) -> Buf {
        self.backend.upload(data).unwrap_or_else(|e| panic!("upload of {} bytes: {e}", data.len()))
    }

    fn zeros(&self, n: usize) -> Buf {
        self.backend.alloc(4 * n).unwrap_or_else(|e| panic!("alloc of {n} numbers: {e}"))
    }

    fn submit(&self, what: &str, call: Call) {
        self.backend.submit(call).unwrap_or_else(|e| panic!("{what}: submit: {e}"));
    }

    fn read(&self, what: &str, buf: &Buf) -> Vec<f32> {
        self.backend.read_f32(buf).unwrap_or_else(|e| panic!("{what}: read: {e}"))
    }

    fn read_bytes(&self, what: &str, buf: &Buf) -> Vec<u8> {
        let mut bytes = vec![0; buf.bytes()];
        self.backend.read(buf, &mut bytes).unwrap_or_else(|e| panic!("{what}: read: {e}"));
        bytes
    }

    /// The call fails, at once or when `out` is read, and the backend lives on.
    fn refuses(&self, what: &str, call: Call, out: &Buf) {
        let failed: Result<()> =
            self.backend.submit(call).and_then(|()| self.backend.read(out, &mut vec![0; out.bytes()]));
        match failed {
            Err(Error::Invalid { .. } | Error::Unsupported { .. } | Error::NonFinite { .. }) => {}
            Err(e) => panic!("{what}: refused with the wrong kind of error: {e}"),
            Ok(()) => panic!("{what}: should be refused"),
        }
        let alive = self.up(&[1.0, 2.0]);
        assert_eq!(self.read(what, &alive), [1.0, 2.0], "{what}: the backend works after an error");
    }
}

/// Largest error of `got`, in units of `e(i) (1 + |want|)`, must be at most one.
fn close(what: &str, got: &[f32], want: &[f64], e: impl Fn(usize) -> f64) {
    assert_eq!(got.len(), want.len(), "{what}: length");
    let mut worst = (0.0, 0);
    for (i, (&g, &w)) in got.iter().zip(want).enumerate() {
        let off = (f64::from(g) - w).abs() / (e(i) * (1.0 + w.abs()));
        if off.is_nan() || off > worst.0 {
            worst = (off, i);
            if off.is_nan() {
                break;
            }
        }
    }
    let (off, i) = worst;
    assert!(
        off <= 1.0,
        "{what}: number {i} of {}: got {}, wanted {}, {off:.1} times the tolerance {:.1e}",
        got.len(),
        got[i],
        want[i],
        e(i)
    );
}

/// First difference between two byte strings, if any, as text.
fn same_bytes(what: &str, got: &[u8], want: &[u8]) {
    assert_eq!(got.len(), want.len(), "{what}: length");
    if let Some(i) = (0..got.len()).find(|&i| got[i] != want[i]) {
        let wrong = got.iter().zip(want).filter(|(a, b)| a != b).count();
        panic!(
            "{what}: {wrong} of {} bytes differ, the first at {i}: got {}, wanted {}",
            got.len(),
            got[i],
            want[i]
        );
    }
}

/// Tolerance of attention over a format, as represented.
fn tolerance(format: Format) -> f64 {
    if format.is_dense() { 2e-5 } else { 2e-4 }
}
