//! The shared contract suite, on every path and behind the deferred backend.

use std::sync::Arc;

use kvasir_core::Backend;
use kvasir_testkit::{Deferred, contract};

use crate::cpus;

#[test]
fn every_path_keeps_the_contract() {
    for backend in cpus() {
        contract::run(&backend);
    }
}

#[test]
fn the_deferred_backend_keeps_the_contract() {
    for backend in cpus() {
        let deferred = Deferred::new(Arc::new(backend));
        contract::run(&deferred);
        assert!(deferred.reads() > 0 && deferred.info().kind == "deferred");
    }
}
