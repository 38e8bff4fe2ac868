//! The seam: batches, rows that shrink, grow and are skipped, and what a wrong hook or batch gets.

use std::ops::Range;
use std::sync::Arc;

use kvasir_core::{Ask, Backend, Batch, Buf, Call, Go, Hooks, Logits, Model, Part, Point, Result, Rows};
use kvasir_cpu::Isa;
use kvasir_model::Llama;
use kvasir_testkit::{Deferred, Spy, computed};

use crate::hooks::Dense;
use crate::support::{Session, cpu, data, distance, ids_u16, load};

const MODEL: &str = "models/stories260K-f32.gguf";

fn scalar() -> Llama {
    load(MODEL, Isa::Scalar)
}

fn alice(n: usize) -> Vec<u32> {
    std::iter::once(1).chain(ids_u16("golden/alice.tok512.u16")).take(n).collect()
}

/// Dense hooks with something done at each point.
struct With<'a, E, L, A> {
    dense: Dense,
    enter: E,
    leave: L,
    attend: A,
    model: &'a Llama,
}

impl<E, L, A> Hooks for With<'_, E, L, A>
where
    E: FnMut(&Llama, Point, &mut Rows) -> Result<Go>,
    L: FnMut(&Llama, Point, &mut Rows) -> Result<()>,
    A: FnMut(&Llama, Point, &mut Rows) -> Result<()>,
{
    fn enter(&mut self, at: Point, x: &mut Rows, _: Option<&Buf>) -> Result<Go> {
        (self.enter)(self.model, at, x)
    }
    fn attend(&mut self, at: Point, q: &Rows, k: &Rows, v: &Rows, out: &mut Rows) -> Result<()> {
        self.dense.attend(at, q, k, v, out)?;
        (self.attend)(self.model, at, out)
    }
    fn leave(&mut self, at: Point, y: &mut Rows) -> Result<()> {
        (self.leave)(self.model, at, y)
    }
}

fn dense(model: &Llama, seqs: usize) -> Dense {
    Dense::new(model.backend(), model.layout(), seqs)
}

fn run(model: &Llama, batch: &Batch, hooks: &mut dyn Hooks) -> Result<Logits> {
    let mut out = Logits::default();
    model.forward(batch, hooks, &mut out).map(|()| out)
}

#[allow(clippy::unnecessary_wraps)] // the shape of a hook
fn nop(_: &Llama, _: Point, _: &mut Rows) -> Result<()> {
    Ok(())
}

#[allow(clippy::unnecessary_wraps)]
fn go(_: &Llama, _: Point, _: &mut Rows) -> Result<Go> {
    Ok(Go::Run)
}

/// The rows `idx` of a buffer of rows.
fn take(model: &Llama, rows: &Rows, idx: &[u32]) -> Buf {
    let row_bytes = 4 * rows.dim;
    let dst = model.backend().alloc(idx.len() * row_bytes as usize).unwrap();
    let call = Call::Gather { src: rows.data.clone(), idx: idx.into(), row_bytes, dst: dst.clone() };
    model.backend().submit(call).unwrap();
    dst
}

fn row_range(logits: &Logits, rows: Range<usize>) -> &[f32] {
    &logits.data[rows.start * logits.vocab..rows.end * logits.vocab]
}

#[test]
fn sequences_of_a_batch_do_not_see_each_other() {
    let model = scalar();
    let (a, b) = (alice(40), vec![1, 410, 469, 347]);
    let alone = [&a, &b].map(|ids| Session::new(&model).pass(ids, Ask::All).clone());
    let batch = Batch {
        ids: [a.clone(), b.clone()].concat(),
        pos: (0..40).chain(0..4).collect(),
        of: vec![0..40, 40..44],
        ask: Ask::All,
    };
    let mut hooks = dense(&model, 2);
    let both = run(&model, &batch, &mut hooks).unwrap();
    assert_eq!(row_range(&both, 0..40), alone[0].data);
    assert_eq!(row_range(&both, 40..44), alone[1].data);
    assert_eq!(both.rows[38..42], [(0, 38), (0, 39), (1, 0), (1, 1)]);

    let last = run(&model, &Batch { ask: Ask::Last, ..batch.clone() }, &mut dense(&model, 2)).unwrap();
    assert_eq!(last.rows, [(0, 39), (1, 3)]);
    assert_eq!(last.row(0), both.row(39));
    assert_eq!(last.row(1), both.row(43));
    let none = run(&model, &Batch { ask: Ask::None, ..batch }, &mut dense(&model, 2)).unwrap();
    assert!(none.data.is_empty() && none.rows.is_empty());

    // One more token of each, the second sequence first idle: its range is empty.
    let step = Batch { ids: vec![5], pos: vec![40], of: vec![0..1, 1..1], ask: Ask::Last };
    let step = run(&model, &step, &mut hooks).unwrap();
    assert_eq!(step.rows, [(0, 40)]);
}

#[test]
fn passes_of_any_size_agree() {
    for isa in [Isa::Scalar, Isa::Auto] {
        let model = load(MODEL, isa);
        let ids = alice(300);
        let whole = Session::new(&model).pass(&ids, Ask::All).clone();
        for size in [1, 7, 64, 256] {
            let mut session = Session::new(&model);
            let mut parts = Vec::new();
            for chunk in ids.chunks(size) {
                parts.extend_from_slice(&session.pass(chunk, Ask::All).data);
            }
            if isa == Isa::Scalar {
                assert!(parts == whole.data, "scalar, passes of {size}");
            }
            let far = distance(&parts, &whole.data);
            assert!(far < 1e-4, "{isa:?}, passes of {size}: {far}");
        }
    }
}

#[test]
fn more_rows_than_a_slab() {
    let model = scalar();
    let ids = alice(300);
    let all = Session::new(&model).pass(&ids, Ask::All).clone();
    assert_eq!(all.data.len(), 300 * 512);
    assert_eq!(Session::new(&model).pass(&ids, Ask::Last).row(0), all.row(299));
}

#[test]
fn a_deferred_backend_is_read_once_a_step() {
    let deferred = Arc::new(Deferred::new(cpu(Isa::Scalar)));
    let late = Llama::load(data(MODEL), Arc::clone(&deferred) as Arc<dyn Backend>).unwrap();
    let model = scalar();
    let (mut a, mut b) = (Session::new(&model), Session::new(&late));
    let ids = alice(40);
    assert_eq!(deferred.reads(), 0, "loading waits for nothing");
    assert_eq!(a.pass(&ids, Ask::All).data, b.pass(&ids, Ask::All).data);
    assert_eq!(deferred.reads(), 1);
    b.pass(&[5], Ask::None);
    a.pass(&[5], Ask::None);
    assert_eq!(deferred.reads(), 1, "nothing asked, nothing read");
    for id in 6..9 {
        assert_eq!(a.pass(&[id], Ask::Last).data, b.pass(&[id], Ask::Last).data);
    }
    assert_eq!(deferred.reads(), 4);
}

#[test]
fn attend_may_keep_fewer_rows() {
    let model = scalar();
    let ids = alice(24);
    let whole = Session::new(&model).pass(&ids, Ask::All).clone();
    // Only the last layer drops rows, so what is left is exact.
    let kept = [3u32, 10, 23];
    let mut hooks = With {
        dense: dense(&model, 1),
        enter: go,
        leave: nop,
        attend: |m: &Llama, at: Point, out: &mut Rows| {
            if at.layer == 4 {
                out.data = take(m, out, &kept);
                out.pos = kept.to_vec();
                out.of = std::iter::once(0..3).collect();
            }
            Ok(())
        },
        model: &model,
    };
    let mut spy = Spy::new(&mut hooks);
    let got = run(&model, &Batch::one(&ids, 0, Ask::All), &mut spy).unwrap();
    let seen = spy.take();
    assert_eq!(computed(&seen, Part::Attention), [24; 5]);
    assert_eq!(computed(&seen, Part::Mlp), [24, 24, 24, 24, 3]);
    assert_eq!(got.rows, [(0, 3), (0, 10), (0, 23)]);
    for (i, &p) in kept.iter().enumerate() {
        assert_eq!(got.row(i), whole.row(p as usize));
    }
}

#[test]
fn enter_may_drop_rows_and_bring_them_back() {
    let model = scalar();
    let ids = alice(16);
    let whole = Session::new(&model).pass(&ids, Ask::All).clone();

    // The residual stream of all rows at layer 1, kept by a copy: the buffer itself belongs to the pass.
    let mut kept: Option<Rows> = None;
    let mut hooks = With {
        dense: dense(&model, 1),
        enter: |m: &Llama, at: Point, x: &mut Rows| {
            if at == Point::attention(1) {
                let all: Vec<u32> = (0..16).collect();
                kept = Some(Rows { data: take(m, x, &all), ..x.clone() });
            }
            Ok(Go::Run)
        },
        leave: nop,
        attend: nop,
        model: &model,
    };
    run(&model, &Batch::one(&ids, 0, Ask::None), &mut hooks).unwrap();
    let kept = kept.unwrap();

    // Four rows at layer 0, all sixteen from layer 1 on, the odd ones only from the last feed-forward part on.
    let odd: Vec<u32> = (1..16).step_by(2).collect();
    let mut hooks = With {
        dense: dense(&model, 1),
        enter: |m: &Llama, at: Point, x: &mut Rows| {
            if at == Point::attention(1) {
                *x = Rows { data: take(m, &kept, &(0..16).collect::<Vec<_>>()), ..kept.clone() };
            } else if at == Point::mlp(4) {
                x.data = take(m, x, &odd);
                x.pos.clone_from(&odd);
                x.of = std::iter::once(0..8).collect();
            }
            Ok(Go::Run)
        },
        leave: nop,
        attend: nop,
        model: &model,
    };
    let mut spy = Spy::new(&mut hooks);
    let got = run(&model, &Batch::one(&ids[12..], 12, Ask::All), &mut spy).unwrap();
    let seen = spy.take();
    assert_eq!(computed(&seen, Part::Attention), [4, 16, 16, 16, 16]);
    assert_eq!(computed(&seen, Part::Mlp), [4, 16, 16, 16, 8]);
    assert_eq!(got.rows.len(), 8);
    for (i, &p) in odd.iter().enumerate() {
        assert_eq!(got.rows[i], (0, p));
        assert_eq!(got.row(i), whole.row(p as usize));
    }
}

#[test]
fn a_skipped_part_is_not_computed() {
    let model = scalar();
    let ids = alice(16);
    let whole = Session::new(&model).pass(&ids, Ask::All).clone();
    let all: Vec<u32> = (0..16).collect();
    for at_part in [Point::attention(3), Point::mlp(3)] {
        let mut kept: Option<Buf> = None;
        let mut hooks = With {
            dense: dense(&model, 1),
            enter: go,
            leave: |m: &Llama, at: Point, y: &mut Rows| {
                if at == at_part {
                    kept = Some(take(m, y, &all));
                }
                Ok(())
            },
            attend: nop,
            model: &model,
        };
        run(&model, &Batch::one(&ids, 0, Ask::None), &mut hooks).unwrap();
        let kept = kept.unwrap();
        let mut hooks = With {
            dense: dense(&model, 1),
            enter: |m: &Llama, at: Point, x: &mut Rows| {
                if at != at_part {
                    return Ok(Go::Run);
                }
                m.backend().submit(Call::Add { x: x.data.clone(), y: kept.clone() })?;
                Ok(Go::Skip)
            },
            leave: nop,
            attend: nop,
            model: &model,
        };
        let mut spy = Spy::new(&mut hooks);
        let got = run(&model, &Batch::one(&ids, 0, Ask::All), &mut spy).unwrap();
        let seen = spy.at(3, at_part.part);
        assert_eq!((seen.computed, seen.attended, seen.left, seen.skipped), (0, 0, 0, 1));
        assert_eq!(got.data, whole.data);
    }
}

#[test]
fn all_rows_may_go() {
    let model = scalar();
    let mut hooks = With {
        dense: dense(&model, 1),
        enter: |_: &Llama, at: Point, x: &mut Rows| {
            if at == Point::mlp(2) {
                x.pos.clear();
                x.of = std::iter::once(0..0).collect();
            }
            Ok(Go::Run)
        },
        leave: nop,
        attend: nop,
        model: &model,
    };
    let got = run(&model, &Batch::one(&alice(5), 0, Ask::Last), &mut hooks).unwrap();
    assert!(got.rows.is_empty() && got.data.is_empty());
}

#[test]
fn a_wrong_batch_is_named() {
    let model = scalar();
    let good = Batch { ids: vec![1, 2, 3], pos: vec![0, 1, 2], of: vec![0..2, 2..3], ask: Ask::Last };
    let cases: [(&str, Batch); 9] = [
        ("batch.ids[1]", Batch { ids: vec![1, 512, 3], ..good.clone() }),
        ("batch.ids", Batch { ids: vec![], pos: vec![], of: vec![], ask: Ask::Last }),
        ("batch.pos", Batch { pos: vec![0, 1], ..good.clone() }),
        ("batch.pos[1]", Batch { pos: vec![1, 1, 2], ..good.clone() }),
        ("batch.of[1]", Batch { of: vec![0..2, 1..3], ..good.clone() }),
        ("batch.of[1]", Batch { of: vec![0..1, 2..3], ..good.clone() }),
        ("batch.of[1]", Batch { of: vec![0..2, 2..4], ..good.clone() }),
        ("batch.of", Batch { of: std::iter::once(0..2).collect(), ..good.clone() }),
        ("batch.of[0]", Batch { of: vec![Range { start: 2, end: 0 }], ..good.clone() }),
    ];
    for (field, batch) in cases {
        let e = run(&model, &batch, &mut dense(&model, 2)).unwrap_err();
        assert_eq!(e.code(), "InvalidArgument");
        assert!(e.to_string().starts_with(&format!("{field}: ")), "{field}: {e}");
    }
    run(&model, &good, &mut dense(&model, 2)).unwrap();
}

#[test]
fn a_wrong_hook_is_named() {
    let model = scalar();
    let batch = Batch::one(&alice(4), 0, Ask::Last);
    type Change = fn(&mut Rows);
    let cases: [(&str, &str, Change); 8] = [
        ("enter", "hooks.enter.x.dim", |x| x.dim = 32),
        ("enter", "hooks.enter.x.of", |x| x.of.push(4..4)),
        ("enter", "hooks.enter.x.pos[2]", |x| x.pos[2] = 1),
        ("enter", "hooks.enter.x.data", |x| x.data = x.data.slice(0..256).unwrap()),
        ("attend", "hooks.attend.out.pos", |x| x.pos[3] = 9),
        ("attend", "hooks.attend.out.of[0]", |x| x.pos.truncate(3)),
        ("leave", "hooks.leave.y", |y| {
            y.pos.truncate(3);
            y.of = std::iter::once(0..3).collect();
        }),
        ("leave", "hooks.leave.y.data", |y| y.data = y.data.slice(0..4).unwrap()),
    ];
    for (hook, field, change) in cases {
        let mut hooks = With {
            dense: dense(&model, 1),
            enter: |_: &Llama, _: Point, x: &mut Rows| {
                if hook == "enter" {
                    change(x);
                }
                Ok(Go::Run)
            },
            leave: |_: &Llama, _: Point, y: &mut Rows| {
                if hook == "leave" {
                    change(y);
                }
                Ok(())
            },
            attend: |_: &Llama, _: Point, out: &mut Rows| {
                if hook == "attend" {
                    change(out);
                }
                Ok(())
            },
            model: &model,
        };
        let e = run(&model, &batch, &mut hooks).unwrap_err();
        assert_eq!(e.code(), "InvalidArgument");
        assert!(e.to_string().starts_with(&format!("{field}: ")), "{field}: {e}");
    }
}
