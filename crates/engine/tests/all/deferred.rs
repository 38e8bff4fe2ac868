//! The engine over a backend that computes nothing until it is read: no hidden wait, and the same bits.

use std::sync::Arc;

use kvasir_core::{Backend, Model};
use kvasir_cpu::Isa;
use kvasir_engine::{Cancel, Dtype, Session, SessionOptions, drive};
use kvasir_model::Llama;
use kvasir_testkit::Deferred;

use crate::support::{backend, dense, ids, int8, model, testdata};

#[test]
fn a_decode_step_reads_once_and_gives_the_same_logits() {
    let deferred = Arc::new(Deferred::new(backend(Isa::Scalar)));
    let queued: Arc<dyn Backend> = Arc::clone(&deferred) as _;
    let late = Llama::load(testdata("models/stories260K-f32.gguf"), Arc::clone(&queued)).unwrap();
    let (at_once, prompt) = (model(Isa::Scalar), ids(90, 1));
    let cases: [fn() -> SessionOptions; 2] = [|| dense(Dtype::F16), int8];
    for make in cases {
        let run = |backend: &Arc<dyn Backend>, model: &Llama| {
            let mut s = Session::new(Arc::clone(backend), Arc::new(model.layout().clone()), make()).unwrap();
            drive::prefill(model, &mut s, &prompt, &Cancel::default()).unwrap();
            s
        };
        let mut a = run(&queued, &late);
        let mut b = run(&at_once.0, &at_once.1);
        // Across a tile boundary, so that a seal is among the steps.
        for token in 270..310 {
            let before = deferred.reads();
            drive::step(&late, &mut [&mut a], &[token], &Cancel::default()).unwrap();
            assert_eq!(deferred.reads() - before, 1, "reads of one step");
            drive::step(&at_once.1, &mut [&mut b], &[token], &Cancel::default()).unwrap();
            assert_eq!(a.logits(), b.logits());
        }
        assert_eq!(a.digest().unwrap(), b.digest().unwrap());
    }
}
