//! Tiles: append, seal, decode, compact, byte for byte against the naive packer; one golden file pins the format.

use std::sync::Arc;

use kvasir_core::{Backend, Buf, Call, Code, Codes, Format, KeySpace, RopeArg, RowWrite, Tile, tile_bytes};
use kvasir_testkit::Noise;
use kvasir_testkit::pack::{pack, unpack};
use proptest::prelude::*;

use crate::cpus;
use crate::scene::{ADJACENT, HALF, codes};

const FORMATS: [Format; 4] = [Format::F32, Format::F16, Format::Bf16, Format::INT8];

fn bytes_of(backend: &dyn Backend, b: &Buf) -> Vec<u8> {
    let mut bytes = vec![0; b.bytes()];
    backend.read(b, &mut bytes).unwrap();
    bytes
}

/// The bytes of a tile of zero rows, as seal and compact leave them where no row is.
fn full(codes: &Codes, d: usize, dv: usize, k: &[f32], v: &[f32]) -> Vec<u8> {
    let grow = |x: &[f32], d: usize| {
        x.iter().copied().chain(std::iter::repeat(0.0)).take(32 * d).collect::<Vec<_>>()
    };
    pack(codes, d, dv, &grow(k, d), &grow(v, dv))
}

fn dim() -> impl Strategy<Value = usize> {
    prop_oneof![Just(8usize), Just(16), Just(64), Just(80), Just(128), 1usize..40]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn append_writes_the_bytes_of_the_packer(
        kf in 0usize..3, vf in 0usize..3, d in dim(), dv in dim(), heads in 1usize..4, rows in 0usize..33, seed: u64,
    ) {
        let codes = codes(KeySpace::Rotated, FORMATS[kf], FORMATS[vf]);
        let mut noise = Noise::new(seed);
        let (k, v) = (noise.normals(rows * heads * d), noise.normals(rows * heads * dv));
        for backend in cpus() {
            let size = tile_bytes(&codes, d, dv).unwrap();
            let tiles: Vec<Buf> = (0..heads).map(|_| backend.alloc(size).unwrap()).collect();
            let writes = (0..rows).flat_map(|r| (0..heads).map(move |h| (r, h)));
            let call = Call::Append {
                k: backend.upload_f32(&k).unwrap(),
                v: backend.upload_f32(&v).unwrap(),
                kv_heads: heads as u16, k_dim: d as u16, v_dim: dv as u16,
                codes: codes.clone(),
                rope: None,
                writes: writes.map(|(r, h)| RowWrite { src: r as u32, head: h as u16, slot: r as u8, tile: tiles[h].clone() }).collect(),
            };
            backend.submit(call).unwrap();
            for (h, tile) in tiles.iter().enumerate() {
                let of = |x: &[f32], d: usize| x.chunks(heads * d).flat_map(|r| r[h * d..][..d].to_vec()).collect::<Vec<_>>();
                prop_assert_eq!(bytes_of(&backend, tile), pack(&codes, d, dv, &of(&k, d), &of(&v, dv)));
            }
        }
    }

    #[test]
    fn seal_and_decode_agree_with_the_packer(
        from in (0usize..4, 0usize..4), to in (0usize..4, 0usize..4), d in dim(), dv in dim(), rows in 0usize..33, seed: u64,
    ) {
        let of = |(k, v): (usize, usize)| codes(KeySpace::Plain, FORMATS[k], FORMATS[v]);
        let (from, to) = (of(from), of(to));
        let mut noise = Noise::new(seed);
        let source = pack(&from, d, dv, &noise.normals(32 * d), &noise.normals(32 * dv));
        let (k, v) = unpack(&from, d, dv, &source, rows);
        for backend in cpus() {
            let src = backend.upload(&source).unwrap();
            let room = |n: usize| backend.upload_f32(&vec![f32::NAN; n]).unwrap();
            let (k_out, v_out) = (room(32 * d), room(32 * dv));
            backend.submit(Call::Decode {
                codes: from.clone(), k_dim: d as u16, v_dim: dv as u16, tile: src.clone(), rows: rows as u8,
                k_out: k_out.clone(), v_out: v_out.clone(),
            }).unwrap();
            let rest = |x: &[f32], d: usize| x.iter().copied().chain(std::iter::repeat(0.0)).take(32 * d).collect::<Vec<_>>();
            prop_assert_eq!(backend.read_f32(&k_out).unwrap(), rest(&k, d));
            prop_assert_eq!(backend.read_f32(&v_out).unwrap(), rest(&v, dv));

            let dst = backend.upload(&vec![0x55; tile_bytes(&to, d, dv).unwrap()]).unwrap();
            backend.submit(Call::Seal {
                from_codes: from.clone(), to_codes: to.clone(), k_dim: d as u16, v_dim: dv as u16,
                tiles: vec![(src, dst.clone(), rows as u8)],
            }).unwrap();
            let (got, want) = (bytes_of(&backend, &dst), full(&to, d, dv, &k, &v));
            // Bytes between the parts belong to nobody.
            let (key, value) = (to[0].format.part_bytes(d).unwrap(), kvasir_core::value_offset(&to, d).unwrap());
            let end = value + to[1].format.part_bytes(dv).unwrap();
            prop_assert_eq!(&got[..key], &want[..key]);
            prop_assert_eq!(&got[value..end], &want[value..end]);
        }
    }

    #[test]
    fn compact_copies_codes_and_parameters(
        kf in 0usize..4, vf in 0usize..4, d in dim(), dv in dim(), tiles in 1usize..4, keep in 0usize..70, seed: u64,
    ) {
        let codes = codes(KeySpace::Rotated, FORMATS[kf], FORMATS[vf]);
        let mut noise = Noise::new(seed);
        let sources: Vec<Vec<u8>> =
            (0..tiles).map(|_| pack(&codes, d, dv, &noise.normals(32 * d), &noise.normals(32 * dv))).collect();
        let idx: Vec<u32> = (0..keep).map(|_| noise.below(tiles as u32 * 32)).collect();
        for backend in cpus() {
            let src = sources.iter().map(|s| Tile { codes: backend.upload(s).unwrap(), own: false }).collect();
            let dst: Vec<Buf> = (0..keep.div_ceil(32)).map(|_| backend.alloc(tile_bytes(&codes, d, dv).unwrap()).unwrap()).collect();
            backend.submit(Call::Compact {
                codes: codes.clone(), k_dim: d as u16, v_dim: dv as u16, src, idx: idx.clone().into(), dst: dst.clone(),
            }).unwrap();
            for (dst, idx) in dst.iter().zip(idx.chunks(32)) {
                let rows = idx.iter().map(|&i| {
                    let (k, v) = unpack(&codes, d, dv, &sources[i as usize / 32], 32);
                    let t = i as usize % 32;
                    (k[t * d..][..d].to_vec(), v[t * dv..][..dv].to_vec())
                });
                let (k, v): (Vec<_>, Vec<_>) = rows.unzip();
                let (got_k, got_v) = unpack(&codes, d, dv, &bytes_of(&backend, dst), 32);
                let rest = |x: Vec<Vec<f32>>, d: usize| x.concat().into_iter().chain(std::iter::repeat(0.0)).take(32 * d).collect::<Vec<_>>();
                prop_assert_eq!(got_k, rest(k, d));
                prop_assert_eq!(got_v, rest(v, dv));
            }
        }
    }
}

#[test]
fn append_rotates_keys_where_the_code_says_so() {
    let (d, pos) = (16usize, [3u32, 70_000]);
    let inv_freq: Arc<[f32]> = (0..8).map(|i| 0.5f32.powi(i)).collect();
    let mut noise = Noise::new(2);
    let (k, v) = (noise.normals(2 * d), noise.normals(2 * d));
    for backend in cpus() {
        for kind in [HALF, ADJACENT] {
            for space in [KeySpace::Rotated, KeySpace::Plain] {
                let codes = codes(space, Format::F32, Format::F32);
                let tile = backend.alloc(tile_bytes(&codes, d, d).unwrap()).unwrap();
                let write = |i: u8| RowWrite { src: u32::from(i), head: 0, slot: i, tile: tile.clone() };
                backend
                    .submit(Call::Append {
                        k: backend.upload_f32(&k).unwrap(),
                        v: backend.upload_f32(&v).unwrap(),
                        kv_heads: 1,
                        k_dim: d as u16,
                        v_dim: d as u16,
                        codes: codes.clone(),
                        rope: Some((RopeArg { kind, inv_freq: Arc::clone(&inv_freq) }, pos.into())),
                        writes: vec![write(0), write(1)],
                    })
                    .unwrap();
                let (got, values) = unpack(&codes, d, d, &bytes_of(&backend, &tile), 2);
                assert_eq!(values, v);
                for (r, row) in k.chunks(d).enumerate() {
                    for i in 0..d / 2 {
                        let (a, b) = if kind == HALF { (i, i + d / 2) } else { (2 * i, 2 * i + 1) };
                        let angle = if space == KeySpace::Plain {
                            0.0
                        } else {
                            f64::from(pos[r]) * f64::from(inv_freq[i])
                        };
                        let (x, y) = (f64::from(row[a]), f64::from(row[b]));
                        let want = [x * angle.cos() - y * angle.sin(), y * angle.cos() + x * angle.sin()];
                        assert!((want[0] - f64::from(got[r * d + a])).abs() < 1e-6);
                        assert!((want[1] - f64::from(got[r * d + b])).abs() < 1e-6);
                    }
                }
            }
        }
    }
}

#[test]
fn numbers_that_a_format_cannot_hold_are_refused_and_nothing_is_written() {
    for backend in cpus() {
        for (bad, format) in [
            (f32::NAN, Format::F32),
            (f32::INFINITY, Format::Bf16),
            (70_000.0, Format::F16),
            (f32::MAX, Format::Bf16),
        ] {
            for in_keys in [true, false] {
                let codes = codes(KeySpace::Rotated, format, format);
                let tile = backend.alloc(tile_bytes(&codes, 8, 8).unwrap()).unwrap();
                let (good, mut wrong) = (vec![1.0f32; 24], vec![1.0f32; 24]);
                wrong[17] = bad;
                let (k, v) = if in_keys { (&wrong, &good) } else { (&good, &wrong) };
                let error = backend
                    .submit(Call::Append {
                        k: backend.upload_f32(k).unwrap(),
                        v: backend.upload_f32(v).unwrap(),
                        kv_heads: 1,
                        k_dim: 8,
                        v_dim: 8,
                        codes,
                        rope: None,
                        writes: (0..3)
                            .map(|i| RowWrite { src: i, head: 0, slot: i as u8, tile: tile.clone() })
                            .collect(),
                    })
                    .unwrap_err();
                assert!(matches!(&error, kvasir_core::Error::NonFinite { row: 2, .. }), "{error}");
                assert!(bytes_of(&backend, &tile).iter().all(|&b| b == 0));
            }
        }
    }
}

#[test]
fn a_zero_row_and_a_tiny_row_are_coded_as_zero() {
    let from = codes(KeySpace::Rotated, Format::F32, Format::F32);
    let to = codes(KeySpace::Rotated, Format::INT8, Format::INT8);
    let mut rows = vec![0.0f32; 32 * 8];
    rows[8..16].fill(1e-9);
    for backend in cpus() {
        let src = backend.upload(&pack(&from, 8, 8, &rows, &rows)).unwrap();
        let dst = backend.alloc(tile_bytes(&to, 8, 8).unwrap()).unwrap();
        backend
            .submit(Call::Seal {
                from_codes: from.clone(),
                to_codes: to.clone(),
                k_dim: 8,
                v_dim: 8,
                tiles: vec![(src, dst.clone(), 32)],
            })
            .unwrap();
        let (k, v) = unpack(&to, 8, 8, &bytes_of(&backend, &dst), 32);
        assert!(k.iter().chain(&v).all(|x| *x == 0.0));
    }
}

#[test]
fn impossible_calls_are_typed_errors() {
    for backend in cpus() {
        let f16s = || codes(KeySpace::Rotated, Format::F16, Format::F16);
        let int8 = || codes(KeySpace::Rotated, Format::INT8, Format::INT8);
        let f = |n: usize| backend.alloc(n * 4).unwrap();
        let tile = |c: &Codes| backend.alloc(tile_bytes(c, 16, 16).unwrap()).unwrap();
        let good = RowWrite { src: 0, head: 0, slot: 0, tile: tile(&f16s()) };
        let append = |codes: Codes, write: RowWrite, v: usize, rope| Call::Append {
            k: f(32),
            v: f(v),
            kv_heads: 1,
            k_dim: 16,
            v_dim: 16,
            codes,
            rope,
            writes: vec![write],
        };
        let rope = |n: usize, pos: usize| {
            Some((RopeArg { kind: HALF, inv_freq: vec![1.0; n].into() }, vec![0; pos].into()))
        };
        let seal = |from: Codes, to: Codes, rows| Call::Seal {
            tiles: vec![(tile(&from), tile(&to), rows)],
            from_codes: from,
            to_codes: to,
            k_dim: 16,
            v_dim: 16,
        };
        let own = tile(&f16s());
        let mapped = {
            let mut c = f16s();
            c[0].map = kvasir_core::Map::Hadamard;
            c
        };
        let calls = [
            (append(f16s(), RowWrite { src: 2, ..good.clone() }, 32, None), "InvalidArgument"),
            (append(f16s(), RowWrite { head: 1, ..good.clone() }, 32, None), "InvalidArgument"),
            (append(f16s(), RowWrite { slot: 32, ..good.clone() }, 32, None), "InvalidArgument"),
            (append(f16s(), RowWrite { tile: tile(&int8()), ..good.clone() }, 32, None), "InvalidArgument"),
            (append(f16s(), good.clone(), 31, None), "InvalidArgument"),
            (append(int8(), RowWrite { tile: tile(&int8()), ..good.clone() }, 32, None), "InvalidArgument"),
            (append(f16s(), good.clone(), 32, rope(7, 2)), "InvalidArgument"),
            (append(f16s(), good.clone(), 32, rope(8, 1)), "InvalidArgument"),
            (append(mapped, good, 32, None), "Unsupported"),
            (seal(f16s(), int8(), 33), "InvalidArgument"),
            (seal(f16s(), codes(KeySpace::Plain, Format::INT8, Format::INT8), 32), "Unsupported"),
            (
                Call::Seal {
                    tiles: vec![(own.clone(), own.clone(), 1)],
                    from_codes: f16s(),
                    to_codes: f16s(),
                    k_dim: 16,
                    v_dim: 16,
                },
                "InvalidArgument",
            ),
            (
                Call::Seal { tiles: Vec::new(), from_codes: f16s(), to_codes: f16s(), k_dim: 0, v_dim: 16 },
                "InvalidArgument",
            ),
            (
                Call::Decode {
                    codes: f16s(),
                    k_dim: 16,
                    v_dim: 16,
                    tile: own.clone(),
                    rows: 33,
                    k_out: f(512),
                    v_out: f(512),
                },
                "InvalidArgument",
            ),
            (
                Call::Decode {
                    codes: f16s(),
                    k_dim: 16,
                    v_dim: 16,
                    tile: own.clone(),
                    rows: 3,
                    k_out: f(512),
                    v_out: f(511),
                },
                "InvalidArgument",
            ),
            (
                Call::Decode {
                    codes: int8(),
                    k_dim: 16,
                    v_dim: 16,
                    tile: own.clone(),
                    rows: 3,
                    k_out: f(512),
                    v_out: f(512),
                },
                "InvalidArgument",
            ),
            (
                Call::Compact {
                    codes: f16s(),
                    k_dim: 16,
                    v_dim: 16,
                    src: vec![Tile { codes: own.clone(), own: true }],
                    idx: [32].into(),
                    dst: vec![tile(&f16s())],
                },
                "InvalidArgument",
            ),
            (
                Call::Compact {
                    codes: f16s(),
                    k_dim: 16,
                    v_dim: 16,
                    src: vec![Tile { codes: own.clone(), own: true }],
                    idx: [3].into(),
                    dst: vec![],
                },
                "InvalidArgument",
            ),
            (
                Call::Compact {
                    codes: f16s(),
                    k_dim: 16,
                    v_dim: 16,
                    src: vec![Tile { codes: own.clone(), own: true }],
                    idx: [3].into(),
                    dst: vec![own],
                },
                "InvalidArgument",
            ),
        ];
        for (i, (call, code)) in calls.into_iter().enumerate() {
            let error = backend.submit(call).expect_err("a refusal");
            assert_eq!(error.code(), code, "call {i}: {error}");
        }
    }
}

#[test]
fn seal_refuses_tiles_that_share_memory_and_numbers_that_do_not_fit() {
    for backend in cpus() {
        let (from, to) = (
            codes(KeySpace::Rotated, Format::F32, Format::F32),
            codes(KeySpace::Rotated, Format::F16, Format::F16),
        );
        let seal =
            |tiles| Call::Seal { from_codes: from.clone(), to_codes: to.clone(), k_dim: 8, v_dim: 8, tiles };
        let mut rows = vec![1.0f32; 32 * 8];
        let source = |rows: &[f32]| backend.upload(&pack(&from, 8, 8, rows, rows)).unwrap();
        let good = source(&rows);
        rows[3] = 1e6;
        let large = source(&rows);
        let room = || backend.alloc(tile_bytes(&to, 8, 8).unwrap()).unwrap();
        let twice = room();
        let error = backend
            .submit(seal(vec![(good.clone(), twice.clone(), 32), (good.clone(), twice, 32)]))
            .unwrap_err();
        assert_eq!(error.code(), "InvalidArgument");
        let error = backend.submit(seal(vec![(good.clone(), room(), 32), (large, room(), 32)])).unwrap_err();
        assert!(matches!(&error, kvasir_core::Error::NonFinite { row: 0, .. }), "{error}");
        backend.submit(seal(vec![(good.clone(), room(), 32), (good, room(), 32)])).unwrap();
    }
}

/// The tiles of the golden file: fixed rows, each dense format and int8, whole bytes at D 64, a sum at others.
fn golden(backend: &dyn Backend) -> Vec<u8> {
    let mut file = Vec::new();
    for d in [64usize, 128, 80] {
        let mut noise = Noise::new(d as u64);
        let (k, v) = (noise.normals(32 * d), noise.normals(32 * d));
        for format in FORMATS {
            let dense = [Code::rotated(Format::F32), Code::plain(Format::F32)];
            let codes = [Code::rotated(format), Code::plain(format)];
            let room = |c: &Codes| backend.alloc(tile_bytes(c, d, d).unwrap()).unwrap();
            let (open, sealed) = (room(&dense), room(&codes));
            backend
                .submit(Call::Append {
                    k: backend.upload_f32(&k).unwrap(),
                    v: backend.upload_f32(&v).unwrap(),
                    kv_heads: 1,
                    k_dim: d as u16,
                    v_dim: d as u16,
                    codes: dense.clone(),
                    rope: None,
                    writes: (0..32)
                        .map(|i| RowWrite { src: i, head: 0, slot: i as u8, tile: open.clone() })
                        .collect(),
                })
                .unwrap();
            backend
                .submit(Call::Seal {
                    from_codes: dense,
                    to_codes: codes,
                    k_dim: d as u16,
                    v_dim: d as u16,
                    tiles: vec![(open, sealed.clone(), 32)],
                })
                .unwrap();
            let bytes = bytes_of(backend, &sealed);
            if d == 64 && format != Format::F32 {
                file.extend(bytes);
            } else {
                // FNV-1a.
                let sum = bytes.iter().fold(0xcbf2_9ce4_8422_2325u64, |h, &b| {
                    (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3)
                });
                file.extend(sum.to_le_bytes());
            }
        }
    }
    file
}

/// The order of bytes in a tile is a file format. `KVASIR_GOLDEN=write cargo test` renews the file, which needs a new layout
/// tag in packs.
#[test]
fn tiles_keep_the_bytes_of_the_golden_file() {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/t32.bin");
    for backend in cpus() {
        let now = golden(&backend);
        if std::env::var("KVASIR_GOLDEN").is_ok_and(|v| v == "write") {
            std::fs::write(&path, &now).unwrap();
        }
        assert!(std::fs::read(&path).unwrap() == now, "{}", backend.info().isa);
    }
}
