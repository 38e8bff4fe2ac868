//! Dense calls and byte moves against naive f64 or plain copies.

use kvasir_core::{Activation, Backend, Buf, Call, Weight, WeightType};
use kvasir_cpu::{Cpu, CpuOptions, Isa};
use kvasir_testkit::Noise;
use kvasir_testkit::pack::{beside, in_row_order, weight};
use proptest::prelude::*;

use crate::cpus;

const KINDS: [WeightType; 6] = [
    WeightType::F32,
    WeightType::F16,
    WeightType::Bf16,
    WeightType::Q8_0,
    WeightType::Q4_0,
    WeightType::Q4_1,
];

fn matrix(
    backend: &dyn Backend,
    kind: WeightType,
    rows: usize,
    cols: usize,
    seed: u64,
) -> (Weight, Vec<f64>) {
    let (bytes, values) = weight(kind, rows, cols, &mut Noise::new(seed));
    let data = backend.upload(&bytes).unwrap();
    (Weight { data, kind, rows: rows as u32, cols: cols as u32 }, values)
}

fn product(
    backend: &dyn Backend,
    kind: WeightType,
    n: usize,
    rows: usize,
    cols: usize,
    add: bool,
) -> (Vec<f32>, Vec<f64>) {
    let (w, values) = matrix(backend, kind, rows, cols, 3);
    let mut noise = Noise::new(4);
    let (x, before) = (noise.normals(n * cols), noise.normals(n * rows));
    let out = backend.upload_f32(&before).unwrap();
    backend.submit(Call::MatMul { x: backend.upload_f32(&x).unwrap(), w, out: out.clone(), add }).unwrap();
    let mut want = Vec::new();
    for (r, x) in x.chunks(cols).enumerate() {
        for (o, w) in values.chunks(cols).enumerate() {
            let dot: f64 = x.iter().zip(w).map(|(x, w)| f64::from(*x) * w).sum();
            want.push(dot + if add { f64::from(before[r * rows + o]) } else { 0.0 });
        }
    }
    (backend.read_f32(&out).unwrap(), want)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 80, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn products_agree_with_the_naive_answer(
        kind in 0usize..6, n in 1usize..12, rows in 1usize..140, blocks in 1usize..9, odd in 0usize..40, add: bool,
    ) {
        let kind = KINDS[kind];
        let cols = if kind.block().0 == 1 { blocks * 8 + odd } else { blocks * 32 };
        for backend in cpus() {
            let (got, want) = product(&backend, kind, n, rows, cols, add);
            for (x, y) in got.iter().zip(&want) {
                prop_assert!((f64::from(*x) - y).abs() < 1e-4 * (1.0 + y.abs()), "{}: {x} {y}", backend.info().isa);
            }
        }
    }

    #[test]
    fn elementwise_calls_agree_with_the_naive_answer(n in 0usize..7, dim in 1usize..1100, seed: u64) {
        let mut noise = Noise::new(seed);
        let (a, b, w) = (noise.normals(n * dim), noise.normals(n * dim), noise.normals(dim));
        let wide: Vec<f32> = a.iter().map(|x| x * 20.0).collect();
        for backend in cpus() {
            let up = |x: &[f32]| backend.upload_f32(x).unwrap();
            let room = |n: usize| backend.alloc(n * 4).unwrap();
            let (out, dist) = (room(n * dim), room(n));
            let norm = Call::RmsNorm { x: up(&a), weight: up(&w), eps: 1e-5, dim: dim as u32, out: out.clone() };
            backend.submit(norm).unwrap();
            for (x, y) in a.chunks(dim).zip(backend.read_f32(&out).unwrap().chunks(dim)) {
                let mean = x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / dim as f64 + 1e-5;
                for ((x, y), w) in x.iter().zip(y).zip(&w) {
                    prop_assert!((f64::from(*x) / mean.sqrt() * f64::from(*w) - f64::from(*y)).abs() < 1e-5);
                }
            }
            let (x, y) = (up(&wide), up(&b));
            let f = Activation::SwiGlu;
            backend.submit(Call::Activate { f, a: x.clone(), b: y.clone(), out: out.clone() }).unwrap();
            let apart = backend.read_f32(&out).unwrap();
            for ((a, b), y) in wide.iter().zip(&b).zip(&apart) {
                let want = f64::from(*a) / (1.0 + (-f64::from(*a)).exp()) * f64::from(*b);
                prop_assert!((want - f64::from(*y)).abs() < 1e-5 * (1.0 + want.abs()));
            }
            backend.submit(Call::Activate { f, a: x.clone(), b: y.clone(), out: x.clone() }).unwrap();
            prop_assert_eq!(&backend.read_f32(&x).unwrap(), &apart);
            backend.submit(Call::Add { x: x.clone(), y: y.clone() }).unwrap();
            let sum: Vec<f32> = apart.iter().zip(&b).map(|(x, y)| x + y).collect();
            prop_assert_eq!(backend.read_f32(&x).unwrap(), sum);
            backend.submit(Call::RowDistance { a: up(&a), b: y, dim: dim as u32, out: dist.clone() }).unwrap();
            let dist = backend.read_f32(&dist).unwrap();
            for ((a, b), got) in a.chunks(dim).zip(b.chunks(dim)).zip(dist) {
                let want: f64 = a.iter().zip(b).map(|(x, y)| (f64::from(*x) - f64::from(*y)).powi(2)).sum();
                prop_assert!((want - f64::from(got)).abs() < 1e-6 * want);
            }
        }
    }

    #[test]
    fn rows_move_as_they_are(rows in 1usize..20, wide in 1usize..40, seed: u64) {
        let mut noise = Noise::new(seed);
        let src: Vec<u8> = (0..rows * wide).map(|_| noise.bits() as u8).collect();
        let idx: Vec<u32> = (0..rows + 3).map(|_| noise.below(rows as u32)).collect();
        for backend in cpus() {
            let from = backend.upload(&src).unwrap();
            let dst = backend.alloc(idx.len() * wide).unwrap();
            let gather = Call::Gather { src: from.clone(), idx: idx.clone().into(), row_bytes: wide as u32, dst: dst.clone() };
            backend.submit(gather).unwrap();
            let mut got = vec![0; dst.bytes()];
            backend.read(&dst, &mut got).unwrap();
            let want: Vec<u8> = idx.iter().flat_map(|&i| src[i as usize * wide..][..wide].to_vec()).collect();
            prop_assert_eq!(&got, &want);
            let place = noise.ascending(rows, rows as u32 + 3);
            backend.submit(Call::Scatter { src: from, idx: place.clone().into(), row_bytes: wide as u32, dst: dst.clone() }).unwrap();
            let mut want = want;
            for (i, &to) in place.iter().enumerate() {
                want[to as usize * wide..][..wide].copy_from_slice(&src[i * wide..][..wide]);
            }
            backend.read(&dst, &mut got).unwrap();
            prop_assert_eq!(&got, &want);
        }
    }
}

#[test]
fn embedding_decodes_rows() {
    for backend in cpus() {
        for kind in KINDS {
            let (table, values) = matrix(&backend, kind, 9, 96, 1);
            let ids = [8u32, 0, 3, 3];
            let out = backend.alloc(ids.len() * 96 * 4).unwrap();
            backend.submit(Call::Embed { table, ids: ids.into(), out: out.clone() }).unwrap();
            let got = backend.read_f32(&out).unwrap();
            for (row, id) in got.chunks(96).zip(ids) {
                for (x, y) in row.iter().zip(&values[id as usize * 96..]) {
                    assert!((f64::from(*x) - y).abs() <= 1e-6 * (1.0 + y.abs()), "{kind:?}");
                }
            }
        }
    }
}

#[test]
fn threads_do_not_change_a_bit() {
    for isa in [Isa::Scalar, Isa::Auto] {
        for kind in KINDS {
            for n in [1, 3, 40] {
                let of = |threads| {
                    product(
                        &Cpu::new(CpuOptions { isa, threads: Some(threads) }).unwrap(),
                        kind,
                        n,
                        333,
                        256,
                        true,
                    )
                    .0
                };
                let one = of(1);
                assert_eq!(one, of(2));
                assert_eq!(one, of(5));
            }
        }
    }
}

#[test]
fn a_scalar_row_does_not_depend_on_its_batch() {
    let backend = crate::cpu(Isa::Scalar);
    for kind in KINDS {
        let many = product(&backend, kind, 9, 70, 64, false).0;
        for n in [1, 4, 5] {
            assert_eq!(product(&backend, kind, n, 70, 64, false).0, many[..n * 70]);
        }
    }
}

#[test]
fn columns_are_compacted_in_row_order_and_start_at_zero() {
    for backend in cpus() {
        let rows: Vec<f32> = (0..50u8).map(f32::from).collect();
        let src = backend.upload_f32(&beside(&rows, 9.0)).unwrap();
        let dst = backend.upload_f32(&[7.0; 96]).unwrap();
        let idx: Vec<u32> = (0..40).map(|i| (i * 7) % 50).collect();
        backend.submit(Call::CompactColumn { src, idx: idx.clone().into(), dst: dst.clone() }).unwrap();
        let got = in_row_order(&backend.read_f32(&dst).unwrap(), 96);
        let want: Vec<f32> = idx.iter().map(|&i| i as f32).chain(std::iter::repeat_n(0.0, 56)).collect();
        assert_eq!(got, want);
    }
}

#[test]
fn impossible_calls_are_typed_errors() {
    for backend in cpus() {
        let f = |n: usize| backend.alloc(n * 4).unwrap();
        let weight = |rows: u32, cols: u32, bytes: usize, kind| Weight {
            data: backend.alloc(bytes).unwrap(),
            kind,
            rows,
            cols,
        };
        let square = |n: u32| weight(n, n, (n * n * 4) as usize, WeightType::F32);
        let one = f(64);
        let part = |b: &Buf, from: usize| b.slice(from..from + 64).unwrap();
        let calls = [
            Call::Write { dst: f(2), data: [0; 7].into() },
            Call::Copy { src: f(2), dst: f(3) },
            Call::Copy { src: part(&one, 0), dst: part(&one, 32) },
            Call::Fill { dst: f(2).slice(0..7).unwrap(), value: 0.0 },
            Call::Fill { dst: f(2).slice(1..5).unwrap(), value: 0.0 },
            Call::Embed { table: square(4), ids: [4].into(), out: f(4) },
            Call::Embed { table: square(4), ids: [3].into(), out: f(5) },
            Call::Embed { table: weight(u32::MAX, u32::MAX, 4, WeightType::F32), ids: [].into(), out: f(0) },
            Call::RmsNorm { x: f(8), weight: f(4), eps: 0.0, dim: 0, out: f(8) },
            Call::RmsNorm { x: f(8), weight: f(4), eps: 0.0, dim: 3, out: f(8) },
            Call::RmsNorm { x: f(8), weight: f(3), eps: 0.0, dim: 4, out: f(8) },
            Call::RmsNorm { x: f(8), weight: f(4), eps: 0.0, dim: 4, out: f(4) },
            Call::MatMul { x: f(6), w: square(4), out: f(4), add: false },
            Call::MatMul { x: f(8), w: square(4), out: f(4), add: false },
            Call::MatMul { x: one.clone(), w: square(4), out: one.clone(), add: false },
            Call::MatMul { x: f(40), w: weight(1, 40, 34, WeightType::Q8_0), out: f(1), add: false },
            Call::MatMul { x: f(32), w: weight(1, 32, 33, WeightType::Q8_0), out: f(1), add: false },
            Call::MatMul { x: f(4), w: weight(4, 0, 0, WeightType::F32), out: f(4), add: false },
            Call::Activate { f: Activation::SwiGlu, a: f(2), b: f(3), out: f(2) },
            Call::Activate { f: Activation::SwiGlu, a: part(&one, 0), b: f(16), out: part(&one, 32) },
            Call::Add { x: f(2), y: f(3) },
            Call::Gather { src: f(4), idx: [4].into(), row_bytes: 4, dst: f(1) },
            Call::Gather { src: f(4), idx: [0].into(), row_bytes: 0, dst: f(0) },
            Call::Gather { src: f(4), idx: [0, 1].into(), row_bytes: 4, dst: f(1) },
            Call::Scatter { src: f(1), idx: [4].into(), row_bytes: 4, dst: f(4) },
            Call::Scatter { src: f(2), idx: [0].into(), row_bytes: 4, dst: f(4) },
            Call::CompactColumn { src: f(32), idx: [32].into(), dst: f(32) },
            Call::CompactColumn { src: f(32), idx: vec![0; 33].into(), dst: f(32) },
            Call::RowDistance { a: f(4), b: f(4), dim: 3, out: f(1) },
            Call::RowDistance { a: f(4), b: f(2), dim: 2, out: f(2) },
            Call::RowDistance { a: f(4), b: f(4), dim: 2, out: f(3) },
        ];
        for call in calls {
            let shown = format!("{call:?}");
            let error = backend.submit(call).expect_err(&shown);
            assert_eq!(error.code(), "InvalidArgument", "{shown}: {error}");
        }
        assert_eq!(backend.read(&f(1), &mut [0; 5]).unwrap_err().code(), "InvalidArgument");
        assert_eq!(backend.alloc(usize::MAX).unwrap_err().code(), "OutOfMemory");
    }
}
