//! Append, seal, decode, compact: rows into tiles and out of them.

use half::f16;
use kvasir_core::{
    Backend, Buf, Call, Code, Codes, Format, KeySpace, Rope, RopeArg, RowWrite, SideId, TILE_ROWS, Tile,
    tile, tile_bytes, value_offset,
};

use super::{Bench, close, same_bytes};
use crate::pack::{self, PartOf};
use crate::{Noise, oracle};

pub(super) fn run(backend: &dyn Backend) {
    let b = Bench { backend };
    for (kd, vd) in [(8, 8), (64, 64), (80, 64), (128, 128)] {
        for format in [Format::F32, Format::F16, Format::Bf16, Format::INT8] {
            let codes = [Code::rotated(format), Code::plain(format)];
            if format.is_dense() {
                append(&b, &codes, kd, vd);
            }
            decode(&b, &codes, kd, vd);
            compact(&b, &codes, kd, vd);
        }
        seal(&b, kd, vd);
        let mixed = [Code::rotated(Format::INT8), Code::plain(Format::F16)];
        decode(&b, &mixed, kd, vd);
        rotation(&b, kd, vd);
    }
    compact_column(&b);
    refusals(&b);
}

pub(super) fn inv_freq(dim: usize) -> Vec<f32> {
    (0..dim / 2).map(|i| 10_000f64.powf(-2.0 * i as f64 / dim as f64) as f32).collect()
}

/// Turns a row in the given pairing, in f64.
pub(super) fn turn(rope: &RopeArg, row: &[f64], pos: u32) -> Vec<f64> {
    let half = row.len() / 2;
    let mut out = row.to_vec();
    for i in 0..half {
        let (a, b) = match rope.kind {
            Rope::None => return out,
            Rope::Half(_) => (i, i + half),
            Rope::Adjacent(_) => (2 * i, 2 * i + 1),
        };
        let (sin, cos) = (f64::from(pos) * f64::from(rope.inv_freq[i])).sin_cos();
        out[a] = row[a] * cos - row[b] * sin;
        out[b] = row[a] * sin + row[b] * cos;
    }
    out
}

pub(super) fn ropes(dim: usize) -> [RopeArg; 2] {
    [Rope::Half(SideId(0)), Rope::Adjacent(SideId(0))]
        .map(|kind| RopeArg { kind, inv_freq: inv_freq(dim).into() })
}

fn writes(tiles: &[Buf], places: &[(u32, u16, usize, u8)]) -> Vec<RowWrite> {
    let one = |&(src, head, tile, slot): &_| RowWrite { src, head, slot, tile: Buf::clone(&tiles[tile]) };
    places.iter().map(one).collect()
}

/// Source row, kv head, tile, slot: scattered, one tile per head and one shared by none.
const PLACES: [(u32, u16, usize, u8); 7] =
    [(0, 0, 0, 0), (1, 0, 0, 1), (2, 0, 0, 31), (0, 1, 1, 9), (2, 1, 1, 16), (1, 1, 1, 23), (2, 0, 2, 7)];

fn append(b: &Bench<'_>, codes: &Codes, kd: usize, vd: usize) {
    let what = format!("append to {} D {kd} Dv {vd}", codes[0].format);
    let mut noise = Noise::new(kd as u64);
    let (k, v) = (noise.normals(3 * 2 * kd), noise.normals(3 * 2 * vd));
    let bytes = tile_bytes(codes, kd, vd).expect("a code of this build");
    let at = value_offset(codes, kd).expect("a code of this build");
    // Every tile is full of other rows, which must stay.
    let mut want: Vec<Vec<u8>> =
        (0..3).map(|_| pack::pack(codes, kd, vd, &noise.normals(32 * kd), &noise.normals(32 * vd))).collect();
    let tiles: Vec<Buf> = want.iter().map(|t| b.up_bytes(t)).collect();
    assert_eq!(bytes, want[0].len());
    let call = Call::Append {
        k: b.up(&k),
        v: b.up(&v),
        kv_heads: 2,
        k_dim: kd as u16,
        v_dim: vd as u16,
        codes: codes.clone(),
        rope: None,
        writes: writes(&tiles, &PLACES),
    };
    b.submit(&what, call);
    for (src, head, tile, slot) in PLACES {
        let row = 2 * src as usize + head as usize;
        let (slot, tile) = (slot as usize, &mut want[tile]);
        pack::put_row(codes[0].format, PartOf::Key, tile, slot, &k[row * kd..][..kd]);
        pack::put_row(codes[1].format, PartOf::Value, &mut tile[at..], slot, &v[row * vd..][..vd]);
    }
    for (i, (tile, want)) in tiles.iter().zip(&want).enumerate() {
        same_bytes(&format!("{what}, tile {i}"), &b.read_bytes(&what, tile), want);
    }
}

/// Rotated append in f32: keys turn by their position, values do not.
fn rotation(b: &Bench<'_>, kd: usize, vd: usize) {
    let codes = [Code::rotated(Format::F32), Code::plain(Format::F32)];
    let mut noise = Noise::new(77);
    let (k, v) = (noise.normals(3 * 2 * kd), noise.normals(3 * 2 * vd));
    let pos: Vec<u32> = vec![0, 17, 801];
    for rope in ropes(kd) {
        let what = format!("append with {:?} D {kd}", rope.kind);
        let bytes = tile_bytes(&codes, kd, vd).expect("a code of this build");
        let tiles: Vec<Buf> = (0..3).map(|_| b.zeros(bytes / 4)).collect();
        let call = Call::Append {
            k: b.up(&k),
            v: b.up(&v),
            kv_heads: 2,
            k_dim: kd as u16,
            v_dim: vd as u16,
            codes: codes.clone(),
            rope: Some((rope.clone(), pos.clone().into())),
            writes: writes(&tiles, &PLACES),
        };
        b.submit(&what, call);
        for (src, head, tile, slot) in PLACES {
            let row = 2 * src as usize + head as usize;
            let got = pack::unpack(&codes, kd, vd, &b.read_bytes(&what, &tiles[tile]), TILE_ROWS);
            let key: Vec<f64> = k[row * kd..][..kd].iter().map(|&x| f64::from(x)).collect();
            let want = turn(&rope, &key, pos[src as usize]);
            close(&what, &got.0[slot as usize * kd..][..kd], &want, |_| 1e-5);
            assert_eq!(
                got.1[slot as usize * vd..][..vd],
                v[row * vd..][..vd],
                "{what}: values stay as they are"
            );
        }
    }
    // The adjacent pairing is also what the oracle of the runner uses.
    let row: Vec<f64> = (0..kd).map(|i| i as f64 / 7.0 - 1.0).collect();
    let (ours, theirs) = (turn(&ropes(kd)[1], &row, 19), oracle::rotate(&row, kd, 1e4, 19));
    assert!(ours.iter().zip(&theirs).all(|(a, b)| (a - b).abs() < 1e-4), "two oracles of one rotation");
}

fn decode(b: &Bench<'_>, codes: &Codes, kd: usize, vd: usize) {
    let mut noise = Noise::new(31);
    for rows in [1usize, 7, 32] {
        let what = format!("decode of {rows} rows, {} D {kd}, {} Dv {vd}", codes[0].format, codes[1].format);
        // Rows behind `rows` hold numbers too: they must come out as zeros.
        let bytes = pack::pack(codes, kd, vd, &noise.normals(32 * kd), &noise.normals(32 * vd));
        let (k_out, v_out) = (b.up(&vec![3.0; 32 * kd]), b.up(&vec![3.0; 32 * vd]));
        let call = Call::Decode {
            codes: codes.clone(),
            k_dim: kd as u16,
            v_dim: vd as u16,
            tile: b.up_bytes(&bytes),
            rows: rows as u8,
            k_out: k_out.clone(),
            v_out: v_out.clone(),
        };
        b.submit(&what, call);
        let (mut k, mut v) = pack::unpack(codes, kd, vd, &bytes, rows);
        k.resize(32 * kd, 0.0);
        v.resize(32 * vd, 0.0);
        assert!(b.read(&what, &k_out) == k, "{what}: keys");
        assert!(b.read(&what, &v_out) == v, "{what}: values");
    }
}

fn seal(b: &Bench<'_>, kd: usize, vd: usize) {
    let mut noise = Noise::new(13);
    for from in [Format::F32, Format::F16, Format::Bf16] {
        for to in [Format::F32, Format::F16, Format::Bf16, Format::INT8] {
            let what = format!("seal {from} to {to} D {kd} Dv {vd}");
            let [fc, tc] = [from, to].map(|f| [Code::rotated(f), Code::plain(f)]);
            let mut cases = Vec::new();
            for rows in [32usize, 5] {
                let (mut k, v) = (noise.normals(rows * kd), noise.normals(rows * vd));
                // A row of zeros, and one with an outlier channel.
                k[kd..2 * kd].fill(0.0);
                k[2 * kd + 3] = 60.0;
                let bytes = pack::pack(&fc, kd, vd, &k, &v);
                let dst = b.zeros(tile_bytes(&tc, kd, vd).expect("a code of this build") / 4);
                let seen = pack::unpack(&fc, kd, vd, &bytes, rows);
                cases.push((b.up_bytes(&bytes), dst, rows, seen));
            }
            let call = Call::Seal {
                from_codes: fc.clone(),
                to_codes: tc.clone(),
                k_dim: kd as u16,
                v_dim: vd as u16,
                tiles: cases.iter().map(|c| (c.0.clone(), c.1.clone(), c.2 as u8)).collect(),
            };
            b.submit(&what, call);
            for (_, dst, rows, (k, v)) in &cases {
                let got = b.read_bytes(&what, dst);
                let at = value_offset(&tc, kd).expect("a code of this build");
                if to == Format::INT8 {
                    coded(&format!("{what}, keys"), PartOf::Key, &got[..at], *rows, kd, k);
                    coded(&format!("{what}, values"), PartOf::Value, &got[at..], *rows, vd, v);
                } else {
                    let (gk, gv) = pack::unpack(&tc, kd, vd, &got, *rows);
                    let (wk, wv) = pack::unpack(&tc, kd, vd, &pack::pack(&tc, kd, vd, k, v), *rows);
                    assert!(gk == wk && gv == wv, "{what}, {rows} rows: dense numbers differ");
                }
            }
        }
    }
}

/// An int8 part holds these rows: scale exact, codes within a step, numbers within half a step, padding zero.
fn coded(what: &str, part: PartOf, bytes: &[u8], rows: usize, dim: usize, want: &[f32]) {
    let d = Format::INT8.padded(dim);
    let place = |t, c| if part == PartOf::Key { tile::key8(t, c, d) } else { tile::value8(t, c, d) };
    for (t, row) in want.chunks_exact(dim).enumerate().take(rows) {
        let at = tile::row_params8(t, d);
        let param = |i: usize| f16::from_le_bytes([bytes[at + i], bytes[at + i + 1]]);
        let (scale, codes) = pack::code_row(row);
        assert_eq!((param(0), param(2).to_f32()), (scale, 0.0), "{what}: scale and mid of row {t}");
        let s = scale.to_f32();
        for c in 0..d {
            let code = i32::from(bytes[place(t, c)]) - 128;
            let (x, near) = (row.get(c).copied().unwrap_or(0.0), codes.get(c).copied().unwrap_or(0));
            assert!(
                (code - i32::from(near)).abs() <= 1 && code >= -127,
                "{what}: code {code} of row {t} channel {c}"
            );
            // The f16 scale may be a little small, then the largest number is cut at 127.
            let cut = x.abs() - 127.0 * s;
            let off = (code as f32 * s - x).abs();
            assert!(
                off <= (0.5 * s).max(cut) * 1.0001,
                "{what}: {x} became {} at scale {s}",
                code as f32 * s
            );
        }
    }
}

fn compact(b: &Bench<'_>, codes: &Codes, kd: usize, vd: usize) {
    let what = format!("compact {} D {kd} Dv {vd}", codes[0].format);
    let mut noise = Noise::new(3);
    let tiles: Vec<Vec<u8>> =
        (0..3).map(|_| pack::pack(codes, kd, vd, &noise.normals(32 * kd), &noise.normals(32 * vd))).collect();
    let idx: Vec<u32> = noise.ascending(45, 96).into_iter().chain([0, 0, 95]).collect();
    let bytes = tiles[0].len();
    let dst: Vec<Buf> = (0..idx.len().div_ceil(32)).map(|_| b.zeros(bytes / 4)).collect();
    let call = Call::Compact {
        codes: codes.clone(),
        k_dim: kd as u16,
        v_dim: vd as u16,
        src: tiles.iter().map(|t| Tile { codes: b.up_bytes(t), own: true }).collect(),
        idx: idx.clone().into(),
        dst: dst.clone(),
    };
    b.submit(&what, call);
    let all: Vec<_> = tiles.iter().map(|t| pack::unpack(codes, kd, vd, t, 32)).collect();
    for (i, &from) in idx.iter().enumerate() {
        if i % 32 != 0 {
            continue;
        }
        let rows = (idx.len() - i).min(32);
        let (k, v) = pack::unpack(codes, kd, vd, &b.read_bytes(&what, &dst[i / 32]), rows);
        for (j, &from) in idx[i..i + rows].iter().enumerate() {
            let (sk, sv) = &all[from as usize / 32];
            let t = from as usize % 32;
            assert!(k[j * kd..][..kd] == sk[t * kd..][..kd], "{what}: keys of row {}", i + j);
            assert!(v[j * vd..][..vd] == sv[t * vd..][..vd], "{what}: values of row {}", i + j);
        }
        assert!(from < 96);
    }
}

fn compact_column(b: &Bench<'_>) {
    let mut noise = Noise::new(8);
    let values = noise.normals(70);
    let idx = [69u32, 0, 33, 31, 32, 5].repeat(6);
    let dst = b.zeros(64);
    let src = b.up(&pack::beside(&values, 9.0));
    b.submit("compact column", Call::CompactColumn { src, idx: idx.clone().into(), dst: dst.clone() });
    let got = pack::in_row_order(&b.read("compact column", &dst), idx.len());
    let want: Vec<f32> = idx.iter().map(|&i| values[i as usize]).collect();
    assert_eq!(got, want, "compact column");
}

fn refusals(b: &Bench<'_>) {
    let dense = [Code::rotated(Format::F16), Code::plain(Format::F16)];
    let coded = [Code::rotated(Format::INT8), Code::plain(Format::INT8)];
    let bytes = |c: &Codes| tile_bytes(c, 64, 64).expect("a code of this build");
    let (tile, small) = (b.zeros(bytes(&dense) / 4), b.zeros(bytes(&coded) / 4));
    let append = |codes: &Codes, tile: &Buf, slot| Call::Append {
        k: b.zeros(64),
        v: b.zeros(64),
        kv_heads: 1,
        k_dim: 64,
        v_dim: 64,
        codes: codes.clone(),
        rope: None,
        writes: vec![RowWrite { src: 0, head: 0, slot, tile: tile.clone() }],
    };
    b.refuses("append to a coded tile", append(&coded, &small, 0), &small);
    b.refuses("append behind a tile", append(&dense, &tile, 32), &tile);
    b.refuses("append to a short tile", append(&dense, &small, 0), &small);
    let unknown = [
        Code { space: KeySpace::Rotated, map: kvasir_core::Map::None, format: Format::TwoOfFour },
        Code::plain(Format::F16),
    ];
    let call = Call::Decode {
        codes: unknown,
        k_dim: 64,
        v_dim: 64,
        tile: tile.clone(),
        rows: 1,
        k_out: b.zeros(32 * 64),
        v_out: b.zeros(32 * 64),
    };
    b.refuses("decode of a format without kernel", call, &tile);
    let call = Call::Compact {
        codes: dense,
        k_dim: 64,
        v_dim: 64,
        src: vec![Tile { codes: tile.clone(), own: true }],
        idx: vec![32].into(),
        dst: vec![b.zeros(tile.bytes() / 4)],
    };
    b.refuses("compact of a row that is not there", call, &tile);
    let column = b.zeros(32);
    let call = Call::CompactColumn { src: column.clone(), idx: vec![32].into(), dst: column.clone() };
    b.refuses("compact column beyond its rows", call, &column);
}
