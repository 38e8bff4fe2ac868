//! The contract suite on a sound backend, on the deferred one, and on backends broken on purpose.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use kvasir_core::{Attend, Backend, BackendInfo, Buf, Call, Mask, Result};
use kvasir_cpu::{Cpu, CpuOptions, Isa};
use kvasir_testkit::{Deferred, contract};

fn scalar() -> Cpu {
    Cpu::new(CpuOptions { isa: Isa::Scalar, threads: Some(2) }).expect("the scalar backend")
}

#[test]
fn a_sound_backend_passes() {
    contract::run(&scalar());
}

#[test]
fn the_deferred_backend_passes() {
    let deferred = Deferred::new(Arc::new(scalar()));
    contract::run(&deferred);
    assert!(deferred.reads() > 0 && deferred.waiting() == 0);
}

/// A sound backend behind a defect in the calls.
struct Broken {
    inner: Cpu,
    defect: fn(&mut Call),
}

impl Backend for Broken {
    fn info(&self) -> &BackendInfo {
        self.inner.info()
    }
    fn alloc(&self, bytes: usize) -> Result<Buf> {
        self.inner.alloc(bytes)
    }
    fn submit(&self, mut call: Call) -> Result<()> {
        (self.defect)(&mut call);
        self.inner.submit(call)
    }
    fn read(&self, src: &Buf, dst: &mut [u8]) -> Result<()> {
        self.inner.read(src, dst)
    }
}

fn attend(call: &mut Call, f: fn(&mut Attend)) {
    if let Call::Attend(a) = call {
        f(a);
    }
}

/// Words of the case that must notice it, what is wrong, how.
type Defect = (&'static str, &'static str, fn(&mut Call));

#[test]
fn broken_backends_are_noticed() {
    let defects: [Defect; 12] = [
        ("matmul", "forgets to add", |c| {
            if let Call::MatMul { add, .. } = c {
                *add = false;
            }
        }),
        ("norm", "wrong eps", |c| {
            if let Call::RmsNorm { eps, .. } = c {
                *eps = 1e-3;
            }
        }),
        ("scatter", "wrong row", |c| {
            if let Call::Scatter { idx, .. } = c {
                *idx = idx.iter().map(|i| i ^ 1).collect();
            }
        }),
        ("append", "wrong slot", |c| {
            if let Call::Append { writes, .. } = c {
                for w in writes {
                    w.slot = w.slot.min(30);
                }
            }
        }),
        ("append with", "rotates one position late", |c| {
            if let Call::Append { rope: Some(rope), .. } = c {
                rope.1 = rope.1.iter().map(|p| p + 1).collect();
            }
        }),
        ("decode", "a row too many", |c| {
            if let Call::Decode { rows, .. } = c {
                *rows = 32;
            }
        }),
        ("Causal", "a window off by one", |c| attend(c, |a| a.window = a.window.map(|w| w + 1))),
        ("attend", "full where it should be causal", |c| attend(c, |a| a.mask = Mask::Full)),
        ("attend", "scale off by a thousandth", |c| attend(c, |a| a.scale *= 1.001)),
        ("beside rotated", "keys read one position late", |c| {
            attend(c, |a| a.q_rope = a.q_rope.iter().map(|p| p + 1).collect());
        }),
        ("hidden rows", "bias ignored", |c| {
            attend(c, |a| {
                for run in a.seqs.iter_mut().flat_map(|s| s.heads.iter_mut().flatten()) {
                    run.meta.bias = None;
                }
            });
        }),
        ("column", "the past ends a row late", |c| {
            attend(c, |a| a.seqs.iter_mut().for_each(|s| s.pass_from += 1));
        }),
    ];
    for (where_, what, defect) in defects {
        let broken = Broken { inner: scalar(), defect };
        let panic = catch_unwind(AssertUnwindSafe(|| contract::run(&broken)));
        let Err(panic) = panic else { panic!("{where_}: {what}: nobody noticed") };
        let message = panic.downcast_ref::<String>().cloned().unwrap_or_default();
        assert!(message.contains(where_), "{where_}: {what}: noticed as something else: {message}");
    }
}
