//! Moves, products, norms, elementwise calls.

use kvasir_core::{Activation, Backend, Call, Weight, WeightType};

use super::{Bench, close, same_bytes};
use crate::{Noise, pack};

pub(super) fn run(backend: &dyn Backend) {
    let b = Bench { backend };
    moves(&b);
    matmul(&b);
    embed(&b);
    elementwise(&b);
    refusals(&b);
}

fn moves(b: &Bench<'_>) {
    assert!(!b.backend.info().kind.is_empty(), "the backend says what it is");
    let fresh = b.zeros(33);
    assert_eq!(b.read("alloc", &fresh), [0.0; 33], "alloc: memory is zeroed");
    let data: Vec<f32> = (0..64u8).map(f32::from).collect();
    let src = b.up(&data);
    assert_eq!(b.read("write", &src), data);

    let part = |i: usize, n: usize| src.slice(4 * i..4 * (i + n)).expect("a slice");
    assert_eq!(b.read("read of a slice", &part(10, 3)), [10.0, 11.0, 12.0]);
    let mut prefix = [0u8; 8];
    b.backend.read(&part(10, 3), &mut prefix).expect("read of a prefix");
    assert_eq!(prefix[4..], 11f32.to_le_bytes(), "read copies the first bytes");
    let dst = b.zeros(8);
    b.submit("copy", Call::Copy { src: part(5, 4), dst: dst.slice(8..24).expect("a slice") });
    assert_eq!(b.read("copy", &dst), [0.0, 0.0, 5.0, 6.0, 7.0, 8.0, 0.0, 0.0]);
    b.submit("fill", Call::Fill { dst: dst.slice(4..12).expect("a slice"), value: -2.5 });
    assert_eq!(b.read("fill", &dst), [0.0, -2.5, -2.5, 6.0, 7.0, 8.0, 0.0, 0.0]);

    let mut noise = Noise::new(11);
    let bytes: Vec<u8> = (0..20 * 12).map(|_| noise.bits() as u8).collect();
    let idx: Vec<u32> = vec![19, 0, 7, 7, 3];
    let (src, dst) = (b.up_bytes(&bytes), b.zeros(5 * 3));
    b.submit(
        "gather",
        Call::Gather { src: src.clone(), idx: idx.clone().into(), row_bytes: 12, dst: dst.clone() },
    );
    let want: Vec<u8> = idx.iter().flat_map(|&i| bytes[12 * i as usize..][..12].to_vec()).collect();
    same_bytes("gather", &b.read_bytes("gather", &dst), &want);
    let idx: Vec<u32> = vec![4, 18, 2, 0, 9];
    b.submit("scatter", Call::Scatter { src: dst, idx: idx.clone().into(), row_bytes: 12, dst: src.clone() });
    let mut all = bytes;
    for (row, &i) in want.chunks(12).zip(&idx) {
        all[12 * i as usize..][..12].copy_from_slice(row);
    }
    same_bytes("scatter", &b.read_bytes("scatter", &src), &all);
}

fn weight(b: &Bench<'_>, kind: WeightType, rows: usize, cols: usize, seed: u64) -> (Weight, Vec<f64>) {
    let (bytes, values) = pack::weight(kind, rows, cols, &mut Noise::new(seed));
    assert_eq!(bytes.len(), rows * kind.row_bytes(cols));
    (Weight { data: b.up_bytes(&bytes), kind, rows: rows as u32, cols: cols as u32 }, values)
}

const KINDS: [WeightType; 6] = [
    WeightType::F32,
    WeightType::F16,
    WeightType::Bf16,
    WeightType::Q8_0,
    WeightType::Q4_0,
    WeightType::Q4_1,
];

fn matmul(b: &Bench<'_>) {
    for (s, kind) in KINDS.into_iter().enumerate() {
        for (rows, cols) in [(1, 32), (17, 96), (64, 64), (70, 256)] {
            let (w, values) = weight(b, kind, rows, cols, 100 + s as u64);
            for n in [1, 2, 3, 4, 5, 8, 33, 67] {
                for add in [false, true] {
                    let what = format!("matmul {kind:?} [{rows}, {cols}] x {n} rows, add {add}");
                    let mut noise = Noise::new(n as u64);
                    let (x, before) = (noise.normals(n * cols), noise.normals(n * rows));
                    let out = b.up(&before);
                    let call = Call::MatMul { x: b.up(&x), w: w.clone(), out: out.clone(), add };
                    b.submit(&what, call);
                    let (mut want, mut size) = (Vec::new(), Vec::new());
                    for (x, before) in x.chunks(cols).zip(before.chunks(rows)) {
                        for (w, before) in values.chunks(cols).zip(before) {
                            let terms = w.iter().zip(x).map(|(w, x)| w * f64::from(*x));
                            let before = if add { f64::from(*before) } else { 0.0 };
                            want.push(terms.clone().sum::<f64>() + before);
                            size.push(4e-6 * terms.map(f64::abs).sum::<f64>() + 1e-6);
                        }
                    }
                    close(&what, &b.read(&what, &out), &want, |i| size[i]);
                }
            }
        }
    }
}

fn embed(b: &Bench<'_>) {
    for (s, kind) in KINDS.into_iter().enumerate() {
        let (table, values) = weight(b, kind, 50, 96, 200 + s as u64);
        let ids: Vec<u32> = vec![49, 0, 7, 7, 12];
        let out = b.zeros(ids.len() * 96);
        let what = format!("embed {kind:?}");
        b.submit(&what, Call::Embed { table, ids: ids.clone().into(), out: out.clone() });
        let want: Vec<f64> = ids.iter().flat_map(|&i| values[96 * i as usize..][..96].to_vec()).collect();
        close(&what, &b.read(&what, &out), &want, |_| 1e-7);
    }
}

fn elementwise(b: &Bench<'_>) {
    let mut noise = Noise::new(5);
    for (n, dim) in [(1, 64), (3, 80), (9, 172), (40, 576)] {
        let (x, y, w) = (noise.normals(n * dim), noise.normals(n * dim), noise.normals(dim));
        let (bx, by) = (b.up(&x), b.up(&y));
        let f = |x: &[f32]| -> Vec<f64> { x.iter().map(|&x| f64::from(x)).collect() };
        let (fx, fy, fw) = (f(&x), f(&y), f(&w));

        let (what, out) = (format!("norm of {n} rows of {dim}"), b.zeros(n * dim));
        b.submit(
            &what,
            Call::RmsNorm { x: bx.clone(), weight: b.up(&w), eps: 1e-5, dim: dim as u32, out: out.clone() },
        );
        let want: Vec<f64> = fx
            .chunks(dim)
            .flat_map(|row| {
                let r = 1.0 / (row.iter().map(|x| x * x).sum::<f64>() / dim as f64 + 1e-5).sqrt();
                row.iter().zip(&fw).map(move |(x, w)| x * r * w).collect::<Vec<_>>()
            })
            .collect();
        close(&what, &b.read(&what, &out), &want, |_| 4e-6);

        let what = format!("row distance of {n} rows of {dim}");
        let out = b.zeros(n);
        let call = Call::RowDistance { a: bx.clone(), b: by.clone(), dim: dim as u32, out: out.clone() };
        b.submit(&what, call);
        let want: Vec<f64> = fx
            .chunks(dim)
            .zip(fy.chunks(dim))
            .map(|(a, b)| a.iter().zip(b).map(|(a, b)| (a - b) * (a - b)).sum())
            .collect();
        close(&what, &b.read(&what, &out), &want, |_| 4e-6);

        let swiglu: Vec<f64> = fx.iter().zip(&fy).map(|(a, b)| a / (1.0 + (-a).exp()) * b).collect();
        let out = b.zeros(n * dim);
        let call = |out: &kvasir_core::Buf| Call::Activate {
            f: Activation::SwiGlu,
            a: bx.clone(),
            b: by.clone(),
            out: out.clone(),
        };
        b.submit("swiglu", call(&out));
        close("swiglu", &b.read("swiglu", &out), &swiglu, |_| 4e-6);
        b.submit("add", Call::Add { x: out.clone(), y: by.clone() });
        let sum: Vec<f64> = swiglu.iter().zip(&fy).map(|(a, b)| a + b).collect();
        close("add", &b.read("add", &out), &sum, |_| 5e-6);
        b.submit("swiglu in place", call(&bx));
        close("swiglu in place", &b.read("swiglu in place", &bx), &swiglu, |_| 4e-6);
    }
    let far = b.up(&[-200.0, 200.0]);
    let call =
        Call::Activate { f: Activation::SwiGlu, a: far.clone(), b: b.up(&[1.0, 1.0]), out: far.clone() };
    b.submit("swiglu far out", call);
    close("swiglu far out", &b.read("swiglu", &far), &[0.0, 200.0], |_| 1e-6);
}

fn refusals(b: &Bench<'_>) {
    let (small, large) = (b.zeros(4), b.zeros(8));
    b.refuses(
        "write of too many bytes",
        Call::Write { dst: small.clone(), data: vec![0; 20].into() },
        &small,
    );
    b.refuses("copy of unequal lengths", Call::Copy { src: large.clone(), dst: small.clone() }, &small);
    b.refuses("sum of unequal lengths", Call::Add { x: small.clone(), y: large.clone() }, &small);
    let gather = |idx: Vec<u32>| Call::Gather {
        src: large.clone(),
        idx: idx.into(),
        row_bytes: 8,
        dst: small.clone(),
    };
    b.refuses("gather beyond the source", gather(vec![0, 4]), &small);
    b.refuses("gather of too many rows", gather(vec![0, 1, 2]), &small);
    let (w, _) = weight(b, WeightType::F32, 4, 8, 1);
    let call = Call::MatMul { x: small.clone(), w: w.clone(), out: small.clone(), add: false };
    b.refuses("matmul with short rows", call, &small);
    let call = Call::MatMul { x: large.clone(), w: w.clone(), out: large.clone(), add: false };
    b.refuses("matmul with a long output", call, &large);
    let call = Call::Embed { table: w, ids: vec![4].into(), out: large.clone() };
    b.refuses("embed of an unknown id", call, &large);
    let norm =
        Call::RmsNorm { x: large.clone(), weight: small.clone(), eps: 1e-5, dim: 8, out: large.clone() };
    b.refuses("norm with a short weight", norm, &large);
    let mut long = vec![0; 64];
    assert!(b.backend.read(&small, &mut long).is_err(), "read of more bytes than there are");
}
