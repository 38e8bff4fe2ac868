//! Every method, one line each. The line declares the module, makes the method buildable from JSON and places it on the map.
//!
//! Paper and summary come from the header of the method's file, options from its type; nothing is said twice.

use kvasir_core::{Error, KvPolicy, Result};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::OptionDoc;

/// The table: group, then `file: Type, slug, leaf, track;`, alphabetical. The leaf is that of the taxonomy of KV cache
/// management (arXiv 2412.19442); `-` for methods outside of it.
macro_rules! methods {
    ($with:ident) => {
        $with! {
            kv {
                int8: Int8, "int8", "L8", Kv;
                streaming_llm: StreamingLlm, "streaming-llm", "L2", Kv;
                tova: Tova, "tova", "L2", Kv;
            }
        }
    };
}

/// Modules of the table. `cargo fmt` does not look through macros: format these files by name, see CONTRIBUTING.md.
macro_rules! declare_modules {
    ($($group:ident { $($file:ident: $ty:ident, $slug:literal, $leaf:literal, $track:ident;)* })*) => {
        $(
            #[doc = concat!("Methods of the group `", stringify!($group), "`.")]
            pub mod $group { $(pub mod $file;)* }
        )*
    };
}

macro_rules! declare_methods {
    ($($group:ident { $($file:ident: $ty:ident, $slug:literal, $leaf:literal, $track:ident;)* })*) => {
        /// Every registered method.
        pub const METHODS: &[Method] = &[$($(Method {
            slug: $slug,
            group: stringify!($group),
            leaf: $leaf,
            track: Track::$track,
            header: {
                const FILE: &str = include_str!(concat!(stringify!($group), "/", stringify!($file), ".rs"));
                const BYTES: [u8; header_bytes(FILE)] = head(FILE);
                match std::str::from_utf8(&BYTES) {
                    Ok(text) => text,
                    Err(_) => panic!("a line ends between characters"),
                }
            },
            build: |options| Ok(Box::new(<crate::$group::$file::$ty as crate::Options>::read($slug, options)?)),
            canonical: |options| {
                Ok(crate::Options::write(&<crate::$group::$file::$ty as crate::Options>::read($slug, options)?))
            },
            options: <crate::$group::$file::$ty as crate::Options>::docs,
        },)*)*];
    };
}

/// On which inputs the scorecard runs a method.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Track {
    /// Causal language model.
    Kv,
    /// Masked language model that denoises its tokens.
    MaskedLm,
    /// Image or video denoiser.
    Denoising,
    /// Cached answers.
    Answers,
    /// Memory banks and label caches.
    Banks,
    /// Block store under a trace.
    Store,
}

/// One method.
#[derive(Clone, Copy, Debug)]
pub struct Method {
    /// Published short name, lower case; also the file name (`_` for `-`).
    pub slug: &'static str,
    /// Folder: `kv`, …
    pub group: &'static str,
    /// Leaf of the taxonomy.
    pub leaf: &'static str,
    /// Track of the scorecard.
    pub track: Track,
    /// The `//!` block its file starts with.
    pub header: &'static str,
    /// A policy from its options; the parameters are checked by its `spec`.
    pub build: fn(&Value) -> Result<Box<dyn KvPolicy>>,
    /// The same options with every default filled in: the one spelling that lineage hashes.
    pub canonical: fn(&Value) -> Result<Value>,
    /// Every option.
    pub options: fn() -> Vec<OptionDoc>,
}

methods!(declare_methods);

impl Method {
    /// First sentence of the header.
    pub fn summary(&self) -> String {
        self.paragraph(|_| true)
    }

    /// The publication, as the header cites it.
    pub fn paper(&self) -> String {
        self.paragraph(|line| line.starts_with("Paper: ")).trim_start_matches("Paper: ").to_owned()
    }

    /// What `kvasir methods --json` shows.
    pub fn json(&self) -> Value {
        json!({
            "slug": self.slug,
            "paper": self.paper(),
            "group": self.group,
            "leaf": self.leaf,
            "track": self.track,
            "summary": self.summary(),
            "options": (self.options)(),
        })
    }

    /// The first paragraph whose first line is `wanted`, as one line.
    fn paragraph(&self, wanted: impl Fn(&str) -> bool) -> String {
        let lines = self.header.lines().map(|l| l.trim_start_matches("//!").trim());
        let from = lines.skip_while(|l| !wanted(l));
        from.take_while(|l| !l.is_empty()).collect::<Vec<_>>().join(" ")
    }
}

/// The method called `slug`.
pub fn find(slug: &str) -> Result<&'static Method> {
    METHODS.iter().find(|m| m.slug == slug).ok_or_else(|| {
        let known: Vec<_> = METHODS.iter().map(|m| m.slug).collect();
        Error::invalid("recipe.use", format_args!("one of {}", known.join(", ")), slug)
    })
}

/// Every method as `kvasir methods --json` prints it; factories and pages are generated from the same list.
pub fn methods_json() -> Value {
    METHODS.iter().map(Method::json).collect()
}

/// Length of the `//!` lines that `file` starts with.
const fn header_bytes(file: &str) -> usize {
    let b = file.as_bytes();
    let mut line = 0;
    while line + 2 < b.len() && b[line] == b'/' && b[line + 1] == b'/' && b[line + 2] == b'!' {
        while line < b.len() && b[line] != b'\n' {
            line += 1;
        }
        line += 1;
    }
    line
}

/// The first bytes of `file`: a copy, so that the binary holds the headers and not the sources.
const fn head<const N: usize>(file: &str) -> [u8; N] {
    let mut out = [0; N];
    let mut i = 0;
    while i < N {
        out[i] = file.as_bytes()[i];
        i += 1;
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_alphabetical_and_files_are_named_by_slug() {
        for pair in METHODS.windows(2) {
            assert!(
                (pair[0].group, pair[0].slug) < (pair[1].group, pair[1].slug),
                "{} comes late",
                pair[1].slug
            );
        }
        for m in METHODS {
            let path =
                format!("{}/src/{}/{}.rs", env!("CARGO_MANIFEST_DIR"), m.group, m.slug.replace('-', "_"));
            assert!(std::fs::read_to_string(&path).unwrap().starts_with(m.header), "{path}");
            assert!(!std::fs::read_to_string(&path).unwrap()[m.header.len()..].starts_with("//!"), "{path}");
        }
    }

    #[test]
    fn headers_say_what_paper_reads_plans_state_and_deviations() {
        for m in METHODS {
            assert!(m.summary().ends_with('.'), "{}: {:?}", m.slug, m.summary());
            assert!(m.paper().len() > 20, "{}: {:?}", m.slug, m.paper());
            for part in ["- Reads: ", "- Plans: ", "- State: ", "- Deviations: "] {
                assert!(m.header.contains(part), "{} has no {part:?}", m.slug);
            }
            for option in (m.options)() {
                assert!(option.doc.ends_with('.'), "{}.{}: {:?}", m.slug, option.name, option.doc);
            }
        }
    }

    #[test]
    fn an_unknown_slug_lists_what_exists() {
        let text = find("int9").unwrap_err().to_string();
        assert!(text.starts_with("recipe.use: expected one of "), "{text}");
        assert!(text.contains("int8") && text.ends_with("got int9"), "{text}");
    }

    #[test]
    fn json_has_what_the_command_line_promises() {
        let all = methods_json();
        let int8 = all.as_array().unwrap().iter().find(|m| m["slug"] == "int8").unwrap();
        assert_eq!(
            (&int8["group"], &int8["leaf"], &int8["track"]),
            (&"kv".into(), &"L8".into(), &"kv".into())
        );
        assert_eq!(int8["options"][0]["name"], "sinkRows");
        assert_eq!(int8["options"][0]["type"], "u32");
        assert_eq!(int8["options"][0]["default"], 4);
    }
}
