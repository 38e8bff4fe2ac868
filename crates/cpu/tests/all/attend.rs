//! Attention against the naive f64 answer, on every path; bits against threads and batches.

use kvasir_core::{
    Backend, Call, Error, Format, Heads, KeySpace, Mask, Over, Probe, Queries, Reduce, Rope, RunId,
};
use kvasir_cpu::{Cpu, CpuOptions, Isa};
use proptest::prelude::*;

use crate::scene::{ADJACENT, HALF, Scene, Spec, codes, distance};
use crate::{cpu, cpus};

const FORMATS: [Format; 4] = [Format::F32, Format::F16, Format::Bf16, Format::INT8];

fn probe() -> impl Strategy<Value = Probe> {
    (
        prop_oneof![Just(Queries::All), (1u32..8).prop_map(Queries::Last), Just(Queries::Wanted)],
        prop_oneof![Just(Over::All), Just(Over::Past), (0u8..2).prop_map(|r| Over::Run(RunId(r)))],
        prop_oneof![Just(Reduce::Sum), Just(Reduce::Max), Just(Reduce::MeanVisible)],
        prop_oneof![Just(Heads::KvMean), Just(Heads::KvMax), Just(Heads::LayerMean)],
    )
        .prop_map(|(queries, over, reduce, heads)| Probe { queries, over, reduce, heads })
}

fn spec() -> impl Strategy<Value = Spec> {
    let dim = || prop_oneof![Just(8usize), Just(16), Just(64), Just(80), Just(128)];
    let run = (0usize..90, 0usize..4, 0usize..4, any::<bool>()).prop_map(|(rows, k, v, plain)| {
        let space = if plain { KeySpace::Plain } else { KeySpace::Rotated };
        (rows, codes(space, FORMATS[k], FORMATS[v]))
    });
    (
        (any::<u64>(), 1usize..3, prop_oneof![Just(1usize), Just(3), Just(4), Just(8)], dim(), dim()),
        prop::collection::vec(0usize..40, 1..3),
        prop::collection::vec(run, 1..4),
        prop_oneof![Just(Rope::None), Just(HALF), Just(ADJACENT)],
        (any::<bool>(), prop::option::of(1u32..70), any::<bool>(), any::<bool>(), any::<bool>()),
        prop::collection::vec(probe(), 0..3),
    )
        .prop_map(
            |(
                (seed, kv_heads, group, d, dv),
                rows,
                runs,
                rope,
                (full, window, bias, scale, ragged),
                mut probes,
            )| {
                if ragged {
                    probes
                        .iter_mut()
                        .filter(|p| p.heads == Heads::LayerMean)
                        .for_each(|p| p.heads = Heads::KvMean);
                }
                let mask = if full { Mask::Full } else { Mask::Causal };
                Spec {
                    seed,
                    kv_heads,
                    group,
                    d,
                    dv,
                    rows,
                    runs,
                    rope,
                    mask,
                    window,
                    bias,
                    scale,
                    ragged,
                    probes,
                }
            },
        )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_path_agrees_with_the_naive_answer(spec in spec()) {
        let scene = Scene::random(&spec);
        let want = scene.oracle();
        for backend in cpus() {
            let far = distance(&scene.run(&backend), &want);
            prop_assert!(far < 2e-4, "{}: {far}", backend.info().isa);
        }
    }
}

/// Long enough for several chunks.
fn long(rows: Vec<usize>) -> Spec {
    Spec {
        seed: 5,
        kv_heads: 2,
        group: 3,
        d: 16,
        dv: 16,
        rows,
        runs: vec![
            (1500, codes(KeySpace::Rotated, Format::F16, Format::F16)),
            (1300, codes(KeySpace::Plain, Format::INT8, Format::INT8)),
        ],
        rope: HALF,
        mask: Mask::Causal,
        window: None,
        bias: true,
        scale: false,
        ragged: false,
        probes: vec![Probe::all_queries(), Probe::last_queries(2).layer_mean()],
    }
}

#[test]
fn many_chunks_agree_with_the_naive_answer() {
    for rows in [vec![1], vec![2, 70]] {
        let scene = Scene::random(&long(rows));
        let want = scene.oracle();
        for backend in cpus() {
            let far = distance(&scene.run(&backend), &want);
            assert!(far < 2e-4, "{}: {far}", backend.info().isa);
        }
    }
}

#[test]
fn threads_do_not_change_a_bit() {
    for rows in [vec![1], vec![1, 1, 1], vec![200]] {
        let scene = Scene::random(&long(rows));
        for isa in [Isa::Scalar, Isa::Auto] {
            let of = |threads| scene.run(&Cpu::new(CpuOptions { isa, threads: Some(threads) }).unwrap());
            let one = of(1);
            assert_eq!(one, of(2));
            assert_eq!(one, of(5));
        }
    }
}

#[test]
fn a_row_alone_equals_the_row_in_its_batch() {
    let scene = Scene::random(&long(vec![70]));
    for isa in [Isa::Scalar, Isa::Auto] {
        let backend = cpu(isa);
        let call = scene.call(&backend);
        backend.submit(Call::Attend(Box::new(call.clone()))).unwrap();
        let all = backend.read_f32(&call.out).unwrap();
        let row = 6 * 16;
        for r in [0usize, 1, 33, 69] {
            let mut one = call.clone();
            one.q = call.q.slice(r * row * 4..(r + 1) * row * 4).unwrap();
            one.out = backend.alloc(row * 4).unwrap();
            one.lse = None;
            one.columns.clear();
            one.q_pos = call.q_pos[r..=r].into();
            one.q_rope = call.q_rope[r..=r].into();
            one.seqs[0].rows = 0..1;
            backend.submit(Call::Attend(Box::new(one.clone()))).unwrap();
            assert_eq!(backend.read_f32(&one.out).unwrap(), all[r * row..(r + 1) * row], "row {r}");
        }
    }
}

#[test]
fn a_query_that_sees_nothing_gets_zeros() {
    let mut spec = long(vec![3]);
    spec.runs = vec![(0, spec.runs[0].1.clone())];
    spec.bias = false;
    let mut scene = Scene::random(&spec);
    // Keys of the pass lie ahead of all queries.
    for run in scene.seqs[0].heads.iter_mut().flatten() {
        run.pos.iter_mut().for_each(|p| *p += 100);
    }
    for backend in cpus() {
        let answer = scene.run(&backend);
        assert!(answer.out.iter().all(|x| *x == 0.0));
        assert!(answer.lse.iter().all(|x| *x == -1e30));
        assert!(answer.columns.iter().flatten().flatten().flatten().flatten().all(|x| *x == 0.0));
    }
}

fn refused(what: &str, code: &str, change: impl Fn(&mut kvasir_core::Attend, &dyn Backend)) {
    let mut spec = long(vec![3, 2]);
    spec.runs[0].0 = 40;
    spec.runs[1].0 = 40;
    for backend in cpus() {
        let mut call = Scene::random(&spec).call(&backend);
        change(&mut call, &backend);
        let error = backend.submit(Call::Attend(Box::new(call))).expect_err(what);
        assert_eq!(error.code(), code, "{what}: {error}");
    }
}

#[test]
fn impossible_calls_are_typed_errors() {
    let bad = "InvalidArgument";
    refused("short q", bad, |c, _| c.q = c.q.slice(0..c.q.bytes() - 4).unwrap());
    refused("short out", bad, |c, _| c.out = c.out.slice(0..c.out.bytes() - 4).unwrap());
    refused("short lse", bad, |c, b| c.lse = b.alloc(4).ok());
    refused("q is out", bad, |c, _| c.out = c.q.clone());
    refused("out is a tile", bad, |c, b| {
        let bytes = c.seqs[0].heads[0][0].tiles[0].codes.bytes();
        let large = b.alloc(c.out.bytes().max(bytes)).unwrap();
        c.out = large.slice(0..c.out.bytes()).unwrap();
        std::sync::Arc::make_mut(&mut c.seqs[0].heads[0][0].tiles)[0].codes = large.slice(0..bytes).unwrap();
    });
    refused("no kv heads", bad, |c, _| c.kv_heads = 0);
    refused("heads that do not divide", bad, |c, _| c.kv_heads = 4);
    refused("zero channels", bad, |c, _| c.k_dim = 0);
    refused("odd rotation", bad, |c, _| c.rope.as_mut().unwrap().inv_freq = [1.0].into());
    refused("rotation positions", bad, |c, _| c.q_rope = [0].into());
    refused("rows twice", bad, |c, _| c.seqs[1].rows = 2..4);
    refused("rows outside", bad, |c, _| c.seqs[1].rows = 3..6);
    refused("rows backwards", bad, |c, _| c.seqs[1].rows = std::ops::Range { start: 5, end: 3 });
    refused("a head less", bad, |c, _| drop(c.seqs[0].heads.pop()));
    refused("a tile less", bad, |c, _| {
        drop(std::sync::Arc::make_mut(&mut c.seqs[0].heads[1][0].tiles).pop());
    });
    refused("other codes", bad, |c, _| {
        c.seqs[0].heads[0][0].codes = codes(KeySpace::Rotated, Format::F32, Format::F16);
    });
    refused("positions past the end", bad, |c, _| {
        c.seqs[0].heads[0][0].meta.pos = kvasir_core::Pos::From(u32::MAX - 3);
    });
    refused("short positions", bad, |c, _| {
        c.seqs[0].heads[0][0].meta.pos = kvasir_core::Pos::List(vec![1].into());
    });
    refused("short bias", bad, |c, b| c.seqs[0].heads[0][0].meta.bias = b.alloc(128).ok());
    refused("scale not finite", bad, |c, _| c.scale = f32::NAN);
    refused("targets of one sequence", bad, |c, _| drop(c.columns[0].targets.pop()));
    refused("short target", bad, |c, b| c.columns[0].targets[0][0][0] = b.alloc(4).ok());
    refused("NaN in q", "NonFinite", |c, b| {
        b.submit(Call::Fill { dst: c.q.slice(8..12).unwrap(), value: f32::NAN }).unwrap();
    });
    refused("strips", "Unsupported", |c, _| c.columns[0].probe.reduce = Reduce::Strips(vec![1]));
    refused("tracked", "Unsupported", |c, _| {
        c.columns[0].probe.queries = Queries::Tracked(kvasir_core::ColId(0));
    });
    refused("only", "Unsupported", |c, _| c.columns[0].probe.heads = Heads::Only(kvasir_core::SideId(0)));
    refused("ragged layer mean", bad, |c, _| {
        c.seqs[0].heads[0][0].rows -= 1;
        c.columns[0].probe.heads = Heads::LayerMean;
    });
    refused("four bits", "Unsupported", |c, _| {
        c.seqs[0].heads[0][0].codes[0].format =
            Format::Int { bits: 4, along: kvasir_core::Axis::Row, group: 0 };
    });
}

#[test]
fn error_text_names_the_field() {
    let backend = cpu(Isa::Scalar);
    let mut call = Scene::random(&long(vec![1])).call(&backend);
    call.lse = backend.alloc(8).ok();
    let Err(error @ Error::Invalid { .. }) = backend.submit(Call::Attend(Box::new(call))) else {
        panic!("accepted")
    };
    assert_eq!(error.to_string(), "attend.lse: expected 24 bytes, got 8 bytes");
}
