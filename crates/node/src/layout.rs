//! JSON form of a layout whose layers are all alike, in both directions.

use std::sync::Arc;

use kvasir_core::{Error as Core, LayerLayout, Layout, Rope, SideId, check};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// See `NativeLayout` in `ts/native.ts`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct LayoutJson {
    layers: u16,
    query_heads: u16,
    kv_heads: u16,
    key_dim: u16,
    value_dim: u16,
    rope: RopeKind,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    inverse_frequencies: Option<Vec<f32>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    window: Option<u32>,
    context: u32,
    fingerprint: String,
}

#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum RopeKind {
    None,
    Half,
    Adjacent,
}

impl TryFrom<LayoutJson> for Layout {
    type Error = Error;

    fn try_from(json: LayoutJson) -> Result<Self> {
        let side = SideId(0);
        let rope = match json.rope {
            RopeKind::None => Rope::None,
            RopeKind::Half => Rope::Half(side),
            RopeKind::Adjacent => Rope::Adjacent(side),
        };
        let frequencies = json.inverse_frequencies.unwrap_or_default();
        if matches!(rope, Rope::None) && !frequencies.is_empty() {
            return Err(Core::invalid("layout.inverseFrequencies", "none, since rope is none", "some").into());
        }
        check::finite("layout.inverseFrequencies", &frequencies, 1)?;
        let layer = LayerLayout {
            q_heads: json.query_heads,
            kv_heads: json.kv_heads,
            k_dim: json.key_dim,
            v_dim: json.value_dim,
            rope,
            window: json.window,
        };
        let layout = Self {
            fingerprint: hex32("layout.fingerprint", &json.fingerprint)?,
            ..Self::uniform(json.layers.into(), layer, Arc::from(frequencies), json.context)
        };
        layout.check()?;
        check::at_least("layout.context", layout.context as usize, 1)?;
        Ok(layout)
    }
}

impl TryFrom<&Layout> for LayoutJson {
    type Error = Error;

    fn try_from(layout: &Layout) -> Result<Self> {
        let Some(first) = layout.layers.first().filter(|f| layout.layers.iter().all(|l| l == *f)) else {
            return Err(Core::unsupported("a layout whose layers differ").into());
        };
        let (rope, side) = match first.rope {
            Rope::None => (RopeKind::None, None),
            Rope::Half(side) => (RopeKind::Half, Some(side)),
            Rope::Adjacent(side) => (RopeKind::Adjacent, Some(side)),
        };
        Ok(Self {
            layers: layout.layers.len() as u16,
            query_heads: first.q_heads,
            kv_heads: first.kv_heads,
            key_dim: first.k_dim,
            value_dim: first.v_dim,
            rope,
            inverse_frequencies: side.map(|s| layout.side(s).map(|x| x.to_vec())).transpose()?,
            window: first.window,
            context: layout.context,
            fingerprint: hex(&layout.fingerprint),
        })
    }
}

/// Lower-case hex digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(2 * bytes.len()), |text, b| text + &format!("{b:02x}"))
}

/// 32 bytes from 64 hex digits.
pub(crate) fn hex32(field: &str, text: &str) -> Result<[u8; 32]> {
    let mut out = [0; 32];
    let digit = |i: usize| text.as_bytes().get(i).and_then(|b| char::from(*b).to_digit(16));
    for (i, byte) in out.iter_mut().enumerate() {
        match (digit(2 * i), digit(2 * i + 1)) {
            (Some(high), Some(low)) if text.len() == 64 => *byte = (high * 16 + low) as u8,
            // The text may be a secret: only its length is told.
            _ => {
                return Err(
                    Core::invalid(field, "64 hex digits", format_args!("{} bytes", text.len())).into()
                );
            }
        }
    }
    Ok(out)
}
