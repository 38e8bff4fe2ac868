//! `options!`: the parameters of a method, declared once.
//!
//! The block below gives a struct with defaults, its JSON reader and the list from which the TypeScript factory and the page
//! of the method are generated; so an option has one name, one default and one description.
//!
//! ```ignore
//! options! {
//!     /// Parameters of H2O.
//!     pub struct H2o {
//!         /// Rows kept per kv head.
//!         pub budget: Budget = Budget::Rows(1024),
//!         ;                                        // behind a lone semicolon: state, not read from JSON
//!         /// Plans made so far.
//!         pub plans: u32,
//!     }
//! }
//! ```
//!
//! Errors: an option that does not exist, or a value of the wrong type, is `InvalidArgument` with the dotted name of the
//! field and what would have been accepted.

use kvasir_core::{Budget, Error, Positions, Result};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// One option of a method, as its Rust type declares it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct OptionDoc {
    /// Name in JSON and TypeScript.
    pub name: String,
    /// See [`Kind`].
    #[serde(rename = "type")]
    pub kind: String,
    /// Value when the option is left out.
    pub default: Value,
    /// What it means.
    pub doc: String,
}

/// Parameters of a method; implemented by [`options!`](crate::options).
pub trait Options: Sized {
    /// Every option in the order of declaration.
    fn docs() -> Vec<OptionDoc>;
    /// Parameters from a JSON object; what is left out keeps its default. `slug` is only for messages.
    fn read(slug: &str, given: &Value) -> Result<Self>;
    /// The whole object, defaults filled in: the one spelling of these parameters.
    fn write(&self) -> Value;
}

/// Types an option may have.
pub trait Kind {
    /// `u32`, `f32`, `bool`, `string`, `u32[]`, `budget` (`{rows: u32}` or `{ratio: f32}`) or `enum(a|b|c)`.
    const KIND: &'static str;
}

macro_rules! kinds {
    ($($ty:ty => $kind:literal),* $(,)?) => { $(impl Kind for $ty { const KIND: &'static str = $kind; })* };
}

kinds! {
    u32 => "u32",
    f32 => "f32",
    bool => "bool",
    String => "string",
    Vec<u32> => "u32[]",
    Budget => "budget",
    Positions => "enum(original|packed)",
}

/// Declares the parameters of a method; see the [module](crate::options).
macro_rules! options {
    (
        $(#[$attr:meta])*
        $vis:vis struct $name:ident {
            $($(#[doc = $doc:literal])+ pub $field:ident: $ty:ty = $default:expr,)*
            $(; $($(#[doc = $state_doc:literal])+ pub $state:ident: $state_ty:ty,)+)?
        }
    ) => {
        $(#[$attr])*
        #[derive(Clone, Debug, PartialEq)]
        $vis struct $name {
            $($(#[doc = $doc])+ pub $field: $ty,)*
            $($($(#[doc = $state_doc])+ pub $state: $state_ty,)+)?
        }

        impl Default for $name {
            fn default() -> Self {
                Self { $($field: $default,)* $($($state: <$state_ty>::default(),)+)? }
            }
        }

        impl $crate::Options for $name {
            fn docs() -> Vec<$crate::OptionDoc> {
                let defaults = Self::default();
                vec![$($crate::options::doc(stringify!($field), &defaults.$field, &[$($doc),+]),)*]
            }

            fn read(slug: &str, given: &serde_json::Value) -> kvasir_core::Result<Self> {
                let given = $crate::options::object(slug, given, &[$(stringify!($field)),*])?;
                let mut options = Self::default();
                $($crate::options::take(slug, given, stringify!($field), &mut options.$field)?;)*
                Ok(options)
            }

            fn write(&self) -> serde_json::Value {
                let mut out = serde_json::Map::new();
                $(out.insert($crate::options::camel(stringify!($field)), $crate::options::json(&self.$field));)*
                out.into()
            }
        }
    };
}

/// `sink_rows` as JSON spells it: `sinkRows`.
pub fn camel(name: &str) -> String {
    let mut up = false;
    let mut out = String::with_capacity(name.len());
    for c in name.chars() {
        if c == '_' {
            up = true;
        } else {
            out.push(if up { c.to_ascii_uppercase() } else { c });
            up = false;
        }
    }
    out
}

/// A value as JSON. By way of text, so that an f32 of 0.1 says 0.1 and not its f64 neighbour.
pub fn json<T: Serialize>(value: &T) -> Value {
    serde_json::to_string(value).and_then(|text| serde_json::from_str(&text)).unwrap_or(Value::Null)
}

/// The description of one option.
pub fn doc<T: Kind + Serialize>(name: &str, default: &T, lines: &[&str]) -> OptionDoc {
    let doc = lines.iter().map(|l| l.trim()).collect::<Vec<_>>().join(" ");
    OptionDoc { name: camel(name), kind: T::KIND.into(), default: json(default), doc }
}

/// `given` as an object that holds no other keys than `fields`.
pub fn object<'a>(slug: &str, given: &'a Value, fields: &[&str]) -> Result<&'a Map<String, Value>> {
    let Value::Object(map) = given else {
        return Err(Error::invalid(slug, "an object of options", given));
    };
    let names: Vec<_> = fields.iter().map(|f| camel(f)).collect();
    match map.keys().find(|key| !names.contains(key)) {
        None => Ok(map),
        Some(key) if names.is_empty() => Err(Error::invalid(format!("{slug}.{key}"), "no options", key)),
        Some(key) => {
            let expected = format!("one of the options {}", names.join(", "));
            Err(Error::invalid(format!("{slug}.{key}"), expected, format_args!("the unknown option {key}")))
        }
    }
}

/// Reads one option into `out` if it was given.
pub fn take<T: Kind + DeserializeOwned>(
    slug: &str,
    given: &Map<String, Value>,
    field: &str,
    out: &mut T,
) -> Result<()> {
    let name = camel(field);
    if let Some(value) = given.get(&name) {
        *out = serde_json::from_value(value.clone())
            .map_err(|_| Error::invalid(format!("{slug}.{name}"), T::KIND, value))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    options! {
        /// All kinds at once.
        #[derive(Copy)]
        struct Sample {
            /// Rows kept,
            /// per kv head.
            pub kept_rows: Budget = Budget::Rows(8),
            /// A share.
            pub recent_ratio: f32 = 0.1,
            /// Positions of kept rows.
            pub positions: Positions = Positions::Original,
            ;
            /// Where it stands.
            pub cursor: u32,
        }
    }

    #[test]
    fn declares_reads_and_writes_from_one_place() {
        let docs = Sample::docs();
        assert_eq!(
            docs.iter().map(|d| d.name.as_str()).collect::<Vec<_>>(),
            ["keptRows", "recentRatio", "positions"]
        );
        assert_eq!(docs[0].doc, "Rows kept, per kv head.");
        assert_eq!(docs[0].default, json!({ "rows": 8 }));
        assert_eq!(docs[1].default.to_string(), "0.1");
        let given = json!({ "keptRows": { "ratio": 0.5 }, "positions": "packed" });
        let read = Sample::read("sample", &given).unwrap();
        let expected =
            Sample { kept_rows: Budget::Ratio(0.5), positions: Positions::Packed, ..Sample::default() };
        assert_eq!(read, expected);
        assert_eq!(Sample::read("sample", &read.write()).unwrap(), read);
        assert!(read.write().get("cursor").is_none());
    }

    #[test]
    fn errors_name_the_field_and_what_exists() {
        let text = |v: Value| Sample::read("sample", &v).unwrap_err().to_string();
        assert_eq!(
            text(json!({ "recentratio": 1 })),
            "sample.recentratio: expected one of the options keptRows, recentRatio, positions, got the unknown option recentratio"
        );
        assert_eq!(text(json!({ "recentRatio": "x" })), "sample.recentRatio: expected f32, got \"x\"");
        assert_eq!(
            text(json!({ "positions": "far" })),
            "sample.positions: expected enum(original|packed), got \"far\""
        );
        assert_eq!(
            text(json!({ "keptRows": { "rows": -1 } })),
            "sample.keptRows: expected budget, got {\"rows\":-1}"
        );
        assert_eq!(text(json!([])), "sample: expected an object of options, got []");
        assert_eq!(text(json!({ "cursor": 1 })).split(':').next(), Some("sample.cursor"));
    }
}
