//! The document of the format says what the writer does: every field, its place and its length.

use kvasir_store::field::{Field, Len, Region, fields};
use kvasir_store::pack::encode_pack;
use kvasir_store::{CodecId, encode_record};

use crate::util::{chain, key, record, text, with_drafts};

fn heading(region: Region) -> &'static str {
    match region {
        Region::PackHeader => "### Pack header",
        Region::Block => "### Block",
        Region::FooterHead => "### Footer head",
        Region::FooterEntry => "### Footer entry",
        Region::FooterEnd => "### Footer end",
        Region::Trailer => "### Trailer",
        Region::Record => "### Record",
    }
}

/// The start of a field's row in the document.
fn row(f: &Field) -> String {
    let offset = f.offset.map_or("…".to_owned(), |o| o.to_string());
    let len = match f.len {
        Len::Bytes(n) => n.to_string(),
        Len::Each(n, of) => format!("{n} × `{of}`"),
        Len::Value(of) => format!("`{of}`"),
        Len::Pad(0) => "to 64".to_owned(),
        Len::Pad(n) => format!("to 64 − {n}"),
    };
    format!("| {offset} | {len} | `{}` |", f.name)
}

#[test]
fn the_document_lists_every_field_in_order() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/format.md");
    let document = std::fs::read_to_string(path).unwrap();
    let mut regions: Vec<Region> = fields().iter().map(|f| f.region).collect();
    regions.dedup();
    for region in regions {
        let (_, section) =
            document.split_once(&format!("{}\n", heading(region))).expect("a section per region");
        let section = section.split("\n#").next().unwrap();
        let documented: Vec<_> = section
            .lines()
            .filter(|l| l.starts_with("| ") && !l.starts_with("| offset"))
            .map(|l| l.split('|').take(4).collect::<Vec<_>>().join("|") + "|")
            .collect();
        let written: Vec<_> = fields().iter().filter(|f| f.region == region).map(row).collect();
        assert_eq!(documented, written, "{}", heading(region));
    }
}

#[test]
fn version_1_files_are_byte_for_byte_what_they_were() {
    // An old file must stay readable: a change of these digests needs a new version number and a reader for both.
    let ids = text(1, 64 * 2 + 5);
    let c = chain(&key("a"), &ids);
    let (pack, _) =
        with_drafts(&c, &ids, CodecId::of(b"int8"), |d| encode_pack([2; 16], key("a").tag(), d)).unwrap();
    let mut r = record(&key("a"), "s", &c, &ids);
    (r.generation, r.written_ms) = (1, 2);
    let (session, _) = encode_record(&r).unwrap();
    let digest = |b: &[u8]| format!("{:032x}", twox_hash::XxHash3_128::oneshot(b));
    assert_eq!((pack.len(), digest(&pack).as_str()), PACK_V1);
    assert_eq!((session.len(), digest(&session).as_str()), RECORD_V1);
}

const PACK_V1: (usize, &str) = (3152, "857e98dc2a850bfcce189944880bb227");
const RECORD_V1: (usize, &str) = (965, "fb535a80144853543cce1bf54b62682c");
