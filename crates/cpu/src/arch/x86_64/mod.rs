//! x86-64 paths.

pub(crate) mod avx2;

/// Features found, of those some path uses or could use.
pub(crate) fn features() -> Vec<String> {
    let mut found = Vec::new();
    macro_rules! look {
        ($($name:tt)*) => { $(if is_x86_feature_detected!($name) { found.push($name.to_owned()); })* };
    }
    look!("sse4.1" "avx" "avx2" "fma" "f16c" "avxvnni" "avx512f" "avx512bw" "avx512vl" "avx512vnni" "avx512vbmi" "avx512bf16");
    found
}
